"""Learning to reason under off-policy guidance (Yan et al. 2025, arXiv 2504.14945). Claims: LUFFY, where a demonstration
joins each group, learns a level on which on-policy learning gets no reward at all; and it does better on held-out levels than
SFT on the same demonstrations."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from common import SETTINGS, Record, bootcamp, curves, first, last, options, plot, run, save, table, warm_start

from lit_rl import SFT, DrGRPO
from lit_rl.callbacks import EntropyMonitor, OffPolicyMixing

NAME = "luffy"
FAMILY = {"spell-backwards": 1.0}
START, LEVEL, HELD_OUT = 0, 1, 2
"""Levels of the warm start, of training, and of none of them."""


def policy(arm: str, start: str) -> Any:
    settings = {**SETTINGS, "lr": 3e-4, "minibatches": 2}
    if arm == "SFT":
        return SFT(start, **settings)
    if arm == "LUFFY":
        return DrGRPO(start, group=7, clip_low=1.0, clip_high=math.inf, **settings)
    return DrGRPO(start, group=8, **settings)


def tables(records: list[Record]) -> str:
    return table(
        records,
        {
            f"level {LEVEL}, trained": lambda r: r["test"]["pass@1"],
            f"level {HELD_OUT}, held out": lambda r: r["test"]["held_out/pass@1"],
            f"level {START}, of the start": lambda r: r["test"]["start/pass@1"],
            "reward, all steps": lambda r: last(r, "reward", 0),
            "p of demonstrations, first 10 steps": lambda r: first(r, "off_policy/prob"),
            "and last 10": lambda r: last(r, "off_policy/prob"),
        },
    )


def main() -> None:
    args = options(__doc__, steps=100, warm_steps=100)
    records = []
    for seed in args.seeds:
        start = warm_start(args, seed, families=FAMILY, level=START)
        data = bootcamp(args, seed, families=FAMILY, level=LEVEL)
        tests = {
            "held_out/": bootcamp(args, seed, families=FAMILY, level=HELD_OUT),
            "start/": bootcamp(args, seed, families=FAMILY, level=START),
        }
        for arm in ("warm start", "on-policy", "LUFFY", "SFT"):
            callbacks = [EntropyMonitor(), *([OffPolicyMixing()] if arm == "LUFFY" else [])]
            make = partial(policy, arm, start)
            steps = 0 if arm == "warm start" else None
            records.append(run(args, NAME, arm, seed, make, data, callbacks, steps, tests))
    save(args, NAME, records, ("reward", "off_policy/prob", "val/pass@1"))
    print(tables(records))
    panels = {
        "Validation pass@1, the trained level": curves(records, "val/pass@1"),
        "Reward of own responses": curves(records, "reward"),
    }
    plot(args.out / f"{NAME}.svg", panels)


if __name__ == "__main__":
    main()
