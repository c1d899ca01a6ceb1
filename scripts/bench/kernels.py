"""What share of a GPU's own rates the head's kernels and ternary products reach: time, useful operations, bytes, memory.

Rates are measured first, on the same device: a large matrix product and a copy. Operations count what must be computed, each
once: 2 M D V for the forward of the head and 4 M D V for its two gradients, not the logits that most compute again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu import CUDA, DEVICE, attempt, ceilings, megabytes, milliseconds, replayed, sections
from torch import Tensor
from torch.nn import functional as F

from lit_rl import ops
from lit_rl.kernels import logprob, ternary

HEADS = [(8192, 576, 49152), (8192, 1536, 151936), (4096, 4096, 151936)] if CUDA else [(64, 32, 96)]
"""Tokens, hidden size, words."""
LAYER, LAYERS, GROUP = (4096, 32, 32) if CUDA else (64, 2, 32)
Row = dict[str, Any]
Function = Callable[[Tensor, Tensor, Tensor], Any]
"""Of hidden states, weight and targets to log-probabilities and entropies, or to the sum of the former and None."""


def example(tokens: int, width: int, words: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=DEVICE, dtype=dtype)
    weight = torch.randn(words, width, device=DEVICE, dtype=dtype) * (2 * width**-0.5)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(words, (tokens,), device=DEVICE)


def chunked(module: Any, size: int, *inputs: Tensor) -> Any:
    """The module's `linear_logprob` with this CHUNK, which its backward takes too, unless another call comes before."""
    module.CHUNK = size
    return module.linear_logprob(*inputs)


def candidates(half: bool) -> dict[str, Function]:
    found: dict[str, Function] = {"lit-rl": ops.linear_logprob}

    def trl() -> None:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction as Fused

        found["TRL's kernel"] = lambda h, w, t: Fused.apply(h, w, None, t, 1.0, 32768, None, 1.0, ("entropy",))[:2]

    def liger() -> None:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        found["Liger's cross entropy"] = lambda h, w, t: (-loss(w, h, t), None)

    for add in (trl, liger) if CUDA else ():
        attempt(add.__name__, add)
    for power in (22, 27) if half else (27,):
        found[f"torch, chunks of 2^{power}"] = partial(chunked, logprob, 2**power)
    found["torch, all logits"] = logprob.naive_linear_logprob
    return found


class Head:
    """One size and type."""

    def __init__(self, tokens: int, width: int, words: int, dtype: torch.dtype, rates: dict[str, float]) -> None:
        self.inputs = hidden, weight, targets = example(tokens, width, words, dtype)
        self.up = torch.randn(2, tokens, device=DEVICE)
        self.work = 2 * tokens * width * words / 1e9  # over milliseconds: TFLOP/s
        self.type = str(dtype).split(".")[1]
        self.peak, self.name = rates[self.type], f"{tokens}, {width}, {words}"
        few = hidden[:128].detach().double().requires_grad_()  # of these the reference, in double precision
        logps, entropy = logprob.naive_linear_logprob(few, weight.detach().double(), targets[:128])
        up = self.up[:, : len(few)].double()
        slope = torch.autograd.grad((logps * up[0] + entropy * up[1]).sum(), few)[0]
        self.want = logps.detach(), entropy.detach(), slope

    def forward(self, function: Function) -> Any:
        with torch.no_grad():
            return function(*self.inputs)

    def both(self, function: Function) -> Any:
        logps, entropy = function(*self.inputs)
        total = logps if entropy is None else (logps * self.up[0] + entropy * self.up[1]).sum()
        return torch.autograd.grad(total, self.inputs[:2])

    def measure(self, what: str, function: Function) -> Row:
        row: Row = {"tokens, hidden, words": self.name, "type": self.type, "": what}
        gradients, outputs = self.both(function), self.forward(function)
        tokenwise = outputs[1] is not None  # else gradients are computed in the forward
        took = milliseconds(partial(self.forward, function)) if tokenwise else None
        row |= {"forward, ms": took, "share of peak": took and self.work / took / self.peak}
        took = milliseconds(partial(self.both, function))
        row |= {"with backward, ms": took, "TFLOP/s": 3 * self.work / took, "share": 3 * self.work / took / self.peak}
        row["MB"] = megabytes(partial(self.both, function))
        pairs = zip((*outputs, gradients[0]), self.want, strict=True) if tokenwise else []
        row["errors: log-probs, entropies, d hidden"] = " ".join(
            f"{float((a[:128].double() - b).norm() / b.norm()):.0e}" for a, b in pairs
        )
        print(json.dumps(row), flush=True)
        return row


def head(rates: dict[str, float]) -> list[Row]:
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for size in HEADS if dtype == torch.bfloat16 else HEADS[:2]:
            case = Head(*size, dtype, rates)
            for what, function in candidates(dtype == torch.bfloat16).items():
                rows.append(attempt(f"{what}: {case.name}, {case.type}", partial(case.measure, what, function)))
    return rows


def decoding(rates: dict[str, float]) -> list[Row]:
    """Layers one after the other, whose weights do not fit in a cache together, as one CUDA graph."""
    rows = []
    dense = [torch.randn(LAYER, LAYER, device=DEVICE, dtype=torch.bfloat16) for _ in range(LAYERS)]
    packed = [(ternary.pack(codes), scales) for codes, scales in (ternary.quantize(weight, GROUP) for weight in dense)]
    for tokens in (1, 16, 64):
        x = torch.randn(tokens, LAYER, device=DEVICE, dtype=torch.bfloat16)
        sides: dict[str, tuple[float, list[Callable[[], Any]]]] = {  # bytes a weight, and the calls
            "bfloat16, F.linear": (2, [partial(F.linear, x, weight) for weight in dense]),
            "ternary, lit-rl": (0.25 + 2 / GROUP, [partial(ops.ternary_linear, x, *pair) for pair in packed]),
        }
        for what, (size, calls) in sides.items():
            took = attempt(f"{what}, {tokens} tokens", partial(replayed, calls))
            rate = took and (size * LAYER**2 + 4 * tokens * LAYER) / took / 1e6
            row = {"tokens": tokens, "weight": what, "µs": took and took * 1e3, "GB/s": rate}
            rows.append(row | {"share of a copy": rate and rate / rates["copy"]})
    return rows


def main() -> None:
    parts = {"head": head, "ternary": decoding}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")  # TF32
    rates = ceilings()
    sections({name: partial(parts[name], rates) for name in args.only}, rates, args.json)


if __name__ == "__main__":
    main()
