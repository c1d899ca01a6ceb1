"""Products with packed ternary weights as a Triton kernel: `naive_ternary_linear` of ternary.py is its specification.

A program owns a tile of tokens x outputs and walks along the inputs: bytes are unpacked, and scaled, in registers, where
code * scale is exact in bfloat16 too. So weights cross memory at 2 + 16 / group bits each. Sums have one owner and one order,
and a token's numbers do not depend on its neighbours. Blocks are as in logprob_triton.py; nothing was tuned on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS = {torch.bfloat16: (16, 64, 64), torch.float32: (16, 32, 32)}
"""TOKENS, OUT, WIDTH by the type of the inputs: for the few tokens of a step of decoding."""
WARPS = 4


@triton.jit
def _linear(
    x, x_row, x_column, n_tokens, packed, scales, n_out, width, n_bytes, n_groups, group, result,
    TOKENS: tl.constexpr, OUT: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """result (n_tokens, n_out), contiguous; packed (n_out, n_bytes) and scales (n_out, n_groups) are too."""
    tokens = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    outs = (tl.program_id(1) * OUT + tl.arange(0, OUT)).to(tl.int64)
    tile = tl.zeros((TOKENS, OUT), tl.float32)
    for k in range(0, width, WIDTH):
        columns = k + tl.arange(0, WIDTH)
        at = x + tokens[:, None] * x_row + columns.to(tl.int64)[None, :] * x_column
        a = tl.load(at, mask=(tokens < n_tokens)[:, None] & (columns < width)[None, :], other=0.0)
        inside = (outs < n_out)[:, None] & (columns < width)[None, :]
        bytes_ = tl.load(packed + outs[:, None] * n_bytes + (columns // 4)[None, :], mask=inside, other=0).to(tl.int32)
        codes = ((bytes_ >> (columns % 4 * 2)[None, :]) & 3) - 1
        scale = tl.load(scales + outs[:, None] * n_groups + (columns // group)[None, :], mask=inside, other=0.0)
        weight = codes.to(tl.float32) * scale.to(tl.float32)
        a = a.to(tl.float32) if UPCAST else a
        tile = tl.dot(a, tl.trans(weight.to(a.dtype)), tile, input_precision=PRECISION)
    place = result + tokens[:, None] * n_out + outs[None, :]
    tl.store(place, tile.to(result.dtype.element_ty), mask=(tokens < n_tokens)[:, None] & (outs < n_out)[None, :])


INTERPRETED = not isinstance(_linear, triton.JITFunction)
"""TRITON_INTERPRET=1: kernels run in Python, on any device. Its products of bfloat16 are
wrong, so they are upcast, and what it stores in bfloat16 is truncated, so torch rounds."""


@torch.compiler.disable
def ternary_linear(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """As `naive_ternary_linear`, for float32 and bfloat16, with sums in float32."""
    if x.dtype not in BLOCKS:
        raise TypeError(f"x is {x.dtype}: it must be float32 or bfloat16")
    (m, width), (n, size), groups = x.shape, packed.shape, scales.shape[1]
    result = torch.empty(m, n, dtype=torch.float32 if INTERPRETED else x.dtype, device=x.device)
    tokens, out, step = BLOCKS[x.dtype]
    if m and n:
        with torch.cuda.device_of(x):
            _linear[(triton.cdiv(m, tokens), triton.cdiv(n, out))](
                x, *x.stride(), m, packed.contiguous(), scales.contiguous(), n, width, size, groups, width // groups, result,
                TOKENS=tokens, OUT=out, WIDTH=step, UPCAST=INTERPRETED, num_warps=WARPS,
                PRECISION="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
            )  # fmt: skip
    return result.to(x.dtype)
