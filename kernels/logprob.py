"""From hidden states and the head's weight to token log-probabilities and entropies, without logits in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 2**22
"""Logits held at once, in elements: rows are taken in chunks of CHUNK / V."""


def _full(x: Tensor) -> Tensor:
    """Half precisions are computed in float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """(rows, V), a tensor of its own."""
    logits = _full(hidden @ weight.T)
    return logits if temperature == 1 else logits.div_(temperature)


def naive_linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The specification. hidden (M, D), weight (V, D), targets (M,) -> log-probabilities (M,), entropies (M,), at least float32."""
    logps = (_full(hidden @ weight.T) / temperature).log_softmax(-1)  # (M, V)
    return logps.gather(-1, targets[:, None]).squeeze(-1), -(logps.exp() * logps).sum(-1)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        rows = max(1, CHUNK // weight.shape[0])
        logps, entropy, norm = (hidden.new_empty(len(hidden), dtype=_full(hidden[:0]).dtype) for _ in range(3))
        for i in range(0, len(hidden), rows):
            part = slice(i, i + rows)
            logits = _logits(hidden[part], weight, temperature)
            highest = logits.amax(-1, keepdim=True)
            p = (logits - highest).exp_()  # times their sum, which spares the second exp of a logsumexp
            total = p.sum(-1)
            norm[part] = highest.squeeze(-1) + total.log()
            logps[part] = logits.gather(-1, targets[part, None]).squeeze(-1)
            entropy[part] = norm[part] - p.mul_(logits).sum(-1) / total
        logps -= norm
        ctx.save_for_backward(hidden, weight, targets, norm, entropy)
        ctx.temperature = temperature
        return logps, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        d_logps, d_entropy = grads
        hidden, weight, targets, norm, entropy = ctx.saved_tensors
        rows = max(1, CHUNK // weight.shape[0])
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=norm.dtype) if ctx.needs_input_grad[1] else None
        for i in range(0, len(hidden), rows):
            part = slice(i, i + rows)
            logps = _logits(hidden[part], weight, ctx.temperature).sub_(norm[part, None])
            scale = torch.zeros_like(norm[part]) if d_logps is None else d_logps[part] / -ctx.temperature
            if d_entropy is None:
                d_logits = logps.exp_().mul_(scale[:, None])
            else:  # dH/dz = -p (log p + H)
                p, change = logps.exp(), d_entropy[part] / ctx.temperature
                d_logits = p.mul_(scale[:, None] - change[:, None] * logps.add_(entropy[part, None]))
            if d_logps is not None:
                d_logits.scatter_add_(1, targets[part, None], -scale[:, None])
            d_logits = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[part] = d_logits @ weight
            if d_weight is not None and d_weight.dtype == d_logits.dtype:
                d_weight.addmm_(d_logits.T, hidden[part])  # without another tensor of its size
            elif d_weight is not None:
                d_weight += d_logits.T @ hidden[part]
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """As `naive_linear_logprob`, in chunks: memory for CHUNK logits whatever M and V; the backward computes them again."""
    return _LinearLogprob.apply(hidden, weight, targets, temperature)  # type: ignore[no-any-return]
