"""Objectives: per-token losses of the policy, and the weights that add them up.

Pure functions of (N, T) tensors, to be minimised: the loss of a minibatch is `(loss * token_weights(mask, ...)).sum()`.
Only `logps` (log-probs of the policy being trained) carries gradient. Log-probs outside the mask may be anything, even
-inf or NaN: they touch neither value nor gradient.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Level = Literal["token", "sequence"]


class Objective(NamedTuple):
    """What every objective returns."""

    loss: Tensor
    """(N, T), minimised."""
    clipped: Tensor
    """(N, T) bool: where clipping cut the gradient (in CISPO: where it bounded the ratio)."""


def _inside(x: Tensor, mask: Tensor) -> Tensor:
    """x inside the mask, 0 outside; before anything is computed from it, since 0 * inf is NaN."""
    return torch.where(mask.bool(), x, 0.0)


def _count(mask: Tensor) -> Tensor:
    """Tokens a row, at least 1. (N, T) -> (N, 1)"""
    return mask.sum(-1, keepdim=True).clamp(min=1)


def log_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor, level: Level = "token") -> Tensor:
    """Log of the importance ratio of policy to old policy at each token, 0 outside the mask. -> (N, T)

    token:    log r_t = logp_t - old_t, within +-20.
    sequence: GSPO's log s_t = sg[mean_t log r_t] + logp_t - sg[logp_t], at most 10: each token holds the ratio of the
              whole sequence, normalised by its length, and passes gradient to itself (arXiv 2507.18071, GSPO-token).
    """
    ratio = _inside(logps - old_logps, mask)
    if level == "token":
        return ratio.clamp(-20.0, 20.0)
    if level == "sequence":
        mean = ratio.detach().sum(-1, keepdim=True) / _count(mask)
        return _inside(mean + (ratio - ratio.detach()), mask).clamp(max=10.0)
    raise ValueError(f"log_ratio: level is {level!r}, expected 'token' or 'sequence'")


def ppo(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Objective:
    """PPO's clipped surrogate: L = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) (arXiv 1707.06347, eq. 7).

    With clip_high > clip_low it is DAPO's clip-higher, on a sequence-level ratio GSPO. `dual_clip` c > 1 also bounds
    the loss of a bad action: where A < 0, L = min(L, -A c) (arXiv 1912.09729).
    """
    ratio = log_ratio.exp()
    loss, bound = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    clipped = bound > loss
    loss = torch.where(clipped, bound, loss)
    if dual_clip is not None:
        bound = -advantages * dual_clip
        dual = (advantages < 0) & (loss > bound)
        loss, clipped = torch.where(dual, bound, loss), clipped | dual
    return Objective(loss, clipped)


def cispo(
    log_ratio: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor, cap: float, floor: float | None = None
) -> Objective:
    """CISPO: L = -sg[clip(r, floor, cap)] A logp; a bounded ratio still passes gradient (arXiv 2506.13585).

    `cap` and `floor` bound the ratio itself, as in TRL and ScaleRL (cap 5). verl's clip_ratio_high and _low are
    distances from one: cap = 1 + high, floor = 1 - low.
    """
    ratio = log_ratio.detach().exp()
    bounded = ratio.clamp(min=floor, max=cap)
    return Objective(-bounded * advantages * _inside(logps, mask), ratio != bounded)


def sapo(log_ratio: Tensor, advantages: Tensor, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Objective:
    """SAPO: a soft gate for the clip, L = -(4 / tau) sigmoid(tau (r - 1)) A, tau by A's sign (arXiv 2511.20347)."""
    tau = torch.full_like(advantages, tau_neg).masked_fill(advantages > 0, tau_pos)
    loss = -4 / tau * torch.sigmoid(tau * (log_ratio.exp() - 1)) * advantages
    return Objective(loss, torch.zeros_like(loss, dtype=torch.bool))


def vespo(
    log_ratio: Tensor,
    logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
) -> Objective:
    """VESPO: L = -sg[phi(w)] A logp with phi(w) = w^k exp(lambda (1 - w)), k and lambda by A's sign (arXiv 2602.10693).

    w is the ratio of the whole sequence, the product of its tokens': phi is 1 on-policy and fades on both sides, where
    others clip. `log_ratio` may be of either level, since their sums are the same.
    """
    log_w = log_ratio.detach().sum(-1, keepdim=True)  # (N, 1)
    k = torch.full_like(advantages, k_neg).masked_fill(advantages >= 0, k_pos)
    decay = torch.full_like(advantages, lambda_neg).masked_fill(advantages >= 0, lambda_pos)
    loss = -(k * log_w + decay * (1 - log_w.exp())).exp() * advantages * _inside(logps, mask)
    return Objective(loss, torch.zeros_like(loss, dtype=torch.bool))


def gmpo(log_ratio: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float) -> Objective:
    """GMPO: L = -A exp(mean_t log r_t), each token's log-ratio clipped to [-clip_low, clip_high] (arXiv 2507.20673).

    `log_ratio` is the token-level one. The clip is PPO's pessimistic one, in log space. Each token of a row holds the
    row's loss, which is meant for weights "sequence".
    """
    bound = log_ratio.clamp(-clip_low, clip_high)
    clipped = advantages * (log_ratio - bound) > 0
    mean = torch.where(clipped, bound, log_ratio).sum(-1, keepdim=True) / _count(mask)  # (N, 1)
    return Objective(-advantages * mean.exp(), clipped)


def dppo(
    log_ratio: Tensor,
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    divergence: Literal["tv", "kl"] = "tv",
    cap: float = 20.0,
) -> Objective:
    """DPPO: L = -sg[min(r, cap)] A logp, 0 where the policy has moved too far along A (arXiv 2602.04879).

    How far is the divergence of the two-way choice "this token or not": tv, the difference p - q of the token's
    probabilities, or kl, KL(q || p). The threshold is clip_high where A > 0, clip_low elsewhere.
    """
    logps, old_logps = _inside(logps, mask), _inside(old_logps, mask)
    p, q = logps.detach().exp(), old_logps.exp()
    if divergence == "tv":
        moved = (p - q).abs()
    elif divergence == "kl":
        moved = q * (old_logps - logps.detach()) + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
    else:
        raise ValueError(f"dppo: divergence is {divergence!r}, expected 'tv' or 'kl'")
    clipped = torch.where(advantages > 0, (p > q) & (moved > clip_high), (p < q) & (moved > clip_low))
    loss = -log_ratio.detach().exp().clamp(max=cap) * advantages * logps
    return Objective(torch.where(clipped, 0.0, loss), clipped)


def dro(log_ratio: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor, beta: float) -> Objective:
    """DRO: L = -A logp + beta/2 (log r)^2, the gradient of (A - beta log r)^2 / (2 beta) (arXiv 2405.19107)."""
    loss = -advantages * _inside(logps, mask) + beta / 2 * log_ratio**2
    return Objective(loss, torch.zeros_like(loss, dtype=torch.bool))


def nft(log_ratio: Tensor, advantages: Tensor, rate: Tensor, epsilon: float) -> Objective:
    """NFT: a right answer is imitated, a wrong one is unlearned through the policy that would have given it (2505.18116).

    With the prompt's pass rate q, (N,), kept within [0.02, 0.98], and log r at most 10:

    A > 0: L = -A log r
    A < 0: L = -|A| (1 - q) / q log max_v((1 - q r) / (1 - q), epsilon),  max_v(x, e) = x + sg[max(x, e) - x]

    (1 - q r) / (1 - q) is the ratio of the implicit negative policy, whose mixture with the positive one is the old policy;
    max_v bounds its value and keeps its gradient. On-policy the gradient is the policy gradient -A.
    """
    clipped, log_ratio = log_ratio > 10.0, log_ratio.clamp(max=10.0)
    rate = rate.clamp(0.02, 0.98)[:, None]  # (N, 1)
    negative = (1 - rate * log_ratio.exp()) / (1 - rate)
    bounded = negative.detach().clamp(min=epsilon)
    log_negative = bounded.log() + (negative - negative.detach()) / bounded
    unlearn = advantages * (1 - rate) / rate * log_negative
    return Objective(torch.where(advantages < 0, unlearn, -advantages * log_ratio), clipped)


def luffy(logps: Tensor, advantages: Tensor, mask: Tensor, gamma: float | None = 0.1) -> Objective:
    """LUFFY's policy shaping, for tokens that another policy wrote: L = -A f(p), f(p) = p / (p + gamma), p the token's
    probability; the behaviour's is taken to be one (arXiv 2504.14945).

    The gradient is largest where p = gamma, so that unlikely tokens are learned first. gamma None: f(p) = p.
    """
    p = _inside(logps, mask).exp()
    return Objective(-advantages * (p if gamma is None else p / (p + gamma)), torch.zeros_like(p, dtype=torch.bool))


def kl(logps: Tensor, ref_logps: Tensor, mask: Tensor, estimator: Literal["k1", "k2", "k3", "k3+"] = "k3") -> Tensor:
    """Estimates of KL(policy || reference) at each token, with d = ref - logp (Schulman, kl-approx). -> (N, T)

    k1 = -d; k2 = d^2 / 2; k3 = e^d - d - 1, with d within +-20 and the result at most 10; k3+ has k3's value and k2's
    gradient, which unlike k3's is in expectation the gradient of the KL.
    """
    d = _inside(ref_logps - logps, mask)
    if estimator == "k1":
        return -d
    k2 = d**2 / 2
    if estimator == "k2":
        return k2
    if estimator not in ("k3", "k3+"):
        raise ValueError(f"kl: estimator is {estimator!r}, expected 'k1', 'k2', 'k3' or 'k3+'")
    d = d.clamp(-20.0, 20.0)
    k3 = (d.exp() - d - 1).clamp(max=10.0)
    return k3 if estimator == "k3" else k3.detach() + (k2 - k2.detach())


@torch.no_grad()
def truncated_importance(
    old_logps: Tensor,
    sampler_logps: Tensor,
    mask: Tensor,
    level: Level,
    cap: float,
    floor: float | None = None,
    mode: Literal["truncate", "mask"] = "truncate",
) -> Tensor:
    """Weights that correct for a sampler whose log-probs differ from the trainer's, 0 outside the mask. -> (N, T)

    w = exp(old - sampler) at each token, or their product over the sequence; the exponent stays within +-20.
    truncate: clip(w, floor, cap), which is TIS. mask: w inside [floor, cap], 0 beyond, which is IcePop (verl's "l_u",
    TRL's token_mask and sequence_mask). To give them mean one: `w / (w * token_weights(mask, level)).sum()`.
    """
    exponent = _inside(old_logps - sampler_logps, mask)
    if level == "sequence":
        exponent = exponent.sum(-1, keepdim=True).expand_as(mask)
    elif level != "token":
        raise ValueError(f"truncated_importance: level is {level!r}, expected 'token' or 'sequence'")
    weight = exponent.clamp(-20.0, 20.0).exp()
    bounded = weight.clamp(min=floor, max=cap)
    if mode == "mask":
        bounded = torch.where(weight == bounded, weight, 0.0)
    elif mode != "truncate":
        raise ValueError(f"truncated_importance: mode is {mode!r}, expected 'truncate' or 'mask'")
    return _inside(bounded, mask)


def token_weights(mask: Tensor, how: Literal["token", "sequence", "constant"], max_tokens: int | None = None) -> Tensor:
    """Weights of the tokens in the loss; zeros when the mask is empty. Rows without tokens do not count. -> (N, T)

    token:    1 / all tokens: DAPO's token mean (arXiv 2503.14476, eq. 8).
    sequence: 1 / (rows * the row's tokens): GRPO's mean over rows of the row's mean (arXiv 2402.03300, eq. 3).
    constant: 1 / (rows * max_tokens): Dr. GRPO (arXiv 2503.20783). With max_tokens=1, verl's seq-mean-token-sum.
    """
    weights = mask if mask.is_floating_point() else mask.float()
    rows = weights.any(-1).sum().clamp(min=1)
    if how == "token":
        return weights / weights.sum().clamp(min=1)
    if how == "sequence":
        return weights / (rows * _count(weights))
    if how == "constant" and max_tokens:
        return weights / (rows * max_tokens)
    raise ValueError(
        f"token_weights: how is {how!r} and max_tokens {max_tokens!r}, "
        "expected 'token', 'sequence', or 'constant' with a positive max_tokens"
    )


def overlong_penalty(length: Tensor, max_tokens: int, buffer: int, factor: float = 1.0) -> Tensor:
    """DAPO's soft penalty, added to the reward: 0 up to max_tokens - buffer, then linear to -factor at max_tokens.

    arXiv 2503.14476, eq. 13. Generation ends at max_tokens, so the line is not cut off there (nor is it in verl).
    (N,) -> (N,)
    """
    if buffer <= 0:
        raise ValueError(f"overlong_penalty: buffer is {buffer}, expected a positive number of tokens")
    return ((max_tokens - buffer - length) / buffer * factor).clamp(max=0.0)
