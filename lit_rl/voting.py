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
