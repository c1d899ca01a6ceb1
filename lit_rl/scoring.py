"""Runs verifiers and reward functions on responses: in child processes, bounded in time and memory, one bad sample at a time.

A child is forked for each call, so any callable works (closures too) and whatever it leaks or breaks goes with it.
"""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from threading import Thread
from typing import Any, Literal

from lit_rl.checks import require_literals
from lit_rl.task import Verdict

Item = tuple[Callable[[str], Any], str]
"""A scoring function and the text of one response."""

LONGEST = 1e6
"""Seconds that the system's clocks take for a limit with ease."""

# forking beside threads: the child runs Python only
warnings.filterwarnings("ignore", message=r".*use of fork\(\)", category=DeprecationWarning)


def judge(score: Callable[[str], Any], text: str) -> Verdict:
    """One verdict, in this process; an exception is an invalid verdict that names it."""
    try:
        return Verdict.of(score(text))
    except (Exception, SystemExit) as error:  # the reward function is the user's
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
        require_literals(Scorer, vars(self))
        if not 0 < self.timeout <= LONGEST or self.memory_mb <= 0 or self.workers < 1:
            raise ValueError(
                f"scoring needs timeout > 0 and at most {LONGEST:g} (where: inline has no limit), memory_mb > 0 and workers >= 1:"
                f" got {self}"
            )
        if not hasattr(os, "fork"):
            self.where = "inline"

    def __call__(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item, in order. Those that raise, hang, run out of memory or die are invalid, with the reason."""
        if self.where == "inline" or not items:
            return [judge(score, text) for score, text in items]
        verdicts: list[Verdict | None] = [None] * len(items)
        children: list[_Child] = []

        def start(todo: list[int]) -> None:
            try:
                children.append(_Child(items, todo, self.memory_mb, self.timeout))
            except OSError as error:
                for i in todo:
                    verdicts[i] = Verdict.invalid(f"the system gave no process for the verifier: {error}")

        try:
            for i in range(min(self.workers, len(items))):
                start(list(range(i, len(items), self.workers)))
            while children:
                deadline = min(child.deadline for child in children)
                ready = wait([child.pipe for child in children], max(0.0, deadline - time.monotonic()))
                for child in list(children):
                    late = child.pipe not in ready and time.monotonic() >= child.deadline
                    ended = late or (child.pipe in ready and child.read(verdicts))
                    if ended or not child.todo:
                        children.remove(child)
                        child.kill()
                        if not child.todo:  # the system takes its memory back meanwhile: of a large trainer's, a while
                            Thread(target=child.wait).start()
                        else:  # the first one is to blame; a fresh child takes the rest
                            status = child.wait()
                            fate = (
                                f" took more than {self.timeout:g} s" if late else f"'s process {child.fate or status}"
                            )
                            verdicts[child.todo[0]] = Verdict.invalid(f"the verifier{fate}")
                            if rest := child.todo[1:]:
                                start(rest)
        finally:
            for child in children:
                child.kill()
                child.wait()
        return [v if v is not None else Verdict.invalid("not scored") for v in verdicts]


class _Child:
    """A forked process that scores the items of `todo` in order and writes a JSON line for each."""

    def __init__(self, items: Sequence[Item], todo: list[int], memory_mb: int, timeout: float) -> None:
        self.todo, self.timeout, self.rest, self.fate = todo, timeout, b"", ""
        _flush()  # or what is waiting to be printed would be printed by the child as well
        self.pipe, write = os.pipe()
        try:
            self.pid = os.fork()
        except OSError:
            os.close(self.pipe)
            os.close(write)
            raise
        if self.pid == 0:
            try:
                os.setsid()  # so that `kill` reaches grandchildren
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
                    signal.signal(number, signal.SIG_DFL)
                gc.disable()
                _limit_memory(memory_mb)
                own = os.getpid()
                with os.fdopen(write, "w") as out:
                    for i in todo:
                        signal.alarm(math.ceil(timeout) + 1)  # ends this process when there is no trainer left to do it
                        line = json.dumps(asdict(judge(*items[i])))
                        if os.getpid() != own:
                            break  # the verifier has forked, and this is the copy
                        _flush()
                        out.write(line + "\n")
                        out.flush()
            finally:
                os._exit(0)  # no exit handlers of the trainer
        os.close(write)
        self.deadline = time.monotonic() + timeout

    def read(self, verdicts: list[Verdict | None]) -> bool:
        """Takes what has arrived; True at the end, and at what is no verdict."""
        data = os.read(self.pipe, 1 << 16)
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines[: len(self.todo)]:
            try:
                verdict = Verdict(**json.loads(line))
            except (TypeError, ValueError):
                self.fate = "wrote where its verdict belongs"  # to whatever files it found open
                return True
            verdicts[self.todo.pop(0)] = verdict
            self.deadline = time.monotonic() + self.timeout
        return not data

    def kill(self) -> None:
        """Ends the child and whatever it has started."""
        os.close(self.pipe)
        for kill in (os.killpg, os.kill):  # before the child has made its group there is only itself
            with suppress(ProcessLookupError, PermissionError):
                kill(self.pid, signal.SIGKILL)

    def wait(self) -> str:
        """How it ended, when it has."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return f"died (signal {-code})" if code < 0 else f"died (exit code {code})"


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # there is none, or it is closed
            stream.flush()


def _limit_memory(megabytes: int) -> None:
    if not os.path.exists("/proc/self/statm"):
        return  # only Linux tells what is held already
    import resource

    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]  # a cluster may have set one, and it cannot be raised
    soft = held + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
