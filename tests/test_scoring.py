"""Scoring survives whatever a verifier does."""

import os
import subprocess
import sys
import time

import pytest

from lit_rl.scoring import Scorer
from lit_rl.task import Verdict


def hang(text):
    while True:
        time.sleep(1)


def eat(text):
    hoard = []
    while True:
        hoard.append(bytearray(2**24))


def die(text):
    os._exit(3)


def fail(text):
    raise RuntimeError("no such table")


GOOD = [(lambda text: Verdict(text == "yes", float(text == "yes"), text), "yes"), (lambda text: 0.5, "x")]


def test_bad_items_are_invalid_and_good_ones_are_not_lost():
    items = [
        GOOD[0],
        (hang, "a"),
        (die, "b"),
        (fail, "c"),
        (lambda t: float("nan"), "d"),
        (lambda t: None, "e"),
        GOOD[1],
    ]
    verdicts = Scorer(timeout=0.5)(items)
    assert [v.valid for v in verdicts] == [True, False, False, False, False, False, True]
    assert verdicts[0] == Verdict(True, 1.0, "yes")
    assert verdicts[-1] == Verdict(False, 0.5)
    assert [v.reason for v in verdicts[1:6]] == [
        "the verifier took more than 0.5 s",
        "the verifier's process died (exit code 3)",
        "RuntimeError: no such table",
        "the verifier returned nan",
        "the verifier returned None",
    ]


def test_memory_is_bounded():
    verdict, after = Scorer(timeout=20, memory_mb=256)([(eat, "a"), GOOD[0]])
    assert not verdict.valid
    assert "MemoryError" in verdict.reason
    assert after.correct


def test_a_systems_own_limit_of_memory_is_kept():
    """As `ulimit -v` on a cluster, which no process may raise."""
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))\n"
        "from lit_rl.scoring import Scorer; from lit_rl.task import Verdict\n"
        "print(Scorer()([(lambda text: resource.getrlimit(resource.RLIMIT_AS)[1] / 2**36, 'a')])[0])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(Verdict(True, 1.0))


def test_grandchildren_die_with_their_parent():
    def spawn(text):
        subprocess.Popen(["sleep", "987"])
        time.sleep(60)

    Scorer(timeout=0.5)([(spawn, "a")])
    time.sleep(0.2)
    assert subprocess.run(["pgrep", "-f", "sleep 987"], capture_output=True).stdout == b""


def test_children_are_gone_soon_after(monkeypatch):
    fork, children = os.fork, []

    def remember():
        children.append(fork())
        return children[-1]

    monkeypatch.setattr(os, "fork", remember)
    assert all(verdict.valid for verdict in Scorer(workers=3)([(len, "a")] * 6))
    assert len(children) == 3
    end = time.monotonic() + 10
    while left := [pid for pid in children if os.path.exists(f"/proc/{pid}")]:  # as it does for one nobody waits for
        assert time.monotonic() < end, left
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [1, 3, 50])
def test_order_and_workers(workers):
    items = [(lambda text: {"length": len(text) / 100, "half": 0.25}, "x" * i) for i in range(40)]
    verdicts = Scorer(workers=workers)(items)
    assert [v.score for v in verdicts] == pytest.approx([i / 100 + 0.25 for i in range(40)])
    assert verdicts[3].parts == {"length": 0.03, "half": 0.25}


def test_inline_keeps_state_and_isolates_errors():
    calls = []

    def count(text):
        calls.append(text)
        return 1.0

    verdicts = Scorer(where="inline")([(count, "a"), (fail, "b"), (count, "c")])
    assert calls == ["a", "c"]
    assert [v.valid for v in verdicts] == [True, False, True]


@pytest.mark.parametrize("timeout", [0, float("nan"), float("inf")])
def test_limits_are_checked(timeout):
    with pytest.raises(ValueError, match="timeout > 0"):
        Scorer(timeout=timeout)


@pytest.mark.parametrize("junk", [b"hello\n", b"[1]\n", b'{"right": 1}\n'])
def test_what_a_verifier_writes_to_files_that_it_found_open_is_no_verdict(junk, monkeypatch):
    pipes, pipe = [], os.pipe
    monkeypatch.setattr(os, "pipe", lambda: pipes.append(pipe()) or pipes[-1])

    def scribble(text):
        os.write(pipes[-1][1], junk)
        return 1.0

    verdicts = Scorer(timeout=5)([GOOD[0], (scribble, "a"), GOOD[1], (scribble, "b")])
    assert [v.valid for v in verdicts] == [True, False, True, False]
    assert verdicts[1].reason == "the verifier's process wrote where its verdict belongs"
