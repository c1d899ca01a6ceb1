"""The entropy law: its interval, its forecast in training, its chart. (Its numbers: paper_checks.py.)"""

import math
import random
import re

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_callbacks import Log
from test_policy import Letters, policy, trainer
from test_report import drawn, lines

from lit_rl import DAPO, RLCallback
from lit_rl.callbacks import EntropyLaw
from lit_rl.entropy_law import fit, student
from lit_rl.report import write_report


def run_of(steps, noise, seed=0, a=0.25, b=0.7):
    """A run as in the paper: entropy decays, reward follows it."""
    rng = random.Random(seed)
    entropies = [0.02 + 0.63 * math.exp(-s / 40) for s in range(steps)]
    return [(h, b - a * math.exp(h) + rng.gauss(0, noise)) for h in entropies]


def test_the_intervals_hold_what_they_promise():
    """Fitted to the first 36 steps: the ceiling, and points of the end, in 95 % of runs."""
    ceilings = points = 0
    for seed in range(400):
        run = run_of(236, 0.01, seed)
        law = fit(run[:36])
        ceilings += abs(law.ceiling - 0.45) < law.interval(0.0)
        h, r = run[-1]
        points += abs(law(h) - r) < law.interval(h, new=True)
    assert 0.92 < ceilings / 400 < 0.98
    assert 0.92 < points / 400 < 0.98


def test_the_interval_widens_where_entropy_hardly_varies_and_where_points_are_few():
    steady = fit([(0.5 + 1e-3 * s / 36, r) for s, (_, r) in enumerate(run_of(36, 0.01))])
    wide, narrow = fit(run_of(36, 0.01)), fit(run_of(236, 0.01))
    few = fit(run_of(36, 0.01)[:5])
    assert steady.interval(0.0) > 20 * wide.interval(0.0)
    assert few.interval(0.0) > 5 * wide.interval(0.0)
    assert wide.interval(0.0) > wide.interval(0.5)
    assert narrow.interval(0.0) < wide.interval(0.0) < wide.interval(0.0, new=True)


def teststudents_quantile():
    for freedom, want in {3: 3.182, 5: 2.571, 10: 2.228, 30: 2.042, 1000: 1.962}.items():
        assert student(freedom) == pytest.approx(want, rel=0.01)


def test_what_is_not_finite_does_not_count():
    run = run_of(20, 0.01)
    bad = [(math.nan, 0.5), (0.3, math.inf), (math.inf, 0.1), (1e6, 0.5), (0.1, math.nan)]
    assert fit([*bad, *run]) == fit(run)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "needs 5 points with an entropy and a reward, and has 0"),
        ([(0.1 * i, 0.5) for i in range(4)] + [(math.nan, 0.5)] * 9, "and has 4"),
        ([(0.3, 0.1 * i) for i in range(9)], "all 9 points have the entropy 0.3"),
    ],
)
def test_what_cannot_be_fitted(points, message):
    with pytest.raises(ValueError, match=message):
        fit(points)


# ------------------------------------------------------------------------------------------------- in a training run


class Points(RLCallback):
    """The step's entropy and reward, from its rows and the model's logits."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.rewards, self.entropies = [], []

    def on_rollout(self, trainer, module, x):
        self.rewards += x.rewards.tolist()

    def on_loss(self, trainer, module, x, terms):
        with torch.no_grad():
            logits = module.model(x.tokens).logits[:, :-1].log_softmax(-1)
        self.entropies += (-(logits.exp() * logits).sum(-1))[x.mask[:, 1:]].tolist()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append(tuple(sum(v) / len(v) for v in (self.entropies, self.rewards)))


def test_it_forecasts_from_the_first_steps():
    log, points = Log(), Points()
    trainer(max_steps=7, callbacks=[points, EntropyLaw(steps=6), log]).fit(policy(DAPO, overlong_buffer=0.0), Letters())
    assert [any("entropy_law" in k for k in row) for row in log.rows] == [False] * 4 + [True] * 3
    for step, row in list(enumerate(log.rows))[4:]:
        law, (h, r) = fit(points.seen[: min(step + 1, 6)]), points.seen[step]
        want = dict(a=law.a, b=law.b, ceiling=law.ceiling, ceiling_interval=law.interval(0.0), measured=r)
        want |= dict(predicted=law(h), predicted_interval=law.interval(h, new=True))
        for name, value in want.items():
            assert row[f"entropy_law/{name}"] == pytest.approx(value, rel=0.02, abs=1e-3), (step, name)
    assert log.rows[6]["entropy_law/a"] == log.rows[5]["entropy_law/a"] != log.rows[4]["entropy_law/a"]


def test_resume_is_exact():
    def run(**kwargs):
        log = Log()
        saver = ModelCheckpoint("saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = [EntropyLaw(steps=5), log, saver]
        trainer(max_steps=6, callbacks=callbacks, enable_checkpointing=True).fit(policy(), Letters(), **kwargs)
        return [{k: v for k, v in row.items() if "entropy_law/" in k} for row in log.rows]

    straight = run()
    assert straight[3:] == run(ckpt_path="saved/step=3.ckpt")
    assert straight[5:] == run(ckpt_path="saved/step=5.ckpt")
    assert straight[5]


def test_where_entropy_stays_it_says_so():
    module = policy(lr=0.0)
    torch.nn.init.zeros_(module.model.lm_head.weight)  # every token as likely as any other
    with pytest.warns(UserWarning, match=r"nothing to forecast with: .* all 5 points have the entropy 4\.6"):
        trainer(max_steps=6, callbacks=[EntropyLaw(steps=5)]).fit(module, Letters())
    with pytest.raises(ValueError, match="steps is 4: it must be at least 5"):
        EntropyLaw(steps=4)


# -------------------------------------------------------------------------------------------------------- in the report


def figure(folder, points, name="reward", every=1):
    records = [{"step": s, "entropy": h} | ({name: r} if s % every == 0 else {}) for s, (h, r) in enumerate(points)]
    lines(folder / "metrics.jsonl", records)
    text = write_report(folder).read_text()
    return text[text.index("<figure><figcaption>Entropy law") :].partition("</figure>")[0]


def test_the_report_draws_the_curve(tmp_path):
    points = run_of(100, 0.005)
    text = figure(tmp_path, points)
    whole, first = fit(points), fit(points[:36])
    curve, forecast = drawn(text)
    for line, law in ((curve, whole), (forecast, first)):
        for h, r in line:
            assert r == pytest.approx(law(h), abs=0.01)
    assert curve[-1][0] == pytest.approx(points[0][0], abs=0.01)
    assert text.count("<circle") == 100
    assert f"ceiling {whole.ceiling:.3g} ± {whole.interval(0.0):.3g}" in text
    h, r = points[-1]
    assert f"at the last entropy, {first(h):.3g} ± {first.interval(h, new=True):.3g}; it was {r:.3g}" in text


def test_validation_is_preferred_where_there_is_enough(tmp_path):
    assert "val/pass@1, by" in figure(tmp_path, run_of(100, 0.005), "val/pass@1", every=20)
    text = figure(tmp_path, run_of(100, 0.005), "val/pass@1", every=40)
    assert "The entropy law needs 5 points with an entropy and a reward, and has 0." in text


@pytest.mark.parametrize(
    "points",
    [
        [(0.3, 0.5)] * 20,
        [(math.nan, 0.5), (0.2, math.inf)] * 20,
        [(-0.1 * s, 0.5) for s in range(9)],
        [(0.1 * s, 0.0) for s in range(99)],
    ],
)
def test_odd_runs_make_a_page(tmp_path, points):
    assert not re.search("nan|inf[^i]", figure(tmp_path, points))
