"""Decoding on a GPU by a CUDA graph: the model's forward of one token is recorded once and replayed for each.

A token of a small model is thousands of kernels of a few microseconds each, which take Python far longer to launch than the
GPU to run. A graph launches them all at once, but only with shapes and addresses that stay: so keys and values lie in buffers
with room, all of which a step reads under a mask, and rows that are finished stay until half of them are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.cache_utils import Cache, DynamicLayer

from lit_rl.models import replaceable

ROOM = 256
"""Columns that full buffers grow by at least; else they double."""
UNIT = 64
"""Buffers have a multiple of so many columns: attention kernels need masks of a multiple of 8."""
WORTH = 8
"""Tokens from which on recording pays: it takes as long as a step or two."""
TOLERANCE = 2**-6
"""Difference of logits, relative to the largest, that still counts as the same: libraries may choose other kernels."""


def recordable(model: Any, tokens: int) -> bool:
    """Whether decoding so many tokens with this model is to be recorded: on a GPU, with the attention that a mask fits. A
    sharded model gathers its weights as it goes, which is not."""
    weight = next(model.parameters())
    return (
        weight.is_cuda
        and torch.version.cuda is not None
        and tokens >= WORTH
        and not isinstance(weight, DTensor)
        and replaceable(model)
    )


class FixedLayer(DynamicLayer):
    """Keys and values (rows, heads, room, dim), zero where nothing is yet; an update writes the column `at` (1,) int64, which
    a graph may read anew each time."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, at: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.at = keys, values, at
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.at, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.at, value_states.to(self.values.dtype))
        return self.keys, self.values


class Recorded:
    """R rows being continued, a token each at a time.

    forward: the model's, of ids (R, 1), positions (R, 1), a boolean mask (R, 1, 1, room) and a cache, to logits (R, V);
    layers: keys and values (R, heads, width, dim) of each layer, prompts at the right; position (R, 1): of the next token.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, Tensor, Tensor, Cache], Tensor],
        layers: list[tuple[Tensor, Tensor]],
        position: Tensor,
        tokens: int,
    ) -> None:
        self.forward, self.left = forward, tokens
        width = layers[0][0].shape[2]
        self.first = width - position  # (R, 1): the column where a row's prompt begins
        self.ids, self.position = torch.zeros_like(position), position.clone()
        self.at = position.new_full((1,), width)
        self.slots = torch.arange(len(position), device=position.device)  # where each live row lies
        self.length = width
        self.logits: Tensor
        self.replay: Callable[[], object] | None
        self._lay_out(layers)

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token (R,) to each row; the logits (R, V) of the next."""
        with torch.cuda.device_of(self.at):  # whose streams a graph is recorded and replayed on
            return self._step(tokens)

    def _step(self, tokens: Tensor) -> Tensor:
        if self.length == self.room:
            self._lay_out([(layer.keys, layer.values) for layer in self.layers])
        self.ids[self.slots, 0] = tokens
        (self.replay or self._advance)()
        logits = self.logits[self.slots]
        self.length, self.left = self.length + 1, self.left - 1
        if self.replay is None:  # only now: what a first run sets up, such as a library's workspace, cannot be recorded
            self.replay = (self._record() if self.left >= WORTH else None) or self._advance
        return logits

    def keep(self, slots: Tensor) -> None:
        """Row i becomes row slots[i]; the others are gone."""
        self.slots = self.slots[slots]
        if len(self.slots) <= len(self.ids) // 2:
            self.ids, self.position, self.first = (x[self.slots] for x in (self.ids, self.position, self.first))
            kept = [(layer.keys[self.slots], layer.values[self.slots]) for layer in self.layers]
            self.slots = torch.arange(len(self.slots), device=self.slots.device)
            self._lay_out(kept)

    def _lay_out(self, layers: list[tuple[Tensor, Tensor]]) -> None:
        """Buffers with room for these keys and values."""
        self.replay = None  # it would write to the old ones
        wanted = self.length + min(self.left, max(ROOM, self.length))
        self.room: int = -(-wanted // UNIT) * UNIT
        self.columns = torch.arange(self.room, device=self.at.device)
        self.layers: list[FixedLayer] = []
        for pair in layers:
            grown = [x.new_zeros(*x.shape[:2], self.room, x.shape[3]) for x in pair]
            for new, old in zip(grown, pair, strict=True):
                new[:, :, : self.length] = old[:, :, : self.length]
            self.layers.append(FixedLayer(grown[0], grown[1], self.at))
        self.cache = Cache(layers=list(self.layers))

    def _record(self) -> Callable[[], object] | None:
        """A graph's replay, if it gives once more the logits of the step just done."""
        want, at, position = self.logits, self.at.clone(), self.position.clone()
        replay = record(self._advance)
        if replay is not None:
            self.at -= 1
            self.position -= 1
            replay()
            gap, most = (float(x.abs().max()) for x in (self.logits - want, want))
            if gap > TOLERANCE * most:
                warnings.warn(
                    f"decoding without a CUDA graph: its logits differ by {gap:.3g} of {most:.3g}", stacklevel=2
                )
                replay = None
            self.at.copy_(at)
            self.position.copy_(position)
        return replay

    def _advance(self) -> None:
        """What is recorded: it reads and writes tensors that stay where they are."""
        mask = (self.columns >= self.first) & (self.columns <= self.at)  # (R, room)
        self.logits = self.forward(self.ids, self.position, mask[:, None, None], self.cache)
        self.at += 1
        self.position += 1


def record(function: Callable[[], object]) -> Callable[[], object] | None:
    """A graph's replay, or nothing where the function cannot be recorded, such as a model that asks the GPU for a number."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            # torch.cuda.graph would also empty the allocator's cache, which the training step then fills again.
            graph.capture_begin(capture_error_mode="thread_local")  # another thread may be training
            try:
                function()
            finally:
                graph.capture_end()
    except RuntimeError as error:
        warnings.warn(f"decoding without a CUDA graph, since recording it failed: {error}", stacklevel=2)
        return None
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay
