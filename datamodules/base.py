"""TaskData: the DataModule that all sources of tasks share, with a loader that resumes where it stopped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random
from typing import Any, Protocol

import lightning.pytorch as L
from torch.utils.data import DataLoader, Dataset, Sampler

from lit_rl.checks import require
from lit_rl.task import Task


class Tasks(Protocol):
    """A source of tasks: item i is the same task in every process."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Task: ...


class Shuffled(Sampler[int]):
    """A permutation for each epoch, from (seed, epoch) alone; Lightning sets the epoch."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.size))
        Random(f"{self.seed}/{self.epoch}").shuffle(order)
        return iter(order)


class ResumableLoader(DataLoader[Task]):
    """A DataLoader of task lists whose position is part of the checkpoint. One process: tasks are made in microseconds.

    `epoch_batches` tells how many batches an epoch has when the Trainer limits them."""

    def __init__(
        self, dataset: Dataset[Task], *, epoch_batches: Any = None, collate_fn: Any = list, **kwargs: Any
    ) -> None:
        super().__init__(dataset, collate_fn=collate_fn, **kwargs)
        self.epoch_batches = epoch_batches
        self._done = 0
        self._skip = 0

    def __iter__(self) -> Iterator[list[Task]]:  # type: ignore[override]
        skip, self._skip = self._skip, 0
        self._done = skip
        for i, indices in enumerate(self.batch_sampler):  # type: ignore[arg-type]
            if i >= skip:
                self._done = i + 1
                yield [self.dataset[j] for j in indices]

    def state_dict(self) -> dict[str, int]:
        epoch = min(len(self), self.epoch_batches() if self.epoch_batches else len(self))
        return {"batches": self._done % max(1, int(epoch))}  # an epoch's end is the next one's start

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._skip = state["batches"]


class TaskData(L.LightningDataModule):
    """Tasks for training, validation and test. A source defines `tasks(split)`.

    Args:
        batch_size: Tasks a step and rank, in training.
        eval_batch_size: Tasks at a time in evaluation; None is `batch_size`.
        shuffle: Whether the training order is drawn anew each epoch.
    """

    def __init__(self, batch_size: int = 32, eval_batch_size: int | None = None, shuffle: bool = False) -> None:
        super().__init__()
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        self.batch_size, self.eval_batch_size, self.shuffle = batch_size, eval_batch_size or batch_size, shuffle

    def tasks(self, split: str) -> Any:
        """The tasks of "train", "validation" or "test"; anything with a length and indices."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader[Task]:
        tasks = self.tasks("train")
        return ResumableLoader(
            tasks,
            batch_size=self.batch_size,
            sampler=Shuffled(len(tasks)) if self.shuffle else None,
            drop_last=True,
            epoch_batches=lambda: self.trainer.num_training_batches if self.trainer else math.inf,
        )

    def val_dataloader(self) -> DataLoader[Task]:
        return ResumableLoader(self.tasks("validation"), batch_size=self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Task]:
        return ResumableLoader(self.tasks("test"), batch_size=self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[Task]:
        return self.test_dataloader()
