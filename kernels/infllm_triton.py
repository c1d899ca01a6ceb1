"""InfLLM-v2's block-sparse attention as Triton kernels: `naive_attention` of infllm.py is their specification.

A program owns one query with all heads of a group, as the rows of a product, and walks over its blocks. Backward: the same for
the gradient of queries; for that of keys and values a program owns a block and walks over the queries that chose it, a few at a
time, in the order of `invert`. All queries choose the first block, so that a long walk is shared by several programs, whose sums
another adds up. Each sum has one owner and one order: no atomics, the same bits each time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lit_rl.kernels.infllm import Sequences, check
from lit_rl.kernels.infllm_torch import invert
from lit_rl.kernels.infllm_triton_select import common, load_rows, select, several

__all__ = ["attention", "select"]
DTYPES = torch.float32, torch.float16, torch.bfloat16
WALK, WALKS = 512, 2048
"""Queries of a program in the backward of keys and values: at least so many, and in so many programs more than there are blocks."""


@triton.jit
def _forward(
    q, q_row, q_head, q_column, q_d, k, k_row, k_head, k_column, k_d, v, v_row, v_head, v_column, v_d,
    out, norm, up, delta, d_q, blocks, counts, width, sequence, row, column, position, k_start, group, n_d, n_e, block_size, scale,
    BACKWARD: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, E: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Of query and key head: out (M, H, E) and norm (M, H), or backward d_q (M, H, D), all contiguous float32."""
    query, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n_heads = tl.num_programs(1)
    of, t = tl.load(sequence + query), tl.load(position + query)
    line, at = tl.load(row + query), tl.load(column + query)
    start = tl.load(k_start + of)
    g, d, e = tl.arange(0, GROUP), tl.arange(0, D), tl.arange(0, E)
    zero = tl.zeros((GROUP,), tl.int64)
    x = load_rows(
        q + line * q_row + head * group * q_head + at * q_column, q_head, q_d, zero, g < group, g, group, d, n_d, UPCAST
    )
    rows = (query * n_heads + head) * group + g
    if BACKWARD:
        lse = tl.load(norm + rows, mask=g < group, other=0.0)
        change = tl.load(delta + rows, mask=g < group, other=0.0)
        y = tl.load(up + rows[:, None] * n_e + e[None, :], mask=(g < group)[:, None] & (e < n_e)[None, :], other=0.0)
        y = y.to(x.dtype)
        result = tl.zeros((GROUP, D), tl.float32)
    else:
        top = tl.full((GROUP,), -1e30, tl.float32)
        total = tl.zeros((GROUP,), tl.float32)
        result = tl.zeros((GROUP, E), tl.float32)
    for i in range(0, tl.load(counts + query * n_heads + head)):
        block = tl.load(blocks + (query * n_heads + head) * width + i).to(tl.int64)
        j = tl.arange(0, BLOCK)
        seen = (j < block_size) & (block * block_size + j <= t)
        places = start + block * block_size + j
        none = tl.zeros((BLOCK,), tl.int32)
        keys = load_rows(
            k + line * k_row + head * k_head, k_head, k_d, places * k_column, seen, none, 1, d, n_d, UPCAST
        )
        values = load_rows(
            v + line * v_row + head * v_head, v_head, v_d, places * v_column, seen, none, 1, e, n_e, UPCAST
        )
        s = tl.dot(x, tl.trans(keys), input_precision=PRECISION) * scale
        if BACKWARD:
            p = tl.where(seen[None, :], tl.exp(s - lse[:, None]), 0.0)
            d_p = tl.dot(y, tl.trans(values), input_precision=PRECISION)
            d_s = (p * (d_p - change[:, None]) * scale).to(keys.dtype)
            result = tl.dot(d_s, keys, result, input_precision=PRECISION)
        else:
            higher = tl.maximum(top, tl.max(tl.where(seen[None, :], s, -1e30), 1))
            p = tl.where(seen[None, :], tl.exp(s - higher[:, None]), 0.0)
            shrink = tl.exp(top - higher)
            total = total * shrink + tl.sum(p, 1)
            result = tl.dot(p.to(values.dtype), values, result * shrink[:, None], input_precision=PRECISION)
            top = higher
    if BACKWARD:
        tl.store(d_q + rows[:, None] * n_d + d[None, :], result, mask=(g < group)[:, None] & (d < n_d)[None, :])
    else:
        there = (g < group)[:, None] & (e < n_e)[None, :]
        tl.store(out + rows[:, None] * n_e + e[None, :], result / total[:, None], mask=there)
        tl.store(norm + rows, top + tl.log(total), mask=g < group)


@triton.jit
def _backward(
    q, q_row, q_head, q_column, q_d, k, k_row, k_head, k_column, k_d, v, v_row, v_head, v_column, v_d,
    norm, up, delta, part_k, part_v, queries, begins, ends, cells, block_sequence, block_first, n_blocks, n_heads,
    row, column, position, seq_row, k_start, k_length, group, n_d, n_e, block_size, scale,
    BLOCK: tl.constexpr, D: tl.constexpr, E: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Of some of the queries of a cell, which is a key head's block: part_k (P, block_size, D) and part_v (P, block_size, E),
    contiguous float32."""
    part = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(begins + part), tl.load(ends + part)
    cell = tl.load(cells + part)
    block, head = cell % n_blocks, cell // n_blocks
    of, first = tl.load(block_sequence + block), tl.load(block_first + block)
    line, start, length = tl.load(seq_row + of), tl.load(k_start + of), tl.load(k_length + of)
    j, d, e = tl.arange(0, BLOCK), tl.arange(0, D), tl.arange(0, E)
    inside = (j < block_size) & (first + j < length)
    none = tl.zeros((BLOCK,), tl.int32)
    places = start + first + j
    keys = load_rows(k + line * k_row + head * k_head, k_head, k_d, places * k_column, inside, none, 1, d, n_d, UPCAST)
    values = load_rows(
        v + line * v_row + head * v_head, v_head, v_d, places * v_column, inside, none, 1, e, n_e, UPCAST
    )
    sum_k = tl.zeros((BLOCK, D), tl.float32)
    sum_v = tl.zeros((BLOCK, E), tl.float32)
    r = tl.arange(0, QUERIES * GROUP)
    g = r % GROUP
    for i in range(begin, end, QUERIES):
        there = (i + r // GROUP < end) & (g < group)
        query = tl.load(queries + i + r // GROUP, mask=there, other=0)
        at = tl.load(row + query, mask=there, other=0) * q_row + tl.load(column + query, mask=there, other=0) * q_column
        x = load_rows(q + head * group * q_head, q_head, q_d, at, there, g, group, d, n_d, UPCAST)
        rows = (query * n_heads + head) * group + g
        y = tl.load(up + rows[:, None] * n_e + e[None, :], mask=there[:, None] & (e < n_e)[None, :], other=0.0)
        y = y.to(x.dtype)
        t = tl.load(position + query, mask=there, other=-1)
        lse = tl.load(norm + rows, mask=there, other=0.0)
        change = tl.load(delta + rows, mask=there, other=0.0)
        seen = inside[None, :] & (first + j[None, :] <= t[:, None])
        s = tl.dot(x, tl.trans(keys), input_precision=PRECISION) * scale
        p = tl.where(seen, tl.exp(s - lse[:, None]), 0.0)
        sum_v = tl.dot(tl.trans(p.to(y.dtype)), y, sum_v, input_precision=PRECISION)
        d_p = tl.dot(y, tl.trans(values), input_precision=PRECISION)
        d_s = (p * (d_p - change[:, None]) * scale).to(x.dtype)
        sum_k = tl.dot(tl.trans(d_s), x, sum_k, input_precision=PRECISION)
    rows = part * block_size + j
    tl.store(part_k + rows[:, None] * n_d + d[None, :], sum_k, mask=(j < block_size)[:, None] & (d < n_d)[None, :])
    tl.store(part_v + rows[:, None] * n_e + e[None, :], sum_v, mask=(j < block_size)[:, None] & (e < n_e)[None, :])


@triton.jit
def _add_up(
    parts, total, offsets, block_sequence, block_first, n_blocks, n_heads, n_keys, seq_row, k_start, k_length, n_d, block_size,
    BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Of a cell: its rows of total (R, K, S, D), contiguous, from its parts (P, block_size, D)."""
    cell = tl.program_id(0).to(tl.int64)
    block, head = cell % n_blocks, cell // n_blocks
    of, first = tl.load(block_sequence + block), tl.load(block_first + block)
    line, start, length = tl.load(seq_row + of), tl.load(k_start + of), tl.load(k_length + of)
    j, d = tl.arange(0, BLOCK), tl.arange(0, D)
    there = ((j < block_size) & (first + j < length))[:, None] & (d < n_d)[None, :]
    result = tl.zeros((BLOCK, D), tl.float32)
    for part in range(tl.load(offsets + cell), tl.load(offsets + cell + 1)):
        result += tl.load(parts + (part * block_size + j)[:, None] * n_d + d[None, :], mask=there, other=0.0)
    rows = (line * n_heads + head) * n_keys + start + first + j
    tl.store(total + rows[:, None] * n_d + d[None, :], result, mask=there)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, seqs: Sequences, block_size: int, scale: float
    ) -> Tensor:
        blocks = blocks.contiguous()
        tables = _tables(seqs)
        out = q.new_empty(len(blocks), q.shape[1], v.shape[3], dtype=torch.float32)
        norm = q.new_empty(len(blocks), q.shape[1], dtype=torch.float32)
        _walk(q, k, v, blocks, tables, block_size, scale, out=out, norm=norm)
        ctx.save_for_backward(q, k, v, blocks, out, norm, *seqs)
        ctx.settings = block_size, scale
        _, row, column, _, _ = tables
        result = q.new_zeros(*q.shape[:3], v.shape[3])
        result[row, :, column] = out.to(q.dtype)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Any:
        q, k, v, blocks, out, norm, *tables = ctx.saved_tensors
        block_size, scale = ctx.settings
        seqs = Sequences(*tables)
        tables = _tables(seqs)
        _, row, column, _, _ = tables
        up = d_out[row, :, column].float().contiguous()  # (M, H, E)
        delta = (up * out).sum(-1)
        d_q = d_k = d_v = None
        if ctx.needs_input_grad[0]:
            rows = up.new_empty(*up.shape[:2], q.shape[3])
            _walk(q, k, v, blocks, tables, block_size, scale, norm=norm, up=up, delta=delta, d_q=rows)
            d_q = torch.zeros_like(q)
            d_q[row, :, column] = rows.to(q.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            d_k, d_v = _keys_and_values(q, k, v, norm, up, delta, blocks, seqs, tables, block_size, scale)
        return d_q, d_k, d_v, None, None, None, None


def _keys_and_values(
    q: Tensor, k: Tensor, v: Tensor, norm: Tensor, up: Tensor, delta: Tensor, blocks: Tensor, seqs: Sequences,
    tables: tuple[Tensor, ...], block_size: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """d_k and d_v."""
    queries, offsets, sequence, first = invert(blocks, seqs, block_size)
    size = max(WALK, triton.cdiv(len(queries), WALKS))
    counts = (offsets.diff() + size - 1) // size  # of a cell's parts
    cells = torch.arange(len(counts), device=q.device).repeat_interleave(counts)
    ends = F.pad(counts.cumsum(0), (1, 0))
    begins = offsets[cells] + (torch.arange(len(cells), device=q.device) - ends[cells]) * size
    group, sizes, numbers = q.shape[1] // k.shape[1], (k.shape[3], v.shape[3]), (len(first), k.shape[1])
    constants = {"BLOCK": max(16, triton.next_power_of_2(block_size))}
    parts = [q.new_empty(len(cells), block_size, n, dtype=torch.float32) for n in sizes]
    totals = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v)]
    with torch.cuda.device_of(q):
        _backward[(len(cells),)](
            q, *q.stride(), k, *k.stride(), v, *v.stride(), norm, up, delta, *parts, queries, begins,
            torch.minimum(begins + size, offsets[cells + 1]), cells, sequence, first, *numbers, *tables[1:4],
            seqs.row, seqs.k_start, seqs.k_length, group, *sizes, block_size, scale,
            **constants, **several(group), **common(*sizes),
        )  # fmt: skip
        for part, total, n in zip(parts, totals, sizes, strict=True):
            _add_up[(len(counts),)](
                part, total, ends, sequence, first, *numbers, k.shape[2], seqs.row, seqs.k_start, seqs.k_length, n, block_size,
                **constants, D=max(16, triton.next_power_of_2(n)),
            )  # fmt: skip
    return totals[0].to(k.dtype), totals[1].to(v.dtype)


def _tables(seqs: Sequences) -> tuple[Tensor, ...]:
    """Of each query: sequence, row, column, position; and of each sequence where its keys begin."""
    sequence, column, position = seqs.queries()
    return sequence, seqs.row[sequence], column, position, seqs.k_start


def _walk(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, tables: tuple[Tensor, ...], block_size: int, scale: float,
    *, norm: Tensor, out: Tensor | None = None, up: Tensor | None = None, delta: Tensor | None = None,
    d_q: Tensor | None = None,
) -> None:  # fmt: skip
    """`_forward` for the output, or for d_q."""
    group = q.shape[1] // k.shape[1]
    with torch.cuda.device_of(q):
        _forward[(len(blocks), k.shape[1])](
            q, *q.stride(), k, *k.stride(), v, *v.stride(), out, norm, up, delta, d_q,
            blocks, (blocks >= 0).sum(-1), blocks.shape[2], *tables, group, q.shape[3], v.shape[3], block_size, scale,
            BACKWARD=d_q is not None, BLOCK=max(16, triton.next_power_of_2(block_size)),
            GROUP=max(16, triton.next_power_of_2(group)), **common(q.shape[3], v.shape[3]),
        )  # fmt: skip


@torch.compiler.disable  # a graph of torch.compile breaks here: the kernels are compiled already
def attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, seqs: Sequences, block_size: int, scale: float
) -> Tensor:
    """As `naive_attention`, for float32, float16 and bfloat16, with sums in float32. Differentiable once in q, k and v."""
    check(q, k, v)
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"queries, keys, values are {q.dtype}, {k.dtype}, {v.dtype}: all must be one of {DTYPES}")
    seqs = Sequences(*(x.contiguous() for x in seqs))
    return _Attention.apply(q, k, v, blocks, seqs, block_size, scale)  # type: ignore[no-any-return]
