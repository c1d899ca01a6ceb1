"""Stopping: a signal, or an error, ends training at a place to go on from, and leaves the checkpoint of that place."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_rl.hooks import RLCallback


class Stopping(RLCallback):
    """What a policy adds to the Trainer's callbacks, so that SIGTERM, SIGINT (Ctrl-C) and SLURM's SIGUSR1 lose no work.

    While nothing has happened since the last step but sampling, which is most of the time, training ends at once: a step's
    samples depend on the step alone, so that the resumed run draws them again. Otherwise, and always with several ranks, it
    ends after the step. Then last.ckpt is saved where ModelCheckpoint saves, and the process exits with 128 + the signal's
    number: 143 for SIGTERM, 130 for SIGINT. A second SIGINT is Python's own.

    An error in such a moment leaves a last.ckpt as well, unless the model has diverged.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        """The signal that has come."""
        self._quiet = self._at_once = False
        self._requeue: Any = None
        self._rank, self._alone = 0, True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.asked, self._quiet, self._requeue = None, False, None
        self._rank, self._alone = trainer.global_rank, trainer.world_size == 1
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):  # Lightning puts the handlers from before the fit back
            signal.signal(number, self._note)
        if SLURMEnvironment.detect() and callable(handler := signal.getsignal(signal.SIGUSR1)):
            self._requeue = handler  # Lightning's saves a checkpoint wherever training stands
            signal.signal(signal.SIGUSR1, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self.asked is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.asked = number
        if self._rank == 0:  # print is not for signal handlers
            os.write(2, f"\n{signal.Signals(number).name}: training stops at the next exact place.\n".encode())
        if self._at_once:
            raise self._end()

    def _end(self) -> SIGTERMException:
        return SIGTERMException(0 if self._rank else 128 + (self.asked or signal.SIGTERM))  # launchers watch rank 0

    def _end_if_asked(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.state.fn == "fit" and pl_module.sum_over_ranks(float(self.asked is not None)):
            raise self._end()

    on_train_batch_start = on_validation_start = _end_if_asked  # type: ignore[assignment]

    def on_train_batch_end(self, *args: Any) -> None:
        self._quiet = True

    def on_train_end(self, *args: Any) -> None:
        self.asked, self._quiet = None, False

    def _begin(self, *args: Any) -> None:
        self._quiet = False

    on_rollout = on_loss = _begin  # type: ignore[assignment]

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Around what takes long and may be given up at any moment."""
        self._at_once = self._quiet and self._alone
        if self._at_once and self.asked is not None:
            raise self._end()
        yield
        self._at_once = False

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._at_once = False
        saver = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath), None)
        asked = isinstance(exception, SIGTERMException)
        failed = self._alone and isinstance(exception, Exception) and not isinstance(exception, FloatingPointError)
        if not self._quiet or saver is None or not (asked or failed):
            return
        path = saver.last_model_path = saver.format_checkpoint_name({}, saver.CHECKPOINT_NAME_LAST)
        try:  # the saver's state is in it, so that a resumed run replaces the file
            trainer.save_checkpoint(path, weights_only=False)
        except Exception as error:  # the first exception matters more
            rank_zero_warn(f"could not save {path}: {error}. The checkpoints before it stand.")
            return
        if not getattr(trainer.strategy.checkpoint_io, "failed", 0):  # it has said so itself
            rank_zero_info(f"Saved {path} after step {trainer.global_step}. Continue with --ckpt_path last.")
        if self.asked == signal.SIGUSR1 and self._requeue is not None:
            self._requeue(self.asked, None)
