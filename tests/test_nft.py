"""NFT on-policy against the policy gradients that the paper proves it equal to."""

import math

import pytest
import torch
from test_policy import Gradients, Letters, policy, trainer, weights

from lit_rl import NFT, RFT, DrGRPO, RLCallback
from lit_rl.objectives import nft
from lit_rl.rollout import Rollout

ALTERNATE = dict(score=lambda text: float(len(text) > 0 and ord(text[0]) % 2))


def test_large_ratios_keep_their_bound_in_single_precision():
    ratio = torch.tensor([[10.0, 30.0, -30.0]], requires_grad=True)
    result = nft(ratio, -torch.ones(1, 3), torch.tensor([0.98]), 0.01)
    assert result.loss[0, :2].tolist() == pytest.approx([0.02 / 0.98 * -math.log(0.01) * 1] * 2, rel=1e-4)
    assert result.clipped.tolist() == [[False, True, False]]
    gradient = torch.autograd.grad(result.loss.sum(), ratio)[0]
    assert gradient.isfinite().all()
    assert gradient[0, 0] > 0 == gradient[0, 1]


# ------------------------------------------------------------------------------------------------- in a training run


def first_gradients(method, **settings):
    recorder = Gradients()
    data = settings.pop("data", Letters(**ALTERNATE))
    trainer(max_steps=1, callbacks=[recorder]).fit(policy(method, **{"dynamic_sampling": False, **settings}), data)
    return recorder.seen


def close(a, b, limit=1e-5):
    assert b.norm() > 0
    return (a - b).norm() / b.norm() < limit


@pytest.mark.parametrize("old_logps", ["auto", "recompute"])
def test_on_policy_it_is_dr_grpo(old_logps):
    (ours,), (theirs,) = (first_gradients(m, old_logps=old_logps) for m in (NFT, DrGRPO))
    assert close(ours, theirs)


def test_on_policy_the_other_weight_is_grpo_with_the_population_deviation():
    """grpo divides by the sample deviation, whence its constant; and by 1e-6 more."""
    (ours,) = first_gradients(NFT, advantage="grpo")
    (theirs,) = first_gradients(Rollout, advantage="grpo", aggregate="constant")
    assert close(ours, theirs)

    class Population(RLCallback):
        def on_advantage(self, trainer, module, x):
            for g in range(len(x.tasks)):
                rows = x.group == g
                rewards = x.rewards[rows]
                x.advantages[rows] = (
                    (rewards - rewards.mean())[:, None] / (rewards.std(correction=0) + 1e-12) * x.mask[rows]
                )

    recorder = Gradients()
    module = policy(Rollout, aggregate="constant")
    trainer(max_steps=1, callbacks=[Population(), recorder]).fit(module, Letters(**ALTERNATE))
    assert close(ours, recorder.seen[0] * math.sqrt(3 / 4))


def test_off_policy_it_differs():
    ours, theirs = (first_gradients(m, epochs=3) for m in (NFT, DrGRPO))
    assert close(ours[0], theirs[0])
    assert not close(ours[1], theirs[1], 0.02)


@pytest.mark.parametrize("settings", [dict(), dict(epsilon=0.1, neg_weight=0.5, advantage="grpo")])
@pytest.mark.parametrize("method", [NFT, RFT])
def test_the_gradient_does_not_depend_on_the_split(method, settings):
    if method is RFT and settings:
        pytest.skip("RFT has none of these")
    steps = dict(epochs=2, minibatches=2, **settings)
    whole = first_gradients(method, **steps)
    assert len(whole) == 4
    for tokens in (1, 30):
        for step, (got, want) in enumerate(
            zip(first_gradients(method, microbatch_tokens=tokens, **steps), whole, strict=True)
        ):
            assert close(got, want, 2e-5 if step == 0 else 1e-3)


@pytest.mark.parametrize("method", [NFT, RFT])
def test_rewards_of_minus_one_and_one_are_those_of_zero_and_one(method):
    signed = Letters(score=lambda text: 2 * ALTERNATE["score"](text) - 1)
    for a, b in zip(first_gradients(method, epochs=2), first_gradients(method, epochs=2, data=signed), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", [NFT, RFT])
@pytest.mark.parametrize("right", [0.0, 1.0])
def test_groups_all_right_or_all_wrong_give_nothing(method, right):
    module = policy(method, dynamic_sampling=False)
    before = weights(module).clone()
    trainer().fit(module, Letters(score=lambda text: right))
    assert torch.equal(before, weights(module))
    assert module.counts["skipped/no_signal"] == 1


def test_rft_imitates_right_answers_alone():
    """Its gradient is that of the mean negative log-likelihood of the right answers of groups with both kinds."""

    class Imitate(RLCallback):
        def on_minibatch(self, trainer, module, slices):
            total = 0.0
            for x in slices:
                logps = module.model(x.tokens).logits[:, :-1].log_softmax(-1)
                taken = logps.gather(-1, x.tokens[:, 1:, None])[..., 0]
                assert (x.rewards == 1).all()  # no wrong answer is run through the model
                total = total - (taken * x.mask[:, 1:]).sum()
            loss = total / (16 * 6)
            self.want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.model.parameters()))])

    imitate, recorder = Imitate(), Gradients()
    trainer(max_steps=1, callbacks=[imitate, recorder]).fit(policy(RFT, dynamic_sampling=False), Letters(**ALTERNATE))
    assert close(recorder.seen[0], imitate.want)
    (whole,), (half,) = first_gradients(NFT), first_gradients(NFT, neg_weight=0.0)
    assert not close(whole, half, 0.1)


def partly(text):
    """0, 0.25, ... 1, and below and above."""
    return (ord(text[0]) % 7 - 1) / 4 if text else 0.0


def test_rewards_between_count_by_their_distance_from_the_mean():
    class See(RLCallback):
        def on_advantage(self, trainer, module, x):
            self.x = x

    see, recorder, bounded = See(), Gradients(), Letters(score=lambda text: min(1.0, max(0.0, partly(text))))
    module = policy(NFT, dynamic_sampling=False)
    trainer(max_steps=1, callbacks=[see, recorder]).fit(module, Letters(score=partly))
    x, raw = see.x, torch.tensor([v.score for v in see.x.verdicts])
    assert {-0.25, 0.25, 1.25} < set(raw.tolist())
    assert torch.equal(x.rewards, raw.clamp(0, 1))
    for g in range(4):
        assert torch.allclose(x.extra["rate"][x.group == g], x.rewards[x.group == g].mean())
    (want,) = first_gradients(DrGRPO, data=bounded)
    assert close(recorder.seen[0], want)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(group=1, dynamic_sampling=False), "group is 1: it must be at least 2"),
        (dict(epsilon=0.0), "epsilon is 0.0: it must be above 0 and at most 1"),
        (dict(neg_weight=-1.0), "neg_weight is -1.0: it must be at least 0"),
        (dict(overlong_buffer=0.2), "overlong_buffer is 0.2: it must be 0: NFT knows right and wrong alone"),
        (dict(kl_in_reward=True, kl_coef=0.1), "kl_in_reward is True: it must be false"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        policy(NFT, **settings)
