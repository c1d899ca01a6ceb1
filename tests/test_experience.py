"""Experience keeps rows, groups and columns together."""

import pytest
import torch

from lit_rl.experience import Experience, Terms, build, concat
from lit_rl.task import Task, Verdict


def sample() -> Experience:
    x = build([[1, 2], [1, 2], [3]], [[4], [5, 6, 7], [8, 9]], [0, 0, 1], [Task("a"), Task("b")])
    x.texts = ["r0", "r1", "r2"]
    x.verdicts = [Verdict(True, 1.0), Verdict(False, 0.0), Verdict(True, 1.0)]
    x.logps = torch.arange(15.0).view(3, 5)
    x.extra["row"] = torch.arange(3)
    return x


def test_build():
    x = sample()
    assert x.tokens.tolist() == [[1, 2, 4, 0, 0], [1, 2, 5, 6, 7], [3, 8, 9, 0, 0]]
    assert x.mask.int().tolist() == [[0, 0, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]
    assert x.response_lengths.tolist() == [1, 3, 2]


def test_rows_are_trimmed_and_keep_their_columns():
    part = sample().rows([0, 2])
    assert part.tokens.tolist() == [[1, 2, 4], [3, 8, 9]]
    assert part.texts == ["r0", "r2"]
    assert part.extra["row"].tolist() == [0, 2]
    assert part.logps.tolist() == [[0, 1, 2], [10, 11, 12]]
    assert len(sample().rows(torch.zeros(3, dtype=torch.bool))) == 0


def test_groups_are_renumbered():
    part = sample().groups([1])
    assert part.group.tolist() == [0]
    assert [t.prompt for t in part.tasks] == ["b"]
    assert part.texts == ["r2"]


def test_rows_are_let_go_in_place():
    x = build([[1]] * 5 + [[3]], [[4], [5, 6, 7], [8, 9], [2], [3], [4]], [0, 0, 0, 2, 2, 3], [Task("")] * 4)
    x.texts = list("abcdef")
    x.extra["row"] = torch.arange(6)
    assert x.first(2).tolist() == [True, True, False, True, True, True]
    assert x.first(1, torch.tensor([0, 1, 1, 0, 1, 0]) > 0).tolist() == [False, True, False, False, True, False]
    x.keep(x.first(1))
    assert x.tokens.tolist() == [[1, 4], [1, 2], [3, 4]]
    assert x.group.tolist() == [0, 2, 3]
    assert x.texts == ["a", "d", "f"]
    assert x.extra["row"].tolist() == [0, 3, 5]
    assert len(x.tasks) == 4
    x.add(build([[1, 1]], [[7, 7]], [1], []))
    assert x.group.tolist() == [0, 1, 2, 3]
    assert x.texts == ["a", "", "d", "f"]
    assert not x.first(0).any()


def test_another_surrogate_leaves_the_rest_of_the_loss():
    surrogate = torch.tensor([[1.0, 2.0]], requires_grad=True)
    other = torch.tensor([[10.0, 20.0]], requires_grad=True)
    terms = Terms(surrogate, surrogate, surrogate + 0.5, torch.ones(1, 2), None, torch.ones(1, 2) > 0, surrogate)
    terms.replace(torch.tensor([[True, False]]), other)
    assert terms.loss.tolist() == [[10.5, 2.5]]
    assert terms.clipped.tolist() == [[False, True]]
    terms.total().backward()
    assert surrogate.grad.tolist() == [[0, 1]]
    assert other.grad.tolist() == [[1, 0]]


def test_added_rows_join_their_group():
    x = sample()
    x.extra["demo"] = torch.zeros(3, dtype=torch.bool)
    more = build([[3], [1, 2]], [[1, 1, 1, 1, 1, 1], [2]], [1, 0], x.tasks)
    more.texts, more.verdicts = ["n1", "n0"], [Verdict(True, 1.0)] * 2
    more.extra["demo"] = torch.ones(2, dtype=torch.bool)
    x.add(more)
    assert x.group.tolist() == [0, 0, 0, 1, 1]
    assert x.texts == ["r0", "r1", "n0", "r2", "n1"]
    assert x.extra["demo"].tolist() == [False, False, True, False, True]
    assert x.extra["row"].tolist() == [0, 1, 0, 2, 0]
    assert x.tokens[4].tolist() == [3, 1, 1, 1, 1, 1, 1]
    assert x.logps.shape == x.tokens.shape
    assert x.logps[2].abs().sum() == 0


def test_rows_of_unknown_groups_are_refused():
    with pytest.raises(ValueError, match=r"groups \[7\] added to an experience of 2"):
        sample().add(build([[1]], [[1]], [7], []))


def test_concat_shifts_groups():
    both = concat(sample(), sample())
    assert both.group.tolist() == [0, 0, 1, 2, 2, 3]
    assert len(both.tasks) == 4
    assert both.texts == ["r0", "r1", "r2"] * 2


def test_padding_never_reaches_the_loss():
    loss = torch.tensor([[1.0, torch.nan], [2.0, torch.inf]], requires_grad=True)
    weights = torch.tensor([[0.5, 0.0], [0.5, 0.0]])
    total = Terms(loss, loss, loss, weights).total()
    total.backward()
    assert total == 1.5
    assert torch.equal(loss.grad, weights)
