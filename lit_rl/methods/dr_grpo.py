"""Dr. GRPO: GRPO without its two biases."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from lit_rl.policy import Aggregate
from lit_rl.rollout import Rollout


class DrGRPO(Rollout):
    """Dr. GRPO (Liu et al. 2025, arXiv 2503.20783): no division by the group's standard deviation, a constant in place of
    the response's length, no reference policy."""

    def __init__(
        self,
        model: str | nn.Module = "tiny",
        *,
        advantage: Literal["grpo", "dr_grpo", "rloo"] = "dr_grpo",
        aggregate: Aggregate = "constant",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, advantage=advantage, aggregate=aggregate, **kwargs)
