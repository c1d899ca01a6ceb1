"""ClipCov and KLCov in training: one choice for every split and resumed run. Ranks are in test_ranks.py, the authors'
numbers in paper_checks.py."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_callbacks import Log
from test_policy import Gradients, Letters, policy, trainer, weights

from lit_rl import SFT, RLCallback
from lit_rl.callbacks import ClipCov, EntropyMonitor, KLCov
from lit_rl.datamodules import Vowels

SETTINGS = dict(epochs=2, minibatches=2, clip_low=1.0, clip_high=1.0, aggregate="token")
CALLBACKS = {
    "clip": lambda: ClipCov(1.0, low=0.1, high=1.5),
    "random": lambda: ClipCov(0.1, low=0.1, high=1.5),  # fewer than qualify
    "kl": lambda: KLCov(0.2),
}


class Twin(RLCallback):
    """Before each step the gradient, token by token, from all logits of the model and the definitions of the paper."""

    def __init__(self, ratio, low=None, high=None):
        self.ratio, self.low, self.high, self.seen = ratio, low, high, []

    def on_minibatch(self, trainer, module, slices):
        tokens = []
        for x in slices:
            logits = module.model(x.tokens).logits.log_softmax(-1)
            for row, position in x.mask.nonzero().tolist():
                logp = logits[row, position - 1, x.tokens[row, position]]
                tokens.append((logp, *(float(v[row, position]) for v in (x.logps, x.advantages, x.weights))))
        mean = [sum(t[i].item() if i == 0 else t[i] for t in tokens) / len(tokens) for i in (0, 2)]
        c = [(a - mean[1]) * (logp.item() - mean[0]) for logp, _, a, _ in tokens]
        count = max(1, int(self.ratio * len(tokens)))
        clipped = {i for i, (logp, old, a, _) in enumerate(tokens) if self.low and a > 0 and (logp - old).exp() > 2}
        if self.low is None:
            chosen = set(sorted(range(len(c)), key=lambda i: -c[i])[:count]) if self.seen else set()
        else:
            chosen = {i for i in range(len(c)) if self.low < c[i] < self.high} - clipped
            assert 0 < len(chosen) < count
        loss = 0.0
        for i, (logp, old, a, w) in enumerate(tokens):
            if self.low is None:
                loss += w * (-a * (logp - old).exp() + (abs(logp - old) if i in chosen else 0))
            elif i not in chosen | clipped:
                loss += w * -a * (logp - old).exp()
        gradients = torch.autograd.grad(loss, list(module.model.parameters()))
        self.seen.append(torch.cat([g.flatten() for g in gradients]))


@pytest.mark.parametrize("name", ["clip", "kl"])
def test_the_gradient_is_that_of_the_naive_twin(name):
    callback = CALLBACKS[name]()
    twin, recorder = Twin(callback.ratio, getattr(callback, "low", None), getattr(callback, "high", None)), Gradients()
    settings = SETTINGS | dict(old_logps="recompute", microbatch_tokens=60)
    if name == "kl":
        settings["clip_high"] = math.inf
    trainer(max_steps=1, callbacks=[twin, callback, recorder]).fit(policy(**settings), Letters())
    assert len(recorder.seen) == 4
    for got, want in zip(recorder.seen, twin.seen, strict=True):
        assert (got - want).norm() / want.norm() < 1e-3


def gradients(callback=None, **settings):
    recorder = Gradients()
    callbacks = [callback, recorder] if callback else [recorder]
    trainer(max_steps=1, callbacks=callbacks).fit(policy(**SETTINGS | settings), Letters())
    return recorder.seen


@pytest.mark.parametrize("name", ["random", "kl"])
def test_the_gradient_does_not_depend_on_the_split(name):
    whole, without = gradients(CALLBACKS[name]()), gradients()
    differ = [bool((a - b).norm() / b.norm() > 0.05) for a, b in zip(whole, without, strict=True)]
    assert differ == [name != "kl", True, True, True]  # the old policy itself takes no penalty
    for tokens in (1, 60):
        for step, (got, want) in enumerate(
            zip(gradients(CALLBACKS[name](), microbatch_tokens=tokens), whole, strict=True)
        ):
            assert (got - want).norm() / want.norm() < (2e-5 if step == 0 else 1e-3)


class Watch(RLCallback):
    """After ClipCov: which tokens lost their advantage, by minibatch."""

    def __init__(self):
        self.seen = []

    def on_minibatch(self, trainer, module, slices):
        self.seen.append([((x.weights != 0) & (x.advantages == 0)).nonzero().tolist() for x in slices])


def chosen(callback, steps=1, **settings):
    watch = Watch()
    trainer(max_steps=steps, callbacks=[callback, watch]).fit(policy(**SETTINGS | settings), Letters())
    return watch.seen


def test_the_choice_is_random_among_those_that_qualify():
    settings = dict(epochs=1, minibatches=1, lr=0.0)
    every = chosen(CALLBACKS["clip"](), **settings)[0]
    some = [chosen(CALLBACKS["random"](), seed=0, **settings)[0] for _ in range(2)]
    assert some[0] == some[1]
    tokens = 4 * 4 * 6  # rows that ended early have fewer
    for choice in some:
        for mine, all_of_them in zip(choice, every, strict=True):
            assert all(token in all_of_them for token in mine)
    assert 0 < sum(map(len, some[0])) <= tokens // 10 < sum(map(len, every))
    again = chosen(CALLBACKS["random"](), epochs=20, minibatches=1, lr=0.0)  # each optimizer step chooses anew
    flat = {(i, *token) for step in again for i, part in enumerate(step) for token in part}
    assert len({str(step) for step in again}) > 15
    assert len(flat) > 0.8 * sum(map(len, every))


def test_nothing_is_chosen_where_nothing_qualifies():
    assert not any(part for step in chosen(ClipCov(low=50.0, high=60.0)) for part in step)
    assert sum(len(part) for step in chosen(ClipCov(1e-9, low=0.0, high=60.0)) for part in step) == 4  # one a minibatch
    module, twin = (policy(**SETTINGS) for _ in range(2))
    trainer(callbacks=[ClipCov(low=50.0, high=60.0)]).fit(module, Letters())
    trainer().fit(twin, Letters())
    assert torch.equal(weights(module), weights(twin))


@pytest.mark.parametrize("name", ["random", "kl"])
def test_resume_is_exact(name):
    def run(**kwargs):
        module, log = policy(**SETTINGS), Log()
        saver = ModelCheckpoint("saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = [CALLBACKS[name](), log, saver]
        trainer(max_steps=4, callbacks=callbacks, enable_checkpointing=True).fit(module, Letters(), **kwargs)
        return weights(module), [{k: v for k, v in row.items() if "_cov/" in k} for row in log.rows]

    straight, rows = run()
    resumed, rest = run(ckpt_path="saved/step=2.ckpt")
    assert torch.equal(straight, resumed)
    assert rows[2:] == rest
    assert "entropy_change" in " ".join(rest[0])


def test_what_is_logged():
    class Numbers(RLCallback):
        """The same, from the slices and the model's logits."""

        def __init__(self):
            self.covariances, self.entropies, self.chosen = [], [], []

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.first = True

        def on_minibatch(self, trainer, module, slices):
            logps, advantages, entropies = [], [], []
            with torch.no_grad():
                for x in slices:
                    logits = module.model(x.tokens).logits[:, :-1].log_softmax(-1)
                    mask = x.mask[:, 1:]
                    logps.append(logits.gather(-1, x.tokens[:, 1:, None])[..., 0][mask])
                    advantages.append(x.advantages[x.mask])
                    entropies.append(-(logits.exp() * logits).sum(-1)[mask])
            both = torch.stack([torch.cat(logps), torch.cat(advantages)])
            self.covariances.append((float(torch.cov(both, correction=0)[0, 1]), both.shape[1]))
            if self.first:
                self.entropies.append(float(torch.cat(entropies).mean()))
            self.first = False

    numbers, log = Numbers(), Log()
    trainer(max_steps=3, callbacks=[numbers, ClipCov(1.0, low=0.1, high=1.5), log]).fit(policy(**SETTINGS), Letters())
    for step, row in enumerate(log.rows):
        pairs = numbers.covariances[4 * step : 4 * step + 4]
        mean = sum(c * n for c, n in pairs) / sum(n for _, n in pairs)
        assert row["clip_cov/covariance"] == pytest.approx(mean, rel=1e-3)
        assert 0 < row["clip_cov/selected"] < 1
        if step:
            change = numbers.entropies[step] - numbers.entropies[step - 1]
            assert row["clip_cov/entropy_change"] == pytest.approx(change, rel=1e-3)
            before = numbers.covariances[4 * step - 4 : 4 * step]
            assert row["clip_cov/entropy_change_predicted"] == pytest.approx(
                -1e-3 * sum(c for c, _ in before), rel=1e-3
            )
    assert "clip_cov/entropy_change" not in log.rows[0]


@pytest.mark.parametrize(
    "settings", [dict(objective="cispo"), dict(ratio="sequence"), dict(objective="reinforce"), dict(entropy_coef=0.1)]
)
def test_any_rollout_will_do(settings):
    """The policy gradient of a chosen token is cut whatever the objective, and nothing else."""
    both = gradients(ClipCov(1.0, low=-99.0, high=99.0), **settings), gradients(**settings)
    for got, want in zip(*both, strict=True):
        assert want.norm() > 0
        assert (got.norm() > 0) == ("entropy_coef" in settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClipCov(0.0), "ratio is 0.0: it must be a fraction above 0"),
        (lambda: KLCov(2), "ratio is 2: .* not percent: 0.2 % is 0.002"),
        (lambda: ClipCov(low=5.0, high=1.0), "low is 5.0: it must be below high, which is 1.0"),
        (lambda: KLCov(coef=0.0), "coef is 0.0: it must be above 0"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_it_needs_advantages_and_kl_cov_more_than_one_step():
    with pytest.raises(ValueError, match="ClipCov does not work with SFT: likelihood has no advantages"):
        trainer(callbacks=[ClipCov()]).fit(SFT("tiny"), Letters())
    module, twin = policy(), policy()
    with pytest.warns(UserWarning, match="KLCov does nothing with one optimizer step a batch: set"):
        trainer(callbacks=[KLCov(0.5)]).fit(module, Letters())
    trainer().fit(twin, Letters())
    assert torch.equal(weights(module), weights(twin))


def test_entropy_lasts():
    """The paper's claim, on a toy: a fifth of the tokens held back, and twice the entropy is left."""

    def left(*callbacks):
        log = Log()
        module = policy(**SETTINGS | dict(clip_high=math.inf, group=8, lr=1e-4, epochs=1, minibatches=4))
        trainer(max_steps=8, callbacks=[EntropyMonitor(), *callbacks, log]).fit(module, Vowels(batch_size=8))
        return log.rows[-1]["entropy"]

    plain = left()
    assert left(KLCov(0.2)) > 2 * plain
    assert left(ClipCov(0.2, low=0.3)) > 2 * plain
