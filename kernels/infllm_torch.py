"""InfLLM-v2 in torch operations, for any device and type: `naive_*` of infllm.py are its specification.

Selection goes by parts of the queries, so that scores of a few megabytes are in memory at a time. Attention goes by blocks of
keys: one matrix product for all the queries that chose a block, whose sums are kept as in the online softmax of Milakov and
Gimelshein 2018; the backward computes the weights again. Single queries, as in decoding, gather their blocks instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lit_rl.kernels.infllm import LARGEST, Sequences, Settings, check, choose, full

BUDGET = 2**20
"""Elements of a matrix of scores."""


def pool(k: Tensor, seqs: Sequences, size: int, stride: int, first: Tensor | None = None) -> Tensor:
    """Keys (R, K, S, D) to pooled ones (N, K, P, D) of each sequence, from the kernel `first` (N,) on, or all. Those that
    reach beyond a sequence's end are filled with what its last key gives."""
    first = torch.zeros_like(seqs.row) if first is None else first
    count = int((((seqs.k_length - size).div(stride, rounding_mode="floor") + 1).clamp(min=0) - first).max())
    if count <= 0:
        return full(k.new_zeros(len(seqs.row), k.shape[1], 0, k.shape[3]))
    steps = torch.arange((count - 1) * stride + size, device=k.device)
    at = (first[:, None] * stride + steps).minimum(seqs.k_length[:, None] - 1).clamp(min=0) + seqs.k_start[:, None]
    keys = full(k[seqs.row[:, None], :, at])  # (N, steps, K, D)
    parts = keys.unflatten(1, (-1, stride)).sum(2)  # (N, steps / stride, K, D)
    return (parts.unfold(1, size // stride, 1).sum(-1) / size).transpose(1, 2)


def select(
    q: Tensor, k: Tensor, seqs: Sequences, settings: Settings, scale: float, pooled: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """As `naive_select`. pooled: what `pool` gives for the fine and the coarse kernels, if a cache has kept it."""
    check(q, k)
    with torch.no_grad():
        fine, coarse = pooled or (pool(k, seqs, *settings.kernels(c)) for c in (False, True))
        width = settings.width(int(seqs.k_length.max()))
        lengths = seqs.q_length.tolist()
        alike = len(set(lengths)) == 1
        result = []
        for n in [slice(None)] if alike else [slice(i, i + 1) for i in range(len(lengths))]:
            part = Sequences(*(x[n] for x in seqs))
            result.append(_select(q, part, settings, scale, fine[n], coarse[n], width))
        return torch.cat(result)


def _select(
    q: Tensor, seqs: Sequences, settings: Settings, scale: float, fine: Tensor, coarse: Tensor, width: int
) -> Tensor:
    """For sequences with equally many queries."""
    heads, length, result = fine.shape[1], int(seqs.q_length[0]), []
    step = max(1, BUDGET // max(1, len(seqs.row) * q.shape[1] * fine.shape[2]))
    for start in range(0, length, step):
        offset = torch.arange(start, min(start + step, length), device=q.device)
        t = (seqs.k_length - seqs.q_length)[:, None] + offset  # (N, C)
        part = q[seqs.row[:, None], :, seqs.q_start[:, None] + offset]  # (N, C, H, D)
        part = full(part).transpose(1, 2).unflatten(1, (heads, -1))  # (N, K, G, C, D)
        blocks = int(t.max()) // settings.block_size + 1
        scores = block_scores(part, t, fine, coarse, settings, scale, blocks)
        result.append(choose(scores, t[:, None], settings, width).transpose(1, 2))  # (N, C, K, W)
    return torch.cat(result, 1).flatten(0, 1)


def block_scores(
    q: Tensor, t: Tensor, fine: Tensor, coarse: Tensor, settings: Settings, scale: float, blocks: int
) -> Tensor:
    """Queries (N, K, G, C, D) at positions (N, C) and pooled keys to scores (N, K, C, blocks)."""

    def products(kernels: Tensor, size: int, stride: int) -> Tensor:
        seen = ((t - size + stride + 1).div(stride, rounding_mode="floor")).clamp(min=0)  # (N, C)
        kernels = kernels[:, :, : int(seen.max())]
        a = q.flatten(2, 3) @ kernels.mT  # (N, K, G * C, P)
        hidden = torch.arange(kernels.shape[2], device=q.device) >= seen[..., None]  # (N, C, P)
        return a.mul_(scale).unflatten(2, q.shape[2:4]).masked_fill_(hidden[:, None, None], -math.inf)

    size, stride = settings.kernels()
    a = products(fine, size, stride)
    if settings.coarse:
        norm = products(coarse, *settings.kernels(coarse=True)).logsumexp(-1, keepdim=True)
        if bool((t < 4 * size - 1).any()):
            norm = torch.where(norm.isfinite(), norm, a.logsumexp(-1, keepdim=True))
    else:
        norm = a.logsumexp(-1, keepdim=True)
    norm = norm.masked_fill(norm == -math.inf, 0.0)  # nothing seen: the exponents are -inf all the same
    mass = a.sub_(norm).clamp_(max=LARGEST).exp_().sum(2)  # (N, K, C, P)
    before, each = size // stride - 1, settings.block_size // stride
    mass = F.pad(mass, (before, max(0, blocks * each - mass.shape[-1])))
    return F.max_pool1d(mass.flatten(0, 2), each + before, each).unflatten(0, mass.shape[:3])[..., :blocks]


class Index(NamedTuple):
    """Chosen blocks the other way round: which queries chose a block. Blocks are numbered through all sequences."""

    queries: Tensor  # (pairs,) in order of key head, block, query
    offsets: Tensor  # (K * blocks + 1,): where the queries of a head's block begin
    sequence: Tensor  # (blocks,)
    first: Tensor  # (blocks,): the position of the block's first key in its sequence


def invert(blocks: Tensor, seqs: Sequences, block_size: int) -> Index:
    """blocks (M, K, W) as `select` gives them. Deterministic."""
    of, _, _ = seqs.queries()
    counts = (seqs.k_length + block_size - 1) // block_size
    begin = counts.cumsum(0) - counts
    sequence = torch.arange(len(counts), device=blocks.device).repeat_interleave(counts)
    first = (torch.arange(len(sequence), device=blocks.device) - begin[sequence]) * block_size
    heads = torch.arange(blocks.shape[1], device=blocks.device)[:, None]
    cell = heads * len(sequence) + begin[of, None, None] + blocks
    query, head, slot = (blocks >= 0).nonzero(as_tuple=True)
    cells, order = cell[query, head, slot].sort(stable=True)  # queries ascend already
    offsets = cells.bincount(minlength=blocks.shape[1] * len(sequence)).cumsum(0)
    return Index(query[order], F.pad(offsets, (1, 0)), sequence, first)


class _Pieces:
    """The products of an attention by blocks: scaled queries (K, M, G, D), and keys and values as they are."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, seqs: Sequences, index: Index, size: int, scale: float) -> None:
        of, column, self.position = seqs.queries()
        self.row, self.column = seqs.row[of], column
        self.k, self.v, self.seqs, self.index, self.size, self.scale = k, v, seqs, index, size, scale
        self.q = self.rows(q, k.shape[1]) * scale

    def rows(self, x: Tensor, heads: int) -> Tensor:
        """(R, H, T, D) to (K, M, G, D)."""
        return full(x[self.row, :, self.column]).unflatten(1, (heads, -1)).transpose(0, 1)

    def back(self, x: Tensor, like: Tensor) -> Tensor:
        """And back."""
        out = like.new_zeros(*like.shape[:3], x.shape[-1])
        out[self.row, :, self.column] = x.transpose(0, 1).flatten(1, 2).to(like.dtype)
        return out

    def __iter__(self) -> Iterator[tuple[int, Tensor, tuple[Any, ...], Tensor, Tensor, Tensor]]:
        """A key head, queries (n,) that chose one block, where its keys are, those keys and values, scores (n, G, B)."""
        offsets, n_blocks = self.index.offsets.tolist(), len(self.index.first)
        tables = (x.tolist() for x in (self.index.sequence, self.index.first))
        places = list(zip(*tables, strict=True))
        rows, starts, lengths = (x.tolist() for x in (self.seqs.row, self.seqs.k_start, self.seqs.k_length))
        step = max(1, BUDGET // (self.q.shape[2] * self.size))
        for cell, (begin, end) in enumerate(pairwise(offsets)):
            head, block = divmod(cell, n_blocks)
            n, first = places[block]
            last = min(first + self.size, lengths[n])
            where = (rows[n], head, slice(starts[n] + first, starts[n] + last))
            for i in range(begin, end, step):
                queries = self.index.queries[i : min(i + step, end)]
                keys, values, x = full(self.k[where]), full(self.v[where]), self.q[head].index_select(0, queries)
                scores = (x.flatten(0, 1) @ keys.mT).view(*x.shape[:2], -1)
                n_within = int((self.position[queries] < last).sum())  # queries ascend: the first ones are in the block
                ahead = torch.arange(first, last, device=x.device) > self.position[queries[:n_within], None]
                scores[:n_within].masked_fill_(ahead[:, None], -math.inf)
                yield head, queries, where, keys, values, scores


class _ByBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, seqs: Sequences, index: Index, block_size: int, scale: float
    ) -> Tensor:
        pieces = _Pieces(q, k, v, seqs, index, block_size, scale)
        top = pieces.q.new_full(pieces.q.shape[:3], -math.inf)  # (K, M, G): largest score so far
        total = torch.zeros_like(top)  # sum of exp(score - top)
        mean = top.new_zeros(*top.shape, v.shape[3])  # sum of exp(score - top) value
        for head, queries, _, _, values, scores in pieces:
            before = top[head].index_select(0, queries)
            higher = before.maximum(scores.amax(-1))
            p = scores.sub_(higher[..., None]).exp_()  # every query sees a key of each block it chose
            shrink = (before - higher).exp()
            top[head].index_copy_(0, queries, higher)
            total[head].index_copy_(0, queries, total[head].index_select(0, queries).mul_(shrink).add_(p.sum(-1)))
            summed = mean[head].index_select(0, queries).mul_(shrink[..., None])
            summed.flatten(0, 1).addmm_(p.flatten(0, 1), values)
            mean[head].index_copy_(0, queries, summed)
        mean /= total[..., None]
        ctx.save_for_backward(q, k, v, mean, total.log_().add_(top), *seqs, *index)
        ctx.settings = block_size, scale
        return pieces.back(mean, q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Any:
        q, k, v, out, norm, *tables = ctx.saved_tensors
        pieces = _Pieces(q, k, v, Sequences(*tables[:5]), Index(*tables[5:]), *ctx.settings)
        up = pieces.rows(d_out, k.shape[1])  # (K, M, G, E)
        delta = (up * out).sum(-1)
        d_q = torch.zeros_like(pieces.q)
        d_k, d_v = (torch.zeros_like(x, dtype=out.dtype) for x in (k, v))
        with torch.autocast(q.device.type, enabled=False):
            for head, queries, where, keys, values, scores in pieces:
                p = scores.sub_(norm[head].index_select(0, queries)[..., None]).exp_()  # (n, G, B)
                mine = up[head].index_select(0, queries).flatten(0, 1)
                d_v[where] += p.flatten(0, 1).mT @ mine
                d_p = (mine @ values.mT).view_as(p)
                d_s = p.mul_(d_p.sub_(delta[head].index_select(0, queries)[..., None])).flatten(0, 1)
                d_q[head].index_add_(0, queries, (d_s @ keys).view(len(queries), *d_q.shape[2:]))
                d_k[where] += d_s.mT @ pieces.q[head].index_select(0, queries).flatten(0, 1)
        return pieces.back(d_q * pieces.scale, q), d_k.to(k.dtype), d_v.to(v.dtype), None, None, None, None


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, seqs: Sequences, block_size: int, scale: float
) -> Tensor:
    """One query (R, H, 1, D) in each sequence: its keys are copied together."""
    size = blocks.shape[2] * block_size
    at = (blocks.long()[..., None] * block_size + torch.arange(block_size, device=q.device)).flatten(2)  # (N, K, size)
    seen = (blocks >= 0).repeat_interleave(block_size, 2) & (at < seqs.k_length[:, None, None])
    at = (at + seqs.k_start[:, None, None]).masked_fill(~seen, 0)
    heads = torch.arange(k.shape[1], device=q.device)[:, None]
    keys, values = (x[seqs.row[:, None, None], heads, at] for x in (k, v))  # (N, K, size, D)
    query = q[seqs.row].squeeze(2).unflatten(1, (k.shape[1], -1))  # (N, K, G, D)
    mask = seen[:, :, None].expand(-1, -1, query.shape[2], size)
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    return q.new_zeros(*q.shape[:3], v.shape[3]).index_copy(0, seqs.row, out.flatten(1, 2)[:, :, None])


def attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, seqs: Sequences, block_size: int, scale: float
) -> Tensor:
    """As `naive_attention`. Differentiable once in q, k and v."""
    check(q, k, v)
    if q.shape[2] == 1:
        return _gathered(q, k, v, blocks, seqs, block_size, scale)
    index = invert(blocks, seqs, block_size)
    return _ByBlocks.apply(q, k, v, seqs, index, block_size, scale)  # type: ignore[no-any-return]
