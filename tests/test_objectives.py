"""What must hold of every objective for any log-probs; tests/test_vectors.py compares them with reference values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_rl.objectives import (
    cispo,
    dppo,
    dro,
    gmpo,
    kl,
    log_ratio,
    ppo,
    sapo,
    token_weights,
    truncated_importance,
    vespo,
)


def tensor(values: list | float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_close(actual: Tensor, expected: list) -> None:
    torch.testing.assert_close(actual, tensor(expected), rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------------------------- properties

EVERY = {
    "ppo": lambda lp, old, a, m: ppo(log_ratio(lp, old, m), a, 0.2, 0.28, 3.0).loss,
    "gspo": lambda lp, old, a, m: ppo(log_ratio(lp, old, m, "sequence"), a, 0.9, 9.0).loss,
    "cispo": lambda lp, old, a, m: cispo(log_ratio(lp, old, m), lp, a, m, 5.0).loss,
    "sapo": lambda lp, old, a, m: sapo(log_ratio(lp, old, m), a).loss,
    "vespo": lambda lp, old, a, m: vespo(log_ratio(lp, old, m), lp, a, m).loss,
    "gmpo": lambda lp, old, a, m: gmpo(log_ratio(lp, old, m), a, m, 0.4, 0.4).loss,
    "dppo_tv": lambda lp, old, a, m: dppo(log_ratio(lp, old, m), lp, old, a, m, 0.15, 0.15).loss,
    "dppo_kl": lambda lp, old, a, m: dppo(log_ratio(lp, old, m), lp, old, a, m, 0.05, 0.05, "kl").loss,
    "dro": lambda lp, old, a, m: dro(log_ratio(lp, old, m), lp, a, m, 0.1).loss,
    "k1": lambda lp, old, a, m: kl(lp, old, m, "k1"),
    "k2": lambda lp, old, a, m: kl(lp, old, m, "k2"),
    "k3": lambda lp, old, a, m: kl(lp, old, m, "k3"),
    "k3+": lambda lp, old, a, m: kl(lp, old, m, "k3+"),
}
quick = settings(max_examples=40, deadline=None)


def random_batch(seed: int, n: int = 4, t: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, old log-probs, advantages, and a bool mask whose last row is empty."""
    g = torch.Generator().manual_seed(seed)
    logps = -4 * torch.rand(n, t, generator=g, dtype=torch.float64)
    old = (logps + torch.randn(n, t, generator=g, dtype=torch.float64)).clamp(max=0)
    advantages = torch.randn(n, 1, generator=g, dtype=torch.float64).expand(n, t)
    lengths = torch.randint(1, t + 1, (n, 1), generator=g)
    lengths[-1] = 0
    return logps, old, advantages, torch.arange(t) < lengths


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("garbage", [-math.inf, math.inf, math.nan, -1e30])
def test_garbage_outside_the_mask_touches_nothing(name: str, dtype: torch.dtype, garbage: float) -> None:
    logps, old, advantages, mask = random_batch(1)
    results = []
    for bad_logps, bad_old in ((0.0, 0.0), (garbage, -1.0), (-1.0, garbage), (garbage, garbage)):
        x = torch.where(mask, logps, bad_logps).to(dtype).requires_grad_()
        loss = EVERY[name](x, torch.where(mask, old, bad_old).to(dtype), (advantages * mask).to(dtype), mask)
        assert loss.dtype == dtype
        assert loss.isfinite().all()
        (loss * token_weights(mask, "sequence")).sum().backward()
        assert x.grad is not None
        assert x.grad[mask].any()
        assert not x.grad[~mask].any()
        results.append((loss[mask], x.grad))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)
    weights = truncated_importance(torch.where(mask, old, garbage), torch.where(mask, logps, garbage), mask, "token", 2)
    assert weights.isfinite().all()


@pytest.mark.parametrize("name", ["ppo", "gspo", "cispo", "sapo", "vespo", "gmpo", "dppo_tv", "dppo_kl", "dro"])
@quick
@given(st.integers(0, 10**6))
def test_on_policy_it_is_the_policy_gradient(name: str, seed: int) -> None:
    logps, _, advantages, mask = random_batch(seed)
    x = logps.clone().requires_grad_()
    weights = token_weights(mask.double(), "sequence")
    (EVERY[name](x, logps, advantages, mask) * weights).sum().backward()
    assert x.grad is not None
    assert_close(x.grad, (-advantages * weights).tolist())


@pytest.mark.parametrize("name", ["ppo", "cispo", "sapo", "gmpo", "dppo_tv", "dppo_kl", "dro", "k1", "k2", "k3"])
@quick
@given(st.integers(0, 10**6))
def test_gradients_are_those_of_finite_differences(name: str, seed: int) -> None:
    logps, old, advantages, mask = random_batch(seed, n=2, t=3)
    if name in ("cispo", "dppo_tv", "dppo_kl"):  # the stopped ratio is a constant of the check
        stopped = log_ratio(logps, old, mask)
        extra = (0.15, 0.15) if name == "dppo_tv" else (0.05, 0.05, "kl")
        clipped = dppo(stopped, logps, old, advantages, mask, *extra).clipped if name != "cispo" else mask < 0
        factor = torch.where(clipped, 0.0, -advantages * stopped.exp().clamp(max=5 if name == "cispo" else 20))
        x = logps.clone().requires_grad_()
        grad = torch.autograd.grad(EVERY[name](x, old, advantages, mask).sum(), x)[0]
        torch.testing.assert_close(grad, factor * mask)
    else:
        assert torch.autograd.gradcheck(lambda x: EVERY[name](x, old, advantages, mask), logps.requires_grad_())


@quick
@given(st.integers(0, 10**6))
def test_sequence_ratio(seed: int) -> None:
    logps, old, _, mask = random_batch(seed)
    x = logps.clone().requires_grad_()
    ratio = log_ratio(x, old, mask, "sequence")
    for row, keep in enumerate(mask):
        if keep.any():
            mean = (logps - old)[row, keep].mean()
            torch.testing.assert_close(ratio[row, keep], mean.clamp(max=10).expand(int(keep.sum())))
            assert ratio[row, keep].unique().numel() == 1
    ratio.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, mask.double())


def test_ratios_stay_in_range() -> None:
    low, zero, mask = tensor([[-100.0, -1.0]]), tensor([[0.0, 0.0]]), torch.ones(1, 2)
    assert log_ratio(zero, low, mask).tolist() == [[20.0, 1.0]]
    assert log_ratio(low, zero, mask).tolist() == [[-20.0, -1.0]]
    assert log_ratio(zero, low, mask, "sequence").tolist() == [[10.0, 10.0]]
    assert kl(low, zero, mask, "k3").max() == 10.0


def test_dual_clip_bounds_the_loss_of_a_bad_action() -> None:
    ratio = tensor([[math.log(5.0), math.log(2.0)]]).requires_grad_()
    result = ppo(ratio, tensor([[-2.0, -2.0]]), 0.2, 0.2, dual_clip=3.0)
    torch.testing.assert_close(result.loss.detach(), tensor([[6.0, 4.0]]))
    assert result.clipped.tolist() == [[True, False]]
    assert torch.autograd.grad(result.loss.sum(), ratio)[0][0, 0] == 0


def test_vespo_weighs_sequences() -> None:
    """By w^k e^(lambda (1 - w)), w the product of the ratios: here 2 x 3 / 4 and, where A < 0, 3 / 2; even 0 and infinity."""
    logps, mask = torch.full((4, 3), -1.0, dtype=torch.float64), torch.ones(4, 3)
    mask[1, 2] = 0
    ratios = tensor([[2.0, 3.0, 0.25], [3.0, 0.5, 99.0], [1e9] * 3, [1e-9] * 3])
    result = vespo(log_ratio(logps + ratios.log(), logps, mask), logps, tensor([[2.0], [-2.0], [1.0], [1.0]]), mask)
    good, bad = 1.5**2 * math.exp(3 * (1 - 1.5)), 1.5**3 * math.exp(2 * (1 - 1.5))
    assert_close(result.loss, [[2 * good] * 3, [-2 * bad, -2 * bad, 0.0], [0.0] * 3, [0.0] * 3])


@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_dppo_stops_only_what_moves_further_away(divergence: str) -> None:
    logps, old = tensor([[0.9, 0.1, 0.9, 0.1]]).log(), tensor([[0.5, 0.5, 0.5, 0.5]]).log()
    advantages, mask = tensor([[1.0, 1.0, -1.0, -1.0]]), torch.ones(1, 4)
    ratio = log_ratio(logps, old, mask)
    result = dppo(ratio, logps, old, advantages, mask, 0.15, 0.15, divergence)  # type: ignore[arg-type]
    assert result.clipped.tolist() == [[True, False, False, True]]
    torch.testing.assert_close(result.loss, tensor([[0.0, -0.2 * math.log(0.1), 1.8 * math.log(0.9), 0.0]]))
    capped = dppo(ratio, logps, old, advantages, mask, 0.15, 0.15, divergence, cap=1.5)  # type: ignore[arg-type]
    torch.testing.assert_close(capped.loss[0, 2], tensor(1.5 * math.log(0.9)))


def test_importance_weights_do_not_overflow() -> None:
    old, mask = tensor([[-1.0, -2.0]]), torch.tensor([[1, 1]])
    for sampler, expected in ((old - 500, math.exp(20)), (old + 500, math.exp(-20))):
        for level in ("token", "sequence"):
            weights = truncated_importance(old, sampler, mask, level, cap=1e10)  # type: ignore[arg-type]
            torch.testing.assert_close(weights, tensor([[expected, expected]]))


def test_kl_estimators() -> None:
    logps, ref, mask = tensor([[-1.0, -2.0]]), tensor([[-1.5, -1.0]]), torch.ones(1, 2)
    d = ref - logps
    for estimator, value, slope in (
        ("k1", -d, torch.ones_like(d)),
        ("k2", d**2 / 2, -d),
        ("k3", d.exp() - d - 1, 1 - d.exp()),
        ("k3+", d.exp() - d - 1, -d),
    ):
        x = logps.clone().requires_grad_()
        estimate = kl(x, ref, mask, estimator)  # type: ignore[arg-type]
        torch.testing.assert_close(estimate.detach(), value)
        torch.testing.assert_close(torch.autograd.grad(estimate.sum(), x)[0], slope)


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
@quick
@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_token_weights(how: str, n: int, t: int, data: st.DataObject) -> None:
    mask = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=t, max_size=t), min_size=n, max_size=n)))
    weights = token_weights(mask, how, t)  # type: ignore[arg-type]
    assert not weights[~mask].any()
    if not mask.any():
        assert not weights.any()
        return
    rows = weights[mask.any(-1)].sum(-1)
    if how == "constant":
        torch.testing.assert_close(weights[mask], torch.full_like(weights[mask], 1 / (len(rows) * t)))
    else:
        torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
    if how == "sequence":
        torch.testing.assert_close(rows, torch.full_like(rows, 1 / len(rows)))


def test_unknown_names_say_what_is_known() -> None:
    x = torch.zeros(1, 1)
    for call in (
        lambda: log_ratio(x, x, x, "word"),  # type: ignore[arg-type]
        lambda: kl(x, x, x, "k4"),  # type: ignore[arg-type]
        lambda: dppo(x, x, x, x, x, 0.1, 0.1, "js"),  # type: ignore[arg-type]
        lambda: truncated_importance(x, x, x, "word", 2.0),  # type: ignore[arg-type]
        lambda: truncated_importance(x, x, x, "token", 2.0, mode="drop"),  # type: ignore[arg-type]
        lambda: token_weights(x, "mean"),  # type: ignore[arg-type]
        lambda: token_weights(x, "constant"),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()
