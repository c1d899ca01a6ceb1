"""What a GRPO step costs in lit-rl and in TRL, in CPU time and memory, on the same weights, prompts, rewards and token counts.

Sides take turns, each in a process of its own, so that load on the machine meets all of them and peak memory is a side's own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from shapes import Shape, as_arguments

SHAPES = {
    "tiny": Shape(),
    "natural": Shape(forced=False, no_signal=True),
    "long": Shape(prompts=2, prompt_tokens=(512, 512)),
    "vocabulary": Shape(vocabulary=151_936),
    "smollm2": Shape(prompts=4, prompt_tokens=(6, 20), new_tokens=16, micro_batch=16, model="smollm2-135m"),
}
LIT, AHEAD, BEST, DEFAULT, FLOOR = "lit-rl", "lit-rl ahead", "TRL best", "TRL default", "floor"
SIDES: dict[str, tuple[str, dict[str, Any]]] = {  # script and settings
    LIT: ("with_lit_rl.py", {}),
    AHEAD: ("with_lit_rl.py", {"ahead": "thread"}),  # for ahead.py: its gain is in the time that elapses
    BEST: ("with_trl.py", {"bf16": False, "gradient_checkpointing": False}),
    DEFAULT: ("with_trl.py", {}),
    FLOOR: ("with_floor.py", {}),  # needs responses of one length
}
GOALS = {  # shape -> (what, against which side, lit-rl's share of it at most); with one thread
    "tiny": [("step", BEST, 0.4), ("step", DEFAULT, 0.15), ("generation", BEST, 0.5), ("memory_mb", BEST, 0.5)],
    "natural": [("step", BEST, 0.3), ("memory_mb", BEST, 0.5)],
    "long": [("step", BEST, 0.2), ("memory_mb", BEST, 0.5)],
    "vocabulary": [("memory_mb", BEST, 0.15)],
    "smollm2": [("step", BEST, 0.65), ("step", DEFAULT, 0.18), ("generation", BEST, 0.77), ("memory_mb", BEST, 0.5)],
}
COLUMNS = {"step": "step, s", "generation": "generation, s", "training": "training, s", "memory_mb": "memory, MB"}
Run = dict[str, Any]
"""One repetition of a side: shape, threads, side, and what `Meter` measured."""


def measure(shape: Shape, threads: int, side: str, folder: Path, steps: int) -> Run:
    script, settings = SIDES[side]
    here = Path(__file__).resolve().parent
    paths = [str(here.parent.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",  # a thread that spins while it waits would count as work
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, str(here / script), *as_arguments(shape, folder, steps, settings)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"{side} failed on {shape}:\n{done.stderr[-3000:]}")
    return {"threads": threads, "side": side, **json.loads(done.stdout.splitlines()[-1])}


def repeat(shape: str, args: argparse.Namespace) -> list[Run]:
    """All runs of one shape, the sides in turn. Each is reported on standard error as it ends."""
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as folder:
        SHAPES[shape].make(Path(folder))
        sides = [side for side in args.sides if side != FLOOR or SHAPES[shape].forced]
        for threads, _, side in product(args.threads, range(args.repeats), sides):
            runs.append({"shape": shape} | measure(SHAPES[shape], threads, side, Path(folder), args.steps))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    prompts, responses = zip(*((r["prompt_tokens"], r["new_tokens"]) for r in runs), strict=True)
    assert len(set(responses)) == 1 or not SHAPES[shape].forced, f"response tokens should be the same: {responses}"
    # A real model's tokenizer may begin a text with a token of its own, which TRL leaves out.
    begins = SHAPES[shape].prompts if SHAPES[shape].model else 0
    assert max(prompts) - min(prompts) <= begins, f"prompt tokens should be the same: {prompts}"
    return runs


def values(runs: list[Run], side: str, what: str) -> list[float]:
    return [r[what] for r in runs if r["side"] == side]


def middle(runs: list[Run], side: str, what: str) -> float:
    return median(values(runs, side, what))


def ratio(runs: list[Run], side: str, what: str) -> float:
    """Of lit-rl's median to that of `side`; of times, per response token, since responses that end by chance differ."""
    share = middle(runs, LIT, what) / middle(runs, side, what)
    return share if what == "memory_mb" else share * middle(runs, side, "new_tokens") / middle(runs, LIT, "new_tokens")


def cell(numbers: list[float]) -> str:
    """Median (smallest to largest)."""
    digits = 0 if median(numbers) >= 100 else 1 if median(numbers) >= 10 else 2
    low, mid, high = (f"{x:.{digits}f}" for x in (min(numbers), median(numbers), max(numbers)))
    return f"{mid} ({low}–{high})" if len(numbers) > 1 else mid


def table(runs: list[Run]) -> str:
    """Markdown of one shape and number of threads: medians with the range, then ratios as in `ratio`."""
    sides = list(dict.fromkeys(r["side"] for r in runs))
    lines = [["", *COLUMNS.values(), "response tokens a CPU second of generation"], ["---"] * (len(COLUMNS) + 2)]
    for side in sides:
        rates = [r["new_tokens"] / r["generation"] for r in runs if r["side"] == side]
        lines.append([side, *(cell(values(runs, side, what)) for what in COLUMNS), f"{median(rates):.0f}"])
    for side in sides[1:]:
        ratios = [ratio(runs, side, what) for what in COLUMNS]
        lines.append([f"{LIT} / {side}", *(f"{r:.2f}" for r in ratios), f"{1 / ratio(runs, side, 'generation'):.2f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def goals(runs: list[Run], shape: str) -> str:
    """Each goal beside what was measured."""
    said = []
    for what, side, limit in GOALS[shape]:
        if values(runs, side, what):
            share, name = ratio(runs, side, what), COLUMNS[what].split(",")[0]
            said.append(f"{name} / {side} {share:.2f} (goal {limit:.2f}: {'met' if share <= limit else 'missed'})")
    return "Goals: " + "; ".join(said) + "."


def tables(runs: list[Run]) -> str:
    parts = []
    for shape, threads in dict.fromkeys((r["shape"], r["threads"]) for r in runs):
        here = [r for r in runs if (r["shape"], r["threads"]) == (shape, threads)]
        tokens = " / ".join(
            f"{middle(here, side, 'new_tokens'):.0f}" for side in dict.fromkeys(r["side"] for r in here)
        )
        heading = f"### {shape}, {threads} thread{'s' * (threads > 1)}"
        counts = f"Tokens a step: {middle(here, LIT, 'prompt_tokens'):.0f} of prompts, {tokens} of responses."
        parts += [heading, table(here), counts + (" " + goals(here, shape) if threads == 1 else "")]
    return "\n\n".join(parts)


def machine() -> dict[str, str]:
    """The processor and the versions."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    packages = ("torch", "lightning", "transformers", "trl")
    return {"cpu": f"{model}, {os.cpu_count()} cores"} | {name: version(name) for name in packages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "smollm2"])
    sides = [side for side in SIDES if side != AHEAD]
    parser.add_argument("--sides", nargs="+", choices=sides, default=sides, help="lit-rl first")
    parser.add_argument("--steps", type=int, default=2, help="measured in each process, after one that is not")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each side")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    args = parser.parse_args()
    runs: list[Run] = []
    found = machine()
    for shape in args.shapes:
        runs += repeat(shape, args)
        if args.json:  # after each shape, since all of them take long
            lines = ",\n".join(json.dumps(r) for r in runs)
            args.json.write_text(f'{{"machine":{json.dumps(found)},\n"steps":{args.steps},\n"runs":[\n{lines}\n]}}\n')
    print(", ".join([found["cpu"], *(f"{k} {v}" for k, v in found.items() if k != "cpu")]) + "\n\n" + tables(runs))


if __name__ == "__main__":
    main()
