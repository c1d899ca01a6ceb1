"""InfLLM-v2's choice of blocks as a Triton kernel: `naive_select` of infllm.py is its specification.

A program owns a few queries with all heads of a group, GROUP rows each, and walks over blocks; it keeps the log-sum-exp of a
first walk over pooled keys and stores the score of a block alone, the largest sum over heads of the kernels that touch it, so
that the scores of kernels are never in memory. Choosing among them is torch's.

Here too is what these kernels share with those of infllm_triton.py. Sizes that are no powers of two are filled up with masked
rows and columns: any group, head size and block size will do. Products of float32 are exact, unless
`torch.set_float32_matmul_precision` allows TF32. Nothing here was tuned on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_rl.kernels.infllm import LARGEST, Sequences, Settings, check, choose
from lit_rl.kernels.infllm_torch import pool

TILE = 32
"""Pooled keys or blocks at a time."""
ROWS = 16
"""Of a product over several queries: queries times the heads of a group, filled up to a power of two."""
OPTIONS = {"num_warps": 8, "num_stages": 2}
"""With heads of 128 and 16 to a group no kernel in bfloat16 spills registers, and none needs more than 86 KiB of shared memory;
in float32 the gradient of keys and values does spill."""
SCORES = 2**28
"""Block scores in memory at once, in elements."""


@triton.jit
def load_rows(x, head_stride, column_stride, at, there, heads, n_heads, d, n_d, UPCAST: tl.constexpr):
    """(rows, d): at each row's offset, head and column; zero outside."""
    place = at[:, None] + heads.to(tl.int64)[:, None] * head_stride + d[None, :] * column_stride
    found = tl.load(x + place, mask=(there & (heads < n_heads))[:, None] & (d < n_d)[None, :], other=0.0)
    return found.to(tl.float32) if UPCAST else found


@triton.jit
def _norm(
    q, pooled, position, n_d, D: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr, scale,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(rows,): the log-sum-exp of the products of queries with the pooled keys in their past; -inf without any."""
    top = tl.full((q.shape[0],), -1e30, tl.float32)
    total = tl.zeros((q.shape[0],), tl.float32)
    d = tl.arange(0, D)
    count = (tl.max(position, 0) - SIZE + 1 + STRIDE) // STRIDE
    for first in range(0, count, TILE):
        j = first + tl.arange(0, TILE)
        keys = tl.load(
            pooled + j[:, None] * n_d + d[None, :], mask=(j < count)[:, None] & (d < n_d)[None, :], other=0.0
        )
        a = tl.dot(q, tl.trans(keys.to(q.dtype)), input_precision=PRECISION) * scale
        seen = (j[None, :] * STRIDE + SIZE - 1 <= position[:, None]) & (j < count)[None, :]
        higher = tl.maximum(top, tl.max(tl.where(seen, a, -1e30), 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.where(seen, tl.exp(a - higher[:, None]), 0.0), 1)
        top = higher
    return tl.where(total > 0.0, top + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))


@triton.jit
def _scores(
    q, q_row, q_head, q_column, q_d, fine, coarse, n_fine, n_coarse, scores, sequence, row, column, position,
    n_queries, n_heads, group, n_d, n_blocks, scale,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, COARSE: tl.constexpr, LARGEST: tl.constexpr,
    D: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """scores (M, K, n_blocks). The queries of a program may belong to several sequences: one after the other."""
    head = tl.program_id(1)
    r = tl.arange(0, QUERIES * GROUP)
    mine = tl.program_id(0) * QUERIES + r // GROUP
    inside = mine < n_queries
    of = tl.load(sequence + mine, mask=inside, other=-1)
    where = tl.load(row + mine, mask=inside, other=0) * q_row + tl.load(column + mine, mask=inside, other=0) * q_column
    t = tl.load(position + mine, mask=inside, other=-1)
    d = tl.arange(0, D)
    own = load_rows(
        q + head.to(tl.int64) * group * q_head, q_head, q_d, where, inside, r % GROUP, group, d, n_d, UPCAST
    )
    real = (r % GROUP < group)[:, None]
    queries = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    for s in range(tl.min(tl.where(inside, of, 2147483647), 0), tl.max(of, 0) + 1):
        at = tl.where(of == s, t, -1)
        keys = fine + (s * n_heads + head).to(tl.int64) * n_fine * n_d
        norm = tl.full((QUERIES * GROUP,), float("-inf"), tl.float32)
        if COARSE:
            wide = coarse + (s * n_heads + head).to(tl.int64) * n_coarse * n_d
            norm = _norm(own, wide, at, n_d, D, 4 * SIZE, 4 * STRIDE, TILE, scale, PRECISION)
        if tl.min(tl.where(at >= SIZE - 1, norm, 0.0), 0) == float("-inf"):
            exact = _norm(own, keys, at, n_d, D, SIZE, STRIDE, TILE, scale, PRECISION)
            norm = tl.where(norm == float("-inf"), exact, norm)
        for first in range(0, tl.max(at, 0) // BLOCK + 1, TILE):
            b = first + tl.arange(0, TILE)
            best = tl.zeros((QUERIES, TILE), tl.float32)
            for i in range(0, BLOCK // STRIDE + SIZE // STRIDE - 1):
                j = b * (BLOCK // STRIDE) - (SIZE // STRIDE - 1) + i
                there = (j >= 0) & (j < n_fine)
                x = tl.load(keys + j[:, None] * n_d + d[None, :], mask=there[:, None] & (d < n_d)[None, :], other=0.0)
                a = tl.dot(own, tl.trans(x.to(own.dtype)), input_precision=PRECISION) * scale
                seen = there[None, :] & (j[None, :] * STRIDE + SIZE - 1 <= at[:, None]) & real
                mass = tl.where(seen, tl.exp(tl.minimum(a - tl.where(seen, norm[:, None], 0.0), LARGEST)), 0.0)
                best = tl.maximum(best, tl.sum(tl.reshape(mass, (QUERIES, GROUP, TILE)), 1))
            stored = tl.load(sequence + queries, mask=queries < n_queries, other=-1) == s
            place = (queries.to(tl.int64)[:, None] * n_heads + head) * n_blocks + b[None, :]
            tl.store(scores + place, best, mask=stored[:, None] & (b < n_blocks)[None, :])


INTERPRETED = not isinstance(_scores, triton.JITFunction)
"""TRITON_INTERPRET=1: kernels run in Python, on any device. Its products of bfloat16 are wrong, so they are upcast."""


def common(*sizes: int) -> dict[str, Any]:
    """Constants of all kernels: sizes, filled up to what a product takes."""
    names = ("D", "E")[: len(sizes)]
    return {
        **{name: max(16, triton.next_power_of_2(size)) for name, size in zip(names, sizes, strict=True)},
        **OPTIONS,
        "UPCAST": INTERPRETED,
        "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
    }


def several(group: int) -> dict[str, int]:
    """Constants of kernels that take several queries at a time."""
    filled = triton.next_power_of_2(group)
    return {"GROUP": filled, "QUERIES": max(1, ROWS // filled)}


def select(
    q: Tensor, k: Tensor, seqs: Sequences, settings: Settings, scale: float, pooled: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """As `naive_select`. pooled: what `infllm_torch.pool` gives for the fine and the coarse kernels, if a cache has kept it."""
    check(q, k)
    heads, group, n_d = k.shape[1], q.shape[1] // k.shape[1], q.shape[3]
    with torch.no_grad(), torch.cuda.device_of(q):
        fine, coarse = (x.contiguous() for x in pooled or (pool(k, seqs, *settings.kernels(c)) for c in (False, True)))
        longest = int(seqs.k_length.max())
        n_blocks, width = triton.cdiv(longest, settings.block_size), settings.width(longest)
        sequence, column, position = seqs.queries()
        row, constants, parts = seqs.row[sequence], several(group) | common(n_d), []
        step = max(1, SCORES // (heads * n_blocks))
        for i in range(0, len(sequence), step):
            mine = slice(i, i + step)
            t = position[mine]
            scores = q.new_zeros(len(t), heads, n_blocks, dtype=torch.float32)
            _scores[(triton.cdiv(len(t), constants["QUERIES"]), heads)](
                q, *q.stride(), fine, coarse, fine.shape[2], coarse.shape[2], scores,
                sequence[mine], row[mine], column[mine], t, len(t), heads, group, n_d, n_blocks, scale,
                SIZE=settings.kernel_size, STRIDE=settings.kernel_stride, BLOCK=settings.block_size,
                COARSE=settings.coarse, LARGEST=LARGEST, TILE=TILE, **constants,
            )  # fmt: skip
            parts.append(choose(scores.transpose(0, 1), t[None], settings, width).transpose(0, 1))
        return torch.cat(parts)
