"""The checks of reference vectors: one for each form that a case may have. tests/test_vectors.py calls them."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_rl import rounds
from lit_rl.advantage import ADVANTAGES, group_mean
from lit_rl.callbacks import OffPolicyMixing
from lit_rl.experience import build
from lit_rl.objectives import (
    Objective,
    cispo,
    dppo,
    dro,
    gmpo,
    log_ratio,
    overlong_penalty,
    ppo,
    sapo,
    token_weights,
    truncated_importance,
)


def tensor(values: Any) -> Tensor:
    """Of nested lists in which "nan" and "inf" are strings."""
    number = lambda v: [number(x) for x in v] if isinstance(v, list) else float(v)  # noqa: E731
    return torch.tensor(number(values), dtype=torch.float64)


def assert_close(actual: Tensor, expected: Any, atol: float = 1e-9) -> None:
    """Where the reference is NaN, ours must be a number."""
    wanted = expected if isinstance(expected, Tensor) else tensor(expected)
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, torch.where(wanted.isnan(), actual, wanted), rtol=0, atol=atol)


class Unanswered(Exception):
    """A vector asks for a function that is not here."""


def advantage(case: dict, name: str) -> None:
    names = {  # the vectors' name -> ours
        "grpo_std": "grpo",
        "grpo_nostd_drgrpo": "dr_grpo",
        "nft_repo_grpo": "grpo",
        "mixed_group(official LUFFY default, use_std=False)": "dr_grpo",
        "mixed_group use_std=True": "grpo",
    }
    if str(case["expected"][name]).startswith("error"):
        pytest.skip("the reference raises")
    rewards, expected = tensor(case["rewards"]), tensor(case["expected"][name])
    ones = case.get("response_mask") or [[1] * n + [0] * (max(case["lens"]) - n) for n in case["lens"]]
    mask = tensor(ones)
    ids = sorted(set(case["index"]))
    group = torch.tensor([ids.index(i) for i in case["index"]])
    if name == "nft_repo_correct_rate":
        assert_close((group_mean(rewards, group, torch.ones_like(rewards)) + 1) / 2, expected)
        return
    if name.startswith("grpo_split use_std=False"):
        x = build([[]] * len(mask), [[0] * mask.shape[1]] * len(mask), group.tolist(), [])
        x.rewards, x.mask, x.off_policy = rewards, mask.bool(), ~torch.tensor(case["on_policy"])
        OffPolicyMixing(mixed=False).on_advantage(None, SimpleNamespace(advantage="dr_grpo"), x)  # type: ignore[arg-type]
        assert_close(x.advantages, expected[:, None] * mask)
        return
    if names.get(name, name) not in ADVANTAGES:
        raise Unanswered(name)
    actual = ADVANTAGES[names.get(name, name)](rewards, group, mask)
    if expected.dim() == 1:
        expected = expected[:, None] * mask
    if name == "reinforce_pp" and len(set(case["rewards"])) == 1:
        # verl's mean is sum / (tokens + 1e-8). In float64 that leaves R * 1e-8 / tokens of a constant reward, which
        # 1 / sqrt(0 + 1e-8) then makes visible (in the float32 it trains in, it vanishes). Here it is exactly 0.
        expected = expected - rewards[:, None] * mask * 1e4 * 1e-8 / mask.sum()
        assert not actual.any()
    assert_close(actual, expected)


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
    raise Unanswered(variant)


def guard(mask: Tensor) -> Tensor:
    """The references divide a row by its tokens + 1e-8, we by its tokens."""
    n = mask.sum(-1, keepdim=True)
    return n / (n + 1e-8)


def policy_loss(case: dict, _: str) -> None:
    params, variant = case["params"], case["params"]["variant"]
    inputs = {key: tensor(value) for key, value in case["inputs"].items()}
    logps, mask = inputs["log_prob"].requires_grad_(), inputs["response_mask"]
    result = objective(variant, params, logps, inputs["old_log_prob"], inputs["advantages"], mask)

    mode, empty = params["loss_agg_mode"], (mask.sum(-1) == 0).sum()
    version = "entropy_repo" if "expected_official" in case else "verl_0_9_1"
    weights = reference_weights(mask).get(f"{version}/{mode}")
    if variant == "gmpo":  # verl ignores the mode and means over all rows, empty ones too
        weights = token_weights(mask, "sequence") * (len(mask) - empty) / len(mask)
    if weights is None:
        raise Unanswered(f"{version}/{mode}")
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
        assert_close(share, sum(value for key, value in metrics.items() if "clipfrac" in key))


def clip_higher_by_hand(case: dict, _: str) -> None:
    logps, old, advantages = (tensor(case[key]) for key in ("log_prob", "old", "adv"))
    mask, tokens = torch.ones_like(logps), logps.numel()
    logps.requires_grad_()
    loss = (ppo(log_ratio(logps, old, mask), advantages, 0.2, 0.28).loss * token_weights(mask, "token")).sum()
    assert_close(loss * tokens / (tokens + 1e-8), case["loss"])
    assert_close(torch.autograd.grad(loss, logps)[0] * tokens / (tokens + 1e-8), case["grad"])


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


def aggregation(case: dict, name: str) -> None:
    loss, mask = tensor(case["loss_mat"]), tensor(case["mask"])
    limit = re.fullmatch(r"(.+)\(max_completion_length=(\d+)\)", name)
    known, divisor = (limit[1], int(limit[2])) if limit else (name, 1)
    weights = reference_weights(mask).get(known)
    if weights is None:
        raise Unanswered(name)
    assert_close((loss * weights).sum() / divisor, case["expected"][name])


def importance(case: dict, name: str) -> None:
    difference, mask = tensor(case["train_minus_rollout_logprob"]), tensor(case["response_mask"])
    if verl := re.fullmatch(r"(token|sequence)\|(?:([\d.]+)_)?([\d.]+)\|batch_norm=(True|False)", name):
        level, low, cap, norm = verl.groups()
        floor, mode = (float(low), "mask") if low else (None, "truncate")
    elif trl := re.fullmatch(r"trl/(token|sequence)_(truncate|mask)\(([\d.]+)\)", name):
        (level, mode, cap), floor, norm = trl.groups(), None, "False"
    else:
        raise Unanswered(name)
    w = truncated_importance(difference, torch.zeros_like(mask), mask, level, float(cap), floor, mode)  # type: ignore[arg-type]
    if norm == "True":
        w = w / (w * token_weights(mask, level)).sum()  # type: ignore[arg-type]
    expected = tensor(case["expected"][name]) * mask  # the references leave something outside the mask
    assert_close(w, expected, atol=2e-8 if norm == "True" else 1e-9)  # verl's + 1e-8


def overlong(case: dict, _: str) -> None:
    p = case["params"]
    penalty = overlong_penalty(tensor(case["lengths"]), p["max_resp_len"], p["buffer"], p["penalty_factor"])
    assert_close(penalty, case["expected"])


def group_filter(case: dict, name: str) -> None:
    ids = list(dict.fromkeys(case["uid"]))
    group = [ids.index(uid) for uid in case["uid"]]
    x = build([[0]] * len(group), [[0]] * len(group), group, tasks=list(ids))
    x.rewards = tensor(case["acc"])
    kept: list = rounds.informative(x).tasks
    if name == "kept_entropy_repo_and_dapo":  # they keep groups of one; here dynamic sampling is refused for those
        kept = [uid for uid in ids if uid in kept or case["uid"].count(uid) == 1]
    elif name != "kept_nft":
        raise Unanswered(name)
    assert kept == case["expected"][name]


Check = Callable[[dict, str], None]
CHECKS: list[tuple[set[str], Check]] = [
    ({"variant"}, policy_loss),
    ({"rewards", "index"}, advantage),
    ({"loss_mat"}, aggregation),
    ({"train_minus_rollout_logprob"}, importance),
    ({"max_resp_len"}, overlong),
    ({"uid", "acc"}, group_filter),
    ({"grpo_clip_higher"}, clip_higher_by_hand),
]
"""The keys of a case (its name, and those of its inputs and params, count too) -> what checks it. Called once for each
entry of `expected`, if that is a dict, with its name."""
