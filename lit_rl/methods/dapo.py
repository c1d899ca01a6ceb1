"""DAPO: decoupled clip and dynamic sampling."""

from __future__ import annotations

from typing import Any

from torch import nn

from lit_rl.policy import Aggregate
from lit_rl.rollout import Rollout


class DAPO(Rollout):
    """DAPO (Yu et al. 2025, arXiv 2503.14476): clip-higher, a mean over tokens, dynamic sampling, and the soft overlong
    penalty (the paper's buffer: 4,096 of 20,480 tokens). No reference policy. The paper draws 16 responses a prompt and
    takes 16 minibatches; set `group` and `minibatches` as memory and batch size allow.
    """

    def __init__(
        self,
        model: str | nn.Module = "tiny",
        *,
        aggregate: Aggregate = "token",
        clip_high: float = 0.28,
        overlong_buffer: float = 0.2,
        dynamic_sampling: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model,
            aggregate=aggregate,
            clip_high=clip_high,
            overlong_buffer=overlong_buffer,
            dynamic_sampling=dynamic_sampling,
            **kwargs,
        )
