"""The entropy mechanism (Cui et al. 2025, arXiv 2505.22617). Claims:

1. under GRPO entropy collapses; Clip-Cov and KL-Cov hold it, at a held-out reward that is as good or better;
2. reward follows from entropy as R = -a e^H + b, and the first 15 to 25 % of the steps foretell the end.
"""

from __future__ import annotations

import math
from functools import partial
from statistics import fmean
from typing import Any

from common import SETTINGS, Record, bootcamp, curves, last, of, options, plot, run, save, spread, table, warm_start

from lit_rl import DAPO
from lit_rl.callbacks import ClipCov, EntropyMonitor, KLCov
from lit_rl.charts import pair
from lit_rl.entropy_law import FEWEST, fit

NAME = "entropy"
FORECAST = 0.25
"""Share of the steps that the forecast is fitted to."""
ARMS: dict[
    str, dict[str, Any]
] = {  # as in the paper, the variants clip no ratio below 2 (Clip-Cov) or none at all (KL-Cov)
    "GRPO": {"clip_low": 0.2, "clip_high": 0.2},
    "Clip-Cov": {"clip_low": 1.0, "clip_high": 1.0},
    "KL-Cov": {"clip_low": 1.0, "clip_high": math.inf},
}


class Entropy(EntropyMonitor):
    """Over all responses: those of groups without signal, which are most at the end, reach the model as well."""

    needs_all_rows = True


def laws(records: list[Record]) -> list[dict[str, float]]:
    """Of each run of GRPO: R^2 of the fit to all steps, and what the fit to the first ones says of the last ten."""
    result = []
    for record in of(records, "GRPO"):
        points = pair(record["curves"]["entropy"], record["curves"]["reward"])
        early = points[: round(FORECAST * len(points))]
        if len(early) < FEWEST:
            continue
        law, first = fit(points), fit(early)
        mean = fmean(r for _, r in points)
        unexplained = sum((r - law(h)) ** 2 for h, r in points)
        r2 = 1 - unexplained / sum((r - mean) ** 2 for _, r in points)
        said, was = fmean(first(h) for h, _ in points[-10:]), last(record, "reward")
        numbers = {"a": law.a, "b": law.b, "R2": r2, "forecast": said, "measured": was, "error": said - was}
        result.append({"seed": record["seed"], **{k: round(v, 4) for k, v in numbers.items()}})
    return result


def tables(records: list[Record]) -> str:
    main = table(
        records,
        {
            "held-out pass@1": lambda r: r["test"]["pass@1"],
            "held-out pass@8": lambda r: r["test"]["pass@8"],
            "entropy, first step": lambda r: r["curves"]["entropy"][0][1],
            "entropy, last 10 steps": lambda r: last(r, "entropy"),
        },
    )
    rows = ["| seed | a | b | R² | forecast | measured | error |", "|---|---|---|---|---|---|---|"]
    found = laws(records)
    for law in found:
        seed, *numbers = law.values()
        rows.append(f"| {seed:.0f} | {' | '.join(f'{v:.3f}' for v in numbers)} |")
    rows.append(
        f"| mean | | | {spread(v['R2'] for v in found)} | | | {spread(abs(v['error']) for v in found)} (absolute) |"
    )
    return f"{main}\n\n" + "\n".join(rows)


def main() -> None:
    args = options(__doc__, steps=200, warm_steps=100)
    records = []
    for seed in args.seeds:
        start = warm_start(args, seed)

        policy = partial(DAPO, start, overlong_buffer=0.0, dynamic_sampling=False, **SETTINGS)
        records.append(run(args, NAME, "warm start", seed, policy, bootcamp(args, seed), steps=0))
        for arm, clip in ARMS.items():
            trick = {"Clip-Cov": [ClipCov(ratio=0.2, low=0.3)], "KL-Cov": [KLCov(ratio=0.1, coef=3.0)]}.get(arm, [])
            make = partial(policy, **clip)
            records.append(run(args, NAME, arm, seed, make, bootcamp(args, seed), [Entropy(), *trick]))
    save(args, NAME, records, ("entropy", "reward", "val/pass@1"))
    print(tables(records))
    panels = {
        "Entropy of all responses, nats a token": curves(records, "entropy"),
        "Reward in training": curves(records, "reward"),
        "Validation pass@1": curves(records, "val/pass@1"),
    }
    plot(args.out / f"{NAME}.svg", panels)


if __name__ == "__main__":
    main()
