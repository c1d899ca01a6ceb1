"""What Weights & Biases is given, read back from the files of offline runs."""

import json
import struct
import time
from pathlib import Path

import lightning.pytorch as L
import pytest
import wandb
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from test_cli import fit as command
from test_cli import run as run_command
from test_policy import Letters, trainer
from test_trainer_flags import policy
from wandb.proto.wandb_internal_pb2 import Record

from lit_rl import jsonl
from lit_rl.callbacks import Completions, EntropyMonitor, RolloutStats
from lit_rl.run import RunLogger

ARGS = ("--config", "grpo", "--config", "tiny", "--trainer.val_check_interval", 2, "--trainer.logger", "WandbLogger")


@pytest.fixture(autouse=True)
def _finish(monkeypatch):
    for name in ("WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    yield
    wandb.finish()


def records(path):
    """Of a .wandb file: LevelDB's log format, blocks of 32 KiB with records (crc, size, kind), after a header of 7 bytes."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := 2**15 - at % 2**15) < 7:
            at += room
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        if at + 7 + size > len(data):
            return  # it is being written
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


class Run:
    """One offline run of W&B."""

    def __init__(self, folder):
        (file,) = folder.glob("*.wandb")
        self.config, self.summary, self.history, self.globs = {}, {}, [], {}
        for record in records(file):
            if record.HasField("run"):
                self.id, self.name, self.project = record.run.run_id, record.run.display_name, record.run.project
            for update in (*record.run.config.update, *record.config.update):
                self.config[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
            for update in record.summary.update:
                self.summary["/".join(update.nested_key) or update.key] = json.loads(update.value_json)
            if record.HasField("history"):
                items = record.history.item
                self.history.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
        tables = sorted(folder.rglob("completions_*.table.json"), key=lambda p: int(p.name.split("_")[1]))
        self.tables = [json.loads(path.read_text()) for path in tables]
        self.text = "".join(p.read_text(errors="replace") for p in folder.rglob("*.log"))

    def numbers(self):
        """{(trainer/global_step, name): value} of all scalars; a value that is logged twice is an error."""
        result = {}
        for row in self.history:
            step = row.get("trainer/global_step")
            for name, value in row.items():
                if isinstance(value, int | float) and not name.startswith(("_", "epoch", "trainer/", "completions/")):
                    assert (step, name) not in result
                    result[step, name] = value
        return result

    def rows(self):
        columns = [table["columns"] for table in self.tables]
        assert all(c == columns[0] for c in columns)
        return [dict(zip(columns[0], row, strict=True)) for table in self.tables for row in table["data"]]


def runs(folder):
    """The offline runs under a folder, oldest first, once W&B's own process has written the last one's end."""
    wandb.finish()
    folders, deadline = sorted(Path(folder, "wandb").glob("offline-run-*")), time.monotonic() + 60
    while not any(r.HasField("exit") for r in records(*folders[-1].glob("*.wandb"))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [Run(path) for path in folders]


def logged(folder):
    """The same numbers from the run's own file."""
    rows = jsonl.read(Path(folder, "metrics.jsonl"))
    return {(row["step"], name): value for row in rows for name, value in row.items() if name not in ("step", "epoch")}


def sampled(folder, steps, rows):
    """The first rows of each step in completions.jsonl."""
    records = jsonl.read(Path(folder, "completions.jsonl"))
    return [record for step in range(steps) for record in [r for r in records if r["step"] == step][:rows]]


def test_a_run_of_the_command_line(capsys):
    command(capsys, *ARGS, "--trainer.max_steps", 5, "--run", "runs/mine", "--trainer.num_sanity_val_steps", 1)
    (run,) = runs("runs/mine")
    assert (run.name, run.project) == ("mine", "lit-rl")

    saved = yaml.safe_load(Path("runs/mine/config.yaml").read_text())
    assert run.config["config"] == saved
    assert run.config["group"] == saved["model"]["init_args"]["group"] == 8
    assert run.config["sampling"]["max_new_tokens"] == 16

    assert run.numbers() == pytest.approx(logged("runs/mine"))
    assert {(s, n) for s, n in run.numbers() if n in ("loss", "val/pass@1")} == {
        *((s, "loss") for s in range(5)),
        (1, "val/pass@1"),
        (3, "val/pass@1"),
    }
    scores = [run.numbers()[s, "val/score"] for s in (1, 3)]
    assert run.summary["val/score"] == {"max": max(scores), "last": scores[-1]}
    assert {"max", "last"} == run.summary["val/pass@1"].keys() == run.summary["val/pass@1/vowels"].keys()
    assert run.summary["loss"] == run.numbers()[4, "loss"]
    assert "must only increase" not in run.text + capsys.readouterr().err


def test_the_completions_table_grows_by_all_its_rows(capsys):
    callbacks = '[{"class_path": "Completions", "init_args": {"table_rows": 3}}]'
    sizes = ("--trainer.callbacks", callbacks, "--model.group", 2, "--data.batch_size", 2, "--trainer.max_steps", 30)
    command(capsys, *ARGS, *sizes, "--trainer.limit_val_batches", 0, "--run", "r")
    (run,) = runs("r")
    assert run.rows() == sampled("r", 30, 3)
    assert len(run.tables) < 30  # W&B shows the last hundred additions


def test_a_resumed_run_goes_on_under_its_id(capsys):
    steps = ("--trainer.callbacks.every_n_train_steps", 1)
    command(capsys, *ARGS, *steps, "--trainer.max_steps", 3, "--run", "r")
    wandb.finish()
    command(capsys, *ARGS, *steps, "--trainer.max_steps", 6, "--run", "r", "--ckpt_path", "last")
    wandb.finish()
    code, text = run_command(capsys, "validate", *ARGS, "--run", "r", "--ckpt_path", "r/checkpoints/last.ckpt")
    assert code == 0, text
    first, second, validation = runs("r")
    assert first.id == second.id != validation.id
    assert validation.name == "r-validate"
    assert {s for s, _ in validation.numbers()} == {5}, "of the step that the checkpoint is of, the sixth"
    assert yaml.safe_load(Path("r/config.yaml").read_text())["trainer"]["logger"]["init_args"]["id"] is None

    assert not first.numbers().keys() & second.numbers().keys()
    assert {s for s, n in first.numbers() if n == "loss"} == {0, 1, 2}
    assert {s for s, n in second.numbers() if n == "loss"} == {3, 4, 5}
    both = first.numbers() | second.numbers()
    own = {key: value for key, value in logged("r").items() if key in both}
    assert both == pytest.approx(own)
    assert first.rows() + second.rows() == sampled("r", 6, 8)


def test_another_run_of_the_same_file_is_another_run_of_wandb(capsys):
    command(capsys, *ARGS, "--trainer.max_steps", 1, "--run", "a")
    wandb.finish()
    command(capsys, "--config", "a/config.yaml", "--run", "b")
    (a,), (b,) = runs("a"), runs("b")
    assert a.id != b.id
    assert a.config["config"] | {"run": "b"} == b.config["config"]
    assert (a.name, b.name) == ("a", "b")


def test_in_python_beside_other_loggers():
    """Validation, several loggers and callbacks that log on their own: each number arrives once, at its step."""
    loggers = [RunLogger("r"), CSVLogger("c"), WandbLogger(save_dir=Path("w").absolute(), project="mine", id="chosen")]
    callbacks = [RolloutStats(), EntropyMonitor(), Completions(), LearningRateMonitor()]
    trainer(
        logger=loggers,
        max_steps=6,
        log_every_n_steps=2,
        val_check_interval=3,
        limit_val_batches=1,
        callbacks=callbacks,
    ).fit(policy(schedule="linear"), Letters(n=16))
    (run,) = runs("w")
    assert (run.id, run.project) == ("chosen", "mine")
    assert run.numbers() == pytest.approx(logged("r"))
    assert {s for s, n in run.numbers() if n == "entropy"} == {1, 3, 5}
    assert run.config["lr"] == 1e-2
    assert run.summary["val/pass@1"].keys() == {"max", "last"}
    assert run.rows() == sampled("r", 6, 8)
    assert "must only increase" not in run.text


def test_what_is_sampled_before_a_crash_arrives():
    class Crash(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 15:
                raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        logger = WandbLogger(save_dir=Path("w").absolute())
        run = trainer(logger=logger, max_steps=50, callbacks=[Completions(table_rows=2), Crash()])
        run.fit(policy(group=2), Letters(n=64, batch_size=2))
    (run,) = runs("w")
    assert [row["step"] for row in run.rows()] == sorted([*range(15)] * 2)
    assert len(run.tables) < 15
