"""InfLLM-v2's block-sparse attention as an `attn_implementation` of transformers, for training and for generation.

    sparse_attention.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="infllm_v2")
    model.config.sparse_config = {"topk": 64, "window_size": 2048, "dense_len": 8192}  # MiniCPM4's names and defaults

No weights are added. Up to `Settings.covered` keys all are seen, and transformers' SDPA computes; from there on each query sees
its blocks of its sequence: rows filled up on either side, several sequences in a row told apart by position ids, chunks and
single tokens after a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lit_rl import ops
from lit_rl.checks import ConfigurationError
from lit_rl.kernels.infllm import Sequences, Settings
from lit_rl.kernels.infllm_torch import pool

NAME = "infllm_v2"
NAMES = [field.name for field in fields(Settings)]
watchers: list[Callable[..., None]] = []
"""Called after each sparse attention with module, query, key, value, blocks, sequences, settings and scale."""


def register() -> None:
    """Makes the name known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda **arguments: Plan(arguments))


def settings_of(config: Any) -> Settings:
    """From a config's `sparse_config`; the defaults without one."""
    return _settings(tuple(sorted((getattr(config, "sparse_config", None) or {}).items())))


@lru_cache
def _settings(items: tuple[tuple[str, Any], ...]) -> Settings:
    given = dict(items)
    if given.pop("use_nope", False):
        raise ConfigurationError(
            "sparse_config.use_nope is True: scores of keys without positions are not supported, set it to False"
        )
    if unknown := set(given) - set(NAMES):
        raise ConfigurationError(f"sparse_config has {sorted(unknown)}: it may have {NAMES} and use_nope")
    return Settings(**given)


def covered(model: Any) -> float:
    """How many positions the model's attention sees whole, if others exist; infinity for other attention."""
    config = model.config.get_text_config()
    return settings_of(config).covered if config._attn_implementation == NAME else math.inf


def check(model: Any) -> None:
    """Raises ConfigurationError for a model whose attention this is no replacement of."""
    name, config = type(model).__name__, model.config.get_text_config()
    settings_of(config)
    if not (model._supports_attention_backend and model._can_set_attn_implementation()):
        raise ConfigurationError(
            f"{name} does not take its attention from transformers' AttentionInterface: {NAME} cannot replace it"
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds != {"full_attention"} or window:
        raise ConfigurationError(
            f"{name} has layers of {sorted(kinds)} and a window of {window}: {NAME} replaces full attention only"
        )


def install(model: Any) -> None:
    """Lets a model attend this way from now on; raises ValueError as `check`."""
    register()
    check(model)
    model.set_attn_implementation(NAME)


def follow(copy: Any, model: Any) -> None:
    """Lets the copy of a model attend this way if the model does by now."""
    mine, theirs = copy.config.get_text_config(), model.config.get_text_config()
    if theirs._attn_implementation == NAME:
        mine.sparse_config = getattr(theirs, "sparse_config", None)
        install(copy)


class Plan:
    """What the layers of one forward share in place of a mask: which keys belong together, and the blocks that each chose."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments  # of transformers' mask functions
        self.queries, self.keys = arguments["q_length"], arguments["kv_length"]
        if self.keys != arguments["q_offset"] + self.queries:
            raise ValueError(f"{NAME} takes a cache that grows, such as DynamicCache, not one of a fixed size")
        self.chosen: dict[int, Tensor] = {}
        self._dense: list[Any] = []
        self._sequences: Sequences | None = None

    def dense(self) -> Any:
        """The mask for SDPA."""
        if not self._dense:
            from transformers.masking_utils import sdpa_mask

            self._dense = [sdpa_mask(**self.arguments)]
        return self._dense[0]

    def sequences(self, device: torch.device) -> Sequences:
        if self._sequences is None:
            padding = self.arguments.get("attention_mask")
            seqs = self._packed(device) if padding is None else self._padded(padding)
            self._sequences = Sequences(*(x[seqs.q_length > 0] for x in seqs))
        return self._sequences

    def _padded(self, there: Tensor) -> Sequences:
        """From a mask (R, S) of tokens that are not padding."""
        column = torch.arange(there.shape[1], device=there.device)
        length, start = there.sum(1), there.int().argmax(1)
        if bool((there != ((column >= start[:, None]) & (column < (start + length)[:, None]))).any()):
            raise ValueError(f"{NAME} takes padding at the ends of a row, not between tokens")
        before = self.keys - self.queries
        first = start.clamp(min=before)
        rows = torch.arange(len(there), device=there.device)
        return Sequences(rows, first - before, (start + length - first).clamp(min=0), start, length)

    def _packed(self, device: torch.device) -> Sequences:
        """From the mask function, which knows several sequences in a row by their position ids."""
        rows = torch.arange(int(self.arguments["batch_size"]), device=device)[:, None]
        at = torch.arange(self.keys, device=device)[None]
        seen = self.arguments["mask_function"]
        zero = torch.zeros_like(at)

        def sees(query: Tensor, key: Tensor) -> Tensor:
            return torch.as_tensor(seen(rows, zero, query, key)).expand(len(rows), self.keys)

        new = (
            (at == 0) | ~sees(at, (at - 1).clamp(min=0))
            if self.queries == self.keys
            else (at == 0).expand(len(rows), -1)
        )
        start = torch.where(new, at, 0).cummax(1).values
        if not bool(sees(at, start).all()) or bool(
            (sees(at, (at + 1).clamp(max=self.keys - 1)) & (at + 1 < self.keys)).any()
        ):
            raise ValueError(
                f"{NAME} takes causal attention to all of a sequence, not a sliding window or another mask"
            )
        row, first = new.nonzero(as_tuple=True)
        end = torch.cat([first[1:], first.new_tensor([self.keys])])
        end = torch.where(end == 0, self.keys, end)
        before = self.keys - self.queries
        return Sequences(row, (first - before).clamp(min=0), (end - first).clamp(max=self.queries), first, end - first)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Plan | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention (R, T, H, E) of query (R, H, T, D) to key (R, K, S, D) and value (R, K, S, E), as transformers calls it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    settings = settings_of(module.config)
    for name in ("softcap", "sliding_window", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} asks for {name}, which {NAME} does not have: use another attention"
            )
    plan = attention_mask if isinstance(attention_mask, Plan) else None
    if key.shape[2] <= settings.covered or (plan is None and _short(kwargs.get("position_ids"), settings)):
        mask: Any = plan.dense() if plan else attention_mask
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    if plan is None:
        raise ValueError(
            f"{NAME} takes no mask of four dimensions beyond {settings.covered} keys, and there are {key.shape[2]}: give rows"
            " with a mask of two dimensions, or several sequences in a row with position ids"
        )
    if dropout:
        raise ValueError(f"{NAME} has no dropout: set attention_dropout of the config from {dropout} to 0")
    device, kept = query.device.type, getattr(key, "pooled", None)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    with torch.autocast(device, enabled=False):
        out = _attend(module, query, key, value, plan, settings, scale, kept)
    return out.transpose(1, 2).contiguous(), None


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    settings: Settings,
    scale: float,
    kept: dict[str, Tensor] | None,
) -> Tensor:
    seqs = plan.sequences(query.device)
    if torch._C._current_graph_task_id() != -1 and id(module) in plan.chosen:
        blocks = plan.chosen[
            id(module)
        ]  # a checkpointed layer is computed again: ties and rounding must not choose anew
    else:
        pooled = None if kept is None else _pooled(kept, key, seqs, settings)
        blocks = ops.select_blocks(query, key, seqs, settings, scale, pooled)
        if module.training:
            plan.chosen[id(module)] = blocks
    out = ops.block_attention(query, key, value, blocks, seqs, settings, scale)
    for watcher in watchers:
        watcher(module, query, key, value, blocks, seqs, settings, scale)
    return out


def _short(positions: Tensor | None, settings: Settings) -> bool:
    return positions is not None and int(positions.max()) < settings.covered


def _pooled(kept: dict[str, Tensor], key: Tensor, seqs: Sequences, settings: Settings) -> tuple[Tensor, Tensor] | None:
    """The pooled keys of a cache, with those that have become complete since. kept: what its layer keeps for us, by row."""
    if len(seqs.row) != len(key):
        return None
    result = []
    for coarse in (False, True):
        size, stride = settings.kernels(coarse)
        had = kept.get(f"count_{coarse}", torch.zeros_like(seqs.row))
        new = pool(key, seqs, size, stride, had)  # (R, K, new, D)
        known = kept.get(f"keys_{coarse}", new[:, :, :0])
        at = had[:, None] + torch.arange(new.shape[2], device=key.device)
        if new.shape[2]:
            grown = known.new_zeros(*known.shape[:2], max(known.shape[2], int(at.max()) + 1), known.shape[3])
            grown[:, :, : known.shape[2]] = known
            grown[seqs.row[:, None], :, at] = new.transpose(1, 2)
            known = grown
        kept[f"keys_{coarse}"] = known
        kept[f"count_{coarse}"] = ((seqs.k_length - size).div(stride, rounding_mode="floor") + 1).clamp(min=0)
        result.append(known)
    return result[0], result[1]
