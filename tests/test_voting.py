"""TTRL: the vote, what it rewards, and that no label reaches the training."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_callbacks import Log
from test_policy import Gradients, Letters, policy, trainer, weights

from lit_rl import DAPO, SFT, RLCallback, Sampling, Verdict
from lit_rl.callbacks import Completions, MajorityVote, RolloutStats
from lit_rl.datamodules import Bootcamp
from lit_rl.voting import vote


def first_letter(text, right="AEIOU"):
    """Votes for one of three kinds of beginning; a response that begins otherwise has no answer."""
    kinds = [kind for kind, letters in {"vowel": "aeiouAEIOU", "digit": "0123456789", "sign": "+-*/=<>"}.items()
             if text[:1] and text[0] in letters]  # fmt: skip
    correct = bool(text) and text[0] in right
    return Verdict(correct, float(correct), kinds[0] if kinds else None)


def wrong(text):
    verdict = first_letter(text)
    return Verdict(not verdict.correct, 1 - verdict.score, verdict.answer)


class Seen(RLCallback):
    """Keeps what an experience is at this place among the callbacks."""

    def __init__(self):
        self.seen = []

    def on_rollout(self, trainer, module, x):
        self.seen.append((x.group.tolist(), list(x.texts), list(x.verdicts), x.rewards.tolist()))


def test_the_vote_by_hand():
    answers = ["b", "a", "a", "b", None, None, None, " ", "c", None, "d"]
    group = [0, 0, 0, 0, 0, 0, 0, 0, 3, 5, 3]
    result = vote(answers, group)
    assert result.labels == {0: "b", 3: "c", 5: None}, "ties go to the first, blanks never win"
    assert result.votes == {0: {"b": 2, "a": 2}, 3: {"c": 1, "d": 1}, 5: {}}
    assert result.wins == [True, False, False, True, False, False, False, False, True, False, False]
    weighted = vote(answers, group, [1, 1, 1.5, 1, 9, 9, 9, 9, 0, 1, 0.25])
    assert weighted.labels == {0: "a", 3: "d", 5: None}
    assert weighted.votes == {0: {"b": 2, "a": 2.5}, 3: {"d": 0.25}, 5: {}}
    assert vote([], []).labels == {}
    assert vote(["x"] * 3 + ["y"] * 10, [0] * 13, [1 / 3] * 3 + [0.1] * 10).labels == {0: "x"}, "sums are exact"
    for weight in (-1, float("nan")):
        with pytest.raises(ValueError, match="a vote weighs"):
            vote(["x"], [0], [weight])


def test_rewards_are_the_votes_of_all_and_some_are_trained_on():
    before, after, log = Seen(), Seen(), Log()
    module = policy(group=12, sampling=Sampling(max_new_tokens=2))
    run = trainer(max_steps=1, callbacks=[before, MajorityVote(samples=5), after, Completions(), log])
    run.fit(module, Letters(batch_size=6, score=first_letter))
    (group, texts, verdicts, rewards), (kept, kept_texts, _, given) = before.seen[0], after.seen[0]
    assert Counter(group) == dict.fromkeys(range(6), 12)
    assert Counter(kept) == dict.fromkeys(range(6), 5)

    agreed, ratios, right, expected = 0, [], 0, []
    for g in range(6):
        mine = [i for i in range(72) if group[i] == g]
        assert [kept_texts[i] for i in range(30) if kept[i] == g] == [texts[i] for i in mine[:5]]
        answers = [verdicts[i].answer for i in mine]
        counts = {a: answers.count(a) for a in answers if a}
        label = max(counts, key=counts.get) if counts else "nothing"
        expected += [float(a == label) for a in answers[:5]]
        agreed += sum((verdicts[i].answer == label) == verdicts[i].correct for i in mine)
        ratios.append(max(counts.values(), default=0) / 12)
        right += any(verdicts[i].correct for i in mine if verdicts[i].answer == label)
    assert given == expected
    assert 0 < sum(given) < 30
    row = log.rows[0]
    assert row["vote/majority_ratio"] == pytest.approx(sum(ratios) / 6)
    assert row["vote/label_accuracy"] == pytest.approx(right / 6)
    assert row["vote/reward_accuracy"] == pytest.approx(agreed / 72)
    assert row["vote/true_reward"] == pytest.approx(sum(rewards) / 72)
    assert row["vote/blank"] == pytest.approx(sum(v.answer is None for v in verdicts) / 72)
    assert row["vote/no_label"] == sum(not r for r in ratios) / 6
    assert float(run.callback_metrics["reward"]) == pytest.approx(sum(given) / 30)


@pytest.mark.parametrize("method", [policy, lambda **kwargs: policy(DAPO, max_rounds=3, **kwargs)])
def test_no_label_reaches_the_training(method):
    ends = []
    for score in (first_letter, wrong):
        module = method(group=8, sampling=Sampling(max_new_tokens=3))
        start = weights(module).clone()
        trainer(callbacks=[MajorityVote(samples=4)]).fit(module, Letters(score=score))
        assert not torch.equal(start, weights(module))
        ends.append(weights(module))
    assert torch.equal(*ends)


def test_unanimity_ends_dynamic_sampling_in_peace():
    """Also when the one answer is wrong: nobody can know."""
    run = trainer(max_steps=50, callbacks=[MajorityVote()])
    with pytest.warns(UserWarning, match="there is nothing left to learn"):
        run.fit(policy(DAPO), Letters(score=lambda text: Verdict(False, 0.0, "always")))
    assert run.global_step == 1


def test_responses_that_could_not_be_judged_do_not_vote():
    def score(text):
        if text[:1] < "M":
            raise RuntimeError("boom")
        return Verdict(False, 0.0, "late" if text[:1] < "d" else "later")

    class Watch(RLCallback):
        def on_advantage(self, trainer, module, x):
            self.x = x

    watch, log = Watch(), Log()
    trainer(max_steps=1, callbacks=[MajorityVote(), watch, log]).fit(policy(group=8), Letters(score=score))
    x = watch.x
    assert 0 < (~x.valid).sum() < len(x)
    assert not x.rewards[~x.valid].any()
    ratios = []
    for g in range(4):
        answers = [v.answer for v, h in zip(x.verdicts, x.group.tolist(), strict=True) if h == g and v.valid]
        ratios.append(max(Counter(answers).values()) / len(answers))
    assert log.rows[0]["vote/majority_ratio"] == pytest.approx(sum(ratios) / 4)


def test_tasks_without_answers_are_reported():
    with pytest.warns(UserWarning, match="none of 16 responses has an answer that could be voted for"):
        trainer(max_steps=1, callbacks=[MajorityVote()]).fit(policy(), Letters())


def test_without_labels_no_accuracy_is_logged():
    log = Log()
    run = trainer(max_steps=1, callbacks=[MajorityVote(labelled=False), log])
    run.fit(policy(), Letters(score=first_letter))
    assert {name for name in log.rows[0] if name.startswith("vote/")} == {
        "vote/majority_ratio",
        "vote/no_label",
        "vote/blank",
    }


@pytest.mark.parametrize(
    ("callback", "module", "data", "message"),
    [
        (lambda: MajorityVote(samples=0), policy, Letters, "samples is 0: it must be at least 1"),
        (MajorityVote, lambda: SFT("tiny"), Letters, "MajorityVote does not work with SFT: it samples no responses"),
        (MajorityVote, policy, lambda: Bootcamp(["add-columns"], adaptive=True), "adaptive is True: it must be False"),
    ],
)
def test_mistakes(callback, module, data, message):
    with pytest.raises((ValueError, TypeError), match=message):
        trainer(callbacks=[callback()]).fit(module(), data())


def test_the_gradient_does_not_depend_on_the_split():
    seen = []
    for tokens in (1, 60, 10**6):
        recorder = Gradients()
        module = policy(group=8, microbatch_tokens=tokens, aggregate="sequence", minibatches=2)
        trainer(max_steps=1, callbacks=[MajorityVote(samples=3), recorder]).fit(module, Letters(score=first_letter))
        seen.append(recorder.seen)
    for got in seen[:2]:
        for step, (part, whole) in enumerate(zip(got, seen[2], strict=True)):
            assert (part - whole).norm() / whole.norm() < (2e-5 if step == 0 else 1e-3)


def test_resume_is_exact():
    def run(**kwargs):
        saver = ModelCheckpoint("saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        module, callback = policy(group=8), MajorityVote(samples=4)
        trainer(
            max_steps=5,
            callbacks=[callback, RolloutStats(), saver],
            enable_checkpointing=True,
            limit_val_batches=1,
            val_check_interval=3,
        ).fit(module, Letters(score=first_letter), **kwargs)
        return callback.state_dict(), weights(module)

    straight, resumed = run(), run(ckpt_path="saved/step=2.ckpt")
    assert straight[0] == resumed[0]
    assert straight[0]["agreement"][1] == 8
    assert straight[0]["best"]
    assert torch.equal(straight[1], resumed[1])


@pytest.mark.parametrize(
    ("ratios", "scores", "warned"),
    [
        ([0.2, 0.3, 0.4], [0.5, 0.4, 0.3], True),
        ([0.2, 0.3, 0.4], [0.3, 0.4, 0.5], False),
        ([0.5, 0.3, 0.2], [0.5, 0.4, 0.3], False),  # worse, but not surer
        ([0.2, 0.3, 0.1, 0.3], [0.5, 0.4, 0.4, 0.4], False),  # not twice in a row
    ],
)
def test_rising_agreement_and_falling_validation_are_noticed(ratios, scores, warned, recwarn):
    callback = MajorityVote()
    for ratio, score in zip(ratios, scores, strict=True):
        callback.load_state_dict({**callback.state_dict(), "agreement": [10 * ratio, 10]})
        metrics = {"val/pass@1": torch.tensor(score)}
        callback.on_validation_end(SimpleNamespace(callback_metrics=metrics, sanity_checking=False), None)
    assert any("agrees with itself more and is right less" in str(w.message) for w in recwarn) == warned


def test_a_bootcamp_family_votes_over_canonical_answers():
    task = Bootcamp(["add-columns"]).tasks("train")[0]
    right = task.score(task.responses[0]).answer
    said = [f"<answer>{text}</answer>" for text in (f"**{right}**", f"{right}.", f" {int(right):,} ", "12", "0", "x")]
    answers = [task.score(text).answer for text in said]
    assert vote(answers, [0] * 6).votes[0] == {right: 3, "12": 1, "0": 1}
