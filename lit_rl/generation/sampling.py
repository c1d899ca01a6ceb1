"""From logits to tokens: the distribution that `Sampling` describes, and draws from it that a seed decides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lit_rl.generation.base import Sampling


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """(count, len(seeds)) float32 in (0, 1): column j depends on seed j only, its first rows not on `count`.

    The values are the middles of 2^23 equal cells: exact in float32, never 0 or 1.
    """
    draws = [np.random.Generator(np.random.Philox(key=seed)).random(count) for seed in seeds]
    cells = np.floor(np.stack(draws, axis=1) * 2**23)
    return torch.from_numpy(((cells + 0.5) / 2**23).astype(np.float32))


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """One token per row by inverse CDF, with temperature, then top-k, top-p and min-p as in transformers.

    Takes logits (N, V) of any float dtype and uniform (N,) in (0, 1); temperature 0 reads no `uniform`. Returns token
    (N,) int64, its log-probability (N,) float32 under the renormalised distribution, and the log of the mass that
    truncation kept (N,) float32. Among equal probabilities top-k keeps exactly k and top-p the fewest.
    """
    if sampling.temperature == 0:
        best, token = logits.float().log_softmax(-1).max(-1)
        return token, best, torch.zeros_like(best)
    probs, index = (logits.float() / sampling.temperature).softmax(-1), None
    if sampling.top_k or sampling.top_p < 1:
        probs, index = probs.topk(min(sampling.top_k or probs.shape[-1], probs.shape[-1]))  # descending
    if sampling.top_p < 1:
        before = probs.cumsum(-1) - probs
        probs = probs.where(before < sampling.top_p * probs.sum(-1, keepdim=True), 0)
    if sampling.min_p:
        probs = probs.where(probs >= sampling.min_p * probs.amax(-1, keepdim=True), 0)
    cdf = probs.cumsum(-1)
    mass = cdf[:, -1:]
    # The largest uniform is 1 - 2^-24, so the product is below `mass` after rounding too: the slot exists, and since it
    # is the first to pass the product its probability is above 0.
    slot = torch.searchsorted(cdf, uniform[:, None] * mass, right=True)
    log_kept = mass.log().squeeze(-1)
    logp = probs.gather(-1, slot).log().squeeze(-1) - log_kept
    token = slot if index is None else index.gather(-1, slot)
    return token.squeeze(-1), logp, log_kept
