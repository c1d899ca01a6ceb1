"""The training forward against a plain Hugging Face forward, numbers and gradients."""

import pytest
import torch
import transformers as t

from lit_rl.experience import build
from lit_rl.forward import Forward, masked_layout, packed_layout, rows_layout

SIZES = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
CONFIGS = {
    "llama": lambda: t.LlamaConfig(**SIZES),
    "llama-tied": lambda: t.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: t.Qwen2Config(**SIZES),
    "qwen3": lambda: t.Qwen3Config(**SIZES, head_dim=8),
    "mistral-window": lambda: t.MistralConfig(**SIZES, sliding_window=6),
    "gpt2": lambda: t.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gemma2-softcap": lambda: t.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.3, sliding_window=64),
    "gemma2-high-cap": lambda: t.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=300.0, sliding_window=64),
    "cohere-scale": lambda: t.CohereConfig(**SIZES, logit_scale=0.3),
    "granite-division": lambda: t.GraniteConfig(**SIZES, logits_scaling=3.0),  # as MiniCPM divides its hidden states
    "phi-bias": lambda: t.PhiConfig(**SIZES),
}


WINDOWS = ("mistral-window", "gemma2-softcap", "gemma2-high-cap")


def model_of(kind):
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(CONFIGS[kind]())
    for name, p in model.named_parameters():  # initial values are too small to tell models apart
        torch.nn.init.normal_(p, std=0.3) if p.dim() > 1 or name == "lm_head.bias" else None
    return model.eval()


def experience():
    g = torch.Generator().manual_seed(1)

    def ids(n):
        return torch.randint(60, (n,), generator=g).tolist()

    a, b = ids(11), ids(5)
    return build([a, a, a, b, b, ids(7)], [ids(4), ids(1), ids(9), ids(6), ids(2), ids(3)], [0, 0, 0, 1, 1, 2], [])


def naive(model, x, temperature=1.0):
    """Row by row, by transformers' own logits."""
    logps, entropy = torch.zeros(x.tokens.shape), torch.zeros(x.tokens.shape)
    for i, (start, end) in enumerate(zip(x.starts.tolist(), x.lengths.tolist(), strict=True)):
        out = (model(x.tokens[i : i + 1, :end]).logits[0].float() / temperature).log_softmax(-1)
        for p in range(start, end):
            logps[i, p] = out[p - 1, x.tokens[i, p]]
            entropy[i, p] = -(out[p - 1].exp() * out[p - 1]).sum()
    return logps, entropy


LAYOUTS = [packed_layout, masked_layout, rows_layout]


def use(layout, monkeypatch):
    """No other layout than this, where a model takes it."""
    takes = Forward._takes
    monkeypatch.setattr(Forward, "_takes", lambda self, way, *args: way is layout and takes(self, way, *args))
    monkeypatch.setattr(Forward, "_worth_masking", lambda self, x: True)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_a_plain_forward(name, layout, monkeypatch):
    use(layout, monkeypatch)
    model, x = model_of(name), experience()
    forward = Forward(model)
    for temperature in (1.0, 0.7):
        weights = torch.randn(2, *x.tokens.shape, generator=torch.Generator().manual_seed(2))
        results = []
        for function in (lambda: naive(model, x, temperature), lambda: forward(x, temperature)):  # noqa: B023
            model.zero_grad()
            logps, entropy = function()
            (logps * weights[0] + entropy * weights[1])[x.mask].sum().backward()
            results.append(
                (
                    logps.detach(),
                    entropy.detach(),
                    torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]),
                )
            )
        for got, want in zip(results[1], results[0], strict=True):
            assert (got - want).norm() / want.norm() < 2e-5
    assert forward._layout is (rows_layout if name in WINDOWS else layout)


def test_what_each_model_gets():
    notes = {name: (forward := Forward(model_of(name)))(experience()) and forward for name in CONFIGS}
    for name in ("llama", "llama-tied", "qwen2", "qwen3", "gpt2"):
        assert notes[name]._fused
        assert notes[name]._layout is packed_layout
    assert "sliding window of 6" in notes["mistral-window"].notes[0]
    for name in ("gemma2-softcap", "gemma2-high-cap", "cohere-scale", "granite-division", "phi-bias"):
        assert not notes[name]._fused
        assert "computed in full" in notes[name].notes[0]


PARTIAL = {
    "chunks": t.Llama4TextConfig(**SIZES, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=16),
    "convolutions": t.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_what_a_few_tokens_of_a_new_model_do_not_show(name):
    """Rows are longer than a chunk, and the model is used for the first time before its weights are large."""
    torch.manual_seed(0)
    model, x = t.AutoModelForCausalLM.from_config(PARTIAL[name]).eval(), experience()
    forward = Forward(model)
    forward(x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10 if p.dim() > 1 else 1)
    assert (forward(x)[0] - naive(model, x)[0]).abs().max() < 1e-4
    assert "not all its layers attend to all tokens" in forward.notes[-1]


def test_a_mask_that_does_not_hide_is_not_taken_for_rounding():
    """Eager attention adds a mask, and one of booleans hides nothing; in half precision that is a small difference."""
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(t.LlamaConfig(**SIZES), attn_implementation="eager").bfloat16()
    forward, x = Forward(model.eval()), experience()
    forward(x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10 if p.dim() > 1 else 1)
    assert (forward(x)[0] - naive(model, x)[0])[x.mask].abs().mean() < 0.05
    assert forward._layout is rows_layout


def test_a_scale_of_logits_that_are_small_as_yet():
    """In half precision, where the numbers of a new model hardly differ."""
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(t.CohereConfig(**SIZES, tie_word_embeddings=False)).bfloat16().eval()
    forward = Forward(model)
    forward(x := experience())
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    assert (forward(x)[0] - naive(model, x)[0])[x.mask].abs().mean() < 0.05


def test_a_cap_under_another_name():
    config = t.RecurrentGemmaConfig(**SIZES, block_types=["recurrent", "attention"], logits_soft_cap=300.0)
    forward = Forward(t.AutoModelForCausalLM.from_config(config).eval())
    forward(experience())
    assert not forward._fused


def test_hidden_states_wider_than_the_head():
    """Mamba's last norm is in float32 whatever its head is in."""
    config = t.MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, state_size=4)
    torch.manual_seed(0)
    model, x = t.AutoModelForCausalLM.from_config(config).bfloat16().eval(), experience()
    assert (Forward(model)(x)[0] - naive(model, x)[0])[x.mask].abs().mean() < 0.05


def test_truncation_is_taken_off():
    model, x = model_of("llama"), experience()
    plain, _ = Forward(model)(x)
    x.log_kept = torch.where(x.mask, -0.5, 0.0)
    assert torch.allclose(Forward(model)(x)[0], plain + 0.5 * x.mask)


def test_a_group_costs_its_prompt_once():
    x = build([list(range(20))] * 4, [[1, 2, 3]] * 4, [0] * 4, [])
    assert packed_layout(x).inputs.numel() == 20 + 4 * 2, "the last token of a response predicts nothing"
    assert rows_layout(x).inputs.numel() == 4 * 22


def test_masked_tokens_have_no_gradient():
    model, x = model_of("llama"), experience()
    x.mask[0] = False
    logps, _ = Forward(model)(x)
    assert logps[0].abs().sum() == 0
    logps.sum().backward()
