"""Votes: the answer that most responses give stands in for the one that nobody knows."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum
from typing import NamedTuple


class Vote(NamedTuple):
    """What the rows of each group agree on."""

    labels: dict[int, str | None]
    """By group: the winning answer; None when nobody voted."""
    votes: dict[int, dict[str, float]]
    """By group: each answer's votes, in the order of first appearance."""
    wins: list[bool]
    """One a row: whether it gives its group's label."""


def vote(answers: Sequence[str | None], group: Sequence[int], weights: Sequence[float] | None = None) -> Vote:
    """Counts the rows' answers within each group, each as often as its row weighs (once, by default).

    Answers are equal when their text is: give them in canonical form. Blanks (None, or nothing but white space) neither
    vote nor win, and rows of weight 0 do not vote. Of answers with equally many votes the first to appear wins.
    """
    ballots: dict[int, dict[str, list[float]]] = {g: {} for g in group}
    for answer, g, weight in zip(answers, group, [1.0] * len(group) if weights is None else weights, strict=True):
        if not weight >= 0:
            raise ValueError(f"a vote weighs {weight}: it must be at least 0")
        if weight and answer is not None and answer.strip():
            ballots[g].setdefault(answer, []).append(weight)
    votes = {g: {answer: fsum(cast) for answer, cast in ballot.items()} for g, ballot in ballots.items()}
    labels = {g: max(ballot, key=ballot.__getitem__, default=None) for g, ballot in votes.items()}
    wins = [answer is not None and answer == labels[g] for answer, g in zip(answers, group, strict=True)]
    return Vote(labels, votes, wins)


def collective_vote(answers: Sequence[Sequence[str | None]], self_consistency: bool = True) -> Vote:
    """The label (of the one group, 0) of a prompt for which each member has given these answers, None where it has given
    none; `wins` is of all of them, in the members' order.

    With `self_consistency` each vote of a member weighs the share of its own responses that give its most frequent answer:
    SC_n(q) = max_a (1/K) sum_k 1[o_nk = a], and the label is argmax_a sum_n sum_k SC_n(q) 1[o_nk = a]. Responses without an
    answer count in K. Of answers with equally many votes the first in the members' order wins.
    """
    member = [n for n, given in enumerate(answers) for _ in given]
    together = [answer for given in answers for answer in given]
    own = vote(together, member).votes
    consistency = [max(own.get(n, {}).values(), default=0.0) / max(1, len(given)) for n, given in enumerate(answers)]
    return vote(together, [0] * len(together), [consistency[n] if self_consistency else 1.0 for n in member])
