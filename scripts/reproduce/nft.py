"""Negative-aware fine-tuning (Chen et al. 2025, arXiv 2505.18116). Claims: NFT, which is supervised learning on the policy's
own right and wrong answers, reaches the level of GRPO and DAPO; and it beats RFT, which learns from the right ones alone."""

from __future__ import annotations

from functools import partial
from typing import Any

from common import SETTINGS, Record, bootcamp, curves, last, options, plot, run, save, table, warm_start

from lit_rl import DAPO, GRPO, NFT, RFT
from lit_rl.callbacks import EntropyMonitor

NAME = "nft"
ARMS: dict[
    str, tuple[Any, dict[str, Any]]
] = {  # all see the same tasks; groups without signal give none of them a gradient
    "GRPO": (GRPO, {"kl_coef": 0.0}),
    "DAPO": (DAPO, {"overlong_buffer": 0.0}),
    "NFT": (NFT, {}),
    "RFT": (RFT, {}),
}


def tables(records: list[Record]) -> str:
    return table(
        records,
        {
            "held-out pass@1": lambda r: r["test"]["pass@1"],
            "held-out pass@8": lambda r: r["test"]["pass@8"],
            "held-out maj@8": lambda r: r["test"]["maj@8"],
            "entropy, last 10 steps": lambda r: last(r, "entropy"),
        },
    )


def main() -> None:
    args = options(__doc__, steps=100, warm_steps=80)
    records = []
    for seed in args.seeds:
        start = warm_start(args, seed)
        for arm, (method, settings) in {"warm start": ARMS["GRPO"], **ARMS}.items():
            settings = {**SETTINGS, **settings, "dynamic_sampling": False}
            make = partial(method, start, **settings)
            steps = 0 if arm == "warm start" else None
            records.append(run(args, NAME, arm, seed, make, bootcamp(args, seed), [EntropyMonitor()], steps))
    save(args, NAME, records, ("entropy", "reward", "val/pass@1"))
    print(tables(records))
    panels = {
        "Validation pass@1": curves(records, "val/pass@1"),
        "Reward in training": curves(records, "reward"),
        "Entropy, nats a token": curves(records, "entropy"),
    }
    plot(args.out / f"{NAME}.svg", panels)


if __name__ == "__main__":
    main()
