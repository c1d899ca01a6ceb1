"""LUFFY: demonstrations join their groups, and every number is that of a plain implementation."""

import copy
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_callbacks import Log
from test_policy import Gradients, Letters, policy, trainer, weights

from lit_rl import DAPO, RLOO, SFT, DrGRPO, RLCallback, Sampling, Task, Verdict
from lit_rl.callbacks import ClipCov, Completions, EntropyLaw, KLCov, MajorityVote, OffPolicyMixing, RolloutStats
from lit_rl.datamodules import Bootcamp
from lit_rl.datamodules.base import TaskData
from lit_rl.report import write_report


class Watch(RLCallback):
    """Keeps the experience of each step, as it is trained on."""

    def __init__(self):
        self.seen = []

    def on_advantage(self, trainer, module, x):
        self.seen.append(x)


class Guided(TaskData):
    """Right is what begins with a digit. Some prompts have right demonstrations, some wrong, too long, several or none."""

    responses = [["7"], ["no", "42"], [], ["9" * 50, "8"], ["x"], ["1", "2", "3"], ["5" * 3000], ["ab"]]

    def __init__(self, batch_size=8):
        super().__init__(batch_size)

    def tasks(self, split):
        score = lambda text: Verdict(text[:1].isdigit(), float(text[:1].isdigit()), text[:1] or None)  # noqa: E731
        return [Task(f"{i}?", score, list(self.responses[i % 8]), id=f"id {i}") for i in range(24)]


def run(module=None, callback=None, data=None, *others, **kwargs):
    watch, log = Watch(), Log()
    module = module or policy(sampling=Sampling(max_new_tokens=6))
    t = trainer(**{"max_steps": 1, **kwargs}, callbacks=[callback or OffPolicyMixing(), *others, watch, log])
    t.fit(module, data or Guided())
    return module, watch.seen, log.rows


def test_demonstrations_join_their_groups_and_what_does_not_fit_is_counted():
    module, (x,), _ = run()
    given = x.rows(x.off_policy)
    assert given.group.tolist() == [0, 1, 3, 5]
    assert given.texts == ["7", "42", "8", "1"]
    assert given.rewards.tolist() == [1, 1, 1, 1]
    assert all(v.correct for v in given.verdicts)
    assert not given.sampler_logps.any()
    eos = module.tokenizer.eos_token_id
    for i, text in enumerate(given.texts):
        assert given.tokens[i][given.mask[i]].tolist() == [*module.tokenizer(text)["input_ids"], eos]
    assert len(x) == 8 * 4 + 4
    assert x.group.tolist() == sorted(x.group.tolist())
    counts = {name: module.counts[f"skipped/{name}"] for name in ("no_trace", "wrong_trace", "response_too_long")}
    assert counts == {"no_trace": 1, "wrong_trace": 3, "response_too_long": 2}


def test_the_entropy_law_is_of_the_policys_own_rewards_whichever_comes_first():
    before, after = EntropyLaw(), EntropyLaw()
    run(None, before, None, OffPolicyMixing())
    run(None, OffPolicyMixing(), None, after)
    assert before._points == after._points


def test_wrong_ones_and_several():
    module, (x,), _ = run(callback=OffPolicyMixing(per_group=2, keep_wrong=True))
    given = x.rows(x.off_policy)
    assert given.texts == ["7", "no", "42", "8", "x", "1", "2", "ab"]
    assert given.rewards.tolist() == [1, 0, 1, 1, 0, 1, 1, 0]
    assert module.counts["skipped/wrong_trace"] == 0


@pytest.mark.parametrize("mixed", [True, False])
def test_advantages(mixed):
    _, (x,), _ = run(policy(DrGRPO, sampling=Sampling(max_new_tokens=6)), OffPolicyMixing(mixed=mixed))
    for g in range(8):
        mine = x.group == g
        counted = mine if mixed else mine & ~x.off_policy
        want = x.rewards[mine] - x.rewards[counted].mean()
        assert torch.allclose(x.advantages[mine].amax(1) + x.advantages[mine].amin(1), want, atol=1e-6)
        assert not x.advantages[~x.mask].any()


@pytest.mark.parametrize("gamma", [0.1, None])
def test_the_gradient_is_that_of_a_plain_implementation(gamma):
    """-A f(p) on demonstrations and -A log p (the ratio is one) on the rest, less the entropy bonus, over N * L."""
    recorder = Gradients()
    settings = dict(sampling=Sampling(max_new_tokens=6), entropy_coef=0.01, clip_low=1.0, clip_high=torch.inf)
    module = policy(DrGRPO, **settings)
    model = copy.deepcopy(module.model)
    _, (x,), _ = run(module, OffPolicyMixing(gamma=gamma), None, recorder)
    total = 0
    for i in range(len(x)):
        ids = x.tokens[i, : x.lengths[i]]
        logps = model(ids[None]).logits[0, x.starts[i] - 1 : -1].log_softmax(-1)
        own = logps.gather(1, ids[x.starts[i] :, None])[:, 0]
        p = own.exp()
        reward, others = x.rewards[i], x.rewards[x.group == x.group[i]]
        shaped = (p / (p + gamma) if gamma else p) if x.off_policy[i] else own
        total = total - ((reward - others.mean()) * shaped - 0.01 * (logps.exp() * logps).sum(-1)).sum()
    (total / (len(x) * 6)).backward()
    want = torch.cat([q.grad.flatten() for q in model.parameters()])
    assert (recorder.seen[0] - want).norm() / want.norm() < 1e-4


@pytest.mark.parametrize(
    "settings", [dict(aggregate="token"), dict(aggregate="sequence"), dict(epochs=2, minibatches=2)]
)
def test_the_gradient_does_not_depend_on_the_split(settings):
    seen = []
    for tokens in (1, 60, 10**6):
        recorder = Gradients()
        module = policy(microbatch_tokens=tokens, kl_coef=0.1, **settings)
        run(module, OffPolicyMixing(), None, recorder)
        seen.append(recorder.seen)
    for got in seen[:2]:
        for step, (part, whole) in enumerate(zip(got, seen[2], strict=True)):
            assert whole.norm() > 0
            assert (part - whole).norm() / whole.norm() < (2e-5 if step == 0 else 1e-3)


def test_statistics_are_of_the_policys_own_responses():
    """Demonstrations are another's: their success, length and ratio say nothing of the policy."""
    saved = Completions()
    own, guided = (
        run(policy(epochs=2, lr=1e-9), callback, None, RolloutStats(), saved)
        for callback, saved in ((RLCallback(), RLCallback()), (OffPolicyMixing(), saved))
    )
    alone, beside = own[2][0], guided[2][0]
    for name in ("reward/all", "reward_std", "length/mean", "length/max", "ratio/p50", "clip_fraction", "invalid"):
        assert beside[name] == pytest.approx(alone[name], abs=1e-6), name
    assert beside["ess"] == pytest.approx(1, abs=1e-6)
    assert beside["off_policy/share"] == pytest.approx(4 / 36)
    assert beside["off_policy/reward"] == 1
    assert beside["off_policy/length"] == pytest.approx(9 / 4)
    records = [json.loads(line) for line in Path("completions.jsonl").read_text().splitlines()]
    given = [r for r in records if r["off_policy"]]
    assert [r["response"] for r in given] == ["7", "42", "8", "1"]
    assert all(r["mean_logp"] is None and r["correct"] and r["advantage"] > 0 for r in given)
    right = sum(r["correct"] for r in records if not r["off_policy"])
    assert f"{right} of 32 responses right" in write_report(Path("."), Path("report.html")).read_text()


def test_probabilities_are_logged():
    recorder = Watch()
    module = policy(DrGRPO, lr=0.0)
    _, (x,), (row,) = run(module, OffPolicyMixing(), None, recorder)
    signal = (x.advantages != 0) & x.mask
    p = module.logps_of(module.token_terms, x).exp()
    assert row["off_policy/prob"] == pytest.approx(float(p[signal & x.off_policy[:, None]].mean()), rel=1e-4)
    assert row["on_policy/prob"] == pytest.approx(float(p[signal & ~x.off_policy[:, None]].mean()), rel=1e-4)


def test_the_reward_of_a_demonstration_has_no_divergence():
    module = policy(RLOO, lr=1e-2)
    _, seen, _ = run(module, OffPolicyMixing(), None, max_steps=2)
    x = seen[1]
    assert (x.rewards[x.off_policy] == 1).all()
    own = x.rewards[~x.off_policy]
    assert (own != own.round()).any(), "the others' has"


def test_groups_without_success_learn_from_the_demonstration():
    class Hard(Letters):
        def tasks(self, split):
            return [Task(f"{i}", lambda text: float(text == "<answer>"), ["<answer>"]) for i in range(16)]

    module, (x,), _ = run(policy(DAPO, overlong_buffer=0.0), OffPolicyMixing(), Hard())
    assert module.counts["dynamic_sampling/rounds"] == 1
    assert x.rewards[x.off_policy].tolist() == [1] * 4
    assert (x.advantages[~x.off_policy].sum(1) < 0).all()


def test_levels_rise_with_the_policys_own_success_alone():
    data = Bootcamp(["add-columns"], level=(0, 3), adaptive=True, window=8, batch_size=8)
    run(policy(group=1), OffPolicyMixing(per_group=1), data, max_steps=4)
    assert data.current == {"add-columns": 0}


@pytest.mark.parametrize("trick", [lambda: KLCov(ratio=1.0), lambda: ClipCov(ratio=1.0, low=-1e9, high=1e9)])
def test_covariances_are_of_the_policys_own_tokens(trick):
    class Steps(RLCallback):
        seen = []

        def on_loss(self, trainer, module, x, terms):
            treated = x.extra["kl_cov"] if "kl_cov" in x.extra else (x.advantages == 0) & (x.advantages != 0).any()
            self.seen.append([int((treated & x.mask)[rows].sum()) for rows in (x.off_policy, ~x.off_policy)])

    run(policy(minibatches=2, clip_low=1.0, clip_high=torch.inf), OffPolicyMixing(), None, trick(), Steps())
    assert [given for given, _ in Steps.seen] == [0] * len(Steps.seen)
    assert sum(own for _, own in Steps.seen) > 0


@pytest.mark.parametrize("order", [1, -1])
def test_demonstrations_do_not_vote(order):
    both = [MajorityVote(samples=2), OffPolicyMixing()]
    if order == 1:
        _, (x,), _ = run(policy(group=6), both[0], None, both[1])
    else:
        _, (x,), _ = run(policy(group=6), both[1], None, both[0])
    assert x.off_policy.sum() == 4
    assert (x.rewards[x.off_policy] == 1).all()
    assert len(x) == 8 * 2 + 4


def test_a_template_that_opens_the_thinking_is_not_repeated():
    module = policy(sampling=Sampling(max_new_tokens=30))
    module.tokenizer.chat_template = "{{ messages[0].content }}<think>\n"
    x = module.demonstrations([Task("q", None, ["<think>\nso</think>7"])])
    assert module.decode(x.tokens[0].tolist()) == "q<think>\nso</think>7"
    module.tokenizer.chat_template = None
    x = module.demonstrations([Task("q", None, ["<think>\nso</think>7"])])
    assert module.decode(x.tokens[0].tolist()) == "q\n<think>\nso</think>7"


# ---------------------------------------------------------------------------------------------------------- files


def records():
    return [
        {"task": "id 0", "prompt": "another", "response": "11", "verdict": {"correct": True}},
        {"prompt": "2?", "response": "33"},
        {"prompt": [{"role": "user", "content": "chat"}], "target": [{"role": "assistant", "content": "44"}]},
        {"task": "id 2", "response": "nope"},
    ]


def write(name):
    if name.endswith("parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        plain = [{k: r.get(k) for k in ("task", "prompt", "response")} for r in records()[:2] + records()[3:]]
        parquet.write_table(pyarrow.Table.from_pylist(plain), name)
    else:
        Path(name).write_text("\n".join(map(json.dumps, records())) + "\n\n")
    return name


@pytest.mark.parametrize("name", ["traces.jsonl", "traces.parquet"])
def test_demonstrations_from_a_file(name):
    module, (x,), _ = run(callback=OffPolicyMixing(write(name)))
    given = x.rows(x.off_policy)
    assert list(zip(given.group.tolist(), given.texts, strict=True)) == [(0, "11")]
    assert module.counts["skipped/no_trace"] == 6
    assert module.counts["skipped/wrong_trace"] == 1


def test_prompts_of_messages_are_found_too():
    class Chat(Guided):
        def tasks(self, split):
            tasks = super().tasks(split)
            tasks[0] = Task([{"role": "user", "content": "chat"}], tasks[0].score)
            tasks[2].id = ""
            return tasks

    _, (x,), _ = run(callback=OffPolicyMixing(write("t.jsonl")), data=Chat())
    given = x.rows(x.off_policy)
    assert list(zip(given.group.tolist(), given.texts, strict=True)) == [(0, "44"), (2, "33")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "traces is .*: it must be a file with demonstrations: this one is empty"),
        ("{", "line 1 of t.jsonl is not JSON"),
        ('{"prompt": "x"}', "record 1 of t.jsonl is no demonstration"),
        ('{"prompt": "x", "response": 7}', "record 1 of t.jsonl is no demonstration"),
        ("[]", "record 1 of t.jsonl is no demonstration"),
        ('{"response": "x"}', "record 1 of t.jsonl has neither a `task` nor a `prompt`"),
    ],
)
def test_bad_files_are_explained(content, message):
    Path("t.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        run(callback=OffPolicyMixing("t.jsonl"))


def test_other_mistakes():
    for settings, message in [
        (dict(traces="nowhere.jsonl"), "traces is nowhere.jsonl: it must be a file"),
        (dict(gamma=0.0), "gamma is 0.0: it must be above 0"),
        (dict(per_group=0), "per_group is 0: it must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            OffPolicyMixing(**settings)
    with pytest.raises(
        ValueError, match="OffPolicyMixing does not work with SFT: it trains on demonstrations by itself"
    ):
        run(SFT("tiny"))
    write("t.jsonl")
    message = "t.jsonl knows none of its tasks' ids and prompts, but such as 'id 0'"
    with pytest.warns(UserWarning, match=message) as caught:
        run(callback=OffPolicyMixing("t.jsonl"), data=Letters(), max_steps=2)
    assert sum(message in str(w.message) for w in caught) == 1


def test_resume_is_exact():
    write("t.jsonl")

    def train(**kwargs):
        saver = ModelCheckpoint("saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        module = policy()
        t = trainer(max_steps=4, callbacks=[OffPolicyMixing("t.jsonl"), saver], enable_checkpointing=True)
        t.fit(module, Guided(), **kwargs)
        return weights(module)

    assert torch.equal(train(), train(ckpt_path="saved/step=2.ckpt"))
