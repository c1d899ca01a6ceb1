"""Ternary weights by quantisation-aware training (BitCPM4, in MiniCPM4, arXiv 2506.07900, section 3.3.1). Claims: a model that
was trained in high precision keeps most of its skill when the last 40 % of its training are ternary, which is as good as
ternary training from the start; the learning rate must rise again for that; and rounding without training keeps nothing.
With `--model smollm2-135m` the model has been trained already, and the steps are those of its fine-tuning."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

from common import Record, bootcamp, curves, last, parser, plot, prepare, run, save, table, together

from lit_rl import SFT, LoRA, Sampling, models, ternary
from lit_rl.callbacks import TernaryQAT
from lit_rl.export import export_model
from lit_rl.models import SMOLLM2, TINY

NAME = "ternary"
MODELS: dict[str, dict[str, Any]] = {
    TINY: {"lr": 2e-3, "microbatch_tokens": 2048},
    SMOLLM2: {"lr": 3e-4, "max_rows": 1024, "sampling": Sampling(max_new_tokens=32)},
}
WHOLE, ROUNDED, NF4 = "high precision", "ternary, not trained", "4 bits (nf4), not trained"
ARMS: dict[str, dict[str, float] | None] = {  # share of the steps before the start, factor and share of the re-warming
    WHOLE: None,
    "from the start": {"start": 0, "factor": 1.0, "rewarm": 0},
    "from 60 %, re-warmed": {"start": 0.6, "factor": 0.5, "rewarm": 0.05},
    "from 60 %, not re-warmed": {"start": 0.6, "factor": 1.0, "rewarm": 0},
    "from 60 %, decayed": {"start": 0.6, "factor": 0.05, "rewarm": 0},
}
"""The third is the report's. The last has the learning rate at which a high-precision training has ended."""


def policy(args: argparse.Namespace, start: str) -> Any:
    kwargs: dict[str, Any] = {"warmup_steps": 10, "schedule": "wsd", "decay_share": 0.2, **MODELS[args.model]}
    kwargs |= {"lr": args.lr} if args.lr else {}
    return partial(SFT, start, eval_samples=4, eval_temperature=1.0, **kwargs)


def callback(setting: dict[str, float], args: argparse.Namespace) -> TernaryQAT:
    start, rewarm = round(setting["start"] * args.steps), round(setting["rewarm"] * args.steps)
    return TernaryQAT(start_step=start, rewarm_steps=rewarm, lr_factor=args.factor * setting["factor"])


def kept(records: list[Record], record: Record) -> float:
    """pass@1 in percent of that in high precision, of the same seed."""
    found = {r["seed"]: r["test"]["pass@1"] for r in records if r["arm"] == WHOLE}
    return 100 * record["test"]["pass@1"] / max(1e-9, found[record["seed"]])


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
    export_model(model, tokenizer, folder, overwrite=True)


def runs(args: argparse.Namespace, name: str, start: str, seed: int, arm: str) -> Iterator[Record]:
    """That of an arm, and after high precision those of what it has trained, in fewer bits."""
    data, setting, made = bootcamp(args, seed, batch_size=2 * args.batch), ARMS[arm], []

    def keep() -> Any:
        made.append(policy(args, start)())
        return made[-1]

    yield run(args, name, arm, seed, keep, data, [callback(setting, args)] if setting else [], validate=0)
    if arm == WHOLE:
        folder = args.work / name / "whole" / str(seed)
        whole, ternarised = str(folder / "whole"), str(folder / "rounded")
        made[0].export(whole, overwrite=True)
        rounded(whole, ternarised)
        yield run(args, name, ROUNDED, seed, policy(args, ternarised), data, steps=0)
        nf4 = partial(policy(args, whole), lora=LoRA(quantize="nf4"))
        yield run(args, name, NF4, seed, nf4, data, steps=0)


def main() -> None:
    own = parser(__doc__, steps=100)
    own.add_argument("--model", choices=MODELS, default=TINY)
    own.add_argument("--arms", choices=ARMS, nargs="+", default=[*ARMS])
    own.add_argument("--lr", type=float, help="the model's, if none is given")
    own.add_argument("--factor", type=float, default=1.0, help="of the learning rate, in ternary steps of all arms")
    own.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process of its own")
    own.add_argument("--minutes", type=float, default=1440, help="after which runs in processes of their own end")
    args = own.parse_args()
    prepare()
    name = NAME if args.model == TINY else f"{NAME}-{args.model}"
    start, folder = args.model, args.work / name / "start"
    if args.model != TINY:  # a folder loads faster
        start = str(folder if folder.exists() else export_model(*models.load(args.model), folder))
    records = together(args, name, [partial(runs, args, name, start, s, arm) for s in args.seeds for arm in args.arms])
    order = [*ARMS, ROUNDED, NF4]
    records.sort(key=lambda r: (args.seeds.index(r["seed"]), order.index(r["arm"])))
    save(args, name, records, ("loss", "ternary/zeros", "ternary/flips", "ternary/scale_drift"))
    print(tables(records))
    panels = {"Loss": curves(records, "loss"), "Share of codes that flip": curves(records, "ternary/flips")}
    plot(args.out / f"{name}.svg", panels)


if __name__ == "__main__":
    main()
