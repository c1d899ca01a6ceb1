"""Faults cost what they must and nothing more. Each is injected into a real run, most of them through the real command."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from test_policy import Letters, policy, trainer, weights

from lit_rl import RLCallback, Task, jsonl
from lit_rl.__main__ import main
from lit_rl.callbacks import Completions
from lit_rl.methods.dapo import DAPO
from lit_rl.rollout import Rollout
from lit_rl.run import RunLogger
from lit_rl.scoring import Scorer

TINY = ["fit", "--config", "grpo", "--config", "tiny", "--trainer.enable_progress_bar", "false"]
MARK = "LIT_RL_TEST_MARK"


class Command:
    """The real command in a process of its own, started in this test's folder."""

    def __init__(self, *argv, **env):
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lit_rl", *map(str, argv)],
            env={**os.environ, MARK: self.mark, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ends(self, timeout=600):
        """Its exit code and what it printed."""
        try:
            text, _ = self.process.communicate(timeout=timeout)
        finally:
            self.process.kill()
        return self.process.returncode, text

    def relatives(self):
        """Processes that it has left behind: whoever inherited its environment."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue  # it has ended
        return found


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def steps(run):
    return [r for r in jsonl.read(Path(run, "metrics.jsonl")) if "loss" in r]


# ---------------------------------------------------------------- losses and gradients that are not finite


class Poison(RLCallback):
    """Makes the loss of chosen slices NaN, or only its gradient."""

    def __init__(self, slices, where="loss"):
        self.slices, self.where, self.seen = slices, where, 0

    def on_loss(self, trainer, module, x, terms):
        if self.seen in self.slices:
            if self.where == "loss":
                terms.loss = terms.loss * math.nan
            else:  # the value is zero, its derivative infinite
                terms.loss = terms.loss + (terms.logps - terms.logps.detach()).abs().sqrt()
        self.seen += 1


class States(L.Callback):
    """Weights with optimizer state, and what was logged, after each Trainer step."""

    def __init__(self):
        self.seen, self.metrics = [], []

    def on_train_batch_end(self, trainer, module, *_):
        state = trainer.optimizers[0].state_dict()["state"]
        self.seen.append(torch.cat([weights(module), *(v.flatten() for s in state.values() for v in s.values())]))

    def on_train_batch_start(self, trainer, *_):
        self.metrics.append(dict(trainer.logged_metrics))


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_loss_or_gradient_that_is_not_finite_moves_nothing(where, clip, precision):
    states, module = States(), policy()
    # the Trainer itself has no float16 on a CPU; its plugin has, and this first scale overflows nothing
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 256.0))] if precision == "16-mixed" else []
    run = trainer(max_steps=3, callbacks=[Poison({1}, where), states], gradient_clip_val=clip, plugins=plugins)
    with pytest.warns(
        UserWarning, match=r"step 1: the loss or gradient is not finite .* what is in .*non_finite-1\.pt"
    ):
        run.fit(module, Letters())
    first, second, third = states.seen
    assert torch.equal(first, second)
    assert not torch.equal(second, third)
    assert third.isfinite().all()
    assert states.metrics[2]["skipped/non_finite"] == 1
    assert not math.isfinite(states.metrics[2]["grad_norm"])
    assert "skipped/non_finite" not in module.counts  # of the last step
    if plugins:
        assert plugins[0].scaler.get_scale() == 128.0, "the scaler has seen it, and backs off"


def test_other_minibatches_are_taken_and_the_guilty_slice_is_kept():
    class Record(RLCallback):
        slices = []

        def on_loss(self, trainer, module, x, terms):
            self.slices.append(x)

    record, module = Record(), policy(minibatches=2, microbatch_tokens=60, old_logps="sampler")
    run = trainer(max_steps=1, callbacks=[record, Poison({1})])
    run.fit(module, Letters())
    assert {int(s["step"]) for s in run.optimizers[0].state_dict()["state"].values()} == {1}
    assert module.counts["skipped/non_finite"] == 1
    content = torch.load("non_finite-0.pt", weights_only=True)
    assert content["step"] == 0
    (kept,) = content["slices"]
    assert math.isnan(kept["loss"])
    assert kept["tasks"] == [task.key() for task in record.slices[1].tasks]
    for name in ("tokens", "mask", "weights", "logps", "sampler_logps", "advantages", "rewards"):
        assert torch.equal(kept[name], getattr(record.slices[1], name))


def test_too_many_in_a_row_end_the_training_and_few_files_are_kept():
    module = policy(max_non_finite=3)
    before = weights(module).clone()
    with pytest.raises(FloatingPointError, match="3 losses or gradients in a row were not finite, the last at step 2"):
        trainer(max_steps=9, callbacks=[Poison(range(99))]).fit(module, Letters())
    assert torch.equal(before, weights(module))
    module = policy(max_non_finite=2)
    trainer(max_steps=10, callbacks=[Poison(range(1, 10, 2))]).fit(module, Letters())
    assert [p.name for p in sorted(Path().glob("*.pt"))] == [f"non_finite-{i}.pt" for i in (0, 1, 3, 5)]


RANKS = """
import sys, torch
import lightning.pytorch as L
sys.path.insert(0, sys.argv[1])
from test_faults import Poison
from test_policy import Letters, policy, trainer, weights

class OneRank(Poison):
    def on_loss(self, trainer, *args):
        if trainer.global_rank == 1:
            super().on_loss(trainer, *args)

module, poison = policy(), OneRank({1})
run = trainer(max_steps=3, callbacks=[poison], devices=2, strategy="ddp")
seen = []
module.on_train_batch_start_ = module.on_train_batch_start
class Watch(L.Callback):
    def on_train_batch_end(self, trainer, module, *_):
        seen.append(weights(module).clone())
run.callbacks.append(Watch())
run.fit(module, Letters())
torch.save(seen, f"rank{run.global_rank}.pt")
"""


def test_all_ranks_agree_to_skip():
    Path("ranks.py").write_text(RANKS)
    done = subprocess.run(
        [sys.executable, "ranks.py", str(Path(__file__).parent)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (torch.load(f"rank{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])
    assert Path("non_finite-1.rank1.pt").exists()


BREAK = """
import lightning.pytorch as L

class Break(L.Callback):
    def on_train_batch_start(self, trainer, module, *_):
        if trainer.global_step == 2:
            module.model.lm_head.weight.data.fill_(float("inf"))
"""


def test_weights_that_have_diverged_end_the_run_and_leave_its_records(monkeypatch):
    monkeypatch.syspath_prepend(".")
    Path("breaks.py").write_text(BREAK)
    saves = ["--trainer.callbacks.every_n_train_steps", "1", "--trainer.callbacks+=breaks.Break"]
    with pytest.raises(FloatingPointError, match="not finite: the model has diverged"):
        main([*TINY, *saves, "--trainer.limit_val_batches", "0", "--run", "r"])
    assert [row["step"] for row in steps("r")] == [0, 1]
    assert len(jsonl.read(Path("r/completions.jsonl"))) == 2 * 64
    content = torch.load("r/checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == 2
    assert all(v.isfinite().all() for v in content["state_dict"].values())


# ---------------------------------------------------------------- verifiers

VERIFIERS = """
import os, signal, subprocess, sys, time
import lightning.pytorch as L
import numpy, torch
from lit_rl import Task, Verdict
from lit_rl.datamodules import TaskData

def raises(text): raise RuntimeError("no such table")
def hangs(text):
    while True: time.sleep(1)
def hardened(text):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
    hangs(text)
def exits(text): os._exit(0)
def quits(text): sys.exit("bye")
def eats(text):
    hoard = []
    while True: hoard.append(bytearray(2**24))
def spawns(text):
    subprocess.Popen(["sleep", "600"])
    os._exit(3)
def forks(text):
    os.fork()
    return 1.0
def prints(text):
    for _ in range(2000): print("noise " * 20)
    return 0.25
def words(text): return "excellent"
def arrays(text): return numpy.zeros(3)
def nan(text): return float("nan")
def huge(text): return 1e300
def tensors(text): return Verdict(torch.tensor(True), torch.tensor(0.5), 42, parts={"a": numpy.float32(1)})
def long(text): return Verdict(False, 0.5, "x" * 10**6)
def letters(text): return sum(c in "aeiou" for c in text) / max(1, len(text))

BAD = [raises, hangs, hardened, exits, quits, eats, spawns, words, arrays, nan, huge]
GOOD = [forks, prints, tensors, long, letters]

class Verifiers(TaskData):
    def tasks(self, split):
        return [Task(f"{f.__name__}", f, family=f.__name__) for f in BAD + GOOD] * 8

class Memory(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        with open("/proc/self/statm") as file, open("memory.txt", "a") as out:
            print(int(file.read().split()[1]) * 4096, file=out)
"""


def test_a_run_survives_every_bad_verifier():
    Path("bad.py").write_text(VERIFIERS)
    data = ["--data", "bad.Verifiers", "--data.batch_size", 16, "--trainer.callbacks+=bad.Memory"]
    limits = ["--model.scoring", '{"timeout": 1.5, "memory_mb": 256}', "--model.group", 2]
    command = Command(*TINY, *data, *limits, "--trainer.max_steps", 3, "--trainer.limit_val_batches", 0, "--run", "r")
    code, text = command.ends()
    assert code == 0, text
    wait_for(lambda: not command.relatives(), 5)
    assert [row["skipped/verifier_failed"] for row in steps("r")] == [22.0] * 3
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in steps("r"))
    reasons = {}
    for record in jsonl.read(Path("r/completions.jsonl")):
        reasons.setdefault(record["family"], set()).add((record["correct"], record["reason"]))
    assert {k: v for k, v in reasons.items() if k != "eats"} == {
        "raises": {(None, "RuntimeError: no such table")},
        "hangs": {(None, "the verifier took more than 1.5 s")},
        "hardened": {(None, "the verifier took more than 1.5 s")},
        "exits": {(None, "the verifier's process died (exit code 0)")},
        "quits": {(None, "SystemExit: bye")},
        "spawns": {(None, "the verifier's process died (exit code 3)")},
        "words": {(None, "the verifier returned a str: expected a Verdict or a number")},
        "arrays": {(None, "the verifier returned a ndarray: expected a Verdict or a number")},
        "nan": {(None, "the verifier returned nan")},
        "huge": {(None, "the verifier returned 1e+300")},
        "forks": {(True, "")},
        "tensors": {(True, "")},
        **{name: {(False, "")} for name in ("prints", "long", "letters")},
    }
    assert all(correct is None for correct, _ in reasons["eats"])
    first, *_, last = map(int, Path("memory.txt").read_text().split())
    assert last - first < 64 * 2**20, "the trainer itself does not grow"


def test_a_system_without_further_processes_costs_verdicts_only(monkeypatch):
    def no_fork():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", no_fork)
    before = len(os.listdir("/proc/self/fd"))
    verdicts = Scorer(workers=2)([(len, "a"), (len, "b"), (len, "c")])
    assert [v.reason for v in verdicts] == [
        "the system gave no process for the verifier: [Errno 11] Resource temporarily unavailable"
    ] * 3
    assert len(os.listdir("/proc/self/fd")) == before


# ---------------------------------------------------------------- disks


def test_a_full_disk_costs_completions_and_delays_metrics():
    """/dev/full answers every write as a full disk does."""

    class Frees(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 3:
                for name in ("metrics.jsonl", "completions.jsonl"):
                    Path("r", name).unlink()

    Path("r").mkdir()
    for name in ("metrics.jsonl", "completions.jsonl"):
        Path("r", name).symlink_to("/dev/full")
    run = trainer(
        max_steps=5,
        callbacks=[Completions(), Frees()],
        logger=RunLogger("r"),
        log_every_n_steps=1,
        default_root_dir="r",
    )
    with pytest.warns(UserWarning, match="cannot write") as warned:
        run.fit(policy(), Letters())
    said = [str(w.message) for w in warned if "cannot write" in str(w.message)]
    assert len(said) == 2, "once a file"
    assert all("No space left on device. The run goes on" in message for message in said)
    rows = steps("r")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4], "metrics have waited"
    assert [row.get("skipped/completions_unwritten") for row in rows[:3]] == [16.0] * 3
    assert sorted({r["step"] for r in jsonl.read(Path("r/completions.jsonl"))}) == [3, 4]


def test_what_a_full_disk_keeps_to_the_end_is_said():
    Path("r").mkdir()
    Path("r/metrics.jsonl").symlink_to("/dev/full")
    run = trainer(max_steps=2, logger=RunLogger("r"), log_every_n_steps=1, default_root_dir="r")
    with pytest.warns(UserWarning, match=r"2 lines of r/metrics.jsonl are lost: the disk did not take them"):
        run.fit(policy(), Letters())


@pytest.fixture
def small_disk():
    """A folder on a disk of 20 MB, and a way to make it larger."""
    Path("disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", "disk"], capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    yield Path("disk"), lambda: subprocess.run(["mount", "-o", "remount,size=200m", "disk"], check=True)
    subprocess.run(["umount", "disk"], check=True)


def test_a_disk_too_full_for_a_checkpoint_keeps_the_one_before(small_disk):
    disk, enlarge = small_disk

    class Enlarge(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 3:
                seen.update(p.name for p in disk.rglob("*.ckpt"))
                assert (
                    len(torch.load(disk / "checkpoints/epoch=0-step=1.ckpt", weights_only=True)["optimizer_states"])
                    == 1
                )
                enlarge()

    def fit(*callbacks, steps):
        saver = ModelCheckpoint(every_n_train_steps=1, save_last=True)
        logger = RunLogger(str(disk))
        run = trainer(max_steps=steps, callbacks=[*callbacks, saver], logger=logger, enable_checkpointing=True)
        run.fit(policy(), Letters())

    seen = set()
    with pytest.warns(UserWarning, match="could not save .*No space left on device. The run goes on") as warned:
        fit(Enlarge(), steps=4)
    assert sum("could not save" in str(w.message) for w in warned) == 5, "last of step 1, both of steps 2 and 3"
    assert seen == {"epoch=0-step=1.ckpt"}
    assert {p.name for p in disk.rglob("*.ckpt")} == {"epoch=0-step=4.ckpt", "last.ckpt"}, "what was spared is gone"


def test_checkpoints_that_fail_on_and_on_are_an_error():
    saver = ModelCheckpoint("saved", every_n_train_steps=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises((OSError, RuntimeError)):
            trainer(max_steps=20, callbacks=[saver], enable_checkpointing=True).fit(policy(), Letters())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(Path("saved").glob("*"))


def test_a_folder_that_vanishes_is_made_again():
    class Vanish(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 2:
                shutil.rmtree("r")

    saver = ModelCheckpoint(every_n_train_steps=1, save_last=True)
    run = trainer(
        max_steps=4,
        callbacks=[Completions(), Vanish(), saver],
        logger=RunLogger("r"),
        log_every_n_steps=1,
        default_root_dir="r",
        enable_checkpointing=True,
    )
    run.fit(policy(), Letters())
    assert [row["step"] for row in steps("r")] == [2, 3]
    assert {r["step"] for r in jsonl.read(Path("r/completions.jsonl"))} == {2, 3}
    assert torch.load("r/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4


def test_a_folder_that_cannot_be_is_refused_before_anything_is_loaded(capsys):
    Path("file").touch()
    with pytest.raises(SystemExit, match=r"file cannot hold the run's folder file/r: it is no folder"):
        main([*TINY, "--run", "file/r", "--model.model", "no/such-model"])


def test_records_are_whole_lines_whatever_happens():
    path = Path("x.jsonl")
    jsonl.append(path, [{"step": 0}])
    with path.open("a") as file:
        file.write('{"step": 1, "te')  # the process was killed here
    jsonl.append(path, [{"step": 1, "text": "half a pair: \ud83d"}])
    assert jsonl.read(path) == [{"step": 0}, {"step": 1, "text": "half a pair: \ud83d"}]
    size = path.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            jsonl.append(path, [{"step": 2, "text": "x" * 20}, {"step": 3, "text": "x" * 20}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.stat().st_size == size, "nothing of them is left"


# ---------------------------------------------------------------- data


class Odd(Letters):
    """Of each four tasks, one cannot be made, one is refused by the chat template, and one has no prompt."""

    def tasks(self, split):
        tasks = super().tasks(split)
        tasks[1::4] = [Task("refused", tasks[0].score)] * 16
        tasks[2::4] = [Task("", tasks[0].score)] * 16

        class Items:
            def __len__(self):
                return len(tasks)

            def __getitem__(self, index):
                if index % 4 == 3:
                    raise KeyError("no column 'question'")
                return tasks[index]

        return Items()


@pytest.mark.parametrize("method", [Rollout, DAPO])
def test_tasks_that_cannot_be_made_or_asked_are_left_out_and_counted(method):
    module, states = policy(method), States()
    module.tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] == 'refused' %}{{ raise_exception('roles must alternate') }}"
        "{% endif %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.warns(UserWarning, match="left out") as warned:
        trainer(max_steps=2, callbacks=[states]).fit(module, Odd())
    said = {str(w.message) for w in warned}
    assert "task 3 failed (KeyError: \"no column 'question'\") and is left out" in said
    assert "prompt refused failed (TemplateError: roles must alternate) and is left out" in said
    first = states.metrics[1]
    assert first["skipped/prompt_empty"] >= 2
    assert first["skipped/task_failed"] >= 1
    assert first["skipped/prompt_empty"] + first["skipped/task_failed"] >= 3
    assert not torch.equal(*states.seen)


def test_tasks_that_fail_one_after_another_are_an_error():
    class Broken(Letters):
        def tasks(self, split):
            return self

        def __len__(self):
            return 64

        def __getitem__(self, index):
            raise OSError("the share is gone")

    module = policy()
    before = weights(module).clone()
    with pytest.raises(RuntimeError, match=r"task 19 failed \(OSError: the share is gone\), as 20 did in a row"):
        trainer(max_steps=9).fit(module, Broken())
    assert torch.equal(before, weights(module))


def test_completions_without_a_word_are_scored_as_such():
    class Watch(RLCallback):
        def on_rollout(self, trainer, module, x):
            assert x.texts == [""] * 16
            assert (x.response_lengths == 1).all()

    module = policy()
    module.generator.eos = list(range(len(module.tokenizer)))  # whatever comes first ends the response
    module.decode = module.generator.decode = lambda tokens: ""
    trainer(max_steps=1, callbacks=[Watch()]).fit(module, Letters())


# ---------------------------------------------------------------- signals and errors

PAUSES = """
import os, time
from pathlib import Path
import lightning.pytorch as L

class Pause(L.Callback):
    '''Waits at a chosen place of a chosen step for a signal, as long sampling or training would.'''

    def __init__(self, step: int, place: str):
        self.step, self.place = step, place

    def wait(self, trainer):
        if trainer.global_step == self.step and not trainer.sanity_checking and not Path("paused").exists():
            Path("paused").touch()
            deadline = time.monotonic() + 60
            while not Path("signalled").exists() and time.monotonic() < deadline:
                time.sleep(0.01)

    def setup(self, trainer, module, stage):
        generate = module.generator.generate
        def slow(*args):
            if self.place == "validating" if trainer.validating else self.place == "generating":
                self.wait(trainer)
            return generate(*args)
        module.generator.generate = slow

    def on_loss(self, trainer, module, x, terms):
        if self.place == "training":
            self.wait(trainer)
"""
SHORT = ["--trainer.max_steps", "5", "--trainer.val_check_interval", "2", "--model.group", "4"]


def interrupted(number, *argv, place, step, **env):
    """Runs the command until it pauses, sends the signal, and returns its exit code and what it printed."""
    for name in ("paused", "signalled"):
        Path(name).unlink(missing_ok=True)
    Path("pauses.py").write_text(PAUSES)
    pause = ["--trainer.callbacks+=pauses.Pause", "--trainer.callbacks.step", step, "--trainer.callbacks.place", place]
    command = Command(*argv, *pause, **env)
    wait_for(lambda: Path("paused").exists() or command.process.poll() is not None)
    command.process.send_signal(number)
    time.sleep(0.3)
    Path("signalled").touch()
    return command.ends()


def same(a, b):
    """Two runs' final weights, optimizer states, samples, evaluations and losses are the same bits."""
    first, second = (torch.load(f"{r}/checkpoints/last.ckpt", weights_only=True) for r in (a, b))
    for x, y in ((first, second), (first["optimizer_states"][0]["state"], second["optimizer_states"][0]["state"])):
        x, y = x.get("state_dict", x), y.get("state_dict", y)
        assert x.keys() == y.keys()
        flat = [
            (p, q)
            for k in x
            for p, q in (zip(x[k].values(), y[k].values(), strict=True) if isinstance(x[k], dict) else [(x[k], y[k])])
        ]
        assert all(torch.equal(p, q) for p, q in flat)
    for name in ("completions.jsonl", "evaluations.jsonl"):
        assert Path(a, name).read_text() == Path(b, name).read_text()
    assert [(r["step"], r["loss"], r["reward"]) for r in steps(a)] == [
        (r["step"], r["loss"], r["reward"]) for r in steps(b)
    ]


@pytest.mark.slow
def test_signals_lose_nothing():
    main([*TINY, *SHORT, "--run", "straight"])
    resumed = [*TINY, *SHORT, "--run", "r", "--ckpt_path", "last"]
    for number, place, step, code in (
        (signal.SIGTERM, "generating", 1, 143),
        (signal.SIGINT, "training", 2, 130),
        (signal.SIGTERM, "validating", 4, 143),
    ):
        ended, text = interrupted(number, *resumed, place=place, step=step)
        assert ended == code, text
        done = step + (place == "training")
        assert f"Saved r/checkpoints/last.ckpt after step {done}. Continue with --ckpt_path last." in text.replace(
            os.getcwd() + "/", ""
        )
        assert torch.load("r/checkpoints/last.ckpt", weights_only=True)["global_step"] == done
        assert "Traceback" not in text
    main(resumed)
    same("straight", "r")


@pytest.mark.slow
def test_slurm_requeues_a_run_that_goes_on_by_itself():
    job = {
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    job |= {"SLURM_NODEID": "0", "SLURM_JOB_NUM_NODES": "1", "PATH": f"{os.getcwd()}:{os.environ['PATH']}"}
    Path("scontrol").write_text('#!/bin/sh\necho "$@" > requeued\n')
    Path("scontrol").chmod(0o755)
    command = [*TINY, *SHORT, "--run", "r"]
    code, text = interrupted(signal.SIGUSR1, *command, place="generating", step=2, **job)
    assert code == 128 + signal.SIGUSR1, text
    assert Path("requeued").read_text() == "requeue 7\n"
    code, text = Command(*command, **job, SLURM_RESTART_COUNT="1").ends()
    assert code == 0, text
    assert [row["step"] for row in steps("r")] == [0, 1, 2, 3, 4]
    assert torch.load("r/checkpoints/last.ckpt", weights_only=True)["global_step"] == 5


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_all_of_them_after_the_step():
    ranks = ["--trainer.devices", 2, "--trainer.strategy", "ddp", "--data.batch_size", 2]
    code, text = interrupted(signal.SIGTERM, *TINY, *SHORT, *ranks, "--run", "r", place="training", step=1)
    assert code == 143, text
    assert text.count("SIGTERM: training stops") == 1
    assert torch.load("r/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    assert [row["step"] for row in steps("r")] == [0, 1]


def test_an_error_while_sampling_leaves_a_checkpoint():
    class OutOfMemory(L.Callback):
        def on_train_batch_start(self, trainer, module, *_):
            if trainer.global_step == 2:
                module.generator.generate = lambda *args: torch.empty(10**15)

    def fit(*callbacks, **kwargs):
        module = policy()
        saver = ModelCheckpoint("saved", every_n_train_steps=100, save_last=True)
        run = trainer(max_steps=4, callbacks=[*callbacks, saver], enable_checkpointing=True)
        run.fit(module, Letters(), **kwargs)
        return weights(module)

    with pytest.raises(RuntimeError, match="alloc"):
        fit(OutOfMemory())
    assert torch.load("saved/last.ckpt", weights_only=True)["global_step"] == 2
    assert torch.equal(fit(ckpt_path="saved/last.ckpt"), fit())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["fit", "--config", "grpo", "--config", "tiny", "--ckpt_path", "cut.ckpt"], "cut.ckpt is damaged: cut short"),
        (["test", "--config", "grpo", "--config", "tiny", "--ckpt_path", "no.ckpt"], "no.ckpt does not exist"),
        (["export", "cut.ckpt", "out"], "cut.ckpt is damaged: cut short"),
    ],
)
def test_a_checkpoint_that_was_cut_short_is_refused_before_anything_is_loaded(command, message):
    torch.save({"state_dict": {"x": torch.zeros(1000)}}, "whole.ckpt")
    Path("cut.ckpt").write_bytes(Path("whole.ckpt").read_bytes()[:3000])
    with pytest.raises(SystemExit, match=message):
        main([*command, "--model.model", "no/such-model"] if command[0] != "export" else command)
    assert not Path("runs").exists()


# ---------------------------------------------------------------- W&B

CRASHES = """
import os, signal, urllib.request
from contextlib import suppress
from pathlib import Path
import lightning.pytorch as L

class KillService(L.Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 1:
            own = [p.read_text().split() for p in Path("/proc/self/task").glob("*/children")]
            for child in [pid for pids in own for pid in pids]:
                with suppress(FileNotFoundError, ProcessLookupError):  # a child that has ended since
                    if b"wandb-core" in Path("/proc", child, "cmdline").read_bytes():
                        os.kill(int(child), signal.SIGKILL)
                        Path("killed").touch()

class KillServer(L.Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 1:
            urllib.request.urlopen(os.environ["WANDB_BASE_URL"] + "/end")
"""
WANDB = [
    "--trainer.logger",
    "WandbLogger",
    "--trainer.max_steps",
    "3",
    "--trainer.val_check_interval",
    "1",
    "--run",
    "r",
]


def has_everything(run):
    assert [row["step"] for row in steps(run)] == [0, 1, 2]
    assert len(jsonl.read(Path(run, "completions.jsonl"))) == 3 * 64
    assert len(jsonl.read(Path(run, "evaluations.jsonl"))) == 3


@pytest.mark.slow
def test_wandb_out_of_reach_leaves_the_run_offline_and_whole():
    nowhere = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40}
    code, text = Command(*TINY, *WANDB, WANDB_INIT_TIMEOUT="2", **nowhere).ends()
    assert code == 0, text
    assert text.count("kept offline, for `wandb sync` to upload: Timed out") == 1
    assert list(Path("r/wandb").glob("offline-run-*/*.wandb"))
    has_everything("r")


@pytest.mark.slow
def test_wandb_that_crashes_in_the_middle_of_a_run_is_said_once():
    Path("crashes.py").write_text(CRASHES)
    code, text = Command(*TINY, *WANDB, "--trainer.callbacks+=crashes.KillService").ends()
    assert code == 0, text
    assert Path("killed").exists()
    assert text.count("a logger failed, and what it misses is in the run's own files") == 1
    has_everything("r")


class Service(BaseHTTPRequestHandler):
    """As much of W&B's service as a run needs to start; its last request is /end."""

    bucket = {"id": "x", "name": "abc", "displayName": "n", "config": "{}", "historyLineCount": 0}
    bucket["project"] = {"id": "p", "name": "lit-rl", "entity": {"id": "e", "name": "me"}}
    answers = {
        "upsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}},
        "viewer": {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}},
    }

    def do_POST(self):
        text = self.rfile.read(int(self.headers.get("content-length", 0))).decode(errors="replace")
        body = json.dumps(
            {"data": next((answer for name, answer in self.answers.items() if name in text), {})}
        ).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.do_POST()
        if self.path == "/end":
            threading.Thread(target=lambda: (self.server.shutdown(), self.server.server_close())).start()

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_wandb_that_goes_away_in_the_middle_of_a_run_does_not_hold_up_its_end():
    Path("crashes.py").write_text(CRASHES)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    here = {"WANDB_MODE": "online", "WANDB_API_KEY": "a" * 40, "WANDB_FINISH_TIMEOUT": "2"}
    here["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        code, text = Command(*TINY, *WANDB, "--trainer.callbacks+=crashes.KillServer", **here).ends()
    finally:
        server.shutdown()
    thread.join(5)
    assert not thread.is_alive(), "the run has ended the service"
    assert code == 0, text
    assert "Syncing run" in text
    has_everything("r")
