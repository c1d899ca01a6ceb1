"""InfLLM-v2 (MiniCPM4, arXiv 2506.07900 and 2509.24663): each query attends to a few blocks of keys, chosen without parameters.

Keys are pooled over overlapping kernels; a query's scores against the pooled keys, summed over the query heads of a group,
rank the blocks; attention then reads the best blocks, the first ones and a window. The functions `naive_*` here are the
specification, one sequence at a time with whole matrices. infllm_torch.py computes the same, and so do infllm_triton.py and
infllm_triton_select.py.

Shapes: R rows, H query heads, K key heads (G = H / K, neighbours share one), T queries, S keys, D and E the sizes of a key and
a value; M queries in all sequences together, W blocks at most of a query.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 80.0
"""Of an exponent in a block's score: the coarse log-sum-exp may be far below the true one, and a score stays finite."""


@dataclass(frozen=True)
class Settings:
    """Names and defaults of MiniCPM4's `sparse_config`.

    Attributes:
        kernel_size: Keys in a pooled one.
        kernel_stride: Keys from one pooled key to the next.
        block_size: Keys in a block.
        init_blocks: First blocks, which every query sees.
        window_size: Keys before a query's own block that it sees in any case, in whole blocks.
        topk: Blocks a query sees beside its window; the first ones and its own are among them. 64 + 2048 / 64 = 96 at the
            defaults.
        dense_len: A query with fewer keys up to itself sees them all; -1: none does. Being a property of the query, it gives
            the same numbers in training, in prefill by chunks and token by token.
        coarse: Normalise scores by the log-sum-exp over kernels four times as large, which costs a quarter of the exact one.
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    init_blocks: int = 1
    window_size: int = 2048
    topk: int = 64
    dense_len: int = 8192
    coarse: bool = True

    def __post_init__(self) -> None:
        for name in ("kernel_size", "kernel_stride", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name, unit in (
            ("kernel_size", "kernel_stride"), ("block_size", "kernel_stride"), ("window_size", "block_size"),
        ):  # fmt: skip
            value, step = getattr(self, name), getattr(self, unit)
            if value < 0 or value % step:
                raise ValueError(f"{name} is {value}: it must be a multiple of {unit}, which is {step}")
        if self.init_blocks < 0:
            raise ValueError(f"init_blocks is {self.init_blocks}: it must be at least 0")
        if self.topk <= self.init_blocks:
            raise ValueError(
                f"topk is {self.topk}: it must be above init_blocks, which is {self.init_blocks}, since the first blocks and"
                " the query's own are among the chosen"
            )

    @property
    def blocks(self) -> int:
        """That a query sees at most, by choice."""
        return self.topk + self.window_size // self.block_size

    @property
    def covered(self) -> int:
        """The longest sequence that is seen whole by all its queries."""
        return max(self.blocks * self.block_size, self.dense_len - 1)

    def width(self, keys: int) -> int:
        """Blocks that a query of a sequence of so many keys may see."""
        most = max(self.blocks, math.ceil((self.dense_len - 1) / self.block_size))
        return min(most, math.ceil(keys / self.block_size))

    def kernels(self, coarse: bool = False) -> tuple[int, int]:
        """Size and stride."""
        factor = 4 if coarse else 1
        return factor * self.kernel_size, factor * self.kernel_stride


class Sequences(NamedTuple):
    """Where N sequences lie in queries (R, H, T, D), keys (R, K, S, D) and values (R, K, S, E): each in a row of its own, filled
    up on either side, or several in a row. A sequence has keys k_start to k_start + k_length of its row; its last q_length
    keys have queries, in order, from q_start on: all of them, a chunk, or one. All are (N,) int64, on the tensors' device."""

    row: Tensor
    q_start: Tensor
    q_length: Tensor
    k_start: Tensor
    k_length: Tensor

    @classmethod
    def whole(cls, q: Tensor, k: Tensor) -> Sequences:
        """Each row is one sequence."""
        rows = torch.arange(len(q), device=q.device)
        zeros = torch.zeros_like(rows)
        return cls(rows, zeros, zeros + q.shape[2], zeros, zeros + k.shape[2])

    def queries(self) -> tuple[Tensor, Tensor, Tensor]:
        """(M,) each: a query's sequence, its column in the row, its position in the sequence."""
        of = torch.arange(len(self.row), device=self.row.device).repeat_interleave(self.q_length)
        offset = torch.arange(len(of), device=of.device) - (self.q_length.cumsum(0) - self.q_length)[of]
        return of, self.q_start[of] + offset, (self.k_length - self.q_length)[of] + offset

    def each(self) -> Iterator[tuple[int, slice, slice]]:
        for row, q_start, q_length, k_start, k_length in zip(*(x.tolist() for x in self), strict=True):
            yield row, slice(q_start, q_start + q_length), slice(k_start, k_start + k_length)


def check(q: Tensor, k: Tensor, v: Tensor | None = None) -> None:
    """Raises ValueError for heads and sizes that do not fit."""
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads do not divide among {k.shape[1]} key heads")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"queries have size {q.shape[3]}, keys {k.shape[3]}: they must be equal")
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ValueError(f"keys are {tuple(k.shape)} and values {tuple(v.shape)}: only their last sizes may differ")


def full(x: Tensor) -> Tensor:
    """Half precisions are computed in float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def naive_pool(k: Tensor, size: int, stride: int) -> Tensor:
    """Keys (K, S, D) to the means (K, N, D) of all kernels that are complete; N may be 0."""
    if k.shape[1] < size:
        return full(k[:, :0])
    return full(k).unfold(1, size, stride).mean(-1)


def naive_scores(q: Tensor, k: Tensor, settings: Settings, scale: float) -> Tensor:
    """Queries (H, T, D), the last of keys (K, S, D), to the scores (K, T, B) of blocks. A kernel counts when all of it is in the
    query's past; a block's score is the largest of the kernels that touch it, 0 when none counts."""
    t = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)[:, None]
    grouped = full(q).unflatten(0, (k.shape[0], -1))  # (K, G, T, D)

    def products(size: int, stride: int) -> Tensor:
        kernels = naive_pool(k, size, stride)  # (K, N, D)
        last = torch.arange(kernels.shape[1], device=q.device) * stride + size - 1
        return (grouped @ kernels[:, None].mT * scale).masked_fill(last > t, -math.inf)  # (K, G, T, N)

    fine = products(*settings.kernels())
    norm = fine.logsumexp(-1, keepdim=True)
    if settings.coarse:
        coarse = products(*settings.kernels(coarse=True)).logsumexp(-1, keepdim=True)
        norm = torch.where(coarse.isfinite(), coarse, norm)  # a query may see kernels, but no coarse one yet
    mass = torch.where(fine.isfinite(), (fine - norm).clamp(max=LARGEST).exp(), 0.0).sum(1)  # (K, T, N)
    size, stride = settings.kernels()
    first = torch.arange(fine.shape[-1], device=q.device) * stride
    result = mass.new_zeros(*mass.shape[:2], math.ceil(k.shape[1] / settings.block_size))
    for b in range(result.shape[-1]):
        touching = (first < (b + 1) * settings.block_size) & (first + size > b * settings.block_size)
        if touching.any():
            result[..., b] = mass[..., touching].amax(-1)
    return result


def choose(scores: Tensor, t: Tensor, settings: Settings, width: int) -> Tensor:
    """Scores (..., K, T, B) of blocks and the queries' positions (..., 1, T) to the chosen blocks (..., K, T, width) int32:
    ascending, then -1. The first blocks and the window come in any case, future blocks never; then the best, the earlier one
    of two that tie. Neighbours often do, since they share the kernel across their border: `topk` would pick any."""
    block = torch.arange(scores.shape[-1], device=scores.device)
    own = (t // settings.block_size)[..., None]  # (..., 1, T, 1)
    forced = (block < settings.init_blocks) | (block >= own - settings.window_size // settings.block_size)
    ranked = scores.masked_fill(forced, math.inf).masked_fill(block > own, -1.0)
    best, which = ranked.sort(dim=-1, descending=True, stable=True)
    which = which.masked_fill(best < 0, len(block))[..., : settings.blocks].sort(-1).values
    which = torch.nn.functional.pad(which, (0, max(0, width - which.shape[-1])), value=len(block))[..., :width]
    everything = torch.arange(width, device=scores.device).expand_as(which)
    dense = (t + 1 < settings.dense_len)[..., None]
    which = torch.where(dense, everything, which)
    return which.masked_fill((which > own) | (which >= len(block)), -1).int()


def naive_select(q: Tensor, k: Tensor, seqs: Sequences, settings: Settings, scale: float) -> Tensor:
    """The blocks (M, K, W) int32 that each query sees, ascending, then -1. Without gradient."""
    parts, width = [], settings.width(int(seqs.k_length.max()))
    with torch.no_grad():
        for row, queries, keys in seqs.each():
            scores = naive_scores(q[row, :, queries], k[row, :, keys], settings, scale)
            n = keys.stop - keys.start
            t = torch.arange(n - scores.shape[1], n, device=q.device)[None]
            parts.append(choose(scores, t, settings, width).transpose(0, 1))
    return torch.cat(parts)


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, seqs: Sequences, block_size: int, scale: float
) -> Tensor:
    """Attention (R, H, T, E) of each query to the keys up to itself in its blocks (M, K, W); zero where no sequence is."""
    out, done = full(q).new_zeros(*q.shape[:3], v.shape[3]), 0
    for row, queries, keys in seqs.each():
        q_, k_, v_ = full(q[row, :, queries]), full(k[row, :, keys]), full(v[row, :, keys])
        chosen = blocks[done : done + q_.shape[1]].transpose(0, 1).long()  # (K, T, W)
        done += q_.shape[1]
        at = torch.arange(k_.shape[1], device=q.device)
        seen = (chosen[..., None, :] == (at // block_size)[:, None]).any(-1) & (at <= at[-q_.shape[1] :, None])
        scores = q_.unflatten(0, (len(k_), -1)) @ k_[:, None].mT * scale  # (K, G, T, S)
        weights = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1)
        out[row, :, queries] = (weights @ v_[:, None]).flatten(0, 1)
    return out.to(q.dtype)
