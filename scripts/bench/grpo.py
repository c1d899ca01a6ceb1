"""What a GRPO step costs in lit-rl and in TRL, in time and memory, on the same weights, prompts, rewards and token counts.

Sides take turns, each in a process of its own, so that load on the machine meets all of them and peak memory is a side's own.
On a GPU the next process starts while one is measured, and waits with nothing but its imports done.
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
    "smollm2": Shape(micro_batch=16, model="smollm2-135m"),
    "smollm2-short": Shape(prompts=4, prompt_tokens=(6, 20), new_tokens=16, micro_batch=16, model="smollm2-135m"),
    "135M": Shape(vocabulary=49_152, hidden=576, layers=30, heads=9, key_heads=3, intermediate=1536),  # as SmolLM2-135M
    "1.5B": Shape(  # as Qwen2.5-1.5B
        prompts=16,
        prompt_tokens=(128, 128),
        new_tokens=256,
        vocabulary=151_936,
        hidden=1536,
        layers=28,
        heads=12,
        key_heads=2,
        intermediate=8960,
        micro_batch=32,
    ),
}
LIT, AHEAD, MIXED, BEST, DEFAULT, FLOOR = (
    "lit-rl", "lit-rl ahead", "lit-rl mixed", "TRL best", "TRL default", "floor",
)  # fmt: skip
SIDES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {  # script and settings
    "cpu": {
        LIT: ("with_lit_rl.py", {}),
        AHEAD: ("with_lit_rl.py", {"ahead": "thread"}),  # for ahead.py: its gain is in the time that elapses
        BEST: ("with_trl.py", {"bf16": False, "gradient_checkpointing": False}),
        DEFAULT: ("with_trl.py", {}),
        FLOOR: ("with_floor.py", {}),  # needs responses of one length
    },
    "cuda": {  # weights, gradients and AdamW's averages in bfloat16, and in float32 with autocast; each with the other
        LIT: ("with_lit_rl.py", {"precision": "bf16-true", "dtype": "bfloat16"}),
        BEST: ("with_trl.py", {"gradient_checkpointing": False, "model_init_kwargs": {"dtype": "bfloat16"}}),
        MIXED: ("with_lit_rl.py", {"precision": "bf16-mixed"}),
        DEFAULT: ("with_trl.py", {}),  # with gradient checkpointing
    },
}
DEFAULT_SHAPES = {
    "cpu": ["tiny", "natural", "long", "vocabulary"],
    "cuda": ["tiny", "long", "vocabulary", "135M", "1.5B"],
}
GOALS = {  # of a shape: what, against which side, and the share of it that lit-rl takes at most; with one thread
    "tiny": [("step", BEST, 0.4), ("step", DEFAULT, 0.15), ("generation", BEST, 0.5), ("memory_mb", BEST, 0.5)],
    "natural": [("step", BEST, 0.3), ("memory_mb", BEST, 0.5)],
    "long": [("step", BEST, 0.2), ("memory_mb", BEST, 0.5)],
    "vocabulary": [("memory_mb", BEST, 0.15)],
    "smollm2": [("step", BEST, 0.65), ("step", DEFAULT, 0.18), ("generation", BEST, 0.77), ("memory_mb", BEST, 0.5)],
}
COLUMNS = {"step": "step, s", "generation": "generation, s", "training": "training, s", "memory_mb": "memory, MB"}
Run = dict[str, Any]
"""One repetition of a side: shape, threads, side, and what `Meter` measured."""


def begin(
    shape: Shape, threads: int, side: str, folder: Path, steps: int, device: str = "cpu"
) -> subprocess.Popen[str]:
    """A process that waits, with its imports done, until `end`."""
    script, settings = SIDES[device][side]
    here = Path(__file__).resolve().parent
    paths = [str(here.parent.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",  # a thread that spins while it waits would count as work
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(here / script), *as_arguments(shape, folder, steps, settings, device)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env, cwd=folder)


def end(process: subprocess.Popen[str], limit: float | None = None) -> Run:
    """What it has measured, within so many seconds."""
    try:
        out, errors = process.communicate("\n", timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        raise RuntimeError(f"not done in {limit:.0f} s:\n{process.communicate()[1][-3000:]}") from None
    if process.returncode:
        raise RuntimeError(errors[-3000:])
    return json.loads(out.splitlines()[-1])  # type: ignore[no-any-return]


def measure(shape: Shape, threads: int, side: str, folder: Path, steps: int) -> Run:
    return {"threads": threads, "side": side, **end(begin(shape, threads, side, folder, steps))}


def repeat(name: str, args: argparse.Namespace) -> tuple[list[Run], list[str]]:
    """All runs of one shape, the sides in turn, and what failed. Each is reported on standard error as it ends."""
    shape, runs, failures = SHAPES[name], list[Run](), list[str]()
    sides = [side for side in args.sides if side != FLOOR or shape.forced]
    turns = [(threads, side) for threads, _, side in product(args.threads, range(args.repeats), sides)]
    with tempfile.TemporaryDirectory() as folder:

        def start(turn: int) -> subprocess.Popen[str]:
            return begin(shape, *turns[turn], Path(folder), args.steps, args.device)

        waiting: subprocess.Popen[str] | None = start(0)
        shape.make(Path(folder), args.device)
        for i, (threads, side) in enumerate(turns):
            process = waiting or start(i)
            waiting = start(i + 1) if args.device == "cuda" and i + 1 < len(turns) else None
            run: Run = {"shape": name, "threads": threads, "side": side}
            run |= {"device": args.device} if args.device != "cpu" else {}
            try:
                runs.append(run | end(process, args.limit))
                print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
            except RuntimeError as error:
                failures.append(f"{side} failed on {name}: {error}")
                print(failures[-1], file=sys.stderr, flush=True)
    counts = [sorted({r[what] for r in runs}) or [0] for what in ("new_tokens", "prompt_tokens")]
    # A real model's tokenizer may begin a text with a token of its own, which TRL leaves out.
    begins = shape.prompts if shape.model else 0
    if (len(counts[0]) > 1 and shape.forced) or counts[1][-1] - counts[1][0] > begins:
        failures.append(f"the sides should see the same tokens on {name}: responses {counts[0]}, prompts {counts[1]}")
    return runs, failures


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
    second = "second" if "device" in runs[0] else "CPU second"
    lines = [["", *COLUMNS.values(), f"response tokens a {second} of generation"], ["---"] * (len(COLUMNS) + 2)]
    for side in sides:
        rates = [r["new_tokens"] / r["generation"] for r in runs if r["side"] == side]
        lines.append([side, *(cell(values(runs, side, what)) for what in COLUMNS), f"{median(rates):.0f}"])
    for side in sides[1:] if LIT in sides else []:
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
        gpu = "device" in here[0]
        heading = f"### {shape}, " + ("GPU" if gpu else f"{threads} thread{'s' * (threads > 1)}")
        prompts = middle(here, here[0]["side"], "prompt_tokens")
        said = [f"Tokens a step: {prompts:.0f} of prompts, {tokens} of responses."]
        if not gpu and values(here, LIT, "program"):
            own, step = (middle(here, LIT, what) for what in ("program", "step"))
            said.append(f"lit-rl spends {own:.2f} s ({own / step:.0%}) outside the model's own calls.")
        if threads == 1 and not gpu and shape in GOALS:
            said.append(goals(here, shape))
        parts += [heading, table(here), " ".join(said)]
    return "\n\n".join(parts)


def machine(device: str = "cpu") -> dict[str, str]:
    """The processor, or the GPU too, and the versions."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    found = {"cpu": f"{model}, {os.cpu_count()} cores"}
    if device == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    return found | {name: version(name) for name in ("torch", "lightning", "transformers", "trl")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SIDES, default="cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES)
    sides = list(dict.fromkeys(side for every in SIDES.values() for side in every if side != AHEAD))
    parser.add_argument("--sides", nargs="+", choices=sides, help="lit-rl first")
    parser.add_argument("--steps", type=int, default=2, help="measured in each process, after one that is not")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each side")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--limit", type=float, help="seconds a process may take")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    args = parser.parse_args()
    args.shapes = args.shapes or DEFAULT_SHAPES[args.device]
    args.sides = args.sides or [side for side in SIDES[args.device] if side != AHEAD]
    runs: list[Run] = []
    failures: list[str] = []
    found = machine(args.device)
    for shape in args.shapes:
        more, failed = repeat(shape, args)
        runs, failures = runs + more, failures + failed
        if args.json:  # after each shape, since all of them take long
            lines = ",\n".join(json.dumps(r) for r in runs)
            args.json.write_text(f'{{"machine":{json.dumps(found)},\n"steps":{args.steps},\n"runs":[\n{lines}\n]}}\n')
    print(", ".join([found["cpu"], *(f"{k} {v}" for k, v in found.items() if k != "cpu")]) + "\n\n" + tables(runs))
    if failures:
        sys.exit("\n\n".join(["", *failures]))


if __name__ == "__main__":
    main()
