"""ScalingBench: a loss that foretells how many tasks are solved, also where next to none are."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L

from lit_rl import ranks
from lit_rl.checks import ConfigurationError
from lit_rl.hooks import RLCallback
from lit_rl.laws import LOSS, Sigmoid, scaling_points, sigmoid_fit
from lit_rl.policy import Policy


class ScalingBench(RLCallback):
    """How likely the model finds the worked solutions of held-out tasks, reasoning and answer, beside how many it solves by
    itself (MiniCPM4, arXiv 2506.07900, section 4): the loss falls smoothly with scale, and the score follows from it.

    In each validation it logs val/scaling_loss: the mean over tokens of all known responses, given their prompts, in nats.
    With `runs`, and from their validations, it also logs val/scaling_predicted and val/scaling_interval: the score that the
    sigmoid fitted to them has at this loss, and half of the 95 % interval of a run there.

    Args:
        runs: Folders of runs with this callback, of smaller models with the same tokenizer, or of earlier steps.
        score: What is predicted, a share that a validation logs.
        floor: The score of chance.
    """

    def __init__(self, runs: list[str] = [], score: str = "val/pass@1", floor: float = 0.0) -> None:  # noqa: B006
        self.runs, self.score, self.floor = runs, score, floor
        self.law: Sigmoid | None = sigmoid_fit(scaling_points(runs, score), floor) if runs else None
        self._loss, self._tokens = 0.0, 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, Policy):
            raise ConfigurationError(f"ScalingBench needs a policy of lit-rl, not {type(pl_module).__name__}")

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._loss, self._tokens = 0.0, 0.0

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        x = pl_module.demonstrations([task for task in batch if task.responses])
        self._loss -= float(pl_module.logps_of(pl_module.token_terms, x, 1.0).double().sum())
        self._tokens += float(x.mask.sum())

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss, tokens = ranks.total(self._loss, self._tokens)
        if not tokens:
            return
        numbers = {LOSS: loss / tokens}
        if self.law is not None:
            numbers["val/scaling_predicted"] = self.law(loss / tokens)
            numbers["val/scaling_interval"] = self.law.interval(loss / tokens, new=True)
        for name, value in numbers.items():
            pl_module.log(name, value, rank_zero_only=False)
