"""Ternary weights: to codes and scales, four codes to a byte, and products with what is packed.

A weight (out, in) has a scale for each `group` of weights along a row, and a code of -1, 0 or 1 for each weight. Scales are
bfloat16 wherever they are used, in training too, so that 16 bits store them exactly: with groups of 32 a weight takes 2.5.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-5
"""The least scale, for groups that are all zero."""
CHUNK = 2**22
"""Weights unpacked at once."""


def quantize(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """weight (out, in) -> codes (out, in) int8 and scales (out, in / group) bfloat16, by the mean magnitude of each group:
    s = max(mean |w|, eps), code = clamp(round(w / s), -1, 1) (BitCPM-CANN, eq. 1-3). In float32 at least."""
    groups = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).unflatten(1, (-1, group))
    scales = groups.abs().mean(-1).clamp(min=EPS).bfloat16()
    return (groups / scales[..., None]).round_().clamp_(-1, 1).to(torch.int8).flatten(1), scales


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) that codes and scales stand for; exact in bfloat16 and wider types."""
    return (codes.to(dtype).unflatten(1, (scales.shape[1], -1)) * scales.to(dtype)[..., None]).flatten(1)


def round_weight(weight: Tensor, group: int) -> Tensor:
    """The weight (out, in), in its type, that its own codes and scales stand for."""
    return dequantize(*quantize(weight, group), weight.dtype)


def survey(weight: Tensor, group: int, before: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes and scales of the weight (out, in), and (2,) int64: how many codes are zero, and how many differ from those
    packed `before`."""
    codes, scales = quantize(weight, group)
    packed = pack(codes)
    return packed, scales, torch.stack([(codes == 0).sum(), differing(packed, packed if before is None else before)])


def pack(codes: Tensor) -> Tensor:
    """codes (out, in) -> (out, in / 4, rounded up) uint8: code + 1 in two bits, the first of four in the lowest."""
    bits = F.pad(codes + 1, (0, -codes.shape[1] % 4)).to(torch.uint8).unflatten(1, (-1, 4))
    return bits[..., 0] | bits[..., 1] << 2 | bits[..., 2] << 4 | bits[..., 3] << 6


def unpack(packed: Tensor, width: int) -> Tensor:
    """The codes (out, width) int8 in (out, width / 4, rounded up) bytes."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts & 3).to(torch.int8) - 1).flatten(1)[:, :width]


def naive_ternary_linear(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """The specification. x (M, in), packed codes and scales of (out, in) -> x @ weight.T (M, out), in x's type."""
    return x @ dequantize(unpack(packed, x.shape[1]), scales, x.dtype).T


def ternary_linear(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """As `naive_ternary_linear`, some rows of the weight at a time, each byte by a table of the four weights in it."""
    width, size = x.shape[1], packed.shape[1]
    table = unpack(torch.arange(256, dtype=torch.uint8, device=x.device)[:, None], 4).to(x.dtype)  # (256, 4)
    rows = max(1, CHUNK // max(1, width))
    out = x.new_empty(len(x), len(packed))
    for i in range(0, len(packed), rows):
        codes = F.embedding(packed[i : i + rows].int(), table).reshape(-1, 4 * size)[:, :width]
        part = scales[i : i + rows]
        weight = codes.unflatten(1, (part.shape[1], -1)) * part.to(x.dtype)[..., None]
        out[:, i : i + rows] = x @ weight.flatten(1).T
    return out


def differing(packed: Tensor, others: Tensor) -> Tensor:
    """How many codes differ between two packed weights; a scalar."""
    pairs = packed ^ others
    pairs = (pairs | pairs >> 1) & 0b01010101  # the lower bit of each two: whether either differs
    return torch.stack([(pairs >> shift & 1).sum() for shift in (0, 2, 4, 6)]).sum()
