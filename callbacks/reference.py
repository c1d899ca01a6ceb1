"""ReferenceRefresh: the reference of the divergence follows the policy."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning.pytorch as L
import torch

from lit_rl.checks import ConfigurationError, require
from lit_rl.hooks import RLCallback


class ReferenceRefresh(RLCallback):
    """Makes the present policy the reference, every so many steps. MiniCPM4 does (arXiv 2506.07900, section 3.2.3) and does not
    say how often. The reference is part of a checkpoint, as always.

    It needs a reference of its own: `kl_coef` above 0, and all weights trained. With adapters the reference is the base model,
    which never changes.

    Args:
        every: Steps between two refreshes.
    """

    refuses: ClassVar[dict[str, str]] = {
        "SFT": "it has no reference policy",
        "lora": "with adapters the reference is the frozen base model. Leave one out",
    }
    needs: ClassVar[dict[str, str]] = {"kl_coef": "at 0 there is no reference policy. Raise it, or leave this out"}

    def __init__(self, every: int = 50) -> None:
        require(every >= 1, "every", every, "at least 1")
        self.every = every

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and getattr(pl_module, "reference", None) is None:
            raise ConfigurationError(
                f"ReferenceRefresh needs a policy with a reference of its own, and this {type(pl_module).__name__} has none:"
                " kl_coef must be above 0, and all weights trained"
            )

    @torch.no_grad()
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """At a step's start: one that is interrupted and taken again does it again, from the same weights."""
        if trainer.global_step and trainer.global_step % self.every == 0:
            pairs = zip(pl_module.reference.parameters(), pl_module.model.parameters(), strict=True)
            for reference, present in pairs:
                reference.copy_(present)
