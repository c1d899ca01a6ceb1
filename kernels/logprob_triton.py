"""Token log-probabilities and entropies as Triton kernels: `naive_linear_logprob` of logprob.py is their specification.

A program owns a block of rows and walks over the blocks of the other side. Forward: it owns tokens, and keeps for each a
running maximum, sum and first moment of the logits (the online softmax of Milakov and Gimelshein 2018). Backward: logits
are computed again, block by block; for the gradient of `hidden` a program owns tokens and walks over the vocabulary, for
that of `weight` it owns words and walks over the tokens. Each sum thus has one owner and one order: no atomics, the same
bits each time, and a token's forward does not depend on its neighbours.

Blocks (OWN x OTHER logits, WIDTH of the hidden size at a time), see BLOCKS: the tile of logits stays in registers, and
the operands of a product, held three times over by Triton's pipelining, fit in the 99 KiB of shared memory that every
NVIDIA GPU since Ampere gives a program. The gradients of a block, OWN x D, do not fit for large D: they are summed in
global memory, in float32, by their owner; a wide OTHER makes that rare. float32 has smaller blocks, since its products
do not run on tensor cores and hold their operands in registers. The choice follows from these limits and from what the
compiler reports for compute capabilities 8.0 and 9.0 (at most 80 KiB shared, and no registers spilled but two, of the
forward in float32); nothing here was tuned on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCKS = {torch.bfloat16: (64, 128, 64), torch.float32: (32, 64, 32)}
"""OWN, OTHER, WIDTH by the type of the inputs."""
WARPS = 8


@triton.jit
def _block(start, row_stride, column_stride, rows, n_rows, columns, n_columns, UPCAST: tl.constexpr):
    """(rows, columns) of a matrix of any strides, zero outside."""
    at = start + rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    block = tl.load(at, mask=(rows < n_rows)[:, None] & (columns < n_columns)[None, :], other=0.0)
    return block.to(tl.float32) if UPCAST else block


@triton.jit
def _logits(
    own, own_row, own_column, mine, n_own,
    other, other_row, other_column, theirs, n_other,
    width, temperature, WIDTH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The tile (mine, theirs), float32."""
    tile = tl.zeros((mine.shape[0], theirs.shape[0]), tl.float32)
    for k in range(0, width, WIDTH):
        columns = k + tl.arange(0, WIDTH)
        a = _block(own, own_row, own_column, mine, n_own, columns, width, UPCAST)
        b = _block(other, other_row, other_column, theirs, n_other, columns, width, UPCAST)
        tile = tl.dot(a, tl.trans(b), tile, input_precision=PRECISION)
    return tile / temperature


@triton.jit
def _forward(
    hidden, hidden_row, hidden_column, n_tokens, weight, weight_row, weight_column, n_words, width, temperature,
    targets, logps, entropy, norm,
    OWN: tl.constexpr, OTHER: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * OWN + tl.arange(0, OWN)
    inside = tokens < n_tokens
    target = tl.load(targets + tokens, mask=inside, other=-1)
    top = tl.full((OWN,), -1e30, tl.float32)  # finite, or the first step would subtract infinities
    total = tl.zeros((OWN,), tl.float32)  # sum of exp(z - top)
    moment = tl.zeros((OWN,), tl.float32)  # sum of exp(z - top) (z - top)
    chosen = tl.zeros((OWN,), tl.float32)
    for first in range(0, n_words, OTHER):
        words = first + tl.arange(0, OTHER)
        z = _logits(
            hidden, hidden_row, hidden_column, tokens, n_tokens, weight, weight_row, weight_column, words, n_words,
            width, temperature, WIDTH, PRECISION, UPCAST,
        )  # fmt: skip
        z = tl.where((words < n_words)[None, :], z, -1e30)
        chosen += tl.sum(tl.where(words[None, :] == target[:, None], z, 0.0), 1)
        higher = tl.maximum(top, tl.max(z, 1))
        gap = z - higher[:, None]
        p = tl.exp(gap)
        shrink = tl.exp(top - higher)
        moment = shrink * (moment + (top - higher) * total) + tl.sum(p * gap, 1)
        total = shrink * total + tl.sum(p, 1)
        top = higher
    tl.store(norm + tokens, top + tl.log(total), mask=inside)
    tl.store(logps + tokens, chosen - top - tl.log(total), mask=inside)
    tl.store(entropy + tokens, tl.log(total) - moment / total, mask=inside)


@triton.jit
def _backward(
    own, own_row, own_column, n_own, other, other_row, other_column, n_other, width, temperature,
    targets, norm, entropy, d_logps, d_entropy, grad, OWNS_TOKENS: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """grad (n_own, width), contiguous float32, += d logits @ other. Own rows are tokens and others words, or the reverse."""
    mine = tl.program_id(0) * OWN + tl.arange(0, OWN)
    for first in range(0, n_other, OTHER):
        theirs = first + tl.arange(0, OTHER)
        z = _logits(
            own, own_row, own_column, mine, n_own, other, other_row, other_column, theirs, n_other,
            width, temperature, WIDTH, PRECISION, UPCAST,
        )  # fmt: skip
        if OWNS_TOKENS:
            tokens, words, n_tokens = mine[:, None], theirs[None, :], n_own
        else:
            tokens, words, n_tokens = theirs[None, :], mine[:, None], n_other
        target = tl.load(targets + tokens, mask=tokens < n_tokens, other=-1)
        logp = z - tl.load(norm + tokens, mask=tokens < n_tokens, other=0.0)
        h = tl.load(entropy + tokens, mask=tokens < n_tokens, other=0.0)
        dl = tl.load(d_logps + tokens, mask=tokens < n_tokens, other=0.0)
        dh = tl.load(d_entropy + tokens, mask=tokens < n_tokens, other=0.0)
        dz = tl.where(words == target, dl, 0.0) - tl.exp(logp) * (dl + dh * (logp + h))  # dH/dz = -p (log p + H)
        dz = tl.where((mine < n_own)[:, None] & (theirs < n_other)[None, :], dz / temperature, 0.0)
        for k in range(0, width, WIDTH):
            columns = k + tl.arange(0, WIDTH)
            b = _block(other, other_row, other_column, theirs, n_other, columns, width, UPCAST)
            at = grad + mine.to(tl.int64)[:, None] * width + columns[None, :]
            there = (mine < n_own)[:, None] & (columns < width)[None, :]
            so_far = tl.load(at, mask=there, other=0.0)
            tl.store(at, tl.dot(dz.to(b.dtype), b, so_far, input_precision=PRECISION), mask=there)
        tl.debug_barrier()  # what one thread has added, another may read in the next round


INTERPRETED = not isinstance(_forward, triton.JITFunction)
"""TRITON_INTERPRET=1: kernels run in Python, on any device. Its products of bfloat16 are wrong, so they are upcast."""


def _launch(kernel: Any, own: Tensor, other: Tensor, *arguments: Any, **constants: Any) -> None:
    """The kernel over blocks of the rows of own."""
    if not len(own):
        return
    block, other_block, width = BLOCKS[own.dtype]
    with torch.cuda.device_of(own):
        kernel[(triton.cdiv(len(own), block),)](
            own, *own.stride(), len(own), other, *other.stride(), len(other), own.shape[1], *arguments, **constants,
            OWN=block, OTHER=other_block, WIDTH=width, UPCAST=INTERPRETED, num_warps=WARPS,
            PRECISION="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        )  # fmt: skip


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logps, entropy, norm = torch.empty(3, len(hidden), dtype=torch.float32, device=hidden.device).unbind()
        _launch(_forward, hidden, weight, temperature, targets, logps, entropy, norm)
        ctx.save_for_backward(hidden, weight, targets, norm, entropy)
        ctx.temperature = temperature
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logps: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, *per_token = ctx.saved_tensors
        per_token += d_logps.contiguous(), d_entropy.contiguous()
        grads: list[Tensor | None] = [None, None]
        for i, (own, other) in enumerate([(hidden, weight), (weight, hidden)]):
            if ctx.needs_input_grad[i]:
                grad = torch.zeros(own.shape, dtype=torch.float32, device=own.device)
                _launch(_backward, own, other, ctx.temperature, *per_token, grad, OWNS_TOKENS=i == 0)
                grads[i] = grad.to(own.dtype)
        return grads[0], grads[1], None, None


@torch.compiler.disable  # a graph of torch.compile breaks here: the kernels are compiled already
def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """As `naive_linear_logprob`, for float32 and bfloat16, with sums in float32 and logits in registers alone.

    Products of float32 are exact, unless `torch.set_float32_matmul_precision` allows TF32. Differentiable once."""
    if hidden.dtype != weight.dtype or hidden.dtype not in BLOCKS:
        raise TypeError(f"hidden is {hidden.dtype} and weight {weight.dtype}: both must be float32, or both bfloat16")
    torch._assert_async(((targets >= 0) & (targets < len(weight))).all(), "a target is not in the vocabulary")
    return _LinearLogprob.apply(hidden, weight, targets.contiguous(), float(temperature))  # type: ignore[no-any-return]
