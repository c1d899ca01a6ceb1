"""Ternary weights by quantisation-aware training (BitCPM4, in MiniCPM4, arXiv 2506.07900, section 3.3.1). Claims: a model that
was trained in high precision keeps most of its skill when the last 40 % of its training are ternary, which is as good as
ternary training from the start; the learning rate must rise again for that; and rounding without training keeps nothing.
With `--model smollm2-135m` fine-tuning is ternary, or not, from its first step on, since pre-training was the training in high
precision: `--model smollm2-135m --steps 40 --batch 4 --tasks 50`."""

from __future__ import annotations

from functools import partial
from typing import Any

from common import Record, bootcamp, curves, last, options, plot, run, save, table

from lit_rl import SFT, LoRA, Sampling, models, ternary
from lit_rl.callbacks import TernaryQAT
from lit_rl.models import SMOLLM2, TINY

NAME = "ternary"
MODELS: dict[str, dict[str, Any]] = {
    TINY: {"lr": 2e-3},
    SMOLLM2: {"lr": 3e-4, "sampling": Sampling(max_new_tokens=32)},
}
ARMS: dict[str, dict[str, float] | None] = {  # share of the steps before the start, factor and share of the re-warming
    "high precision": None,
    "from the start": {"start": 0, "factor": 1.0, "rewarm": 0},
    "from 60 %, re-warmed": {"start": 0.6, "factor": 0.5, "rewarm": 0.05},
    "from 60 %, not re-warmed": {"start": 0.6, "factor": 1.0, "rewarm": 0},
    "from 60 %, decayed": {"start": 0.6, "factor": 0.05, "rewarm": 0},
}
"""The third is the report's. The last has the learning rate at which a high-precision training has ended."""
PRETRAINED = "high precision", "from the start"
"""The arms of a model that has been trained already."""


def policy(model: str, **settings: Any) -> Any:
    kwargs: dict[str, Any] = {"warmup_steps": 10, "schedule": "wsd", "decay_share": 0.2, "microbatch_tokens": 2048}
    return SFT(model, eval_samples=4, eval_temperature=1.0, **kwargs, **settings)


def callback(setting: dict[str, float], steps: int) -> TernaryQAT:
    start, rewarm = round(setting["start"] * steps), round(setting["rewarm"] * steps)
    return TernaryQAT(start_step=start, rewarm_steps=rewarm, lr_factor=setting["factor"])


def kept(records: list[Record], record: Record) -> float:
    """pass@1 in percent of that in high precision, of the same seed."""
    whole = next(r for r in records if r["seed"] == record["seed"] and r["arm"] == "high precision")
    return 100 * record["test"]["pass@1"] / max(1e-9, whole["test"]["pass@1"])


def tables(records: list[Record]) -> str:
    return table(
        records,
        {
            "held-out pass@1": lambda r: r["test"]["pass@1"],
            "kept, %": partial(kept, records),
            "loss, last 10 steps": lambda r: last(r, "loss"),
            "zeros": lambda r: last(r, "ternary/zeros"),
            "flips a step, ‰, last 10": lambda r: 1000 * last(r, "ternary/flips"),
            "scale drift": lambda r: last(r, "ternary/scale_drift", 1),
        },
    )


def rounded(start: str, folder: str) -> None:
    """Makes a folder of a model whose weights are rounded without training."""
    model, tokenizer = models.load(start)
    ternary.convert(model, ternary.choose(model, None, 32))
    models.export(model, tokenizer, folder, overwrite=True)


def main() -> None:
    args = options(__doc__, steps=100, models=list(MODELS))
    name, make = NAME if args.model == TINY else f"{NAME}-{args.model}", partial(policy, **MODELS[args.model])
    records = []
    for seed in args.seeds:
        data = bootcamp(args, seed, batch_size=2 * args.batch)
        made: list[Any] = []

        def keep(made: list[Any] = made) -> Any:
            made.append(make(args.model))
            return made[-1]

        for arm in ARMS if args.model == TINY else PRETRAINED:
            setting = ARMS[arm]
            callbacks = [callback(setting, args.steps)] if setting else []
            records.append(run(args, name, arm, seed, keep, data, callbacks, validate=0))
        folder = args.work / name / "whole" / str(seed)
        whole, ternarised = str(folder / "whole"), str(folder / "rounded")
        made[0].export(whole, overwrite=True)
        rounded(whole, ternarised)
        records.append(run(args, name, "ternary, not trained", seed, partial(make, ternarised), data, steps=0))
        nf4 = partial(make, whole, lora=LoRA(quantize="nf4"))
        records.append(run(args, name, "4 bits (nf4), not trained", seed, nf4, data, steps=0))
    save(args, name, records, ("loss", "ternary/zeros", "ternary/flips", "ternary/scale_drift"))
    print(tables(records))
    panels = {"Loss": curves(records, "loss"), "Share of codes that flip": curves(records, "ternary/flips")}
    plot(args.out / f"{name}.svg", panels)


if __name__ == "__main__":
    main()
