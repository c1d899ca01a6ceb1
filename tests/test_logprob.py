"""The chunked head against its naive twin, forward and all gradients."""

import pytest
import torch

from lit_rl import ops
from lit_rl.kernels import logprob


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 150, 2**22])
def test_against_the_naive_twin(temperature, chunk, monkeypatch):
    monkeypatch.setattr(logprob, "CHUNK", chunk)
    torch.manual_seed(0)
    hidden = torch.randn(13, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(37, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(37, (13,))
    up = torch.randn(2, 13, dtype=torch.float64)
    results = []
    for function in (logprob.naive_linear_logprob, logprob.linear_logprob):
        hidden.grad = weight.grad = None
        logps, entropy = function(hidden, weight, targets, temperature)
        (logps * up[0] + entropy * up[1]).sum().backward()
        results.append((logps, entropy, hidden.grad, weight.grad))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("which", ["logps", "entropy"])
def test_one_output_alone(which):
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.randn(9, 4, dtype=torch.float64)
    targets = torch.randint(9, (5,))
    grads = []
    for function in (logprob.naive_linear_logprob, logprob.linear_logprob):
        logps, entropy = function(hidden, weight, targets)
        grads.append(torch.autograd.grad((logps if which == "logps" else entropy).sum(), hidden)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-9)


def test_words_that_are_ruled_out():
    """A logit of -inf is a word less, in both numbers and the gradient; float64 stays what it is."""
    torch.manual_seed(0)
    few, targets = torch.randn(5, 9, dtype=torch.float64, requires_grad=True), torch.randint(9, (5,))
    results = []
    for logits in (few, torch.cat([few, few.new_full((5, 3), -torch.inf)], 1)):
        logps, entropy = ops.logits_logprob(logits, targets, 0.7)
        gradient = torch.autograd.grad((logps + 0.3 * entropy).sum(), few)[0]
        results.append((logps, entropy, gradient))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_no_tensor_of_all_logits():
    """Memory: the largest tensor made in forward and backward holds CHUNK elements or a weight, not M * V."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    m, v, d = 4096, 5000, 8
    hidden, weight = torch.randn(m, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    with Watch():
        logps, entropy = logprob.linear_logprob(hidden, weight, torch.randint(v, (m,)))
        (logps.sum() + entropy.sum()).backward()
    assert largest <= max(logprob.CHUNK, m * d, v * d) < m * v


def test_bfloat16():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(64, 16), torch.randn(50, 16), torch.randint(50, (64,))
    want = logprob.naive_linear_logprob(hidden, weight, targets)
    half = [t.bfloat16().requires_grad_() for t in (hidden, weight)]
    got = logprob.linear_logprob(*half, targets)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.1)
    got[0].sum().backward()
    assert half[0].grad.dtype == half[1].grad.dtype == torch.bfloat16
