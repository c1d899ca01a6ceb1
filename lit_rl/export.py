"""From a model, or a checkpoint of its training, to a folder that anybody can load; and what a checkpoint tells of its model."""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_rl import adapters, encoding, models, sharding, ternary
from lit_rl.adapters import LoRA
from lit_rl.resume import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    overwrite: bool = False,
    packed: bool = False,
) -> Path:
    """Save a folder that transformers and vLLM load: safetensors, config, tokenizer, and what ends a completion.

    A model with adapters is saved with them merged into its weights, and they alone in the folder "adapter" inside it.
    One with ternary layers is saved with their rounded weights; `packed` keeps those in 2 bits and 16 a group, in a folder
    that `load` reads, for inference.
    The folder appears whole or not at all: it is written beside its place under another name, then renamed.

    Raises:
        ValueError: the place is taken. `overwrite=True` replaces the folder whole, if it is one that holds a model.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.is_file():
        raise ValueError(f"cannot export to '{folder}': it is a file")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise ValueError(f"cannot export to '{folder}': it is not empty (`overwrite` replaces it)")
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"cannot export to '{folder}': it holds something that is not a model, so it is not replaced"
            )
    eos, pad, generation = (
        encoding.eos_token_ids(model, tokenizer),
        tokenizer.pad_token_id,
        encoding.generation_config(model),
    )
    settings = json.loads(generation.to_json_string())
    settings.pop("_from_model_config", None)
    settings |= {"eos_token_id": eos if len(eos) > 1 else eos[0]} if eos else {}
    settings |= {"pad_token_id": pad} if pad is not None else {}
    new, old = (folder.with_name(f".{folder.name}.{what}-{uuid.uuid4().hex[:8]}") for what in ("new", "old"))
    try:
        new.mkdir(parents=True)
        model.generation_config = type(generation)()  # transformers refuses to save some that it loads, so we do
        if packed:
            ternary.save(model, new)
        else:
            model.save_pretrained(new, state_dict=adapters.merged_state(model))
            adapters.save(model, new / "adapter")
        (new / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        tokenizer.save_pretrained(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        model.generation_config = generation
        if old.exists() and not folder.exists():
            old.rename(folder)
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return folder


def describe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All of a model but its weights, in plain types that `torch.load(weights_only=True)` reads.

    With it a checkpoint can be exported alone: config and generation config, architecture, the tokenizer's files.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in Path(folder).rglob("*") if f.is_file()}
    return {
        "architecture": sharding.plain_class(model).__name__,
        "config": json.loads(model.config.to_json_string(use_diff=False)) | {"dtype": str(model.dtype).split(".")[-1]},
        "generation_config": json.loads(encoding.generation_config(model).to_json_string()),
        "tokenizer": files,
        "ternary": ternary.groups(model),
    }


def from_description(
    state: dict[str, Any], base: str | None = None, dtype: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, with random weights and in eval mode, and the tokenizer that `describe` described.

    With `base`, a name that `load` takes, the model has the weights that are there.

    Raises:
        ValueError: transformers builds another class from the config, as it does for code of the model's own.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    with tempfile.TemporaryDirectory() as folder:
        for name, content in {**state["tokenizer"], "config.json": json.dumps(state["config"]).encode()}.items():
            file = Path(folder, name)
            if ".." in file.parts or Path(folder) not in file.parents:
                raise ValueError(f"the checkpoint's tokenizer has a file outside its folder: '{name}'")
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    config.name_or_path = tokenizer.name_or_path = state["config"].get("_name_or_path", "")
    options = {"dtype": dtype or state["config"]["dtype"]}
    model = models.load_model(base, options) if base else AutoModelForCausalLM.from_config(config, **options).eval()
    if type(model).__name__ != state["architecture"]:
        raise ValueError(
            f"the checkpoint holds a {state['architecture']}, but its config builds a {type(model).__name__}: "
            "load the original with lit_rl.models.load and put the checkpoint's weights into it"
        )
    model.generation_config = GenerationConfig.from_dict(state["generation_config"])
    ternary.convert(model, state.get("ternary", {}))
    return model, tokenizer


def export_checkpoint(
    checkpoint: str | Path,
    folder: str | Path,
    overwrite: bool = False,
    base: str | None = None,
    packed: bool = False,
) -> None:
    """Writes a Hugging Face folder from nothing but a Lightning checkpoint of any policy; for several policies, a folder
    NAME inside `folder` for each. With `packed` ternary layers stay in 2 bits, see `export_model`.

    But for the frozen weights under adapters: they come from where the policy had them, or from `base`.
    """
    path = Path(checkpoint)
    file = path / "meta.pt" if path.is_dir() else path  # a folder holds shards of the weights, and the rest there
    if not file.is_file():
        last = path / "checkpoints" / "last.ckpt"
        raise FileNotFoundError(f"there is no checkpoint {path}" + (f": did you mean {last}?" if last.exists() else ""))
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
        export_model(model, tokenizer, Path(folder, name), overwrite=overwrite, packed=packed)


def _load(path: Path, state: dict[str, Any], prefix: str, saved: dict[str, Any], base: str | None) -> tuple[Any, Any]:
    """The model whose weights have names with this prefix, and its tokenizer."""
    about = saved.get("adapters")
    if about is None:
        model, tokenizer = from_description(saved["model"])
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
    model, tokenizer = from_description(state, base, about["dtype"])
    model, mine = adapters.adapt(model, LoRA(**about["lora"]), base or models.TINY)
    adapters.check(mine, about)
    return model, tokenizer
