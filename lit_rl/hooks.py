"""The hooks between a rollout and its loss, and the dispatcher that any LightningModule may call.

Lightning's own callback dispatch cannot carry them: it demands the hook of every callback and forbids `log` inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import lightning.pytorch as L

from lit_rl.checks import ConfigurationError

if TYPE_CHECKING:
    from lit_rl.experience import Experience, Terms

HOOKS = ("on_rollout", "on_advantage", "on_minibatch", "on_loss")


class RLCallback(L.Callback):
    """A callback with hooks into reinforcement learning. Any object with a method of these names is called as well."""

    refuses: ClassVar[dict[str, str]] = {}
    """What it does not work with, and why: methods and other callbacks, by the name of their class or of a base, and settings
    of a method."""
    needs: ClassVar[dict[str, str]] = {}
    """Settings of a method that must not be off, and why."""
    needs_all_rows: bool = False
    """True when `on_loss` gives gradient to rows without advantage, which otherwise never reach the model."""

    def on_rollout(self, trainer: L.Trainer, policy: L.LightningModule, experience: Experience) -> None:
        """Rewards are known: change them, or add rows."""

    def on_advantage(self, trainer: L.Trainer, policy: L.LightningModule, experience: Experience) -> None:
        """Advantages are known: reshape them."""

    def on_minibatch(self, trainer: L.Trainer, policy: L.LightningModule, slices: list[Experience]) -> None:
        """Before each optimizer step: all of its slices on this rank. What is set on them holds for that step alone; set
        fields, change no tensor in place. Called on all ranks, as often on each."""

    def on_loss(self, trainer: L.Trainer, policy: L.LightningModule, experience: Experience, terms: Terms) -> None:
        """The per-token terms of one slice: change the weights or add to the loss. Called once a slice."""


def call(trainer: L.Trainer, hook: str, *args: Any, module: L.LightningModule | None = None) -> None:
    """Calls `hook(trainer, module, *args)` on every callback that has it, in order, and last on the DataModule. The module
    is the Trainer's, unless it is a policy in that.

    Logging inside a hook works wherever the caller may log. A LightningModule of your own joins with one line:
    `lit_rl.hooks.call(self.trainer, "on_loss", experience, terms)`.
    """
    if hook not in HOOKS:
        raise ValueError(f"there is no hook {hook!r}: the hooks are {', '.join(HOOKS)}")
    for listener in (*trainer.callbacks, getattr(trainer, "datamodule", None)):  # type: ignore[attr-defined]
        if (method := getattr(listener, hook, None)) is not None:
            method(trainer, module or trainer.lightning_module, *args)


def refuse(module: Any, callbacks: Sequence[type], settings: Mapping[str, Any]) -> None:
    """Raises ConfigurationError when one of the callbacks does not work with the module or its settings, or beside another
    one. All are given as classes; that of a module made by a function may not be known yet, and is then not checked."""
    kinds = [kind for kind in (module, *callbacks) if isinstance(kind, type)]
    names = {kind.__name__: [base.__name__ for base in kind.__mro__] for kind in kinds}
    names |= {name: [name] for name, value in settings.items() if value}
    for callback in callbacks:
        refuses, needs = getattr(callback, "refuses", {}), getattr(callback, "needs", {})
        for other, bases in names.items():
            if name := next((base for base in bases if base in refuses), None):
                raise ConfigurationError(f"{callback.__name__} does not work with {other}: {refuses[name]}")
        if name := next((name for name in needs if not settings.get(name, True)), None):
            raise ConfigurationError(f"{callback.__name__} needs {name}: {needs[name]}")
