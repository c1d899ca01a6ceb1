"""Metrics against brute force."""

from itertools import combinations, permutations
from statistics import mean

import pytest
import torch

from lit_rl.metrics import Evaluation, majority, mean_interval, pass_at_k, tabulate
from lit_rl.task import Verdict


@pytest.mark.parametrize("correct", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_mean_over_subsets(correct, k):
    outcomes = [1] * correct + [0] * (6 - correct)
    assert pass_at_k(6, correct, k) == pytest.approx(mean(max(c) for c in combinations(outcomes, k)))


def test_pass_at_k_limits():
    with pytest.raises(ValueError, match="between 1 and the 4 samples"):
        pass_at_k(4, 2, 5)


def vote(*answers: str | None) -> bool:
    return majority([Verdict(a == "7", float(a == "7"), a) for a in answers])


def test_majority():
    assert vote("7", "7", "3")
    assert not vote("3", "7", "3")
    assert not vote(None, None, None), "blanks do not vote"
    assert vote(None, None, "7")
    assert vote("7", "3"), "of a tie the first seen wins"
    assert not vote("3", "7")
    for order in permutations(["7", "7", "1", "2", None]):
        assert vote(*order)


def test_interval_covers():
    torch.manual_seed(0)
    draws = (torch.rand(2000, 100) < 0.3).double()
    hits = [abs(m - 0.3) <= h for m, h in (mean_interval(row) for row in draws.tolist())]
    assert 0.92 < mean(hits) < 0.97


def test_table():
    records = [("b", 4, 4, True, 10.0, 1.0), ("a", 4, 1, False, 20.0, 0.25), ("a", 4, 3, True, 40.0, 0.75)]
    table = tabulate(records)
    assert [r.family for r in table.rows] == ["a", "b", "mean"]
    assert table.rows[0].pass_at == pytest.approx({1: 0.5, 2: 1 - mean([1 / 2, 0.0]), 4: 1.0})
    assert table.rows[-1].pass_at[1] == pytest.approx(0.75)
    assert table.as_dict() == pytest.approx({"a": 0.5, "b": 1.0, "mean": 0.75})
    assert table.rows[0].length == 30
    assert "pass@4" in str(table)
    assert "maj@4" in str(table)
    assert str(tabulate([])) == "no items were evaluated"


def test_the_metric_leaves_out_failed_verifiers():
    metric = Evaluation()
    metric.update("f", [Verdict(True, 1.0, "1"), Verdict.invalid("broken")], [3, 5])
    metric.update("f", [Verdict.invalid("broken")] * 2, [3, 5])
    table = metric.compute()
    assert table.rows[0].items == 1
    assert table.rows[0].pass_at == {1: 1.0}
    metric.reset()
    assert metric.compute().rows == []
