"""What chunks do to a step where response lengths have a long tail: decoding passes, time, and how old trained tokens are.

python scripts/bench/chunked.py --json docs/chunked.json
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
import warnings
from collections import Counter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning.pytorch as L
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lit_rl import GRPO, Sampling, Task
from lit_rl.datamodules import TaskData
from lit_rl.encoding import tiny_tokenizer
from lit_rl.generation.native import NativeGenerator
from lit_rl.scoring import Scorer

LONGEST, PROMPTS, GROUP = 256, 8, 8
CHUNKS = {256: "whole", 128: "1/2", 64: "1/4", 32: "1/8"}
PAPER = {128: (-26, -36), 64: (-41, -56), 32: (-42, -62)}
"""MiniCPM4 (arXiv 2506.07900) with a longest response of 32k tokens: step time, sampling time, per cent."""
MEANS = [round(48 * 2.718 ** (0.8 * z), 1) for z in (-1.5, -1.0, -0.6, -0.2, 0.2, 0.6, 1.0, 1.5)]
"""Mean length of the responses to each kind of prompt: a log-normal's quantiles. Around it they are geometric."""
Run = dict[str, Any]


class LongTailed(LlamaForCausalLM):
    """A prompt's last token is of a kind, and so are all tokens of the response to it; each ends it with that kind's chance."""

    def forward(self, input_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        out = super().forward(input_ids=input_ids, past_key_values=past_key_values, **kwargs)
        kind = input_ids[:, -out.logits.shape[1] :, None] % len(MEANS)
        tokens = torch.arange(self.config.vocab_size)
        allowed = (tokens % len(MEANS) == kind) & (tokens >= 8)  # (B, T, V): no special ones
        logits = out.logits.masked_fill(~allowed, -torch.inf)
        chance = 1 / torch.tensor(MEANS)[kind.squeeze(-1)]
        end = (logits.logsumexp(-1) + (chance / (1 - chance)).log())[..., None]
        out.logits = torch.where(tokens == self.config.eos_token_id, end, logits)
        return out


class Meter(NativeGenerator):
    """Counts passes of the model one after another, tokens, and rows times passes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sums: Counter[str] = Counter()

    def generate(self, prompts: Any, seeds: Any, sampling: Any, begun: Any = None) -> Any:
        start = time.process_time()
        out = super().generate(prompts, seeds, sampling, begun)
        lengths = [len(c.tokens) for row in out for c in row]
        slots = len(lengths) * max(lengths, default=0)
        self.sums.update(passes=max(lengths, default=0), tokens=sum(lengths), slots=slots)
        self.sums["generation"] += time.process_time() - start
        return out


class Letters(TaskData):
    """Prompts that end in a letter, which is their kind. Half of the alphabet is right."""

    def tasks(self, split: str) -> list[Task]:
        letters = random.Random(0)
        return [
            Task(f"{i}{letters.choice('abcdefghijklmnopqrstuvwx')}", lambda text: float(text[:1] < "N"), id=str(i))
            for i in range(4000)
        ]


class Steps(L.Callback):
    """The numbers of each step."""

    def __init__(self, meter: Meter) -> None:
        self.meter, self.steps = meter, list[dict[str, float]]()

    def on_train_batch_start(self, *args: Any) -> None:
        self.meter.sums.clear()
        self.start = time.process_time()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        x = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("chunked/")}
        self.steps.append(x | dict(self.meter.sums) | {"cpu": time.process_time() - self.start})


def measure(chunk: int, seed: int, steps: int, skip: int) -> Run:
    """Means over the steps after those in which the buffer fills."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"  # so that nothing follows a prompt's letter
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
    )
    meter = Meter([tokenizer.eos_token_id], tokenizer.pad_token_id, tokenizer.decode, 10**6)
    policy = GRPO(
        LongTailed(config),
        tokenizer=tokenizer,
        generator=meter,
        scoring=Scorer("inline"),
        sampling=Sampling(max_new_tokens=LONGEST),
        kl_coef=0.0,
        group=GROUP,
        aggregate="token",
        lr=1e-3,
        chunk=chunk,
        seed=seed,
    )
    seen = Steps(meter)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[seen],
        limit_val_batches=0,
    )
    trainer.fit(policy, Letters(batch_size=PROMPTS))
    late = seen.steps[skip:]
    total = {name: sum(step.get(name, 0.0) for step in late) for name in late[0]}
    run: Run = {name: total[name] / len(late) for name in ("passes", "cpu", "generation", "tokens")}
    run |= {"trained": total["chunked/trained_tokens"] / len(late), "utilisation": total["tokens"] / total["slots"]}
    run |= {name: total[f"chunked/{name}"] / len(late) for name in ("versions", "lag", "rounds")}
    run |= {name: max(step[f"chunked/{name}"] for step in late) for name in ("versions_max", "lag_max")}
    return {"chunk": chunk, "seed": seed} | {name: round(value, 4) for name, value in run.items()}


def table(runs: list[Run]) -> str:
    def cell(chunk: int, what: str, digits: int = 0, relative: bool = False) -> str:
        numbers = [r[what] for r in runs if r["chunk"] == chunk]
        text = f"{mean(numbers):.{digits}f} ± {stdev(numbers) if len(numbers) > 1 else 0:.{digits}f}"
        whole = mean(r[what] for r in runs if r["chunk"] == LONGEST)
        return f"{text} ({mean(numbers) / whole - 1:+.0%})" if relative and chunk != LONGEST else text

    head = ["chunk", "passes a step", "generation, CPU s", "step, CPU s", "slots in use", "trained tokens", "rounds"]
    head += ["versions a response (most)", "age of a token in steps (most)", "paper: step, sampling"]
    lines = [head, ["---"] * len(head)]
    for chunk in sorted({r["chunk"] for r in runs}, reverse=True):
        most = {n: max(r[n] for r in runs if r["chunk"] == chunk) for n in ("versions_max", "lag_max")}
        paper = "{:+d} %, {:+d} %".format(*PAPER[chunk]) if chunk in PAPER else ""
        lines.append(
            [
                f"{CHUNKS.get(chunk, '')} ({chunk})",
                cell(chunk, "passes", relative=True),
                cell(chunk, "generation", 2, True),
                cell(chunk, "cpu", 2, True),
                cell(chunk, "utilisation", 2),
                cell(chunk, "trained"),
                cell(chunk, "rounds", 2),
                f"{cell(chunk, 'versions', 2)} ({most['versions_max']:.0f})",
                f"{cell(chunk, 'lag', 2)} ({most['lag_max']:.0f})",
                paper,
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chunks", nargs="+", type=int, default=list(CHUNKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--skip", type=int, default=16, help="steps at the start that are not counted")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    runs = [measure(chunk, seed, args.steps, args.skip) for seed in args.seeds for chunk in args.chunks]
    if args.json:
        lines = ",\n".join(json.dumps(r) for r in runs)
        args.json.write_text(f'{{"steps": {args.steps}, "skip": {args.skip},\n"runs": [\n{lines}\n]}}\n')
    print(table(runs))


if __name__ == "__main__":
    main()
