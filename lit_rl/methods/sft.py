"""SFT: supervised fine-tuning on the tasks' known responses."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lit_rl import hooks
from lit_rl.experience import Experience, Terms
from lit_rl.policy import Aggregate, Policy
from lit_rl.task import Task


class SFT(Policy):
    """Maximises the likelihood of each known response, such as a bootcamp's worked solutions: groups of demonstrations.

    Args:
        model, **kwargs: As in Policy.
        aggregate: Whether all response tokens count alike ("token") or all responses ("sequence").
    """

    def __init__(
        self, model: str | nn.Module = "tiny", *, aggregate: Aggregate = "token", lr: float = 1e-5, **kwargs: Any
    ) -> None:
        super().__init__(model, lr=lr, **kwargs)
        self.aggregate = aggregate

    def collect(self, tasks: list[Task]) -> Experience:
        x = self.demonstrations(tasks)
        if not len(x):
            self.count("skipped/no_response", len(tasks))
        return x

    def loss(self, x: Experience) -> Tensor:
        assert x.weights is not None
        logps, entropy = self.token_terms(x)
        terms = Terms(logps, entropy.detach(), -logps, x.weights)
        hooks.call(self.trainer, "on_loss", x, terms, module=self)
        return terms.total()
