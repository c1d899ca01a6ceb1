"""Evaluated: what the Trainer asks of a module that answers tasks, in validate, test and predict."""

from __future__ import annotations

import warnings
from copy import copy
from typing import Any

import lightning.pytorch as L
import torch

from lit_rl import jsonl, run
from lit_rl.metrics import Evaluation, Table
from lit_rl.task import Task


class Evaluated(L.LightningModule):
    """A subclass defines `evaluate`, which updates its `evaluations`, and `predict_step`, which returns records.

    Logs each table's numbers under the stage and its name: val/pass@1, val/NAME/pass@1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.evaluation = Evaluation()
        self.table = Table([])
        """Of the latest evaluation."""

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """By name, the module's own, "", before those of its parts."""
        return {"": self.evaluation}

    def evaluate(self, tasks: list[Task]) -> None:
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        for logger in self.trainer.loggers:
            run.shield(logger)
        message = "You have overridden `transfer_batch_to_device` in `LightningModule`"
        warnings.filterwarnings("ignore", message=message)  # as it should be: every DataModule's tasks are text

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if not isinstance(batch, list) or not all(isinstance(task, Task) for task in batch):
            raise TypeError(
                f"a policy works on lists of lit_rl.Task, not on {_describe(batch)}: give the loader collate_fn=list"
            )
        return [*map(copy, batch)]  # of text; the data may give the same object again, and each counts

    def validation_step(self, batch: list[Task], batch_idx: int) -> None:
        self.evaluate(batch)

    def test_step(self, batch: list[Task], batch_idx: int) -> None:
        self.evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _report(self, stage: str) -> None:
        tables = {}
        for part, evaluation in self.evaluations.items():
            evaluation.update("", [], [])  # so that no rank has nothing to gather
            tables[part] = evaluation.compute()
            evaluation.reset()
        self.table = tables.pop("")
        run.save_evaluation(self.trainer, stage, self.table, tables)
        for part, table in {"": self.table, **tables}.items():
            for name, value in table.scalars().items():
                key = "/".join(filter(None, (stage, part, name)))
                self.log(key, value, prog_bar=key.endswith(f"{stage}/pass@1"), sync_dist=True)

    def on_predict_start(self) -> None:
        self._predictions = run.folder(self.trainer) / run.by_rank(run.PREDICTIONS, self.global_rank)

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.trainer.loggers:
            jsonl.append(self._predictions, outputs)


def _describe(batch: Any) -> str:
    return f"a list of {type(batch[0]).__name__}" if isinstance(batch, list) else f"a {type(batch).__name__}"
