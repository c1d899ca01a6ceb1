"""EntropyLaw: a forecast of the run from its beginning."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_warn

from lit_rl import ranks
from lit_rl.checks import require
from lit_rl.entropy_law import FEWEST, FIRST, Law, fit
from lit_rl.experience import Experience, Terms
from lit_rl.hooks import RLCallback


class EntropyLaw(RLCallback):
    """Fits R = -a e^H + b (arXiv 2505.22617) to the first steps of a run, and from there on forecasts. H is the mean entropy
    of the tokens that count in the loss, R the mean reward of all valid responses that the policy sampled in a step, before
    dynamic sampling leaves any out. (The paper takes the accuracy in validation for R.)

    Logs, each step, under entropy_law/: a and b; ceiling, which is R when no entropy is left, and ceiling_interval, half of
    its 95 % interval; predicted, R at the step's own entropy, predicted_interval, and measured. Once the first steps are
    over, a, b and the ceiling stay as they are.

    Args:
        steps: The first steps, whose points are fitted; the paper's 36 were 15 % of the run. At least 5.
    """

    refuses: ClassVar[dict[str, str]] = {"SFT": "it has no rewards, which the law is of"}

    def __init__(self, steps: int = FIRST) -> None:
        require(steps >= FEWEST, "steps", steps, f"at least {FEWEST}")
        self.steps = steps
        self.law: Law | None = None
        self._points: list[tuple[float, float]] = []
        self._start()

    def _start(self) -> None:
        self._entropy = self._reward = 0.0
        self._tokens = self._rows = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._start()

    def on_rollout(self, trainer: L.Trainer, policy: L.LightningModule, experience: Experience) -> None:
        own = experience.valid & ~experience.off_policy
        self._reward += float(experience.rewards[own].sum())
        self._rows += int(own.sum())

    def on_loss(self, trainer: L.Trainer, policy: L.LightningModule, experience: Experience, terms: Terms) -> None:
        counted = terms.weights != 0
        self._entropy += float(terms.entropy.detach()[counted].sum())
        self._tokens += int(counted.sum())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        entropy, tokens, reward, rows = ranks.total(self._entropy, self._tokens, self._reward, self._rows)
        if not tokens or not rows:
            return
        entropy, reward = entropy / tokens, reward / rows
        if len(self._points) < self.steps and math.isfinite(entropy + reward):
            self._points.append((entropy, reward))
            self._fit()
        if self.law is None:
            return
        law = self.law
        numbers = {"a": law.a, "b": law.b, "ceiling": law.ceiling, "ceiling_interval": law.interval(0.0)}
        numbers |= {
            "predicted": law(entropy),
            "predicted_interval": law.interval(entropy, new=True),
            "measured": reward,
        }
        for name, value in numbers.items():
            pl_module.log(f"entropy_law/{name}", value, rank_zero_only=False)

    def _fit(self) -> None:
        try:
            self.law = fit(self._points)
        except ValueError as error:
            self.law = None  # too few points so far, or no two with different entropies
            if len(self._points) == self.steps:
                rank_zero_warn(f"EntropyLaw has nothing to forecast with: {error}")

    def state_dict(self) -> dict[str, Any]:
        return {"points": self._points}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._points = state_dict["points"]
        self._fit()
