"""The native engine: the trained model samples in this process, through its own forward.

Each prompt is computed once for all its samples, keys and values are written in place, finished rows leave the batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_rl import sparse_attention
from lit_rl.generation import recorded
from lit_rl.generation.base import Completion, Sampling
from lit_rl.generation.sampling import draw, uniforms
from lit_rl.models import takes_attention

GROWTH = 16  # columns that a full cache grows by, or an eighth of its length: reading past wide gaps is slow on a CPU
CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # of forward's argument and its output's field, newest first
PADDING = 0.75  # prompts computed in one forward are at least this fraction of the longest among them

Prompt = tuple[int, ...]
Place = tuple[int, int]  # of a completion in the answer: which prompt, which of its seeds
Chunk = list[tuple[Prompt, list[Place]]]


class NativeGenerator:
    """Samples from a Hugging Face causal language model, on the device where it is.

    eos: ids that end a completion; pad: the id that fills up shorter prompts; decode: ids to text, special ones left
    out; max_rows: completions sampled at a time (a prompt with more seeds than that is computed once for each part);
    share: let the rows of a prompt share its keys and values where the model allows, see `Rows`.
    """

    exact = keeps_mass = True

    def __init__(
        self,
        eos: Sequence[int],
        pad: int,
        decode: Callable[[list[int]], str],
        max_rows: int = 256,
        share: bool = True,
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}: it must be at least 1")
        self.eos, self.pad, self.decode, self.max_rows, self.share = list(eos), pad, decode, max_rows, share
        self.model: Any = None

    def sync(self, model: nn.Module) -> None:
        """Sample from this model from now on. Nothing is copied, so later changes of its weights need no new call."""
        self.model = model

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        begun: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> list[list[Completion]]:
        """For each prompt (token ids) as many completions as it has seeds, or what follows those that have `begun`.

        A completion depends on the weights, its prompt and its seed, and on what it is batched with only as far as the
        rounding of the model's sums does. Raises RuntimeError before `sync`; ValueError for an empty prompt, for one
        that leaves too few positions and for a model without a key-value cache; FloatingPointError for logits that are
        not finite.
        """
        begun = begun or [[()] * len(row) for row in seeds]
        self._check(prompts, seeds, sampling, begun)
        places: dict[Prompt, list[Place]] = {}
        for i, prompt in enumerate(prompts):
            for j in range(len(seeds[i])):
                places.setdefault((*prompt, *begun[i][j]), []).append((i, j))
        done: dict[Place, Completion] = {}
        with torch.no_grad(), _evaluating(self.model):
            for chunk in self._chunks(places):
                done.update(self._sample(chunk, seeds, sampling, begun))
        return [[done[i, j] for j in range(len(row))] for i, row in enumerate(seeds)]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def _check(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        begun: Sequence[Sequence[Sequence[int]]],
    ) -> None:
        if self.model is None:
            raise RuntimeError("the generator has no model: call sync(model) first")
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} lists of seeds: give each prompt its own list")
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for i, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(f"prompt {i} has no tokens: give it at least one, such as a beginning-of-text token")
            length = len(prompt) + max(map(len, begun[i]), default=0)
            if limit is not None and length + sampling.max_new_tokens > limit:
                raise ValueError(
                    f"prompt {i} has {length} tokens and sampling.max_new_tokens is {sampling.max_new_tokens}, "
                    f"but the model has {limit} positions: shorten max_new_tokens or filter the prompt"
                )

    def _chunks(self, places: dict[Prompt, list[Place]]) -> Iterator[Chunk]:
        """Prompts, shortest first, at most `max_rows` completions together; of one length if the cache needs that."""
        alike = not _growing(self.model)
        chunk: Chunk = []
        for prompt in sorted(places, key=len):
            for start in range(0, len(places[prompt]), self.max_rows):
                part = places[prompt][start : start + self.max_rows]
                full = sum(len(other) for _, other in chunk) + len(part) > self.max_rows
                if chunk and (full or (alike and len(chunk[0][0]) < len(prompt))):
                    yield chunk
                    chunk = []
                chunk.append((prompt, part))
        if chunk:
            yield chunk

    def _sample(
        self,
        chunk: Chunk,
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        begun: Sequence[Sequence[Sequence[int]]],
    ) -> Iterator[tuple[Place, Completion]]:
        """The completions of a chunk, sampled together."""
        places = [place for _, part in chunk for place in part]
        prompts = [(prompt, len(part)) for prompt, part in chunk]
        rows = Rows(self.model, prompts, self.pad, self.share, sampling.max_new_tokens - 1)
        live = torch.arange(len(places), device=rows.logits.device)  # the row in each slot of the batch
        before = [begun[i][j] for i, j in places]
        noise = uniforms([seeds[i][j] for i, j in places], sampling.max_new_tokens, [*map(len, before)]).to(live.device)
        eos = torch.tensor(self.eos, dtype=torch.int64, device=live.device)
        tails = Tails(self.decode, sampling.stop, before)
        steps = []
        with rows.attention():
            for t in range(sampling.max_new_tokens):
                token, logp, log_kept = draw(rows.logits, noise[t, live], sampling)
                done = torch.isin(token, eos)
                if sampling.stop:
                    done |= tails.stopped(live.tolist(), token.tolist()).to(done.device)
                steps.append((live, token, logp, log_kept, done))
                remaining = len(done) - int(done.sum())
                if remaining == 0 or t + 1 == sampling.max_new_tokens:
                    break
                if remaining < len(done):
                    slots = _close_gaps(done, remaining)
                    live, token = live[slots], token[slots]
                    rows.keep(slots)
                rows.step(token)

        live, *columns = (torch.cat(column).cpu() for column in zip(*steps, strict=True))
        if not columns[1].isfinite().all():
            raise FloatingPointError("log-probabilities are not finite: the model has diverged or its logits overflow")
        order, lengths = live.argsort(stable=True), live.bincount().tolist()
        for place, *parts in zip(places, *(column[order].split(lengths) for column in columns), strict=True):
            tokens, logps, log_kept, done = (part.clone() for part in parts)  # or each would keep all rows in memory
            text = self.decode(tokens.tolist())
            yield place, Completion(tokens, logps, log_kept, text, "stop" if done[-1] else "length")


class Tails:
    """The last tokens of each row, to see when they complete a stop string."""

    def __init__(self, decode: Callable[[list[int]], str], stop: list[str], begun: Sequence[Sequence[int]]) -> None:
        self.decode, self.stop = decode, stop
        # A token that shows adds at least a byte; the last few are for a character that the tail's start cuts.
        length = max((len(string.encode()) for string in stop), default=0) + 4
        self.tails: list[deque[int]] = [deque(tokens, maxlen=length) for tokens in begun]

    def stopped(self, rows: list[int], tokens: list[int]) -> Tensor:
        """Append a token to each of these rows. (R,) bool: whether it completed a stop string."""
        for row, token in zip(rows, tokens, strict=True):
            self.tails[row].append(token)
        texts = (self.decode(list(self.tails[row])) for row in rows)
        return torch.tensor([any(string in text for string in self.stop) for text in texts])


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
        growing = _growing(model)
        outs = [self._prefill(batch, pad, growing) for batch in _similar([prompt for prompt, _ in prompts])]
        caches: list[Any] = [getattr(out, self.cache_name, None) for out in outs]
        if caches[0] is None:
            raise ValueError(f"{type(model).__name__} keeps no key-value cache: the native generator needs one")
        logits = torch.cat([out.logits[:, -1] for out in outs])  # (P, V)

        lengths, samples = torch.tensor([(len(prompt), count) for prompt, count in prompts]).T.to(logits.device)
        owner = torch.arange(len(prompts), device=logits.device).repeat_interleave(samples)  # (R,): the row's prompt
        self.logits, self.position = logits[owner], lengths[owner, None]  # (R, V) and (R, 1): of the next token
        if not growing:
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

    def _prefill(self, batch: list[Prompt], pad: int, growing: bool) -> Any:
        """The model's output for these prompts, shortest first, filled up at the left."""
        device, width = next(self.model.parameters()).device, len(batch[-1])
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in batch], device=device)
        position = torch.tensor([range(len(prompt) - width, len(prompt)) for prompt in batch], device=device)
        mask = None if len(batch[0]) == width else position >= 0
        own = growing and self.cache_name  # else a model makes what it needs
        past = {self.cache_name: DynamicCache()} if own else {}
        return self._forward(ids, position.clamp(min=0), mask, past)

    def _decode(self, ids: Tensor, position: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        """Ids (R, 1) to the logits (R, V) of the next token."""
        return self._forward(ids, position, mask, {self.cache_name: cache}).logits[:, -1]  # type: ignore[no-any-return]

    def _forward(self, ids: Tensor, position: Tensor, mask: Tensor | None, past: dict[str, Any]) -> Any:
        return self.model(
            input_ids=ids, position_ids=position, attention_mask=mask, use_cache=True, logits_to_keep=1, **past
        )


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
            raise NotImplementedError(f"{type(module).__name__} does not read its cache as it is: set share=False")
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


def _kinds(model: Any) -> set[type]:
    """Of the layers' caches."""
    return {type(layer) for layer in DynamicCache(config=model.config.get_text_config()).layers}


def _growing(model: Any) -> bool:
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


def _similar(prompts: list[Prompt]) -> Iterator[list[Prompt]]:
    """Prompts, shortest first, in batches of similar length."""
    start = 0
    for end in range(1, len(prompts) + 1):
        if end == len(prompts) or len(prompts[start]) < PADDING * len(prompts[end]):
            yield prompts[start:end]
            start = end


def _join(parts: Sequence[DynamicLayer], width: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer from several batches, filled up at the left: (P, heads, width, dim) each."""

    def join(tensors: list[Any]) -> Tensor:
        return torch.cat([F.pad(x, (0, 0, width - x.shape[2], 0)) for x in tensors])

    return join([part.keys for part in parts]), join([part.values for part in parts])


def _close_gaps(done: Tensor, remaining: int) -> Tensor:
    """Slots (remaining,) of the rows that are not done, the last ones in the places of those that are."""
    slots = torch.arange(remaining, device=done.device)
    slots[done[:remaining]] = remaining + (~done[remaining:]).nonzero().squeeze(1)
    return slots


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each submodule's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
