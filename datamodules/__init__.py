"""Where tasks come from. Names are imported when first used, so that families need neither torch nor Lightning."""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "TaskData": "base",
    "Bootcamp": "bootcamp",
    "Prompts": "prompts",
    "ReasoningGym": "reasoning_gym",
    "Text": "text",
    "Vowels": "vowels",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"lit_rl.datamodules.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'lit_rl.datamodules' has no attribute '{name}'")
