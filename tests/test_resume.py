"""A run that is stopped and resumed is the run that was not, bit for bit: for every method, with every callback on."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from lit_rl import GRPO, RLCCF, RLCallback, Sampling, Verdict, hooks, jsonl, resume
from lit_rl.cli import CALLBACKS, METHODS
from lit_rl.datamodules import Bootcamp
from lit_rl.encoding import tiny_tokenizer
from lit_rl.run import RunLogger
from lit_rl.scoring import Scorer

TOKENIZER = tiny_tokenizer()
STEPS = 5
INNER = [dict(epochs=1, minibatches=1), dict(epochs=2, minibatches=3)]


def judge(text):
    """Half of all first letters are right, and there are three answers, so that groups differ and levels rise."""
    return Verdict(text[:1] < "N", float(text[:1] < "N"), str(ord(text[0]) % 3) if text else None)


class Easy(Bootcamp):
    """Two batches an epoch, in an order of their own."""

    def __init__(self, adaptive=True):
        super().__init__(
            ["spell-backwards", "sort-numbers"],
            level=(0, 3),
            size=8,
            val_size=4,
            hint=False,
            adaptive=adaptive,
            promote_at=0.4,
            window=12,
            batch_size=4,
        )
        self.shuffle = True

    def tasks(self, split):
        inner = super().tasks(split)

        class Tasks:
            __len__ = inner.__len__

            def __getitem__(self, i):
                return self.eased(inner[i])

            def again(self, i, id):
                return self.eased(inner.again(i, id))

            def eased(self, task):
                task.score = judge
                task.responses, task.rewards = [task.responses[0][-30:], "no"], [1.0, 0.0]
                return task

        return Tasks()


def policy(method, seed=0, **settings):
    """On a model of two small layers, with dynamic sampling where the method has it; RLCCF on two."""
    if method is RLCCF:
        return RLCCF([policy(GRPO, seed + 10 * i, dynamic_sampling=False, **settings) for i in range(2)])
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.06,
        bos_token_id=TOKENIZER.bos_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
        pad_token_id=TOKENIZER.pad_token_id,
    )
    model = transformers.LlamaForCausalLM(config)
    fixed = dict(tokenizer=TOKENIZER, lr=3e-3, sampling=Sampling(max_new_tokens=5), scoring=Scorer("inline"))
    for wanted in (dict(group=4, dynamic_sampling=True), dict(group=4), dict()):
        try:
            return method(model, **{**fixed, **wanted, **settings})
        except (TypeError, ValueError):
            continue
    raise AssertionError(f"{method.__name__} cannot be built")


def every_callback(module, data, known=CALLBACKS):
    """All that can be built with their defaults, but those that refuse this method, this data, or an earlier one."""
    made, kind, module = [], type(module), getattr(module, "members", [module])[0]
    for callback in known.values():
        try:
            hooks.refuse(kind, [*map(type, made), callback], module.hparams)
            probe = callback()
            probe.setup(SimpleNamespace(datamodule=data, callbacks=[]), module, "fit")
            probe.teardown(None, module, "fit")
        except (TypeError, ValueError):
            continue
        made.append(callback())
    return made


def fit(module, folder, *, adaptive=True, ckpt_path=None, callbacks=(), **settings):
    """Trains, and returns all that a run leaves but its timings."""
    data = Easy(adaptive)
    trainer = L.Trainer(
        **dict(
            max_steps=STEPS,
            accelerator="cpu",
            devices=1,
            logger=RunLogger(str(folder)),
            log_every_n_steps=1,
            val_check_interval=1,
            limit_val_batches=1,
            num_sanity_val_steps=1,
            enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        | settings,
        callbacks=[*every_callback(module, data), *callbacks],
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return left(folder) | {
        "weights": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict()["state"],
        "data": data.state_dict(),
        "callbacks": {c.state_key: c.state_dict() for c in trainer.callbacks if not isinstance(c, Checkpoint)},
    }


def left(folder):
    timing = ("seconds/", "tokens_per_second")
    rows = [
        {k: v for k, v in r.items() if not any(t in k for t in timing)}
        for r in jsonl.read(Path(folder, "metrics.jsonl"))
    ]
    texts = {p.name: p.read_text() for p in sorted(Path(folder).glob("*.jsonl")) if p.name != "metrics.jsonl"}
    return texts | {"metrics": "\n".join(map(json.dumps, rows))}  # a string: NaN is NaN, and names have an order


def same(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert equal(got[name], value), name
    return True


def equal(a, b):
    if isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in b)
    if isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


class Saves(Checkpoint):
    """A checkpoint at every moment at which a callback may save one."""

    def __init__(self, hooks=None):
        self.files = {}
        self.hooks = hooks

    def save(self, trainer, hook):
        if trainer.global_step and not trainer.sanity_checking and (self.hooks is None or hook in self.hooks):
            path = Path(f"saved/{len(self.files)}-{trainer.global_step}-{hook}.ckpt")
            trainer.save_checkpoint(path)
            self.files[trainer.global_step, hook] = path

    def on_train_epoch_start(self, trainer, *args):
        self.save(trainer, "epoch_start")

    def on_train_batch_start(self, trainer, *args):
        self.save(trainer, "batch_start")

    def on_train_batch_end(self, trainer, *args):
        self.save(trainer, "batch_end")

    def on_validation_start(self, trainer, *args):
        self.save(trainer, "validation_start")

    def on_validation_batch_end(self, trainer, *args):
        self.save(trainer, "validation_batch_end")

    def on_validation_end(self, trainer, *args):
        self.save(trainer, "validation_end")

    def on_train_epoch_end(self, trainer, *args):
        self.save(trainer, "epoch_end")

    def on_train_end(self, trainer, *args):
        self.save(trainer, "train_end")


def resumed(method, checkpoint, inner, straight="straight", **settings):
    """From a checkpoint, with other weights to begin with, and in a folder that holds more than the checkpoint knows of."""
    folder = Path("resumed", checkpoint.stem)
    shutil.copytree(straight, folder)
    return fit(policy(method, seed=1, **inner), folder, ckpt_path=checkpoint, **settings)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_resumes_at_every_step(name, adaptive):
    """With the inner loop and data that do not adapt, so that no callback refuses them, and without and with."""
    saves, inner = Saves({"batch_end"}), INNER[not adaptive]
    adaptive = adaptive and METHODS[name] is not RLCCF
    straight = fit(policy(METHODS[name], **inner), "straight", callbacks=[saves], adaptive=adaptive)
    assert len(straight["metrics"].split("\n")) == STEPS + STEPS  # a line a step, one a validation
    assert sorted(step for step, _ in saves.files) == list(range(1, STEPS + 1))
    for (step, _), file in saves.files.items():
        if step < STEPS:
            assert same(resumed(METHODS[name], file, inner, adaptive=adaptive), straight)


CHUNKS = {
    "the sampler's log-probabilities": dict(),
    "recomputed ones, two minibatches": dict(old_logps="recompute", minibatches=2),
    "without dynamic sampling": dict(dynamic_sampling=False),
    "one step off": dict(ahead="thread"),
    "one step off, recomputed": dict(ahead="thread", old_logps="recompute", dynamic_sampling=False),
}


@pytest.mark.parametrize("how", CHUNKS)
def test_unfinished_responses_are_in_the_checkpoint(how):
    settings = dict(chunk=1, sampling=Sampling(max_new_tokens=6, stop=list("aeiouAEIOU .,"))) | CHUNKS[how]
    saves = Saves({"batch_start", "batch_end"})
    straight = fit(policy(GRPO, **settings), "straight", callbacks=[saves])
    rows = [json.loads(line) for line in straight["metrics"].split("\n")]
    assert min(row["chunked/pending_tokens"] for row in rows if "chunked/versions" in row) > 0
    assert max(row.get("chunked/ready_tokens", 0) for row in rows) > 0, "the test is too easy"
    assert max(row.get("chunked/versions", 0) for row in rows) > 1.5, "the test is too easy"
    assert any(level > 0 for level in straight["data"]["current"].values()), "the test is too easy"
    for (step, _), file in saves.files.items():
        if step < STEPS:
            assert same(resumed(GRPO, file, settings), straight), file


MOMENTS = {
    "max_steps": dict(),
    "max_epochs, validation at the end of an epoch": dict(max_steps=-1, max_epochs=3, val_check_interval=1.0),
    "max_epochs, no validation": dict(max_steps=-1, max_epochs=3, limit_val_batches=0),
    "validation across epochs": dict(val_check_interval=3, check_val_every_n_epoch=None, limit_train_batches=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", MOMENTS)
def test_a_checkpoint_of_any_moment_resumes(how):
    """Within a validation, at an epoch's end, between two epochs, after training: all of them stand between two steps."""
    saves, inner = Saves(), dict(minibatches=2)
    straight = fit(policy(GRPO, **inner), "straight", callbacks=[saves], **MOMENTS[how])
    assert any(level > 0 for level in straight["data"]["current"].values()), "the test is too easy"
    rounds = [json.loads(line).get("dynamic_sampling/rounds", 0) for line in straight["metrics"].split("\n")]
    assert max(rounds) > 1, "the test is too easy"
    assert len(saves.files) >= 14
    for file in saves.files.values():
        assert same(resumed(GRPO, file, inner, **MOMENTS[how]), straight), file


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_that_has_ended_goes_on(stop):
    """The checkpoint of the end of `max_steps`, be it in the middle of an epoch or at its end."""
    straight, saves = fit(policy(GRPO), "straight"), Saves({"train_end"})
    fit(policy(GRPO), "ended", callbacks=[saves], max_steps=stop)
    (file,) = saves.files.values()
    assert same(fit(policy(GRPO, seed=1), "ended", ckpt_path=file), straight)


EPOCHS = dict(max_steps=-1, max_epochs=2)
ALSO = {
    "a sanity check before a validation": (
        2,
        dict(),
        EPOCHS | dict(val_check_interval=3, check_val_every_n_epoch=None),
    ),
    "a schedule over epochs": (3, dict(schedule="linear"), EPOCHS),
    "float64": (2, dict(), dict(precision="64-true")),
}


@pytest.mark.parametrize("what", ALSO)
def test_it_also_resumes_with(what):
    step, inner, settings = ALSO[what]
    saves = Saves({"batch_end"})
    straight = fit(policy(GRPO, **inner), "straight", adaptive=False, callbacks=[saves], **settings)
    assert same(resumed(GRPO, saves.files[step, "batch_end"], inner, adaptive=False, **settings), straight)


class Fails(RLCallback):
    """At a moment of the third step, or in a hook's n-th call in it."""

    def __init__(self, hook, call=1):
        def fail(trainer, *args):
            self.calls += trainer.global_step == 2
            if self.calls == call:
                raise RuntimeError("an accident")

        self.calls = 0
        setattr(self, hook, fail)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_rollout", "on_advantage", "on_loss"])
def test_a_step_that_fails_is_taken_again(hook):
    """The batch is not skipped, and nothing of the step counts twice."""
    inner = dict(epochs=2, minibatches=2)
    straight = fit(policy(GRPO, **inner), "straight")
    saver = ModelCheckpoint("saved", filename="it", save_on_exception=True, every_n_train_steps=100)
    with pytest.raises(RuntimeError, match="an accident"):
        fit(policy(GRPO, **inner), "failed", callbacks=[Fails(hook), saver])
    assert same(fit(policy(GRPO, seed=1, **inner), "failed", ckpt_path="saved/it.ckpt"), straight)


def test_within_the_optimizer_steps_of_a_step_it_is_said_that_the_run_differs():
    saver = ModelCheckpoint("saved", filename="it", save_on_exception=True, every_n_train_steps=100)
    inner = dict(epochs=2)
    with pytest.raises(RuntimeError, match="an accident"):
        fit(policy(GRPO, **inner), "failed", callbacks=[Fails("on_before_backward", call=2), saver])
    with pytest.warns(UserWarning, match="saved within step 2, when some of its optimizer steps were taken"):
        fit(policy(GRPO, **inner), "failed", ckpt_path="saved/it.ckpt")


def test_steps_in_a_row_that_are_not_finite_are_counted_on():
    class Infinite(RLCallback):
        def on_loss(self, trainer, module, x, terms):
            terms.loss = terms.loss * float("inf")

    settings, saves = dict(max_non_finite=3), Saves({"batch_end"})
    for folder, seed in (("straight", 0), ("resumed", 1)):
        file = saves.files.get((2, "batch_end"))
        with pytest.raises(
            FloatingPointError, match="3 losses or gradients in a row were not finite, the last at step 2"
        ):
            fit(policy(GRPO, seed, **settings), folder, callbacks=[Infinite(), saves], ckpt_path=file)


def test_metrics_of_one_step_are_not_logged_again():
    class Once(RLCallback):
        def on_rollout(self, trainer, module, x):
            if trainer.global_step == 1:
                module.count("happened")
                module.log("rare", 1.0)

    fit(policy(GRPO), "r", callbacks=[Once()])
    rows = [r for r in jsonl.read(Path("r/metrics.jsonl")) if "loss" in r]
    assert [r["step"] for r in rows if "happened" in r] == [r["step"] for r in rows if "rare" in r] == [1]


def test_the_reference_is_the_one_of_the_start_not_of_the_resumed_weights():
    module, saves = policy(GRPO), Saves({"batch_end"})
    start = {name: value.clone() for name, value in module.model.state_dict().items()}
    fit(module, "straight", callbacks=[saves])
    other = policy(GRPO, seed=1)
    fit(other, "resumed", ckpt_path=saves.files[3, "batch_end"])
    assert equal(other.reference.state_dict(), start)
    assert not equal(other.model.state_dict(), start)


def test_a_save_that_fails_leaves_the_old_file(monkeypatch):
    path, io = Path("c/x.ckpt"), resume.WholeFiles()
    io.save_checkpoint({"step": 1}, path)
    with pytest.raises(AttributeError):  # when half of it is written
        io.save_checkpoint({"tensor": torch.zeros(1000), "no": lambda: 0}, path)
    assert io.load_checkpoint(path) == {"step": 1}
    assert os.listdir("c") == ["x.ckpt"]


def test_rewinding_drops_what_comes_again_and_lines_cut_short():
    path = Path("x.jsonl")
    lines = ['{"step": 0, "x": "a\u2028b"}', '{"step": 1, "x": NaN}', '{"note": 1}', '{"step": 2}', '{"step": 3, "x']
    for end in range(len("\n".join(lines).encode()) + 1):
        path.write_bytes("\n".join(lines).encode()[:end])
        before = [line for line, _ in jsonl._lines(path)]
        jsonl.rewind(path, 2)
        assert path.read_bytes().decode() == "".join(line + "\n" for line in before if '"step": 2' not in line)
        assert not jsonl.ends_with(path, {"step": 2})
        jsonl.append(path, [{"step": 2}])
        assert jsonl.ends_with(path, {"step": 2})
