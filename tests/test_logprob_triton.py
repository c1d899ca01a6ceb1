"""The head's Triton kernels: their numbers, interpreted and on a GPU, and that they compile for the GPUs they are meant for."""

import sys

import checks
import pytest
import torch

from lit_rl import ops
from lit_rl.kernels import logprob


def test_numbers():
    checks.check("triton_checks.py", interpreted=True)


@checks.gpu
def test_numbers_on_a_gpu():
    checks.check("triton_checks.py", interpreted=False)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", ["*bf16", "*fp32"])
def test_they_compile(kind, capability, monkeypatch, tmp_path):
    """No GPU is needed to compile for one."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lit_rl.kernels import logprob_triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel in (kernels._fold, kernels._gradient):
        numbers = ("logits", "tops", "totals", "moments", "chosen", "norm", "entropy", "d_logps", "d_entropy")
        kinds = dict.fromkeys(numbers, "*fp32") | {"targets": "*i64", "temperature": "fp32", "grads": kind}
        signature = {name: kinds.get(name, "i32") for name in kernel.arg_names} | {"BLOCK": "constexpr"}
        compiled = triton.compile(
            ASTSource(kernel, signature, {"BLOCK": kernels.BLOCK}),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": kernels.WARPS},
        )
        assert compiled.asm["cubin"]


def test_elsewhere_torch_computes_in_chunks(monkeypatch):
    hidden, weight, targets = torch.randn(5, 4), torch.randn(9, 4), torch.randint(9, (5,))
    want = logprob.linear_logprob(hidden, weight, targets)
    monkeypatch.setitem(sys.modules, "lit_rl.kernels.logprob_triton", None)  # an import would fail
    for a, b in zip(ops.linear_logprob(hidden, weight, targets), want, strict=True):
        assert torch.equal(a, b)
