"""Operations on tokens: the one door to kernels/."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from lit_rl.kernels import logprob

__all__ = ["linear_logprob", "logits_logprob"]


def _takes_triton(x: Tensor) -> bool:
    """Triton's kernels are for float32 and bfloat16 on NVIDIA GPUs since Ampere."""
    return (
        x.is_cuda
        and torch.version.cuda is not None
        and x.dtype in (torch.float32, torch.bfloat16)
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and find_spec("triton") is not None
    )


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities (M,) of targets (M,) and entropies (M,) under softmax(hidden @ weight.T / temperature), at least
    float32, from hidden states (M, D) and the head's weight (V, D). The logits (M, V) are never in memory.

    Under autocast its products are in autocast's precision, as a linear layer's, in the backward too."""
    if torch.is_autocast_enabled(device := hidden.device.type):
        hidden, weight = (x.to(torch.get_autocast_dtype(device)) for x in (hidden, weight))
    if _takes_triton(hidden):
        from lit_rl.kernels import logprob_triton

        return logprob_triton.linear_logprob(hidden, weight, targets, temperature)
    return logprob.linear_logprob(hidden, weight, targets, temperature)


def logits_logprob(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies from logits (M, V) and targets (M,), for heads that are not hidden times weight."""
    logps = (logits.float() / temperature).log_softmax(-1)
    return logps.gather(-1, targets[:, None]).squeeze(-1), -(logps.exp() * logps).sum(-1)
