"""How lit-rl's cost grows with group size, completion length, vocabulary and model, and what the program itself takes."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo import LIT, SHAPES, measure
from shapes import Shape

BASE = Shape(prompts=4, new_tokens=32)
POINTS: dict[str, list[dict[str, Any]]] = {  # what grows, and how it differs from BASE
    "group size": [{"samples": n} for n in (8, 16, 32, 64)],
    "completion length": [{"new_tokens": n} for n in (32, 64, 128, 256)],
    "vocabulary": [{"vocabulary": n} for n in (512, 4096, 32768)],
    "model width": [{"hidden": n} for n in (128, 256, 512)],
    "model layers": [{"layers": n} for n in (4, 8, 16)],
}


def point(shape: Shape, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        shape.make(Path(folder))
        return measure(shape, 1, LIT, Path(folder), steps)


def row(name: str, value: object, run: dict[str, Any]) -> str:
    numbers = [f"{run['step']:.2f}", f"{run['generation']:.2f}", f"{run['training']:.2f}"]
    numbers += [f"{run['step'] / run['new_tokens'] * 1e6:.0f}", f"{run['memory_mb']:.0f}"]
    numbers += [f"{run['program']:.2f} ({run['program'] / run['step']:.0%})"]
    return f"| {' | '.join([name, str(value), *numbers])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2, help="measured in each process, after one that is not")
    parser.add_argument("--only", nargs="+", choices=[*POINTS, "smollm2-short"], default=[*POINTS, "smollm2-short"])
    args = parser.parse_args()
    known: dict[str, dict[str, Any]] = {}
    print("| grows | to | step, s | generation, s | training, s | µs a response token | memory, MB | program, s |")
    print("|" + " --- |" * 8)
    for name in args.only:
        for change in POINTS.get(name, [{}]):
            shape = replace(BASE, **change) if name in POINTS else SHAPES[name]
            run = known.setdefault(repr(shape), {}) or point(shape, args.steps)
            known[repr(shape)] = run
            print(row(name, next(iter(change.values()), ""), run), flush=True)
            print(json.dumps(run), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
