"""Every Trainer flag means to a policy what it means to any LightningModule: numbers, not that it ran."""

import csv
import math
import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as L
import pytest
import test_policy
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler
from lightning.pytorch.tuner import Tuner
from test_policy import trainer, weights
from transformers import LlamaConfig, LlamaForCausalLM

from lit_rl import GRPO, RLCCF, SFT, RLCallback, Sampling, Verdict, encoding, jsonl, ops
from lit_rl.callbacks import Completions, EntropyMonitor, RolloutStats
from lit_rl.cli import METHODS
from lit_rl.rollout import Rollout
from lit_rl.run import RunLogger


def first_half(text):
    right = bool(text) and text[0] < "N"
    return Verdict(right, float(right), "early" if right else "late")


class Letters(test_policy.Letters):
    """And there is an answer to vote for."""

    def __init__(self, n=64, batch_size=4, score=first_half):
        super().__init__(n, batch_size, score)


def policy(method=GRPO, **kwargs):
    """A policy over a Llama of 24,000 parameters; RLCCF over two."""
    if method is RLCCF:
        return RLCCF([policy(GRPO, **kwargs) for _ in range(2)])
    torch.manual_seed(0)
    tokenizer = encoding.tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.1,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    if issubclass(method, Rollout):
        kwargs = {"group": 4, **kwargs}
    return method(
        LlamaForCausalLM(config), tokenizer=tokenizer, **{"lr": 1e-2, "sampling": Sampling(max_new_tokens=6), **kwargs}
    )


class Watch(RLCallback):
    """What happens in a fit: each batch's prompts and the weights after it, each optimizer step's learning rate, gradient
    before clipping and weights after it, and when validation ran."""

    def __init__(self):
        self.gradients, self.lrs, self.prompts, self.validated = [], [], [], []
        self.weights, self.stepped = [], []

    def on_train_start(self, trainer, module):
        if isinstance(module, Ordinary):
            return
        self.weights.append(weights(module))
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.stepped.append(weights(module)))

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if not isinstance(module, Ordinary):
            self.gradients.append(torch.cat([p.grad.flatten() for p in module.model.parameters()]))
            self.lrs.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.prompts.append([int(task.text().split()[1][:-1]) for task in batch])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if not isinstance(module, Ordinary):
            self.weights.append(weights(module))

    def on_validation_epoch_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.validated.append(trainer.global_step)


def fit(module=None, data=None, **kwargs):
    """A finished Trainer, its module and what was watched."""
    watch = Watch()
    run = trainer(**{**kwargs, "callbacks": [*kwargs.get("callbacks", []), watch]})
    module = policy() if module is None else module
    run.fit(module, data or Letters(n=16))
    return run, module, watch


# ---------------------------------------------------------------- loops: as any LightningModule's


class Ordinary(L.LightningModule):
    """Nothing of ours, on the same data."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(torch.ones(1, 1)).sum()
        self.log("loss", loss, batch_size=len(batch))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/pass@1", 0.0, batch_size=len(batch))

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stop(L.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.should_stop = True


def saver(**kwargs):
    return dict(callbacks=[ModelCheckpoint("saved", filename="{step}", **{"save_top_k": -1, **kwargs})])


def stopper(**kwargs):
    return dict(callbacks=[EarlyStopping("val/pass@1", mode="max", **kwargs)])


LOOPS = {  # flags, and a part of what they lead to: epochs have four batches
    "max_steps": (lambda: dict(max_steps=5), dict(steps=5)),
    "max_epochs": (lambda: dict(limit_train_batches=3), dict(steps=6)),
    "share of batches": (lambda: dict(limit_train_batches=0.5), dict(prompts=[[0, 1, 2, 3], [4, 5, 6, 7]] * 2)),
    "should_stop": (lambda: dict(callbacks=[Stop()]), dict(steps=1)),
    "min_steps": (lambda: dict(min_steps=3, callbacks=[Stop()]), dict()),
    "min_epochs": (lambda: dict(min_epochs=2, callbacks=[Stop()]), dict(steps=8)),
    "overfit": (lambda: dict(overfit_batches=2, max_epochs=3), dict(prompts=[[0, 1, 2, 3], [4, 5, 6, 7]] * 3)),
    "val int": (lambda: dict(val_check_interval=3), dict(validated=[3, 7])),
    "val share": (lambda: dict(val_check_interval=0.5), dict(validated=[2, 4, 6, 8])),
    "val across epochs": (lambda: dict(val_check_interval=3, check_val_every_n_epoch=None), dict(validated=[3, 6])),
    "val epochs": (lambda: dict(check_val_every_n_epoch=2), dict(validated=[8])),
    "reload": (lambda: dict(reload_dataloaders_every_n_epochs=1), dict(loaders=2)),
    "no sampler": (lambda: dict(use_distributed_sampler=False), dict(steps=8)),
    "log": (lambda: dict(log_every_n_steps=3), dict(logged=[2, 5])),
    "save steps": (lambda: saver(every_n_train_steps=3), dict(saved=[3, 6])),
    "save epochs": (lambda: saver(every_n_epochs=1, save_on_train_epoch_end=True), dict(saved=[4, 8])),
    "save time": (lambda: saver(train_time_interval=timedelta(0)), dict(saved=[*range(1, 9)])),
    "save val": (lambda: saver() | dict(val_check_interval=2), dict(saved=[2, 4, 6, 8])),
    "save last": (lambda: saver(save_last=True, every_n_train_steps=3, save_top_k=1), dict(last=6)),
    "early stop": (lambda: stopper(patience=2) | dict(val_check_interval=2), dict(steps=6)),
    "early stop, min_steps": (lambda: stopper(patience=1) | dict(val_check_interval=2, min_steps=7), dict(steps=7)),
}


class Counted(Letters):
    """Nothing can be right, so that pass@1 stays zero; counts its loaders."""

    def __init__(self):
        super().__init__(n=16, score=lambda text: 0.9 * (bool(text) and text[0] < "N"))
        self.loaders = 0

    def train_dataloader(self):
        self.loaders += 1
        return super().train_dataloader()


def steps_saved(*files):
    return [torch.load(f, weights_only=True)["global_step"] for f in files]


def trace(module, flags, folder):
    data = Counted()
    defaults = dict(max_steps=-1, limit_val_batches=1, num_sanity_val_steps=0, log_every_n_steps=1)
    if "max_steps" not in flags:
        defaults["max_epochs"] = 2
    run, _, watch = fit(
        module, data, **{**defaults, "enable_checkpointing": True, "logger": RunLogger(folder), **flags}
    )
    files = sorted(Path("saved").glob("step=*.ckpt"), key=lambda p: int(p.stem[5:]))
    result = dict(
        steps=run.global_step,
        epoch=run.current_epoch,
        prompts=watch.prompts,
        validated=watch.validated,
        loaders=data.loaders,
        logged=[r["step"] for r in jsonl.read(Path(folder, "metrics.jsonl")) if "loss" in r],
        saved=steps_saved(*files),
        last=next(iter(steps_saved(*Path("saved").glob("last.ckpt"))), None),
    )
    return result, module, watch, files


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("method", [GRPO, SFT])
def test_loops_run_as_an_ordinary_modules(name, method, monkeypatch, tmp_path):
    flags, known = LOOPS[name]
    want, *_ = trace(Ordinary(), flags(), "ordinary")
    assert known.items() <= want.items()
    Path("ours").mkdir()
    monkeypatch.chdir("ours")
    inner = dict(epochs=2, minibatches=2)  # which the Trainer sees nothing of
    got, module, watch, files = trace(policy(method, **inner), flags(), "run")
    assert got == want
    for path in files:
        saved = torch.load(path, weights_only=True)
        module.load_state_dict(saved["state_dict"])
        assert torch.equal(weights(module), watch.weights[saved["global_step"]])


def test_overfitting_turns_shuffling_off():
    data = Letters(n=16)
    data.shuffle = True
    assert fit(data=data, max_steps=2)[2].prompts[0] != [0, 1, 2, 3]
    assert fit(data=data, overfit_batches=2, max_steps=6)[2].prompts == [[0, 1, 2, 3], [4, 5, 6, 7]] * 3


def test_max_time():
    run, *_ = fit(max_steps=-1, max_epochs=-1, max_time=timedelta(seconds=1))
    assert run.should_stop
    assert run.global_step > 0


# ---------------------------------------------------------------- the optimizer's step


class Plain(GRPO):
    """Gradient descent with rate one: a step's change is its gradient."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("how", ["norm", "value"])
@pytest.mark.parametrize("inner", [dict(), dict(epochs=2, minibatches=2)])
def test_each_step_takes_the_clipped_gradient(how, inner):
    limit = {"norm": 0.05, "value": 1e-3}[how]
    _, _, watch = fit(policy(Plain, **inner), gradient_clip_val=limit, gradient_clip_algorithm=how, max_steps=2)
    before = [watch.weights[0], *watch.stepped[:-1]]
    assert len(watch.stepped) == len(watch.gradients) == 2 * math.prod(inner.values())
    for old, new, gradient in zip(before, watch.stepped, watch.gradients, strict=True):
        if how == "norm":
            assert gradient.norm() > limit
            want = gradient * limit / gradient.norm()
        else:
            assert gradient.abs().max() > limit
            want = gradient.clamp(-limit, limit)
        assert torch.allclose(new, old - want, atol=2e-7, rtol=0)  # weights near one round at 1e-7


@pytest.mark.parametrize("inner", [dict(), dict(epochs=2, minibatches=2)])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_the_learning_rate_follows_its_formula(schedule, inner):
    steps, warmup = 7, 2
    _, _, watch = fit(policy(schedule=schedule, warmup_steps=warmup, lr=1e-3, **inner), max_steps=steps)
    want = []
    for step in range(steps):
        done = (step - warmup) / (steps - warmup)
        falling = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        falling = (falling | {"wsd": 1.0})[
            schedule
        ]  # a tenth of 7 steps, rounded, is the last one, at whose start it is 1
        want += [1e-3 * ((step + 1) / (warmup + 1) if step < warmup else falling)] * math.prod(inner.values())
    assert watch.lrs == pytest.approx(want)


def test_a_schedule_without_an_end_is_refused():
    with pytest.raises(ValueError, match="schedule 'linear' needs an end"):
        fit(policy(schedule="linear"), max_steps=-1, max_epochs=-1)


def test_schedulers_of_the_command_line_count_steps():
    from lit_rl.cli import resolve, run_cli

    words = (
        "fit --config grpo --config tiny --trainer.max_steps 4 --trainer.enable_progress_bar false --optimizer torch.optim.SGD"
        " --optimizer.lr 0.01 --lr_scheduler ExponentialLR --lr_scheduler.gamma 0.5 --trainer.val_check_interval 100"
        " --trainer.callbacks [LearningRateMonitor] --run r"
    )
    assert type(run_cli(resolve(words.split())).trainer.optimizers[0]) is torch.optim.SGD
    rates = [record["lr-SGD"] for record in jsonl.read(Path("r/metrics.jsonl")) if "lr-SGD" in record]
    assert rates == pytest.approx([0.01, 0.005, 0.0025, 0.00125])


def test_detect_anomaly_and_deterministic_change_no_bit():
    plain = weights(fit(max_steps=3)[1])
    try:
        assert torch.equal(plain, weights(fit(max_steps=3, detect_anomaly=True, deterministic=True)[1]))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------- evaluation


def test_limits_of_evaluation():
    data, module = Letters(n=16), policy()
    for stage, split in (("validate", "val"), ("test", "test")):
        sizes = []

        class Count(L.Callback):
            def on_validation_batch_end(self, trainer, module, outputs, batch, *args, sizes=sizes):
                sizes.append(len(batch))

            on_test_batch_end = on_validation_batch_end

        run = trainer(callbacks=[Count()], limit_val_batches=3, limit_test_batches=2)
        (metrics,) = getattr(run, stage)(module, data, verbose=False)
        assert sizes == [4] * {"val": 3, "test": 2}[split]
        assert module.table.rows[-1].items == sum(sizes)
        assert metrics[f"{split}/pass@1"] == pytest.approx(module.table.rows[-1].pass_at[1])
    assert [len(part) for part in trainer(limit_predict_batches=3).predict(module, data)] == [4] * 3
    assert [len(part) for part in trainer(limit_predict_batches=0.5).predict(module, data)] == [4] * 2


@pytest.mark.parametrize("method", [GRPO, SFT])
def test_validation_and_the_sanity_check_leave_no_trace_in_training(method):
    runs = [
        weights(fit(policy(method), max_steps=4, **flags)[1])
        for flags in (
            dict(),
            dict(limit_val_batches=2, num_sanity_val_steps=0, val_check_interval=1),
            dict(limit_val_batches=2, num_sanity_val_steps=2, val_check_interval=1),
        )
    ]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


class Asks(L.Callback):
    """Where the Trainer stands in a test, which may then fail."""

    def on_test_start(self, trainer, module):
        self.seen = trainer.global_step, trainer.current_epoch

    def on_test_end(self, trainer, module):
        if self.fails:
            raise RuntimeError("as asked")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("method", [GRPO, RLCCF])
def test_the_trainer_stands_at_the_step_of_a_checkpoint_while_it_is_evaluated(method, fails):
    asks = Asks()
    asks.fails = fails
    flags = saver(every_n_train_steps=1)
    flags["callbacks"].append(asks)
    run, module, _ = fit(policy(method), max_steps=4, limit_train_batches=2, enable_checkpointing=True, **flags)
    for other in (run, trainer(max_steps=1, callbacks=[asks])):  # it goes on from where it was itself
        stood = other.global_step, other.current_epoch
        with pytest.raises(RuntimeError) if fails else nullcontext():
            other.test(module, Letters(n=16), ckpt_path="saved/step=3.ckpt", verbose=False)
        assert asks.seen == (3, 1)
        assert (other.global_step, other.current_epoch) == stood
    assert stood == (0, 0)
    other.fit(module, Letters(n=16))
    assert other.global_step == 1


# ---------------------------------------------------------------- trials


@pytest.mark.parametrize("name", METHODS)
def test_fast_dev_run_leaves_nothing_behind(name):
    module = policy(METHODS[name])
    before = weights(module)
    run = L.Trainer(
        fast_dev_run=2,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EntropyMonitor(), RolloutStats(), Completions(), ModelCheckpoint(every_n_train_steps=1)],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Completions has nothing to record")
        run.fit(module, Letters(n=16))
    assert run.global_step == 2
    assert (weights(module) - before).abs().max() > 0
    assert {"loss", "val/pass@1"} <= run.callback_metrics.keys()
    assert not list(Path().iterdir())


@pytest.mark.parametrize("name", METHODS)
def test_barebones_takes_the_same_steps(name):
    full = weights(fit(policy(METHODS[name]))[1])
    module = policy(METHODS[name])
    run = L.Trainer(barebones=True, max_steps=2, accelerator="cpu", limit_val_batches=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are trying to `self.log")
        run.fit(module, Letters(n=16))
    assert torch.equal(full, weights(module))


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("name", METHODS)
def test_bf16_mixed_has_the_gradient_of_float32_to_rounding(name):
    """From the same responses, which in half precision would be others."""

    class Same(GRPO if name == "RLCCF" else METHODS[name]):
        replies, asked = [], 0

        def respond(self, *args, **kwargs):
            self.asked += 1
            if len(self.replies) < self.asked:
                self.replies.append(super().respond(*args, **kwargs))
            return self.replies[self.asked - 1]

    def module():
        one = policy(Same, minibatches=1)
        return RLCCF([one]) if name == "RLCCF" else one

    full, half = (fit(module(), max_steps=1, precision=p) for p in ("32-true", "bf16-mixed"))
    a, b = full[2].gradients[0], half[2].gradients[0]
    assert 0 < (a - b).norm() < 0.05 * a.norm()
    assert {p.dtype for p in half[1].parameters()} == {torch.float32}


def test_bf16_true_computes_as_a_model_that_was_loaded_in_bf16():
    """Rotary frequencies stay float32, as transformers keeps them, or positions would be off."""
    from transformers import AutoModelForCausalLM

    class Logits(L.Callback):
        def on_train_start(self, trainer, module):
            self.dtypes = {p.dtype for p in module.parameters()}
            self.got = [m(ids).logits.detach() for m in (module.model, module.reference)]

    ids = torch.randint(4, 100, (1, 2000), generator=torch.Generator().manual_seed(0))
    module, logits = policy(), Logits()
    module.export("model")
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained("model", dtype=torch.bfloat16)(ids).logits
        full = module.model(ids).logits
    _, _, watch = fit(module, precision="bf16-true", max_steps=2, callbacks=[logits])
    assert logits.dtypes == {torch.bfloat16}
    assert all(torch.equal(got, want) for got in logits.got)
    assert (want.float() - full).abs().mean() < 0.02 * full.std()
    assert not torch.equal(watch.weights[0], watch.weights[-1])


def test_float64_computes_in_float64():
    """The gradient of the same minibatch, in two precisions."""
    single, double = (fit(policy(SFT), max_steps=1, precision=p)[2].gradients[0] for p in ("32-true", "64-true"))
    assert double.dtype == torch.float64
    assert 0 < (single - double).norm() < 1e-5 * double.norm()


@pytest.mark.parametrize("method", [GRPO, SFT])
def test_fp16_scales_the_loss_and_unscales_the_gradient(method):
    """The plugin of "16-mixed", which Lightning itself allows on a GPU only."""
    plain = fit(policy(method), max_steps=1)[2]
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))
    run, _, watch = fit(policy(method), max_steps=2, plugins=[plugin], gradient_clip_val=1.0)
    assert run.precision_plugin.scaler.get_scale() == 2.0**12
    a, b = plain.gradients[0].norm(), watch.gradients[0].norm()
    assert abs(a / b - 1) < 0.2  # other responses may be sampled: it is the scale that counts
    assert not torch.equal(*watch.weights[1:3])


def test_16_mixed_on_a_cpu_is_bf16_mixed():
    with pytest.warns(UserWarning, match="Using `precision='bf16-mixed'` instead"):
        run = trainer(precision="16-mixed")
    assert run.precision == "bf16-mixed"


@pytest.mark.parametrize("flag", ["16-true", "32-true"])
def test_training_in_float16_is_refused(flag):
    module = policy() if flag == "16-true" else policy().half()
    with pytest.raises(ValueError, match=r"float16, in which AdamW's eps is zero.*16-mixed or bf16-mixed"):
        fit(module, precision=flag)


def test_steps_that_bf16_rounds_away_are_warned_of():
    with pytest.warns(UserWarning, match=r"a step of lr 1e-06 is rounded away in \d\d% of them.*bf16-mixed"):
        _, _, watch = fit(policy(lr=1e-6), precision="bf16-true", max_steps=1)
    moved = (watch.weights[0] != watch.weights[1]).float().mean()
    assert moved < 0.5
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*rounded away")
        _, _, watch = fit(policy(lr=1e-2), precision="bf16-true", max_steps=1)
        fit(policy(lr=1e-6), precision="bf16-mixed", max_steps=1)
    assert (watch.weights[0] != watch.weights[1]).float().mean() > 0.5


# ---------------------------------------------------------------- checkpoints


def test_the_best_checkpoints_by_a_validation_metric():
    saver = ModelCheckpoint("saved", filename="{step}", monitor="val/score", mode="max", save_top_k=2, save_last=True)
    scores = {}

    class Scores(L.Callback):
        def on_validation_end(self, trainer, module):
            scores[trainer.global_step] = float(trainer.callback_metrics["val/score"])

    module = policy(lr=1e-2, sampling=Sampling(max_new_tokens=4))
    data = Letters(n=16, score=lambda text: sum(c < "N" for c in text) / 8)
    fit(
        module,
        data,
        max_steps=8,
        val_check_interval=2,
        limit_val_batches=2,
        num_sanity_val_steps=0,
        callbacks=[Scores(), saver],
        enable_checkpointing=True,
    )
    assert len(set(scores.values())) > 2
    best = sorted(scores, key=lambda step: -scores[step])[:2]
    assert sorted(map(float, saver.best_k_models.values())) == pytest.approx(sorted(scores[step] for step in best))
    assert float(saver.best_model_score) == pytest.approx(max(scores.values()))
    assert torch.load(saver.last_model_path, weights_only=True)["global_step"] == 8
    assert scores[torch.load(saver.best_model_path, weights_only=True)["global_step"]] == max(scores.values())


# ---------------------------------------------------------------- callbacks of Lightning's


def test_stochastic_weight_averaging_ends_in_the_mean_of_its_epochs():
    averaging = StochasticWeightAveraging(1e-3, swa_epoch_start=2, annealing_epochs=1)
    _, module, watch = fit(policy(SFT), max_epochs=4, max_steps=-1, callbacks=[averaging])
    starts = torch.stack(watch.weights[4:16:4])  # of all epochs but the first, each of four steps
    assert torch.allclose(weights(module), starts.mean(0), atol=1e-6)


def test_a_moving_average_is_what_validates_and_what_is_left():
    decay, seen = 0.5, []

    class Validated(L.Callback):
        def on_validation_batch_end(self, trainer, module, *args):
            seen.append(weights(module))

    _, module, watch = fit(
        max_steps=3,
        callbacks=[EMAWeightAveraging(decay=decay, update_every_n_steps=1), Validated()],
        val_check_interval=1,
        limit_val_batches=1,
        num_sanity_val_steps=0,
    )
    want, averages = watch.weights[1], []
    for i, now in enumerate(watch.weights[1:]):
        want = now if i == 0 else decay * want + (1 - decay) * now
        averages.append(want)
    assert torch.allclose(weights(module), averages[-1], atol=1e-6)
    assert all(torch.allclose(got, average, atol=1e-6) for got, average in zip(seen, averages, strict=True))
    assert not torch.allclose(watch.weights[-1], averages[-1], atol=1e-6)


def test_learning_rate_and_device_monitors_reach_the_logger():
    fit(
        policy(schedule="linear"),
        max_steps=4,
        callbacks=[LearningRateMonitor(), DeviceStatsMonitor(cpu_stats=True)],
        logger=RunLogger("r"),
        log_every_n_steps=2,
    )
    records = jsonl.read(Path("r/metrics.jsonl"))
    assert [(r["step"], r["lr-AdamW"]) for r in records if "lr-AdamW" in r] == [
        (1, pytest.approx(0.75e-2)),
        (3, pytest.approx(0.25e-2)),
    ]
    assert [r["step"] for r in records if "loss" in r] == [1, 3]
    assert any(0 < v <= 100 for r in records for k, v in r.items() if "cpu_vm_percent" in k)


def test_progress_bars_and_the_summary_show_the_policys_numbers(capsys):
    module = policy()
    count = sum(p.numel() for p in module.parameters())
    for bar in (TQDMProgressBar(), RichProgressBar()):
        run, *_ = fit(
            policy(), callbacks=[bar, ModelSummary()], enable_progress_bar=True, enable_model_summary=True, max_steps=2
        )
        assert bar.get_metrics(run, run.lightning_module)["reward"] == pytest.approx(
            float(run.callback_metrics["reward"])
        )
    text = capsys.readouterr()
    assert "reward" in text.out + text.err
    summary = L.utilities.model_summary.ModelSummary(module)
    assert summary.total_parameters == count
    assert summary.trainable_parameters == count // 2  # the reference is frozen


def test_profilers_see_generation_and_steps():
    simple = SimpleProfiler()
    fit(profiler=simple, max_steps=3, limit_val_batches=1, val_check_interval=1)
    seen = simple.recorded_durations
    for action in ("on_train_batch_start", "optimizer_step"):
        assert len(seen[f"[LightningModule]GRPO.{action}"]) == 3
    assert sum(seen["[LightningModule]GRPO.on_train_batch_start"]) > 0.001
    fit(profiler=AdvancedProfiler(".", "profile"), max_steps=3)
    text = Path("fit-profile.txt").read_text()
    assert "[LightningModule]GRPO.on_train_batch_start" in text
    assert "native.py" in text, "the sampler's functions are told apart"


# ---------------------------------------------------------------- loggers


def test_all_loggers_get_the_same_numbers():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [RunLogger("r"), CSVLogger("c", name="", version=""), TensorBoardLogger("t", name="", version="")]
    fit(
        max_steps=4,
        logger=loggers,
        log_every_n_steps=2,
        val_check_interval=2,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        callbacks=[RolloutStats(), EntropyMonitor()],
    )
    want = {(r["step"], k): v for r in jsonl.read(Path("r/metrics.jsonl")) for k, v in r.items() if k != "step"}
    assert {s for s, k in want if k == "loss"} == {1, 3}
    assert {"loss", "reward", "entropy", "val/pass@1", "grad_norm"} <= {k for _, k in want}
    with Path("c/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    got = {(int(r["step"]), k): float(v) for r in rows for k, v in r.items() if k != "step" and v}
    assert got.keys() == want.keys()
    assert got == pytest.approx(want)
    events = EventAccumulator("t", size_guidance={"scalars": 0})
    events.Reload()
    board = {
        (e.step, tag): e.value for tag in events.Tags()["scalars"] if tag != "hp_metric" for e in events.Scalars(tag)
    }
    assert board.keys() == want.keys()
    assert board == pytest.approx(want, rel=1e-6)


def test_the_default_logger_takes_everything():
    run, *_ = fit(logger=True, log_every_n_steps=1, callbacks=[RolloutStats()], max_steps=2)
    assert run.log_dir
    assert any(Path(run.log_dir).iterdir())


# ---------------------------------------------------------------- tuners, compilation, and what is refused


def test_the_learning_rate_finder_works_where_a_loss_means_something():
    module = policy(SFT)
    before = weights(module)
    run = trainer(max_steps=3)
    found = Tuner(run).lr_find(module, Letters(n=16), num_training=20)
    assert torch.equal(before, weights(module))
    assert module.lr == found.suggestion() != 1e-2
    run.fit(module, Letters(n=16))
    assert torch.equal(weights(module), weights(fit(policy(SFT, lr=found.suggestion()), max_steps=3)[1]))


@pytest.mark.parametrize("name", METHODS)
def test_what_cannot_work_is_refused_with_a_remedy(name):
    cases = {
        GradientAccumulationScheduler({0: 2}): r"GradientAccumulationScheduler .*: .*set the DataModule's batch_size",
        BatchSizeFinder(): "BatchSizeFinder .*lower model.microbatch_tokens or model.max_rows",
        LearningRateFinder(): "LearningRateFinder .*set model.lr",
    }
    for callback, message in cases.items():
        if issubclass(METHODS[name], SFT) and isinstance(callback, LearningRateFinder):
            continue
        with pytest.raises(ValueError, match=f"the callback {message}"):
            trainer(callbacks=[callback]).fit(policy(METHODS[name]), Letters(n=16))
    with pytest.raises(ValueError, match="BatchSizeFinder"):
        Tuner(trainer()).scale_batch_size(policy(METHODS[name]), datamodule=Letters(n=16))


@pytest.mark.slow
def test_a_compiled_policy_learns_the_same():
    plain = weights(fit(max_steps=2)[1])
    module = policy()
    trainer(max_steps=2).fit(torch.compile(module, backend="eager"), Letters(n=16))
    assert torch.allclose(plain, weights(module), atol=1e-6)


def test_the_heads_products_are_in_autocasts_precision_in_the_backward_too():
    """Or the largest matrix product of a step would run in float32."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        seen = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                self.seen |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
            return func(*args, **(kwargs or {}))

    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    with Products():
        with torch.autocast("cpu", torch.bfloat16):
            logps, entropy = ops.linear_logprob(hidden, weight, torch.arange(5))
        (logps.sum() + entropy.sum()).backward()
    assert Products.seen == {torch.bfloat16}
    assert hidden.grad.dtype == weight.grad.dtype == logps.dtype == torch.float32
