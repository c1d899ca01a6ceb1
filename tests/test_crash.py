"""A run that is killed, whenever and however often, ends like one that was not: the command line with `--ckpt_path last`."""

import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from test_cli import run
from test_resume import left, same

from lit_rl import actor, jsonl, policy, resume
from lit_rl.__main__ import main

SETTINGS = """
model: {init_args: {group: 4, epochs: 2, minibatches: 2}}
data: {init_args: {batch_size: 4, eval_size: 4}}
trainer:
  max_steps: 7
  limit_train_batches: 4
  val_check_interval: 2
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - EntropyMonitor
    - RolloutStats
    - Completions
    - class_path: ModelCheckpoint
      init_args: {every_n_train_steps: 1, save_last: true}
"""
LAST = ["--ckpt_path", "last"]


def command(folder):
    Path("settings.yaml").write_text(SETTINGS)
    return ["fit", "--config", "grpo", "--config", "tiny", "--config", "settings.yaml", "--run", str(folder)]


def outcome(folder):
    checkpoint = torch.load(Path(folder, "checkpoints/last.ckpt"), weights_only=True)
    return left(folder) | {key: checkpoint[key] for key in ("state_dict", "optimizer_states", "global_step")}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "r"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        main(command(folder))
    return folder


def killed(patch, *argv):
    """The command line in a child that `patch` makes kill itself; True when it did, False when it ended well."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with open("log.txt", "a") as log:
            try:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                patch()
                main(list(argv))
                code = 0
            except BaseException:
                traceback.print_exc(file=log)
            finally:
                log.flush()
                os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), Path("log.txt").read_text()
    return status != 0


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def at(owner, name, call, instead=None, after=False):
    """A patch that dies at the n-th call of a function: before it, after it, or doing something `instead`."""

    def patch():
        real, calls = getattr(owner, name), [0]

        def deadly(*args, **kwargs):
            calls[0] += 1
            if calls[0] < call:
                return real(*args, **kwargs)
            if after:
                real(*args, **kwargs)
            if instead:
                instead(*args, **kwargs)
            die()

        setattr(owner, name, deadly)

    return patch


def half_the_lines(path, records):
    text = b"".join(map(jsonl.line, records))
    with path.open("ab") as file:
        file.write(text[: len(text) // 2])


def half_the_file(checkpoint, file):
    file.write(b"PK" + b"x" * 10_000)
    file.flush()


MOMENTS = [
    ("while the first responses are written, before any checkpoint", at(jsonl, "append", 1, half_the_lines)),
    ("while the first checkpoint is written", at(resume.torch, "save", 1, half_the_file)),
    ("when it is in place, the second of its step is not", at(resume.WholeFiles, "save_checkpoint", 1, after=True)),
    ("between the optimizer steps of a step", at(torch.optim.AdamW, "step", 6)),
    ("while a validation is run", at(actor.Actor, "_report", 2)),
    ("while responses are written", at(jsonl, "append", 2, half_the_lines)),
    ("while a later checkpoint is written", at(resume.torch, "save", 2, half_the_file)),
    ("when a step is planned", at(policy.Policy, "plan", 1, after=True)),
]


@pytest.mark.slow
def test_killed_at_the_worst_moments_one_after_the_other(straight):
    for when, patch in MOMENTS:
        assert killed(patch, *command("r"), *LAST), when
        print(when, sorted(p.name for p in Path("r/checkpoints").glob("*")) if Path("r/checkpoints").exists() else None)
    assert not killed(lambda: None, *command("r"), *LAST)
    assert same(outcome("r"), outcome(straight))


@pytest.mark.slow
def test_killed_at_random_moments(straight):
    """The command itself, from a shell."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    shell = [sys.executable, "-m", "lit_rl", *command("r"), *LAST]
    chance = random.Random(0)
    for steps in (1, 3, 5):
        with subprocess.Popen(shell, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and len(jsonl.read(Path("r/completions.jsonl"))) < 16 * steps:
                time.sleep(0.02)
            time.sleep(chance.random() / 2)
            process.kill()
    subprocess.run(shell, env=environment, check=True, capture_output=True)
    assert same(outcome("r"), outcome(straight))


def test_last_is_the_newest_whole_checkpoint(capsys):
    sft = ["fit", "--config", "sft", "--config", "tiny", "--run", "r", "--trainer.callbacks.every_n_train_steps", 1]
    sft += ["--trainer.callbacks.save_top_k", -1, "--trainer.limit_val_batches", 0, "--trainer.enable_progress_bar"]
    code, text = run(capsys, *sft, "false", "--trainer.max_steps", 3)
    assert code == 0, text
    files = sorted(Path("r/checkpoints").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    assert [f.name for f in files] == ["epoch=0-step=1.ckpt", "epoch=0-step=2.ckpt", "epoch=0-step=3.ckpt", "last.ckpt"]
    whole = files[-1].read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        files[-1].write_bytes(whole[:size])
        assert resume.newest([Path("r/checkpoints")]) == files[-2]
    for file in files[2:]:
        file.write_bytes(file.read_bytes()[:-100])
    again = [*sft, "false", "--trainer.max_steps", 4, *LAST]
    with pytest.warns(
        UserWarning, match=r"damaged, and passed over: .*last.ckpt, .*step=3.ckpt. Resuming from .*step=2"
    ):
        code, text = run(capsys, *again)
    assert code == 0, text
    assert [r["step"] for r in jsonl.read(Path("r/metrics.jsonl"))] == [0, 1, 2, 3]
    for file in Path("r/checkpoints").iterdir():
        file.write_bytes(b"")
    before = Path("r/metrics.jsonl").read_text()
    code, text = run(capsys, *again)
    assert code
    assert "every checkpoint is damaged" in text
    assert Path("r/metrics.jsonl").read_text() == before
