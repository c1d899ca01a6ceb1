"""The checks of reference vectors that belong to a paper's callback or method. tests/test_vectors.py calls them."""

import math

import pytest
import torch
from torch import Tensor
from vector_checks import Check, Unanswered, assert_close, guard, tensor

from lit_rl import ranks
from lit_rl.advantage import dr_grpo
from lit_rl.callbacks import ClipCov, KLCov
from lit_rl.callbacks.covariance import Covariance, covariance, penalty
from lit_rl.entropy_law import fit
from lit_rl.objectives import log_ratio, nft, ppo, token_weights

# ------------------------------------------------------------------------------------------------ Clip-Cov and KL-Cov


def batch(case: dict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mask, log-probs (with gradient), old log-probs and advantages of a case, or of an example by hand."""
    given = case.get("inputs", case)
    names = ("log_prob", "old_log_prob", "advantages") if "inputs" in case else ("log_prob", "old", "adv")
    logps, old, advantages = (tensor(given[name]) for name in names)
    mask = tensor(given["response_mask"]).bool() if "inputs" in case else torch.ones_like(logps, dtype=torch.bool)
    return mask, logps.requires_grad_(), old, advantages


def choose(
    callback: Covariance, mask: Tensor, logps: Tensor, advantages: Tensor, clipped: Tensor, drawn: Tensor
) -> Tensor:
    """(B, T) bool: what the callback treats after the first optimizer step of a batch."""
    c, n = covariance(logps.detach()[mask], advantages[mask])
    callback._updates = 1
    keys = callback.priority(c, clipped[mask], lambda: drawn[mask])
    return torch.zeros_like(mask).masked_scatter(mask, ranks.largest(keys, max(1, int(callback.ratio * n))))


def loss_and_gradient(loss: Tensor, logps: Tensor, expected: dict) -> None:
    assert_close(loss, expected["loss"])
    assert_close(torch.autograd.grad(loss, logps)[0], expected.get("grad_log_prob", expected.get("grad")))


def clip_cov(case: dict, _: str) -> None:
    mask, logps, old, advantages = batch(case)
    p = case.get("params") or dict(clip_cov_ratio=case["ratio"], clip_cov_lb=case["lb"], clip_cov_ub=case["ub"])
    expected, n = case.get("expected_official", case), int(mask.sum())
    clip = p.get("clip_ratio_low", 1.0), p.get("clip_ratio_high", 1.0)
    low, high = p["clip_cov_lb"], p["clip_cov_ub"]
    ratio = log_ratio(logps, old, mask)
    clipped = ppo(ratio, advantages, *clip).clipped
    if "cov" in expected:
        wanted = tensor(expected["cov"])[mask]  # -inf where clipped
        assert torch.equal(wanted == -math.inf, clipped[mask])
        c, _n = covariance(logps.detach()[mask], advantages[mask])
        assert_close(c[~clipped[mask]], wanted[~clipped[mask]], atol=3e-8)  # they divide by n + 1e-8
    drawn = torch.zeros(mask.shape, dtype=torch.float64)
    for row, column in expected["selected"]:  # the authors' random choice
        drawn[row, column] = 1
    selected = choose(ClipCov(p["clip_cov_ratio"], low, high), mask, logps, advantages, clipped, drawn)
    assert selected.nonzero().tolist() == expected["selected"]
    candidates = choose(ClipCov(1.0, low, high), mask, logps, advantages, clipped, drawn)
    assert candidates.nonzero().tolist() == expected["candidates"]
    loss = ppo(ratio, advantages.masked_fill(selected, 0.0), *clip).loss  # as `treat` does
    if p.get("loss_agg_mode", "token-mean") != "token-mean":
        raise Unanswered(p["loss_agg_mode"])
    loss_and_gradient((loss * token_weights(mask.double(), "token")).sum() * n / (n + 1e-8), logps, expected)


def kl_cov(case: dict, _: str) -> None:
    mask, logps, old, advantages = batch(case)
    n, hand = int(mask.sum()), "inputs" not in case
    p = case.get("params") or dict(k_percent=25.0, k_fraction=0.25, ppo_kl_coef=case["beta"])
    if not advantages.any():
        return  # all tie, and the authors choose some; a row without advantage never gets to the callback
    callback = KLCov(p["k_fraction"], p["ppo_kl_coef"])
    selected = choose(callback, mask, logps, advantages, torch.zeros_like(mask), mask)
    loss = ppo(log_ratio(logps, old, mask), advantages, 1.0, math.inf).loss  # as the recipe: no clip
    loss = loss + callback.coef * penalty(logps, old, mask, selected)
    expected = case if hand else case["expected_official"]
    official = p["k_percent"] <= n or hand or torch.equal(logps, old)  # else they take a percentage for a count
    if official and "selected" in expected:
        assert selected.nonzero().tolist() == sorted(expected["selected"])
    if hand:
        c, _n = covariance(logps.detach().flatten(), advantages.flatten())
        assert_close(c, tensor(case["token_cov"]).flatten())
        assert_close(loss, case["per_token_loss"])
    mode = p.get("loss_agg_mode", "token-mean")
    if mode == "token-mean" and official:
        loss_and_gradient((loss * token_weights(mask.double(), "token")).sum() * n / (n + 1e-8), logps, expected)
    elif mode in ("token-mean", "seq-mean-token-mean"):  # the authors' mean over rows is NaN where one is empty
        weights = token_weights(mask.double(), "token" if mode == "token-mean" else "sequence")
        weights = weights if mode == "token-mean" else weights * guard(mask.double())
        loss_and_gradient((loss * weights).sum(), logps, case["expected_verl_0_9_1"])
    else:
        raise Unanswered(mode)


def token_covariance(case: dict, name: str) -> None:
    if name not in ("token_cov", "mean", "cov_population"):
        raise Unanswered("its keys")
    mask = tensor(case["response_mask"]).bool()
    c, _ = covariance(tensor(case["log_prob"])[mask], tensor(case["advantages"])[mask])
    expected = tensor(case["expected"][name])
    if name == "token_cov":
        assert_close(c, expected[mask])
    else:  # mean and cov_population
        assert_close(c.mean(), expected)


def tabular_entropy(case: dict, name: str) -> None:
    """Theorems 1 and 2 at one softmax, each action drawn as often as its probability says."""
    logits, advantages, eta = tensor(case["logits"]), tensor(case["advantage_centered"]), case["eta"]
    draws = (logits.softmax(0) * 10**6).round().long()
    logps = logits.log_softmax(0)
    natural, plain = (
        float(covariance(logps.repeat_interleave(draws), a.repeat_interleave(draws))[0].mean())
        for a in (advantages, logps.exp() * advantages)
    )
    ours = {
        "entropy": float(-(logps.exp() * logps).sum()),
        "cov_logp_A": natural,
        "pred_dH_npg": -eta * natural,
        "actual_dH_npg": -eta * natural,
        "cov_logp_pA": plain,
        "pred_dH_pg": -eta * plain,
        "actual_dH_pg": -eta * plain,
        "cov_logit_change_pg": eta * plain,
    }
    if name not in ours:
        raise Unanswered(name)
    assert ours[name] == pytest.approx(case["expected"][name], rel=5e-3, abs=1e-10)


# ----------------------------------------------------------------------------------------------------- the entropy law


def entropy_law(case: dict, name: str) -> None:
    points = list(zip(case["H"], case["R"], strict=True))
    expected = case["expected"]
    law, prefix = fit(points), fit(points[: expected["prefix_points"]])
    rest = points[expected["prefix_points"] :]
    error = [prefix(h) - r for h, r in rest]
    mean = sum(case["R"]) / len(points)
    squares = sum((law(h) - r) ** 2 for h, r in points)
    ours = {
        "a": law.a,
        "b": law.b,
        "rmse": law.deviation * math.sqrt(1 - 2 / len(points)),
        "r2": 1 - squares / sum((r - mean) ** 2 for _, r in points),
        "ceiling_at_H0": law.ceiling,
        "slope_at_first": -law.a * math.exp(case["H"][0]),
        "prefix_points": prefix.points,
        "prefix_a": prefix.a,
        "prefix_b": prefix.b,
        "prefix_predict_rmse": math.sqrt(sum(e**2 for e in error) / len(error)),
        "prefix_final_abs_err": abs(error[-1]),
    }
    if name not in ours:
        raise Unanswered(name)
    assert ours[name] == pytest.approx(expected[name], abs=1e-9)


# ----------------------------------------------------------------------------------------------------------------- NFT


def nft_loss(
    logps: Tensor, old: Tensor, correct: Tensor, rate: Tensor, how: int, negative: float, epsilon: float
) -> Tensor:
    """The authors' loss a token, from ours."""
    q = rate.clamp(0.02, 0.98)
    weight = {0: torch.ones_like(q), 1: 1 - q, 2: ((1 - q) / q).sqrt()}[how]
    advantages = weight * torch.where(correct > 0, 1.0, -negative * q / (1 - q))
    ratio = log_ratio(logps, old, torch.ones_like(logps))
    return nft(ratio, advantages[:, None].expand_as(logps), rate, epsilon).loss


def nft_case(case: dict, _: str) -> None:
    given, p, expected = {k: tensor(v) for k, v in case["inputs"].items()}, case["params"], case["expected_official"]
    logps, old, mask = given["log_prob"].requires_grad_(), given["old_log_prob"], given["response_mask"]
    correct, rate = given["correct_mask"], given["correct_rate"]
    if p["ratio_type"] != "token":
        raise Unanswered("the ratio of a sequence, whose code fails but for normalize=0")
    if "error" in expected:  # all right or all wrong: they stop, ours gives no gradient
        assert ((rate == 0) | (rate == 1)).all()
        advantages = dr_grpo(correct, torch.zeros(len(mask), dtype=torch.long), mask)
        loss = nft(log_ratio(logps, old, mask), advantages, rate, p["clamp_negative"]).loss
        assert not loss.any()
        assert not torch.autograd.grad(loss.sum(), logps)[0].any()
        return
    loss = nft_loss(logps, old, correct, rate, p["normalize"], p["neg_weight"], p["clamp_negative"])
    assert_close(loss, expected["per_token_or_seq_loss"])
    loss_and_gradient((loss * mask).sum() / 1000, logps, expected)


def nft_by_hand(case: dict, _: str) -> None:
    case = {"log_prob": [[-0.1, -2.0], [-0.5, -1.0]], "correct": [1, 0], "r": 0.25, "eps": 1.0, "normalize": 1, **case}
    logps, correct = tensor(case["log_prob"]).requires_grad_(), tensor(case["correct"])
    rate = torch.full_like(correct, case["r"])
    loss = nft_loss(logps, tensor(case["old"]), correct, rate, case["normalize"], 1.0, case["eps"])
    assert_close(loss, case["per_token"])
    loss_and_gradient(loss.sum() / 1000, logps, case)


def nft_on_policy(case: dict, _: str) -> None:
    """The gradient is minus the advantage: that of Dr. GRPO, or of GRPO with the population's standard deviation."""
    how = {"drgrpo": 1, "grpo_pop": 2}[case["name"]]
    logps, correct = torch.tensor([[-1.0], [-2.0]], dtype=torch.float64, requires_grad=True), tensor([1, 0])
    rate = torch.full_like(correct, case["correct_rate"])
    loss = nft_loss(logps, logps.detach(), correct, rate, how, 1.0, 1.0)
    gradient = torch.autograd.grad(loss.sum() / 1000, logps)[0].flatten()
    assert_close(gradient, [case["positive_token_grad"], case["negative_token_grad"]])
    advantages = case["drgrpo_adv" if how == 1 else "grpo_population_std_adv"]
    assert_close(-1000 * gradient, [advantages["pos"], advantages["neg"]])


CHECKS: list[tuple[set[str], Check]] = [
    ({"clip_cov_ratio"}, clip_cov),
    ({"clip_cov", "lb", "ub"}, clip_cov),
    ({"k_percent"}, kl_cov),
    ({"kl_cov", "token_cov"}, kl_cov),
    ({"clamp_negative", "neg_weight"}, nft_case),
    ({"nft", "eps"}, nft_by_hand),
    ({"nft_neg_ratio_below_1"}, nft_by_hand),
    ({"positive_token_grad"}, nft_on_policy),
    ({"H", "R"}, entropy_law),
    ({"advantage_centered", "eta"}, tabular_entropy),
    ({"log_prob", "advantages", "response_mask"}, token_covariance),  # the last: others have these columns too
]
"""As in vector_checks."""
