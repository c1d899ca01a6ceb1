"""The benchmark against TRL runs, and what the documentation shows of it is what its numbers give."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from lit_rl.models import find_spec

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts/bench/grpo.py"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    yield runpy.run_path(str(SCRIPT))
    sys.modules.pop("shapes", None)


@pytest.mark.slow
def test_all_sides_do_the_same_work(bench):
    if find_spec("trl") is None:
        pytest.skip("trl is not installed")
    options = ["--shapes=tiny", "--steps=1", "--repeats=1", "--json=out.json", "--sides", "lit-rl", "TRL best", "floor"]
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = json.loads(Path("out.json").read_text())["runs"]
    assert bench["tables"](runs) in done.stdout
    ours, theirs, floor = runs
    shape = bench["SHAPES"]["tiny"]
    for run in runs:
        assert run["new_tokens"] == shape.prompts * shape.samples * shape.new_tokens
        assert run["prompt_tokens"] == sum(len(text.split()) for text in shape.texts)
        assert 0 < run["generation"] < run["step"] == pytest.approx(run["generation"] + run["training"])
    assert 0 < ours["memory_mb"] < theirs["memory_mb"]
    assert floor["generation"] < ours["generation"]
    assert floor["training"] < ours["training"]
    assert 0 < ours["program"] < ours["step"]


def test_half_of_the_groups_have_no_signal(bench):
    shape = bench["SHAPES"]["natural"]
    rewards = [{shape.reward(prompt, response) for response in ("w2", "w34 w5", "w71")} for prompt in shape.texts]
    assert [len(r) > 1 for r in rewards] == [True, False] * 4


def test_documented_numbers_are_the_runs_own(bench):
    kept = json.loads((ROOT / "docs/benchmarks.json").read_text())
    page = (ROOT / "docs/benchmarks.md").read_text()
    assert bench["tables"](kept["runs"]) in page
    assert all(f"{name} {number}" in page for name, number in kept["machine"].items() if name != "cpu")
    assert kept["machine"]["cpu"] in page


@pytest.mark.slow
def test_chunks_take_fewer_passes_and_the_documentation_has_their_table():
    script = ROOT / "scripts/bench/chunked.py"
    options = ["--chunks", "256", "32", "--seeds", "0", "--steps", "4", "--skip", "2", "--json", "out.json"]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    runs, table = json.loads(Path("out.json").read_text())["runs"], runpy.run_path(str(script))["table"]
    assert table(runs) in done.stdout
    whole, parts = runs
    assert whole["versions"] == 1 < parts["versions"]
    assert parts["passes"] < whole["passes"] / 2
    kept = json.loads((ROOT / "docs/chunked.json").read_text())
    assert table(kept["runs"]) in (ROOT / "docs/benchmarks.md").read_text()
