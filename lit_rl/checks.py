"""Checks of settings, and of what the user's own code makes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def require(fine: bool, name: str, value: Any, limit: str) -> None:
    """Raises ValueError that names the setting, its value and the limit, unless fine."""
    if not fine:
        raise ValueError(f"{name} is {value}: it must be {limit}")


class Spare:
    """Makes something of each item and leaves out those where that fails, unless it does so `IN_A_ROW` times."""

    IN_A_ROW = 20

    def __init__(self) -> None:
        self.failed = 0

    def __call__(self, what: str, make: Callable[[Any], T], items: Iterable[Any]) -> list[T | None]:
        """`make(item)` of each; None, with a warning that names `what` and the item, where it raises."""
        made: list[T | None] = []
        for item in items:
            try:
                made.append(make(item))
                self.failed = 0
            except Exception as error:
                made.append(None)
                self.failed += 1
                message = f"{what} {str(item)[:80]} failed ({type(error).__name__}: {error})"
                if self.failed >= self.IN_A_ROW:
                    raise RuntimeError(f"{message}, as {self.failed} did in a row") from error
                warnings.warn(f"{message} and is left out")
        return made
