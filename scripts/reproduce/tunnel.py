"""ModelTunnel v2 (MiniCPM4, arXiv 2506.07900, section 4). Claims: under muP the best learning rate does not depend on the width,
so what is found on a narrow model holds for a wide one; and a sigmoid of the loss on worked solutions (ScalingBench), fitted to
small models, foretells how many tasks a larger one solves."""

from __future__ import annotations

import math
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

from common import Record, bootcamp, curves, folder_of, last, of, options, plot, run, save, table

from lit_rl import SFT, MuP, Sampling
from lit_rl.callbacks import ScalingBench
from lit_rl.charts import Points
from lit_rl.datamodules import Bootcamp
from lit_rl.laws import LOSS, Sigmoid, sigmoid_fit
from lit_rl.mup import slope
from lit_rl.tunnel import Space, search, tunnel

Columns = dict[str, Callable[[Record], float]]
NAME, FAMILY = "tunnel", "sort-numbers"
*NARROW, WIDEST = WIDTHS = (32, 64, 128, 256)
RATES = [2.0**-k for k in range(11, 4, -1)]
ARMS = {"ordinary": None, "muP": MuP(base_width=64)}
FOUND, BENCH = "loss by log2 of the rate", "ScalingBench"
SCORE, PREDICTED, INTERVAL = "val/pass@1", "val/scaling_predicted", "val/scaling_interval"


def policy(width: int, lr: float, mup: MuP | None, samples: int = 1, longest: int = 1) -> SFT:
    """What it answers counts in `benched` alone."""
    kwargs: dict[str, Any] = {"schedule": "wsd", "warmup_steps": 5, "decay_share": 0.2, "microbatch_tokens": 4096}
    return SFT(f"tiny:{width}", lr=lr, mup=mup, eval_samples=samples, sampling=Sampling(longest), **kwargs)


def tasks(args: Namespace, seed: int, **kwargs: Any) -> Bootcamp:
    """Of one family, since each has a sigmoid of its own. What is shown is of the validation, so the test is short."""
    return bootcamp(args, seed, families=[FAMILY], test_size=max(1, args.tasks // 20), **kwargs)


def name_of(arm: str, width: int) -> str:
    return f"{arm}, width {width}"


def searched(args: Namespace, seed: int, arm: str) -> tuple[float, list[Record]]:
    """The learning rate that the tunnel finds on the narrowest model; and of each width all rates, with their losses."""

    @cache  # the rate that the tunnel gives the widest model is also one of those that are tried there
    def trained(model: str, lr: float) -> Record:
        make = partial(policy, int(model.partition(":")[2]), lr, ARMS[arm])
        data = tasks(args, seed, batch_size=max(1, args.batch // 4))
        return run(args, NAME, f"{arm}, {model}, {lr:.5f}", seed, make, data, [ScalingBench()], validate=args.steps)

    def objective(options: dict[str, Any], folder: Path) -> float:
        return last(trained(options["model.model"], options["model.lr"]), LOSS, 1)

    *narrow, widest = names = [f"tiny:{width}" for width in WIDTHS]
    folder = args.work / NAME / f"{arm}-{seed}"
    space: Space = {"model.lr": [*RATES]}
    shutil.rmtree(folder, ignore_errors=True)
    ((best_of_narrowest, _),) = tunnel(objective, space, folder, narrow[::-1], [widest])[widest]
    search(objective, space | {"model.model": [widest]}, folder, "own")
    records = []
    for width, model in zip(WIDTHS, names, strict=True):
        tried = [trained(model, lr) for lr in RATES]
        losses = [[math.log2(lr), last(r, LOSS, 1)] for lr, r in zip(RATES, tried, strict=True)]
        seconds = round(sum(r["cpu_seconds"] for r in tried), 1)
        record = {"arm": name_of(arm, width), "seed": seed, "test": tried[-1]["test"], "curves": {FOUND: losses}}
        records.append(record | {"cpu_seconds": seconds})
    return best_of_narrowest["model.lr"], records


def benched(args: Namespace, seed: int, lr: float) -> list[Record]:
    """Longer runs of all widths with this rate. The widest has a forecast from those of the others, at each validation."""
    steps = 3 * args.steps
    records: list[Record] = []
    folders: list[str] = []
    for width in WIDTHS:
        arm = name_of(BENCH, width)
        try:
            watch = ScalingBench(folders if width == WIDEST else [])
        except ValueError as error:  # where nothing is solved, there is nothing to fit
            print(f"seed {seed} has no forecast: {error}", flush=True)
            watch = ScalingBench()
        make = partial(policy, width, lr, ARMS["muP"], 4, 40)
        every = max(1, steps // 9)
        records.append(run(args, NAME, arm, seed, make, tasks(args, seed), [watch], steps=steps, validate=every))
        folders.append(str(folder_of(args, NAME, arm, seed)))
    return records


def best(record: Record) -> tuple[float, float]:
    """The learning rate, as log2, and the loss."""
    rate, loss = min(record["curves"][FOUND], key=lambda pair: pair[1])
    return rate, loss


def transferred(records: list[Record], record: Record) -> float:
    """The loss with the rate that is best at the narrowest width."""
    arm = record["arm"].partition(",")[0]
    narrowest = next(r for r in of(records, name_of(arm, NARROW[0])) if r["seed"] == record["seed"])
    return dict(record["curves"][FOUND])[best(narrowest)[0]]


def drift(records: list[Record]) -> Iterator[Record]:
    """For each arm and seed, the power of the width that the best learning rate follows."""
    for arm in ARMS:
        for seed in dict.fromkeys(r["seed"] for r in records):
            rates = [2 ** best(r)[0] for w in WIDTHS for r in of(records, name_of(arm, w)) if r["seed"] == seed]
            yield {"arm": arm, "seed": seed, "power": slope(WIDTHS, rates)}


def pairs(record: Record) -> list[tuple[float, float]]:
    """(loss, pass@1) of each validation."""
    scores = dict(record["curves"][SCORE])
    return [(loss, scores[step]) for step, loss in record["curves"][LOSS]]


def misses(record: Record) -> list[tuple[float, float]]:
    """Of each validation, how far the forecast is off, and half of its interval."""
    c = {name: dict(record["curves"][name]) for name in (SCORE, PREDICTED, INTERVAL)}
    return [(abs(c[PREDICTED][step] - score), c[INTERVAL][step]) for step, score in c[SCORE].items()]


def tables(records: list[Record]) -> str:
    rates = [r for r in records if FOUND in r["curves"]]
    bench = [r for r in records if FOUND not in r["curves"]]
    power = "power of the width that the best rate follows"
    columns: Columns = {
        "log2 of the best learning rate": lambda r: best(r)[0],
        "loss with it": lambda r: best(r)[1],
        f"loss with width {NARROW[0]}'s best": partial(transferred, rates),
        "excess": lambda r: transferred(rates, r) - best(r)[1],
    }
    forecast: Columns = {
        "pass@1 at the end": lambda r: last(r, SCORE, 1),
        "loss": lambda r: last(r, LOSS, 1),
        "forecast": lambda r: last(r, PREDICTED, 1),
        "± (95 %)": lambda r: last(r, INTERVAL, 1),
        "error, all validations": lambda r: fmean(miss for miss, _ in misses(r)),
        "inside the interval": lambda r: fmean(miss <= half for miss, half in misses(r)),
    }
    shown = table(rates, columns), table(list(drift(rates)), {power: lambda r: r["power"]}), table(bench, forecast)
    return "\n\n".join(shown)


def law(records: list[Record]) -> Sigmoid:
    """That of one seed, as ScalingBench had it."""
    return sigmoid_fit(pair for width in NARROW for r in of(records, name_of(BENCH, width)) for pair in pairs(r))


def bench_panel(records: list[Record]) -> dict[str, list[Points]]:
    """Of one seed the validations of all widths, and the sigmoid."""
    panel = {f"width {width}": [pairs(r) for r in of(records, name_of(BENCH, width))] for width in WIDTHS}
    with suppress(ValueError):
        fit, end = law(records), max(loss for seeds in panel.values() for points in seeds for loss, _ in points)
        panel[f"fitted to {NARROW[0]} to {NARROW[-1]}"] = [[(end * i / 29, fit(end * i / 29)) for i in range(30)]]
    return panel


def main() -> None:
    args = options(__doc__, steps=30)
    found = {(arm, seed): searched(args, seed, arm) for seed in args.seeds for arm in ARMS}
    records = [record for _, tried in found.values() for record in tried]
    records += [record for seed in args.seeds for record in benched(args, seed, found["muP", seed][0])]
    save(args, NAME, records, (FOUND, LOSS, SCORE, PREDICTED, INTERVAL))
    print(tables(records))
    lines = curves(records, FOUND)
    rates = {f"Loss, {arm} parametrisation": {f"width {w}": lines[name_of(arm, w)] for w in WIDTHS} for arm in ARMS}
    plot(args.out / f"{NAME}.svg", rates, "log2 of the learning rate")
    scores = {f"pass@1, seed {seed}": bench_panel([r for r in records if r["seed"] == seed]) for seed in args.seeds}
    plot(args.out / f"{NAME}_bench.svg", scores, "loss on worked solutions", [f"width {width}" for width in WIDTHS])


if __name__ == "__main__":
    main()
