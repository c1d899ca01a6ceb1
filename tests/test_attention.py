"""The attention of packed groups against its naive twin, forward and all gradients, and its memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
