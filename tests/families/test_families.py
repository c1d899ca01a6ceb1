"""Every built-in family passes every gate."""

import pytest

from lit_rl.datamodules.families import families
from lit_rl.datamodules.families.gates import check


@pytest.mark.parametrize("name", families())
def test_gates(name):
    failed = [f"{gate.name}: {gate.detail}" for gate in check(families()[name]) if not gate.passed]
    assert not failed
