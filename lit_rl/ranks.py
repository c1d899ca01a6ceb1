"""Several processes."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LAUNCHER_VARIABLE = "LIT_RL_LAUNCHER"
"""Tells the processes that Lightning starts for further ranks which process started them."""


def several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather(value: Any) -> list[Any]:
    """The Python objects of all ranks, in order; a list of one without distribution. All ranks must call it."""
    if not several():
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


@contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """The block runs on one rank at a time, in any order. It need not run on all."""
    if not several():
        yield
        return
    store, me = dist.distributed_c10d._get_default_store(), str(dist.get_rank())
    while store.compare_set(f"lit_rl/{name}", "", me).decode() != me:
        time.sleep(0.05)
    try:
        yield
    finally:
        store.compare_set(f"lit_rl/{name}", me, "")


def end_with_launcher() -> None:
    """Ends this process when the one that launched it for a further rank is gone, however that went. It would wait for it
    in a collective otherwise, and hold its device, for as long as the strategy's timeout."""
    launcher = int(os.environ.setdefault(LAUNCHER_VARIABLE, str(os.getpid())))
    if launcher == os.getppid():

        def watch() -> None:
            while os.getppid() == launcher:
                time.sleep(1)
            os._exit(1)

        threading.Thread(target=watch, daemon=True, name="launcher-observer").start()


def join(trainer: Any) -> None:
    """The process that launched further ranks waits for them, and fails when one does."""
    for rank, process in enumerate(getattr(trainer.strategy.launcher, "procs", []), 1):
        if code := process.wait():
            sys.exit(f"lit-rl: rank {rank} ended with code {code}")
