"""InfLLM-v2's block-sparse attention as Triton kernels: `naive_attention` of infllm.py is their specification.

A program owns one query with all heads of a group, as the rows of a product, and walks over its blocks. Backward: the same for
the gradient of queries; for that of keys and values a program owns a block and walks over the queries that chose it, a few at a
time, in the order of `invert`. Each sum has one owner and one order: no atomics, the same bits each time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_rl.kernels.infllm import Sequences, check
from lit_rl.kernels.infllm_torch import invert
from lit_rl.kernels.infllm_triton_select import common, load_rows, select, several

__all__ = ["attention", "select"]
DTYPES = torch.float32, torch.float16, torch.bfloat16


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
    norm, up, delta, d_k, d_v, queries, offsets, block_sequence, block_first, n_keys, row, column, position,
    seq_row, k_start, k_length, group, n_d, n_e, block_size, scale,
    BLOCK: tl.constexpr, D: tl.constexpr, E: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Of block and key head: its rows of d_k (R, K, S, D) and d_v (R, K, S, E), contiguous float32."""
    block, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n_blocks, n_heads = tl.num_programs(0), tl.num_programs(1)
    begin, end = tl.load(offsets + head * n_blocks + block), tl.load(offsets + head * n_blocks + block + 1)
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
    rows = (line * n_heads + head) * n_keys + places
    tl.store(d_k + rows[:, None] * n_d + d[None, :], sum_k, mask=inside[:, None] & (d < n_d)[None, :])
    tl.store(d_v + rows[:, None] * n_e + e[None, :], sum_v, mask=inside[:, None] & (e < n_e)[None, :])


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
        _, row, column, position, _ = tables
        up = d_out[row, :, column].float().contiguous()  # (M, H, E)
        delta = (up * out).sum(-1)
        d_q = d_k = d_v = None
        if ctx.needs_input_grad[0]:
            rows = up.new_empty(*up.shape[:2], q.shape[3])
            _walk(q, k, v, blocks, tables, block_size, scale, norm=norm, up=up, delta=delta, d_q=rows)
            d_q = torch.zeros_like(q)
            d_q[row, :, column] = rows.to(q.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            index = invert(blocks, seqs, block_size)
            d_k, d_v = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
            with torch.cuda.device_of(q):
                _backward[(len(index.first), k.shape[1])](
                    q, *q.stride(), k, *k.stride(), v, *v.stride(), norm, up, delta, d_k, d_v, *index, k.shape[2],
                    row, column, position, seqs.row, seqs.k_start, seqs.k_length,
                    q.shape[1] // k.shape[1], q.shape[3], v.shape[3], block_size, scale,
                    BLOCK=max(16, triton.next_power_of_2(block_size)), **several(q.shape[1] // k.shape[1]),
                    **common(q.shape[3], v.shape[3]),
                )  # fmt: skip
            d_k, d_v = d_k.to(k.dtype), d_v.to(v.dtype)
        return d_q, d_k, d_v, None, None, None, None


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
