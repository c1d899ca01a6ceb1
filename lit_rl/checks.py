"""Checks of settings, and the error that says what to change in them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal, get_args, get_origin, get_type_hints


class ConfigurationError(ValueError):
    """Settings that are impossible or do not go together. The message is for the user; the command line shows it alone."""


def require(fine: bool, name: str, value: Any, limit: str) -> None:
    """Raises ConfigurationError that names the setting, its value and the limit, unless fine."""
    if not fine:
        raise ConfigurationError(f"{name} is {value}: it must be {limit}")


def require_literals(kind: type, given: Mapping[str, Any]) -> None:
    """Raises ConfigurationError for what a constructor is given for a Literal of its own and is none of it, as the command line
    does."""
    hints: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        with suppress(NameError):  # a user's own, whose annotations name what is imported for type checking alone
            hints |= get_type_hints(vars(base).get("__init__", object.__init__))
    for name in given.keys() & hints.keys():
        if get_origin(hints[name]) is Literal:
            known = get_args(hints[name])
            require(given[name] in known, name, given[name], f"one of {', '.join(map(str, known))}")
