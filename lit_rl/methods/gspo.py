"""GSPO: one importance ratio a sequence."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from lit_rl.rollout import Rollout


class GSPO(Rollout):
    """GSPO (Zheng et al. 2025, arXiv 2507.18071): the ratio is the sequence's, normalised by its length, so its clip is
    far narrower (3e-4 and 4e-4, section 5.1); 4 minibatches a batch. No reference policy."""

    def __init__(
        self,
        model: str | nn.Module = "tiny",
        *,
        ratio: Literal["sequence", "token"] = "sequence",
        clip_low: float = 3e-4,
        clip_high: float = 4e-4,
        minibatches: int = 4,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, ratio=ratio, clip_low=clip_low, clip_high=clip_high, minibatches=minibatches, **kwargs)
