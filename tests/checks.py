"""Runs a file of checks of Triton's kernels, here in Triton's interpreter and there on a GPU. Which of the two is decided when
triton is imported, for the whole process: each run is a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ON_GPU = torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET")
"""Whether this process compiles kernels."""
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def check(name: str, interpreted: bool) -> None:
    pytest.importorskip("triton")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", Path(__file__).with_name(name)],
        env=env | ({"TRITON_INTERPRET": "1"} if interpreted else {}),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(autouse=True)
def where_kernels_run():
    """For a file of checks to import: its tensors are made on the GPU, where there is one."""
    assert ON_GPU or os.environ.get("TRITON_INTERPRET"), (
        "without a GPU set TRITON_INTERPRET=1 before triton is imported"
    )
    with torch.device("cuda" if ON_GPU else "cpu"):
        yield
