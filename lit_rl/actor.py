"""Actor: a LightningModule that holds a language model, answers tasks with it, and is evaluated by its answers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, is_dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lit_rl import adapters, encoding, models, ranks, resume, sharding, ternary
from lit_rl.adapters import LoRA
from lit_rl.checks import require, require_literals
from lit_rl.evaluated import Evaluated
from lit_rl.export import describe, export_model, from_description
from lit_rl.generation.base import Completion, Generator, Sampling
from lit_rl.scoring import Scorer
from lit_rl.task import Task, Verdict
from lit_rl.tolerance import Spare

Responses = tuple[list[Task], list[list[int]], list[list[Completion]]]
"""Tasks whose prompts fit, those prompts' tokens, and completions of each."""


class Actor(Evaluated):
    """A causal language model with its tokenizer, the engine that samples from it, and the scorer of what it says.

    It validates, tests and predicts in a Trainer as it is; a `Policy` is an actor that learns.

    Args:
        model: "tiny" (about a million parameters, offline; "tiny-qwen3" and so on for other architectures),
            "smollm2-135m", a hub id, a folder, a GGUF file, or a module.
        tokenizer: A hub id or folder, when it is not the model's own; or a tokenizer, when `model` is a module.
        dtype: Of the weights; "auto" is as stored. On a GPU, keep float32 here and set the Trainer's precision.
        attn_implementation: As in transformers; None is its own choice.
        lora: Train low-rank adapters beside frozen weights, which may be in 4 bits; None trains all weights.
        chat: Whether prompts go through the tokenizer's chat template; "auto": when it has one.
        sampling: How responses are drawn, in training and (but for `eval_temperature`) in evaluation.
        generator: The engine that samples; None is the native one.
        max_rows: Responses that the native engine samples at a time: lower it when memory runs out while sampling.
        scoring: Where and within what limits responses are scored.
        eval_samples: Responses a task in validate and test; pass@k and maj@k want several.
        eval_temperature: Sampling temperature in evaluation; None is that of training.
        seed: Of all sampling; None is the one of `seed_everything`, or 0.
    """

    def __init__(
        self,
        model: str | nn.Module = "tiny",
        *,
        tokenizer: str | Any | None = None,
        dtype: Literal["float32", "float64", "bfloat16", "float16", "auto"] = "float32",
        attn_implementation: str | None = None,
        lora: LoRA | None = None,
        chat: Literal["auto", "always", "never"] = "auto",
        sampling: Sampling = Sampling(),  # noqa: B008  (a default the command line can show; never changed in place)
        generator: Generator | None = None,
        max_rows: int = 256,
        scoring: Scorer = Scorer(),  # noqa: B008
        eval_samples: int = 1,
        eval_temperature: float | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        require(eval_samples >= 1, "eval_samples", eval_samples, "at least 1")
        objects = {"model": model, "tokenizer": tokenizer, "generator": generator or object()}
        self.save_hyperparameters(ignore=[k for k, v in objects.items() if not isinstance(v, str | None)])
        require_literals(type(self), self.hparams)
        self.hparams.update(
            {k: asdict(v) for k, v in self.hparams.items() if is_dataclass(v) and not isinstance(v, type)}
        )
        self.sampling = sampling if isinstance(sampling, Sampling) else Sampling(**sampling)
        self.scorer = scoring if isinstance(scoring, Scorer) else Scorer(**scoring)
        self.eval_samples, self.eval_temperature, self.chat, self.seed = eval_samples, eval_temperature, chat, seed
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        rng = torch.get_rng_state() if isinstance(model, str) and models.is_tiny(model) else None
        if isinstance(model, str):
            self.model, self.tokenizer = models.load(model, tokenizer, dtype, attn_implementation)
        origin = model if isinstance(model, str) else getattr(model, "name_or_path", "")
        lora = LoRA(**lora) if isinstance(lora, dict) else lora
        self.model, self.adapters = adapters.adapt(self.model, lora, origin, rng)
        self.strict_loading = self.adapters is None  # a checkpoint with adapters holds nothing else of the model
        self.model.train()
        models.disable_dropout(self.model)  # on-policy, the ratio must be one
        endings = getattr(self.model, "generation_config", None) or self.model.config
        self.eos = encoding.prepare_tokenizer(self.tokenizer, endings)
        if generator is None:
            from lit_rl.generation.native import NativeGenerator

            generator = NativeGenerator(self.eos, self.tokenizer.pad_token_id or 0, self.decode, max_rows)
        elif hasattr(generator, "connect"):
            generator.connect(self.tokenizer, self.eos)
        self.generator: Any = generator
        self.spare = Spare()
        self.name, self.stream = "", 0
        """Where several learn together: what each is called, and which numbers are drawn for it."""
        self._warned: set[str] = set()
        self.counts: dict[str, float] = {}
        """Events of one training step, such as prompts that are too long."""
        self.seconds: dict[str, float] = {}
        """Spent in this training step, by activity."""
        self.sampled_tokens = 0
        """In this training step."""
        self._copies: dict[str, int] = {}
        """How often each prompt was sampled in this training step."""

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def encode(self, tasks: list[Task], room: int) -> tuple[list[Task], list[list[int]]]:
        """The tasks whose prompts leave `room` tokens of the model's context, and those prompts. The rest is counted."""
        limit = models.context_length(self.model) - room
        encode = partial(encoding.encode_prompt, self.tokenizer, chat=self.chat)
        prompts = [ids or [] for ids in self.spare("prompt", encode, [task.prompt for task in tasks])]
        if empty := prompts.count([]):
            self.count("skipped/prompt_empty", empty)
        fit = [i for i, prompt in enumerate(prompts) if 0 < len(prompt) <= limit]
        if too_long := sum(len(prompt) > limit for prompt in prompts):
            self.count("skipped/prompt_too_long", too_long)
            self.warn(
                "skipped/prompt_too_long",
                f"prompts of more than {limit} tokens are left out: the model's context is {limit + room}, of which the response"
                f" may take {room}. Lower the tasks' level or sampling.max_new_tokens.",
            )
        return [tasks[i] for i in fit], [prompts[i] for i in fit]

    @property
    def seed_value(self) -> int:
        seed = self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))
        return seed + (self.stream << 32)  # other seeds are smaller

    def seeds(self, tasks: list[Task], samples: int, purpose: str) -> list[list[int]]:
        """A seed a response, from (seed, step, prompt, sample) alone; equal prompts of a step, on whatever rank, are told
        apart by order, that of one process."""
        train = purpose == "train" and self._trainer is not None
        step, rank = (self.trainer.global_step, self.global_rank) if train else (0, 0)
        seen = self._copies if train else {}
        every = [(task.turn, rank, i, task.key()) for i, task in enumerate(tasks)]
        result: list[list[int]] = [[] for _ in tasks]
        for _, owner, at, key in sorted(one for part in ranks.gather(every) for one in part) if train else every:
            copy = seen[key] = seen.get(key, -1) + 1
            if owner == rank:
                names = (f"{self.seed_value}\0{purpose}\0{step}\0{key}\0{copy}\0{i}" for i in range(samples))
                digests = (blake2b(name.encode(), digest_size=8).digest() for name in names)
                result[at] = [int.from_bytes(digest, "big") >> 1 for digest in digests]
        return result

    def respond(
        self, tasks: list[Task], samples: int, purpose: str = "predict", sampling: Sampling | None = None
    ) -> Responses:
        """Samples `samples` responses to each task."""
        sampling = sampling or self.sampling
        tasks, prompts = self.encode(tasks, sampling.max_new_tokens)
        return tasks, prompts, self.generate(sampling, prompts, self.seeds(tasks, samples, purpose))

    def generate(self, sampling: Sampling, prompts: list[list[int]], *rows: Any) -> list[list[Completion]]:
        """What the engine samples with the present weights; `rows` are its seeds, and what has `begun`."""
        with self.clock("generate"), self.precision():
            self.generator.sync(self.model)
            completions: list[list[Completion]] = self.generator.generate(prompts, rows[0], sampling, *rows[1:])
        self.sampled_tokens += sum(len(c.tokens) for group in completions for c in group)
        return completions

    def score(self, tasks: list[Task], texts: list[str]) -> list[Verdict]:
        """The verdict on each text, a response to the task at its place; a task without a scorer is an error."""
        items = []
        for task, text in zip(tasks, texts, strict=True):
            if task.score is None:
                raise ValueError(
                    f"the task {task.key()[:80]!r} has no `score`, which rewards and evaluation need: give it one. SFT trains"
                    " without it, when the Trainer's limit_val_batches is 0"
                )
            items.append((task.score, text))
        with self.clock("score"):
            verdicts = self.scorer(items)
        if failed := [v for v in verdicts if not v.valid]:
            self.count("skipped/verifier_failed", len(failed))
            self.warn(
                "skipped/verifier_failed",
                f"{len(failed)} responses could not be scored and count nowhere; the first: {failed[0].reason}.",
            )
        return verdicts

    def count(self, name: str, value: float = 1.0) -> None:
        """Adds to a count of this training step, which is logged as the sum over ranks."""
        self.counts[name] = self.counts.get(name, 0.0) + value

    def warn(self, count: str, message: str) -> None:
        """Once for each count: the further messages would differ in their numbers alone."""
        if count not in self._warned:
            self._warned.add(count)
            rank_zero_warn(f"{message} Counted as {count}; this message comes once.")

    @contextmanager
    def clock(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start

    def precision(self) -> AbstractContextManager[Any]:
        """The Trainer's forward context (autocast), for passes outside training_step."""
        return self.trainer.precision_plugin.forward_context() if self._trainer is not None else nullcontext()

    def configure_model(self) -> None:
        """Shards the language models that this module holds, when the strategy is one that shards."""
        if self._trainer is not None and self.device_mesh is not None:
            for child in self.children():
                sharding.shard(child, self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        sharding.refuse_unsupported(self.trainer.strategy, self.model, self.adapters is not None)
        super().setup(stage)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Casting to half precision is for weights. Buffers that a model computes, such as its rotary frequencies, keep
        their dtype: rounded, they would shift positions."""
        kept = [(m, name, m._buffers[name]) for m in self.modules() for name in m._non_persistent_buffers_set]
        super()._apply(fn, recurse)
        for module, name, before in kept:
            after = module._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype and not before.is_meta:
                module._buffers[name] = before.to(after.device)
        return self

    @property
    def eval_sampling(self) -> Sampling:
        return (
            self.sampling
            if self.eval_temperature is None
            else replace(self.sampling, temperature=self.eval_temperature)
        )

    def answer(self, tasks: list[Task]) -> Responses:
        """As `respond`: `eval_samples` responses to each task."""
        return self.respond(tasks, self.eval_samples, "eval", self.eval_sampling)

    def judge(
        self, tasks: list[Task], prompts: list[list[int]], completions: list[list[Completion]]
    ) -> list[tuple[Task, list[Verdict], list[int]]]:
        """Of what `answer` returns, each task with the verdicts on its responses and their lengths; the evaluation has them."""
        pairs = [(task, c.text) for task, group in zip(tasks, completions, strict=True) for c in group]
        verdicts = iter(self.score([task for task, _ in pairs], [text for _, text in pairs]))
        lengths = [[len(c.tokens) for c in group] for group in completions]
        judged = [(task, [next(verdicts) for _ in each], each) for task, each in zip(tasks, lengths, strict=True)]
        for task, given, each in judged:
            self.evaluation.update(task.family or "all", given, each)
        return judged

    def evaluate(self, tasks: list[Task]) -> None:
        self.judge(*self.answer(tasks))

    def predict_step(self, batch: list[Task], batch_idx: int) -> list[dict[str, Any]]:
        """One record a response: task, prompt, response and verdict."""
        kept, _, completions = self.answer(batch)
        pairs = [(task, c.text) for task, group in zip(kept, completions, strict=True) for c in group]
        records: list[dict[str, Any]] = [
            {"task": task.id, "family": task.family, "prompt": task.text(), "response": text} for task, text in pairs
        ]
        if all(task.score for task in kept):
            verdicts = self.score([task for task, _ in pairs], [text for _, text in pairs])
            records = [record | {"verdict": vars(v)} for record, v in zip(records, verdicts, strict=True)]
        return records

    def on_validation_start(self) -> None:
        sharding.gather(self.model)  # once for all batches: ranks may have different numbers of them

    def on_validation_end(self) -> None:
        sharding.release(self.model)

    on_test_start, on_test_end, on_predict_end = on_validation_start, on_validation_end, on_validation_end

    def on_predict_start(self) -> None:
        super().on_predict_start()
        sharding.gather(self.model)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lit_rl"] = {
            "model": describe(self.model, self.tokenizer),
            "ranks": ranks.gather(self.rank_state() | resume.rank_state(self.trainer, checkpoint)),
            "adapters": self.adapters,
        }
        if self.adapters:
            checkpoint["state_dict"] = adapters.only_adapters(checkpoint["state_dict"], "model.")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None:  # Lightning does so when the weights are loaded, and have been rounded
            self.trainer.precision_plugin.convert_module(self)
        saved = checkpoint.get("lit_rl", {})
        adapters.check(self.adapters, saved.get("adapters"))
        rounded = saved.get("model", {}).get("ternary", {})
        if rounded and self._trainer is not None and self.trainer.state.fn == "fit":
            ternary.refuse_without_callback(rounded, self.trainer.callbacks)  # type: ignore[attr-defined]
        ternary.convert(self.model, rounded)
        if self._trainer is None:  # load_from_checkpoint: the weights alone
            return
        if state := resume.of_this_rank(self.trainer, saved.get("ranks", [])):
            self.load_rank_state(state)
            checkpoint.update(resume.rank_state(self.trainer, state))

    def rank_state(self) -> dict[str, Any]:
        """What this rank carries from step to step, as plain data."""
        return {"generator": self.generator.state_dict()}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        self.generator.load_state_dict(state["generator"])

    def export(self, folder: str | Path, overwrite: bool = False, packed: bool = False) -> None:
        """Writes a Hugging Face folder that transformers and vLLM load; adapters are merged, and also in "adapter" inside.
        With `packed` ternary layers stay in 2 bits, for lit-rl alone. To be called on all ranks; rank 0 writes."""
        model = self.model
        if sharding.is_sharded(model):
            weights = sharding.whole_state(model)
            if self.global_rank == 0:
                model, _ = from_description(describe(model, self.tokenizer))
                if self.adapters:
                    model, _ = adapters.adapt(model, LoRA(**self.adapters["lora"]), "")
                model.load_state_dict(weights)
        if self.global_rank == 0:
            export_model(model, self.tokenizer, folder, overwrite=overwrite, packed=packed)
