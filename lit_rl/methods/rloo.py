"""RLOO: REINFORCE with a leave-one-out baseline."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from lit_rl.policy import Aggregate
from lit_rl.rollout import Rollout


class RLOO(Rollout):
    """RLOO (Ahmadian et al. 2024, arXiv 2402.14740): plain REINFORCE on whole responses, each baselined by the mean of its
    siblings (k = 4), with the k1 divergence from the starting policy in the reward (beta 0.03)."""

    def __init__(
        self,
        model: str | nn.Module = "tiny",
        *,
        group: int = 4,
        advantage: Literal["rloo"] = "rloo",
        aggregate: Aggregate = "constant",
        objective: Literal["ppo", "reinforce"] = "reinforce",
        kl_coef: float = 0.03,
        kl_estimator: Literal["k1"] = "k1",
        kl_in_reward: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model,
            group=group,
            advantage=advantage,
            aggregate=aggregate,
            objective=objective,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            kl_in_reward=kl_in_reward,
            **kwargs,
        )
