"""Loggers that depend on a service, such as W&B: its failure costs records there, and no run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger

from lit_rl import run

TIMEOUTS = {"WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "60"}
"""Seconds that W&B may hold up a run at its start and at its end, unless these variables say otherwise."""
METHODS = ("log_metrics", "log_hyperparams", "log_graph", "save", "after_save_checkpoint", "finalize")


def connect(logger: WandbLogger) -> None:
    """Starts the logger's W&B run: offline, with a warning, when the service cannot be reached."""
    from wandb.errors import CommError

    for name, seconds in TIMEOUTS.items():
        os.environ.setdefault(name, seconds)
    try:
        _ = logger.experiment
    except CommError as error:
        warnings.warn(f"W&B cannot be reached, and this run is kept offline, for `wandb sync` to upload: {error}")
        logger._wandb_init["mode"] = "offline"
        _ = logger.experiment


def shield(logger: Logger) -> None:
    """From now on an error in one of the logger's methods is warned of once, and nothing more."""
    if not isinstance(logger, run.RunLogger) and "log_metrics" not in vars(logger):
        for name in METHODS:
            setattr(logger, name, partial(attempt, getattr(logger, name)))


def attempt(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return method(*args, **kwargs)
    except Exception as error:
        run.warn_once(
            f"a logger failed, and lacks records from here on, which the run's own files have: {method.__qualname__}: {error!r}."
            " This message comes once."
        )
