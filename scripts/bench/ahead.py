"""What one-step-off rollouts gain: the time that elapses in a step of the shape `tiny`, on a machine with two idle cores."""

import tempfile
from pathlib import Path

from grpo import AHEAD, LIT, SHAPES, measure


def main() -> None:
    shape = SHAPES["tiny"]
    print("| | elapsed, s | CPU, s |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        shape.make(Path(folder))
        for side in (LIT, AHEAD) * 3:
            run = measure(shape, 1, side, Path(folder), steps=5)
            print(f"| {side} | {run['elapsed']:.2f} | {run['step']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
