"""Between text and token ids: the tokenizer's special tokens, prompts and known responses."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lit_rl.task import Message


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
    return _eos_token_ids(tokenizer, generation_config(model))


def generation_config(model: PreTrainedModel) -> Any:
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
