"""The native engine: sampling with the trained model's own forward, in transformers' terms and without its waste.

A prompt is computed once for all its samples, keys and values are written in place, and a finished row leaves the batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lit_rl.generation.base import Completion, Sampling
from lit_rl.generation.sampling import draw, uniforms

GROWTH = 128  # columns a full cache grows by: copying it then costs a step about 1/128 of reading it
PADDING = 0.75  # prompts computed in one forward are at least this fraction of the longest among them

Group = tuple[tuple[int, ...], list[tuple[int, int]]]  # a prompt and the places of its completions in the answer


class NativeGenerator:
    """Samples from a Hugging Face causal language model in this process, on the model's device.

    eos: ids that end a completion; pad: the id that fills shorter prompts; decode: ids to text, special ones left out;
    max_rows: completions sampled at a time (a prompt with more samples is computed once for every `max_rows` of them).
    """

    def __init__(self, eos: Sequence[int], pad: int, decode: Callable[[list[int]], str], max_rows: int = 256) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}: it must be at least 1")
        self.eos, self.pad, self.decode, self.max_rows = list(eos), pad, decode, max_rows
        self.model: Any = None

    def sync(self, model: nn.Module) -> None:
        """Sample from this model from now on. Nothing is copied: its weights may change between calls of `generate`."""
        self.model = model

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Completion]]:
        """For each prompt (token ids) as many completions as it has seeds.

        A completion depends on the weights, its prompt and its seed; on what it is batched with only by the rounding of
        the model's sums. Raises ValueError for an empty prompt, one that leaves too few positions, or logits that are
        not finite; RuntimeError before `sync`.
        """
        groups = self._groups(prompts, seeds, sampling)
        answer: dict[tuple[int, int], Completion] = {}
        with torch.no_grad(), _evaluating(self.model):
            for chunk in self._chunks(groups, alike=not _growing(self.model)):
                places = [place for _, group in chunk for place in group]
                chunk_seeds = [seeds[i][j] for i, j in places]
                rows = Rows(self.model, [prompt for prompt, _ in chunk], [len(group) for _, group in chunk], self.pad)
                answer |= zip(places, self._sample(rows, chunk_seeds, sampling), strict=True)
        return [[answer[i, j] for j in range(len(row))] for i, row in enumerate(seeds)]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def _groups(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[Group]:
        """Distinct prompts with the places of their completions, shortest first."""
        if self.model is None:
            raise RuntimeError("the generator has no model: call sync(model) first")
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} lists of seeds: give one list for each prompt")
        config = self.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for i, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(f"prompt {i} has no tokens: give it at least one, such as a beginning-of-text token")
            if limit is not None and len(prompt) + sampling.max_new_tokens > limit:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens, sampling.max_new_tokens is {sampling.max_new_tokens} and the "
                    f"model has {limit} positions: shorten max_new_tokens to {max(0, limit - len(prompt))}, or leave "
                    f"out prompts of more than {max(0, limit - sampling.max_new_tokens)} tokens"
                )
            if len(seeds[i]):
                groups.setdefault(tuple(prompt), []).extend((i, j) for j in range(len(seeds[i])))
        return sorted(groups.items(), key=lambda group: len(group[0]))

    def _chunks(self, groups: list[Group], alike: bool) -> Iterator[list[Group]]:
        """Groups of at most `max_rows` rows together, of one prompt length if `alike`."""
        chunk: list[Group] = []
        for prompt, places in groups:
            for start in range(0, len(places), self.max_rows):
                part = places[start : start + self.max_rows]
                full = sum(len(group) for _, group in chunk) + len(part) > self.max_rows
                if chunk and (full or (alike and len(chunk[0][0]) < len(prompt))):
                    yield chunk
                    chunk = []
                chunk.append((prompt, part))
        if chunk:
            yield chunk

    def _sample(self, rows: Rows, seeds: list[int], sampling: Sampling) -> Iterator[Completion]:
        """The completions of these rows, in order."""
        live = torch.arange(len(seeds), device=rows.logits.device)  # (R,): the row that each slot of the batch holds
        noise = uniforms(seeds, sampling.max_new_tokens).to(live.device)
        eos = torch.tensor(self.eos, dtype=torch.int64, device=live.device)
        tails = Tails(self.decode, sampling.stop, len(seeds))
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
        order, lengths = live.argsort(stable=True), live.bincount().tolist()
        if not columns[1].isfinite().all():
            raise ValueError("the model's logits are not finite: look for a diverged or overflowing model")
        for parts in zip(*(column[order].split(lengths) for column in columns), strict=True):
            tokens, logps, log_kept, done = (part.clone() for part in parts)
            text = self.decode(tokens.tolist())
            yield Completion(tokens, logps, log_kept, text, "stop" if done[-1] else "length")


class Tails:
    """The last tokens of each row, and whether they complete a stop string."""

    def __init__(self, decode: Callable[[list[int]], str], stop: list[str], rows: int) -> None:
        self.decode, self.stop = decode, stop
        # A token that shows adds a byte or more; the rest is for a character cut at the tail's start.
        length = max((len(string.encode()) for string in stop), default=0) + 4
        self.tails: list[deque[int]] = [deque(maxlen=length) for _ in range(rows)]

    def stopped(self, rows: list[int], tokens: list[int]) -> Tensor:
        """Append one token to each of these rows; (R,) bool, whether it completed a stop string."""
        for row, token in zip(rows, tokens, strict=True):
            self.tails[row].append(token)
        texts = (self.decode(list(self.tails[row])) for row in rows)
        return torch.tensor([any(string in text for string in self.stop) for text in texts])


class Rows:
    """The rows being sampled: `logits` (R, V) of their next token after the prompts, then after each `step`.

    What attention needs of the past is kept in one of three ways, whichever is the first that the model allows:
    shared: each prompt once, read by an attention of our own, and the new tokens in a growing cache (float32 only,
    whose scores a plain matrix product does not round);
    expanded: each row's prompt and new tokens in a growing cache, for the model's own attention;
    dynamic: transformers' own cache, for prompts of one length (state-space and hybrid models, chunked attention).
    """

    def __init__(self, model: Any, prompts: list[tuple[int, ...]], samples: list[int], pad: int) -> None:
        self.model, self.mask, self.shared = model, None, None
        device = next(model.parameters()).device
        growing = _growing(model)
        logits, caches = [], []
        for batch in _similar(prompts):
            lengths = torch.tensor([len(prompt) for prompt in batch], device=device)
            width = len(batch[-1])
            ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in batch], device=device)
            position = torch.arange(width, device=device) - (width - lengths)[:, None]
            out = self._forward(
                ids,
                position.clamp(min=0),
                None if lengths.min() == width else position >= 0,
                {"past_key_values": DynamicCache()} if growing else {},
            )
            name = next((n for n in ("past_key_values", "cache_params") if getattr(out, n, None) is not None), None)
            if name is None:
                raise ValueError(f"{type(model).__name__} keeps no key-value cache, so this generator cannot use it")
            logits.append(out.logits[:, -1])
            caches.append(getattr(out, name))

        owner = torch.arange(len(prompts)).repeat_interleave(torch.tensor(samples)).to(device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.logits = torch.cat(logits)[owner]
        self.position = lengths[owner, None]  # (R, 1): of the next token
        if not growing:
            self.cache = {name: caches[0]}
            caches[0].reorder_cache(owner)
            return
        self.cache = {name: Cache(layer_class_to_replicate=GrowingLayer)}
        width = len(prompts[-1])
        mask = torch.arange(width, device=device) >= width - lengths[:, None]
        layers = [_join(layer, width) for layer in zip(*(cache.layers for cache in caches), strict=True)]
        if _shareable(model) and all(x.dtype == torch.float32 for x in layers[0]):
            self.shared = SharedPrompts(layers, mask, owner)
            return
        self.mask = None if mask.all() else mask[owner]
        for i, (keys, values) in enumerate(layers):
            self.cache[name].update(keys[owner], values[owner], i)

    def step(self, tokens: Tensor) -> None:
        """Append one token to each row, tokens (R,)."""
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, 1), value=True)
        extra = {} if self.shared is None else {"prompts": self.shared}
        self.logits = self._forward(tokens[:, None], self.position, self.mask, self.cache | extra).logits[:, -1]
        self.position = self.position + 1

    def keep(self, slots: Tensor) -> None:
        """Row i becomes row slots[i]; the others are gone."""
        for cache in self.cache.values():
            cache.reorder_cache(slots)
        self.position = self.position[slots]
        if self.mask is not None:
            self.mask = self.mask[slots]
        if self.shared is not None:
            self.shared.arrange(self.shared.owner[slots])

    @contextmanager
    def attention(self) -> Iterator[None]:
        """The attention that `step` needs."""
        before = self.model.config._attn_implementation
        try:
            if self.shared is not None:
                self.model.set_attn_implementation("lit_rl")
            yield
        finally:
            if self.shared is not None:
                self.model.set_attn_implementation(before)

    def _forward(self, ids: Tensor, position: Tensor, mask: Tensor | None, past: dict[str, Any]) -> Any:
        return self.model(
            input_ids=ids, position_ids=position, attention_mask=mask, use_cache=True, logits_to_keep=1, **past
        )


class GrowingLayer(DynamicLayer):
    """One layer's keys and values (rows, heads, length, dim): views of larger buffers, so that a step copies one column."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        new = (key_states, value_states)
        if start == 0 or end > self.buffers[0].shape[-2]:
            buffers = [x.new_empty(*x.shape[:2], end + GROWTH, x.shape[3]) for x in new]
            for buffer, old in zip(buffers, (self.keys, self.values) if start else (), strict=False):
                buffer[:, :, :start] = old
            self.buffers, self.is_initialized = buffers, True
        for buffer, x in zip(self.buffers, new, strict=True):
            buffer[: len(x), :, start:end] = x
        self.keys, self.values = (buffer[: len(key_states), :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row beam_idx[i]. Only rows that move are copied; there may be fewer afterwards, not more."""
        if self.get_seq_length() == 0:
            return
        moved = (beam_idx != torch.arange(len(beam_idx), device=beam_idx.device)).nonzero().squeeze(1)
        for x in (self.keys, self.values):
            x[moved] = x[beam_idx[moved]]
        self.keys, self.values = self.keys[: len(beam_idx)], self.values[: len(beam_idx)]


class SharedPrompts:
    """Keys and values of P prompts, one copy for all rows that continue a prompt.

    layers: keys and values (P, K heads, L, dim) of each layer, prompts at the right; mask (P, L): False is padding;
    owner (R,): the prompt of each row.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]], mask: Tensor, owner: Tensor) -> None:
        self.layers = layers
        self.bias = torch.zeros(mask.shape, device=mask.device)
        self.bias = self.bias.masked_fill(~mask, torch.finfo(torch.float32).min)[:, None, None]  # (P, 1, 1, L)
        self.arrange(owner)

    def arrange(self, owner: Tensor) -> None:
        """The rows are now those of these prompts; prompts without rows are dropped."""
        prompts, self.owner = owner.unique(return_inverse=True)
        if len(prompts) < len(self.bias):
            self.layers = [(keys[prompts], values[prompts]) for keys, values in self.layers]
            self.bias = self.bias[prompts]
        self.rank = (self.owner[:, None] == self.owner).tril(-1).sum(1)  # (R,): place among its prompt's rows
        self.samples = int(self.rank.max()) + 1

    def scatter(self, x: Tensor) -> Tensor:
        """(R, K, g, d) by rows to (P, K, samples * g, d) by prompts."""
        out = x.new_zeros(len(self.bias), x.shape[1], self.samples, *x.shape[2:])
        out[self.owner, :, self.rank] = x
        return out.flatten(2, 3)

    def gather(self, x: Tensor) -> Tensor:
        """The inverse of scatter."""
        return x.unflatten(2, (self.samples, -1))[self.owner, :, self.rank]


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prompts: SharedPrompts,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token a row, query (R, H, 1, dim), to its prompt and to its own key, value (R, K, n, dim).

    The queries of a prompt's rows meet its keys in one matrix product. Returns (R, 1, H, dim).
    """
    far, far_value = prompts.layers[module.layer_idx]
    bias = prompts.bias
    if sliding_window is not None:
        first = max(0, far.shape[2] + key.shape[2] - sliding_window)
        far, far_value, bias = far[:, :, first:], far_value[:, :, first:], bias[..., first:]
        key, value = key[:, :, -sliding_window:], value[:, :, -sliding_window:]
    rows, heads, _, dim = query.shape
    query = query.reshape(rows, key.shape[1], -1, dim) * (dim**-0.5 if scaling is None else scaling)  # (R, K, g, dim)
    scores = prompts.gather(prompts.scatter(query) @ far.transpose(2, 3) + bias)  # (R, K, g, L)
    weights = torch.cat([scores, query @ key.transpose(2, 3)], -1).softmax(-1)
    far_weights, weights = weights.split([far.shape[2], key.shape[2]], -1)
    out = prompts.gather(prompts.scatter(far_weights) @ far_value) + weights @ value
    return out.reshape(rows, 1, heads, -1), None


AttentionInterface.register("lit_rl", _attend)


def _growing(model: Any) -> bool:
    """Whether every layer attends to all past tokens or to the last few, so that a cache of all of them serves it."""
    config = model.config.get_text_config()
    plain = all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in DynamicCache(config=config).layers)
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    return plain and not chunked and getattr(config, "attention_chunk_size", None) is None


def _shareable(model: Any) -> bool:
    """Whether the model's attention can be replaced and is plain: no bias, cap or sink that `_attend` lacks."""
    return (
        getattr(model, "_supports_sdpa", False)
        and getattr(model, "is_backend_compatible", bool)()
        and model._can_set_attn_implementation()
    )


def _similar(prompts: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Prompts, shortest first, in batches of similar length."""
    start = 0
    for end in range(1, len(prompts) + 1):
        if end == len(prompts) or len(prompts[start]) < PADDING * len(prompts[end]):
            yield prompts[start:end]
            start = end


def _join(layers: Sequence[DynamicLayer], width: int) -> tuple[Tensor, Tensor]:
    """One layer's keys and values of several batches, padded at the left to `width`: (P, heads, width, dim) each."""
    keys, values = ([getattr(layer, name) for layer in layers] for name in ("keys", "values"))
    join = lambda parts: torch.cat([F.pad(x, (0, 0, width - x.shape[2], 0)) for x in parts])  # noqa: E731
    return join(keys), join(values)


def _close_gaps(done: Tensor, remaining: int) -> Tensor:
    """Slots (remaining,) of the rows not done: the last ones in the places of those that are done."""
    slots = torch.arange(remaining, device=done.device)
    slots[done[:remaining]] = remaining + (~done[remaining:]).nonzero().squeeze(1)
    return slots


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and every submodule's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
