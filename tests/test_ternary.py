"""Ternary training: the rounding and its gradient, what is kept, exported and refused, and that a policy learns so."""

import copy
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from test_callbacks import Log, Stranger
from test_cli import run
from test_policy import Letters, policy, trainer, weights
from transformers import AutoModelForCausalLM

from lit_rl import GRPO, SFT, LoRA, RLCallback, Sampling, encoding, models, ops, ternary
from lit_rl.callbacks import TernaryQAT
from lit_rl.datamodules import Vowels
from lit_rl.export import export_checkpoint, export_model
from lit_rl.generation.vllm_engine import stamp
from lit_rl.kernels import ternary as kernel

SHAPES = [(5, 12, 4), (3, 64, 32), (7, 9, 3), (2, 30, 30), (1, 5, 1)]  # out, in, group


def by_hand(weight, group):
    """The report's formula, one number at a time."""
    codes, scales = [], []
    for row in weight.double().tolist():
        codes.append([])
        scales.append([])
        for i in range(0, len(row), group):
            s = max(sum(map(abs, row[i : i + group])) / group, 1e-5)
            s = float(torch.tensor(s).bfloat16())
            scales[-1].append(s)
            codes[-1] += [max(-1, min(1, round(x / s))) for x in row[i : i + group]]
    return torch.tensor(codes), torch.tensor(scales)


def ids(n=40):
    return torch.arange(3, 3 + n).view(2, -1)


def logits(model):
    with torch.no_grad():
        return model.eval()(ids()).logits


def ternary_model(start=None, group=32):
    """A model whose layers are ternary, and one with the rounded weights in plain layers."""
    torch.manual_seed(0)
    model = start or models.load("tiny")[0]
    plain = copy.deepcopy(model)
    chosen = ternary.choose(model, None, group)
    ternary.convert(model, chosen)
    for name in chosen:
        layer = plain.get_submodule(name)
        codes, scales = kernel.quantize(layer.weight, group)
        layer.weight.data = codes.float() * scales.float().repeat_interleave(group, 1)
    return model, plain


# ------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_are_the_formulas(shape, dtype):
    torch.manual_seed(0)
    weight = torch.randn(shape[:2]).to(dtype)
    weight[0, : shape[2]] = 0
    codes, scales = kernel.quantize(weight, shape[2])
    want_codes, want_scales = by_hand(weight, shape[2])
    assert torch.equal(codes.long(), want_codes)
    assert torch.equal(scales.float(), want_scales)
    dense = kernel.dequantize(codes, scales, torch.float32)
    assert torch.equal(dense, want_codes.float() * want_scales.repeat_interleave(shape[2], 1))
    assert torch.equal(dense, kernel.dequantize(codes, scales, torch.bfloat16).float()), "exact in bfloat16"


def test_zeros_of_normal_weights():
    """|w| < E|w| / 2 = 0.399 of a deviation, which is 31 % of a normal distribution."""
    codes, _ = kernel.quantize(torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)), 1024)
    assert float((codes == 0).float().mean()) == pytest.approx(0.310, abs=0.005)


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_codes_come_back_and_multiply(shape):
    torch.manual_seed(1)
    (out, width, group), weight = shape, torch.randn(shape[:2])
    codes, scales = kernel.quantize(weight, group)
    packed = kernel.pack(codes)
    assert packed.shape == (out, -(-width // 4))
    assert torch.equal(kernel.unpack(packed, width), codes)
    others = kernel.quantize(torch.randn(out, width), group)[0]
    assert int(kernel.differing(packed, kernel.pack(others))) == int((codes != others).sum())
    x = torch.randn(6, width)
    want = x.double() @ kernel.dequantize(codes, scales, torch.float64).T
    for rows in (1, 3, 100):
        kernel.CHUNK, before = rows * width, kernel.CHUNK
        got = ops.ternary_linear(x, packed, scales)
        kernel.CHUNK = before
        assert torch.allclose(got.double(), want, atol=1e-5)
    assert torch.allclose(kernel.naive_ternary_linear(x, packed, scales).double(), want, atol=1e-5)


def test_forward_and_gradient():
    """The forward is that of the rounded weights, and each weight's gradient that of its rounded one."""
    model, plain = ternary_model()
    assert set(model.state_dict()) == set(plain.state_dict())
    for one in (model, plain):
        one(ids(), labels=ids()).loss.backward()
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    assert torch.equal(logits(model), logits(plain))
    assert not any("embed" in n or "head" in n or "norm" in n for n in ternary.layers(model))
    assert len(ternary.layers(model)) == 4 * 7


def test_autocast_rounds_in_float32():
    model, plain = ternary_model()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(ids()).logits, plain(ids()).logits)


# --------------------------------------------------------------------------------------------------- in the training


def test_sampling_rounds_each_layer_once_and_the_ratio_is_one(monkeypatch):
    class Watch(RLCallback):
        worst, rounded = 0.0, []

        def on_rollout(self, trainer, module, x):
            self.rounded.append(len(calls))
            calls.clear()

        def on_loss(self, trainer, module, x, terms):
            self.worst = max(self.worst, float(terms.log_ratio.abs().max()))

    calls, rounded = [], ops.round_ternary

    monkeypatch.setattr(ops, "round_ternary", lambda *args: (calls.append(1), rounded(*args))[1])
    watch, module = Watch(), policy(GRPO, old_logps="sampler", kl_coef=0.0)
    monkeypatch.setattr(TernaryQAT, "_measure", lambda *args: ({}, {"a layer": 1.0}))
    qat = TernaryQAT(rewarm_steps=0)
    monkeypatch.setattr(qat, "on_train_batch_end", lambda *args: None)
    trainer(max_steps=3, callbacks=[qat, watch]).fit(module, Letters())
    assert watch.rounded == [28, 28 + 28, 28 + 28], "once to sample, after once in the forward of the step before"
    assert 0 < watch.worst < 1e-5


def test_what_is_kept_is_forgotten_when_the_weight_changes():
    model, _ = ternary_model()
    first = logits(model)
    with torch.inference_mode():
        assert torch.equal(model(ids()).logits, first)
    other, _ = ternary_model(start=models.load("tiny")[0])
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model), logits(other))
    assert not torch.equal(logits(model), first)
    layer = model.model.layers[0].mlp.up_proj
    assert layer._kept is not None
    model(ids())
    assert layer._kept is None, "it would take memory in training"


def test_logs_are_those_of_the_weights():
    class Watch(L.Callback):
        """Before the optimizer's step, and after it."""

        def __init__(self):
            self.codes, self.want = {}, []

        def take(self, module):
            found = {n: by_hand(l.weight.detach(), 4) for n, l in ternary.layers(module).items()}
            return {n: c for n, (c, _) in found.items()}, {n: float(s.mean()) for n, (_, s) in found.items()}

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.codes, scales = self.take(module)
            self.start = getattr(self, "start", scales)

        def on_train_batch_end(self, trainer, module, *args):
            codes, scales = self.take(module)
            join = lambda x: torch.cat([c.flatten() for c in x.values()])  # noqa: E731
            after, before = join(codes), join(self.codes)
            drift = sum(abs(scales[n] / self.start[n] - 1) for n in scales) / len(scales)
            self.want.append([float((after == 0).float().mean()), float((after != before).float().mean()), drift])

    watch, log, module = Watch(), Log(), Stranger()
    loader = torch.utils.data.DataLoader(torch.randint(30, (6, 8)), batch_size=2)
    qat = TernaryQAT(group_size=4, rewarm_steps=0, lr_factor=20)
    trainer(max_steps=3, callbacks=[qat, watch, log]).fit(module, loader)
    got = [[row[f"ternary/{name}"] for name in ("zeros", "flips", "scale_drift")] for row in log.rows]
    assert [x for row in got for x in row] == pytest.approx([x for row in watch.want for x in row], rel=1e-4)
    assert all(row[1] > 0 and row[2] > 0 for row in got), "nothing flips: the test is too easy"


class Unit(L.LightningModule):
    """A weight that moves by the learning rate, and a layer."""

    def __init__(self, schedule):
        super().__init__()
        self.layer, self.weight = torch.nn.Linear(4, 4), torch.nn.Parameter(torch.zeros(()))
        self.schedule, self.places = schedule, []

    def training_step(self, batch, batch_idx):
        return -self.weight + 0 * self.layer(batch).sum()

    def on_train_batch_end(self, *args):
        self.places.append(float(self.weight))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        scheduler = self.schedule(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


SCHEDULES = {
    "recursive": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
    "closed": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_learning_rate_rises_again(schedule):
    """On top of any schedule, which is not disturbed, and from a checkpoint as without one."""
    rate = {"recursive": lambda i: 0.5**i, "closed": lambda i: 1 / (1 + i)}[schedule]
    factors = [1, 1, 0.8 / 4, 0.8 * 2 / 4, 0.8 * 3 / 4, 0.8, 0.8]
    want = torch.tensor([rate(i) * f for i, f in enumerate(factors)]).cumsum(0).tolist()
    loader = torch.utils.data.DataLoader(torch.ones(8, 4))
    saver = ModelCheckpoint("saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    for ckpt in (None, 1, 2, 4):
        module, qat = Unit(SCHEDULES[schedule]), TernaryQAT(group_size=4, start_step=2, rewarm_steps=3, lr_factor=0.8)
        run = trainer(max_steps=7, callbacks=[qat, *([] if ckpt else [saver])], enable_checkpointing=not ckpt)
        run.fit(module, loader, ckpt_path=ckpt and f"saved/step={ckpt}.ckpt")
        assert module.places == pytest.approx(want[ckpt or 0 :])


def test_an_accident_within_a_step_leaves_the_learning_rate():
    class Fails(L.Callback):
        def on_before_optimizer_step(self, *args):
            raise RuntimeError("an accident")

    module = Unit(SCHEDULES["closed"])
    run = trainer(callbacks=[TernaryQAT(group_size=4), Fails()])
    with pytest.raises(RuntimeError, match="an accident"):
        run.fit(module, torch.utils.data.DataLoader(torch.ones(8, 4)))
    assert run.optimizers[0].param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_it_begins_at_its_step_and_resumes(stop):
    """Before the start, at it and after it; until then nothing differs from a run without."""

    class Kinds(L.Callback):
        def __init__(self):
            self.ternary, self.weights = [], []

        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.ternary.append(len(ternary.layers(module)))
            self.weights.append(weights(module))

    def fit(callbacks, ckpt=None):
        module, kinds = policy(GRPO), Kinds()
        run = trainer(max_steps=5, callbacks=[*callbacks, kinds], enable_checkpointing=len(callbacks) == 2)
        run.fit(module, Letters(), ckpt_path=ckpt)
        return weights(module), kinds, run

    qat = lambda: TernaryQAT(start_step=2, rewarm_steps=1)  # noqa: E731
    saver = ModelCheckpoint("saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    straight, kinds, run = fit([qat(), saver])
    assert kinds.ternary == [0, 0, 28, 28, 28]
    _, without, _ = fit([])
    same = [torch.equal(a, b) for a, b in zip(kinds.weights, without.weights, strict=True)]
    assert same == [True, True, True, False, False]  # before the third step they still are
    resumed, kinds, again = fit([qat()], f"saved/step={stop}.ckpt")
    assert kinds.ternary == [0, 0, 28, 28, 28][stop:]
    assert torch.equal(resumed, straight)
    for name in ("ternary/zeros", "ternary/flips", "ternary/scale_drift"):
        assert run.callback_metrics[name] == again.callback_metrics[name]


@pytest.mark.slow
def test_grpo_learns_on_a_ternary_policy():
    log = Log()
    torch.manual_seed(0)
    module = GRPO("tiny", lr=2e-3, group=8, sampling=Sampling(max_new_tokens=12))
    trainer(max_steps=20, callbacks=[TernaryQAT(rewarm_steps=2), log]).fit(module, Vowels(size=160, batch_size=8))
    reward = [row["reward"] for row in log.rows[1:]]
    assert sum(reward[-5:]) / 5 > sum(reward[:5]) / 5 + 0.2
    assert len(ternary.layers(module)) == 28


# ------------------------------------------------------------------------------------------------------------ export


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A policy after some ternary steps, and its folders."""
    folder = tmp_path_factory.mktemp("ternary")
    module = policy(GRPO)
    saver = ModelCheckpoint(folder, filename="it", every_n_train_steps=3)
    callbacks = [TernaryQAT(rewarm_steps=0), saver]
    trainer(max_steps=3, callbacks=callbacks, enable_checkpointing=True).fit(module, Letters())
    for packed in (False, True):
        export_checkpoint(folder / "it.ckpt", folder / ("packed" if packed else "full"), packed=packed)
    module.export(folder / "of the policy")
    return module, folder


def test_the_exported_weights_are_exactly_the_rounded_ones(trained):
    module, folder = trained
    exported = AutoModelForCausalLM.from_pretrained(folder / "full", dtype=torch.float32)
    other = AutoModelForCausalLM.from_pretrained(folder / "of the policy", dtype=torch.float32)
    latent = module.model.state_dict()
    for name, tensor in exported.state_dict().items():
        layer = name.removesuffix(".weight")
        want = latent[name]
        if layer in ternary.layers(module.model):
            codes, scales = kernel.quantize(want, 32)
            want = codes.float() * scales.float().repeat_interleave(32, 1)
            assert not torch.equal(kernel.dequantize(*kernel.quantize(want, 32), want.dtype), want), "a trap: not again"
        assert torch.equal(tensor, want), name
        assert torch.equal(other.state_dict()[name], want)
    assert torch.equal(logits(exported), logits(module.model))


def test_the_packed_folder_computes_the_same_in_little_memory(trained):
    module, folder = trained
    packed, _ = models.load(str(folder / "packed"))
    assert torch.allclose(logits(packed), logits(module.model), atol=1e-4)
    found = ternary.layers(packed)
    assert set(found) == set(ternary.layers(module.model))
    half = sum(2 * layer.in_features * layer.out_features for layer in found.values())
    assert sum(b.nbytes for layer in found.values() for b in layer.buffers()) <= 0.16 * half
    stored = load_file(folder / "packed" / ternary.PACKED)
    assert sum(t.nbytes for n, t in stored.items() if n.endswith((".codes", ".scales"))) <= 0.16 * half
    export_model(packed, module.tokenizer, "again")  # and back, exactly
    full, again = (load_file(Path(f, "model.safetensors")) for f in (folder / "full", "again"))
    assert full.keys() == again.keys()
    assert all(torch.equal(full[name], again[name]) for name in full)


def test_a_packed_policy_answers_and_does_not_train(trained):
    module, folder = trained
    one = GRPO(str(folder / "packed"), sampling=Sampling(max_new_tokens=6, temperature=0), seed=0)
    module.sampling, module.seed = one.sampling, 0
    tasks = Letters(4).tasks("test")
    tokens = [[c.tokens.tolist() for g in p.respond(tasks, 1)[2] for c in g] for p in (one, module)]
    assert tokens[0] == tokens[1]
    with pytest.raises(RuntimeError, match="packed weights are not trained: train from the checkpoint"):
        trainer().fit(one, Letters())


def test_a_packed_folder_ends_texts_where_the_full_one_does(trained):
    model, tokenizer = models.load("tiny")
    ternary.convert(model, ternary.choose(model, None, 32))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    export_model(model, tokenizer, "ends", packed=True)
    again, its = models.load("ends")
    assert encoding.eos_token_ids(again, its) == [tokenizer.eos_token_id, 7]


def test_an_engine_gets_the_rounded_weights_though_no_step_has_changed_them():
    model, _ = models.load("tiny")
    before = stamp(model)
    assert torch.equal(before, stamp(model))
    ternary.convert(model, ternary.choose(model, None, 32))
    assert not torch.equal(before, stamp(model))


def test_training_goes_on_from_the_exported_folder(trained):
    """Rounded once more, its weights would be others: the mean of |w| is less than the scale, by the zeros."""
    _, folder = trained
    start, _ = models.load(str(folder / "full"))
    before = logits(start)
    ternary.convert(start, ternary.choose(start, None, 32))
    assert torch.equal(logits(start), before)
    untouched = models.load("tiny")[0]
    copied = copy.deepcopy(untouched)
    ternary.convert(copied, ternary.choose(copied, None, 32))
    assert torch.equal(weights(copied), weights(untouched))


def test_tied_embeddings_are_stored_once(trained):
    model = models.load("tiny")[0]
    model.config.tie_word_embeddings = True
    model.tie_weights()
    ternary.convert(model, ternary.choose(model, None, -1))
    export_model(model, trained[0].tokenizer, "tied", packed=True)
    again, _ = models.load("tied")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.allclose(logits(again), logits(model), atol=1e-4)
    assert len(load_file(f"tied/{ternary.PACKED}")) == len(model.state_dict()) - 1 + 28


# ---------------------------------------------------------------------------------------------------------- refusals


def folder_of(trained, name, change):
    _, folder = trained
    export_model(models.load(str(folder / "packed"))[0], trained[0].tokenizer, name, packed=True)
    file = Path(name, ternary.PACKED)
    change(file)
    return name


def with_metadata(**changes):
    def change(file):
        from safetensors import safe_open

        with safe_open(file, "pt") as content:
            about = content.metadata()
        save_file(load_file(file), file, about | changes)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_metadata(version="2"), "the version of .* is 2: it must be 1, which this release reads: export the"),
        (with_metadata(format="other"), "the format of .* is other: it must be 'lit-rl ternary'"),
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "is damaged"),
    ],
)
def test_a_packed_file_of_another_kind(trained, change, message):
    with pytest.raises(ValueError, match=message):
        models.load(folder_of(trained, "changed", change))


class NoLinears(Stranger):
    def __init__(self):
        L.LightningModule.__init__(self)
        self.lm = torch.nn.Conv1d(2, 2, 1)


class Adapted(Stranger):
    def __init__(self):
        L.LightningModule.__init__(self)
        self.lm = policy(GRPO, lora=LoRA(rank=2)).model


@pytest.mark.parametrize(
    ("callback", "module", "message"),
    [
        (
            dict(group_size=48),
            lambda: policy(GRPO),
            "group_size is 48: it must be a divisor of the 128 inputs of .*of 128",
        ),
        (dict(), lambda: NoLinears(), "found no torch.nn.Linear layers that train in NoLinears"),
        (dict(), lambda: policy(GRPO, lora=LoRA(rank=2)), "does not work with lora: .* frozen under adapters"),
        (dict(), lambda: Adapted(), "in Adapted they are frozen under adapters: leave lora out"),
        (dict(modules=["q_prj"]), lambda: policy(GRPO), "names 'q_prj', .*: did you mean 'q_proj'"),
        (dict(modules=["lm_head"]), lambda: policy(GRPO), "names 'lm_head', which GRPO does not have"),
    ],
)
def test_what_cannot_be_ternary_is_refused(callback, module, message):
    with pytest.raises(ValueError, match=message):
        trainer(callbacks=[TernaryQAT(**callback)]).fit(module(), Letters())


@pytest.mark.parametrize(
    "bad", [dict(group_size=0), dict(start_step=-1), dict(rewarm_steps=-1), dict(lr_factor=0.0), dict(modules=[])]
)
def test_bad_settings(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=rf"TernaryQAT.{name} is .*: it must be"):
        TernaryQAT(**bad)


def test_checkpoints_and_callbacks_that_do_not_belong_together(trained):
    _, folder = trained
    checkpoint = folder / "it.ckpt"
    with pytest.raises(ValueError, match=r"has 28 ternary layers \(group size 32\), and this run has no TernaryQAT"):
        trainer(max_steps=4).fit(policy(GRPO), Letters(), ckpt_path=checkpoint)
    with pytest.raises(ValueError, match="ternary with a group size of 16, not of 32"):
        trainer(max_steps=4, callbacks=[TernaryQAT(group_size=16)]).fit(policy(GRPO), Letters(), ckpt_path=checkpoint)
    with pytest.raises(ValueError, match=r"the checkpoint has 28 ternary layers .* makes 4 ternary layers \(q_proj"):
        qat = TernaryQAT(modules=["q_proj"])
        trainer(max_steps=4, callbacks=[qat]).fit(policy(GRPO), Letters(), ckpt_path=checkpoint)


def test_a_checkpoint_is_evaluated_as_it_was_trained(trained):
    """With the callback and without, and loaded without a Trainer; one of before the start is not ternary."""
    module, folder = trained
    want = logits(module.model)
    for callbacks in ([], [TernaryQAT()]):
        one = policy(GRPO)
        trainer(callbacks=callbacks, limit_test_batches=1).test(one, Letters(), folder / "it.ckpt", verbose=False)
        assert torch.equal(logits(one.model), want)
    assert torch.equal(logits(GRPO.load_from_checkpoint(folder / "it.ckpt").model), want)
    one = policy(GRPO)
    trainer(callbacks=[TernaryQAT()], limit_test_batches=1).test(one, Letters(), verbose=False)
    assert not ternary.layers(one)


def test_asked_to_pack_what_is_not_ternary(capsys):
    module = SFT("tiny")
    with pytest.raises(ValueError, match="packed is for models with ternary layers, and this one has none"):
        module.export("no", packed=True)
    assert not Path("no").exists()


def test_the_command_line_exports_packed(trained, capsys):
    _, folder = trained
    code, text = run(capsys, "export", folder / "it.ckpt", "p", "--packed")
    assert code == 0
    assert "p loads with --model.model" in text
    assert Path("p", ternary.PACKED).is_file()
