"""InfLLM-v2's Triton kernels, in Triton's interpreter or on a GPU, against the twins. test_infllm_triton.py runs this file. An
interpreted program takes a few milliseconds a block."""

import pytest
import torch
from checks import ON_GPU, where_kernels_run  # noqa: F401  (a fixture)

from lit_rl import ops
from lit_rl.kernels import infllm, infllm_triton
from lit_rl.kernels.infllm import Sequences, Settings

SCALE = 0.3
HALF = [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)]
SMALL = Settings(kernel_size=8, kernel_stride=4, block_size=16, window_size=16, topk=2, dense_len=-1)
ODD = Settings(
    kernel_size=12, kernel_stride=4, block_size=12, init_blocks=0, window_size=0, topk=2, dense_len=20, coarse=False
)
CASES = {  # settings, query and key heads, sizes of key and value, and what lengths are multiplied by
    "group of 3": (SMALL, 6, 2, 7, 5, 1),
    "group of 1, odd blocks, exact": (ODD, 2, 2, 16, 16, 1),
    "one key head": (SMALL, 4, 1, 20, 33, 1),
}
if ON_GPU:  # the paper's heads, kernels and blocks
    CASES["large"] = (Settings(window_size=256, topk=4, dense_len=-1), 32, 2, 128, 128, 32)


def example(case, dtype=torch.float32):
    """A row with two sequences, one with a chunk of queries that continues a cache, padding on both sides, and nothing else."""
    settings, heads, key_heads, d, e, times = case
    torch.manual_seed(0)
    q = torch.randn(2, heads, 26 * times, d).to(dtype).requires_grad_()
    k, v = (torch.randn(2, key_heads, 61 * times, size).to(dtype).requires_grad_() for size in (d, e))
    row, *places = torch.tensor([[0, 0, 5, 2, 5], [0, 6, 17, 10, 51], [1, 11, 9, 0, 60]]).T
    return settings, q, k, v, Sequences(row, *(x * times for x in places))


def gradients(out, up, *inputs):
    return out, *torch.autograd.grad((out * up).sum(), inputs)


def assert_same(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=tolerance, atol=tolerance * float(b.detach().abs().max())
        )


def mass(blocks, q, k, seqs, settings):
    """(M, K): the scores of the blocks that were chosen freely, added up."""
    parts = []
    for row, queries, keys in seqs.each():
        scores = infllm.naive_scores(q[row, :, queries].double(), k[row, :, keys].double(), settings, SCALE)
        chosen = blocks[sum(map(len, parts)) :][: scores.shape[1]].transpose(0, 1).long()
        parts.append((scores.gather(-1, chosen.clamp(min=0)) * (chosen >= 0)).sum(-1).T)
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_selection(name, dtype):
    settings, q, k, _, seqs = example(CASES[name], dtype)
    got, want = (f(q, k, seqs, settings, SCALE) for f in (infllm_triton.select, infllm.naive_select))
    assert got.dtype == torch.int32
    assert torch.equal((got >= 0).sum(-1), (want >= 0).sum(-1))
    if dtype == torch.float32:
        assert float((got == want).double().mean()) >= (0.999 if name == "large" else 1.0)  # few of many are near a tie
    ours, best = (mass(x, q.detach(), k.detach(), seqs, settings) for x in (got, want))
    assert (ours >= best * (1 - (1e-5 if dtype == torch.float32 else 0.02))).all()


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [(name, torch.float32, 1e-5 if ON_GPU else 2e-6) for name in CASES]
    + [(name, *half) for name in ("group of 3", *(["large"] * ON_GPU)) for half in HALF],
)
def test_attention_and_all_gradients(name, dtype, tolerance, monkeypatch):
    if name != "large":  # as there: several programs share the queries of a block
        monkeypatch.setattr(infllm_triton, "WALK", 3)
        monkeypatch.setattr(infllm_triton, "WALKS", 10**6)
    settings, *tensors, seqs = example(CASES[name], dtype)
    blocks = infllm.naive_select(*tensors[:2], seqs, settings, SCALE)
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    want = infllm.naive_attention(*doubles, blocks, seqs, settings.block_size, SCALE)
    up = torch.randn_like(want)
    got = gradients(infllm_triton.attention(*tensors, blocks, seqs, settings.block_size, SCALE), up.to(dtype), *tensors)
    assert [x.dtype for x in got] == [dtype] * 4
    assert_same(got, gradients(want, up, *doubles), tolerance)


def test_the_same_bits_each_time():
    settings, *tensors, seqs = example(list(CASES.values())[-1], torch.bfloat16)
    blocks = infllm_triton.select(*tensors[:2], seqs, settings, SCALE)
    assert torch.equal(infllm_triton.select(*tensors[:2], seqs, settings, SCALE), blocks)
    first, again = (infllm_triton.attention(*tensors, blocks, seqs, settings.block_size, SCALE) for _ in range(2))
    up = torch.randn_like(first)
    assert all(map(torch.equal, gradients(first, up, *tensors), gradients(again, up, *tensors)))


def test_only_what_is_needed_and_strided_inputs():
    settings, q, k, v, seqs = example(CASES["group of 3"])
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    q.requires_grad_()
    blocks = infllm_triton.select(q, k, seqs, settings, SCALE)
    up = torch.randn(*q.shape[:3], v.shape[3])
    want = gradients(infllm.naive_attention(q, k, v, blocks, seqs, settings.block_size, SCALE), up, q)
    got = gradients(infllm_triton.attention(q, k, v, blocks, seqs, settings.block_size, SCALE), up, q)
    assert_same(got, want, 1e-5 if ON_GPU else 2e-6)


def test_scores_far_apart_stay_finite():
    """One key a thousand times the others: the coarse log-sum-exp is hundreds below the true one."""
    settings, q, k, v, seqs = example(CASES["group of 3"])
    with torch.no_grad():
        k[:, :, 20] *= 1000
        q *= 10
    blocks = infllm_triton.select(q, k, seqs, settings, SCALE)
    assert torch.equal((blocks >= 0).sum(-1), (infllm.naive_select(q, k, seqs, settings, SCALE) >= 0).sum(-1))
    assert infllm_triton.attention(q, k, v, blocks, seqs, settings.block_size, SCALE).isfinite().all()


def test_the_door_leads_here(monkeypatch):
    """What a GPU's tensors go through."""
    if not ON_GPU:
        monkeypatch.setattr(ops, "_takes_triton", lambda x: True)
    settings, *tensors, seqs = example(CASES["group of 3"])
    blocks = ops.select_blocks(*tensors[:2], seqs, settings, SCALE)
    assert torch.equal(blocks, infllm_triton.select(*tensors[:2], seqs, settings, SCALE))
    got = ops.block_attention(*tensors, blocks, seqs, settings, SCALE)
    assert torch.equal(got, infllm_triton.attention(*tensors, blocks, seqs, settings.block_size, SCALE))


def test_types_it_does_not_take():
    settings, q, k, v, seqs = example(CASES["group of 3"])
    blocks = infllm.naive_select(q, k, seqs, settings, SCALE)
    for dtypes in ((torch.float64,) * 3, (torch.float32, torch.float32, torch.bfloat16)):
        with pytest.raises(TypeError, match="all must be one of"):
            infllm_triton.attention(*map(torch.Tensor.to, (q, k, v), dtypes), blocks, seqs, settings.block_size, SCALE)
