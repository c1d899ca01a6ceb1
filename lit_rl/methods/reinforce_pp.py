"""REINFORCE++ and its baseline form: advantages normalised over the batch."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from lit_rl.policy import Aggregate
from lit_rl.rollout import Rollout


class ReinforcePP(Rollout):
    """REINFORCE++ (Hu 2025, arXiv 2501.03262): one response a prompt, rewards with the k1 divergence in them normalised
    over all tokens of the batch, PPO's clipped surrogate.

    The divergence is that of the whole response, where the paper takes it from each token on.
    """

    def __init__(
        self,
        model: str | nn.Module = "tiny",
        *,
        group: int = 1,
        advantage: Literal["reinforce_pp"] = "reinforce_pp",
        aggregate: Aggregate = "token",
        kl_coef: float = 0.01,
        kl_estimator: Literal["k1"] = "k1",
        kl_in_reward: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model,
            group=group,
            advantage=advantage,
            aggregate=aggregate,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            kl_in_reward=kl_in_reward,
            **kwargs,
        )


class ReinforcePPBaseline(Rollout):
    """REINFORCE++-baseline (same paper): the group's mean is subtracted before the normalisation over the batch, and a k2
    divergence stands in the loss."""

    def __init__(
        self,
        model: str | nn.Module = "tiny",
        *,
        advantage: Literal["reinforce_pp_baseline"] = "reinforce_pp_baseline",
        aggregate: Aggregate = "token",
        kl_coef: float = 0.01,
        kl_estimator: Literal["k2"] = "k2",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model, advantage=advantage, aggregate=aggregate, kl_coef=kl_coef, kl_estimator=kl_estimator, **kwargs
        )
