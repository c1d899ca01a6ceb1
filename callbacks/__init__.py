"""Callbacks: monitors that work on any LightningModule, and the tricks of papers on the hooks of a rollout."""

from .completions import Completions
from .coordinate_check import CoordinateCheck
from .covariance import ClipCov, KLCov
from .entropy import EntropyMonitor
from .entropy_law import EntropyLaw
from .garble import GarbleFilter
from .off_policy import OffPolicyMixing
from .reference import ReferenceRefresh
from .rollout_stats import RolloutStats
from .scaling_bench import ScalingBench
from .sparse_attention import SparseAttention
from .ternary import TernaryQAT
from .voting import MajorityVote

__all__ = [
    "ClipCov",
    "Completions",
    "CoordinateCheck",
    "EntropyLaw",
    "EntropyMonitor",
    "GarbleFilter",
    "KLCov",
    "MajorityVote",
    "OffPolicyMixing",
    "ReferenceRefresh",
    "RolloutStats",
    "ScalingBench",
    "SparseAttention",
    "TernaryQAT",
]
