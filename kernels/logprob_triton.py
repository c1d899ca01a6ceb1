"""Token log-probabilities and entropies on a GPU: `naive_linear_logprob` of logprob.py is their specification.

Products are cuBLAS's, over some words at a time for all tokens, with their sums and so the logits in float32; all else is one
Triton pass over these. Forward: the logits are folded into each token's running maximum, sum and first moment (the online softmax
of Milakov and Gimelshein 2018). Backward: the same logits again, from which one pass makes their gradients in the inputs' type; two
products then give the words' own rows of the weight's gradient, whole, and a summand of that of `hidden`, which is added up in
float32. So memory is for CHUNK logits, whatever the number of tokens and words, and each sum has one order: no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**26
"""Logits in memory at once, in elements: words are taken in chunks of CHUNK / M. Larger ones gain 2 % on an H200."""
BLOCK = 4096
"""Logits of a token that a program holds at once; chunks are multiples of it."""
WARPS = 8
DTYPES = torch.float32, torch.bfloat16
WIDENS = hasattr(torch.ops.aten.mm, "dtype")
"""Whether a product of bfloat16 may be in float32; from PyTorch 2.8 on."""


@triton.jit
def _fold(logits, n_words, first, targets, tops, totals, moments, chosen, temperature, BLOCK: tl.constexpr):
    """Adds the words from `first` on to a token's running numbers; logits (M, n_words), contiguous."""
    token = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + token) - first
    top = tl.load(tops + token)
    total = tl.load(totals + token)  # sum of exp(z - top)
    moment = tl.load(moments + token)  # sum of exp(z - top) (z - top)
    for start in range(0, n_words, BLOCK):
        words = start + tl.arange(0, BLOCK)
        inside = words < n_words
        z = tl.load(logits + token * n_words + words, mask=inside, other=0.0) / temperature
        z = tl.where(inside, z, -1e30)  # finite, or the next line would subtract infinities
        higher = tl.maximum(top, tl.max(z, 0))
        gap = z - higher
        p = tl.exp(gap)
        shrink = tl.exp(top - higher)
        moment = shrink * (moment + (top - higher) * total) + tl.sum(p * gap, 0)
        total = shrink * total + tl.sum(p, 0)
        top = higher
    tl.store(tops + token, top)
    tl.store(totals + token, total)
    tl.store(moments + token, moment)
    if (target >= 0) & (target < n_words):
        tl.store(chosen + token, tl.load(logits + token * n_words + target) / temperature)


@triton.jit
def _gradient(
    logits, n_words, first, targets, norm, entropy, d_logps, d_entropy, temperature, grads, BLOCK: tl.constexpr
):
    """grads (M, n_words), contiguous, of the logits before temperature."""
    token = tl.program_id(0).to(tl.int64)
    words = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = words < n_words
    z = tl.load(logits + token * n_words + words, mask=inside, other=0.0) / temperature
    logp = z - tl.load(norm + token)
    dl, dh, h = tl.load(d_logps + token), tl.load(d_entropy + token), tl.load(entropy + token)
    target = tl.load(targets + token) - first
    dz = tl.where(words == target, dl, 0.0) - tl.exp(logp) * (dl + dh * (logp + h))  # dH/dz = -p (log p + H)
    tl.store(grads + token * n_words + words, (dz / temperature).to(grads.dtype.element_ty), mask=inside)


INTERPRETED = not isinstance(_gradient, triton.JITFunction)
"""TRITON_INTERPRET=1: kernels run in Python, on any device, and truncate what they store in bfloat16, so torch rounds."""


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and WIDENS else a.float() @ b.float()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, total in float32."""
    if a.is_cuda and a.dtype != torch.float32 and WIDENS:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def _chunks(tokens: int, words: int) -> list[slice]:
    """Of the vocabulary."""
    step = max(1, CHUNK // max(1, tokens) // BLOCK) * BLOCK
    return [slice(i, min(i + step, words)) for i in range(0, words, step)]


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        running = torch.zeros(4, len(hidden), dtype=torch.float32, device=hidden.device)
        top, total, moment, chosen = running.unbind()
        top.fill_(-1e30)

        def fold(words: slice) -> None:  # a function, or two chunks of logits would be there at a time
            logits = _product(hidden, weight[words].T)
            _fold[(len(hidden),)](
                logits, logits.shape[1], words.start, targets, top, total, moment, chosen, temperature,
                BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip

        if len(hidden):
            with torch.cuda.device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
                for words in _chunks(len(hidden), len(weight)):
                    fold(words)
        norm = top + total.log()
        entropy = total.log() - moment / total
        ctx.save_for_backward(hidden, weight, targets, norm, entropy)
        ctx.temperature = temperature
        return chosen - norm, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logps: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, targets, norm, entropy = ctx.saved_tensors
        d_logps, d_entropy = d_logps.contiguous(), d_entropy.contiguous()
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None

        def add(words: slice) -> None:
            logits = _product(hidden, weight[words].T)
            in_place = INTERPRETED or hidden.dtype == torch.float32
            grads = logits if in_place else torch.empty_like(logits, dtype=hidden.dtype)
            _gradient[(len(hidden), triton.cdiv(logits.shape[1], BLOCK))](
                logits, logits.shape[1], words.start, targets, norm, entropy, d_logps, d_entropy, ctx.temperature, grads,
                BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
            del logits
            grads = grads.to(hidden.dtype)
            if d_hidden is not None:
                _add_product(d_hidden, grads, weight[words])
            if d_weight is not None:
                torch.mm(grads.T, hidden, out=d_weight[words])

        if len(hidden):
            with torch.cuda.device_of(hidden):
                for words in _chunks(len(hidden), len(weight)):
                    add(words)
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, None, None


@torch.compiler.disable  # a graph of torch.compile breaks here: the kernels are compiled already
def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """As `naive_linear_logprob`, for float32 and bfloat16, with logits and sums in float32.

    Products of float32 are exact, unless `torch.set_float32_matmul_precision` allows TF32. Differentiable once."""
    if hidden.dtype != weight.dtype or hidden.dtype not in DTYPES:
        raise TypeError(f"hidden is {hidden.dtype} and weight {weight.dtype}: both must be float32, or both bfloat16")
    torch._assert_async(((targets >= 0) & (targets < len(weight))).all(), "a target is not in the vocabulary")
    return _LinearLogprob.apply(hidden, weight, targets.contiguous(), float(temperature))  # type: ignore[no-any-return]
