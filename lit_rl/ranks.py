"""Several processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather(value: Any) -> list[Any]:
    """The Python objects of all ranks, in order; a list of one without distribution. All ranks must call it."""
    if not dist.is_available() or not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def total(*values: float) -> list[float]:
    """Each value's sum over all ranks. All ranks must call it."""
    return [sum(of) for of in zip(*gather(values), strict=True)]


def largest(keys: Tensor, n: int) -> Tensor:
    """(M,) bool: which of this rank's keys, (M,), are among the n largest of all ranks. -inf never is; of equal keys the
    lower rank's come first, then the earlier. All ranks must call it."""
    order = keys.argsort(descending=True, stable=True)[:n]
    order = order[keys[order] > -torch.inf]
    everyone = gather(keys[order])
    best = torch.cat(everyone).argsort(descending=True, stable=True)[:n]
    start = sum(map(len, everyone[: dist.get_rank()])) if len(everyone) > 1 else 0
    mine = best[(best >= start) & (best < start + len(order))] - start
    return torch.zeros_like(keys, dtype=torch.bool).index_fill(0, order[mine], True)
