"""What the reproductions share: a tiny model that is warm-started once a seed, one way to train and test it, here or in processes
of its own, tables and plots."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import multiprocessing
import shutil
import time
import traceback
import warnings
from collections.abc import Callable, Container, Iterable, Sequence
from html import escape
from itertools import accumulate
from multiprocessing.connection import wait
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import lightning.pytorch as L
import torch
from transformers.utils.logging import disable_progress_bar

from lit_rl import SFT, Sampling, jsonl
from lit_rl.charts import HEIGHT, WIDTH, Points, axes, dots, finite, polylines, smooth, thin
from lit_rl.datamodules import Bootcamp
from lit_rl.run import METRICS, RunLogger

FAMILIES = {"spell-backwards": 2.0, "largest-number-from-parts": 1.0}
"""With weights for training; they have short prompts and responses. Held-out tasks are as many of each."""
SETTINGS: dict[str, Any] = {
    "lr": 1e-4,
    "warmup_steps": 5,
    "minibatches": 4,
    "sampling": Sampling(max_new_tokens=20),
    "microbatch_tokens": 4096,
    "eval_samples": 8,
    "eval_temperature": 1.0,
}
"""Of every policy, if a reproduction says nothing else; 8 responses a task, at temperature 1."""
COLORS = "#0072b2", "#d55e00", "#009e73", "#b8578f", "#a87900", "#6b6b6b"
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#5b6570}.title{font-size:13px;font-weight:600;fill:#1c2126}"
    "line{stroke:#dfe3e8}.zero{stroke:#5b6570}.raw{stroke-width:1;stroke-opacity:.3}"
    "polyline{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}circle{fill:var(--c)}"
)
Record = dict[str, Any]
"""Of one run: arm, seed, test (numbers on held-out tasks), curves ({name: [[step, value]]}), cpu_seconds, and those elapsed."""
Runs = Callable[[], Iterable[Record]]
"""One run or several, one after another; something that can be pickled."""


def parser(description: str | None, steps: int, warm_steps: int = 160) -> argparse.ArgumentParser:
    """The command line of a reproduction; its defaults are the settings whose results the documentation shows."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=steps, help="of reinforcement learning")
    parser.add_argument("--warm-steps", type=int, default=warm_steps, help="of SFT on worked solutions before it")
    parser.add_argument("--tasks", type=int, default=200, help="held-out ones of the test")
    parser.add_argument("--batch", type=int, default=16, help="tasks a step")
    parser.add_argument("--accelerator", default="cpu", help="the Trainer's: gpu, auto, ...")
    parser.add_argument("--precision", default="32-true", help="the Trainer's; 32-true is TF32 on a GPU")
    parser.add_argument("--work", type=Path, default=Path("runs/reproduce"), help="folder of models and metrics")
    parser.add_argument("--out", type=Path, default=Path("docs/reproductions"), help="folder of numbers and plots")
    return parser


def options(description: str | None, **kwargs: Any) -> argparse.Namespace:
    """What was given to the command line of `parser`."""
    args = parser(description, **kwargs).parse_args()
    prepare()
    return args


def prepare() -> None:
    """This process, for training."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    disable_progress_bar()
    torch.set_float32_matmul_precision("high")


def bootcamp(args: argparse.Namespace, seed: int, **kwargs: Any) -> Bootcamp:
    """Tasks of level 0 of FAMILIES, if no others are asked for; the test is of `args.tasks`, the validation of half as many."""
    defaults = {"families": FAMILIES, "level": 0, "batch_size": args.batch, "hint": False, "seed": seed}
    sizes = {"val_size": max(1, args.tasks // 2), "test_size": args.tasks, "eval_batch_size": 100}
    return Bootcamp(**{**defaults, **sizes, **kwargs})


def trainer(
    args: argparse.Namespace, steps: int, folder: Path, callbacks: Iterable[L.Callback] = (), validate: int = 0
) -> L.Trainer:
    return L.Trainer(
        max_steps=steps,
        accelerator=args.accelerator,
        precision=args.precision,
        devices=1,
        gradient_clip_val=1.0,
        logger=RunLogger(str(folder)),
        callbacks=list(callbacks),
        log_every_n_steps=1,
        val_check_interval=validate or None,
        limit_val_batches=1.0 if validate else 0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def warm_start(args: argparse.Namespace, seed: int, steps: int | None = None, model: str = "tiny", **data: Any) -> str:
    """The folder, named as `model`, of a model that has seen worked solutions; made once for each of these settings."""
    steps = steps or args.warm_steps
    name = f"{seed}-{steps}-" + "-".join(f"{k}-{v}" for k, v in data.items() if k != "families")
    folder = args.work / "warm" / ("-".join([name.strip("-"), *map(str, data.get("families", []))]))
    if not (folder / model).exists():
        L.seed_everything(seed, verbose=False)
        policy = SFT(model, lr=2e-3, schedule="cosine", warmup_steps=min(10, steps - 1), microbatch_tokens=2048)
        shutil.rmtree(folder / "log", ignore_errors=True)
        trainer(args, steps, folder / "log").fit(policy, bootcamp(args, seed, **{"batch_size": 32, **data}))
        policy.export(folder / model)
    return str(folder / model)


def folder_of(args: argparse.Namespace, name: str, arm: str, seed: int) -> Path:
    """Where a run keeps its metrics."""
    folder: Path = args.work / name / arm.replace(" ", "-") / str(seed)
    return folder


def run(
    args: argparse.Namespace,
    name: str,
    arm: str,
    seed: int,
    make: Callable[[], L.LightningModule],
    data: Bootcamp,
    callbacks: Iterable[L.Callback] = (),
    steps: int | None = None,
    tests: dict[str, Bootcamp] = {},  # noqa: B006  (never changed)
    validate: int = 25,
) -> Record:
    """Trains one arm of the reproduction `name` and tests it on `data`, and on `tests`, whose numbers get their key as a
    prefix. With no steps it tests what the arm begins with."""
    folder = folder_of(args, name, arm, seed)
    shutil.rmtree(folder, ignore_errors=True)
    begin, began = time.process_time(), time.perf_counter()
    L.seed_everything(seed, verbose=False)
    policy, steps = make(), args.steps if steps is None else steps
    if steps:
        trainer(args, steps, folder, callbacks, validate=min(validate, steps)).fit(policy, data)
    numbers: dict[str, Any] = {}
    for prefix, held_out in {"": data, **tests}.items():
        with contextlib.redirect_stdout(io.StringIO()):
            (found,) = trainer(args, 0, folder / "test").test(policy, held_out, verbose=False)
        numbers |= {prefix + k.removeprefix("test/"): round(v, 4) for k, v in found.items()}
    logged: dict[str, list[list[float]]] = {}
    for row in jsonl.read(folder / METRICS):
        for metric, value in row.items():
            if metric not in ("step", "epoch") and math.isfinite(value):
                logged.setdefault(metric, []).append([row["step"], float(f"{value:.4g}")])
    spent, elapsed = round(time.process_time() - begin, 1), round(time.perf_counter() - began, 1)
    print(
        f"{arm}, seed {seed}: held-out pass@1 {numbers['pass@1']:.3f}, {spent:.0f} CPU s in {elapsed:.0f} s", flush=True
    )
    return {
        "arm": arm, "seed": seed, "test": numbers, "curves": logged, "cpu_seconds": spent, "seconds": elapsed,
    }  # fmt: skip


def together(args: argparse.Namespace, name: str, every: Sequence[Runs]) -> list[Record]:
    """The records of all runs of the reproduction `name`. They are made here, one after another, if `args.jobs` is 1; otherwise
    in processes of their own, so many at a time, which may share a GPU. There a run that fails, or has not ended `args.minutes`
    after the first began, is reported and left out, and the others stay."""
    if args.jobs == 1:
        return [record for runs in every for record in runs()]
    context, folder = multiprocessing.get_context("spawn"), args.work / name / "records"  # a fork cannot use CUDA
    shutil.rmtree(folder, ignore_errors=True)
    files = [folder / f"{i}.jsonl" for i in range(len(every))]
    waiting = [context.Process(target=_keep, args=each) for each in zip(every, files, strict=True)]
    going: list[Any] = []
    deadline = time.monotonic() + 60 * args.minutes
    try:
        while (going or waiting) and time.monotonic() < deadline:
            while waiting and len(going) < args.jobs:
                going.append(waiting.pop(0))
                going[-1].start()
            wait([process.sentinel for process in going], max(0.0, deadline - time.monotonic()))
            for process in [process for process in going if not process.is_alive()]:
                going.remove(process)
                if process.exitcode:
                    print(f"{process.name} ended with {process.exitcode}", flush=True)
    finally:
        for process in going:
            process.kill()
    if late := len(going) + len(waiting):
        print(f"{late} of {len(every)} processes had not ended after {args.minutes:g} minutes", flush=True)
    return [record for file in files for record in jsonl.read(file)]


def _keep(runs: Runs, file: Path) -> None:
    """Keeps each record of these runs as soon as it is made."""
    prepare()
    try:
        for record in runs():
            jsonl.append(file, [record])
    except Exception:
        print(f"failed: {runs}", traceback.format_exc(), sep="\n", flush=True)


def save(args: argparse.Namespace, name: str, records: list[Record], keep: Iterable[str]) -> None:
    """NAME.json in `args.out`: the settings and the runs, with these of their curves."""
    kept = [{**r, "curves": {k: r["curves"][k] for k in keep if k in r["curves"]}} for r in records]
    lines = ",\n".join(json.dumps(r, separators=(",", ":")) for r in kept)
    settings = json.dumps({k: v for k, v in vars(args).items() if k not in ("work", "out")})
    minutes = sum(r["cpu_seconds"] for r in records) / 60
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(
        f'{{"settings":{settings},\n"cpu_minutes":{minutes:.1f},\n"runs":[\n{lines}\n]}}\n'
    )


def of(records: list[Record], arm: str) -> list[Record]:
    return [r for r in records if r["arm"] == arm]


def arms(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(r["arm"] for r in records))


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation over seeds."""
    values = list(values)
    if not values:
        return "–"
    return f"{fmean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{fmean(values):.3f}"


def first(record: Record, curve: str, steps: int = 10) -> float:
    """Mean of a curve over the first steps."""
    return fmean(v for _, v in record["curves"][curve][:steps])


def last(record: Record, curve: str, steps: int = 10) -> float:
    """Mean of a curve over the last steps; of all for 0."""
    return fmean(v for _, v in record["curves"][curve][-steps:])


def table(records: list[Record], columns: dict[str, Callable[[Record], float]]) -> str:
    """Markdown: a line an arm; mean and standard deviation over seeds of each column, and the first column by seed."""
    seeds = list(dict.fromkeys(r["seed"] for r in records))
    first = next(iter(columns.values()))
    head = ["", *columns, f"by seed ({', '.join(map(str, seeds))})"]
    lines = [head, ["---"] * len(head)]
    for arm in arms(records):
        mine = of(records, arm)
        cells = [_cell(mine, value) for value in columns.values()]
        lines.append([arm, *cells, " ".join(f"{first(r):.2f}" for r in mine)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(records: list[Record], value: Callable[[Record], float]) -> str:
    try:
        return spread(value(r) for r in records)
    except (KeyError, ValueError):  # an arm without this curve, or without any value in it
        return "–"


def plot(path: Path, panels: dict[str, dict[str, list[Points]]], by: str = "step", dotted: Container[str] = ()) -> None:
    """SVG: panels {title: {label: one curve a seed}} in a row. Pale lines are seeds, the strong one is their mean; of labels
    that are `dotted`, every point is a dot."""
    drawn = []
    labels = list(dict.fromkeys(label for panel in panels.values() for label in panel))
    for i, (title, panel) in enumerate(panels.items()):
        points = [p for curves in panel.values() for curve in curves for p in curve]
        xs = [a for a, _ in points] or [0.0]
        svg, x, y = axes(by, min([0.0, *xs]), max(xs), finite(points), smallest=float(by == "step"))
        for label, curves in panel.items():
            if label in dotted:
                marks = "".join(dots(curve, x, y, 2) for curve in curves)
            else:
                smoothed = [_smooth(curve) for curve in curves]
                marks = "".join(polylines([(x(a), y(b)) for a, b in thin(curve)], "raw") for curve in smoothed)
                marks += polylines([(x(a), y(b)) for a, b in _mean(smoothed)])
            svg.append(f'<g style="--c:{COLORS[labels.index(label) % len(COLORS)]}">{marks}</g>')
        heading = f'<text class="title" x="12" y="-8">{escape(title)}</text>'
        drawn.append(f'<g transform="translate({i * WIDTH},30)">{heading}{"".join(svg)}</g>')
    places = list(accumulate((max(140, 40 + 7 * len(label)) for label in labels), initial=54))
    legend = [
        f'<g style="--c:{COLORS[i % len(COLORS)]}"><polyline points="{at},{HEIGHT + 44} {at + 22},{HEIGHT + 44}"/>'
        f'<text x="{at + 28}" y="{HEIGHT + 48}">{escape(label)}</text></g>'
        for i, (label, at) in enumerate(zip(labels, places[:-1], strict=True))
    ]
    width, height = WIDTH * len(panels), HEIGHT + 56
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<style>{STYLE}</style><rect width="{width}" height="{height}" fill="#fff"/>{"".join(drawn + legend)}</svg>\n'
    )


def _smooth(curve: Points) -> Points:
    return smooth(curve) if len(curve) > 30 else curve


def _mean(curves: list[Points]) -> Points:
    """Of the seeds that have a value at a step."""
    values: dict[float, list[float]] = {}
    for curve in curves:
        for a, b in curve:
            values.setdefault(a, []).append(b)
    return [(a, fmean(v)) for a, v in sorted(values.items())]


def curves(records: list[Record], name: str) -> dict[str, list[Points]]:
    """For `plot`: one metric of all arms that have it."""
    found = {
        arm: [[(a, b) for a, b in r["curves"][name]] for r in of(records, arm) if name in r["curves"]]
        for arm in arms(records)
    }
    return {arm: lines for arm, lines in found.items() if lines}
