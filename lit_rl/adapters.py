"""LoRA and QLoRA: a frozen language model that learns through low-rank adapters.

peft's layers take the places of linear layers inside the model, which stays the class that it was. So sampling, the
training forward and every callback see an ordinary model; only loading, checkpoints and export know of adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from hashlib import blake2b
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_rl import ternary
from lit_rl.checks import ConfigurationError, require

ADAPTER = "default"
"""peft's name for a model's first adapter."""


@dataclass
class LoRA:
    """Each adapted weight is W + alpha / rank * B A, with W frozen and B zero at first (Hu et al. 2021, arXiv 2106.09685).

    Every linear layer and alpha 32 as in Schulman et al. 2025, "LoRA without regret", who find that it wants about ten
    times the learning rate of full fine-tuning.
    """

    rank: int = 16
    """Rows of A, columns of B."""
    alpha: float = 32.0
    """The product B A is scaled by alpha / rank."""
    target_modules: list[str] | None = None
    """Names of the linear layers that are adapted, such as q_proj; None is all but the head."""
    quantize: Literal["nf4"] | None = None
    """Keep the frozen linear layers in 4 bits, their scales in 8 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314)."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, "lora.rank", self.rank, "at least 1")
        require(self.alpha > 0, "lora.alpha", self.alpha, "above 0")
        require(self.target_modules != [], "lora.target_modules", [], "None (all linear layers) or name at least one")
        require(self.quantize in (None, "nf4"), "lora.quantize", self.quantize, "None or nf4")


def adapt(model: Any, lora: LoRA | None, name: str, rng: Tensor | None = None) -> tuple[Any, dict[str, Any] | None]:
    """Puts adapters into a model, in place, and freezes everything else. Returns the model and what a checkpoint says of
    its adapters; None when it has none. A PeftModel is taken apart: its inner model has the adapters already.

    Args:
        model: A Hugging Face model, or a PeftModel of one.
        lora: None leaves the model as it is.
        name: Where its weights came from, as `models.load` takes it; "" when nobody knows.
        rng: torch's random state before the model was made from it ("tiny"); with it the weights can be made again.

    Raises:
        ValueError: a package is missing, a target is not there, or a PeftModel is of a kind that this cannot rebuild.
    """
    wrapped = inner(model) is not model
    if wrapped:
        require(lora is None, "lora", lora, "None with a PeftModel, which has adapters already")
        model, lora = inner(model), _settings(model)
    if lora is None:
        return model, None
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"lora: {name or 'the model'} is quantised already: give its float weights, and lora.quantize")
    for package, needed in (("peft", True), ("bitsandbytes", lora.quantize is not None)):
        if needed and find_spec(package) is None:
            raise ValueError(f"{lora} needs the package {package}: pip install {package}")
    if not wrapped:
        lora = replace(lora, target_modules=sorted(_targets(model, lora)))
    about: dict[str, Any] = {"lora": asdict(lora), "base": name, "dtype": str(model.dtype).removeprefix("torch.")}
    about |= {"fingerprint": fingerprint(model), "rng": rng}
    if not wrapped:
        if lora.quantize:
            _quantize(model)
        from peft import inject_adapter_in_model

        inject_adapter_in_model(_config(lora), model)
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # bitsandbytes would repack it to sample, and then drop gradients
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_adapter(parameter_name))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # whatever the base is in
    return model, about


def _targets(model: Any, lora: LoRA) -> list[str]:
    names = list(_linear(model))
    known = sorted({name.rpartition(".")[2] for name in names})
    if not known:
        raise ValueError(f"lora: {type(model).__name__} has no linear layers beside its head, hence none to adapt")
    for target in lora.target_modules or ():
        if not any(f".{name}".endswith(f".{target}") for name in names):
            close = get_close_matches(target, known, n=1)
            raise ValueError(
                f"lora.target_modules names {target!r}, which {type(model).__name__} does not have"
                + (f": did you mean {close[0]!r}?" if close else ".")
                + f" Its linear layers are {', '.join(known)}."
            )
    return lora.target_modules or known


def _linear(model: Any) -> dict[str, nn.Module]:
    """The linear layers by name, without the head."""
    from transformers.pytorch_utils import Conv1D

    head, kinds = model.get_output_embeddings(), (nn.Linear, Conv1D)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds) and m is not head}


def _config(lora: LoRA) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.target_modules, task_type="CAUSAL_LM")  # type: ignore[arg-type]


def inner(model: Any) -> Any:
    """The Hugging Face model inside a PeftModel; any other model is its own."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _settings(wrapped: Any) -> LoRA:
    """Of a PeftModel's adapters, if these are all that there is to know of them."""
    config = wrapped.peft_config.get(ADAPTER)
    if str(getattr(config, "peft_type", "")).rpartition(".")[2] != "LORA" or len(wrapped.peft_config) > 1:
        raise ValueError(
            "a PeftModel must have one LoRA adapter, named 'default': merge what it has (merge_and_unload)"
        )
    lora = LoRA(config.r, config.lora_alpha, sorted(config.target_modules))
    mine, theirs = _config(lora).to_dict(), config.to_dict()
    free = {
        "target_modules",
        "task_type",
        "base_model_name_or_path",
        "inference_mode",
        "lora_dropout",
        "fan_in_fan_out",
    }
    free |= {"init_lora_weights", "peft_version", "auto_mapping", "revision"}
    if other := [key for key in theirs if key not in free and theirs[key] != mine.get(key)]:
        raise ValueError(
            f"a PeftModel with another {', '.join(other)} than the default is not supported: merge it first"
        )
    return lora


def _quantize(model: Any) -> None:
    """Linear layers to 4 bits, in place. On a CPU about two seconds for a hundred million weights."""
    import bitsandbytes as bnb

    layers = {name: layer for name, layer in _linear(model).items() if isinstance(layer, nn.Linear)}
    if not layers:
        raise ValueError(f"lora.quantize: {type(model).__name__} has no torch.nn.Linear layers beside its head")
    for name, layer in layers.items():
        packed = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4", device="meta")
        weight: Any = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=packed)
        packed.weight = weight.to(layer.weight.device)  # this is what quantises
        packed.bias = layer.bias
        model.set_submodule(name, packed)
    model.is_loaded_in_4bit = True  # peft's adapters go by it


def fingerprint(model: nn.Module) -> str:
    """A hash of the weights that are not adapters: names, shapes, and some hundred numbers of each, so it takes no time."""
    digest = blake2b(digest_size=16)
    for name, weight in sorted((_plain(n), p) for n, p in model.named_parameters() if not _is_adapter(n)):
        few = weight.detach().flatten()[:: max(1, weight.numel() // 256)]
        digest.update(f"{name} {tuple(weight.shape)}".encode() + few.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def check(mine: dict[str, Any] | None, theirs: dict[str, Any] | None) -> None:
    """Raises ConfigurationError unless the adapters of a checkpoint belong to those of this policy."""
    if mine is not None and theirs is None:
        raise ConfigurationError(
            "the checkpoint holds no adapters, and this policy has some: `lit-rl export` it, and give the folder as model"
        )
    if theirs is not None and mine is None:
        raise ConfigurationError(
            f"the checkpoint holds adapters alone: give this policy the same lora, {theirs['lora']}"
        )
    if mine is None or theirs is None:
        return
    if mine["lora"] != theirs["lora"]:
        raise ConfigurationError(
            f"the checkpoint's adapters are {theirs['lora']}, and this policy's are {mine['lora']}"
        )
    if mine["fingerprint"] != theirs["fingerprint"]:
        raise ConfigurationError(
            f"the checkpoint's adapters belong to other frozen weights ({theirs['base'] or 'of a module'}) than these"
            f" ({mine['base'] or 'of a module'}): load those (dtype {theirs['dtype']}). 'tiny' follows torch's seed."
        )


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def _plain(name: str) -> str:
    """A parameter's name as it was before its layer was adapted."""
    return name.replace(".base_layer.", ".")


def only_adapters(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A state dict without the frozen weights of the model whose names begin with `prefix`."""
    return {name: value for name, value in state.items() if not name.startswith(prefix) or _is_adapter(name)}


def layers(model: Any) -> dict[str, Any]:
    """The adapted layers by name; none in a model without adapters."""
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def at_start(model: Any) -> bool:
    """Whether the model has adapters that do nothing yet, so that without them it is the same."""
    found = layers(model)
    return bool(found) and not any(layer.lora_B[ADAPTER].weight.any() for layer in found.values())


@contextmanager
def disabled(model: Any) -> Iterator[None]:
    """Within, the model is its frozen self."""
    found = layers(model).values()
    for layer in found:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in found:
            layer.enable_adapters(True)


def merged_state(model: Any) -> dict[str, Tensor] | None:
    """As `plain_state`; None when the model has neither adapters nor ternary layers: its own state dict is that."""
    return plain_state(model) if layers(model) or ternary.layers(model) else None


@torch.no_grad()
def plain_state(model: Any) -> dict[str, Tensor]:
    """The state dict of a plain model that computes the same: adapters added to their weights, 4 bits back to floats,
    ternary weights as they are rounded.

    Tied weights stand under each of their names. What needs no change is the model's own tensor. A sharded model that is
    gathered stays so, which asking for its own state dict would end.
    """
    unsaved = {f"{n}.{name}".lstrip(".") for n, m in model.named_modules() for name in m._non_persistent_buffers_set}
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    state = {_plain(name): t.detach() for name, t in tensors if name not in unsaved and not _is_adapter(name)}
    adapted = layers(model)
    for name, module in model.named_modules():
        packed = None if name in adapted else getattr(getattr(module, "weight", None), "quant_state", None)
        if packed is not None:
            from bitsandbytes.functional import dequantize_4bit

            state[_plain(f"{name}.weight")] = dequantize_4bit(module.weight, packed)
    for name, layer in adapted.items():
        weight = state[f"{name}.weight"]
        state[f"{name}.weight"] = (weight.float() + layer.get_delta_weight(ADAPTER).float()).to(weight.dtype)
    return ternary.dense_state(model, state)


def save(model: Any, folder: Path) -> None:
    """Writes the adapters as a folder that `PeftModel.from_pretrained(base, folder)` reads; nothing when there are none."""
    if not layers(model):
        return
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir()
    weights = get_peft_model_state_dict(model)
    save_file(
        {f"base_model.model.{k}": v.contiguous() for k, v in weights.items()}, folder / "adapter_model.safetensors"
    )
    config = copy(model.peft_config[ADAPTER])
    config.base_model_name_or_path, config.inference_mode = model.name_or_path, True
    config.save_pretrained(str(folder))
