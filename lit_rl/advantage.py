"""Advantages: from one reward a row to one advantage a token.

Pure functions with one signature, so that a method picks one from `ADVANTAGES` by its name:

    (rewards (N,), group (N,), mask (N, T), valid (N,) | None) -> (N, T), zero outside the mask

`group` holds one id a row, in any order. Rows that are not `valid` (their verifier failed) count as if they were not
there, and their advantage is 0; when `valid` is None these are the rows whose reward is NaN.

The degenerate cases are decided once, for all of them:
- equal rewards in a group (for `reinforce_pp`: in the batch) give exactly 0, whatever the rounding of their mean;
- a group with one valid row has no baseline: mean 0 and standard deviation 1, so its reward passes through, as in verl;
- without valid rows, or without tokens, all is 0, never NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_rl import ranks


def _per_group(x: Tensor, group: Tensor, reduce: str) -> Tensor:
    """Reduce x over each group and hand every row its group's result. (N,), (N,) -> (N,)"""
    index = group.unique(return_inverse=True)[1]
    return torch.zeros_like(x).scatter_reduce(0, index, x, reduce, include_self=False)[index]


def group_mean(x: Tensor, group: Tensor, weight: Tensor) -> Tensor:
    """The weighted mean of each row's group, 0 where no row has weight. (N,), (N,), (N,) -> (N,)

    Taken relative to the group's minimum, so that the mean of equal values is that value to the last bit.
    """
    present = weight > 0
    low = _per_group(torch.where(present, x, torch.inf), group, "amin")
    low = torch.where(low.isinf(), 0.0, low)
    excess = _per_group(torch.where(present, x - low, 0.0) * weight, group, "sum")
    return low + excess / _per_group(weight, group, "sum").clamp(min=torch.finfo(x.dtype).tiny)


def _valid(rewards: Tensor, valid: Tensor | None) -> Tensor:
    return ~rewards.isnan() if valid is None else valid


def _centre(rewards: Tensor, group: Tensor, valid: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rewards minus their group's (weighted) mean, and how many valid rows the group has. -> (N,), (N,)"""
    rows = valid.to(rewards.dtype)
    count = _per_group(rows, group, "sum")
    centred = rewards - group_mean(rewards, group, rows if weight is None else rows * weight)
    return torch.where(valid, torch.where(count == 1, rewards, centred), 0.0), count


def _whiten(values: Tensor, mask: Tensor, valid: Tensor) -> Tensor:
    """Mean 0 and variance 1 (ddof=1, 1e-8 under the root) over all valid tokens of all ranks. (N,) -> (N, T)"""
    weight = mask.sum(-1).to(values.dtype) * valid
    values = torch.where(valid, values, 0.0)
    everyone, weights = torch.cat(ranks.gather(torch.stack([values, weight])), 1)  # of all ranks
    mean = group_mean(everyone, torch.zeros_like(everyone, dtype=torch.long), weights)[:1]
    variance = (weights * (everyone - mean) ** 2).sum() / (weights.sum() - 1).clamp(min=1)
    return _spread(torch.where(valid, values - mean, 0.0) * (variance + 1e-8).rsqrt(), mask)


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """A row's value at each of its tokens. (N,), (N, T) -> (N, T)"""
    return values[:, None] * mask.to(values.dtype)


def grpo(rewards: Tensor, group: Tensor, mask: Tensor, valid: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """GRPO: A = (R - mean) / (std + eps) within the group, std with ddof=1 (arXiv 2402.03300, outcome supervision).

    `eps` is verl's; TRL's is 1e-4.
    """
    valid = _valid(rewards, valid)
    centred, count = _centre(rewards, group, valid)
    variance = _per_group(centred**2, group, "sum") / (count - 1).clamp(min=1)
    return _spread(centred / (torch.where(count == 1, 1.0, variance.sqrt()) + eps), mask)


def lite_ppo(rewards: Tensor, group: Tensor, mask: Tensor, valid: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Lite PPO: A = (R - mean within the group) / (std over the batch + eps), std with ddof=1 (arXiv 2508.08221). The batch
    is that of all ranks, which must all call this."""
    valid = _valid(rewards, valid)
    everyone = torch.cat(ranks.gather(rewards[valid]))
    std = everyone.std() if len(everyone) > 1 else 1.0
    return _spread(_centre(rewards, group, valid)[0] / (std + eps), mask)


def dr_grpo(rewards: Tensor, group: Tensor, mask: Tensor, valid: Tensor | None = None) -> Tensor:
    """Dr. GRPO: A = R - mean within the group (arXiv 2503.20783)."""
    return _spread(_centre(rewards, group, _valid(rewards, valid))[0], mask)


def rloo(rewards: Tensor, group: Tensor, mask: Tensor, valid: Tensor | None = None) -> Tensor:
    """RLOO: A = R - mean of the group's other rows = (R - mean) n / (n - 1) (arXiv 2402.14740)."""
    centred, count = _centre(rewards, group, _valid(rewards, valid))
    return _spread(centred * torch.where(count > 1, count / (count - 1), 1.0), mask)


def reinforce_pp(rewards: Tensor, group: Tensor, mask: Tensor, valid: Tensor | None = None) -> Tensor:
    """REINFORCE++: A = R, whitened over all tokens of the batch, that of all ranks (which must all call this); the
    groups play no part (arXiv 2501.03262)."""
    return _whiten(rewards, mask, _valid(rewards, valid))


def reinforce_pp_baseline(rewards: Tensor, group: Tensor, mask: Tensor, valid: Tensor | None = None) -> Tensor:
    """REINFORCE++-baseline: A = R - mean within the group, then whitened over all tokens as in REINFORCE++ (arXiv
    2501.03262)."""
    valid = _valid(rewards, valid)
    return _whiten(_centre(rewards, group, valid)[0], mask, valid)


def opo(rewards: Tensor, group: Tensor, mask: Tensor, valid: Tensor | None = None) -> Tensor:
    """OPO: A = R - the group's mean weighted by response length, the variance-optimal baseline (arXiv 2505.23585)."""
    length = mask.sum(-1).to(rewards.dtype)
    return _spread(_centre(rewards, group, _valid(rewards, valid), length)[0], mask)


def rft(rewards: Tensor, group: Tensor, mask: Tensor, valid: Tensor | None = None) -> Tensor:
    """RFT, or rejection sampling: A = 1 where R is above the group's mean, else 0 (compared with in arXiv 2505.18116)."""
    return (dr_grpo(rewards, group, mask, valid) > 0).to(rewards.dtype)


ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (grpo, lite_ppo, dr_grpo, rloo, reinforce_pp, reinforce_pp_baseline, opo, rft)
}
