"""CISPO: the importance weight is clipped, never the gradient's tokens."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from lit_rl.policy import Aggregate
from lit_rl.rollout import Rollout


class CISPO(Rollout):
    """CISPO (MiniMax-M1 2025, arXiv 2506.13585): every token keeps its gradient, with its ratio capped at an absolute
    value. The paper tunes the cap and does not print it; 5 is the value of ScaleRL (arXiv 2510.13786). A mean over tokens,
    no reference policy."""

    def __init__(
        self,
        model: str | nn.Module = "tiny",
        *,
        objective: Literal["cispo"] = "cispo",
        aggregate: Aggregate = "token",
        cap: float = 5.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, objective=objective, aggregate=aggregate, cap=cap, **kwargs)
