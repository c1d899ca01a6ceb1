"""NFT: negative-aware fine-tuning, and RFT, its positive half."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from lit_rl import objectives
from lit_rl.advantage import group_mean
from lit_rl.checks import require
from lit_rl.experience import Experience
from lit_rl.policy import Aggregate
from lit_rl.rollout import Rollout


class NFT(Rollout):
    """NFT (Chen et al. 2025, arXiv 2505.18116): supervised learning on right answers, and on wrong ones through an implicit
    negative policy. A prompt answered always or never rightly gives no gradient. On-policy the gradient is that of the
    advantage, so NFT differs from Dr. GRPO and GRPO only where there is more than one minibatch: the paper draws 16
    responses a prompt and takes 16 minibatches, as its recipe does.

    Rewards are cut to [0, 1], so those of 0 and 1 and those of -1 and 1 do the same. One between, which the paper does not
    have, is taken for the chance of being right: a row above its prompt's mean is imitated and one below it unlearned.

    The authors' code adds tokens up over 1000, this over the minibatch's rows times `sampling.max_new_tokens`. Of Rollout's
    options, `objective`, the clips and `cap` play no part.

    Args:
        model, **kwargs: As in Rollout.
        advantage: The prompt's weight: "dr_grpo" is 1 - q, with q its pass rate; "grpo" is sqrt((1 - q) / q), but for the
            constant sqrt((group - 1) / group).
        epsilon: Lower bound of the negative policy's ratio, which on-policy is 1.
        neg_weight: Weight of wrong answers.
    """

    def __init__(
        self,
        model: str | nn.Module = "tiny",
        *,
        advantage: Literal["dr_grpo", "grpo", "rft"] = "dr_grpo",
        aggregate: Aggregate = "constant",
        ratio: Literal["token"] = "token",
        epsilon: float = 1.0,
        neg_weight: float = 1.0,
        dynamic_sampling: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model, advantage=advantage, aggregate=aggregate, ratio=ratio, dynamic_sampling=dynamic_sampling, **kwargs
        )
        require(self.group > 1, "group", self.group, "at least 2: NFT needs a prompt's pass rate")
        require(0 < epsilon <= 1, "epsilon", epsilon, "above 0 and at most 1")
        require(neg_weight >= 0, "neg_weight", neg_weight, "at least 0")
        limit = "0: NFT knows right and wrong alone, and a penalty on the reward would blur them"
        require(not self.overlong_buffer, "overlong_buffer", self.overlong_buffer, limit)
        require(
            not (self.kl_in_reward and self.kl_coef), "kl_in_reward", True, "false: NFT knows right and wrong alone"
        )
        self.epsilon, self.neg_weight = epsilon, neg_weight

    def rewarded(self, x: Experience) -> Experience:
        x = super().rewarded(x)
        x.rewards = x.rewards.clamp(0.0, 1.0)
        x.extra["rate"] = group_mean(x.rewards, x.group, x.valid.to(x.rewards))
        return x

    def surrogate(self, log_ratio: Tensor, logps: Tensor, x: Experience) -> objectives.Objective:
        assert x.advantages is not None
        advantages = x.advantages.where(x.advantages > 0, self.neg_weight * x.advantages)
        rate = x.extra.get("rate", x.rewards)  # a slice that only keeps this rank in step has none
        return objectives.nft(log_ratio, advantages, rate, self.epsilon)


class RFT(NFT):
    """RFT (as compared with in the same paper): right answers alone, each with weight 1; so `epsilon` and `neg_weight` play
    no part."""

    def __init__(self, model: str | nn.Module = "tiny", *, advantage: Literal["rft"] = "rft", **kwargs: Any) -> None:
        super().__init__(model, advantage=advantage, **kwargs)
