"""From a checkpoint of training to a folder that anybody can load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lit_rl import adapters, models, sharding
from lit_rl.adapters import LoRA
from lit_rl.resume import whole


def export_checkpoint(
    checkpoint: str | Path,
    folder: str | Path,
    overwrite: bool = False,
    base: str | None = None,
    packed: bool = False,
) -> None:
    """Writes a Hugging Face folder from a Lightning checkpoint of any policy, and from nothing else; of several policies a
    folder NAME inside `folder` each. With `packed` ternary layers stay in 2 bits, see `models.export`.

    But for the frozen weights under adapters: they come from where the policy had them, or from `base`.
    """
    path = Path(checkpoint)
    file = path / "meta.pt" if path.is_dir() else path  # a folder holds shards of the weights, and the rest there
    if not file.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if not whole(path):
        raise ValueError(f"{path} is damaged: cut short, or not a checkpoint")
    content = torch.load(file, map_location="cpu", weights_only=True)
    if "lit_rl" not in content:
        raise ValueError(f"{path} is not the checkpoint of a lit-rl policy: it has no entry 'lit_rl'")
    members = content["lit_rl"].get("members")
    for i, (name, saved) in enumerate({"": content["lit_rl"]}.items() if members is None else members.items()):
        prefix = "model." if members is None else f"members.{i}.model."
        with torch.random.fork_rng(devices=[]):
            model, tokenizer = _load(path, content.get("state_dict", {}), prefix, saved, base)
        models.export(model, tokenizer, Path(folder, name), overwrite=overwrite, packed=packed)


def _load(path: Path, state: dict[str, Any], prefix: str, saved: dict[str, Any], base: str | None) -> tuple[Any, Any]:
    """The model whose weights have names with this prefix, and its tokenizer."""
    about = saved.get("adapters")
    if about is None:
        model, tokenizer = models.from_checkpoint_state(saved["model"])
    else:
        model, tokenizer = _base_of(path, saved["model"], about, base)
    weights = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    if path.is_dir():
        sharding.load_shards(weights, path)
    else:
        weights = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    model.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in weights.items()}, strict=about is None)
    return model, tokenizer


def _base_of(path: Path, state: dict[str, Any], about: dict[str, Any], base: str | None) -> tuple[Any, Any]:
    """The frozen model under a checkpoint's adapters, with new adapters of their shape, and the tokenizer."""
    if about["rng"] is not None and base is None:
        torch.set_rng_state(about["rng"])  # "tiny" is made as it was then
    elif not (base := base or about["base"]):
        raise ValueError(f"{path} holds adapters of a model that has no name: say where it is (base, --base)")
    model, tokenizer = models.from_checkpoint_state(state, base, about["dtype"])
    model, mine = adapters.adapt(model, LoRA(**about["lora"]), base or models.TINY)
    adapters.check(mine, about)
    return model, tokenizer
