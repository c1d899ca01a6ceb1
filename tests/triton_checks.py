"""The head's Triton kernels, in Triton's interpreter or on a GPU, against twins that hold all logits. test_logprob_triton.py
runs this file."""

import pytest
import torch
from checks import ON_GPU, where_kernels_run  # noqa: F401  (a fixture)

from lit_rl import ops
from lit_rl.kernels import logprob, logprob_triton

LARGE = [(1000, 5000, 576)] if ON_GPU else []
SHAPES = [(1, 1, 1), (16, 32, 16), (17, 37, 19), (33, 50, 40), (5, 70, 3), *LARGE]  # tokens, words, hidden size


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    if not ON_GPU:
        monkeypatch.setattr(logprob_triton, "BLOCK", 16)
    monkeypatch.setattr(logprob_triton, "CHUNK", 2**20 if ON_GPU else 1024)  # several chunks of words


def example(tokens, words, width, dtype=torch.float32):
    """Logits differ by six, as a language model's, or less."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, width).to(dtype), torch.randn(words, width).to(dtype)
    weight *= min(1.0, 6 / width**0.5)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(words, (tokens,)), torch.randn(2, tokens)


def outcome(function, hidden, weight, targets, up, temperature=1.0):
    """Log-probabilities, entropies, and the gradients of hidden and weight."""
    logps, entropy = function(hidden, weight, targets, temperature)
    wanted = [x for x in (hidden, weight) if x.requires_grad]
    return logps, entropy, *torch.autograd.grad((logps * up[0] + entropy * up[1]).sum(), wanted)


def doubled(hidden, weight, targets, up):
    return *(x.detach().double().requires_grad_(x.requires_grad) for x in (hidden, weight)), targets, up.double()


def assert_same(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=tolerance, atol=tolerance * float(b.detach().abs().max() + 1e-3)
        )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_against_both_twins(shape, temperature):
    case = example(*shape)
    got = outcome(logprob_triton.linear_logprob, *case, temperature)
    assert_same(got, outcome(logprob.naive_linear_logprob, *doubled(*case), temperature), 5e-5 if ON_GPU else 1e-5)
    assert_same(got, outcome(logprob.linear_logprob, *case, temperature), 1e-4)  # its entropies are less exact


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16(shape):
    """Logits are not rounded, so the outputs are those of the rounded inputs; gradients are rounded twice: dz, and themselves."""
    case = example(*shape, dtype=torch.bfloat16)
    got = outcome(logprob_triton.linear_logprob, *case, 0.8)
    want = outcome(logprob.naive_linear_logprob, *doubled(*case), 0.8)
    assert_same(got[:2], want[:2], 1e-4 if ON_GPU else 1e-5)  # matrix units cut off what they add
    assert_same(got[2:], want[2:], 2**-8)
    assert [x.dtype for x in got] == [torch.float32] * 2 + [torch.bfloat16] * 2


def test_large_logits():
    """Differences of hundreds between words, and log-probabilities of -hundreds: neither overflow nor cancellation."""
    hidden, weight, targets, up = example(17, 37, 19)
    case = (hidden.detach() * 50).requires_grad_(), weight, targets, up
    got = outcome(logprob_triton.linear_logprob, *case)
    assert got[0].min() < -200
    assert_same(got, outcome(logprob.naive_linear_logprob, *doubled(*case)), 1e-4)


def test_logits_far_below_zero():
    """The words that fill up the last block have logit 0 there: exp(0 - norm) would be infinite, and reach a gradient."""
    hidden, weight, targets, up = example(17, 37, 19)
    case = (hidden.detach().abs() + 10).requires_grad_(), (-1 - weight.detach().abs()).requires_grad_(), targets, up
    got = outcome(logprob_triton.linear_logprob, *case)
    assert_same(got, outcome(logprob.naive_linear_logprob, *doubled(*case)), 1e-4)


def test_strided_inputs():
    """A transposed head, every second row of the hidden states and of the targets, gradients expanded from a scalar."""
    hidden, weight, targets, _ = example(34, 37, 19)
    weight = weight.detach().T.contiguous().T.requires_grad_()
    strided = hidden[::2], weight, targets[::2]
    assert not any(x.is_contiguous() for x in strided)
    results = []
    for function in (logprob_triton.linear_logprob, logprob.naive_linear_logprob):
        logps, entropy = function(*strided)
        results.append((logps, entropy, *torch.autograd.grad(logps.sum() - entropy.sum(), (hidden, weight))))
    assert_same(*results, 1e-5)


@pytest.mark.parametrize("needed", [0, 1])
def test_only_the_gradient_that_is_needed(needed, monkeypatch):
    case = example(17, 37, 19)
    case[1 - needed].requires_grad_(False)
    added, add, written, mm = [], logprob_triton._add_product, [], torch.mm
    monkeypatch.setattr(logprob_triton, "_add_product", lambda *a: (added.append(a), add(*a)))
    monkeypatch.setattr(torch, "mm", lambda *a, **k: (written.append("out" in k), mm(*a, **k))[1])
    got = outcome(logprob_triton.linear_logprob, *case)
    assert (bool(added), any(written)) == (needed == 0, needed == 1)  # to the gradients of hidden and of weight
    assert_same(got, outcome(logprob.naive_linear_logprob, *doubled(*case)), 1e-5)


@pytest.mark.parametrize("which", [0, 1])
def test_one_output_alone(which):
    hidden, weight, targets, _ = example(17, 37, 19)
    grads = [
        torch.autograd.grad(function(hidden, weight, targets)[which].sum(), (hidden, weight))
        for function in (logprob_triton.linear_logprob, logprob.naive_linear_logprob)
    ]
    assert_same(*grads, 1e-5)


def test_no_tokens():
    hidden, weight, targets, up = example(0, 37, 19)
    logps, entropy, d_hidden, d_weight = outcome(logprob_triton.linear_logprob, hidden, weight, targets, up)
    assert len(logps) == len(entropy) == len(d_hidden) == 0
    assert torch.equal(d_weight, torch.zeros(37, 19))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 37, 19), *LARGE])
def test_a_tokens_numbers_depend_on_its_batch_only_as_far_as_products_do(shape, dtype):
    hidden, weight, targets, _ = example(*shape, dtype)
    together = logprob_triton.linear_logprob(hidden, weight, targets)
    for part in (slice(0, 1), slice(1, 7), slice(7, 30), slice(30, None)):
        alone = logprob_triton.linear_logprob(hidden[part], weight, targets[part])
        assert_same(alone, [x[part] for x in together], 1e-4 if ON_GPU else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_each_time(dtype):
    case = example(*SHAPES[-1], dtype)
    first, again = (outcome(logprob_triton.linear_logprob, *case) for _ in range(2))
    assert all(map(torch.equal, first, again))


def test_what_it_does_not_compute_is_an_error():
    hidden, weight, targets, _ = example(5, 37, 19)
    for bad in () if ON_GPU else (-1, 37):  # there the assertion would leave this process without its GPU
        with pytest.raises(RuntimeError, match="not in the vocabulary"):
            logprob_triton.linear_logprob(hidden, weight, targets.index_fill(0, torch.tensor([2]), bad))
    for pair in ((hidden.bfloat16(), weight), (hidden.double(), weight.double())):
        with pytest.raises(TypeError, match="both must be"):
            logprob_triton.linear_logprob(*pair, targets)
    squares = logprob_triton.linear_logprob(hidden, weight, targets)[0] ** 2
    once = torch.autograd.grad(squares.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once[0].sum().backward()


def test_not_a_number_stays_one():
    hidden, weight, targets, _ = example(5, 37, 19)
    with torch.no_grad():
        hidden[2, 3] = float("nan")
    for got in logprob_triton.linear_logprob(hidden, weight, targets):
        assert got.isnan().tolist() == [False, False, True, False, False]


def test_the_door_leads_here(monkeypatch):
    """What a GPU's tensors go through, compiled and with autocast too."""
    if not ON_GPU:
        monkeypatch.setattr(ops, "_takes_triton", lambda x: True)
    case = example(17, 37, 19)
    assert_same(outcome(ops.linear_logprob, *case, 0.7), outcome(logprob_triton.linear_logprob, *case, 0.7), 0)
    compiled = torch.compile(ops.linear_logprob, backend="eager")
    assert_same(outcome(compiled, *case, 0.7), outcome(logprob_triton.linear_logprob, *case, 0.7), 0)
    half = [x.bfloat16() for x in case[:2]]
    with torch.autocast(case[0].device.type, torch.bfloat16):
        got = ops.linear_logprob(*case[:3], 0.7)
    assert_same(got, logprob_triton.linear_logprob(*half, case[2], 0.7), 0)


def test_against_liger():
    ppo = pytest.importorskip("liger_kernel.chunked_loss.fused_linear_ppo").LigerFusedLinearPPOBase
    hidden, weight, targets, up = example(33, 50, 40)
    logps = ppo.chunk_forward(hidden[None], weight, targets[None], temperature=0.6)[0]
    want = logps, *torch.autograd.grad((logps * up[0]).sum(), (hidden, weight))
    logps, _, *grads = outcome(
        logprob_triton.linear_logprob, hidden, weight, targets, up * torch.tensor([[1], [0]]), 0.6
    )
    assert_same((logps, *grads), want, 1e-5)
