"""Operations on tokens: the one door to kernels/."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_rl.kernels.logprob import linear_logprob

__all__ = ["linear_logprob", "logits_logprob", "masked_mean"]


def logits_logprob(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies from logits (M, V) and targets (M,), for heads that are not hidden times weight."""
    logps = (logits.float() / temperature).log_softmax(-1)
    return logps.gather(-1, targets[:, None]).squeeze(-1), -(logps.exp() * logps).sum(-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x where mask is set; 0 when it is nowhere."""
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)
