"""InfLLM-v2 inside transformers' models: training, generation, the callback; against the twin and against dense attention."""

from dataclasses import asdict, replace

import lightning.pytorch as L
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from test_gradients import errors, exact  # noqa: F401  (a fixture)
from test_gradients import gradients as trained
from test_policy import Letters, trainer, weights
from test_resume import INNER, policy
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from worker import FEW

from lit_rl import GRPO, RLCallback, Sampling, models, ops, sparse_attention
from lit_rl.callbacks import SparseAttention
from lit_rl.datamodules import Vowels
from lit_rl.generation.native import NativeGenerator
from lit_rl.kernels import infllm
from lit_rl.kernels.infllm import Sequences, Settings

SMALL = Settings(kernel_size=4, kernel_stride=2, block_size=8, window_size=8, topk=2, dense_len=-1)
MLA = dict(q_lora_rank=8, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=4, v_head_dim=8, head_dim=16)
ARCHITECTURES = {"llama": 2, "qwen2": 1, "qwen3": 2, "minicpm3": 4}  # with their key heads
VOCABULARY = 50


def make(architecture="llama", attention="infllm_v2", settings=SMALL, **options):
    sparse_attention.register()
    torch.manual_seed(0)
    options = (MLA if architecture == "minicpm3" else {}) | options
    config = AutoConfig.for_model(
        architecture, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=ARCHITECTURES.get(architecture, 2), max_position_embeddings=512,
        pad_token_id=0, eos_token_id=None, initializer_range=0.2, **options,
    )  # fmt: skip
    config.sparse_config = asdict(settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def twin(module, query, key, value, attention_mask, scaling=None, **kwargs):
    seqs, settings = Sequences.whole(query, key), sparse_attention.settings_of(module.config)
    blocks = infllm.naive_select(query, key, seqs, settings, scaling)
    out = infllm.naive_attention(query, key, value, blocks, seqs, settings.block_size, scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("twin", twin)


def tokens(rows=3, length=60):
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


def gradients(model, ids):
    loss = model(ids, labels=ids, use_cache=False).loss
    return torch.cat([loss[None], *(g.flatten() for g in torch.autograd.grad(loss, list(model.parameters())))])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_is_that_of_the_twin_and_not_dense(architecture):
    model = make(architecture)
    got = gradients(model, tokens())
    model.set_attn_implementation("twin")
    want = gradients(model, tokens())
    assert (got - want).norm() < 1e-5 * want.norm()
    model.set_attn_implementation("sdpa")
    assert (gradients(model, tokens()) - want).norm() > 1e-2 * want.norm()


@pytest.mark.parametrize("how", [dict(topk=8), dict(dense_len=61)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_within_what_is_covered_it_is_dense(architecture, how):
    settings = Settings(**(asdict(SMALL) | how))
    model, dense = make(architecture, settings=settings), make(architecture, "sdpa")
    assert torch.equal(gradients(model, tokens()), gradients(dense, tokens()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_and_packing_change_nothing(architecture):
    model, ids = make(architecture), tokens()
    alone = [model(ids[:1, 20:]).logits[0], model(ids[1:2, :30]).logits[0], model(ids[2:]).logits[0]]
    mask = torch.ones_like(ids)
    mask[0, :20] = mask[1, 30:] = 0
    padded = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    packed = torch.cat([ids[0, 20:], ids[1, :30], ids[2]])[None]
    positions = torch.cat([torch.arange(n) for n in (40, 30, 60)])[None]
    in_a_row = model(packed, position_ids=positions, use_cache=False).logits[0].split([40, 30, 60])
    for got in ([padded[0, 20:], padded[1, :30], padded[2]], in_a_row):
        for a, b in zip(got, alone, strict=True):
            assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("dense_len", [-1, 50])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_is_the_training_forward(architecture, dense_len):
    """transformers' and ours, which keeps pooled keys; from prompts of several lengths, across dense_len."""
    model = make(architecture, settings=Settings(**(asdict(SMALL) | {"dense_len": dense_len})))
    prompts = [row[-n:].tolist() for row, n in zip(tokens(3, 40), (40, 40, 33), strict=True)]
    generator = NativeGenerator(eos=[], pad=0, decode=str)
    generator.sync(model)
    completions = generator.generate(prompts, [[1, 2], [3], [4]], Sampling(max_new_tokens=25))
    for prompt, group in zip(prompts, completions, strict=True):
        for one in group:
            ids = torch.tensor([prompt + one.tokens.tolist()])
            logps = model(ids, use_cache=False).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
            assert torch.allclose(logps.gather(-1, one.tokens[:, None])[:, 0], one.logps, atol=1e-4)
    padded = torch.tensor([[0] * (40 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (40 - len(p)) + [1] * len(p) for p in prompts])
    greedy = model.generate(padded, attention_mask=mask, max_new_tokens=25, do_sample=False)
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt + greedy[i, 40:].tolist()])
        best = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].topk(2)
        chosen = best.indices[:, 0] == greedy[i, 40:]
        assert (chosen | (best.values.diff(dim=-1).abs()[:, 0] < 1e-4)).all()


def test_a_cache_keeps_pooled_keys(monkeypatch):
    """They are what pooling anew gives, also when rows leave; and a step pools a kernel at most."""
    pooled = []
    pool = sparse_attention.pool

    def counting(*args):
        pooled.append(pool(*args))
        return pooled[-1]

    monkeypatch.setattr(sparse_attention, "pool", counting)
    generator = NativeGenerator(eos=list(range(0, VOCABULARY, 10)), pad=0, decode=str)
    model = make()
    generator.sync(model)
    prompts = tokens(4, 40).tolist()
    completions = generator.generate(prompts, [[i] for i in range(4)], Sampling(max_new_tokens=30))
    assert len({len(c.tokens) for (c,) in completions}) > 1, "no row left before another"
    assert len(pooled) > 20
    assert max(x.shape[2] for x in pooled[4:]) <= 1
    for prompt, (one,) in zip(prompts, completions, strict=True):
        logps = model(torch.tensor([prompt + one.tokens.tolist()])).logits[0].log_softmax(-1)[39:-1]
        assert torch.allclose(logps.gather(-1, one.tokens[:, None])[:, 0], one.logps, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_does_not_choose_again(reentrant, monkeypatch):
    model, ids, calls = make().train(), tokens(), []
    want = gradients(model, ids)
    select = ops.select_blocks
    monkeypatch.setattr(ops, "select_blocks", lambda *args: (calls.append(1), select(*args))[1])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    got = torch.cat([loss[None], *(p.grad.flatten() for p in model.parameters())])
    assert len(calls) == 2
    assert torch.equal(got, want)


def test_autocast_and_half_precision_are_near():
    model, ids = make(), tokens()
    want = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(ids).logits - want).norm() < 0.1 * want.norm()
        gradients(model, ids)
    assert (model.bfloat16()(ids).logits.float() - want).norm() < 0.1 * want.norm()


def test_what_it_cannot_do_is_an_error():
    model, ids = make(), tokens()
    causal = torch.ones(60, 60, dtype=torch.bool).tril()[None, None].expand(3, -1, -1, -1)
    with pytest.raises(ValueError, match="no mask of four dimensions beyond 24 keys, and there are 60"):
        model(ids, attention_mask=causal)
    dense = make(settings=Settings(**(asdict(SMALL) | {"dense_len": 61})))
    assert torch.allclose(dense(ids, attention_mask=causal).logits, dense(ids).logits, atol=1e-5)
    holes = torch.ones_like(ids)
    holes[0, 30] = 0
    with pytest.raises(ValueError, match="padding at the ends of a row"):
        model(ids, attention_mask=holes)
    with pytest.raises(ValueError, match="a cache that grows"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match=r"set attention_dropout of the config from 0.5 to 0"):
        make(attention_dropout=0.5).train()(ids)
    for wrong, message in (({"top_k": 3}, r"sparse_config has \['top_k'\]"), ({"use_nope": True}, "use_nope is True")):
        model.config.sparse_config = wrong
        with pytest.raises(ValueError, match=message):
            model(ids)


def test_models_that_it_does_not_fit(monkeypatch):
    with pytest.raises(ValueError, match=r"MistralForCausalLM has layers of .* and a window of 4096"):
        sparse_attention.check(make("mistral", "sdpa"))
    assert sparse_attention.covered(models.load("tiny", attn_implementation="infllm_v2")[0]) == 8191
    monkeypatch.setattr(LlamaForCausalLM, "_supports_attention_backend", False)  # as older architectures say
    with pytest.raises(ValueError, match="does not take its attention from transformers' AttentionInterface"):
        models.load("tiny", attn_implementation="infllm_v2")


class Watch(RLCallback):
    """The largest distance of a ratio from one, and the attention of each step."""

    def __init__(self):
        self.worst, self.names, self.logged = 0.0, [], []

    def on_loss(self, trainer, module, x, terms):
        self.worst = max(self.worst, float((terms.log_ratio.exp() - 1).abs().max()))
        self.names.append(module.model.config._attn_implementation)

    def on_train_batch_end(self, trainer, *args):
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def learn(*callbacks, **settings):
    torch.manual_seed(0)
    policy = GRPO("tiny", group=4, sampling=Sampling(max_new_tokens=30), old_logps="sampler", **settings)
    watch = Watch()
    trainer(max_steps=3, callbacks=[*callbacks, watch]).fit(policy, Vowels(size=8, batch_size=2))
    return policy, watch


def test_a_policy_samples_and_learns_sparsely(monkeypatch):
    """On policy the ratio is one: the sampler's attention is the trainer's. And recall is that of a mask."""
    recalls = []

    def check(module, q, k, v, blocks, seqs, settings, scale):
        if not q.requires_grad or len(recalls) > 3:
            return
        scores = (q * scale) @ k.mT
        length = q.shape[2]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        at = torch.arange(length) // settings.block_size
        seen = (blocks.view(len(q), length, -1, 1, blocks.shape[-1]) == at[:, None]).any(-1).transpose(1, 2)
        recalls.append(float((weights.detach() * seen).sum(-1)[:, :, settings.covered :].mean()))

    monkeypatch.setattr("lit_rl.callbacks.sparse_attention.QUERIES", 10**9)
    sparse_attention.watchers.append(check)
    policy, watch = learn(SparseAttention(SMALL, every_n_steps=2), microbatch_tokens=10**6)
    sparse_attention.watchers.remove(check)
    assert 0 < watch.worst < 1e-4
    assert set(watch.names) == {"infllm_v2"}
    first, second, third = watch.logged
    assert {"seconds/sparse_attention", "seconds/dense_attention"} <= first.keys()
    assert first["sparse_attention/recall"] != third["sparse_attention/recall"]
    assert first["sparse_attention/recall"] == second["sparse_attention/recall"] < 1  # measured every second step
    assert first["sparse_attention/recall"] == pytest.approx(sum(recalls[:4]) / 4, abs=0.02)  # each row's mean, here
    assert 8 <= first["sparse_attention/visible"] <= 24
    policy.export("it")
    model = AutoModelForCausalLM.from_pretrained("it", attn_implementation="infllm_v2")
    assert sparse_attention.settings_of(model.config) == SMALL
    assert not sparse_attention.watchers


def test_it_begins_at_its_step_and_a_reference_follows():
    policy, watch = learn(SparseAttention(SMALL, start_step=2), kl_coef=0.1)
    assert watch.worst < 1e-4
    assert watch.names[-1] == policy.reference.config._attn_implementation == "infllm_v2"
    assert "infllm_v2" not in watch.names[:2]


@pytest.fixture
def left_out():
    """How many blocks of its past each query of a training forward did not see, in all."""
    counts = []

    def watch(module, q, k, v, blocks, seqs, settings, scale):
        if q.requires_grad:
            past = seqs.queries()[2] // settings.block_size + 1
            counts.append(int((past[:, None] - (blocks >= 0).sum(-1)).sum()))

    sparse_attention.watchers.append(watch)
    yield counts
    sparse_attention.watchers.remove(watch)


def test_the_gradient_does_not_depend_on_the_split(exact, left_out):  # noqa: F811
    """In float64, where rounding does not choose other blocks."""

    def run(**settings):
        return trained(GRPO, "64-true", callbacks=[SparseAttention(FEW)], **INNER[1], **settings)

    whole, rows = run(), len(left_out)
    for tokens in (1, 60):
        split = run(microbatch_tokens=tokens)
        assert max(split.slices) > max(whole.slices) == 1
        assert max(errors(split, whole)) < 1e-12
    assert min(left_out[:rows]) > 100, "the test is too easy"


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_it_resumes(stop, left_out):
    """From before its start, at it and after it."""
    saver = ModelCheckpoint("saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)

    def fit(*callbacks, seed=0, ckpt=None):
        module, attention = policy(GRPO, seed), SparseAttention(FEW, start_step=2, every_n_steps=1)
        run = trainer(max_steps=5, callbacks=[attention, *callbacks], enable_checkpointing=bool(callbacks))
        run.fit(module, Letters(), ckpt_path=ckpt)
        steps, names = len(left_out), ("loss", "sparse_attention/recall", "sparse_attention/visible")
        assert all(left_out)
        left_out.clear()
        return weights(module), steps, {name: float(run.callback_metrics[name]) for name in names}

    straight, steps, numbers = fit(saver)
    resumed, fewer, again = fit(seed=1, ckpt=f"saved/step={stop}.ckpt")
    assert steps == 3 * 2, "of two layers"
    assert fewer == min(3, 5 - stop) * 2
    assert torch.equal(resumed, straight)
    assert again == numbers
    assert numbers["sparse_attention/recall"] < 0.9


@pytest.mark.parametrize(("settings", "reach"), [(None, 8191), (replace(SMALL, topk=64), 520)])
def test_a_run_without_sequences_longer_than_what_is_seen_is_told_so(settings, reach):
    with pytest.warns(UserWarning, match=f"changed nothing: no training sequence had more than {reach} tokens"):
        learn(SparseAttention(settings))


class Stranger(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.lm = make("qwen2", "sdpa").train()

    def training_step(self, batch, batch_idx):
        return self.lm(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_a_strangers_module():
    module, watch = Stranger(), Watch()
    loader = torch.utils.data.DataLoader(tokens(), batch_size=3)
    trainer(max_steps=1, callbacks=[SparseAttention(SMALL), watch]).fit(module, loader)
    assert 0 < watch.logged[0]["sparse_attention/recall"] < 1

    class Other(Stranger):
        def __init__(self):
            L.LightningModule.__init__(self)
            self.lm = torch.nn.Linear(2, 2)

    with pytest.raises(ValueError, match="found no Hugging Face causal language model in Other"):
        trainer(callbacks=[SparseAttention()]).fit(Other(), loader)


def test_the_settings_of_the_callback():
    for wrong in ({"start_step": -1}, {"every_n_steps": -1}):
        with pytest.raises(ValueError, match="it must be at least 0"):
            SparseAttention(**wrong)
    module = Stranger()
    module.lm = transformers.MistralForCausalLM(transformers.MistralConfig(**{
        "vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }))  # fmt: skip
    with pytest.raises(ValueError, match="replaces full attention only"):
        trainer(callbacks=[SparseAttention(SMALL)]).fit(module, torch.utils.data.DataLoader(tokens()))
