"""A run's folder, and the logger that writes there.

metrics.jsonl      one line a logged step (RunLogger)
evaluations.jsonl  one line an evaluation
completions.jsonl  one line a response in training (the Completions callback)
predictions.jsonl  one line a response of `predict`
config.yaml        what was run (the command line)
checkpoints/
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from lit_rl import jsonl
from lit_rl.metrics import Table

METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"
COMPLETIONS, PREDICTIONS = "completions.jsonl", "predictions.jsonl"


class RunLogger(Logger):
    """Writes each step's metrics as a line of `folder`/metrics.jsonl, at once.

    Unlike CSVLogger it takes new names at any time and never deletes what an earlier part of the run has written.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)

    name = version = ""  # so that ModelCheckpoint's folder is `folder`/checkpoints

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    log_dir = root_dir = save_dir

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        jsonl.append(self.folder / METRICS, [{"step": step, **{k: float(v) for k, v in metrics.items()}}])

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml holds them."""


def folder(trainer: L.Trainer) -> Path:
    """Where this run writes; to be called on all ranks."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def by_rank(name: str, rank: int) -> str:
    """The file's name for this rank: ranks beyond the first write files of their own."""
    return name if rank == 0 else name.replace(".", f".rank{rank}.", 1)


def refuse_other_run(file: Path, trainer: L.Trainer | None = None) -> None:
    """A new run must not mix with an old one's records. With a trainer, rank 0 decides for all, before it writes."""
    taken = file.exists() and file.stat().st_size > 0
    if trainer.strategy.broadcast(taken) if trainer is not None else taken:
        raise FileExistsError(
            f"{file.parent} already holds another run ({file.name}). Choose another folder (--run), delete this one, or"
            " continue its run with --ckpt_path last."
        )


def save_evaluation(trainer: L.Trainer, stage: str, table: Table) -> None:
    """Prints the table (when evaluation is what the Trainer was asked for) and, unless logging is off, keeps it."""
    path = folder(trainer)
    if not trainer.is_global_zero or trainer.sanity_checking:
        return
    if trainer.state.fn in ("validate", "test"):
        print(f"\n{table}\n", flush=True)
    if trainer.loggers:
        jsonl.append(
            path / EVALUATIONS,
            [{"stage": stage, "step": trainer.global_step, "rows": [vars(row) for row in table.rows]}],
        )
