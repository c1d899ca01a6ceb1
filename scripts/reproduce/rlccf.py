"""Reinforcement learning from collective consistency feedback (arXiv 2508.12338). Claims: members of several architectures
that learn, without labels, from their common vote get better, each of them and their vote; and better than each alone by its
own vote (TTRL)."""

from __future__ import annotations

from functools import partial

from common import SETTINGS, Record, bootcamp, curves, of, options, plot, run, save, spread, warm_start

from lit_rl import RLCCF
from lit_rl.methods.rlccf import TINY

NAME = "rlccf"
ALONE, TOGETHER, START = "TTRL", "RLCCF", "warm start"


def tables(records: list[Record]) -> str:
    """A line a member, and one of their common vote."""
    together = {arm: of(records, arm) for arm in (START, TOGETHER)}
    lines = [["held-out pass@1", START, "TTRL alone", TOGETHER], ["---"] * 4]
    for member in TINY:
        cells = {arm: spread(r["test"][f"{member}/pass@1"] for r in runs) for arm, runs in together.items()}
        alone = spread(r["test"][f"{member}/pass@1"] for r in of(records, f"{ALONE} {member}"))
        lines.append([member, cells[START], alone, cells[TOGETHER]])
    vote = {arm: spread(r["test"]["pass@1"] for r in runs) for arm, runs in together.items()}
    lines.append(["vote of all", vote[START], "–", vote[TOGETHER]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    args = options(__doc__, steps=30, warm_steps=60)
    records = []
    for seed in args.seeds:
        starts = [warm_start(args, seed, model=name) for name in TINY]
        data = bootcamp(args, seed, batch_size=max(1, args.batch // 2))
        settings = {**SETTINGS, "kl_coef": 0.0, "aggregate": "token", "minibatches": 2}
        arms = {START: (starts, 0), TOGETHER: (starts, None)}
        arms |= {f"{ALONE} {name}": ([start], None) for name, start in zip(TINY, starts, strict=True)}
        for arm, (models, steps) in arms.items():
            make = partial(RLCCF, models, **settings)  # one member alone is TTRL
            records.append(run(args, NAME, arm, seed, make, data, steps=steps, validate=10))
    save(args, NAME, records, ("val/pass@1", "vote/label_accuracy", *(f"val/{name}/pass@1" for name in TINY)))
    print(tables(records))
    trained = [r for r in records if r["arm"] != START]
    panels = {
        "Validation pass@1 (of RLCCF: of the vote)": curves(trained, "val/pass@1"),
        "Label accuracy of the vote": curves(trained, "vote/label_accuracy"),
    }
    plot(args.out / f"{NAME}.svg", panels)


if __name__ == "__main__":
    main()
