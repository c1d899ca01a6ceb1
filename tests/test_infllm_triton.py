"""InfLLM-v2's Triton kernels: their numbers, interpreted and on a GPU, and that they compile for GPUs."""

import checks
import pytest
import torch


@pytest.mark.slow
def test_numbers():
    checks.check("infllm_checks.py", interpreted=True)


@checks.gpu
def test_numbers_on_a_gpu():
    checks.check("infllm_checks.py", interpreted=False)


@pytest.mark.parametrize(
    ("dtype", "capability"), [(torch.bfloat16, 80), (torch.bfloat16, 90), (torch.float16, 80), (torch.float32, 80)]
)
def test_they_compile_and_fit(dtype, capability, monkeypatch, tmp_path):
    """At the paper's sizes: heads of 128, 16 to a key head, blocks of 64. Shared memory is what the smallest GPU since Ampere
    gives a program."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lit_rl.kernels import infllm_triton as kernels
    from lit_rl.kernels import infllm_triton_select as chooser

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kind = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    kinds = dict.fromkeys(("q", "k", "v"), kind) | {"blocks": "*i32", "scale": "fp32"}
    kinds |= dict.fromkeys(("fine", "coarse", "scores", "out", "norm", "up", "delta", "d_q"), "*fp32")
    kinds |= dict.fromkeys(("part_k", "part_v", "parts", "total"), "*fp32")
    tables = ("sequence", "row", "column", "position", "k_start", "k_length", "seq_row", "counts", "queries", "offsets")
    kinds |= dict.fromkeys((*tables, "begins", "ends", "cells", "block_sequence", "block_first"), "*i64")
    shape = {"D": 128, "E": 128, "BLOCK": 64, "SIZE": 32, "STRIDE": 16, "COARSE": True, "LARGEST": 80.0}
    shape |= {"PRECISION": "ieee", "UPCAST": False, "TILE": chooser.TILE}
    several = chooser.several(16)
    for kernel, own in (
        (chooser._scores, several),
        (kernels._forward, {"BACKWARD": False, "GROUP": 16}),
        (kernels._forward, {"BACKWARD": True, "GROUP": 16}),
        (kernels._backward, several),
        (kernels._add_up, {}),
    ):
        names = kernel.arg_names
        constants = {name: value for name, value in {**shape, **own}.items() if name in names}
        constants |= {name: 1 for name in names if name in ("q_d", "k_d", "v_d")}  # as for contiguous inputs
        signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
        compiled = triton.compile(
            ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32), options=chooser.OPTIONS
        )
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= 99 * 1024, kernel
