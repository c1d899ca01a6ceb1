"""What the benchmarks of kernels share: time and memory of a call, the device's own ceilings, and going on after a failure."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def milliseconds(call: Callable[[], Any], enough: float = 40.0) -> float:
    """Of a call on the current device, once warm. Calls that are shorter than `enough` are repeated for about so long, each with
    an empty L2 cache, as after the other layers of a model: the median of times between events."""
    call()
    if CUDA:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if CUDA:
        torch.cuda.synchronize()
    once = (time.perf_counter() - begin) * 1e3
    if not CUDA or once > enough:
        return once
    from triton.testing import do_bench

    return float(do_bench(call, warmup=1, rep=int(enough), return_mode="median"))


def replayed(calls: list[Callable[[], Any]]) -> float:
    """Milliseconds of one of many short calls, replayed as one CUDA graph: without the gaps between launches."""
    if not CUDA:
        return milliseconds(lambda: [call() for call in calls]) / len(calls)
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return milliseconds(graph.replay) / len(calls)


def megabytes(call: Callable[[], Any]) -> float:
    """The most that a call has allocated beside what is there; 0 without a GPU."""
    if not CUDA:
        return 0.0
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def ceilings(size: int = 8192 if CUDA else 256) -> dict[str, float]:
    """The device's own rates on random data: matrix products in bfloat16 and in float32 as it is set (TFLOP/s), and a copy (GB/s,
    read and written)."""
    found = {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        a, b = torch.randn(2, size, size, device=DEVICE, dtype=dtype)
        found[name] = 2 * size**3 / milliseconds(lambda a=a, b=b: a @ b, 200) / 1e9  # type: ignore[misc]
    source = torch.randint(256, (size, size * 32), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    found["copy"] = 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6
    return found


def attempt(what: str, call: Callable[[], Any]) -> Any:
    """What the call returns, or None after it has failed and its traceback is printed."""
    try:
        return call()
    except Exception:  # whatever it is, the others are measured
        print(f"FAILED: {what}\n{traceback.format_exc(limit=-4)}", flush=True)
        return None
    finally:
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a column for each key of the first row."""

    def cell(x: Any) -> str:
        if isinstance(x, float):
            return f"{x:.3g}" if abs(x) < 100 else f"{x:.0f}"
        return "–" if x is None else str(x)

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(row.get(key)) for key in rows[0]] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sections(parts: dict[str, Callable[[], Any]], rates: dict[str, float], file: Path | None) -> None:
    """Runs each part, which returns rows or None for those that failed, prints their tables, and writes all into the file."""
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if CUDA else "cpu", "rates": rates}
    print(f"{found['device']}: " + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()) + "\n", flush=True)
    for name, part in parts.items():
        begin = time.perf_counter()
        found[name] = [row for row in attempt(name, part) or [] if row]
        if found[name]:
            print(f"\n{table(found[name])}\n")
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
        if file:
            file.write_text(json.dumps(found, indent=1))
