"""Runs a file of checks in Triton's interpreter, which is chosen once a process: in one of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def check(name: str) -> None:
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", Path(__file__).with_name(name)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
