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


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_its_documented_numbers_are_its_own(script):
    module = runpy.run_path(str(script))
    page = (ROOT / "docs/reproductions.md").read_text()
    kept = json.loads((ROOT / f"docs/reproductions/{script.stem}.json").read_text())
    assert kept["settings"]["seeds"] == [0, 1, 2]
    assert module["tables"](kept["runs"]) in page
    assert f"(reproductions/{script.stem}.svg)" in page
    assert f"{kept['cpu_minutes']:.0f} CPU minutes" in page
