"""The wind tunnel: a search finds what it should, is shared by processes, and goes on where it was killed."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
from test_cli import run

pytest.importorskip("optuna")
from lit_rl import jsonl
from lit_rl.tunnel import Range, dimension, search, tunnel

SPACE = {"lr": Range(1e-5, 1.0, log=True), "decay": Range(0.0, 1.0), "name": ["a", "b"]}


def bowl(options, folder):
    """Lowest at lr 1e-3, decay 0.3 and "b"."""
    jsonl.append(folder.parent / "calls.jsonl", [{"pid": os.getpid(), **options}])
    far = (math.log10(options["lr"]) + 3) ** 2 + (options["decay"] - 0.3) ** 2
    return far + (options["name"] == "a")


def calls(name="search"):
    return jsonl.read(Path("t", name, "calls.jsonl"))


def test_a_search_finds_the_bottom_and_goes_on():
    found = search(bowl, SPACE, "t", trials=12)
    assert len(found) == len(calls()) == 12
    assert [value for _, value in found] == sorted(value for _, value in found)
    more = search(bowl, SPACE, "t", trials=40)
    assert len(more) == len(calls()) == 40
    assert all(one in more for one in found)
    assert search(bowl, SPACE, "t", trials=40) == more, "nothing is repeated"
    best, value = more[0]
    assert value < 0.3
    assert best["name"] == "b"
    apart = Path("u")
    assert search(bowl, SPACE, apart, trials=40) == more, "it does not depend on where it was interrupted"


def grid(options, folder):
    """Waits for another process to come, a minute at most."""
    jsonl.append(folder.parent / "calls.jsonl", [{"pid": os.getpid(), **options}])
    begin = time.monotonic()
    while len({row["pid"] for row in calls()}) < 2 and time.monotonic() < begin + 60:
        time.sleep(0.05)
    if options["x"] == 3:
        raise FloatingPointError("diverged")
    return (options["x"] - 1) ** 2 + options["y"]


def test_processes_share_all_combinations_and_divergence_is_infinite():
    space = {"x": [0, 1, 2, 3], "y": [0.0, 0.5]}
    found = search(grid, space, "t", jobs=2)
    assert sorted((row["x"], row["y"]) for row in calls()) == list(product(*space.values()))
    assert len({row["pid"] for row in calls()}) == 2
    assert found[0] == ({"x": 1, "y": 0.0}, 0.0)
    assert [value for options, value in found if options["x"] == 3] == [math.inf] * 2


KILLED = """
import sys, time
from pathlib import Path
from lit_rl.tunnel import search
def slow(options, folder):
    print(options["x"], flush=True)
    time.sleep(0 if options["x"] < 2 else 600)
    return options["x"]
search(slow, {"x": [0, 1, 2, 3]}, "t")
"""


def test_what_a_killed_process_had_begun_is_begun_again():
    job = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    for line in job.stdout:
        if line.strip() == "2":
            break
    job.send_signal(signal.SIGKILL)
    job.wait()
    job.stdout.close()
    seen = []
    found = search(lambda options, folder: seen.append(options["x"]) or float(options["x"]), {"x": [0, 1, 2, 3]}, "t")
    assert sorted(seen) == [2, 3]
    assert found == [({"x": x}, float(x)) for x in range(4)]


def test_an_error_ends_the_search_and_its_trial_is_taken_again():
    def broken(options, folder):
        raise RuntimeError("no disk")

    with pytest.raises(RuntimeError, match="no disk"):
        search(broken, {"x": [0, 1]}, "t")
    assert len(search(lambda options, folder: 1.0, {"x": [0, 1]}, "t")) == 2


def width(options, folder):
    """Without transfer the best would be at 1e-2 for narrow, and 1e-3 for wide."""
    return abs(math.log10(options["lr"]) + (2 if options["model.model"] == "narrow" else 3))


def test_the_best_of_the_last_narrow_model_is_what_the_wide_ones_get():
    space = {"lr": [1e-4, 1e-3, 1e-2, 1e-1], "model.schedule": ["wsd"]}
    found = tunnel(width, space, "t", ["other", "narrow"], ["wide", "wider"])
    best = {"lr": 1e-2, "model.schedule": "wsd"}
    assert found["other"][0][0]["lr"] == 1e-3
    assert found["narrow"][0][0] == {**best, "model.model": "narrow"}
    assert found["wide"] == [({**best, "model.model": "wide"}, 1.0)]
    assert json.loads(Path("t/tunnel.json").read_text())["best"] == best
    with pytest.raises(ValueError, match="t holds a search of another space"):
        tunnel(width, {"lr": [1e-4]}, "t", ["narrow"])
    with pytest.raises(ValueError, match=r"wide is \['narrow'\]: it must be other models"):
        tunnel(width, space, "t", ["narrow"], ["narrow"])


def test_a_search_that_goes_on_transfers_the_better_options_that_it_finds():
    found, space = {}, {"lr": Range(1e-5, 1.0, log=True)}
    for trials in (2, 12):
        found[trials] = tunnel(width, space, "t", ["narrow"], ["wide"], trials)
        (options, value), (best, _) = found[trials]["wide"][0], found[trials]["narrow"][0]
        assert options == {"lr": best["lr"], "model.model": "wide"}
        assert value == width(options, None)
    assert found[12]["narrow"][0][1] < found[2]["narrow"][0][1]
    assert tunnel(width, space, "t", ["narrow"], ["wide", "wider"], 12)["wide"] == found[12]["wide"]


def never(options, folder):
    raise FloatingPointError


def test_when_all_diverge_there_is_no_best():
    with pytest.raises(ValueError, match="all 2 trials of m have diverged"):
        tunnel(never, {"lr": [1.0, 2.0]}, "t", ["m"])


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("model.lr=1e-4:1e-1:log", ("model.lr", Range(1e-4, 1e-1, True))),
        ("model.weight_decay=0:0.2", ("model.weight_decay", Range(0.0, 0.2))),
        ("model.schedule=wsd,cosine", ("model.schedule", ["wsd", "cosine"])),
        ("model.warmup_steps=0,10", ("model.warmup_steps", [0, 10])),
        ("model.lr=1e-1:1e-4", "with LOW below HIGH"),
        ("model.lr=0:1:log", "above 0 where it is by logarithms"),
        ("model.lr=1:2:lug", "NAME=LOW:HIGH:log"),
        ("model.lr=a:b", "NAME=LOW:HIGH:log"),
        ("model.lr", "it must be NAME=LOW:HIGH"),
    ],
)
def test_dimensions(text, want):
    if isinstance(want, str):
        with pytest.raises(ValueError, match=want):
            dimension(text)
    else:
        assert dimension(text) == want


SHORT = ("--config", "pretrain", "--config", "mup", "--config", "tiny", "--trainer.max_steps", 2)
SHORT += ("--trainer.val_check_interval", 2, "--trainer.limit_val_batches", 1)


def test_on_the_command_line(capsys):
    """Twice: the second time nothing is run, and the overlay that is left is a recipe."""
    words = ("t", "--search", "model.lr=1e-4,1e-2", "--narrow", "tiny:32", "--wide", "tiny:64", "--", *SHORT)
    for again in (False, True):
        code, text = run(capsys, "tunnel", *words)
        assert code == 0, text
        assert ("search-tiny-32, trial 1: model.lr=0.01" in text) != again
        assert "tiny:64                  val/loss" in text
    losses = {p.parent.name: jsonl.read(p)[-1]["val/loss"] for p in Path("t/search-tiny-32").glob("*/metrics.jsonl")}
    best = json.loads(Path("t/tunnel.json").read_text())["best"]["model.lr"]
    assert best == [1e-4, 1e-2][losses["1"] < losses["0"]]
    (transfer,) = Path("t").glob("transfer-*/0/metrics.jsonl")
    (row,) = [r for r in jsonl.read(transfer) if "val/loss" in r]
    more = ("--config", "t/best.yaml", "--model.model", "tiny:64", "--run", "r")
    code, text = run(capsys, "fit", *SHORT, *more)
    assert code == 0, text
    assert [r["val/loss"] for r in jsonl.read(Path("r/metrics.jsonl")) if "val/loss" in r] == [row["val/loss"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--search", "model.lr=1:0", "--narrow", "tiny"), "with LOW below HIGH"),
        (
            ("--search", "model.lr=1,2", "--narrow", "tiny", "--", "--config", "pretain"),
            "no recipe 'pretain': did you mean",
        ),
        (("--search", "model.lr=1,2", "--narrow", "tiny", "--trials", 0), "trials is 0"),
        (("--search", "model.lrr=1,2", "--narrow", "tiny", "--", *SHORT), "Did you mean lr instead of lrr"),
        (
            ("--search", "model.lr=1,2", "--narrow", "tiny", "--metric", "val/lss", "--", *SHORT),
            "has logged no val/lss: --metric may be val/length, val/loss, val/pass@1",
        ),
    ],
)
def test_mistakes_are_explained(words, message, capsys):
    code, text = run(capsys, "tunnel", "t", *words)
    assert code not in (0, None)
    assert message in text
    assert "Traceback" not in text
