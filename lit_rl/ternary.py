"""Ternary layers: linear layers that train or compute with weights of -1, 0 and 1 times a scale for each group.

A layer in training stays the layer that it was, with its parameters and their names: only its class changes, and with it the
forward. So optimizers, checkpoints, strategies and callbacks know nothing of it. `TernaryQAT` in callbacks is what trains.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_rl import ops
from lit_rl.checks import ConfigurationError, require
from lit_rl.kernels.ternary import dequantize, pack, quantize, unpack

PACKED, FORMAT, VERSION = "ternary.safetensors", "lit-rl ternary", "1"
"""The file of a packed folder, and what its metadata say."""


class _StraightThrough(torch.autograd.Function):
    """The ternary weight, whose gradient is taken for that of the weight itself (Bengio et al. 2013, arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, group: int) -> Tensor:
        return ops.round_ternary(weight, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class TernaryLinear(nn.Linear):
    """A linear layer whose forward rounds its weight; made of an nn.Linear by `convert`. Its state dict is nn.Linear's.

    With gradient each forward rounds anew. Without, as in sampling, the rounded weight is kept while the weight stays the
    same, and until the next forward with gradient: it is the same numbers.
    """

    group_size: int
    _kept: tuple[tuple[int, int], Tensor] | None

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.rounded(), self.bias)

    def rounded(self) -> Tensor:
        """The ternary weight (out, in) in the weight's type."""
        if torch.is_grad_enabled() and self.weight.requires_grad:
            self._kept = None
            return _StraightThrough.apply(self.weight, self.group_size)  # type: ignore[no-any-return]
        key = (0 if self.weight.is_inference() else self.weight._version, self.weight.data_ptr())
        if self._kept is None or self._kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # made in either mode, it serves in both
                self._kept = key, ops.round_ternary(self.own_weight(), self.group_size)
        return self._kept[1]

    def forget(self) -> None:
        """The weight may change in ways that leave no trace on it, as a shard's does: keep nothing beyond this."""
        self._kept = None

    def own_weight(self) -> Tensor:
        """The weight, or the rows in this rank's shard of it: a group never leaves its row."""
        weight: Any = self.weight
        return weight.to_local() if hasattr(weight, "to_local") else weight  # type: ignore[no-any-return]

    def codes_and_scales(self) -> tuple[Tensor, Tensor]:
        return quantize(self.own_weight(), self.group_size)


class PackedLinear(nn.Module):
    """A linear layer for inference whose weight is packed: codes (out, in / 4) uint8 and scales (out, in / group) bfloat16."""

    codes: Tensor
    scales: Tensor

    def __init__(self, in_features: int, out_features: int, group_size: int, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        self.register_buffer("codes", torch.zeros(out_features, -(-in_features // 4), dtype=torch.uint8))
        self.register_buffer("scales", torch.ones(out_features, in_features // group_size, dtype=torch.bfloat16))
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "packed weights are not trained: train from the checkpoint, or from the folder that is exported without packed"
            )
        out = ops.ternary_linear(x.reshape(-1, self.in_features), self.codes, self.scales)
        return (out if self.bias is None else out + self.bias).view(*x.shape[:-1], self.out_features)

    def codes_and_scales(self) -> tuple[Tensor, Tensor]:
        return unpack(self.codes, self.in_features), self.scales

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, group_size={self.group_size}, bias={self.bias is not None}"


def layers(module: nn.Module) -> dict[str, Any]:
    """Its ternary layers by name, packed ones and those in training."""
    return {name: m for name, m in module.named_modules() if isinstance(m, TernaryLinear | PackedLinear)}


def groups(module: nn.Module) -> dict[str, int]:
    """The group size of each ternary layer."""
    return {name: layer.group_size for name, layer in layers(module).items()}


def choose(module: nn.Module, names: list[str] | None, group_size: int) -> dict[str, int]:
    """The linear layers that can become ternary, and a group size for each: those that end with one of these names, or all
    but the heads of language models. Only those that train; a group size of -1 is a whole row.

    Raises:
        ConfigurationError: adapters, no such layers, a name that is not there, or a group size that does not divide.
    """
    kind = type(module).__name__
    if any(".lora_" in name for name, _ in module.named_parameters()):
        raise ConfigurationError(
            f"TernaryQAT trains weights, and in {kind} they are frozen under adapters: leave lora out, or export the"
            " adapters first (which merges them) and give the folder as model"
        )
    if any(isinstance(layer, PackedLinear) for layer in module.modules()):
        raise ConfigurationError(
            f"{kind} has packed weights, which are not trained: give the folder that is exported in full"
        )
    heads = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}  # tied ones
    for m in module.modules():
        head_of: Any = getattr(m, "get_output_embeddings", lambda: None)
        if (head := head_of()) is not None:
            heads |= {id(p) for p in head.parameters()}
    found = {
        name: m
        for name, m in module.named_modules()
        if type(m) in (nn.Linear, TernaryLinear) and m.weight.requires_grad and id(m.weight) not in heads
    }
    if not found:
        raise ConfigurationError(
            f"TernaryQAT found no torch.nn.Linear layers that train in {kind}, beside heads of language models, which stay as"
            " they are: layers of other classes, such as GPT-2's Conv1D, cannot be ternary"
        )
    known = sorted({name.rpartition(".")[2] for name in found})
    for wanted in names or ():
        if not any(f".{name}".endswith(f".{wanted}") for name in found):
            close = get_close_matches(wanted, known, n=1)
            hint = f": did you mean {close[0]!r}?" if close else "."
            raise ConfigurationError(
                f"TernaryQAT.modules names {wanted!r}, which {kind} does not have{hint} Its linear layers that train, beside"
                f" heads, are {', '.join(known)}."
            )
    if names is not None:
        found = {name: m for name, m in found.items() if any(f".{name}".endswith(f".{wanted}") for wanted in names)}
    for name, layer in found.items():
        if layer.in_features % group_size:
            best = gcd(*(m.in_features for m in found.values()))
            limit = f"a divisor of the {layer.in_features} inputs of {name}: those of {best} divide all layers; -1 is a group a row"
            require(False, "TernaryQAT.group_size", group_size, limit)
    return {name: group_size if group_size > 0 else layer.in_features for name, layer in found.items()}


@torch.no_grad()
def convert(module: nn.Module, chosen: dict[str, int]) -> None:
    """Makes these linear layers ternary, in place, each with its group size. Those that are ternary already stay."""
    for name, group in chosen.items():
        layer: Any = module.get_submodule(name)
        if isinstance(layer, TernaryLinear):
            if layer.group_size != group:
                raise ConfigurationError(
                    f"{name} is ternary with a group size of {layer.group_size}, not of {group}: give TernaryQAT the group_size"
                    " of the checkpoint"
                )
            continue
        kind = type(layer)
        if kind is not nn.Linear:
            raise ConfigurationError(f"{name} is to be ternary: it must be a torch.nn.Linear, not a {kind.__name__}")
        _unround(layer.weight, group)
        layer.__class__, layer.group_size, layer._kept = TernaryLinear, group, None


def _unround(weight: Tensor, group: int) -> None:
    """The mean magnitude of a weight that is ternary already, as one that was exported, is less than its scale: enlarged by
    the share of its zeros, in place, it is rounded to itself; in half precision up to the rounding of its scale. Other weights
    stay."""
    if hasattr(weight, "to_local"):
        weight = weight.to_local()
    parts = weight.unflatten(1, (-1, group))
    magnitude = parts.abs()
    if bool(((magnitude == 0) | (magnitude == magnitude.amax(-1, keepdim=True))).all()):
        parts /= (magnitude != 0).to(weight.dtype).mean(-1, keepdim=True).clamp(min=1 / group)


def refuse_without_callback(rounded: dict[str, int], callbacks: Sequence[Any]) -> None:
    """Raises ConfigurationError when training continues with ternary layers but without the callback that watches them."""
    if not any(getattr(callback, "trains_ternary", False) for callback in callbacks):
        sizes = ", ".join(map(str, sorted(set(rounded.values()))))
        raise ConfigurationError(
            f"the checkpoint has {len(rounded)} ternary layers (group size {sizes}), and this run has no TernaryQAT: add the"
            " callback with the checkpoint's settings; or export the checkpoint, and give the folder as model"
        )


def dense_state(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """This state dict of the model, with the rounded weight of each ternary layer under the name of a linear layer's."""
    found = layers(model)
    inner = {f"{name}.{part}" for name in found for part in ("codes", "scales")}
    parts = {name: layer.codes_and_scales() for name, layer in found.items()}
    rounded = {f"{name}.weight": dequantize(codes, scales, model.dtype) for name, (codes, scales) in parts.items()}
    return {name: tensor for name, tensor in state.items() if name not in inner} | rounded


def save(model: Any, folder: Path) -> None:
    """Writes config.json and the packed file: codes and scales of the ternary layers, and all other weights as they are.

    Raises ValueError when no layer is ternary.
    """
    from safetensors.torch import save_file

    found = layers(model)
    if not found:
        raise ValueError(
            "packed is for models with ternary layers, and this one has none: train it with the callback TernaryQAT"
        )
    weights = {n: t.detach().contiguous() for n, t in model.state_dict().items()}
    first: dict[Any, str] = {}
    tied = {n: kept for n, t in weights.items() if (kept := first.setdefault((t.data_ptr(), t.shape), n)) != n}
    weights = {n: t for n, t in weights.items() if n not in tied and n.removesuffix(".weight") not in found}
    for name, layer in found.items():
        codes, weights[f"{name}.scales"] = layer.codes_and_scales()
        weights[f"{name}.codes"] = pack(codes)
    about = {"format": FORMAT, "version": VERSION, "tied": json.dumps(tied), "groups": json.dumps(groups(model))}
    save_file(weights, folder / PACKED, about)
    model.config.save_pretrained(folder)


def load(folder: Path, dtype: Any, **options: Any) -> Any:
    """The model of a packed folder, for inference: its ternary layers are `PackedLinear`.

    Raises ValueError for a file of another format or version, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    file = folder / PACKED
    try:
        with safe_open(file, "pt") as content:
            about = content.metadata() or {}
            require(about.get("format") == FORMAT, f"the format of {file}", about.get("format"), repr(FORMAT))
            limit = (
                f"{VERSION}, which this release reads: export the checkpoint again, or use the release that wrote it"
            )
            require(about.get("version") == VERSION, f"the version of {file}", about.get("version"), limit)
            weights = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype if dtype == "auto" else dtype, **options)
    for name, group in json.loads(about["groups"]).items():
        layer: Any = model.get_submodule(name)
        model.set_submodule(name, PackedLinear(layer.in_features, layer.out_features, group, layer.bias))
    tied = {name: weights[kept] for name, kept in json.loads(about["tied"]).items()}
    model.load_state_dict(weights | tied)
    if (folder / "generation_config.json").is_file():  # which may know more ends of a text than the config
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()
