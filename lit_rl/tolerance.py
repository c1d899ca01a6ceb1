"""What may fail without ending a run: a file's disk, a logger's service, one item of many. Standard library only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@cache
def warn_once(message: str) -> None:
    """Warns once, even where a filter shows every warning."""
    warnings.warn(message)


def tolerate(path: Path, write: Callable[[], Any]) -> bool:
    """Runs `write`, which fills `path`. When the disk refuses, the run goes on without: False, and one warning a file."""
    try:
        write()
    except OSError as error:
        warn_once(f"cannot write {path.absolute()}: {error.strerror}. The run goes on. This message comes once.")
        return False
    return True


def attempt(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a logger's method; an error is a warning, once."""
    try:
        return method(*args, **kwargs)
    except Exception as error:
        warn_once(f"a logger failed, and what it misses is in the run's own files: {error!r}. This message comes once.")


class Spare:
    """Makes something of each item and leaves out those where that fails; an error once `IN_A_ROW` have failed in a row."""

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
