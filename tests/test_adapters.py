"""LoRA, QLoRA, 8-bit AdamW and gradient checkpointing against peft, bitsandbytes and plain models."""

import copy
from pathlib import Path

import lightning.pytorch as L
import peft
import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from lightning.pytorch.callbacks import ModelCheckpoint
from test_callbacks import Log, Stranger
from test_cli import fit, run
from test_forward import CONFIGS, LAYOUTS, experience, model_of, naive, use
from test_policy import Letters, policy, trainer
from test_resume import judge

from lit_rl import GRPO, RLCallback, Sampling, adapters, encoding, jsonl
from lit_rl.adapters import LoRA
from lit_rl.callbacks import Completions, EntropyMonitor, RolloutStats
from lit_rl.cli import METHODS
from lit_rl.experience import build
from lit_rl.export import export_checkpoint, export_model
from lit_rl.forward import Forward

KINDS = {"lora": LoRA(rank=4), "qlora": LoRA(rank=4, quantize="nf4")}


@pytest.fixture(params=KINDS)
def lora(request):
    return KINDS[request.param]


def stir(model, std=0.1):
    """Adapters that do something, as after training."""
    numbers = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(p, std=std, generator=numbers)
    return model


def parts(model):
    """Its adapters and everything else, both as one vector."""
    found = [
        [p.detach().float().flatten() for n, p in model.named_parameters() if (".lora_" in n) == wanted]
        for wanted in (True, False)
    ]
    return tuple(torch.cat(part) for part in found)


def logits(model, ids=None):
    ids = torch.arange(3, 40).view(1, -1) if ids is None else ids
    with torch.no_grad():
        return model.eval()(ids).logits


# ------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_the_adapters_alone(method):
    module = METHODS[method]("tiny", lora=KINDS["lora"], lr=1e-3, sampling=Sampling(max_new_tokens=6))
    before = [parts(one.model) for one in module.policies]
    loop = trainer(max_steps=2, callbacks=[EntropyMonitor(), RolloutStats(), Completions()])
    loop.fit(module, Letters(score=judge))
    held = {id(p) for group in loop.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for one in module.policies for n, p in one.model.named_parameters() if ".lora_" in n}
    for one, (adapter, frozen) in zip(module.policies, before, strict=True):
        moved, still = parts(one.model)
        assert torch.equal(frozen, still)
        assert not torch.equal(adapter, moved)
        assert one.token_terms.notes == [], "no slow path"
        entropy = loop.callback_metrics[f"{one.name}/entropy".strip("/")]
        assert entropy > 0
        assert entropy.isfinite()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "gpt2"])
def test_log_probabilities_are_those_of_peft(name, layout, monkeypatch):
    use(layout, monkeypatch)
    model, x = model_of(name), experience()
    theirs, (mine, about) = copy.deepcopy(model), adapters.adapt(model, LoRA(rank=3, alpha=5), "")
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=about["lora"]["target_modules"])
    theirs = peft.get_peft_model(theirs, settings)
    assert type(mine) is type(model)
    for (_, p), (_, q) in zip(stir(mine, 0.5).named_parameters(), theirs.named_parameters(), strict=True):
        q.data.copy_(p.data)
    forward = Forward(mine)
    got, want = forward(x)[0], naive(theirs, x)[0]
    assert forward._fused
    assert forward._layout is layout
    assert (got - want).abs().max() < 1e-4 < (want - naive(model_of(name), x)[0]).abs().max()
    for logps in (got, want):
        logps[x.mask].sum().backward()
    for (_, p), (_, q) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-4 * q.grad.abs().max())


def test_an_adapted_head_is_not_taken_for_its_frozen_weight():
    settings = peft.LoraConfig(r=2, target_modules=["lm_head"])
    model = peft.get_peft_model(model_of("llama"), settings).get_base_model()
    forward, x = Forward(model), experience()
    forward(x)  # looks for the fast way while the adapter does nothing yet
    stir(model, 1.0)
    assert (forward(x)[0] - naive(model, x)[0]).abs().max() < 1e-4
    assert "computed in full" in forward.notes[0]


def test_on_policy_the_ratio_is_one(lora):
    class Watch(RLCallback):
        worst = 0.0

        def on_loss(self, trainer, module, x, terms):
            self.worst = max(self.worst, float(terms.log_ratio.abs().max()))

    module, watch = policy(lora=lora, old_logps="sampler", sampling=Sampling(max_new_tokens=12)), Watch()
    stir(module.model)
    trainer(callbacks=[watch], max_steps=2).fit(module, Letters())
    assert 0 < watch.worst < 1e-5


def test_the_reference_is_the_frozen_model_and_no_copy(lora):
    seen = []

    class Watch(RLCallback):
        def on_advantage(self, trainer, module, x):
            seen.append((x, x.ref_logps, module.logps_of(copied, x), module.logps_of(module.token_terms, x)))

    module = policy(GRPO, lora=lora)
    copied = Forward(copy.deepcopy(module.model).requires_grad_(False))
    assert module.reference is None
    trainer(max_steps=3, callbacks=[Watch()]).fit(module, Letters())
    for _, got, want, _ in seen:
        assert torch.equal(got, want)
    x, got, _, now = seen[-1]
    assert (got - now)[x.mask].abs().max() > 1e-3, "the policy has moved, and the reference has not"


def test_the_gradient_is_the_same_after_sampling(lora):
    """bitsandbytes repacks 4-bit weights for sampling on some CPUs, and such layers pass no gradient on."""
    module, x, gradients = policy(lora=lora), experience(), []
    for _ in range(2):
        module.zero_grad()
        module.token_terms(x)[0].sum().backward()
        gradients.append({n: p.grad for n, p in module.model.named_parameters() if p.grad is not None})
        module.generator.sync(module.model)
        module.generator.generate([[5, 6, 7]], [[1, 2]], Sampling(max_new_tokens=4))
    first, second = gradients
    assert first.keys() == {n for n, _ in module.model.named_parameters() if ".lora_" in n}
    assert all(g.any() for n, g in first.items() if "lora_B" in n)
    assert all(torch.equal(g, second[n]) for n, g in first.items())


def test_qlora_computes_with_the_weights_that_bitsandbytes_rounds_to():
    plain, packed = policy(), policy(lora=KINDS["qlora"])
    for name, layer in plain.model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            layer.weight.data = dequantize_4bit(
                *quantize_4bit(layer.weight.data, quant_type="nf4", compress_statistics=True)
            )
    assert torch.allclose(logits(plain.model), logits(packed.model), atol=1e-5)
    assert not torch.allclose(logits(policy().model), logits(packed.model), atol=1e-2)
    size = sum(
        p.numel() * p.element_size() for n, p in packed.model.named_parameters() if "layers" in n and "lora" not in n
    )
    assert size < 0.15 * sum(p.numel() * p.element_size() for n, p in plain.model.named_parameters() if "layers" in n)


# --------------------------------------------------------------------------------- gradient checkpointing, 8-bit AdamW


def peak(function):
    """The most bytes that are allocated at a time, beyond what was before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    live = top = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            top = max(top, live)
    return top


@pytest.mark.parametrize("lora", [None, *KINDS.values()], ids=["full", *KINDS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_checkpointing_gives_the_same_gradient_in_less_memory(lora, layout, monkeypatch):
    use(layout, monkeypatch)
    x = build([list(range(50))] * 4, [list(range(3, 43))] * 4, [0] * 4, [])
    gradients, peaks = [], []
    for on in (False, True):
        module = policy(lora=lora, gradient_checkpointing=on)
        stir(module.model)

        def step(module=module):
            module.zero_grad()
            module.token_terms(x)[0].sum().backward()

        step()
        peaks.append(peak(step))
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)
    assert peaks[1] < 0.6 * peaks[0]


def test_gradient_checkpointing_is_off_while_sampling(monkeypatch):
    calls = []
    run = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", lambda *a, **k: calls.append(1) or run(*a, **k))
    module = policy(gradient_checkpointing=True, lora=KINDS["lora"])
    module.generator.sync(module.model)
    module.generator.generate([[5, 6, 7]], [[1, 2]], Sampling(max_new_tokens=4))
    assert not calls
    module.token_terms(experience())[0].sum().backward()
    assert calls


def test_adamw_in_8_bits_from_the_command_line_resumes_exactly(capsys):
    optimizer = ("--optimizer", "bitsandbytes.optim.AdamW8bit", "--optimizer.lr", 1e-3)
    every = ("--trainer.callbacks.every_n_train_steps", 1, "--trainer.limit_val_batches", 0)
    args = ("--config", "rloo", "--config", "lora", "--config", "tiny", *optimizer, *every)
    fit(capsys, *args, "--trainer.max_steps", 4, "--run", "straight")
    fit(capsys, *args, "--trainer.max_steps", 2, "--run", "stopped")
    fit(capsys, *args, "--trainer.max_steps", 4, "--run", "stopped", "--ckpt_path", "last")
    a, b = (torch.load(f"{r}/checkpoints/last.ckpt", weights_only=True) for r in ("straight", "stopped"))
    assert all(torch.equal(v, b["state_dict"][k]) for k, v in a["state_dict"].items())
    states = a["optimizer_states"][0]["state"].values()
    assert len(states) == sum(k.startswith("model.") for k in a["state_dict"]), "one for each trained weight"
    kinds = {s["__bnb_optimizer_quant_state__"]["state1"].dtype for s in states}
    assert kinds == {torch.float32, torch.uint8}, "small tensors stay in 32 bits"


# ------------------------------------------------------------------------------------------- checkpoints and export


def test_checkpoints_hold_adapters_alone_and_resume_exactly(lora):
    def run(**kwargs):
        module = policy(GRPO, lora=lora)
        saver = ModelCheckpoint("saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer(max_steps=4, callbacks=[saver], enable_checkpointing=True).fit(module, Letters(), **kwargs)
        return parts(module.model)

    straight, frozen = run()
    resumed, same = run(ckpt_path="saved/step=2.ckpt")
    assert torch.equal(straight, resumed)
    assert torch.equal(frozen, same)
    saved = torch.load("saved/step=2.ckpt", weights_only=True)
    assert all(".lora_" in name for name in saved["state_dict"])
    assert sum(v.numel() for v in saved["state_dict"].values()) == len(straight)
    assert Path("saved/step=2.ckpt").stat().st_size < 4 * 4 * len(straight), "adapters, twice in AdamW, and little else"


def test_export_merges_and_keeps_the_adapters(lora):
    module = policy(lora=lora)
    base, tokenizer = copy.deepcopy(module.model), module.tokenizer
    loop = trainer(max_steps=1)
    loop.fit(module, Letters())
    loop.save_checkpoint("x.ckpt")
    stir(module.model)
    want = logits(module.model)
    with adapters.disabled(module.model):
        frozen = logits(module.model)
    assert torch.equal(frozen, logits(base))
    assert (want - frozen).abs().max() > 0.1

    module.export("out")
    merged = transformers.AutoModelForCausalLM.from_pretrained("out")
    assert type(merged) is transformers.LlamaForCausalLM
    assert "quantization_config" not in merged.config.to_dict()
    assert torch.allclose(logits(merged), want, atol=1e-4)

    layer = module.model.model.layers[1].mlp.down_proj
    weight = layer.base_layer.weight
    weight = dequantize_4bit(weight, weight.quant_state) if lora.quantize else weight
    delta = layer.lora_B.default.weight @ layer.lora_A.default.weight * lora.alpha / lora.rank
    assert torch.equal(merged.model.layers[1].mlp.down_proj.weight, weight + delta)

    plain, _ = policy().model, export_model(policy().model, tokenizer, "base")  # the float base, as in LoRA
    alone = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained("base"), "out/adapter")
    assert torch.allclose(logits(alone), want, atol=1e-4) == (lora.quantize is None)
    for (_, p), (_, q) in zip(
        sorted((n, p) for n, p in alone.named_parameters() if ".lora_" in n),
        sorted((n, p) for n, p in module.model.named_parameters() if ".lora_" in n),
        strict=True,
    ):
        assert torch.equal(p, q)
    assert not torch.equal(logits(plain), logits(alone))


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gpt2"])
def test_merging_in_other_architectures(name):
    model, _ = adapters.adapt(model_of(name), LoRA(rank=3), "")
    want = logits(stir(model, 0.5))
    export_model(model, encoding.tiny_tokenizer(), "out")
    merged = transformers.AutoModelForCausalLM.from_pretrained("out")
    assert (logits(merged) - want).abs().max() < 1e-3
    with adapters.disabled(model):
        assert (logits(model) - want).abs().max() > 0.1


def test_adapters_of_a_half_precision_model_stay_in_float32(lora):
    module = policy(lora=lora, dtype="bfloat16")
    trainer(max_steps=2).fit(module, Letters())
    assert {p.dtype for p in module.model.parameters() if p.requires_grad} == {torch.float32}
    assert module.token_terms.notes == []
    assert stir(module.model).lm_head.weight.dtype == torch.bfloat16
    module.export("out")
    merged = transformers.AutoModelForCausalLM.from_pretrained("out")
    assert merged.dtype == torch.bfloat16
    assert (logits(merged) - logits(module.model)).abs().mean() < 0.02


def test_a_checkpoint_exports_alone_or_with_its_base_elsewhere(lora):
    """By the state of the random numbers ("tiny"), by name, and by a name that is given."""
    export_model(policy().model, policy().tokenizer, "base")
    for name, base in (("tiny", None), ("base", None), ("base", "moved")):
        torch.manual_seed(0)
        module = GRPO(name, lora=lora, group=4, lr=1e-2, sampling=Sampling(max_new_tokens=6))
        loop = trainer(max_steps=1)
        loop.fit(module, Letters())
        loop.save_checkpoint("x.ckpt")
        if base:
            Path("base").rename("moved")
            with pytest.raises(ValueError, match=r"cannot load the model|no such|unknown"):
                export_checkpoint("x.ckpt", "out", overwrite=True)
        before = torch.get_rng_state()
        export_checkpoint("x.ckpt", "out", overwrite=True, base=base)
        assert torch.equal(before, torch.get_rng_state())
        merged = transformers.AutoModelForCausalLM.from_pretrained("out")
        assert torch.allclose(logits(merged), logits(module.model), atol=1e-5)
        assert Path("out/adapter/adapter_config.json").is_file()
    again = GRPO.load_from_checkpoint("x.ckpt", model="moved", weights_only=True)
    assert torch.equal(logits(again.model), logits(module.model))


def test_adapters_are_not_put_on_another_base(capsys):
    module, loop = policy(lora=KINDS["lora"]), trainer(max_steps=1)
    loop.fit(module, Letters())
    loop.save_checkpoint("lora.ckpt")
    plain = trainer(max_steps=1)
    plain.fit(policy(), Letters())
    plain.save_checkpoint("plain.ckpt")

    def resume(file, **kwargs):
        module = policy(**kwargs)
        trainer(max_steps=2).fit(module, Letters(), ckpt_path=file)

    with pytest.raises(ValueError, match=r"holds adapters alone: give this policy the same lora, .*'rank': 4"):
        resume("lora.ckpt")
    with pytest.raises(ValueError, match="holds no adapters, and this policy has some"):
        resume("plain.ckpt", lora=KINDS["lora"])
    with pytest.raises(ValueError, match=r"adapters are .*'rank': 4.* and this policy's are .*'rank': 8"):
        resume("lora.ckpt", lora=LoRA(rank=8))
    torch.manual_seed(1)
    other = GRPO("tiny", lora=KINDS["lora"])
    with pytest.raises(ValueError, match=r"belong to other frozen weights \(tiny\) than these \(tiny\)"):
        trainer(max_steps=2).fit(other, Letters(), ckpt_path="lora.ckpt")
    export_model(other.model, other.tokenizer, "other")
    code, text = run(capsys, "export", "lora.ckpt", "out", "--base", "other")
    assert code
    assert "belong to other frozen weights" in text
    assert not Path("out").exists()


# --------------------------------------------------------------------------------------------- PeftModels, mistakes


def test_a_peft_model_of_the_users_own():
    base = policy()
    wrapped = peft.get_peft_model(base.model, peft.LoraConfig(r=2, lora_alpha=3, target_modules="all-linear"))
    module = GRPO(wrapped, tokenizer=base.tokenizer, group=4, lr=1e-2, sampling=Sampling(max_new_tokens=6))
    assert module.reference is None
    loop = trainer(max_steps=1)
    loop.fit(module, Letters())
    loop.save_checkpoint("x.ckpt")
    assert parts(module.model)[0].abs().sum() > 0
    assert torch.equal(logits(wrapped), logits(module.model)), "the same layers"
    assert module.token_terms.notes == []
    module.export("out")
    assert torch.allclose(logits(transformers.AutoModelForCausalLM.from_pretrained("out")), logits(wrapped), atol=1e-5)
    with pytest.raises(ValueError, match=r"adapters of a model that has no name: say where it is .base, --base."):
        export_checkpoint("x.ckpt", "again")
    with adapters.disabled(module.model):
        again = GRPO(wrapped, tokenizer=base.tokenizer)
    assert again.reference is not None, "adapters that do something belong to the reference"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(use_rslora=True), "with another use_rslora than the default"),
        (dict(modules_to_save=["lm_head"]), "with another modules_to_save"),
        (dict(layers_to_transform=[0]), "with another layers_to_transform"),
    ],
)
def test_a_peft_model_that_cannot_be_rebuilt(settings, message):
    base = policy()
    wrapped = peft.get_peft_model(base.model, peft.LoraConfig(r=2, target_modules=["q_proj"], **settings))
    with pytest.raises(ValueError, match=message):
        GRPO(wrapped, tokenizer=base.tokenizer)


def test_a_peft_model_that_is_no_lora():
    base = policy()
    wrapped = peft.get_peft_model(base.model, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="must have one LoRA adapter"):
        GRPO(wrapped, tokenizer=base.tokenizer)


class Projectionless(transformers.LlamaForCausalLM):
    """A language model without linear layers."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers = torch.nn.ModuleList()


@pytest.mark.parametrize(
    ("model", "lora", "message"),
    [
        (
            "llama",
            dict(target_modules=["q_porj"]),
            "names 'q_porj', which LlamaForCausalLM does not have: did you mean 'q_proj'",
        ),
        (
            "gpt2",
            dict(target_modules=["q_proj"]),
            "GPT2LMHeadModel does not have.* linear layers are c_attn, c_fc, c_proj",
        ),
        ("llama", dict(target_modules=["lm_head"]), "names 'lm_head'"),
        ("gpt2", dict(quantize="nf4"), r"GPT2LMHeadModel has no torch\.nn\.Linear layers"),
        (None, dict(), "Projectionless has no linear layers beside its head"),
    ],
)
def test_targets_that_are_not_there(model, lora, message):
    model = model_of(model) if model else Projectionless(CONFIGS["llama"]())
    with pytest.raises(ValueError, match=message):
        GRPO(model, tokenizer=encoding.tiny_tokenizer(), lora=LoRA(**lora))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(rank=0), "lora.rank is 0: it must be at least 1"),
        (dict(alpha=0), "lora.alpha is 0: it must be above 0"),
        (dict(target_modules=[]), "lora.target_modules is .*name at least one"),
        (dict(quantize="int3"), "lora.quantize is int3"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**settings)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(adapters, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    with pytest.raises(ValueError, match="needs the package bitsandbytes: pip install bitsandbytes"):
        policy(lora=KINDS["qlora"])
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package peft: pip install peft"):
        policy(lora=KINDS["lora"])


def test_a_quantised_model_is_refused():
    export_model(policy().model, policy().tokenizer, "base")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained("base", quantization_config=config)
    with pytest.raises(ValueError, match=r"base is quantised already: give its float weights, and lora\.quantize"):
        GRPO(model, tokenizer=encoding.tiny_tokenizer(), lora=LoRA())


# ------------------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model.lora.rank", "0"], "lora.rank is 0: it must be at least 1"),
        (["--model.lora.target_modules", "[q_porj]"], "did you mean 'q_proj'"),
        (["--model.lora.rnak", "4"], "Did you mean rank instead of rnak?"),
    ],
)
def test_mistakes_are_explained(argv, message, capsys):
    code, text = run(capsys, "fit", "--config", "grpo", "--config", "tiny", *argv)
    assert code not in (0, None)
    assert message in text
    assert "Traceback" not in text


def test_the_command_line_sets_validates_and_exports(capsys):
    lora = ("--model.lora.rank", 2, "--model.lora.alpha", 6, "--model.lora.target_modules", "[q_proj, down_proj]")
    fit(capsys, "--config", "rloo", "--config", "tiny", *lora, "--trainer.max_steps", 2, "--run", "r")
    saved = torch.load("r/checkpoints/last.ckpt", weights_only=True)
    assert {k.split(".")[-4] for k in saved["state_dict"]} == {"q_proj", "down_proj"}
    assert saved["hyper_parameters"]["lora"] == dict(
        rank=2, alpha=6.0, target_modules=["q_proj", "down_proj"], quantize=None
    )
    code, text = run(
        capsys, "validate", "--config", "r/config.yaml", "--ckpt_path", "r/checkpoints/last.ckpt", "--run", "r"
    )
    assert code == 0, text
    one, two = (rows[0]["rows"] for rows in [jsonl.read(Path("r/evaluations.jsonl"))[-2:]] for rows in [rows] * 2)
    assert one == two
    code, text = run(capsys, "export", "r/checkpoints/last.ckpt", "out")
    assert code == 0, text
    config = peft.PeftConfig.from_pretrained("out/adapter")
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (2, 6, {"q_proj", "down_proj"})


def test_qlora_learns_the_toy_task(capsys):
    short = ("--trainer.max_steps", 12, "--trainer.limit_val_batches", 0, "--run", "r")
    fit(capsys, "--config", "grpo", "--config", "qlora", "--config", "tiny", *short)
    rewards = [row["reward"] for row in jsonl.read(Path("r/metrics.jsonl")) if "reward" in row]
    assert rewards[0] < 0.2
    assert min(rewards[-2:]) > 0.7


# ------------------------------------------------------------------------------------------------------- callbacks


def test_entropy_of_a_strangers_peft_model():
    class Wrapped(Stranger):
        def __init__(self):
            super().__init__()
            self.lm = peft.get_peft_model(self.lm, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))

    log, module = Log(), Wrapped()
    loader = torch.utils.data.DataLoader(torch.randint(30, (6, 8)), batch_size=2)
    trainer(max_steps=3, callbacks=[EntropyMonitor(), log]).fit(module, loader)
    assert [r["entropy"] for r in log.rows] == pytest.approx(module.seen, rel=1e-5)
    assert isinstance(module, L.LightningModule)
    assert not any(m._forward_hooks for m in module.modules())
