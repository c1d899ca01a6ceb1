"""Attention of packed groups: each has a prompt and then its responses, which see the prompt and themselves."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """`number` segments of `length` tokens each, one after the other from token `start` on."""

    start: int
    number: int
    length: int

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.number * self.length)

    def segments(self, x: Tensor) -> Tensor:
        """A view of this block of (1, H, M, ...): (number, H, length, ...)."""
        return x[0, :, self.tokens].unflatten(1, (self.number, self.length)).transpose(0, 1)


def groups(blocks: Tensor) -> list[list[Block]]:
    """Of (..., S, 3) rows of whether a prompt begins here, number and length, in the order of the tokens: the blocks of each
    group, its prompt first."""
    found: list[list[Block]] = []
    start = 0
    for first, number, length in blocks.view(-1, 3).tolist():
        if first:
            found.append([])
        found[-1].append(Block(start, number, length))
        start += number * length
    return found


def visible(each: list[list[Block]], device: torch.device | None = None) -> Tensor:
    """(M, M) bool: the tokens that each token of these groups sees."""
    sizes = [[block.length for block in group for _ in range(block.number)] for group in each]
    of = [(g, s) for g, lengths in enumerate(sizes) for s, n in enumerate(lengths) for _ in range(n)]
    group, segment = torch.tensor(of, device=device).T  # segment 0 is the prompt
    return ((group[:, None] == group) & ((segment == 0) | (segment[:, None] == segment))).tril()


def naive_packed_attention(query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, scale: float) -> Tensor:
    """The specification. query (1, H, M, dim), key and value (1, K, M, dim), blocks as in `groups` -> (1, H, M, dim)."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    seen = visible(groups(blocks), query.device)
    return (query @ key.transpose(2, 3) * scale).masked_fill(~seen, -torch.inf).softmax(-1) @ value


def _flash(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention and the log of its softmax's denominators: (B, H, Q, dim) and (B, H, Q)."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, 0.0, causal, scale=scale)  # type: ignore[no-any-return]


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, scale: float) -> Tensor:
        out = torch.empty_like(query)
        norm = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for prompt, *responses in groups(blocks):
            for block in (prompt, *responses):
                q, k, v = (block.segments(x) for x in (query, key, value))
                own, own_norm = _flash(q, k, v, True, scale)
                block.segments(out).copy_(own)
                block.segments(norm).copy_(own_norm)
            if responses:  # merge with their attention to the prompt
                after = slice(prompt.tokens.stop, responses[-1].tokens.stop)
                far, far_norm = _flash(
                    query[:, :, after], key[:, :, prompt.tokens], value[:, :, prompt.tokens], False, scale
                )
                near_norm = norm[:, :, after]
                out[:, :, after].lerp_(far, (far_norm - near_norm).sigmoid()[..., None].to(out.dtype))
                near_norm.copy_(torch.logaddexp(near_norm, far_norm))
        ctx.save_for_backward(query, key, value, out, norm, blocks)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """A part's gradients are those of one softmax over all keys, since they are given its output and denominators."""
        query, key, value, out, norm, blocks = ctx.saved_tensors
        d_query, d_key, d_value = (torch.empty_like(x) for x in (query, key, value))
        flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        for prompt, *responses in groups(blocks):
            for block in (prompt, *responses):
                parts = (block.segments(x) for x in (grad, query, key, value, out, norm))
                gradients = flash_backward(*parts, 0.0, True, scale=ctx.scale)
                for x, d in zip((d_query, d_key, d_value), gradients, strict=True):
                    block.segments(x).copy_(d)
            if responses:
                after, at = slice(prompt.tokens.stop, responses[-1].tokens.stop), prompt.tokens
                parts = (
                    x[:, :, part]
                    for x, part in ((grad, after), (query, after), (key, at), (value, at), (out, after), (norm, after))
                )
                gradients = flash_backward(*parts, 0.0, False, scale=ctx.scale)
                for x, part, d in zip((d_query, d_key, d_value), (after, at, at), gradients, strict=True):
                    x[:, :, part] += d
        return d_query, d_key, d_value, None, None


def packed_attention(query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, scale: float) -> Tensor:
    """As `naive_packed_attention`, on a CPU, without scores in memory: time and memory for the tokens that are seen.

    Each block attends to itself and then to its prompt; the two are merged by their denominators, as blocks are in flash
    attention (Dao et al. 2022, section 3.1)."""
    return _PackedAttention.apply(query, key, value, blocks, scale)  # type: ignore[no-any-return]
