"""Checks of settings."""

from __future__ import annotations

from typing import Any


def require(fine: bool, name: str, value: Any, limit: str) -> None:
    """Raises ValueError that names the setting, its value and the limit, unless fine."""
    if not fine:
        raise ValueError(f"{name} is {value}: it must be {limit}")
