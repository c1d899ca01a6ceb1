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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_they_compile_and_fit(dtype, capability, monkeypatch, tmp_path):
    """No GPU is needed to compile for one. Shared memory is what the smallest GPU since Ampere gives a program."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lit_rl.kernels import logprob_triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    blocks = dict(zip(("OWN", "OTHER", "WIDTH"), kernels.BLOCKS[dtype], strict=True))
    pointers = dict.fromkeys(("logps", "entropy", "norm", "d_logps", "d_entropy", "grad"), "*fp32") | {
        "targets": "*i64"
    }
    pointers |= dict.fromkeys(("hidden", "weight", "own", "other"), "*bf16" if dtype == torch.bfloat16 else "*fp32")
    for kernel, owns in ((kernels._forward, {}), *((kernels._backward, {"OWNS_TOKENS": x}) for x in (True, False))):
        columns = {name: 1 for name in kernel.arg_names if name.endswith("_column")}  # as for contiguous inputs
        constants = {**blocks, **owns, **columns, "PRECISION": "ieee", "UPCAST": False}
        kinds = {**pointers, "temperature": "fp32", **dict.fromkeys(constants, "constexpr")}
        signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
        compiled = triton.compile(
            ASTSource(kernel, signature, constants),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": kernels.WARPS},
        )
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= 99 * 1024


def test_elsewhere_torch_computes_in_chunks(monkeypatch):
    hidden, weight, targets = torch.randn(5, 4), torch.randn(9, 4), torch.randint(9, (5,))
    want = logprob.linear_logprob(hidden, weight, targets)
    monkeypatch.setitem(sys.modules, "lit_rl.kernels.logprob_triton", None)  # an import would fail
    for a, b in zip(ops.linear_logprob(hidden, weight, targets), want, strict=True):
        assert torch.equal(a, b)
