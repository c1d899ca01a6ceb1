"""Rows of a batch that are decoded together, a token each at a time, in the fastest of the ways that their model allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_rl import sparse_attention
from lit_rl.generation import recorded
from lit_rl.generation.caches import GrowingLayer, SharedCache
from lit_rl.models import cache_layers, takes_attention

CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # of forward's argument and its output's field, newest first
PADDING = 0.75  # prompts computed in one forward are at least this fraction of the longest among them
FEW = 8192  # tokens with padding that a GPU computes in one forward in any case: its launches take longer than its work

Prompt = tuple[int, ...]


class Rows:
    """R rows being continued: `logits` (R, V) of their next token, after their prompts and then after each `step`.

    Keys and values of past tokens are kept in the first of four ways that the model allows:
    recorded: each row's prompt and new tokens in buffers with room, for the CUDA graph of `Recorded`;
    shared: each prompt's once for all its rows, in a `SharedCache`. Only in float32, since the matrix products of its
    attention would round the scores to half precision;
    expanded: each row's prompt and new tokens in a growing cache, for the attention that the model is set to;
    dynamic: in transformers' own cache, for prompts of one length. For state-space layers and the like.
    """

    def __init__(self, model: Any, prompts: list[tuple[Prompt, int]], pad: int, share: bool, steps: int) -> None:
        """Compute these prompts, shortest first, each for so many rows; at most so many steps will follow."""
        self.model, self.mask, self.recorded = model, None, None
        known = signature(model.forward).parameters
        self.cache_name = next((name for name in CACHE_NAMES if name in known), "")
        grows = growing(model)
        few = FEW if next(model.parameters()).is_cuda else 0
        outs = [self._prefill(batch, pad, grows) for batch in _similar([prompt for prompt, _ in prompts], few)]
        caches: list[Any] = [getattr(out, self.cache_name, None) for out in outs]
        if caches[0] is None:
            raise ValueError(f"{type(model).__name__} keeps no key-value cache: the native generator needs one")
        logits = torch.cat([out.logits[:, -1] for out in outs])  # (P, V)

        lengths, samples = torch.tensor([(len(prompt), count) for prompt, count in prompts]).T.to(logits.device)
        owner = torch.arange(len(prompts), device=logits.device).repeat_interleave(samples)  # (R,): the row's prompt
        self.logits, self.position = logits[owner], lengths[owner, None]  # (R, V) and (R, 1): of the next token
        if not grows:
            self.cache: Any = caches[0]
            self.cache.reorder_cache(owner)
            return
        width = len(prompts[-1][0])
        if len(prompts[0][0]) < width:
            self.mask = torch.arange(width, device=logits.device) >= width - self.position  # (R, width)
        layers = [_join(parts, width) for parts in zip(*(cache.layers for cache in caches), strict=True)]
        if recorded.recordable(model, steps) and not _windowed(model):
            expanded = [(keys[owner], values[owner]) for keys, values in layers]
            self.recorded = recorded.Recorded(self._decode, expanded, self.position, steps)
            self.cache = None
            return
        if share and _shareable(model, layers):
            padded = None if self.mask is None else torch.arange(width, device=logits.device) < width - lengths[:, None]
            self.cache = SharedCache(layers, owner, padded)
            if not _windowed(model):
                self.mask = None  # which the model would make its own of in each step
            return
        self.cache = Cache(layer_class_to_replicate=GrowingLayer)
        for i, (keys, values) in enumerate(layers):
            self.cache.update(keys[owner], values[owner], i)

    def step(self, tokens: Tensor) -> None:
        """Append a token (R,) to each row."""
        if self.recorded is not None:
            self.logits = self.recorded.step(tokens)
            return
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, 1), value=True)
        self.logits = self._decode(tokens[:, None], self.position, self.mask, self.cache)
        self.position = self.position + 1

    def keep(self, slots: Tensor) -> None:
        """Row i becomes row slots[i]; the others are gone."""
        if self.recorded is not None:
            self.recorded.keep(slots)
            return
        self.cache.reorder_cache(slots)
        self.position = self.position[slots]
        if self.mask is not None:
            self.mask = self.mask[slots]

    @contextmanager
    def attention(self) -> Iterator[None]:
        """The attention that `step` needs: a setting of the model, so no other thread may run the model meanwhile."""
        if not isinstance(self.cache, SharedCache):
            yield
            return
        before, name = self.model.config._attn_implementation, f"lit_rl_{get_ident()}"  # models may sample in threads
        AttentionInterface.register(name, self.cache.attend)
        AttentionMaskInterface.register(name, sdpa_mask)
        self.model.set_attn_implementation(name)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)
            AttentionInterface.register(name, sdpa_attention_forward)  # or the cache would stay in memory

    def _prefill(self, batch: list[Prompt], pad: int, grows: bool) -> Any:
        """The model's output for these prompts, shortest first, filled up at the left."""
        device, width = next(self.model.parameters()).device, len(batch[-1])
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in batch], device=device)
        position = torch.tensor([range(len(prompt) - width, len(prompt)) for prompt in batch], device=device)
        mask = None if len(batch[0]) == width else position >= 0
        own = grows and self.cache_name  # else a model makes what it needs
        past = {self.cache_name: DynamicCache()} if own else {}
        return self._forward(ids, position.clamp(min=0), mask, past)

    def _decode(self, ids: Tensor, position: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        """Ids (R, 1) to the logits (R, V) of the next token."""
        return self._forward(ids, position, mask, {self.cache_name: cache}).logits[:, -1]  # type: ignore[no-any-return]

    def _forward(self, ids: Tensor, position: Tensor, mask: Tensor | None, past: dict[str, Any]) -> Any:
        return self.model(
            input_ids=ids, position_ids=position, attention_mask=mask, use_cache=True, logits_to_keep=1, **past
        )


def _kinds(model: Any) -> set[type]:
    """Of the layers' caches."""
    return {type(layer) for layer in cache_layers(model)}


def growing(model: Any) -> bool:
    """Whether each layer attends to all past tokens or to the last few, which a cache of all of them serves."""
    config = model.config.get_text_config()
    known = {DynamicLayer, DynamicSlidingWindowLayer}
    return _kinds(model) <= known and getattr(config, "attention_chunk_size", None) is None


def _windowed(model: Any) -> bool:
    """Whether some layer attends to the last few tokens."""
    return DynamicSlidingWindowLayer in _kinds(model)


def _shareable(model: Any, layers: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether the model's attention can be replaced, has no sinks or caps, and reads its cache as it is, in float32. One that
    chooses what it sees cannot."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return (
        config._attn_implementation != sparse_attention.NAME
        and takes_attention(model)
        and all(x.dtype == torch.float32 and x.shape[1] == heads for pair in layers for x in pair)
    )


def _similar(prompts: list[Prompt], few: int = 0) -> Iterator[list[Prompt]]:
    """Prompts, shortest first, in batches of similar length, or of few tokens."""
    start = 0
    for end in range(1, len(prompts) + 1):
        if end < len(prompts):
            longest = len(prompts[end])
            if len(prompts[start]) >= PADDING * longest or (end + 1 - start) * longest <= few:
                continue
        yield prompts[start:end]
        start = end


def _join(parts: Sequence[DynamicLayer], width: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer from several batches, filled up at the left: (P, heads, width, dim) each."""

    def join(tensors: list[Any]) -> Tensor:
        return torch.cat([F.pad(x, (0, 0, width - x.shape[2], 0)) for x in tensors])

    return join([part.keys for part in parts]), join([part.values for part in parts])
