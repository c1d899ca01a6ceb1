"""Runs verifiers and reward functions on responses: in child processes, bounded in time and memory, one bad sample at a time.

A child is forked for each call, so any callable works (closures too) and whatever it leaks or breaks goes with it.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lit_rl.task import Verdict

Item = tuple[Callable[[str], Any], str]
"""A scoring function and the text of one response."""


def judge(score: Callable[[str], Any], text: str) -> Verdict:
    """One verdict, in this process; an exception is an invalid verdict that names it."""
    try:
        return Verdict.of(score(text))
    except Exception as error:  # the reward function is the user's
        return Verdict.invalid(f"{type(error).__name__}: {error}")


@dataclass
class Scorer:
    """Scores a batch of responses."""

    where: Literal["process", "inline"] = "process"
    """"inline" runs in the training process, without limits: for rewards that keep state or use the GPU."""
    timeout: float = 5.0
    """Seconds that one response may take."""
    memory_mb: int = 2048
    """Memory that one child may take beyond what the trainer holds."""
    workers: int = 1
    """Children at a time."""

    def __post_init__(self) -> None:
        if self.timeout <= 0 or self.memory_mb <= 0 or self.workers < 1:
            raise ValueError(f"scoring needs timeout > 0, memory_mb > 0 and workers >= 1: got {self}")
        if not hasattr(os, "fork"):
            self.where = "inline"

    def __call__(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item, in order. Those that raise, hang, run out of memory or die are invalid, with the reason."""
        if self.where == "inline" or not items:
            return [judge(score, text) for score, text in items]
        verdicts: list[Verdict | None] = [None] * len(items)
        waiting = [list(range(i, len(items), self.workers)) for i in range(min(self.workers, len(items)))]
        children = [_Child(items, todo, self.memory_mb, self.timeout) for todo in waiting]
        try:
            while children:
                deadline = min(child.deadline for child in children)
                ready, _, _ = select.select(children, [], [], max(0.0, deadline - time.monotonic()))
                for child in list(children):
                    if child in ready:
                        ended = child.read(verdicts)
                        reason = f"the verifier's process died ({child.status()})" if ended and child.todo else ""
                    else:
                        ended = time.monotonic() >= child.deadline
                        reason = f"the verifier took more than {self.timeout:g} s" if ended else ""
                    if ended:
                        child.kill()
                        children.remove(child)
                        if child.todo:  # the first one is to blame; a fresh child takes the rest
                            verdicts[child.todo[0]] = Verdict.invalid(reason)
                            if rest := child.todo[1:]:
                                children.append(_Child(items, rest, self.memory_mb, self.timeout))
        finally:
            for child in children:
                child.kill()
        return [v if v is not None else Verdict.invalid("not scored") for v in verdicts]


class _Child:
    """A forked process that scores the items of `todo` in order and writes a JSON line for each."""

    def __init__(self, items: Sequence[Item], todo: list[int], memory_mb: int, timeout: float) -> None:
        self.todo, self.timeout, self.rest = todo, timeout, b""
        self.exit: int | None = None
        self.pipe, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads: the child runs Python only
            self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()  # so that `kill` reaches grandchildren
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_DFL)
                gc.disable()
                _limit_memory(memory_mb)
                with os.fdopen(write, "w") as out:
                    for i in todo:
                        out.write(json.dumps(asdict(judge(*items[i])), default=str) + "\n")
                        out.flush()
            finally:
                os._exit(0)  # no exit handlers of the trainer
        os.close(write)
        self.deadline = time.monotonic() + timeout

    def fileno(self) -> int:
        return self.pipe

    def read(self, verdicts: list[Verdict | None]) -> bool:
        """Takes what has arrived; True at the end."""
        data = os.read(self.pipe, 1 << 16)
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            verdicts[self.todo.pop(0)] = Verdict(**json.loads(line))
            self.deadline = time.monotonic() + self.timeout
        return not data

    def status(self) -> str:
        self.exit = os.waitpid(self.pid, 0)[1] if self.exit is None else self.exit
        code = os.waitstatus_to_exitcode(self.exit)
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        os.close(self.pipe)
        if self.exit is not None:
            return
        for kill in (os.killpg, os.kill):  # before the child has made its group there is only itself
            with suppress(ProcessLookupError, PermissionError):
                kill(self.pid, signal.SIGKILL)
        self.exit = os.waitpid(self.pid, 0)[1]


def _limit_memory(megabytes: int) -> None:
    if not os.path.exists("/proc/self/statm"):
        return  # only Linux tells what is held already
    import resource

    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + megabytes * 2**20, resource.RLIM_INFINITY))
