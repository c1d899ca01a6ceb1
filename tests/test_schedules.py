"""Warm-up, stable, decay: its formula, its re-warming, and both in a run that is resumed."""

import math
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from test_cli import fit as command
from test_resume import Saves, fit, policy, resumed, same

from lit_rl import GRPO, SFT, jsonl
from lit_rl.schedules import SHAPES, WSD


def rates(steps, total=20, lrs=(1.0,), rewarm=None, **settings):
    """The rate of each step, of each group; rewarm = {step: arguments}."""
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in lrs]
    optimizer = torch.optim.SGD([{"params": [w], "lr": lr} for w, lr in zip(weights, lrs, strict=True)])
    schedule, found = WSD(optimizer, total, **settings), []
    for step in range(steps):
        if step in (rewarm or {}):
            schedule.rewarm(**rewarm[step])
        found.append([group["lr"] for group in optimizer.param_groups])
        assert schedule.get_last_lr() == found[-1]
        optimizer.step()
        schedule.step()
    return found if len(lrs) > 1 else [rate for (rate,) in found]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_formula(shape):
    """Of MiniCPM's equation 1: s / W, 1, f(s - T); here the first step of W counts, and the decay starts at 1."""
    w, d, total, floor = 4, 6, 20, 0.1
    want = [(s + 1) / (w + 1) for s in range(w)] + [1.0] * (total - d - w)
    for s in range(d + 3):
        x = min(1.0, s / d)
        curve = {"exponential": 0.5 ** (x * math.log2(1 / floor)), "linear": 1 + x * (floor - 1)}
        curve |= {"cosine": (1 + floor) / 2 + (1 - floor) / 2 * math.cos(math.pi * x)}
        want.append((curve | {"1-sqrt": 1 - 0.9 * x**0.5})[shape])
    got = rates(total + 3, total, lrs=(1.0, 3e-4), warmup=w, decay=d / total, shape=shape, floor=floor)
    assert [one for one, _ in got] == pytest.approx(want)
    assert [two for _, two in got] == pytest.approx([3e-4 * rate for rate in want])


def test_a_decay_of_everything_starts_after_the_warm_up():
    assert rates(6, 6, warmup=2, decay=1.0, shape="linear", floor=0.0) == pytest.approx(
        [1 / 3, 2 / 3, 1, 3 / 4, 1 / 2, 1 / 4]
    )


def test_rewarming():
    """BitCPM's: stable, down, up again to half in two steps, stable, and down at the end."""
    got = rates(20, 20, warmup=0, decay=0.2, shape="linear", floor=0.0, rewarm={8: dict(warmup=3, peak=0.5)})
    down = [0.5 * (1 - s / 4) for s in range(4)]
    assert got == pytest.approx([1.0] * 8 + [1 - 0.5 * k / 4 for k in (1, 2, 3)] + [0.5] * 5 + down)
    at_once = rates(20, 20, decay=0.5, shape="linear", floor=0.0, rewarm={16: dict(warmup=0)})
    assert at_once[10:] == pytest.approx([1 - s / 10 for s in range(6)] + [1 - s / 4 for s in range(4)])
    late = rates(20, 20, decay=0.5, shape="linear", floor=0.0, rewarm={16: dict(warmup=2)})
    assert late[16:] == pytest.approx([0.4 + 0.6 / 3, 0.4 + 1.2 / 3, 1.0, 0.5])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(decay=1.5), "decay is 1.5: it must be a share between 0 and 1"),
        (dict(total=math.inf), "total is inf: it must be finite when there is a decay"),
        (dict(total=0), "total is 0: it must be at least 1"),
        (dict(shape="cosin"), "shape is cosin: it must be one of exponential, linear, cosine, 1-sqrt"),
        (dict(floor=0), "floor is 0: it must be above 0 for an exponential decay"),
        (dict(warmup=-1), "warmup is -1: it must be at least 0"),
        (dict(rewarm={1: dict(warmup=2, peak=0)}), "peak is 0: it must be above 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        rates(2, **settings)


def test_a_policy_of_no_decay_is_refused():
    with pytest.raises(ValueError, match="decay_share is 0"):
        SFT("tiny", decay_share=0)


class Rewarm(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        if trainer.global_step == 2:
            module.lr_schedulers().rewarm(1, 0.5)

    rates = ()

    def on_train_start(self, trainer, module):
        self.rates = []


def test_a_rewarmed_run_resumes():
    inner, saves, watch = dict(schedule="wsd", warmup_steps=1, decay_share=0.2), Saves({"batch_end"}), Rewarm()
    straight = fit(policy(GRPO, **inner), "straight", callbacks=[saves, watch])
    assert watch.rates == pytest.approx(
        [3e-3 * rate for rate in (0.5, 1.0, 1.0, 0.5, 0.5)]
    )  # is seen before it changes
    assert straight["optimizer"]
    for (step, _), file in saves.files.items():
        if step < 5:
            assert same(resumed(GRPO, file, inner, callbacks=[Rewarm()]), straight)


def test_a_run_goes_on_with_another_end():
    """The end is a setting: the checkpoint of a shorter run in its stable stage is one of a longer run."""
    inner, saves = dict(schedule="wsd"), Saves({"batch_end"})
    straight = fit(policy(GRPO, **inner), "straight", max_steps=6)
    fit(policy(GRPO, **inner), "short", callbacks=[saves], max_steps=3)
    got = fit(policy(GRPO, 1, **inner), "short", ckpt_path=saves.files[2, "batch_end"], max_steps=6)
    assert same(got, straight)


def test_on_the_command_line(capsys):
    more = ("--trainer.max_steps", 4, "--trainer.callbacks+=LearningRateMonitor")
    command(capsys, "--config", "sft", "--config", "wsd", "--config", "tiny", *more, "--run", "a")
    options = ("--lr_scheduler", "WSD", "--lr_scheduler.total", 4, "--lr_scheduler.shape", "1-sqrt")
    given = ("--optimizer", "torch.optim.SGD", "--optimizer.lr", 0.01, *options, "--lr_scheduler.decay", 0.5)
    command(capsys, "--config", "sft", "--config", "tiny", *given, *more, "--run", "b")
    found = {}
    for name in "ab":
        rows = jsonl.read(Path(name, "metrics.jsonl"))
        found[name] = [value for row in rows for key, value in row.items() if key.startswith("lr-")]
    assert found["a"] == pytest.approx([1e-3 / 11, 2e-3 / 11, 3e-3 / 11, 4e-3 / 11])
    assert found["b"] == pytest.approx([0.01, 0.01, 0.01, 0.01 * (1 - 0.96 * 0.5**0.5)])
