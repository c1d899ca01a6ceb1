"""Vowels: the task that even an untrained model can learn, to see in a minute that a set-up learns at all."""

from __future__ import annotations

from random import Random
from typing import Any

from lit_rl.task import Task, Verdict

from .base import TaskData

LETTERS = "aeiou"


def share_of_vowels(text: str) -> Verdict:
    """Half of the score is the share of vowels among the response's characters, half that it begins with one: so a score
    above one half is not rare at first, for methods that know right and wrong alone. Right when nine tenths are vowels. The
    answer is the first of them."""
    vowels = [c for c in text if c in LETTERS]
    share = len(vowels) / max(1, len(text))
    score = (share + (text[:1] in LETTERS and text != "")) / 2
    return Verdict(share >= 0.9, score, vowels[0] if vowels else None, "" if share >= 0.9 else f"{share:.0%} vowels")


class Vowels(TaskData):
    """Answer in vowels. The reward is dense, so that policy gradients have signal from the first step on.

    Args:
        size: Training tasks.
        eval_size: Validation tasks, and as many for test.
        batch_size, **kwargs: As in TaskData.
    """

    def __init__(self, size: int = 10_000, eval_size: int = 16, *, batch_size: int = 8, **kwargs: Any) -> None:
        super().__init__(batch_size, **kwargs)
        self.sizes = {"train": size, "validation": eval_size, "test": eval_size}

    def tasks(self, split: str) -> Any:
        return _Split(split, self.sizes[split])


class _Split:
    def __init__(self, split: str, size: int) -> None:
        self.split, self.size = split, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Task:
        if not 0 <= index < self.size:
            raise IndexError(f"task {index} of {self.size}")
        response = "".join(Random(f"{self.split}{index}").choices(LETTERS, k=12))
        return Task(f"Vowels {index}", share_of_vowels, [response], family="vowels", id=f"vowels/{self.split}/{index}")
