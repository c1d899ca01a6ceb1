"""What both sides train on: the same model, prompts and rewards. Each side is a process of its own and measures itself."""

from __future__ import annotations

import gc
import json
import random
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

WORDS = 512


@dataclass
class Shape:
    """A GRPO step: `prompts` prompts of so many tokens, `samples` responses each, of exactly `new_tokens` tokens if `forced`."""

    prompts: int = 8
    prompt_tokens: tuple[int, int] = (6, 74)
    samples: int = 8
    new_tokens: int = 64
    vocabulary: int = WORDS
    hidden: int = 128
    layers: int = 4
    heads: int = 0
    """0: of size 32; and as many key heads as these, and three times the hidden size in between."""
    key_heads: int = 0
    intermediate: int = 0
    forced: bool = True
    no_signal: bool = False
    """Every second prompt rewards all responses alike."""
    micro_batch: int = 64
    """Of TRL, in rows; lit-rl keeps its default."""
    model: str = ""
    """Instead of the random Llama, a name that lit_rl.models.load takes."""

    @cached_property
    def texts(self) -> list[str]:
        """The prompts."""
        rng, (shortest, longest) = random.Random(0), self.prompt_tokens
        steps = max(1, self.prompts - 1)
        lengths = [shortest + (longest - shortest) * i // steps for i in range(self.prompts)]
        return [" ".join(f"w{rng.randrange(2, WORDS)}" for _ in range(n)) for n in lengths]

    def reward(self, prompt: str, response: str) -> float:
        """The share of even letters: rarely the same for two responses."""
        if self.no_signal and self.texts.index(prompt) % 2:
            return 1.0
        return sum(ord(c) % 2 == 0 for c in response) / max(1, len(response))

    def random_model(self, device: str = "cpu") -> Any:
        """A Llama of these sizes; on a GPU in bfloat16."""
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate or 3 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads or self.hidden // 32,
            num_key_value_heads=self.key_heads or None,
            max_position_embeddings=2048,
            tie_word_embeddings=self.vocabulary > WORDS,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
        torch.manual_seed(0)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32 if device == "cpu" else torch.bfloat16)

    def make(self, folder: Path, device: str = "cpu") -> None:
        """Writes model and tokenizer, with an end-of-sequence token that the model's head lacks if responses are `forced`."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        from lit_rl.models import load

        if self.model:
            model, tokenizer = load(self.model)
        else:
            vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, self.vocabulary)}
            words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
            words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
            model = self.random_model(device)
        if self.forced:
            tokenizer.add_special_tokens({"eos_token": "<never>"})
            assert tokenizer.eos_token_id == len(tokenizer) - 1 >= model.config.vocab_size
            model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        else:
            _end_by_chance(model, tokenizer.eos_token_id, 1 / 24)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _end_by_chance(model: Any, eos: int, probability: float) -> None:
    """Makes each next token the end of sequence with about this probability, through a direction that all tokens share."""
    import math

    import torch

    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        hidden = model.model(torch.arange(2, 34)[None]).last_hidden_state[0, :, 0].mean()
        model.lm_head.weight[eos] = 0.0
        model.lm_head.weight[eos, 0] = math.log(probability * len(model.lm_head.weight)) / hidden


def cpu_seconds() -> float:
    """Of this process and its ended children, in user and system mode."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


@dataclass
class Meter:
    """Of one run. The first step is not counted; memory is the whole run's peak. On a CPU time is that of the processor, and
    memory is above what the imports hold; on a GPU time is what elapses while the device has nothing else to do, and memory
    is what torch has allocated there."""

    device: str = "cpu"
    ends: list[float] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)
    """At the ends of steps: what has elapsed, which says something on a machine that has nothing else to do."""
    generation: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    new_tokens: list[int] = field(default_factory=list)
    imported: int = 0
    inside: list[float] = field(default_factory=lambda: [0.0])
    """In `model` calls, by the end of each step."""

    def start(self) -> None:
        """When everything is imported and nothing made, and it is this process's turn."""
        sys.stdin.readline()
        gc.collect()
        with open("/proc/self/statm") as file:
            self.imported = int(file.read().split()[1]) * resource.getpagesize()

    def now(self) -> float:
        if self.device == "cpu":
            return cpu_seconds()
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()

    def generating(self, generate: Callable[..., Any], count: Callable[[Any], tuple[int, int]]) -> Callable[..., Any]:
        """`generate`, measured; count: of what it returns, the tokens of all prompts and of all responses."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            begin = self.now()
            result = generate(*args, **kwargs)
            self.generation.append(self.now() - begin)
            for tokens, n in zip((self.prompt_tokens, self.new_tokens), count(result), strict=True):
                tokens.append(n)
            return result

        return measured

    def model(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time is not the program's own. Such functions do not call each other. On a GPU they are not
        measured, since to wait for each would change what is measured."""
        if self.device != "cpu":
            return function

        def measured(*args: Any, **kwargs: Any) -> Any:
            begin = cpu_seconds()
            result = function(*args, **kwargs)
            self.inside[-1] += cpu_seconds() - begin
            return result

        return measured

    def step_ended(self) -> None:
        self.ends.append(self.now())
        self.clock.append(time.perf_counter())
        self.inside.append(self.inside[-1])

    def peak(self) -> int:
        """Bytes."""
        if self.device != "cpu":
            import torch

            return torch.cuda.max_memory_allocated()
        # not ru_maxrss, which begins with that of the process that started this one
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024 - self.imported

    def print(self) -> None:
        steps = len(self.ends) - 1
        step, generation = (self.ends[-1] - self.ends[0]) / steps, sum(self.generation[1:]) / steps
        numbers = {
            "step": step,
            "elapsed": (self.clock[-1] - self.clock[0]) / steps,
            "generation": generation,
            "training": step - generation,
            "memory_mb": self.peak() / 2**20,
            "prompt_tokens": sum(self.prompt_tokens[1:]) / steps,
            "new_tokens": sum(self.new_tokens[1:]) / steps,
        }
        if self.device == "cpu":
            numbers["program"] = step - (self.inside[-1] - self.inside[0]) / steps
        print("\n" + json.dumps(numbers))


def arguments() -> tuple[Shape, str, int, dict[str, Any], str]:
    """Of a side's process: shape, the model's folder, steps to measure, further settings, device."""
    shape, folder, steps, settings, device = sys.argv[1:]
    return Shape(**json.loads(shape)), folder, int(steps), json.loads(settings), device


def as_arguments(shape: Shape, folder: Path, steps: int, settings: dict[str, Any], device: str) -> list[str]:
    return [json.dumps(asdict(shape)), str(folder), str(steps), json.dumps(settings), device]
