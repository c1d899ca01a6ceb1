"""Exact resume: checkpoints that are whole, that stand between two steps, and that come after the step's records.

Lightning's own leave three gaps. A file is moved into place from /tmp, which between file systems is a copy that a crash
cuts short. It is saved before the step's metrics are logged and its validation is run, which a resumed run then leaves
out. And a run that ends, or is interrupted, within an epoch or a step is taken up at another place than where it was.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from lit_rl import run

STATE, PART = "lit_rl.position", "saving.part"
"""The entry of a checkpoint that says where training stood; the file of the checkpoints' folder that is being written."""


class WholeFiles(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all: written beside their place, flushed to the disk, then renamed.

    While the disk refuses them, the run goes on and those before are kept, unless it does so `IN_A_ROW` times.
    """

    IN_A_ROW = 10

    def __init__(self) -> None:
        self.failed = 0
        """Saves in a row that the disk has refused."""
        self._spared: list[Any] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None or "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        try:
            self._write(checkpoint, Path(path))
        except (OSError, RuntimeError) as error:
            reason = error if isinstance(error, OSError) else error.__context__  # torch's own error covers the disk's
            self.failed += 1
            if not isinstance(reason, OSError) or self.failed >= self.IN_A_ROW:
                raise
            rank_zero_warn(
                f"could not save {path}: {reason.strerror}. The run goes on, and the checkpoints before it are kept; were it"
                f" to end now, the steps since would be lost. It is an error when it happens {self.IN_A_ROW} times in a row."
            )
        else:
            self.failed, spared, self._spared = 0, self._spared, []
            for old in spared:
                self.remove_checkpoint(old)

    def remove_checkpoint(self, path: Any) -> None:
        if self.failed:  # what takes its place has not been saved
            self._spared.append(path)
        else:
            super().remove_checkpoint(path)

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        part = path.with_name(PART)  # one name, so that the leftover of a crash is overwritten
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise


def whole(checkpoint: Path) -> bool:
    """Whether it was written to its end, where a file's directory stands; of a folder of shards, meta.pt comes last."""
    return zipfile.is_zipfile(checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint)


def newest(folders: Iterable[Path]) -> Path | None:
    """The checkpoint that was written last, of those that are whole; None when there is no file at all.

    Raises ValueError when every file is damaged.
    """
    files = [file for folder in folders for file in folder.glob("*.ckpt") if file.exists()]  # unlike a link to nowhere
    damaged: list[Path] = []
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True):
        if whole(file):
            if damaged:
                rank_zero_warn(f"damaged, and passed over: {', '.join(map(str, damaged))}. Resuming from {file}.")
            return file
        damaged.append(file)
    if damaged:
        raise ValueError(
            f"every checkpoint is damaged (cut short, or not a checkpoint): {', '.join(map(str, damaged))}. Delete them to"
            " begin again, or give --ckpt_path the path of another one."
        )
    return None


def rank_state(trainer: L.Trainer, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What Lightning saves of rank 0 alone, though it may differ between ranks."""
    data = getattr(trainer, "datamodule", None)
    keys = ("callbacks", "loops", type(data).__qualname__)
    return {key: checkpoint[key] for key in keys if key in checkpoint}


def of_this_rank(trainer: L.Trainer, states: list[dict[str, Any]]) -> dict[str, Any]:
    """This rank's state; nothing, with a warning where it matters, when the states are of another number of ranks."""
    if len(states) == trainer.world_size:
        return states[trainer.global_rank]
    if trainer.training:
        rank_zero_warn(
            f"the checkpoint is of {len(states)} ranks, and this run has {trainer.world_size}: weights and optimiser"
            " are restored, but not what each rank keeps of its own, such as its place in the data"
        )
    return {}


class ExactResume(L.Callback):
    """What a policy adds to the Trainer's callbacks. It comes after all others but those that save checkpoints.

    While a checkpoint is evaluated, too, the Trainer stands at its step, and results are recorded at that step.
    """

    def __init__(self) -> None:
        self._inner = 0
        """Optimizer steps begun in this Trainer step."""
        self._validated = -1
        """The step of the latest validation."""
        self._before: tuple[int, int, int] | None = None
        """Where the Trainer stood before it evaluated a checkpoint."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # the user has named no other
            trainer.strategy.checkpoint_io = WholeFiles()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loop = trainer.fit_loop
        if loop._combined_loader_states_to_load:
            # A schedule that counts the steps had the loader made before these were known.
            loop._load_combined_loader_states()
            iter(loop._data_fetcher)  # type: ignore[arg-type]
        run.rewind(trainer)

    def on_train_batch_start(self, *args: Any) -> None:
        self._inner = 0

    def on_before_optimizer_step(self, *args: Any) -> None:
        self._inner += 1

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        pl_module.log_step()
        run.record_step(trainer)
        self._inner = 0

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated = trainer.global_step

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if at := position(trainer, self._validated):
            checkpoint[STATE] = at | {"inner": self._inner if at["interrupted"] else 0}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":  # Lightning leaves the Trainer where it was
            step, epoch = checkpoint["global_step"], checkpoint["epoch"]
            self._before = stand(trainer, step, max(0, step - 1), epoch)  # logged as the validation after that step
            return
        if not (at := checkpoint.get(STATE)):
            return
        if at["inner"]:
            rank_zero_warn(
                f"this checkpoint was saved within step {at['steps']}, when some of its optimizer steps were taken: the run goes"
                " on, but not exactly as it would have. For that, give --ckpt_path one that was saved after a step."
            )
        restore(checkpoint["loops"]["fit_loop"], at, trainer)

    def teardown(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if self._before is not None:
            stand(trainer, *self._before)
            self._before = None

    on_exception = teardown


def stand(trainer: L.Trainer, step: int, logged: int, epoch: int) -> tuple[int, int, int]:
    """Sets the Trainer's counts of steps and epochs, and the step `logged` to log at. Returns what they were before."""
    loop, epochs = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_progress.current
    steps = loop.automatic_optimization.optim_progress.optimizer.step.total
    before = steps.completed, loop._batches_that_stepped, epochs.completed
    steps.completed, loop._batches_that_stepped, epochs.completed = step, logged, epoch
    return before


def position(trainer: L.Trainer, validated: int) -> dict[str, Any] | None:
    """Where training stands, between two steps whenever it is asked; None before the first step is done.

    `steps` done in all, the `epoch` of the last one (from 1), the `batches` of it that are done, whether it is `finished`,
    whether a validation is `due`, when the latest was at step `validated`, and whether a further step was `interrupted`.
    """
    loop, epoch = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_progress.current.started  # type: ignore[attr-defined]
    progress, limit = loop.batch_progress, trainer.num_training_batches
    steps, batches = progress.total.processed, progress.current.processed  # type: ignore[attr-defined]
    if not steps:
        return None
    interrupted = progress.current.ready > batches
    finished = batches >= limit or (progress.is_last_batch and not interrupted)
    due = not interrupted and validated != steps and loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
    if batches == 0:  # in the first step of an epoch: as at the end of the last one
        epoch, batches, finished = epoch - 1, 1 if math.isinf(limit) else int(limit), True
    at = {"steps": steps, "epoch": epoch, "batches": batches, "finished": finished, "due": due}
    return at | {"interrupted": interrupted}


def restore(loops: dict[str, Any], at: dict[str, Any], trainer: L.Trainer) -> None:
    """Rewrites the state of Lightning's fit loop, so that training goes on from `at`, which `position` has returned."""
    steps, epoch, due = at["steps"], at["epoch"], at["due"]
    complete = at["finished"] and not due
    counted = due or (complete and trainer.max_steps == -1)  # otherwise Lightning completes the last step by itself

    def put(key: str, **numbers: tuple[int, int]) -> None:
        for i, part in enumerate(("total", "current")):
            loops[key][part].update({name: pair[i] for name, pair in numbers.items()})

    started, batches, left = (epoch, epoch), (steps, at["batches"]), 0 if complete else 1
    put("epoch_progress", ready=started, started=started)
    put("epoch_progress", processed=(epoch - left,) * 2, completed=(epoch - left,) * 2)
    put("epoch_loop.batch_progress", ready=batches, started=batches, processed=batches)
    put("epoch_loop.batch_progress", completed=batches if counted else tuple(n - 1 for n in batches))
    loops["epoch_loop.batch_progress"]["is_last_batch"] = at["finished"] and due
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = steps if counted and not due else steps - 1
    if due:  # as if it had been interrupted before its first batch
        put("epoch_loop.val_loop.batch_progress", ready=(1, 1), started=(1, 1), processed=(0, 0), completed=(0, 0))
