"""CPU time of InfLLM-v2's block-sparse attention against dense attention, in one thread, beside the operations of both.

    python scripts/bench/sparse_attention.py --lengths 1024 2048 4096 8192 16384 32768

Prints the tables of docs/benchmarks.md. Queries and keys are random, so that no two queries choose alike: the hardest case for
an attention that goes by blocks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_rl import ops
from lit_rl.kernels.infllm import Sequences, Settings

SETTINGS = {
    "6k": Settings(dense_len=-1),  # MiniCPM4's: 96 blocks
    "1k": Settings(window_size=512, topk=8, dense_len=-1),  # 16 blocks
}
"""By the tokens that a query sees."""


def operations(length: int, s: Settings | None) -> int:
    """Multiplications over all queries of a causal sequence, in units of the head size, for one query head: scores and values,
    and what the choice of blocks reads (fine and coarse pooled keys)."""
    t = torch.arange(length)
    if s is None:
        return int((2 * (t + 1)).sum())
    pooled = sum(((t - size + 1) // stride + 1).clamp(min=0).sum() for size, stride in (s.kernels(), s.kernels(True)))
    own = t % s.block_size + 1
    visible = own + (t // s.block_size).clamp(max=s.blocks - 1) * s.block_size
    return int(pooled + 2 * visible.sum())


def limit(length: int, s: Settings) -> float:
    """Dense over sparse operations of the last query, when everything is visible that may be: 2 L / (L/s + L/4s + 2 k B)."""
    _, stride = s.kernels()
    return 2 * length / (length / stride + length / (4 * stride) + 2 * min(length, s.blocks * s.block_size))


def seconds(attend: Callable[..., Tensor], backward: bool, *inputs: Tensor) -> tuple[float, ...]:
    """Of the forward, and, if wanted, of forward and backward; the faster of two short runs."""
    found = []
    for _ in range(2 if inputs[0].shape[2] <= 4096 else 1):
        start = time.process_time()
        out = attend(*inputs)
        found.append([time.process_time() - start])
        if backward:
            torch.autograd.grad(out, inputs, torch.ones_like(out))
            found[-1].append(time.process_time() - start)
    return tuple(map(min, zip(*found, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--key-heads", type=int, default=1)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--backward", type=int, default=32768, help="the longest length whose backward is measured")
    args = parser.parse_args()
    torch.set_num_threads(1)
    scale, group = args.size**-0.5, args.heads // args.key_heads

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    def sparse(s: Settings) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seqs = Sequences.whole(q, k)
            return ops.block_attention(q, k, v, ops.select_blocks(q, k, seqs, s, scale), seqs, s, scale)

        return attend

    print(
        "| tokens | sees | operations, dense / sparse | last query | forward: dense, sparse | with backward: dense, sparse |"
    )
    print("|---|---|---|---|---|---|")
    for length in args.lengths:
        torch.manual_seed(0)
        shapes = [(args.heads, length), (args.key_heads, length), (args.key_heads, length)]
        inputs = [torch.randn(1, *shape, args.size, requires_grad=True) for shape in shapes]
        backward = length <= args.backward
        slow = seconds(dense, backward, *inputs)
        for name, s in SETTINGS.items():
            fast = seconds(sparse(s), backward, *inputs)
            ratio = operations(length, None) / operations(length, s)
            times = [f"{a:.2f} s, {b:.2f} s (x{a / b:.1f})" for a, b in zip(slow, fast, strict=True)]
            print(
                f"| {length} | {name} | {ratio:.1f} | {limit(length, s):.1f} | {' | '.join(times + ['–'] * (2 - len(times)))} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
