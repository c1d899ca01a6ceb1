"""Ternary weights as Triton kernels: products with packed ones, as `naive_ternary_linear` of ternary.py specifies them, and what
training does to each weight in each step, `round_weight` and `survey` of ternary.py, in one pass over it.

Of products a program owns a tile of tokens x outputs and walks along the inputs: bytes are unpacked, and scaled, in registers,
where code * scale is exact in bfloat16 too. So weights cross memory at 2 + 16 / group bits each. Sums have one owner and one
order, and a token's numbers do not depend on its neighbours. Nothing was tuned on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_rl.kernels import ternary

BLOCKS = {torch.bfloat16: (16, 64, 64), torch.float32: (16, 32, 32)}
"""TOKENS, OUT, WIDTH by the type of the inputs: for the few tokens of a step of decoding."""
WARPS = 4
TILE = 2048
"""Weights that a program rounds at a time, at least a group."""


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


@triton.jit
def _codes(weight, groups, columns, n_groups, group, EPS: tl.constexpr):
    """Codes (G, C) and scales (G,), float32, of groups (G,) of a contiguous weight."""
    there = (groups < n_groups)[:, None] & (columns < group)[None, :]
    w = tl.load(weight + groups[:, None] * group + columns[None, :], mask=there, other=0.0).to(tl.float32)
    mean = tl.sum(tl.abs(w), 1) / group
    scale = tl.where(mean < EPS, EPS, mean)  # NaN stays
    bits = scale.to(tl.int32, bitcast=True)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) & -0x10000  # in bfloat16; the interpreter's own cast truncates
    scale = tl.where(scale == scale, nearest.to(tl.float32, bitcast=True), scale)
    half = scale[:, None] / 2
    return tl.where(w > half, 1.0, tl.where(w < -half, -1.0, 0.0)), scale


@triton.jit
def _round(weight, n_groups, group, result, GROUPS: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr):
    groups = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    codes, scale = _codes(weight, groups, columns, n_groups, group, EPS)
    there = (groups < n_groups)[:, None] & (columns < group)[None, :]
    place = result + groups[:, None] * group + columns[None, :]
    tl.store(place, (codes * scale[:, None]).to(result.dtype.element_ty), mask=there)


@triton.jit
def _survey(
    weight, n_groups, group, before, packed, scales, counts,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Groups are whole bytes. counts (2,): zeros, and codes that differ from `before`."""
    groups = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    codes, scale = _codes(weight, groups, columns, n_groups, group, EPS)
    tl.store(scales + groups, scale.to(scales.dtype.element_ty), mask=groups < n_groups)
    there = (groups < n_groups)[:, None] & (columns < group)[None, :]
    tl.atomic_add(counts, tl.sum((there & (codes == 0)).to(tl.int32)))
    shifted = (codes.to(tl.int32) + 1) << (columns % 4 * 2)[None, :]
    bytes_ = tl.sum(tl.reshape(shifted, (GROUPS, WIDTH // 4, 4)), 2)
    part = tl.arange(0, WIDTH // 4)
    at = groups[:, None] * (group // 4) + part[None, :]
    there = (groups < n_groups)[:, None] & (part < group // 4)[None, :]
    changed = bytes_ ^ tl.load(before + at, mask=there, other=0).to(tl.int32)
    changed = tl.where(there, (changed | changed >> 1) & 0b01010101, 0)  # of each code the lower bit
    flips = (changed & 1) + (changed >> 2 & 1) + (changed >> 4 & 1) + (changed >> 6 & 1)
    tl.store(packed + at, bytes_.to(tl.uint8), mask=there)
    tl.atomic_add(counts + 1, tl.sum(flips))


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


def _tile(weight: Tensor, group: int) -> tuple[int, dict[str, int], tuple[int]]:
    """The number of groups; the shape of a program's tile of them; and the grid."""
    n_groups, width = weight.numel() // group, triton.next_power_of_2(max(4, group))
    groups = max(1, TILE // width)
    return n_groups, {"GROUPS": groups, "WIDTH": width, "EPS": ternary.EPS}, (triton.cdiv(n_groups, groups),)


@torch.compiler.disable
def round_weight(weight: Tensor, group: int) -> Tensor:
    """As `ternary.round_weight`, for float32 and bfloat16."""
    n_groups, tile, grid = _tile(weight, group)
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(weight):
        _round[grid](weight.contiguous(), n_groups, group, result, **tile, num_warps=WARPS)
    return result


@torch.compiler.disable
def survey(weight: Tensor, group: int, before: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """As `ternary.survey`, which takes groups that are not whole bytes."""
    if group % 4:
        return ternary.survey(weight, group, before)
    (out, width), (n_groups, tile, grid) = weight.shape, _tile(weight, group)
    packed = weight.new_empty(out, width // 4, dtype=torch.uint8)
    scales = weight.new_empty(out, width // group, dtype=torch.float32 if INTERPRETED else torch.bfloat16)
    counts = weight.new_zeros(2, dtype=torch.int32)
    with torch.cuda.device_of(weight):
        _survey[grid](
            weight.contiguous(), n_groups, group, packed if before is None else before, packed, scales, counts,
            **tile, num_warps=WARPS,
        )  # fmt: skip
    if before is None:
        counts[1] = 0
    return packed, scales.bfloat16(), counts.long()
