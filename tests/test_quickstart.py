"""The quickstart's script, with next to no training."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_quickstart_script(tmp_path):
    command = [
        sys.executable,
        ROOT / "scripts/quickstart.py",
        "--warm-steps",
        "2",
        "--steps",
        "2",
        "--seed",
        "3",
        "--run",
        tmp_path / "q",
    ]
    for _ in range(2):  # a second run replaces the first
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "q/summary.json").read_text())
    assert summary.keys() == {"before", "after", "seed", "train_seconds"}
    assert summary["before"].keys() == summary["after"].keys() > {"mean"}
    assert summary["seed"] == 3
    assert "<svg" in (tmp_path / "q/report.html").read_text()
    assert (tmp_path / "q/model/model.safetensors").exists()
    assert "mean held-out pass@1" in done.stdout
    assert "0%|" not in done.stderr  # bars of files that take no time
