"""Keys and values of rows being continued: buffers that grow in place, with each prompt's kept once for all its rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

GROWTH = 16  # columns that a full cache grows by, or an eighth of its length: reading past wide gaps is slow on a CPU


class GrowingLayer(DynamicLayer):
    """Keys and values (rows, heads, length, dim) that are views of larger buffers, so that a step copies one column. With the
    keys goes `pooled`, tensors with a row for each row, in which an attention may keep what it has made of them."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[Tensor] = []
        self.length = 0
        self.pooled: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, new = self.length, (key_states, value_states)
        self.length += key_states.shape[2]
        if not self.buffers or self.length > self.buffers[0].shape[2]:
            room = self.length + max(GROWTH, self.length // 8)
            grown = [x.new_empty(*x.shape[:2], room, x.shape[3]) for x in new]
            for buffer, old in zip(grown, self.buffers, strict=False):
                buffer[:, :, :start] = old[:, :, :start]
            self.buffers = grown
        for buffer, x in zip(self.buffers, new, strict=True):
            buffer.narrow(2, start, self.length - start).copy_(x)
        self.keys, self.values = keys, values = [buffer.narrow(2, 0, self.length) for buffer in self.buffers]
        keys.pooled = self.pooled  # type: ignore[attr-defined]
        return keys, values

    def get_seq_length(self) -> int:
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row beam_idx[i]. Only rows that move are copied; afterwards there may be fewer, not more."""
        moved = (beam_idx != torch.arange(len(beam_idx), device=beam_idx.device)).nonzero().squeeze(1)
        for buffer in self.buffers:
            buffer[moved, :, : self.length] = buffer[beam_idx[moved], :, : self.length]
        self.buffers = [buffer[: len(beam_idx)] for buffer in self.buffers]
        self.pooled = {name: kept[beam_idx] for name, kept in self.pooled.items()}


class Unshareable(Exception):
    """A model's attention does not read its cache as it is, so that prompts cannot be kept apart from their rows."""


class SharedLayer(GrowingLayer):
    """New tokens of rows whose prompts are kept apart: `prompts`, keys and values (P, heads, L, dim)."""

    def __init__(self, prompts: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.prompts = prompts

    def get_seq_length(self) -> int:
        return self.prompts[0].shape[2] + self.length


class SharedCache(Cache):
    """The past of R rows that continue P prompts, with one copy of each prompt, and the attention that reads it.

    layers: keys and values (P, heads, L, dim) of each layer, prompts at the right; owner (R,): the prompt of each row;
    padded (P, L): where there is no prompt.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]], owner: Tensor, padded: Tensor | None = None) -> None:
        self.shared = [SharedLayer(prompts) for prompts in layers]
        self.bias: Tensor | None = None  # (P, 1, 1, L), for the scores of prompts
        if padded is not None:
            self.bias = layers[0][0].new_zeros(padded.shape).masked_fill(padded, -torch.inf)[:, None, None]
        super().__init__(layers=list(self.shared))
        self._arrange(owner)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for layer in self.shared:
            layer.reorder_cache(beam_idx)
        self._arrange(self.owner[beam_idx])

    def _arrange(self, owner: Tensor) -> None:
        """Find the places of the rows by prompt, and drop prompts that have none left."""
        prompts, self.owner = owner.unique(return_inverse=True)
        if self.bias is not None and len(prompts) < len(self.bias):
            self.bias = self.bias[prompts]
        for layer in self.shared:
            keys, values = layer.prompts
            if len(prompts) < len(keys):
                layer.prompts = keys[prompts], values[prompts]
        rank = (self.owner[:, None] == self.owner).tril(-1).sum(1)  # (R,): place among the rows of the same prompt
        heads = torch.arange(self.shared[0].prompts[0].shape[1], device=owner.device)
        self.shape = len(prompts), len(heads), int(rank.max()) + 1  # P, K, and the most rows of a prompt, S
        rows = rank.new_zeros(len(prompts), 1, self.shape[2])  # where a prompt has fewer, row 0 stands in
        rows[self.owner, 0, rank] = torch.arange(len(owner), device=owner.device)
        self.by_prompt = (rows * len(heads) + heads[:, None]).flatten()  # (P, K, S): places in (R, K)
        self.by_row = ((self.owner[:, None] * len(heads) + heads) * self.shape[2] + rank[:, None]).flatten()  # and back

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention of a new token in each row, query (R, H, 1, dim), to its prompt and to its own key and value.

        The queries of a prompt's rows meet its keys in one matrix product. attention_mask, if any, is boolean (R, 1, 1, past).
        Returns (R, 1, H, dim) and no weights, as transformers' attention functions do.
        """
        layer = self.shared[module.layer_idx]
        if key is not layer.keys or value is not layer.values:
            raise Unshareable(f"{type(module).__name__} does not read its cache as it is")
        far, far_value = layer.prompts
        rows, heads, _, dim = query.shape
        query = query.reshape(rows, key.shape[1], -1, dim) * (dim**-0.5 if scaling is None else scaling)
        far_scores = self._to_prompts(query) @ far.transpose(2, 3)
        if self.bias is not None:
            far_scores += self.bias
        scores = torch.cat([self._to_rows(far_scores), query @ key.transpose(2, 3)], -1)  # (R, K, H / K, past)
        if attention_mask is not None:
            scores = scores.where(attention_mask, torch.finfo(scores.dtype).min)
        far_weights, weights = scores.softmax(-1).split([far.shape[2], key.shape[2]], -1)
        out = self._to_rows(self._to_prompts(far_weights) @ far_value) + weights @ value
        return out.reshape(rows, 1, heads, -1), None

    def _to_prompts(self, x: Tensor) -> Tensor:
        """(R, K, g, d) to (P, K, S * g, d)."""
        return x.flatten(0, 1).index_select(0, self.by_prompt).unflatten(0, self.shape).flatten(2, 3)

    def _to_rows(self, x: Tensor) -> Tensor:
        """(P, K, S * g, d) to (R, K, g, d)."""
        x = x.unflatten(2, (self.shape[2], -1)).flatten(0, 2)
        return x.index_select(0, self.by_row).unflatten(0, (-1, self.shape[1]))
