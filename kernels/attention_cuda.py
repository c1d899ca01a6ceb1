"""Attention of packed groups on a GPU: `naive_packed_attention` of attention.py is the specification.

All segments of all groups attend to themselves in one call of flash attention, and all responses to their prompts in another;
the two are merged by their denominators, as on a CPU.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_rl.kernels.attention import groups, naive_packed_attention, visible

MAX_DIM = 256
"""Of a head, for flash attention; and a multiple of 8."""
ERROR = 0.03
"""Of flash attention in half precision, relative, at most."""


class Spans(NamedTuple):
    """Sequences for flash attention, one after the other: where they begin, (N + 1,) int32, and the longest."""

    starts: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> Spans:
        starts = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        return cls(starts.to(device, non_blocking=True), max(lengths, default=0))


class Plan(NamedTuple):
    """Of a pack: its segments; the tokens of responses and of their prompts, int64; and the spans of both, by group."""

    own: Spans
    responses: Tensor
    prompts: Tensor
    near: Spans
    far: Spans


def plan(blocks: Tensor, device: torch.device) -> Plan:
    """Made once for all layers, which get the same tensor of blocks, and kept with it."""
    found: Plan | None = getattr(blocks, "plan", None)
    if found is None:
        each = groups(blocks)
        segments = [block.length for group in each for block in group for _ in range(block.number)]
        pairs = [(group[0].tokens, slice(group[1].start, group[-1].tokens.stop)) for group in each if len(group) > 1]
        spans = [[part.stop - part.start for part in side] for side in zip(*pairs, strict=True)] or [[], []]
        tokens = [torch.cat([torch.arange(s.start, s.stop) for s in side]) for side in zip(*pairs, strict=True)]
        prompts, responses = (x.to(device, non_blocking=True) for x in tokens or [torch.arange(0)] * 2)
        far, near = (Spans.of(lengths, device) for lengths in spans)
        found = blocks.plan = Plan(Spans.of(segments, device), responses, prompts, near, far)  # type: ignore[attr-defined]
    return found


def _flash(q: Tensor, k: Tensor, v: Tensor, of: Spans, to: Spans, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Of q (M, H, D) and k, v (N, K, D): the attention (M, H, D), and the log of its denominators (H, M)."""
    forward = torch.ops.aten._flash_attention_forward
    out, norm, *_ = forward(q, k, v, of.starts, to.starts, of.longest, to.longest, 0.0, causal, False, scale=scale)
    return out, norm


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, norm: Tensor, of: Spans, to: Spans, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    backward, none = torch.ops.aten._flash_attention_backward, torch.empty(0, device=q.device)  # without dropout
    spans = of.starts, to.starts, of.longest, to.longest
    return backward(grad, q, k, v, out, norm, *spans, 0.0, causal, none, none, scale=scale)  # type: ignore[no-any-return]


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, at: Plan, scale: float) -> Tensor:
        out, norm = _flash(q, k, v, at.own, at.own, True, scale)
        if len(at.responses):
            far, far_norm = _flash(q[at.responses], k[at.prompts], v[at.prompts], at.near, at.far, False, scale)
            near_norm = norm[:, at.responses]
            share = (far_norm - near_norm).sigmoid().T[..., None]
            out[at.responses] = out[at.responses].lerp(far, share.to(out.dtype))
            norm[:, at.responses] = torch.logaddexp(near_norm, far_norm)
        ctx.save_for_backward(q, k, v, out, norm)
        ctx.plan, ctx.scale = at, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """A part's gradients are those of one softmax over all keys, since they are given its output and denominators."""
        (q, k, v, out, norm), at, scale = ctx.saved_tensors, ctx.plan, ctx.scale
        grad = grad.contiguous()
        d_q, d_k, d_v = _flash_backward(grad, q, k, v, out, norm, at.own, at.own, True, scale)
        if len(of := at.responses):
            parts = grad[of], q[of], k[at.prompts], v[at.prompts], out[of], norm[:, of].contiguous()
            gradients = _flash_backward(*parts, at.near, at.far, False, scale)
            for whole, tokens, part in zip((d_q, d_k, d_v), (of, at.prompts, at.prompts), gradients, strict=True):
                whole[tokens] += part
        return d_q, d_k, d_v, None, None


def masked_groups(blocks: Tensor, device: torch.device) -> list[tuple[slice, Tensor]]:
    """Of a pack: each group's tokens, and what they see of each other. Made and kept as a plan is."""
    found: list[tuple[slice, Tensor]] | None = getattr(blocks, "masked_groups", None)
    if found is None:
        each = [(slice(group[0].start, group[-1].tokens.stop), visible([group], device)) for group in groups(blocks)]
        found = blocks.masked_groups = each  # type: ignore[attr-defined]
    return found


@cache
def _agrees(heads: int, key_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether flash attention, which PyTorch does not promise to offer in this form, gives the twin's numbers here."""
    numbers = torch.Generator().manual_seed(0)
    shapes = [(1, n, 24, dim) for n in (heads, key_heads, key_heads, heads)]
    *inputs, up = (torch.randn(shape, generator=numbers).to(device, dtype) for shape in shapes)
    blocks, found = torch.tensor([[1, 1, 5], [0, 2, 4], [0, 1, 3], [1, 1, 8]]), []
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        try:
            for function, kind in ((_flash_attention, dtype), (naive_packed_attention, torch.float32)):
                x = [t.to(kind, copy=True).requires_grad_() for t in inputs]
                out = function(x[0], x[1], x[2], blocks, dim**-0.5)
                found.append([out, *torch.autograd.grad(out, x, up.to(kind))])
        except RuntimeError:
            return False
    return all(float((a - b).norm()) < ERROR * float(b.norm()) for a, b in zip(*found, strict=True))


def _takes_flash(q: Tensor, k: Tensor, v: Tensor) -> bool:
    half = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= MAX_DIM
    return half and v.shape[-1] == q.shape[-1] and _agrees(q.shape[1], k.shape[1], q.shape[-1], q.dtype, q.device)


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, scale: float) -> Tensor:
    rows = (x[0].transpose(0, 1) for x in (query, key, value))
    out = _PackedAttention.apply(*rows, plan(blocks, query.device), scale)
    return out.transpose(0, 1)[None]  # type: ignore[no-any-return]


def packed_attention(query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, scale: float) -> Tensor:
    """As `naive_packed_attention`. In half precision without scores in memory; else each group by itself under a mask."""
    if _takes_flash(query, key, value):
        return _flash_attention(query, key, value, blocks, scale)
    parts = []
    for tokens, seen in masked_groups(blocks, query.device):
        q, k, v = (x[:, :, tokens] for x in (query, key, value))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        parts.append(F.scaled_dot_product_attention(q, k, v, seen, scale=scale))
    return torch.cat(parts, 2)
