"""The attention of packed groups against its naive twin, forward and all gradients, and its memory."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_rl.kernels import attention_cuda
from lit_rl.kernels.attention import naive_packed_attention, packed_attention

GROUPS = [(1, 1, 7), (0, 3, 4), (0, 1, 2), (1, 1, 5), (1, 1, 3), (0, 1, 1), (0, 2, 6)]  # the second has a prompt alone


def inputs(groups, heads, key_heads, dtype):
    torch.manual_seed(0)
    blocks = torch.tensor(groups)
    tokens, dim = int((blocks[:, 1] * blocks[:, 2]).sum()), 8
    shapes = [(1, tokens, n, dim) for n in (heads, key_heads, key_heads)]
    return *(torch.randn(s, dtype=dtype).transpose(1, 2).requires_grad_() for s in shapes), blocks, 0.3


@pytest.mark.parametrize("key_heads", [6, 2, 1])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 0.05)]
)
def test_against_the_naive_twin(dtype, tolerance, key_heads):
    *x, blocks, scale = inputs(GROUPS, 6, key_heads, dtype)
    up = torch.randn(x[0].shape, dtype=dtype)
    results = []
    for function in (naive_packed_attention, packed_attention):
        out = function(*x, blocks, scale)
        results.append((out, *torch.autograd.grad((out * up).sum(), x)))
    for got, want in zip(*reversed(results), strict=True):
        assert got.dtype == dtype
        assert ((got - want).norm() / want.norm()) < tolerance


def test_far_scores_do_not_overflow():
    *x, blocks, scale = inputs(GROUPS, 2, 2, torch.float32)
    x = [t.detach() * 300 for t in x]
    got, want = (function(*x, blocks, scale) for function in (packed_attention, naive_packed_attention))
    assert ((got - want).norm() / want.norm()) < 1e-4


def test_no_scores_in_memory():
    """The largest tensor made is of the size of the queries, though the prompt has 300 tokens and the responses 400."""
    *x, blocks, scale = inputs([(1, 1, 300), (0, 8, 50)], 2, 2, torch.float32)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
            return out

    with Watch():
        packed_attention(*x, blocks, scale).sum().backward()
    assert largest == x[0].numel() < 700 * 700


class TestOnAGPU:
    """What a GPU's tensors go through, with flash attention where there is a GPU, and a slow twin of it elsewhere."""

    DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @pytest.fixture(autouse=True)
    def flash(self, monkeypatch):
        if self.DEVICE.type == "cpu":
            monkeypatch.setattr(attention_cuda, "_flash", slow_flash)
            monkeypatch.setattr(attention_cuda, "_flash_backward", slow_flash_backward)
        attention_cuda._agrees.cache_clear()

    @pytest.mark.parametrize("key_heads", [6, 2, 1])
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 0.02), (torch.float16, 0.003)]
    )
    def test_against_the_naive_twin(self, dtype, tolerance, key_heads):
        *x, blocks, scale = inputs(GROUPS, 6, key_heads, torch.float32)
        x = [t.detach().to(self.DEVICE, dtype).requires_grad_() for t in x]
        doubles = [t.detach().double().requires_grad_() for t in x]
        up, results = torch.randn(x[0].shape).to(x[0]), []
        for function, of in ((attention_cuda.packed_attention, x), (naive_packed_attention, doubles)):
            out = function(*of, blocks, scale)
            results.append((out, *torch.autograd.grad((out * up).sum(), of)))
        for got, want in zip(*results, strict=True):
            assert got.dtype == dtype
            assert ((got - want).norm() / want.norm()) < tolerance

    def test_prompts_alone(self):
        *x, blocks, scale = inputs([(1, 1, 7), (1, 1, 4)], 2, 2, torch.float32)
        x = [t.detach().to(self.DEVICE, torch.bfloat16).requires_grad_() for t in x]
        out = attention_cuda.packed_attention(*x, blocks, scale)
        want = naive_packed_attention(*(t.double() for t in x), blocks, scale)
        assert ((out - want).norm() / want.norm()) < 0.01
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), x))

    def test_values_of_another_size_than_keys(self, monkeypatch):
        """As of multi-head latent attention: flash attention refuses them."""
        flash = attention_cuda._flash

        def strict(q, k, v, *args):
            if v.shape != k.shape:
                raise RuntimeError("v must have the shape of k")
            return flash(q, k, v, *args)

        monkeypatch.setattr(attention_cuda, "_flash", strict)
        *x, blocks, scale = inputs(GROUPS, 2, 2, torch.float32)
        x = [t.detach().to(self.DEVICE, torch.bfloat16)[..., :n] for t, n in zip(x, (8, 8, 4), strict=True)]
        out = attention_cuda.packed_attention(*x, blocks, scale)
        want = naive_packed_attention(*(t.double() for t in x), blocks, scale)
        assert ((out - want).norm() / want.norm()) < 0.01

    @pytest.mark.parametrize("failure", ["missing", "wrong", "wrong gradient"])
    def test_flash_attention_that_fails_is_not_used(self, failure, monkeypatch):
        def missing(*args):
            raise NotImplementedError

        if failure == "wrong gradient":
            backward = attention_cuda._flash_backward
            monkeypatch.setattr(
                attention_cuda, "_flash_backward", lambda *args: tuple(d.flip(0) for d in backward(*args))
            )
        else:
            forward = attention_cuda._flash
            wrong = missing if failure == "missing" else lambda *args: tuple(2 * x for x in forward(*args))
            monkeypatch.setattr(attention_cuda, "_flash", wrong)
        *x, blocks, scale = inputs(GROUPS, 2, 2, torch.float32)
        x = [t.detach().to(self.DEVICE, torch.bfloat16).requires_grad_() for t in x]
        doubles, results = [t.detach().double().requires_grad_() for t in x], []
        for function, of in ((attention_cuda.packed_attention, x), (naive_packed_attention, doubles)):
            out = function(*of, blocks, scale)
            results.append((out, *torch.autograd.grad(out.square().sum(), of)))
        for got, want in zip(*results, strict=True):
            assert ((got - want).norm() / want.norm()) < 0.02


def spans(of, to):
    for (a, b), (c, d) in zip(*(itertools.pairwise(s.starts.tolist()) for s in (of, to)), strict=True):
        yield slice(a, b), slice(c, d)


def slow_scores(q, k, causal, scale):
    scores = torch.einsum("mhd,nhd->hmn", q.float(), k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril() if causal else torch.tensor(True)
    return scores.masked_fill(~seen, -torch.inf)


def slow_flash(q, k, v, of, to, causal, scale):
    out, norm = torch.zeros_like(q), q.new_zeros(q.shape[1], len(q), dtype=torch.float32)
    for a, b in spans(of, to):
        scores = slow_scores(q[a], k[b], causal, scale)
        norm[:, a] = scores.logsumexp(-1)
        weights = scores.softmax(-1)
        out[a] = torch.einsum("hmn,nhd->mhd", weights, v[b].float().repeat_interleave(q.shape[1] // k.shape[1], 1)).to(
            q
        )
    return out, norm


def slow_flash_backward(grad, q, k, v, out, norm, of, to, causal, scale):
    d_q, d_k, d_v = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    for a, b in spans(of, to):
        p = (slow_scores(q[a], k[b], causal, scale) - norm[:, a, None]).exp()
        up, values, keys = grad[a].float(), *(x[b].float().repeat_interleave(group, 1) for x in (v, k))
        d_p = torch.einsum("mhd,nhd->hmn", up, values)
        d_s = p * (d_p - (up * out[a].float()).sum(-1).T[..., None]) * scale
        d_q[a] = torch.einsum("hmn,nhd->mhd", d_s, keys)
        d_k[b] = torch.einsum("hmn,mhd->nhd", d_s, q[a].float()).unflatten(1, (-1, group)).sum(2)
        d_v[b] = torch.einsum("hmn,mhd->nhd", p, up).unflatten(1, (-1, group)).sum(2)
    return d_q.to(q), d_k.to(k), d_v.to(v)
