"""Operations on tokens: the one door to kernels/."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lit_rl.kernels import attention, attention_cuda, infllm_torch, logprob, ternary
from lit_rl.kernels.infllm import Sequences, Settings

__all__ = [
    "block_attention",
    "linear_logprob",
    "logits_logprob",
    "packed_attention",
    "round_ternary",
    "select_blocks",
    "survey_ternary",
    "ternary_linear",
]


def _takes_triton(x: Tensor) -> bool:
    """Triton's kernels are for float32 and bfloat16 (InfLLM-v2's for float16 too) on NVIDIA GPUs since Ampere."""
    return (
        x.is_cuda
        and torch.version.cuda is not None
        and x.dtype in (torch.float32, torch.bfloat16)
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and find_spec("triton") is not None
    )


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    return (
        tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors) if torch.is_autocast_enabled(device) else tensors
    )


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities (M,) of targets (M,) and entropies (M,) under softmax(hidden @ weight.T / temperature), at least
    float32, from hidden states (M, D) and the head's weight (V, D). The logits (M, V) are never in memory.

    Under autocast its products are in autocast's precision, as a linear layer's, in the backward too."""
    hidden, weight = _autocast(hidden, weight)
    hidden = hidden.to(weight.dtype)  # the last norm of some models is in float32 whatever the head is in
    if _takes_triton(hidden):
        from lit_rl.kernels import logprob_triton

        return logprob_triton.linear_logprob(hidden, weight, targets, temperature)
    return logprob.linear_logprob(hidden, weight, targets, temperature)


def logits_logprob(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies, at least float32, from logits (M, V) and targets (M,), for heads that are not hidden times
    weight. Logits may be -inf, as of words that a model rules out."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    logps = (wide / temperature).log_softmax(-1)
    p = logps.exp()
    return logps.gather(-1, targets[:, None]).squeeze(-1), -(p * logps.where(p > 0, 0)).sum(-1)


def packed_attention(query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, scale: float) -> Tensor:
    """Attention of groups that are packed one after the other: a prompt's tokens see those before them, a
    response's the prompt as well. query (1, H, M, dim), key and value (1, K, M, dim) with K a divisor of H -> (1, H, M, dim).

    blocks (..., S, 3) int64: for each run of equally long segments, whether a prompt begins here, their count and their length.
    """
    query, key, value = _autocast(query, key, value)
    kernel = attention_cuda if query.is_cuda else attention
    return kernel.packed_attention(query, key, value, blocks, scale)


def select_blocks(
    q: Tensor, k: Tensor, seqs: Sequences, settings: Settings, scale: float, pooled: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """InfLLM-v2's choice of blocks of keys (R, K, S, D) for queries (R, H, T, D): (M, K, W) int32, without gradient. See
    kernels/infllm.py for shapes."""
    return _infllm(q).select(q, k, seqs, settings, scale, pooled)


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, seqs: Sequences, settings: Settings, scale: float
) -> Tensor:
    """Attention (R, H, T, E) of each query to the keys up to itself in its blocks; zero where no sequence is."""
    return _infllm(q).attention(q, k, v, blocks, seqs, settings.block_size, scale)


def _infllm(x: Tensor) -> Any:
    if _takes_triton(x) or (x.dtype == torch.float16 and _takes_triton(x[:0].float())):
        from lit_rl.kernels import infllm_triton

        return infllm_triton
    return infllm_torch


def ternary_linear(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """x (M, in) times a packed ternary weight (out, in), transposed: (M, out), as `kernels.ternary` specifies it. Under
    autocast in its precision, as a linear layer."""
    (x,) = _autocast(x)
    return _ternary(x).ternary_linear(x, packed, scales)  # type: ignore[no-any-return]


def round_ternary(weight: Tensor, group: int) -> Tensor:
    """The ternary weight (out, in), in the weight's type, that `kernels.ternary` makes of a weight."""
    return _ternary(weight).round_weight(weight, group)  # type: ignore[no-any-return]


def survey_ternary(weight: Tensor, group: int, before: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes and scales of a weight (out, in), and how many codes are zero and how many differ from those packed `before`."""
    return _ternary(weight).survey(weight, group, before)  # type: ignore[no-any-return]


def _ternary(x: Tensor) -> Any:
    if _takes_triton(x):
        from lit_rl.kernels import ternary_triton

        return ternary_triton
    return ternary
