"""Block-sparse attention beside dense attention on a GPU: MiniCPM4-8B's heads (32 on 2 key heads, of size 128) in bfloat16.

Of one sequence: forward, and forward and backward; the choice of blocks by itself. And one token of several rows after a cache.
Queries and keys are random, so that no two queries choose alike.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from gpu import CUDA, DEVICE, attempt, ceilings, milliseconds, sections
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_rl import ops
from lit_rl.kernels.infllm import Sequences, Settings
from lit_rl.kernels.infllm_torch import pool

HEADS, KEY_HEADS, SIZE = (32, 2, 128) if CUDA else (4, 2, 16)
LENGTHS = [1024, 4096, 8192, 16384, 32768, 65536, 131072] if CUDA else [128, 300]
ROWS = 16 if CUDA else 2
"""Of a step of decoding."""
SETTINGS = {
    "6k": Settings(dense_len=-1),  # MiniCPM4's: 96 blocks
    "4k": Settings(topk=32, dense_len=-1),  # 64 blocks, those of the paper's times in training
    "1k": Settings(window_size=512, topk=8, dense_len=-1),
}
"""By the tokens that a query sees."""
PAPER = {32768: 1.57, 65536: 2.76, 131072: 4.61}
"""Forward and backward of FlashAttention over those of the authors' kernels, with 64 blocks, on an H100."""
BACKENDS = (
    {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION} if CUDA else {"math": SDPBackend.MATH}
)
SCALE = SIZE**-0.5
Row = dict[str, Any]
Times = dict[str, float | None]


def inputs(length: int, rows: int = 1, queries: int | None = None) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(HEADS, queries or length), (KEY_HEADS, length), (KEY_HEADS, length)]
    return [torch.randn(rows, *shape, SIZE, device=DEVICE, dtype=torch.bfloat16) for shape in shapes]


def dense(backend: SDPBackend, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=SCALE, enable_gqa=True)


def both(attend: Callable[..., Tensor], tensors: list[Tensor]) -> Any:
    """Forward and backward."""
    with torch.enable_grad():
        learned = [x.detach().requires_grad_() for x in tensors]
        out = attend(*learned)
        return torch.autograd.grad(out, learned, torch.ones_like(out))


def divided(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def sequence(length: int) -> list[Row]:
    tensors = inputs(length)
    q, k, _ = tensors
    seqs = Sequences.whole(q, k)
    slow: dict[str, Times] = {}
    for name, backend in BACKENDS.items():
        attend = partial(dense, backend, True)
        slow[name] = {
            "forward": attempt(f"{name}, {length}", lambda a=attend: milliseconds(lambda: a(*tensors))),
            "both": attempt(f"{name}, {length}", lambda a=attend: milliseconds(lambda: both(a, tensors))),
        }
    rows = []
    for name, s in SETTINGS.items():
        select = partial(ops.select_blocks, q, k, seqs, s, SCALE)
        chosen = attempt(f"choice, {name}, {length}", lambda f=select: milliseconds(f))
        if chosen is None:
            continue
        attend = partial(sparse, select(), seqs, s)
        forward = attempt(f"{name}, {length}", lambda a=attend: milliseconds(lambda: a(*tensors)))
        with_backward = attempt(f"{name}, {length}", lambda a=attend: milliseconds(lambda: both(a, tensors)))
        row: Row = {
            "tokens": length,
            "sees": name,
            "choice, ms": chosen,
            "forward, ms": forward,
            "both, ms": with_backward,
        }
        for dense_name, times in slow.items():
            row |= {f"{dense_name}: forward, ms": times["forward"], f"{dense_name}: both, ms": times["both"]}
        first = slow[next(iter(slow))]
        row["x forward"] = divided(first["forward"], forward and forward + chosen)
        row["x both"] = divided(first["both"], with_backward and with_backward + chosen)
        row["x both, without choice"] = divided(first["both"], with_backward)
        row["paper"] = PAPER.get(length) if name == "4k" else None
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def sparse(blocks: Tensor, seqs: Sequences, s: Settings, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.block_attention(q, k, v, blocks, seqs, s, SCALE)


def decoding(length: int) -> list[Row]:
    """With the pooled keys that a cache has kept."""
    tensors = inputs(length, ROWS, 1)
    q, k, _ = tensors
    seqs, s = Sequences.whole(q, k), SETTINGS["6k"]
    pooled = pool(k, seqs, *s.kernels()), pool(k, seqs, *s.kernels(coarse=True))
    select = partial(ops.select_blocks, q, k, seqs, s, SCALE, pooled)
    attend = partial(sparse, select(), seqs, s)
    row: Row = {"keys": length, "rows": ROWS, "choice, ms": milliseconds(select)}
    row["attention, ms"] = milliseconds(lambda: attend(*tensors))
    for name, backend in BACKENDS.items():
        call = partial(dense, backend, False, *tensors)
        row[f"{name}, ms"] = attempt(f"{name}, decoding, {length}", partial(milliseconds, call))
    first = row[f"{next(iter(BACKENDS))}, ms"]
    row["x"] = divided(first, row["choice, ms"] + row["attention, ms"])
    print(json.dumps(row), flush=True)
    return [row]


def each(part: Callable[[int], list[Row]]) -> list[Row]:
    rows: list[Row] = []
    for length in LENGTHS:
        with torch.no_grad():
            rows += attempt(f"{part.__name__}, {length}", partial(part, length)) or []
    return rows


# What the kernels are launched with; the last numbers of each are queries times heads, and pooled keys, at a time.
WALKS = [(warps, stages, 16, 32) for warps, stages in ((8, 2), (4, 2), (2, 2), (1, 2), (4, 3), (2, 3))]
SEVERAL = [(warps, stages, rows, 32) for (warps, stages), rows in product(((8, 2), (8, 3), (4, 2)), (16, 32, 64))]
SCORES = [(warps, 2, rows, tile) for warps, rows, tile in product((8, 4), (16, 64), (32, 64))]
CASES = [(kind, case) for kind in ("forward", "d q") for case in WALKS]
CASES += [("d k, d v", case) for case in SEVERAL] + [("choice", case) for case in SCORES]


def tune_case(length: int, kind: str, case: tuple[int, int, int, int], call: Callable[..., Any]) -> Any:
    """`call` of what runs this kernel and little else."""
    from lit_rl.kernels import infllm_triton_select as kernels

    q, k, v = inputs(length)
    seqs, s = Sequences.whole(q, k), SETTINGS["6k"]
    warps, stages, rows, tile = case
    before = kernels.OPTIONS | {"ROWS": kernels.ROWS, "TILE": kernels.TILE}
    try:
        blocks = ops.select_blocks(q, k, seqs, s, SCALE)
        kernels.OPTIONS.update(num_warps=warps, num_stages=stages)
        kernels.ROWS, kernels.TILE = rows, tile
        if kind == "choice":
            choose, kernels.choose = kernels.choose, lambda scores, t, *_: scores.new_empty(1, scores.shape[1], 1)
            try:
                return call(lambda: ops.select_blocks(q, k, seqs, s, SCALE))
            finally:
                kernels.choose = choose
        learned = {"forward": (), "d q": (q,), "d k, d v": (k, v)}[kind]
        for x in learned:
            x.requires_grad_()
        if not learned:
            return call(lambda: sparse(blocks, seqs, s, q, k, v))
        out = sparse(blocks, seqs, s, q, k, v)
        up = torch.ones_like(out)
        return call(lambda: torch.autograd.grad(out, learned, up, retain_graph=True))
    finally:
        kernels.OPTIONS.update({name: before[name] for name in kernels.OPTIONS})
        kernels.ROWS, kernels.TILE = before["ROWS"], before["TILE"]


def compile_case(case: tuple[str, tuple[int, int, int, int]]) -> None:
    """In a process of its own, for the cache of compiled kernels."""
    tune_case(LENGTHS[0], *case, call=lambda launch: launch())


def tune() -> list[Row]:
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), get_context("spawn")) as workers:
        attempt("compiling", lambda: list(workers.map(compile_case, CASES)))
    rows = []
    for kind, case in CASES:
        took = attempt(f"{kind} {case}", partial(tune_case, LENGTHS[-3 if CUDA else 0], kind, case, milliseconds))
        rows.append({"kernel": kind, "warps, stages, ROWS, TILE": str(case), "ms": took})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parts: dict[str, Callable[[], list[Row]]] = {
        "sequence": partial(each, sequence), "decoding": partial(each, decoding), "tune": tune,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=["sequence", "decoding"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sections({name: parts[name] for name in args.only}, ceilings(), args.json)


if __name__ == "__main__":
    main()
