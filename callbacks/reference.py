"""ReferenceRefresh: the policy that the divergence is taken from moves along."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning.pytorch as L
import torch

from lit_rl.checks import require
from lit_rl.hooks import RLCallback


class ReferenceRefresh(RLCallback):
    """Makes the present policy the reference, every so many steps. MiniCPM4 does (arXiv 2506.07900, section 3.2.3) and does not
    say how often. The reference is part of a checkpoint, as always.

    It needs a reference of its own: `kl_coef` above 0, and all weights trained. With adapters the reference is the base model,
    which never changes.

    Args:
        every: Steps.
    """

    refuses: ClassVar[dict[str, str]] = {"SFT": "it has no reference policy"}

    def __init__(self, every: int = 50) -> None:
        require(every >= 1, "every", every, "at least 1")
        self.every = every

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or getattr(pl_module, "reference", None) is not None:
            return
        if not hasattr(pl_module, "reference"):
            raise TypeError(f"ReferenceRefresh needs a policy with a reference, not {type(pl_module).__name__}")
        why = "kl_coef is 0" if not getattr(pl_module, "kl_coef", 0) else "with adapters it is the frozen base model"
        raise ValueError(f"ReferenceRefresh has no reference to refresh: {why}. Leave it out, or change that")

    @torch.no_grad()
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """At a step's start: one that is interrupted and taken again does it again, from the same weights."""
        if trainer.global_step and trainer.global_step % self.every == 0:
            pairs = zip(pl_module.reference.parameters(), pl_module.model.parameters(), strict=True)
            for reference, present in pairs:
                reference.copy_(present)
