"""The ternary Triton kernel, in Triton's interpreter or on a GPU, against its twin. test_ternary_triton.py runs this file."""

import pytest
import torch
from checks import ON_GPU, where_kernels_run  # noqa: F401  (a fixture)

from lit_rl import ops
from lit_rl.kernels import ternary, ternary_triton

LARGE = [(1000, 1536, 576, 32)] if ON_GPU else []
SHAPES = [(1, 1, 1, 1), (3, 17, 64, 32), (2, 5, 37, 37), (17, 18, 42, 3), *LARGE]
"""Tokens, outputs, inputs, group."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    if not ON_GPU:
        monkeypatch.setattr(ternary_triton, "BLOCKS", dict.fromkeys(ternary_triton.BLOCKS, (16, 16, 16)))


def example(tokens, out, width, group, dtype=torch.float32):
    torch.manual_seed(0)
    codes, scales = ternary.quantize(torch.randn(out, width), group)
    return torch.randn(tokens, width).to(dtype), ternary.pack(codes), scales


@pytest.mark.parametrize("shape", SHAPES)
def test_float32(shape):
    x, packed, scales = example(*shape)
    want = ternary.naive_ternary_linear(x.double(), packed, scales)
    got = ternary_triton.ternary_linear(x, packed, scales)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=max(1e-5, 1e-7 * shape[2]))


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_rounded_once(shape):
    """Weights are exact in bfloat16 and sums are in float32, so only the result is rounded."""
    x, packed, scales = example(*shape, dtype=torch.bfloat16)
    got = ternary_triton.ternary_linear(x, packed, scales)
    assert got.dtype == torch.bfloat16
    want = ternary.naive_ternary_linear(x.double(), packed, scales)
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-3 if ON_GPU else 1e-4)  # matrix units cut off


def test_strided_inputs_and_none():
    x, packed, scales = example(17, 18, 42, 3)
    want = ternary_triton.ternary_linear(x, packed, scales)
    wide = torch.stack([x.T.contiguous().T, torch.zeros(17, 42)], 1)[:, 0]
    for other in (x.T.contiguous().T, wide):
        assert torch.equal(ternary_triton.ternary_linear(other, packed, scales), want)
    assert ternary_triton.ternary_linear(x[:0], packed, scales).shape == (0, 18)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 17, 32, 32), *LARGE])
def test_a_tokens_numbers_do_not_depend_on_its_batch(shape, dtype):
    x, packed, scales = example(*shape, dtype)
    if (
        not ON_GPU
    ):  # eighths, whose products are exact: the interpreter's, NumPy's, round a row by where in the tile it stands
        x, scales = ((numbers * 8).round() / 8 for numbers in (x, scales))
    together = ternary_triton.ternary_linear(x, packed, scales)
    for part in (slice(0, 1), slice(1, 7), slice(7, 30), slice(30, None)):
        assert torch.equal(ternary_triton.ternary_linear(x[part], packed, scales), together[part])


def test_what_it_does_not_compute_is_an_error():
    x, packed, scales = example(3, 17, 64, 32)
    with pytest.raises(TypeError, match="it must be float32 or bfloat16"):
        ternary_triton.ternary_linear(x.double(), packed, scales)


def test_the_door_leads_here(monkeypatch):
    if not ON_GPU:
        monkeypatch.setattr(ops, "_takes_triton", lambda x: True)
    x, packed, scales = example(3, 17, 32, 32)
    assert torch.equal(ops.ternary_linear(x, packed, scales), ternary_triton.ternary_linear(x, packed, scales))
    with torch.autocast(x.device.type, torch.bfloat16):
        got = ops.ternary_linear(x, packed, scales)
    assert torch.equal(got, ternary_triton.ternary_linear(x.bfloat16(), packed, scales))


def weights(out, width, group, dtype):
    """Some groups that are zero, and some that are ternary already."""
    torch.manual_seed(0)
    weight = torch.randn(out, width)
    weight[0, :group] = 0
    weight[-1] = weight[-1].sign() / 4
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 64, 32), (5, 37, 37), (18, 48, 12), (9, 80, 80)])
def test_rounding_and_its_survey(shape, dtype, monkeypatch):
    """Means of a group may differ in the last bit, and round to neighbouring scales; these do not."""
    monkeypatch.setattr(ternary_triton, "TILE", 64)
    out, width, group = shape
    weight = weights(out, width, group, dtype)
    got = ternary_triton.round_weight(weight.T.contiguous().T, group)
    assert got.dtype == dtype
    assert torch.equal(got, ternary.round_weight(weight, group))
    moved = weight + torch.randn(out, width).to(dtype)
    for now, before in ((weight, None), (moved, ternary.survey(weight, group)[0])):
        want = ternary.survey(now, group, before)
        for ours, theirs in zip(ternary_triton.survey(now, group, before), want, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


def test_a_weight_that_is_not_finite_stays_so():
    weight = torch.ones(2, 32)
    weight[0, 3] = torch.nan
    assert ternary_triton.round_weight(weight, 32).isnan().any(1).tolist() == [True, False]
