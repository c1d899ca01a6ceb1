"""TaskData: the DataModule that all sources of tasks share, with a loader that resumes where it stopped."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any, Literal, Protocol

import lightning.pytorch as L
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lit_rl.checks import require
from lit_rl.task import Task
from lit_rl.tolerance import Spare


class Tasks(Protocol):
    """A source of tasks: item i is the same task in every process."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Task: ...


class Turns(DistributedSampler[int]):
    """The items of one rank: the ranks take turns in one order, so that their batches together are those of one process.

    shuffle: whether that order is a permutation for each epoch, from (seed, epoch) alone; Lightning sets the epoch.
    even: whether all ranks get the same number of items, the last few being left out; else each item counts once.
    """

    def __init__(self, size: int, ranks: int = 1, rank: int = 0, shuffle: bool = False, even: bool = True) -> None:
        super().__init__(range(size), ranks, rank, shuffle)  # type: ignore[arg-type]
        self.items = size // ranks * ranks if even or not size else max(size, ranks)  # no rank evaluates nothing

    def __len__(self) -> int:
        return len(range(self.rank, self.items, self.num_replicas))

    def __iter__(self) -> Iterator[int]:
        order: Any = self.dataset
        if self.shuffle:
            order = list(order)
            Random(f"{self.seed}/{self.epoch}").shuffle(order)
        return (order[i % len(order)] for i in range(self.rank, self.items, self.num_replicas))


class ResumableLoader(DataLoader[Task]):
    """A DataLoader of task lists whose position is part of the checkpoint. One process: tasks are made in microseconds.

    A `trainer` tells which batches are done, where the loader itself only knows which it has given away."""

    def __init__(
        self, dataset: Dataset[Task], *, trainer: L.Trainer | None = None, collate_fn: Any = list, **kwargs: Any
    ) -> None:
        super().__init__(dataset, collate_fn=collate_fn, **kwargs)
        self.trainer = trainer
        self.spare, self.left_out = Spare(), 0
        """Tasks of the latest batch that could not be made."""
        self._done = 0
        self._skip = 0

    def __iter__(self) -> Iterator[list[Task]]:  # type: ignore[override]
        skip, self._skip = self._skip, 0
        self._done = skip
        for i, indices in enumerate(self.batch_sampler):  # type: ignore[arg-type]
            if i >= skip:
                self._done = i + 1
                made = self.spare("task", self.dataset.__getitem__, indices)
                for index, task in zip(indices, made, strict=True):
                    if isinstance(task, Task):
                        task.index = index
                tasks = [t for t in made if t is not None]
                self.left_out = len(indices) - len(tasks)
                yield tasks

    def state_dict(self) -> dict[str, int]:
        done, epoch = self._done, len(self)
        if self.trainer is not None:
            done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
            epoch = int(self.trainer.num_training_batches)  # the Trainer may limit them
        return {"batches": done % max(1, epoch)}  # an epoch's end is the next one's start

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._skip = state["batches"]


class TaskData(L.LightningDataModule):
    """Tasks for training, validation and test. A source defines `tasks(split)`.

    Args:
        batch_size: Tasks a step and rank, in training.
        eval_batch_size: Tasks at a time in evaluation; None is `batch_size`.
        shuffle: Whether the training order is drawn anew each epoch.
        predict: The split that `predict` answers; "train" makes demonstrations for the OffPolicyMixing callback.
    """

    def __init__(
        self,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        shuffle: bool = False,
        predict: Literal["train", "validation", "test"] = "test",
    ) -> None:
        super().__init__()
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        self.batch_size, self.eval_batch_size, self.shuffle = batch_size, eval_batch_size or batch_size, shuffle
        self.predict = predict

    def tasks(self, split: str) -> Any:
        """The tasks of "train", "validation" or "test"; anything with a length and indices."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader[Task]:
        tasks, ranks = self.tasks("train"), self.trainer.world_size if self.trainer else 1
        limit = f"at most {len(tasks) // ranks}, since there are {len(tasks)} tasks for {ranks} ranks, and a batch is a full one"
        require(self.batch_size <= len(tasks) // ranks, "batch_size", self.batch_size, limit)
        return ResumableLoader(
            tasks,
            batch_size=self.batch_size,
            sampler=self._sampler(tasks, shuffle=self.shuffle),
            drop_last=True,
            trainer=self.trainer,
        )

    def val_dataloader(self) -> DataLoader[Task]:
        tasks = self.tasks("validation")
        return ResumableLoader(tasks, batch_size=self.eval_batch_size, sampler=self._sampler(tasks, even=False))

    def test_dataloader(self) -> DataLoader[Task]:
        tasks = self.tasks("test")
        return ResumableLoader(tasks, batch_size=self.eval_batch_size, sampler=self._sampler(tasks, even=False))

    def _sampler(self, tasks: Any, **kwargs: bool) -> Turns:
        """In one process too: with a distributed strategy Lightning would take one of its own, which shuffles."""
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return Turns(len(tasks), world_size, rank, **kwargs)

    def predict_dataloader(self) -> DataLoader[Task]:
        return ResumableLoader(self.tasks(self.predict), batch_size=self.eval_batch_size)
