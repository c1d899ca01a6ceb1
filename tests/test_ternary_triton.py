"""The ternary Triton kernel: its numbers, interpreted and on a GPU, and that it compiles for the GPUs it is meant for."""

import checks
import pytest
import torch


def test_numbers():
    checks.check("triton_ternary_checks.py", interpreted=True)


@checks.gpu
def test_numbers_on_a_gpu():
    checks.check("triton_ternary_checks.py", interpreted=False)


def compiled(kernel, constants, kinds, capability):
    """No GPU is needed to compile for one."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lit_rl.kernels import ternary_triton as kernels

    kinds = kinds | dict.fromkeys(constants, "constexpr")
    kernel = getattr(kernels, kernel)
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    target, options = GPUTarget("cuda", capability, 32), {"num_warps": kernels.WARPS}
    return triton.compile(ASTSource(kernel, signature, constants), target=target, options=options)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_compiles_and_fits(dtype, capability, monkeypatch, tmp_path):
    """Shared memory is what the smallest GPU since Ampere gives a program."""
    pytest.importorskip("triton")
    from lit_rl.kernels import ternary_triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = dict(zip(("TOKENS", "OUT", "WIDTH"), kernels.BLOCKS[dtype], strict=True))
    constants |= {"x_column": 1, "PRECISION": "ieee", "UPCAST": False}
    kinds = dict.fromkeys(("x", "result"), "*bf16" if dtype == torch.bfloat16 else "*fp32")
    kinds |= {"packed": "*u8", "scales": "*bf16"}
    made = compiled("_linear", constants, kinds, capability)
    assert made.asm["cubin"]
    assert made.metadata.shared <= 99 * 1024


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("group", [32, 576])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_compiles(dtype, group, capability, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    from lit_rl.kernels import ternary_triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    _, tile, _ = kernels._tile(torch.empty(64, group), group)
    kinds = dict.fromkeys(("weight", "result"), "*bf16" if dtype == torch.bfloat16 else "*fp32")
    kinds |= dict.fromkeys(("before", "packed"), "*u8") | {"scales": "*bf16", "counts": "*i32"}
    for kernel in ("_round", "_survey"):
        assert compiled(kernel, tile, kinds, capability).asm["cubin"]
