"""From logits to tokens: the distribution that `Sampling` describes, and draws from it that a seed decides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lit_rl.generation.base import Sampling

UNITS = 2.0**40
"""That a probability of one has, where it is counted in whole numbers. The rounding of a vocabulary is below that of a float32."""
COUNTING = ("cuda",)
"""Devices that do: their parallel scans add in an order of their own, which whole numbers do not depend on."""
PART = 2**18
"""Probabilities that a CPU holds at once, in elements: larger tensors leave its cache, and are new memory each time."""


def uniforms(seeds: Sequence[int], count: int, starts: Sequence[int] | None = None) -> Tensor:
    """(count, len(seeds)) float32 in (0, 1): column j depends on seed j only, and its first rows not on `count`. It is the
    seed's stream from its place starts[j] on.

    The values are the middles of 2^23 equal cells: exact in float32, from 2^-24 to 1 - 2^-24.
    """
    every = zip(seeds, starts or [0] * len(seeds), strict=True)
    draws = [np.random.Generator(np.random.Philox(key=seed)).random(start + count)[start:] for seed, start in every]
    cells = np.floor(np.stack(draws, axis=1) * 2**23)
    return torch.from_numpy(((cells + 0.5) / 2**23).astype(np.float32))


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """One token per row by inverse CDF, with temperature, then top-k, top-p and min-p as in transformers.

    Takes logits (N, V) of any float dtype and uniform (N,), not read at temperature 0. Returns, (N,) each: the token,
    int64; its log-probability under the renormalised distribution, float32; the log of the mass that the truncation
    kept, float32. Among equally likely tokens at the border exactly as many are kept as top-k or top-p needs.
    """
    rows = max(1, PART // logits.shape[-1])
    if logits.is_cuda or len(logits) <= rows:
        return _draw(logits, uniform, sampling)
    parts = zip(logits.split(rows), uniform.split(rows), strict=True)
    token, logp, log_kept = (
        torch.cat(column) for column in zip(*(_draw(*part, sampling) for part in parts), strict=True)
    )
    return token, logp, log_kept


def _draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    if sampling.temperature == 0:
        best, token = logits.float().log_softmax(-1).max(-1)
        return token, best, torch.zeros_like(best)
    probs, index = (logits.float() / sampling.temperature).softmax(-1), None
    if sampling.top_k:
        probs, index = probs.topk(min(sampling.top_k, probs.shape[-1]))
    elif sampling.top_p < 1:
        probs, index = probs.sort(descending=True, stable=True)
    if sampling.top_p < 1:
        counted = _counted(probs)
        before = counted.cumsum(-1) - counted
        probs = probs.where(before < sampling.top_p * counted.sum(-1, keepdim=True), 0)
    if sampling.min_p:
        probs = probs.where(probs >= sampling.min_p * probs.amax(-1, keepdim=True), 0)
    cdf = _counted(probs).cumsum(-1)  # a CPU sums in double and rounds, so that it ascends
    mass = cdf[:, -1:]
    if cdf.is_floating_point():
        number = uniform[:, None] * mass
    else:
        number, mass = (uniform.double()[:, None] * mass).ceil().long(), mass / UNITS
    # The number is above 0 and at most the mass, so some slot's CDF reaches it, and the first one adds to the CDF: its
    # probability is not 0, however sums are rounded. Only NaN passes the end.
    slot = torch.searchsorted(cdf, number).clamp_(max=cdf.shape[-1] - 1)
    token = slot if index is None else index.gather(-1, slot)
    cut = index is not None or sampling.min_p > 0
    log_kept = mass.float().log() if cut else torch.zeros_like(mass, dtype=torch.float32)
    logp = probs.gather(-1, slot).log() - log_kept
    return token.squeeze(-1), logp.squeeze(-1), log_kept.squeeze(-1)


def _counted(probs: Tensor) -> Tensor:
    """What to add up of probabilities: themselves, or UNITS, int64."""
    return (probs * UNITS).long() if probs.device.type in COUNTING else probs
