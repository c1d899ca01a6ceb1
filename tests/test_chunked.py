"""Chunk-wise rollouts: the tokens are those of whole rollouts, the ratios are against the weights that sampled them, and no
token is lost."""

import copy
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from test_policy import Gradients, Letters, trainer, weights
from test_resume import TOKENIZER, equal

from lit_rl import DAPO, GRPO, RLCCF, LoRA, RLCallback, Sampling, ahead, jsonl
from lit_rl.callbacks import GarbleFilter, ReferenceRefresh, SparseAttention, TernaryQAT
from lit_rl.checks import ConfigurationError
from lit_rl.cli import METHODS
from lit_rl.generation.native import NativeGenerator
from lit_rl.kernels.infllm import Settings
from lit_rl.rollout import Rollout
from lit_rl.run import RunLogger
from lit_rl.scoring import Scorer

ROLLOUTS = {name: method for name, method in METHODS.items() if issubclass(method, Rollout)}
SAMPLING = Sampling(max_new_tokens=12, stop=list("aeiouAEIOU .,"))
"""Responses of 1 to 12 tokens."""


class Engine(NativeGenerator):
    """Counts tokens and forward passes."""

    tokens = steps = 0

    def generate(self, prompts, seeds, sampling, begun=None):
        out = super().generate(prompts, seeds, sampling, begun)
        lengths = [len(c.tokens) for row in out for c in row]
        self.tokens, self.steps = self.tokens + sum(lengths), self.steps + max(lengths, default=0)
        return out


class Watch(RLCallback):
    """All that the steps have trained on, with the weights of each."""

    def __init__(self):
        self.batches, self.models, self.ratios, self.finished, self.trained = [], [], [], [], []

    def on_train_batch_start(self, trainer, module, *args):
        self.models.append(copy.deepcopy(module.model))

    def on_rollout(self, trainer, module, x):
        self.finished += [
            (x.tasks[g].turn, x.tasks[g].prompt, row % 4, text)
            for row, (g, text) in enumerate(zip(x.group.tolist(), x.texts, strict=True))
        ]

    def on_advantage(self, trainer, module, x):
        self.batches.append(copy.deepcopy(x))
        self.trained += [task.turn for task in x.tasks]

    def on_loss(self, trainer, module, x, terms):
        ratio = terms.log_ratio.exp()[x.mask]
        self.ratios.append(
            (ratio, (trainer.global_step - x.extra["version"])[x.mask] if "version" in x.extra else None)
        )


def policy(method=GRPO, **settings):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(TOKENIZER),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.06,
            eos_token_id=TOKENIZER.eos_token_id,
            pad_token_id=TOKENIZER.pad_token_id,
        )
    )
    decode = partial(TOKENIZER.decode, skip_special_tokens=True)
    engine = Engine([TOKENIZER.eos_token_id], TOKENIZER.pad_token_id, decode)
    fixed = {"tokenizer": TOKENIZER, "group": 4, "lr": 1e-2, "sampling": SAMPLING, "scoring": Scorer("inline")}
    return method(model, **{**fixed, "generator": engine, "dynamic_sampling": False, **settings})


def fit(module, steps=6, data=None, **settings):
    watch = Watch()
    trainer(max_steps=steps, callbacks=[watch, *settings.pop("callbacks", ())], **settings).fit(
        module, data or Letters()
    )
    return watch


@pytest.mark.parametrize("settings", [{}, dict(epochs=2, minibatches=2, old_logps="recompute")], ids=["1x1", "2x2"])
@pytest.mark.parametrize("name", ROLLOUTS)
def test_one_chunk_is_a_plain_rollout(name, settings):
    runs = []
    for chunk in (None, 12, 10**6):
        module, seen = policy(ROLLOUTS[name], chunk=chunk, **settings), Gradients()
        fit(module, steps=3, callbacks=[seen], gradient_clip_val=1.0)
        runs.append([seen.seen, weights(module)])
    assert runs[0][0][0].norm() > 0
    assert equal(runs[1][0], runs[0][0])
    assert equal(runs[2], runs[1])
    assert equal(runs[1], runs[0])


@pytest.mark.parametrize("chunk", [1, 3, 6])
def test_of_weights_that_stay_the_tokens_are_those_of_whole_rollouts(chunk):
    """Whatever the chunk: a response depends on the step in which it was begun, its prompt and its number."""

    def texts(module):
        """Of tasks that came in a batch, not in a further round."""
        finished = fit(module, steps=8).finished
        return {(step, prompt, i): text for (step, round_, _), prompt, i, text in finished if not round_}

    whole, parts = texts(policy(lr=0.0)), texts(policy(lr=0.0, chunk=chunk))
    common = whole.keys() & parts.keys()
    assert len(whole) == 8 * 16
    assert len(common) >= 40
    assert all(parts[key] == whole[key] for key in common)


@pytest.mark.parametrize("how", [dict(), dict(old_logps="recompute"), dict(precision="bf16-mixed")], ids=str)
@pytest.mark.parametrize("way", [dict(chunk=3), dict(ahead="thread"), dict(chunk=3, ahead="thread")], ids=str)
@pytest.mark.parametrize("cut", [dict(), dict(top_p=0.9, temperature=0.8)], ids=str)
def test_a_ratio_is_taken_against_the_weights_that_sampled_the_token(how, way, cut):
    """Whose log-probabilities are computed here by the model's plain forward, from the weights of each step."""
    how = dict(how)
    precision = how.pop("precision", "32-true")
    module = policy(sampling=replace(SAMPLING, **cut), **way, **how)
    watch = fit(module, precision=precision)
    worst, ages = 0.0, Counter()
    for step, x in enumerate(watch.batches):
        if x.logps is None:  # the loss takes its own
            assert (x.extra["version"][x.mask] == step).all()
            continue
        for row in range(len(x)):
            start, end = int(x.starts[row]), int(x.lengths[row])
            for version in x.extra["version"][row, start:end].unique().tolist():
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
                    logits = watch.models[version](x.tokens[row : row + 1, :end]).logits[0, start - 1 : -1].float()
                logps = (logits / module.temperature).log_softmax(-1)
                want = logps.gather(1, x.tokens[row, start:end, None])[:, 0]
                want = want if x.log_kept is None else want - x.log_kept[row, start:end]
                mine = x.extra["version"][row, start:end] == version
                worst = max(worst, float((x.logps[row, start:end] - want)[mine].abs().max()))
                ages[step - version] += int(mine.sum())
    assert sum(n for age, n in ages.items() if age > 0) > 100, "the test is too easy"
    assert worst < (1e-4 if precision == "32-true" else 0.2)
    old = torch.cat([ratio[age > 0] for ratio, age in watch.ratios])
    new = torch.cat([ratio[age == 0] for ratio, age in watch.ratios])
    assert (new - 1).abs().max() < (1e-4 if precision == "32-true" else 0.2)
    assert (old - 1).abs().mean() > 10 * (new - 1).abs().mean()


def test_of_weights_that_stay_all_ratios_are_one():
    for settings in (
        dict(old_logps="sampler"),
        dict(old_logps="recompute"),
        dict(old_logps="recompute", ahead="thread"),
    ):
        watch = fit(policy(lr=0.0, chunk=2, **settings))
        ratios, ages = (torch.cat(column) for column in zip(*watch.ratios, strict=True))
        assert (ages > 0).sum() > 100
        assert (ratios - 1).abs().max() < 1e-5


@pytest.mark.parametrize(
    "settings",
    [dict(), dict(method=DAPO, dynamic_sampling=True, group=2), dict(mask_truncated=True), dict(ahead="thread")],
    ids=str,
)
@pytest.mark.parametrize("chunk", [1, 4, 12])
def test_no_token_is_lost(chunk, settings):
    module = policy(settings.get("method", GRPO), chunk=chunk, **{k: v for k, v in settings.items() if k != "method"})
    watch = fit(module, steps=8, data=Letters(batch_size=3), logger=RunLogger("r"), log_every_n_steps=1)
    rows = [row for row in jsonl.read(Path("r/metrics.jsonl")) if "loss" in row]
    assert len(rows) == 8
    sums = Counter()
    for row in rows:
        for name in ("generated", "trained", "filtered"):
            sums[name] += row[f"chunked/{name}_tokens"]
        held = row["chunked/pending_tokens"] + row["chunked/ready_tokens"]
        assert sums["generated"] == sums["trained"] + sums["filtered"] + held
    under_way = sum(len(c.tokens) for row in module.chunks.ahead.join() for c in row) if module.chunks.ahead else 0
    assert sums["generated"] == module.generator.tokens - under_way
    assert sums["trained"] == sum(
        int(x.mask[~x.truncated if module.mask_truncated else slice(None)].sum()) for x in watch.batches
    )
    assert (sums["filtered"] > 0) == ("mask_truncated" in settings or "method" in settings)
    assert (max(row["chunked/pending_tokens"] for row in rows) > 0) == (chunk < 12)
    assert (max(row["chunked/versions"] for row in rows) > 1) == (chunk < 12)
    for x in watch.batches:
        assert all(count == module.group for count in x.group.bincount().tolist()), "a group trains when it is whole"
        assert len(x.tasks) == 3
    assert len(watch.trained) == len(set(watch.trained)), "nothing is trained on twice"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(chunk=5), r"chunk is 5: it must be a divisor of sampling.max_new_tokens \(12\), or that or more"),
        (dict(chunk=0), "chunk is 0"),
        (dict(ahead="tread"), "ahead is tread: it must be thread, or a device that is here"),
        (dict(ahead="cuda:99"), "ahead is cuda:99: it must be thread, or a device that is here"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        policy(**settings)


def test_members_of_a_group_answer_at_the_same_time():
    with pytest.raises(ValueError, match="chunk or ahead is set: it must be null: all members answer at the same time"):
        RLCCF([policy(chunk=4), policy()])
    with pytest.raises(ValueError, match="ahead is thread: it must be null: all members answer at the same time"):
        RLCCF(members=2, ahead="thread", chunk=None)
    assert not any(member.chunks for member in RLCCF(members=2, ahead=None, chunk=None).members)


PROSE = """The stage is divided into chunks of tokens, and what has not ended by then waits. Each part is weighed against the
policy that wrote it, so nothing about an old part is taken for new. Long answers thus cost several short rounds, while short
ones are learned from at once; a buffer between the two holds what is ready before its batch has room for it."""


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("", []),
        ("7", []),
        (PROSE, []),
        ("\n".join(f"{i} + {i * 7 % 13} = {i + i * 7 % 13}" for i in range(40)), []),
        ("Wait, let me check that again. " * 60, ["compressible", "repeated", "uniform"]),
        ("so " * 200, ["compressible", "repeated", "uniform"]),
        (
            PROSE
            + "no no no no no no no no no no no no no no no no no no no no no no no no no no no no no no no no " * 8,
            ["repeated"],
        ),
        ("�" * 9, ["unreadable"]),
        (PROSE.replace("e", "\x00").replace("t", "\x1b"), ["unreadable"]),
    ],
)
def test_what_is_garbled(text, rules):
    assert set(rules) <= set(GarbleFilter().rules(text))
    assert bool(rules) == bool(GarbleFilter().rules(text))


def test_garbled_responses_give_no_gradient_and_count_in_their_group():
    """As if their tokens' advantages were zero, and the mean over tokens without them."""

    class Zero(RLCallback):
        def on_advantage(self, trainer, module, x):
            bad = torch.tensor(["e" in text for text in x.texts])
            assert 0 < bad.sum() < len(bad)
            x.mask = x.mask & ~bad[:, None]

    class Letter(GarbleFilter):
        def rules(self, text):
            return ["repeated"] if "e" in text else []

    seen, modules = [], []
    for callback in (Letter(), Zero()):
        gradients, module = Gradients(), policy(aggregate="token", group=8)
        fit(module, steps=1, callbacks=[callback, gradients])
        seen.append(gradients.seen)
        modules.append(module)
    assert equal(*seen)
    assert seen[0][0].norm() > 0
    assert modules[0].counts["skipped/garbled"] == modules[0].counts["garbled/repeated"] > 0


def test_the_reference_is_refreshed_and_resumes():
    class References(RLCallback):
        def __init__(self):
            self.seen = []

        def on_advantage(self, trainer, module, x):
            self.seen.append([weights(module).clone(), torch.cat([p.flatten() for p in module.reference.parameters()])])

    seen, saver = References(), ModelCheckpoint("c", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    settings = dict(kl_coef=0.1, chunk=4)
    fit(policy(**settings), callbacks=[ReferenceRefresh(2), seen, saver], enable_checkpointing=True)
    at = [0, 0, 2, 2, 4, 4]  # the step whose weights are the reference
    for step, (_, reference) in enumerate(seen.seen):
        assert torch.equal(reference, seen.seen[at[step]][0]), step
    assert not torch.equal(seen.seen[0][0], seen.seen[2][0])
    for start in (2, 3):
        again, module = References(), policy(**settings)
        run = trainer(max_steps=6, callbacks=[ReferenceRefresh(2), again])
        run.fit(module, Letters(), ckpt_path=f"c/step={start}.ckpt")
        assert equal(again.seen, seen.seen[start:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(kl_coef=0.0), "needs kl_coef: at 0 there is no reference policy"),
        (
            dict(kl_coef=0.1, lora=LoRA(rank=2)),
            "does not work with lora: with adapters the reference is the frozen base",
        ),
    ],
)
def test_without_a_reference_there_is_nothing_to_refresh(settings, message):
    with pytest.raises(ValueError, match=f"ReferenceRefresh {message}"):
        fit(policy(**settings), callbacks=[ReferenceRefresh(2)])


class Eagerly:
    """Samples as soon as it is asked to, and nothing else meanwhile."""

    def __init__(self, threads):
        pass

    def submit(self, sample):
        done = Future()
        done.set_result(sample())
        return done


class Lazily(Eagerly):
    """Samples when the result is wanted."""

    def submit(self, sample):
        self.result = self.exception = sample
        return self


@pytest.mark.parametrize(
    "settings", [dict(), dict(chunk=3, old_logps="recompute"), dict(dynamic_sampling=True)], ids=str
)
def test_what_is_sampled_ahead_does_not_depend_on_when(settings, monkeypatch):
    """On a thread while the step trains, before it or after it: the weights are those of before."""
    runs = []
    for executor in (None, Eagerly, Lazily):
        if executor:
            monkeypatch.setattr(ahead, "ThreadPoolExecutor", executor)
        module = policy(ahead="thread", **settings)
        watch = fit(module, limit_val_batches=1, val_check_interval=2, num_sanity_val_steps=1)
        runs.append([weights(module), [x.tokens for x in watch.batches], [x.extra["version"] for x in watch.batches]])
    assert equal(runs[1], runs[0])
    assert equal(runs[2], runs[0])


def test_one_step_off_is_one_step_off():
    """Step k trains on the batch that step k - 1 was given, answered by the weights from before its update."""
    module = policy(ahead="thread")
    watch = fit(module, steps=5)
    ages = [(step - x.extra["version"])[x.mask].unique().tolist() for step, x in enumerate(watch.batches)]
    assert ages == [[0], [1], [1], [1], [1]]
    prompts = [[task.prompt for task in x.tasks] for x in watch.batches]
    loader = [task.prompt for task in Letters().tasks("train")]
    assert [prompts[0], *prompts[2:]] == [loader[0:4], loader[4:8], loader[8:12], loader[12:16]]
    plain = policy()
    plain_watch = fit(plain, steps=1)
    assert equal(plain_watch.batches[0].tokens, watch.batches[0].tokens)
    replay = policy()  # the third batch, by the weights of step 1
    replay.model.load_state_dict(watch.models[1].state_dict())
    replay.generator.sync(replay.model)
    x = watch.batches[2]
    starts = [0, 4, 8, 12]
    prompts_ = [x.tokens[row, : x.starts[row]].tolist() for row in starts]
    keys = [f"0\0train\0{1}\0{x.tasks[g].key()}\0{0}\0" for g in range(4)]
    seeds = [[seed_of(key + str(i)) for i in range(4)] for key in keys]
    out = replay.generator.generate(prompts_, seeds, SAMPLING)
    got = [x.tokens[row, x.starts[row] : x.lengths[row]].tolist() for row in range(16)]
    assert got == [c.tokens.tolist() for row in out for c in row]


BLOCKS = Settings(kernel_size=4, kernel_stride=2, block_size=4, window_size=4, topk=2, dense_len=-1)


@pytest.mark.parametrize(
    "change", [lambda: TernaryQAT(group_size=8), lambda: SparseAttention(BLOCKS)], ids=["ternary", "sparse"]
)
def test_what_samples_ahead_computes_as_the_policy_does(change):
    """Of weights that stay the ratio is one, also where a callback has changed what is done with them."""
    watch = fit(policy(lr=0.0, ahead="thread"), steps=3, callbacks=[change()])
    ratios, ages = watch.ratios[-1]
    assert set(ages.tolist()) == {1}
    assert (ratios - 1).abs().max() < 1e-4


@pytest.mark.parametrize("way", [dict(chunk=2), dict(ahead="thread")], ids=str)
def test_a_second_run_begins_with_nothing(way):
    module = policy(lr=0.0, **way)
    first, second = fit(module, steps=4), fit(module, steps=4)
    assert equal([x.tokens for x in second.batches], [x.tokens for x in first.batches])
    assert equal([x.extra["version"] for x in second.batches], [x.extra["version"] for x in first.batches])


@pytest.mark.parametrize("way", [dict(chunk=2), dict(chunk=2, ahead="thread")], ids=str)
def test_a_run_may_stop_after_every_step(way):
    """A response may wait through several stops, with its place in the data."""
    straight, last = policy(**way), None
    fit(straight)
    for step in range(1, 7):
        module, saver = policy(**way), ModelCheckpoint("c", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        run = trainer(max_steps=step, callbacks=[saver], enable_checkpointing=True)
        run.fit(module, Letters(), ckpt_path=last)
        last = f"c/step={step}.ckpt"
    assert torch.equal(weights(module), weights(straight))


def test_another_chunk_than_the_checkpoints_is_refused_where_responses_would_grow_too_long():
    saver = ModelCheckpoint("c", save_last=True, every_n_train_steps=1)
    run = trainer(max_steps=2, callbacks=[saver], enable_checkpointing=True)
    run.fit(policy(chunk=2), Letters())
    with pytest.raises(ConfigurationError, match=r"chunk is 4: it must be that of the checkpoint, whose unfinished"):
        trainer(max_steps=4).fit(policy(chunk=4), Letters(), ckpt_path="c/last.ckpt")


def seed_of(name):
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


@pytest.mark.parametrize(
    ("settings", "flags", "message"),
    [
        (dict(), dict(precision="bf16-true"), "null at precision bf16-true"),
        (
            dict(generator=SimpleNamespace(exact=False, generate=lambda prompts, begun: [])),
            dict(),
            "the native engine alone",
        ),
    ],
)
def test_what_cannot_be_sampled_ahead_is_refused(settings, flags, message):
    with pytest.raises(ValueError, match=message):
        fit(policy(ahead="thread", **settings), **flags)
