"""Callbacks: monitors that work on any LightningModule, and the tricks of papers on the hooks of a rollout."""

from .completions import Completions
from .entropy import EntropyMonitor
from .rollout_stats import RolloutStats

__all__ = ["Completions", "EntropyMonitor", "RolloutStats"]
