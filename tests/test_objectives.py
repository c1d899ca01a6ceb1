"""Every objective against the reference vectors, value and gradient, and what must hold for any log-probs."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_rl.objectives import (
    Objective,
    cispo,
    dppo,
    dro,
    gmpo,
    kl,
    log_ratio,
    overlong_penalty,
    ppo,
    sapo,
    token_weights,
    truncated_importance,
)

VECTORS = Path(os.environ.get("LIT_RL_VECTORS", Path(__file__).parent / "vectors"))
FILES = {path.stem: json.loads(path.read_text()) for path in sorted(VECTORS.glob("*.json"))}
OURS = {"policy_losses", "aggregation", "misc_knobs", "hand_examples"}
CASES = [(stem, case) for stem, data in FILES.items() for case in data.get("cases", [])]


def tensor(values: list | float) -> Tensor:
    return torch.tensor(json.loads(json.dumps(values).replace('"nan"', "NaN")), dtype=torch.float64)


def assert_close(actual: Tensor, expected: list | float, atol: float = 1e-9) -> None:
    """Where the reference is NaN, ours must be a number."""
    wanted = tensor(expected)
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, torch.where(wanted.isnan(), actual, wanted), rtol=0, atol=atol)


def find(*keys: str) -> list:
    """The cases, in any file, that have these keys."""
    return [pytest.param(case, id=f"{stem}:{case['name']}") for stem, case in CASES if set(keys) <= case.keys()]


def test_there_are_vectors() -> None:
    assert FILES, f"no vectors in {VECTORS}"


@pytest.mark.parametrize("stem", FILES)
def test_every_case_is_handled(stem: str) -> None:
    shapes = ("inputs", "params"), ("loss_mat", "mask"), ("train_minus_rollout_logprob",), ("lengths", "params")
    handled = {param.id for keys in shapes for param in find(*keys)} | {"misc_knobs:group_filter"}  # that is a callback
    left = {f"{s}:{case['name']}" for s, case in CASES if s == stem} - handled
    if left and stem not in OURS:
        pytest.skip("not about objectives")
    assert not left, "cases of a form that is not known here"


# ---------------------------------------------------------------------------------------------- the vectors: losses


def objective(variant: str, p: dict, logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Objective:
    """The objective that the vectors call `variant`."""
    ratio = log_ratio(logps, old, mask, "sequence" if variant == "gspo" else "token")
    low, high = p.get("clip_ratio_low", 0.2), p.get("clip_ratio_high", 0.2)  # verl's defaults
    if variant.startswith("vanilla"):
        return ppo(ratio, advantages, low, high, dual_clip=p.get("clip_ratio_c", 3.0))
    if variant in ("gspo", "entropy_repo_vanilla"):
        return ppo(ratio, advantages, low, high)
    if variant == "cispo":
        return cispo(ratio, logps, advantages, mask, cap=1 + high, floor=1 - low)
    if variant == "sapo":
        return sapo(ratio, advantages, p.get("tau_pos", 1.0), p.get("tau_neg", 1.05))
    if variant == "gmpo":
        return gmpo(ratio, advantages * guard(mask), mask, low, high)  # verl takes a masked mean of the advantages
    if variant in ("dppo_tv", "dppo_kl"):
        return dppo(ratio, logps, old, advantages, mask, low, high, variant[-2:], p.get("clip_ratio_c", 20.0))  # type: ignore[arg-type]
    if variant == "dro":
        return dro(ratio, logps, advantages, mask, p["dro_beta"])
    pytest.fail(f"the vectors have the variant {variant!r}, which no objective answers to")


def guard(mask: Tensor) -> Tensor:
    """The references divide a row by its tokens + 1e-8, we by its tokens."""
    n = mask.sum(-1, keepdim=True)
    return n / (n + 1e-8)


@pytest.mark.parametrize("case", find("inputs", "params"))
def test_policy_losses(case: dict) -> None:
    params = case["params"]
    if "variant" not in params:
        pytest.skip("a method with a file of its own, tested beside it")
    inputs = {key: tensor(value) for key, value in case["inputs"].items()}
    logps, mask = inputs["log_prob"].requires_grad_(), inputs["response_mask"]
    variant = params["variant"]
    result = objective(variant, params, logps, inputs["old_log_prob"], inputs["advantages"], mask)

    mode, empty = params["loss_agg_mode"], (mask.sum(-1) == 0).sum()
    if variant == "gmpo":  # verl ignores the mode and means over all rows, empty ones too
        weights = token_weights(mask, "sequence") * (len(mask) - empty) / len(mask)
    else:
        version = "entropy_repo" if "expected_official" in case else "verl_0_9_1"
        weights = reference_weights(mask)[f"{version}/{mode}"]
    loss = (result.loss * weights).sum()
    expected = case.get("expected_verl_0_9_1") or case["expected_official"]
    assert_close(loss, expected["loss"])
    assert_close(torch.autograd.grad(loss, logps)[0], expected["grad_log_prob"])

    metrics = expected.get("metrics", expected)
    share = (result.clipped * mask).sum() / (mask.sum() + 1e-8)
    if variant == "gmpo":  # verl counts every token outside the range, we those whose gradient is cut
        assert share <= metrics["actor/pg_clipfrac"] + metrics["actor/pg_clipfrac_lower"]
    elif variant.startswith("dppo"):  # its pg_clipfrac_lower counts capped ratios, which pass gradient
        assert_close(share, metrics["actor/pg_clipfrac"])
    else:
        clipped = [value for key, value in metrics.items() if "clipfrac" in key]
        assert_close(share, sum(clipped))


@pytest.mark.skipif("hand_examples" not in FILES, reason="no hand_examples.json")
def test_hand_example() -> None:
    given_, expected = FILES["hand_examples"]["kl_cov"], FILES["hand_examples"]["grpo_clip_higher"]
    logps, old, advantages = (tensor(given_[key]) for key in ("log_prob", "old", "adv"))
    mask = torch.ones_like(logps)
    logps.requires_grad_()
    loss = (ppo(log_ratio(logps, old, mask), advantages, 0.2, 0.28).loss * token_weights(mask, "token")).sum()
    assert_close(loss * 4 / (4 + 1e-8), expected["loss"])
    assert_close(torch.autograd.grad(loss, logps)[0] * 4 / (4 + 1e-8), expected["grad"])


# ----------------------------------------------------------------------------------- the vectors: weights and others


def reference_weights(mask: Tensor) -> dict[str, Tensor]:
    """The libraries' aggregations in terms of ours. Where they differ it is by a 1e-8 or by counting empty rows."""
    tokens, rows, width = mask.sum(), len(mask), mask.shape[1]
    full = (mask.sum(-1) > 0).sum()  # rows with tokens
    token, sequence = token_weights(mask, "token"), token_weights(mask, "sequence")
    total, norm = token_weights(mask, "constant", 1), token_weights(mask, "constant", width)
    return {
        "verl_0_9_1/token-mean": token,
        "verl_0_9_1/seq-mean-token-mean": sequence * guard(mask),
        "verl_0_9_1/seq-mean-token-sum": total,
        "verl_0_9_1/seq-mean-token-sum-norm": norm,
        "entropy_repo/token-mean": token * tokens / (tokens + 1e-8),
        "entropy_repo/seq-mean-token-mean": sequence,
        "entropy_repo/seq-mean-token-sum": total * full / rows,
        "entropy_repo/seq-mean-token-sum-norm": norm * full,
        "trl/bnpo": token,
        "trl/grpo": sequence * full / rows,
        "trl/dr_grpo": total * full / rows,
        "luffy/remove_token_mean": norm * full,  # a sum over rows
        "nft/sum_div_1000": token_weights(mask, "constant", 1000) * full,
    }


@pytest.mark.parametrize("case", find("loss_mat", "mask"))
def test_aggregation(case: dict) -> None:
    loss, mask = tensor(case["loss_mat"]), tensor(case["mask"])
    for name, expected in case["expected"].items():
        limit = re.fullmatch(r"(.+)\(max_completion_length=(\d+)\)", name)
        known, divisor = (limit[1], int(limit[2])) if limit else (name, 1)
        weights = reference_weights(mask)
        assert known in weights, f"the vectors have the aggregation {name!r}, which is not known here"
        assert_close((loss * weights[known]).sum() / divisor, expected)


@pytest.mark.parametrize("case", find("train_minus_rollout_logprob"))
def test_truncated_importance(case: dict) -> None:
    difference, mask = tensor(case["train_minus_rollout_logprob"]), tensor(case["response_mask"])
    for name, expected in case["expected"].items():
        verl = re.fullmatch(r"(token|sequence)\|(?:([\d.]+)_)?([\d.]+)\|batch_norm=(True|False)", name)
        trl = re.fullmatch(r"trl/(token|sequence)_(truncate|mask)\(([\d.]+)\)", name)
        assert verl or trl, f"the vectors have the importance weights {name!r}, which are not known here"
        if verl:
            level, low, cap, norm = verl.groups()
            floor, mode = (float(low), "mask") if low else (None, "truncate")
        elif trl:
            (level, mode, cap), floor, norm = trl.groups(), None, "False"
        w = truncated_importance(difference, torch.zeros_like(mask), mask, level, float(cap), floor, mode)  # type: ignore[arg-type]
        if norm == "True":
            w = w / (w * token_weights(mask, level)).sum()  # type: ignore[arg-type]
        assert_close(w, (tensor(expected) * mask).tolist(), atol=2e-8 if norm == "True" else 1e-9)  # verl's + 1e-8


@pytest.mark.parametrize("case", find("lengths", "params"))
def test_overlong_penalty(case: dict) -> None:
    p = case["params"]
    penalty = overlong_penalty(tensor(case["lengths"]), p["max_resp_len"], p["buffer"], p["penalty_factor"])
    assert_close(penalty, case["expected"])
    with pytest.raises(ValueError, match="buffer is 0"):
        overlong_penalty(torch.tensor([3]), 10, 0)


# ------------------------------------------------------------------------------------------------------- properties

EVERY = {
    "ppo": lambda lp, old, a, m: ppo(log_ratio(lp, old, m), a, 0.2, 0.28, 3.0).loss,
    "gspo": lambda lp, old, a, m: ppo(log_ratio(lp, old, m, "sequence"), a, 0.9, 9.0).loss,
    "cispo": lambda lp, old, a, m: cispo(log_ratio(lp, old, m), lp, a, m, 5.0).loss,
    "sapo": lambda lp, old, a, m: sapo(log_ratio(lp, old, m), a).loss,
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


@pytest.mark.parametrize("name", ["ppo", "gspo", "cispo", "sapo", "gmpo", "dppo_tv", "dppo_kl", "dro"])
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
