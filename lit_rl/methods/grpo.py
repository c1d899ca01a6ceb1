"""GRPO: group relative policy optimisation."""

from __future__ import annotations

from typing import Any

from torch import nn

from lit_rl.rollout import Rollout


class GRPO(Rollout):
    """GRPO (Shao et al. 2024, arXiv 2402.03300): rewards normalised within the group, PPO's clipped surrogate, a mean over
    responses of the mean over tokens, and a k3 divergence from the starting policy with weight 0.04 (section 4.2).

    The paper draws 64 responses a prompt; set `group` as memory allows.
    """

    def __init__(self, model: str | nn.Module = "tiny", *, kl_coef: float = 0.04, **kwargs: Any) -> None:
        super().__init__(model, kl_coef=kl_coef, **kwargs)
