"""Test-time reinforcement learning (Zuo et al. 2025, arXiv 2504.16084). Claims: rewards from the policy's own majority vote
raise held-out pass@1 where the policy is competent; where it is not, it learns its own mistakes, and the monitor of
MajorityVote says so."""

from __future__ import annotations

import warnings
from functools import partial

from common import SETTINGS, Record, bootcamp, curves, first, last, options, plot, run, save, table, warm_start

from lit_rl import GRPO
from lit_rl.callbacks import EntropyMonitor, MajorityVote

NAME = "ttrl"
WARNING = "the policy agrees with itself more and is right less"
INCOMPETENT = 0.4
"""Share of the competent policy's warm start."""
LR = 2e-5
"""A vote needs smaller steps than a label: at 1e-4 the policy agrees with itself sooner than it gets better."""


def tables(records: list[Record]) -> str:
    return table(
        records,
        {
            "held-out pass@1": lambda r: r["test"]["pass@1"],
            "held-out maj@8": lambda r: r["test"]["maj@8"],
            "majority ratio, last 10 steps": lambda r: last(r, "vote/majority_ratio"),
            "label accuracy, first 10": lambda r: first(r, "vote/label_accuracy"),
            "and last 10": lambda r: last(r, "vote/label_accuracy"),
            "warned (share of seeds)": lambda r: r["warned"],
        },
    )


def main() -> None:
    args = options(__doc__, steps=150, warm_steps=100)
    records = []
    for seed in args.seeds:
        for arm, warm_steps in {
            "competent": args.warm_steps,
            "incompetent": max(2, round(INCOMPETENT * args.warm_steps)),
        }.items():
            start = warm_start(args, seed, warm_steps)
            policy = partial(GRPO, start, kl_coef=0.0, aggregate="token", group=32, **{**SETTINGS, "lr": LR})
            data = bootcamp(args, seed)
            records.append(run(args, NAME, f"{arm}, warm start", seed, policy, data, steps=0))
            callbacks = [EntropyMonitor(), MajorityVote(samples=16)]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                records.append(run(args, NAME, f"{arm}, TTRL", seed, policy, data, callbacks, validate=10))
            records[-1]["warned"] = float(any(WARNING in str(w.message) for w in caught))
    save(args, NAME, records, ("vote/majority_ratio", "vote/label_accuracy", "vote/true_reward", "val/pass@1"))
    print(tables(records))
    panels = {
        "Validation pass@1": curves(records, "val/pass@1"),
        "Majority ratio": curves(records, "vote/majority_ratio"),
        "Label accuracy of the vote": curves(records, "vote/label_accuracy"),
    }
    plot(args.out / f"{NAME}.svg", panels)


if __name__ == "__main__":
    main()
