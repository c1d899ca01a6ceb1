"""Several policies in one run: what each learns is what it would learn alone from the rewards that the vote gives."""

import copy
from collections import Counter
from itertools import combinations
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_policy import Letters, trainer, weights
from test_resume import TOKENIZER, Easy, equal, judge, left
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from lit_rl import GRPO, RLCCF, RLCallback, Rollout, Sampling, Task, jsonl
from lit_rl.callbacks import ClipCov, Completions, EntropyLaw, EntropyMonitor, KLCov, MajorityVote, RolloutStats
from lit_rl.export import export_checkpoint
from lit_rl.run import RunLogger
from lit_rl.voting import collective_vote

ARCHITECTURES = {
    "qwen2": transformers.Qwen2Config,
    "llama": transformers.LlamaConfig,
    "gemma": transformers.GemmaConfig,
}


class Answers(Letters):
    def tasks(self, split):
        tasks = super().tasks(split)
        for task in tasks:
            task.score, task.family = judge, "even" if len(task.prompt) % 2 else "odd"
        return tasks


def reversed_tokenizer():
    """The tiny tokenizer's letters under other numbers, and fewer of them."""
    letters = [
        "<end>",
        *sorted((token for token in TOKENIZER.get_vocab() if len(token) == 1 and token != "~"), reverse=True),
    ]
    inner = Tokenizer(BPE({token: i for i, token in enumerate(letters)}, merges=[], unk_token="<end>"))
    inner.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")


def member(kind="llama", seed=0, tokenizer=TOKENIZER, positions=2048, method=GRPO, **settings):
    torch.manual_seed(seed)
    config = ARCHITECTURES[kind](
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.06,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    defaults = dict(group=4, lr=1e-3, sampling=Sampling(max_new_tokens=5), minibatches=2)
    return method(model, tokenizer=copy.deepcopy(tokenizer), **{**defaults, **settings})


def group(**settings):
    return RLCCF([member("llama"), member("qwen2", 1), member("gemma", 2, reversed_tokenizer())], **settings)


def fit(module, folder="r", callbacks=(), **settings):
    run = trainer(
        **{"max_steps": 3, "gradient_clip_val": 0.3, "limit_val_batches": 2, "val_check_interval": 1, **settings},
        logger=RunLogger(folder),
        log_every_n_steps=1,
        callbacks=list(callbacks),
    )
    run.fit(module, Answers())
    return run


class Watch(RLCallback):
    """Each call of `on_rollout`, by member."""

    def __init__(self):
        self.seen = []

    def on_rollout(self, trainer, module, x):
        self.seen.append((module.name, x.rewards.clone(), [v.answer for v in x.verdicts], x.group, x.texts))


@pytest.mark.parametrize("trick", [ClipCov(0.1, low=0.0), KLCov(0.1)], ids=["clip_cov", "kl_cov"])
def test_one_member_is_ttrl_on_all_votes(trick):
    def monitors():
        return [copy.deepcopy(trick), EntropyMonitor(), EntropyLaw(), RolloutStats(), Completions()]

    alone, both = member(), RLCCF([member()])
    run = fit(alone, "alone", [MajorityVote(samples=4), *monitors()])
    other = fit(both, "group", monitors())
    assert equal(both.members[0].state_dict(), alone.state_dict())
    assert equal(other.optimizers[0].state_dict(), run.optimizers[0].state_dict())
    rows, mine = (left(folder)["metrics"] for folder in ("alone", "group"))
    assert f"{trick.name}/covariance" in rows
    for want, got in zip(*(jsonl.read(Path(folder, "metrics.jsonl")) for folder in ("alone", "group")), strict=True):
        for name, value in want.items():
            if name.startswith(("vote/", "val/", "seconds/", "tokens_per", "step", "epoch")):
                continue
            assert str(got[f"llama/{name}"]) == str(value), name
        if "loss" in want:
            assert got["vote/label_accuracy"] == want["vote/label_accuracy"]
            assert got["llama/reward_accuracy"] == pytest.approx(want["vote/reward_accuracy"])
        else:
            assert got["val/llama/pass@1"] == want["val/pass@1"]
    samples = [[{**r, "member": ""} for r in jsonl.read(Path(f, "completions.jsonl"))] for f in ("alone", "group")]
    assert samples[0] == samples[1]
    assert rows != mine


def naive_label(answers, weighted):
    """Of lists of answers, each member's; in exact fractions of K."""
    votes = Counter()
    for given_ in answers:
        counts = Counter(a for a in given_ if a is not None)
        trust = max(counts.values(), default=0) / len(given_) if weighted and given_ else 1
        for a in given_:
            if a is not None:
                votes[a] += trust
    return votes


@given(st.lists(st.lists(st.sampled_from(["a", "b", "c", None]), max_size=4), min_size=1, max_size=4), st.booleans())
def test_the_vote_is_the_formula(answers, weighted):
    result, want = collective_vote(answers, weighted), naive_label(answers, weighted)
    flat = [a for given_ in answers for a in given_]
    assert result.votes.get(0, {}) == pytest.approx({a: v for a, v in want.items() if v})
    label = result.labels.get(0)
    assert (label is None) == (not +want)
    assert label is None or want[label] == pytest.approx(max(want.values()))
    assert result.wins == [a is not None and a == label for a in flat]


@pytest.mark.parametrize("weighted", [True, False])
def test_all_members_learn_from_the_label_of_all(weighted):
    watch, module = Watch(), group(self_consistency=weighted)
    before = [weights(one).clone() for one in module.members]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "__deepcopy__", lambda self, memo: self, raising=False)  # one list of all
        fit(module, callbacks=[watch], max_steps=1)
    assert [name for name, *_ in watch.seen] == ["llama", "qwen2", "gemma"]
    assert not any(torch.equal(weights(one), old) for one, old in zip(module.members, before, strict=True))
    labels = []
    for g in range(4):
        rows = [(group_ == g).nonzero().flatten().tolist() for *_, group_, _ in watch.seen]
        answers = [[seen[2][i] for i in part] for seen, part in zip(watch.seen, rows, strict=True)]
        votes = naive_label(answers, weighted)
        label = max(votes, key=votes.__getitem__)
        labels.append(label)
        for (_, rewards, _, _, _), part, given_ in zip(watch.seen, rows, answers, strict=True):
            assert rewards[part].tolist() == [float(a == label) for a in given_]
    assert len(set(labels)) > 1, "the test is too easy"
    texts = [set(seen[4]) for seen in watch.seen]
    assert not texts[0] & texts[1]


def test_members_of_one_model_draw_numbers_of_their_own():
    module = RLCCF([member(), member()])
    first, second = (one.seeds([Task("x")], 2, "eval")[0] for one in module.members)
    assert first == member().seeds([Task("x")], 2, "eval")[0]
    assert not set(first) & set(second)
    assert [one.name for one in module.members] == ["llama", "llama-2"]


def test_learning_rates_and_clipping_are_each_members_own():
    class Norms(L.Callback):
        seen = []

        def on_train_batch_end(self, trainer, module, *args):
            norms = [[p.grad.norm() for p in one.parameters() if p.grad is not None] for one in module.members]
            self.seen += [float(torch.stack(each).norm()) for each in norms if each]

    module = RLCCF([member(lr=0.0), member("qwen2"), member("gemma", lr=1e-2)])
    before = [weights(one).clone() for one in module.members]
    run = fit(module, callbacks=[Norms(), ClipCov(0.1)], gradient_clip_val=0.01)
    assert Norms.seen
    assert Norms.seen == pytest.approx([0.01] * len(Norms.seen), rel=1e-3)  # not of all together
    moved = [float((weights(one) - old).norm()) for one, old in zip(module.members, before, strict=True)]
    assert moved[0] == 0 < 2 * moved[1] < moved[2]
    assert [one.rate for one in module.members] == [0.0, 1e-3, 1e-2]
    assert run.callback_metrics["llama/clip_cov/entropy_change_predicted"] == 0


def test_a_member_that_diverges_stops_no_other():
    class Poison(RLCallback):
        def on_loss(self, trainer, module, x, terms):
            if module.name in bad:
                terms.loss = terms.loss * float("nan")

    good, poisoned, bad = group(), group(), ["qwen2"]
    fit(good, "good", max_steps=1)
    fit(poisoned, "poisoned", [Poison()], max_steps=1)
    first, second, third = poisoned.members
    assert second.counts["skipped/non_finite"] == 2
    assert torch.equal(weights(second), weights(member("qwen2", 1)))
    assert torch.equal(weights(first), weights(good.members[0]))
    assert torch.equal(weights(third), weights(good.members[2]))
    bad.append(first.name)
    fit(group(), "both", [Poison()], max_steps=1)
    assert {p.name for p in Path("both").glob("non_finite*")} == {f"non_finite-0-{name}.pt" for name in bad}


def test_devices_of_their_own_change_nothing():
    """Here both are the CPU: members sample in threads."""
    together, apart = group(), group(devices=["cpu"] * 3)
    fit(together, "together")
    fit(apart, "apart")
    assert equal(apart.state_dict(), together.state_dict())


def test_a_member_may_have_to_leave_prompts_out():
    module = RLCCF([member(), member("qwen2", 1, positions=20)])
    watch = Watch()
    run = fit(module, callbacks=[watch])
    assert run.callback_metrics["qwen2/skipped/prompt_too_long"] > 0
    assert run.callback_metrics["qwen2/reward"] >= 0


def test_each_appearance_of_a_task_counts():
    """Of one object that the data give often, or of as many that are equal."""

    class Often(Answers):
        def tasks(self, split):
            return super().tasks(split)[:1] * 8

    class Equal(Often):
        def tasks(self, split):
            return [*map(copy.copy, super().tasks(split))]

    modules = [group(), group()]
    for module, data in zip(modules, (Often(), Equal()), strict=True):
        trainer(max_steps=1, limit_val_batches=1).fit(module, data)
    assert equal(modules[1].state_dict(), modules[0].state_dict())
    assert [module.table.rows[-1].items for module in modules] == [4, 4]


def test_evaluation_has_each_members_table_the_groups_and_agreement():
    module = group()
    for one in module.members:
        one.eval_samples = 3
    run, tasks = trainer(limit_val_batches=1.0, logger=RunLogger("r")), Answers().tasks("val")[:8]
    run.validate(module, torch.utils.data.DataLoader(tasks, batch_size=4, collate_fn=list), verbose=False)
    judged = [one.judge(*one.answer(tasks)) for one in module.members]
    metrics = {k: float(v) for k, v in run.callback_metrics.items()}
    families = sorted({task.family for task in tasks})
    right, same = {f: [] for f in families}, {pair: [] for pair in combinations(range(3), 2)}
    for i, task in enumerate(tasks):
        verdicts = [items[i][1] for items in judged]
        votes = naive_label([[v.answer for v in each] for each in verdicts], True)
        label = max(votes, key=votes.__getitem__)
        right[task.family].append(next(v.correct for each in verdicts for v in each if v.answer == label))
        own = [Counter(v.answer for v in each if v.answer is not None).most_common(1)[0][0] for each in verdicts]
        for a, b in same:
            same[a, b].append(own[a] == own[b])
    for family in families:
        assert metrics[f"val/pass@1/{family}"] == pytest.approx(sum(right[family]) / len(right[family]))
        for one, items in zip(module.members, judged, strict=True):
            of = [v.correct for task, each, _ in items if task.family == family for v in each]
            assert metrics[f"val/{one.name}/pass@1/{family}"] == pytest.approx(sum(of) / len(of))
    names = [one.name for one in module.members]
    for (a, b), agreed in same.items():
        assert metrics[f"val/agreement/pass@1/{names[a]}+{names[b]}"] == pytest.approx(sum(agreed) / len(agreed))
    (record,) = jsonl.read(Path("r/evaluations.jsonl"))
    assert list(record["parts"]) == [*names, "agreement"]
    predictions = run.predict(module, torch.utils.data.DataLoader(tasks, batch_size=4, collate_fn=list))
    assert Counter(r["member"] for batch in predictions for r in batch) == dict.fromkeys(names, 24)


def test_members_leave_a_checkpoint_and_folders():
    module = group()
    run = fit(module, callbacks=[EntropyLaw()])
    run.save_checkpoint("x.ckpt")
    module.export("exported")
    export_checkpoint("x.ckpt", "again")
    for one in module.members:
        for folder in ("exported", "again"):
            assert torch.equal(weights(Rollout(f"{folder}/{one.name}")), weights(one))
    with pytest.raises(ValueError, match=r"the checkpoint's members is \['llama', 'qwen2', 'gemma'\]: it must be"):
        trainer(max_steps=4).fit(RLCCF([member()]), Answers(), ckpt_path="x.ckpt")


def test_named_members_load_from_a_checkpoint():
    torch.manual_seed(0)
    module = RLCCF("tiny", members=2, lr=[1e-3, 1e-4], group=2, sampling=Sampling(max_new_tokens=4))
    assert [type(one.model).__name__ for one in module.members] == ["LlamaForCausalLM", "Qwen2ForCausalLM"]
    assert [one.lr for one in module.members] == [1e-3, 1e-4]
    run = trainer(max_steps=1)
    run.fit(module, Answers())
    run.save_checkpoint("x.ckpt")
    assert equal(RLCCF.load_from_checkpoint("x.ckpt").state_dict(), module.state_dict())


def test_callbacks_are_each_members_own_and_a_second_run_keeps_them():
    module, law = group(), EntropyLaw()
    run = fit(module, callbacks=[law])
    points = [copied._points for copied in next(c for c in run.callbacks if c.state_key == law.state_key).callbacks]
    assert points[0] is law._points
    assert len({str(p) for p in points}) == 3
    run.fit_loop.epoch_loop.max_steps = 4
    run.fit(module, Answers())
    assert [type(c).__name__ for c in run.callbacks].count("ForEach") == 1
    assert len(law._points) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(members=0), "members is 0: it must be at least 1"),
        (dict(model=[]), "members is .*: it must be policies that differ"),
        (dict(lr=[1e-3]), r"lr is \[0.001\]: it must be a number, or one for each of 4 members"),
        (dict(devices=["cpu"]), r"devices is \['cpu'\]: it must be null, or one for each of 4 members"),
        (dict(generator=object()), "generator is one for several members: it must be null"),
        (dict(dynamic_sampling=True), "dynamic_sampling is True: it must be false"),
        (dict(model=lambda: [member(epochs=2), member()]), "epochs is .*: it must be the same for all members"),
        (dict(model=lambda: [member()] * 2), "it must be policies that differ"),
    ],
)
def test_bad_settings(settings, message):
    model = settings.pop("model", "tiny")
    with pytest.raises(ValueError, match=message):
        RLCCF(model() if callable(model) else model, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(callbacks=[MajorityVote()]),
            "MajorityVote does not work with RLCCF: its members learn from a vote of their own",
        ),
        (dict(strategy=ModelParallelStrategy()), r"RLCCF cannot shard its members \(ModelParallelStrategy\)"),
        (dict(accumulate_grad_batches=2), "accumulate_grad_batches is 2"),
    ],
)
def test_what_cannot_work_is_refused_before_training(settings, message):
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        trainer(**settings).fit(group(), Answers())


def test_labels_do_not_raise_levels():
    with pytest.raises(ValueError, match="adaptive is True: it must be False"):
        trainer().fit(group(), Easy(adaptive=True))
