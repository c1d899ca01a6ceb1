"""Verdict.of takes what reward functions return."""

import math
import pickle

import pytest

from lit_rl.task import Task, Verdict


@pytest.mark.parametrize(
    ("value", "correct", "score"),
    [
        (True, True, 1.0),
        (False, False, 0.0),
        (1, True, 1.0),
        (0.5, False, 0.5),
        (-2, False, -2.0),
        ({"a": 0.5, "b": 0.75}, True, 1.25),
    ],
)
def test_numbers(value, correct, score):
    verdict = Verdict.of(value)
    assert (verdict.correct, verdict.score, verdict.valid) == (correct, score, True)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "1 point", [1], {"a": math.nan}, Verdict(True, math.nan)])
def test_unusable_values_are_invalid_not_zero(value):
    verdict = Verdict.of(value)
    assert not verdict.valid
    assert verdict.reason


def test_a_task_travels():
    task = Task([{"role": "user", "content": "hi"}], responses=["a"])
    assert pickle.loads(pickle.dumps(task)) == task
    assert task.text() == "user: hi"
