"""ClipCov and KLCov: the few tokens whose covariance of log-probability and advantage makes entropy collapse."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import Any, ClassVar

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.functional import pad

from lit_rl import objectives, ranks
from lit_rl.checks import ConfigurationError, require
from lit_rl.experience import Experience, Terms
from lit_rl.hooks import RLCallback
from lit_rl.rollout import Rollout


class Covariance(RLCallback):
    """What ClipCov and KLCov share. Before each optimizer step, over the tokens of its minibatch on all ranks:

    c = (A - mean A)(log pi - mean log pi)          (Cui et al. 2025, arXiv 2505.22617)

    with the current policy's log-probabilities, from one more forward without gradient. The tokens are those of the
    policy's own rows with an advantage: the paper drops groups without signal first. The authors' code takes the means, and
    makes its choice, in each micro-batch of each GPU; here neither the split into slices nor the number of ranks plays a
    part.

    Logs, each step, under the callback's name:
    - covariance, the mean of c, and selected, the share of tokens that were treated;
    - entropy_change, that of the mean entropy before the first optimizer step from the step before to this one, and
      entropy_change_predicted, -lr * covariance summed over the optimizer steps between: that of a tabular softmax under
      the natural policy gradient (theorem 2). For a network and Adam, compare sign and shape, not size.
    """

    name = ""
    refuses: ClassVar[dict[str, str]] = {"SFT": "likelihood has no advantages, which the covariance is of"}

    def __init__(self, ratio: float) -> None:
        require(0 < ratio <= 1, "ratio", ratio, "a fraction above 0 and at most 1, not percent: 0.2 % is 0.002")
        self.ratio = ratio
        self._before: tuple[float, float] | None = (
            None  # the step before: its entropy, and the change predicted from it
        )
        self._start()

    def _start(self) -> None:
        self._updates = self._tokens = 0
        self._covariance = self._selected = self._predicted = self._entropy = 0.0

    def priority(self, c: Tensor, clipped: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        """(M,) float64: the tokens with the largest are treated; -inf never is. `draw` gives each a number in [0, 1)."""
        raise NotImplementedError

    def treat(self, part: Experience, selected: Tensor) -> None:
        """Changes a slice for this optimizer step, where (N, T) `selected`."""
        raise NotImplementedError

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and not isinstance(pl_module, Rollout):
            raise ConfigurationError(
                f"{type(self).__name__} needs advantages, so a method that is a Rollout, not {type(pl_module).__name__}"
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._start()

    @torch.no_grad()
    def on_minibatch(self, trainer: L.Trainer, policy: L.LightningModule, slices: list[Experience]) -> None:
        assert isinstance(policy, Rollout)
        columns: list[list[Tensor]] = []
        counted = []
        for part in slices:
            assert part.weights is not None
            assert part.advantages is not None
            with policy.precision():
                terms = policy.terms(part.to(policy.device))
            rows = (part.advantages != 0).any(1) & ~part.off_policy
            mask = (part.weights != 0) & rows[:, None]
            assert terms.clipped is not None
            numbers = terms.logps, part.advantages, terms.entropy, terms.clipped
            columns.append([v.cpu()[mask].double() for v in numbers])
            counted.append(mask)
        logps, advantages, entropy, clipped = (torch.cat(column) for column in zip(*columns, strict=True))
        c, n = covariance(logps, advantages)

        def draw() -> Tensor:
            key = f"{policy.seed_value}\0{trainer.global_step}\0{self._updates}"
            return torch.cat([uniform(part, key)[mask] for part, mask in zip(slices, counted, strict=True)])

        keys = self.priority(c, clipped.bool(), draw)
        chosen = ranks.largest(keys, max(1, int(self.ratio * n)))
        for part, mask, mine in zip(slices, counted, chosen.split([int(m.sum()) for m in counted]), strict=True):
            self.treat(part, torch.zeros_like(mask).masked_scatter(mask, mine))

        total, selected, nats = ranks.total(float(c.sum()), float(chosen.sum()), float(entropy.sum()))
        if not self._updates:
            self._entropy = nats / max(1, n)
        self._updates, self._tokens, self._selected = self._updates + 1, self._tokens + n, self._selected + selected
        self._covariance += total
        self._predicted -= policy.rate * total / max(1, n)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._tokens:
            return  # no signal: the policy has not moved
        numbers = {"covariance": self._covariance / self._tokens, "selected": self._selected / self._tokens}
        if self._before is not None:
            entropy, predicted = self._before
            numbers |= {"entropy_change": self._entropy - entropy, "entropy_change_predicted": predicted}
        self._before = self._entropy, self._predicted
        for name, value in numbers.items():
            pl_module.log(f"{self.name}/{name}", value, rank_zero_only=False)

    def state_dict(self) -> dict[str, Any]:
        return {"before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict["before"]


class ClipCov(Covariance):
    """Clip-Cov (arXiv 2505.22617): of the tokens whose covariance lies between `low` and `high`, some at random lose
    their policy gradient for one optimizer step. Tokens whose ratio is clipped already do not count, and those chosen still
    do in the mean. None is chosen where none qualifies, but at least one where any does.

    The choice is a function of (seed, step, minibatch, row). The defaults are the paper's, for 7B and 32B; beside them it
    clips the ratio at 0 and 2 (`clip_low` and `clip_high` 1.0, as in the recipe).

    Args:
        ratio: Of all tokens, how many are chosen at most: a fraction, as in verl's clip_cov_ratio.
        low: Covariances above it qualify. The mean is far below 1.
        high: And below it.
    """

    name = "clip_cov"
    refuses: ClassVar[dict[str, str]] = {
        **Covariance.refuses,
        "KLCov": "both decide what becomes of the tokens of largest covariance: leave one out",
    }

    def __init__(self, ratio: float = 2e-4, low: float = 1.0, high: float = 5.0) -> None:
        super().__init__(ratio)
        require(low < high, "low", low, f"below high, which is {high}")
        self.low, self.high = low, high

    def priority(self, c: Tensor, clipped: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        qualified = (c > self.low) & (c < self.high) & ~clipped
        return torch.where(qualified, draw(), -torch.inf)

    def treat(self, part: Experience, selected: Tensor) -> None:
        assert part.advantages is not None
        part.advantages = part.advantages.masked_fill(selected, 0.0)


class KLCov(Covariance):
    """KL-Cov (arXiv 2505.22617): the tokens with the largest covariance get a penalty `coef * |log r|`, with r the
    ratio of policy to old policy; at least one a minibatch.

    On the old policy itself the penalty is zero, so the first optimizer step of a batch goes without: rounding alone would
    give it a full-strength gradient of random sign, as in the authors' code. With one optimizer step a batch it does
    nothing, and warns. The paper takes eight, and no clip at all (`clip_low` 1.0 and `clip_high` .inf, as in the recipe).

    Args:
        ratio: How many of all tokens: a fraction, as in verl's kl_cov_ratio. The paper's for 7B; for 32B it is 2e-4. (The
            authors' scripts say 0.2 and 0.02, in percent.)
        coef: Of the penalty, the paper's beta (verl's ppo_kl_coef, there 0.1).
    """

    name = "kl_cov"

    def __init__(self, ratio: float = 2e-3, coef: float = 1.0) -> None:
        super().__init__(ratio)
        require(coef > 0, "coef", coef, "above 0")
        self.coef = coef

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Rollout)
        if pl_module.epochs * pl_module.minibatches == 1:
            rank_zero_warn(
                "KLCov does nothing with one optimizer step a batch: set the method's `minibatches` to 2 or more"
            )

    def priority(self, c: Tensor, clipped: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        return c if self._updates else torch.full_like(c, -torch.inf)

    def treat(self, part: Experience, selected: Tensor) -> None:
        part.extra["kl_cov"] = selected

    def on_loss(self, trainer: L.Trainer, policy: L.LightningModule, experience: Experience, terms: Terms) -> None:
        if experience.logps is not None:  # else there is one optimizer step a batch
            terms.loss = terms.loss + self.coef * penalty(
                terms.logps, experience.logps, experience.mask, experience.extra["kl_cov"]
            )


def covariance(logps: Tensor, advantages: Tensor) -> tuple[Tensor, int]:
    """Each token's share of the covariance, with means over the tokens of all ranks, and how many those are. (M,), (M,)"""
    n, logp, advantage = ranks.total(len(logps), float(logps.sum()), float(advantages.sum()))
    return (advantages - advantage / max(1, n)) * (logps - logp / max(1, n)), int(n)


def penalty(logps: Tensor, old_logps: Tensor, mask: Tensor, selected: Tensor) -> Tensor:
    """KL-Cov's |log r| at the selected tokens, else 0. All (N, T)."""
    return torch.where(selected, objectives.log_ratio(logps, old_logps, mask).abs(), 0.0)


def uniform(part: Experience, key: str) -> Tensor:
    """(N, T) float64 in [0, 1): a function of the key and each row's tokens."""
    rows = []
    for tokens, length in zip(part.tokens, part.lengths.tolist(), strict=True):
        digest = blake2b(tokens[:length].numpy().tobytes(), key=key.encode(), digest_size=8).digest()
        numbers = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        drawn = torch.rand(length, generator=numbers, dtype=torch.float64)
        rows.append(pad(drawn, (0, part.tokens.shape[1] - length)))
    return torch.stack(rows)
