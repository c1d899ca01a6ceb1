"""A run's folder, and the logger that writes there.

metrics.jsonl      one line a logged step (RunLogger)
evaluations.jsonl  one line an evaluation
completions.jsonl  one line a response in training (the Completions callback)
predictions.jsonl  one line a response of `predict`
config.yaml        what was run (the command line)
non_finite-STEP.pt  what a step that was not finite was made of (the guard of every policy)
wandb_id           of the run in W&B, which a resumed one continues (the command line)
checkpoints/
"""

from __future__ import annotations

import atexit
import os
import signal
import warnings
from argparse import Namespace
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lit_rl import jsonl
from lit_rl.metrics import Table
from lit_rl.tolerance import attempt, tolerate, warn_once

METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"
COMPLETIONS, PREDICTIONS = "completions.jsonl", "predictions.jsonl"
NON_FINITE = "non_finite-{}.pt"
KEPT = 10_000
"""Lines of metrics that wait in memory while the disk refuses them, at most."""
WANDB_ID = "wandb_id"
WANDB_TIMEOUTS = {"WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "60"}
"""Seconds that W&B may hold up a run at its start and at its end, unless these variables say otherwise."""


class RunLogger(Logger):
    """Writes each step's metrics as a line of `folder`/metrics.jsonl, at once.

    Unlike CSVLogger it takes new names at any time and never deletes what an earlier part of the run has written. Lines
    that the disk refuses are written when it takes them again.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)
        self._waiting: deque[dict[str, Any]] = deque(maxlen=KEPT)

    name = version = ""  # so that ModelCheckpoint's folder is `folder`/checkpoints

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    log_dir = root_dir = save_dir

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        record = {"step": step, **{k: float(v) for k, v in metrics.items()}}
        known = self._waiting and jsonl.line(self._waiting[-1]) == jsonl.line(record)  # not ==: NaN is NaN
        if not known and not jsonl.ends_with(self.folder / METRICS, record):
            self._waiting.append(record)
            self._write()

    def _write(self) -> None:
        path = self.folder / METRICS
        if tolerate(path, lambda: jsonl.append(path, self._waiting)):
            self._waiting.clear()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._waiting:
            self._write()
        if self._waiting:
            warnings.warn(f"{len(self._waiting)} lines of {self.folder / METRICS} are lost: the disk did not take them")

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml holds them."""


def wandb_logger(trainer: L.Trainer) -> Any:
    """The Trainer's WandbLogger, or None."""
    return next((logger for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)


def name_in_wandb(logger: WandbLogger, folder: Path, command: str) -> None:
    """A run is one run of W&B, of its folder's name, also when `fit` resumes it; evaluations are runs of their own. What
    the logger was given stays."""
    known = folder / WANDB_ID
    settings = logger._wandb_init  # before anybody asks for its run; W&B reads its own variables once a process
    settings["name"] = settings["name"] or (folder.name if command == "fit" else f"{folder.name}-{command}")
    if command == "fit" and known.exists():
        settings["id"] = settings["id"] or known.read_text()
    if settings["project"] == "lightning_logs":
        settings["project"] = "lit-rl"
    if settings["dir"] == ".":
        settings["dir"] = str(folder.absolute())  # W&B's own process has a working directory of its own


def connect(logger: WandbLogger) -> None:
    """Starts the logger's run in W&B: offline, with a warning, when the service cannot be reached. ValueError: no login."""
    from wandb.errors import CommError, UsageError

    for name, seconds in WANDB_TIMEOUTS.items():
        os.environ.setdefault(name, seconds)
    try:
        _ = logger.experiment
    except CommError as error:
        warnings.warn(f"W&B cannot be reached, and this run is kept offline, for `wandb sync` to upload: {error}")
        logger._wandb_init["mode"] = "offline"
        _ = logger.experiment
    except UsageError as error:
        raise ValueError(f"W&B: {error} Or set WANDB_MODE=offline.") from error
    atexit.register(_limit_end)  # runs before W&B's own, which come from before


def _limit_end() -> None:
    """Out of reach of its service W&B's process may go on trying for a quarter of an hour, and the end of ours waits for it."""
    import wandb

    process = getattr(getattr(wandb.setup()._connection, "_proc", None), "_process", None)  # there is no public way
    if process is None:  # it has ended, or is somebody else's
        return

    def late(*_: Any) -> None:
        process.kill()
        warn_once(
            "W&B has not taken all of this run in time: its own files have everything, `wandb sync` uploads the rest"
        )

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 5 + float(os.environ["WANDB_FINISH_TIMEOUT"]))


def shield(logger: Logger) -> None:
    """From now on an error in one of this logger's methods costs what it was to log, and not the run."""
    if not isinstance(logger, RunLogger) and "log_metrics" not in vars(logger):
        for name in ("log_metrics", "log_hyperparams", "log_graph", "save", "after_save_checkpoint", "finalize"):
            setattr(logger, name, partial(attempt, getattr(logger, name)))


def folder(trainer: L.Trainer) -> Path:
    """Where this run writes; to be called on all ranks."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def by_rank(name: str, rank: int) -> str:
    """The file's name for this rank: ranks beyond the first write files of their own."""
    return name if rank == 0 else name.replace(".", f".rank{rank}.", 1)


def refuse_unwritable(folder: Path) -> None:
    """Before anything is loaded: the run's folder must be one that can be made and filled."""
    known = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not known.is_dir() or not os.access(known, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{known} cannot hold the run's folder {folder}: it is no folder, or is not yours to write in"
        )


def refuse_other_run(file: Path, trainer: L.Trainer | None = None) -> None:
    """A new run must not mix with an old one's records. With a trainer, rank 0 decides for all, before it writes."""
    taken = file.exists() and file.stat().st_size > 0
    if trainer.strategy.broadcast(taken) if trainer is not None else taken:
        raise FileExistsError(
            f"{file.parent} already holds another run ({file.name}). Choose another folder (--run), delete this one, or"
            " continue its run with --ckpt_path last."
        )


def forget_step(trainer: L.Trainer) -> None:
    """Drops the last step's metrics: Lightning would log those that this step has not on every line until the epoch's end."""
    results = trainer.fit_loop.epoch_loop._results
    for name in [name for name, value in results.items() if value.meta.on_step and not value.meta.on_epoch]:
        del results[name]


def record_step(trainer: L.Trainer) -> None:
    """Writes the step's line of metrics.jsonl at once, where Lightning would do it after the checkpoint."""
    loggers = trainer.loggers
    trainer.loggers = [logger for logger in loggers if isinstance(logger, RunLogger)]
    try:
        trainer._logger_connector.update_train_step_metrics()
    finally:
        trainer.loggers = loggers


def rewind(trainer: L.Trainer) -> None:
    """Drops what a resumed run writes again: the records of the steps to come."""
    if trainer.is_global_zero and isinstance(trainer.logger, RunLogger):
        jsonl.rewind(trainer.logger.folder / METRICS, trainer.global_step)
        jsonl.rewind(trainer.logger.folder / EVALUATIONS, trainer.global_step + 1)  # evaluations are of a finished step


def begin_again(trainer: L.Trainer) -> None:
    """Drops all records of a run that stopped before its first checkpoint."""
    shared = [METRICS, EVALUATIONS] if trainer.is_global_zero else []
    files = [folder(trainer) / name for name in (*shared, by_rank(COMPLETIONS, trainer.global_rank))]
    if any(file.exists() for file in files):
        rank_zero_warn(f"{folder(trainer)} holds no checkpoint yet: its run begins again, and its records are dropped.")
    for file in files:
        jsonl.rewind(file, 0)


def save_evaluation(trainer: L.Trainer, stage: str, table: Table, parts: dict[str, Table]) -> None:
    """Prints the tables, the module's and those of its parts, (when evaluation is what the Trainer was asked for) and, unless
    logging is off, keeps them. In W&B's summary of a run the best stands beside the latest."""
    path = folder(trainer)
    if not trainer.is_global_zero or trainer.sanity_checking:
        return
    if trainer.state.fn in ("validate", "test"):
        for name, each in {"": table, **parts}.items():
            print(f"\n{name}\n{each}\n" if name else f"\n{each}\n", flush=True)
    if logger := wandb_logger(trainer):
        for name in table.scalars().keys() - {"length"}:
            metric = f"{stage}/{name}"
            define = logger.experiment.define_metric
            attempt(define, metric, step_metric="trainer/global_step", summary="max,last")
    if trainer.loggers and not getattr(trainer, "fast_dev_run", False):
        record = {"stage": stage, "step": trainer.global_step, "rows": [vars(row) for row in table.rows]}
        if parts:
            record["parts"] = {name: [vars(row) for row in each.rows] for name, each in parts.items()}
        if trainer.state.fn != "fit" or not jsonl.ends_with(path / EVALUATIONS, record):
            tolerate(path / EVALUATIONS, lambda: jsonl.append(path / EVALUATIONS, [record]))
