"""Operations on tokens: the one door to kernels/."""

from __future__ import annotations

from torch import Tensor

from lit_rl.kernels.logprob import linear_logprob

__all__ = ["linear_logprob", "logits_logprob"]


def logits_logprob(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies from logits (M, V) and targets (M,), for heads that are not hidden times weight."""
    logps = (logits.float() / temperature).log_softmax(-1)
    return logps.gather(-1, targets[:, None]).squeeze(-1), -(logps.exp() * logps).sum(-1)
