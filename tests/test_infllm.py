"""InfLLM-v2's selection and block-sparse attention: the twin against loops that follow the paper, torch against the twin."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lit_rl import ops
from lit_rl.kernels import infllm, infllm_torch
from lit_rl.kernels.infllm import Sequences, Settings

SCALE = 0.4
SMALL = Settings(kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=3, dense_len=-1)
OTHERS = [
    SMALL,
    replace(SMALL, coarse=False, init_blocks=2, window_size=0),
    replace(SMALL, kernel_size=12, block_size=24, window_size=24, init_blocks=0, topk=1),
    replace(SMALL, kernel_stride=8, dense_len=70),
]
SEQUENCES = Sequences(  # two in a row, one that continues a cache, one query alone, padding about them
    *torch.tensor([[0, 0, 50, 5, 50], [0, 50, 100, 57, 110], [1, 3, 100, 0, 170], [2, 7, 1, 10, 3]]).T
)


def example(heads=6, key_heads=2, size=7, value_size=5, dtype=torch.float32):
    torch.manual_seed(0)
    q = torch.randn(3, heads, 150, size, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(3, key_heads, 170, n, dtype=dtype, requires_grad=True) for n in (size, value_size))
    return q, k, v


def loops(q, k, settings, coarse=False):
    """What one group of queries (G, D), the last at the end of keys (S, D), sees: (forced, free {block: score}), or everything."""
    t = len(k) - 1
    size, stride, block = settings.kernel_size, settings.kernel_stride, settings.block_size
    if t + 1 < settings.dense_len:
        return set(range(t // block + 1)), {}

    def products(head, size, stride):
        return [
            float(head @ k[j : j + size].mean(0)) * SCALE
            for j in range(0, len(k) - size + 1, stride)
            if j + size - 1 <= t
        ]

    masses = [0.0] * len(products(q[0], size, stride))
    for head in q:
        fine = products(head, size, stride)
        wide = products(head, 4 * size, 4 * stride) if coarse else []
        norm = math.log(sum(map(math.exp, wide or fine))) if fine else 0.0
        masses = [m + math.exp(a - norm) for m, a in zip(masses, fine, strict=True)]
    forced, free = set(), {}
    for b in range(t // block + 1):
        if b < settings.init_blocks or b >= t // block - settings.window_size // block:
            forced.add(b)
        else:
            keys = set(range(b * block, (b + 1) * block))
            touching = [m for j, m in enumerate(masses) if keys & set(range(j * stride, j * stride + size))]
            free[b] = max(touching, default=0.0)
    return forced, free


@pytest.mark.parametrize("settings", OTHERS)
def test_the_twin_chooses_what_the_paper_says(settings):
    q, k, _ = (x.detach() for x in example(dtype=torch.float64))
    blocks = infllm.naive_select(q, k, SEQUENCES, settings, SCALE)
    m = 0
    for row, queries, keys in SEQUENCES.each():
        for i in range(queries.start, queries.stop):
            end = keys.stop - (queries.stop - 1 - i)
            for head in (0, 1) if i % 7 == 0 else ():
                group = q[row, 3 * head : 3 * head + 3, i]
                forced, free = loops(group, k[row, head, keys.start : end], settings, settings.coarse)
                chosen = [b for b in blocks[m, head].tolist() if b >= 0]
                assert chosen == sorted(set(chosen))
                assert forced <= set(chosen) <= forced | set(free)
                best = sorted(free.values())[::-1][: settings.blocks - len(forced)]
                assert sum(free[b] for b in set(chosen) - forced) == pytest.approx(sum(best), rel=1e-9)  # ties are free
                assert len(chosen) == len(forced) + len(best)
            m += 1
    assert m == len(blocks)


@pytest.mark.parametrize("settings", OTHERS)
@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (5, 1)])
def test_torch_chooses_what_the_twin_does(heads, settings, monkeypatch):
    q, k, _ = example(*heads)
    want = infllm.naive_select(q, k, SEQUENCES, settings, SCALE)
    assert torch.equal(infllm_torch.select(q, k, SEQUENCES, settings, SCALE), want)
    monkeypatch.setattr(infllm_torch, "BUDGET", 500)  # a few queries at a time
    assert torch.equal(infllm_torch.select(q, k, SEQUENCES, settings, SCALE), want)


def outcome(attend, tensors, *args):
    out = attend(*tensors, *args)
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return out, *torch.autograd.grad((out * up).sum(), tensors)


def assert_same(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b.double()).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("settings", OTHERS)
@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (5, 1)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_attention_and_gradients_are_those_of_the_mask(heads, settings, dtype, tolerance, monkeypatch):
    tensors = [x.detach().to(dtype).requires_grad_() for x in example(*heads)]
    blocks = infllm.naive_select(*tensors[:2], SEQUENCES, settings, SCALE)
    args = blocks, SEQUENCES, settings.block_size, SCALE
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    want = outcome(infllm.naive_attention, doubles, *args)
    assert_same(outcome(infllm_torch.attention, tensors, *args), want, tolerance)
    monkeypatch.setattr(infllm_torch, "BUDGET", 500)
    assert_same(outcome(infllm_torch.attention, tensors, *args), want, tolerance)


def test_the_twins_attention_is_that_of_a_mask():
    q, k, v = example(dtype=torch.float64)
    seqs, settings = Sequences.whole(q, k), SMALL
    blocks = infllm.naive_select(q, k, seqs, settings, SCALE).view(3, 150, 2, -1)
    mask = torch.zeros(3, 6, 150, 170, dtype=torch.bool)
    for r, i, h in torch.cartesian_prod(torch.arange(3), torch.arange(150), torch.arange(6)).tolist():
        for b in blocks[r, i, h // 3].tolist():
            mask[r, h, i, b * 16 : b * 16 + 16] |= b >= 0
    mask &= torch.ones(150, 170, dtype=torch.bool).tril(20)
    dense = F.scaled_dot_product_attention(q, *(x.repeat_interleave(3, 1) for x in (k, v)), attn_mask=mask, scale=SCALE)
    got = infllm.naive_attention(q, k, v, blocks.flatten(0, 1), seqs, 16, SCALE)
    assert torch.allclose(got, dense, atol=1e-14)


@pytest.mark.parametrize("how", [{"topk": 20}, {"dense_len": 171}])
def test_it_is_dense_when_all_blocks_are_seen(how):
    q, k, v = example()
    seqs, settings = Sequences.whole(q, k), replace(SMALL, **how)
    assert settings.covered >= 170
    blocks = ops.select_blocks(q, k, seqs, settings, SCALE)

    def dense(q, k, v):
        mask = torch.ones(150, 170, dtype=torch.bool).tril(20)
        k, v = (x.repeat_interleave(3, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE)

    got = outcome(ops.block_attention, (q, k, v), blocks, seqs, settings, SCALE)
    assert_same(got, outcome(dense, (q, k, v)), 1e-5)


def test_gradcheck():
    q, k, v = (x[:1, :, :40].detach().requires_grad_() for x in example(4, 2, dtype=torch.float64))
    seqs = Sequences.whole(q, k)
    blocks = infllm_torch.select(q, k, seqs, replace(SMALL, window_size=0, topk=2), SCALE)
    assert torch.autograd.gradcheck(
        lambda *x: infllm_torch.attention(*x, blocks, seqs, 16, SCALE), (q, k, v), fast_mode=True
    )


def test_a_choice_has_no_gradient_and_is_a_set_of_integers():
    q, k, _ = example()
    blocks = ops.select_blocks(q, k, SEQUENCES, SMALL, SCALE)
    assert blocks.dtype == torch.int32
    assert not blocks.requires_grad


def test_prefill_chunks_and_single_tokens_agree():
    """Over the border of dense_len too: what a query sees does not depend on what comes after it."""
    q, k, v = (x[:1].detach() for x in example())
    k, v = k[:, :, :150], v[:, :, :150]
    settings = replace(SMALL, dense_len=100)
    seqs = Sequences.whole(q, k)
    blocks = ops.select_blocks(q, k, seqs, settings, SCALE)
    whole = ops.block_attention(q, k, v, blocks, seqs, settings, SCALE)
    for ends in (range(1, 151), (40, 95, 103, 150)):
        start = 0
        for end in ends:
            part = q[:, :, start:end], k[:, :, :end]
            seqs = Sequences.whole(*part)
            chosen = ops.select_blocks(*part, seqs, settings, SCALE)
            assert torch.equal(chosen, blocks[start:end, :, : chosen.shape[2]])
            out = ops.block_attention(*part, v[:, :, :end], chosen, seqs, settings, SCALE)
            assert torch.allclose(out, whole[:, :, start:end], atol=1e-5)
            start = end


def test_sequences_do_not_see_each_other():
    q, k, v = (x.detach() for x in example())

    def run(k, v):
        return ops.block_attention(q, k, v, ops.select_blocks(q, k, SEQUENCES, SMALL, SCALE), SEQUENCES, SMALL, SCALE)

    before = run(k, v)
    k, v = k.clone(), v.clone()
    k[0, :, 57:], v[0, :, 57:] = 3.0, 3.0  # the second one, and what is around
    k[0, :, :5], v[0, :, :5] = math.nan, math.nan
    after = run(k, v)
    assert torch.equal(before[0, :, :50], after[0, :, :50])
    assert not torch.equal(before[0, :, 50:], after[0, :, 50:])
    assert (after[2, :, :7] == 0).all()


def test_the_defaults_see_96_blocks_of_which_34_are_forced():
    settings = Settings()
    assert (settings.blocks, settings.covered, replace(settings, dense_len=-1).covered) == (96, 8191, 6144)
    scores = torch.rand(1, 1, 200)
    (chosen,) = infllm.choose(scores, torch.tensor([[150 * 64 + 5]]), settings, settings.width(200 * 64)).tolist()[0]
    chosen = {b for b in chosen if b >= 0}
    assert {0, *range(118, 151)} <= chosen
    best = scores[0, 0, 1:118].argsort(descending=True)[:62] + 1
    assert chosen - {0, *range(118, 151)} == set(best.tolist())


@pytest.mark.parametrize("length", [100, 99])
def test_dense_below_dense_len(length):
    q, k, _ = (x[:, :, :length].detach() for x in example())
    chosen = ops.select_blocks(q, k, Sequences.whole(q, k), replace(SMALL, dense_len=100), SCALE).view(3, length, 2, -1)
    assert ((chosen[:, -1] >= 0).sum(-1) == (7 if length == 99 else 5)).all()


def test_the_coarse_normaliser_changes_little():
    torch.manual_seed(0)
    settings = replace(SMALL, window_size=16, topk=5, dense_len=-1)
    for heads, least in ((1, 1.0), (16, 0.95)):
        q, k = torch.randn(1, heads, 500, 16), torch.randn(1, 1, 500, 16)
        seqs = Sequences.whole(q, k)
        a, b = (ops.select_blocks(q, k, seqs, replace(settings, coarse=c), 0.25) for c in (True, False))
        same = (a[..., None, :] == b[..., None]).any(-1) & (b >= 0)
        share = float(same.sum() / (b >= 0).sum())
        assert share >= least, (heads, share)


def test_a_needle_is_found():
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 400, 16), torch.randn(1, 1, 400, 16) * 0.1
    k[0, 0, 100:108] = 8 * F.normalize(q[0, :, 399].mean(0), dim=-1)
    blocks = ops.select_blocks(q, k, Sequences.whole(q, k), SMALL, 0.25)
    assert 100 // 16 in blocks[399, 0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_early_queries_and_huge_scores_are_finite(dtype):
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in example())
    with torch.no_grad():
        q *= 20
        k[:, :, 30:40] *= 50
    seqs = Sequences.whole(q, q[:, :2])
    k, v = k[:, :, :150], v[:, :, :150]
    blocks = ops.select_blocks(q, k, seqs, SMALL, SCALE)
    out = ops.block_attention(q, k, v, blocks, seqs, SMALL, SCALE)
    grads = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert all(x.isfinite().all() for x in (out, *grads))
    assert torch.allclose(out[:, :, 0].float(), v[:, :, 0].float().repeat_interleave(3, 1), rtol=1e-2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel_size": 20}, "kernel_size is 20: it must be a multiple of kernel_stride, which is 16"),
        ({"block_size": 40}, "block_size is 40: it must be a multiple of kernel_stride"),
        ({"window_size": 100}, "window_size is 100: it must be a multiple of block_size"),
        ({"topk": 1}, "topk is 1: it must be above init_blocks, which is 1"),
        ({"kernel_stride": 0}, "kernel_stride is 0: it must be at least 1"),
        ({"init_blocks": -1}, "init_blocks is -1"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_heads_and_sizes_that_do_not_fit():
    q, k, v = example()
    with pytest.raises(ValueError, match="5 query heads do not divide among 2 key heads"):
        ops.select_blocks(q[:, :5], k, SEQUENCES, SMALL, SCALE)
    with pytest.raises(ValueError, match="queries have size 6, keys 7"):
        ops.select_blocks(q[..., :6], k, SEQUENCES, SMALL, SCALE)
    with pytest.raises(ValueError, match="only their last sizes may differ"):
        ops.block_attention(q, k, v[:, :1], ops.select_blocks(q, k, SEQUENCES, SMALL, SCALE), SEQUENCES, SMALL, SCALE)
