"""Every built-in family passes every gate."""

import json
from collections import Counter
from pathlib import Path

import pytest

from lit_rl.datamodules.families import families
from lit_rl.datamodules.families.gates import check, digest

GOLDEN = Path(__file__).parent / "golden.json"


@pytest.mark.parametrize("name", families())
def test_gates(name):
    failed = [f"{gate.name}: {gate.detail}" for gate in check(families()[name]) if not gate.passed]
    assert not failed


def test_questions_of_a_version_never_change():
    """golden.json holds a hash of each family's questions. When it differs, raise the family's version and rerun
    `python tests/families/test_families.py`, which writes the file anew."""
    golden = json.loads(GOLDEN.read_text())
    assert {name: golden.get(name) for name in families()} == current()


def test_there_are_enough_families_in_all_modes():
    known = families().values()
    modes = Counter(family.mode for family in known)
    assert len(known) >= 36
    assert len({family.category for family in known}) >= 10
    assert set(modes) == {"value", "trace", "construct", "complete", "optimise", "decide", "inverse", "program"}
    assert (modes["value"] + modes["trace"]) / len(known) <= 0.4, "no more than two fifths evaluate or trace"


def current():
    return {name: f"v{family.version} {digest(family)}" for name, family in families().items()}


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(current(), indent=1) + "\n")
