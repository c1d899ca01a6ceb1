"""The ternary Triton kernel: its numbers, interpreted and on a GPU, and that it compiles for the GPUs it is meant for."""

import checks
import pytest
import torch


def test_numbers():
    checks.check("triton_ternary_checks.py", interpreted=True)


@checks.gpu
def test_numbers_on_a_gpu():
    checks.check("triton_ternary_checks.py", interpreted=False)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_compiles_and_fits(dtype, capability, monkeypatch, tmp_path):
    """No GPU is needed to compile for one. Shared memory is what the smallest GPU since Ampere gives a program."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lit_rl.kernels import ternary_triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = dict(zip(("TOKENS", "OUT", "WIDTH"), kernels.BLOCKS[dtype], strict=True))
    constants |= {"x_column": 1, "PRECISION": "ieee", "UPCAST": False}
    kinds = dict.fromkeys(("x", "result"), "*bf16" if dtype == torch.bfloat16 else "*fp32")
    kinds |= {"packed": "*u8", "scales": "*bf16", **dict.fromkeys(constants, "constexpr")}
    signature = {name: kinds.get(name, "i32") for name in kernels._linear.arg_names}
    compiled = triton.compile(
        ASTSource(kernels._linear, signature, constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": kernels.WARPS},
    )
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= 99 * 1024
