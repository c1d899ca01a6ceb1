"""The reproductions run, and what the documentation shows of them is what their numbers give."""

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(p for p in (ROOT / "scripts/reproduce").glob("*.py") if p.name != "common.py")
MINIMAL = ["--steps=2", "--seeds=0", "--warm-steps=2", "--batch=2", "--tasks=4", "--work=work", "--out=out"]


@pytest.fixture(autouse=True)
def as_a_script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts/reproduce"))
    yield
    sys.modules.pop("common", None)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_it_runs(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), *MINIMAL])
    module = runpy.run_path(str(script), run_name="__main__")
    runs = json.loads(Path(f"out/{script.stem}.json").read_text())["runs"]
    assert module["tables"](runs) in capsys.readouterr().out
    assert len(runs) >= 4
    assert all(0 <= r["test"]["pass@1"] <= 1 for r in runs)
    assert "<polyline" in Path(f"out/{script.stem}.svg").read_text()


@pytest.mark.parametrize("kept", sorted((ROOT / "docs/reproductions").glob("*.json")), ids=lambda p: p.stem)
def test_documented_numbers_are_the_runs_own(kept):
    """Three seeds; at least one of NAME-MODEL, a model that is not tiny."""
    name, _, model = kept.stem.partition("-")
    module = runpy.run_path(str(ROOT / f"scripts/reproduce/{name}.py"))
    page = (ROOT / "docs/reproductions.md").read_text()
    result = json.loads(kept.read_text())
    assert result["settings"]["seeds"] in ([0, 1, 2], *([[0]] if model else []))
    assert module["tables"](result["runs"]) in page
    assert f"(reproductions/{kept.stem}.svg)" in page
    assert f"; {result['cpu_minutes']:.0f} CPU minutes" in page
