"""DataModules: mixtures, levels, splits, promotion, and a loader that resumes."""

import pickle
from collections import Counter

import pytest
from test_policy import policy, trainer

from lit_rl import SFT, Sampling
from lit_rl.datamodules import Bootcamp, Vowels
from lit_rl.datamodules.base import ResumableLoader
from lit_rl.datamodules.families import families

THREE = ["add-columns", "sort-numbers", "spell-backwards"]


def test_items_are_the_same_everywhere_and_splits_differ():
    a, b = Bootcamp(THREE, level=(0, 3)), Bootcamp(THREE, level=(0, 3))
    for split in ("train", "validation", "test"):
        first = [a.tasks(split)[i] for i in range(50)]
        assert [t.text() for t in first] == [b.tasks(split)[i].text() for i in range(50)]
    held_out = {a.tasks(s)[i].text() for s in ("validation", "test") for i in range(200)}
    assert not held_out & {a.tasks("train")[i].text() for i in range(2000)}
    assert [a.tasks("train")[i].text() for i in range(20)] != [
        Bootcamp(THREE, level=(0, 3), seed=1).tasks("train")[i].text() for i in range(20)
    ]


def test_every_task_scores_its_own_solution_after_travelling():
    data = Bootcamp(level=(0, 9), val_size=3 * len(families()))
    assert len({data.tasks("validation")[i].family for i in range(len(families()))}) == len(families())
    for i in range(3 * len(families())):
        task = pickle.loads(pickle.dumps(data.tasks("validation")[i]))
        assert task.score(task.responses[0]).correct
        assert not task.score("I do not know").correct


def test_weights_and_levels():
    data = Bootcamp({"add-columns": 3, "sort-numbers": 1}, level=(2, 4))
    drawn = [data.tasks("train")[i] for i in range(2000)]
    assert Counter(t.family for t in drawn)["add-columns"] / 2000 == pytest.approx(0.75, abs=0.04)
    levels = Counter(t.meta["level"] for t in drawn)
    assert set(levels) == {2, 3, 4}
    assert min(levels.values()) / 2000 == pytest.approx(1 / 3, abs=0.05)
    held_out = Counter((t.family, t.meta["level"]) for t in map(data.tasks("test").__getitem__, range(60)))
    assert set(held_out.values()) == {10}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(families=["add-colums"]), "did you mean add-columns"),
        (dict(families=["nowhere.Family"]), "cannot import the family 'nowhere.Family'"),
        (dict(families=["lit_rl.task.Task"]), "is not a subclass of"),
        (dict(families={"add-columns": 0}), "weight of family add-columns is 0"),
        (dict(families=THREE, level=(3, 1)), "the lowest comes first"),
        (dict(families=THREE, level=(0, 10)), "has levels 0 to 9"),
        (dict(families=THREE, promote_at=0), "promote_at is 0"),
        (dict(families=THREE, batch_size=0), "batch_size is 0"),
        (dict(families=THREE, val_size=0), "val_size is 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Bootcamp(**settings)


def test_fewer_tasks_than_a_batch_are_refused():
    with pytest.raises(ValueError, match="batch_size is 8: it must be at most 6, since there are 6 tasks for 1 ranks"):
        trainer().fit(policy(), Bootcamp(THREE, size=6, batch_size=8))


def test_the_loader_resumes_where_it_stopped():
    loader = ResumableLoader(list(range(10)), batch_size=3, drop_last=True)
    seen = [batch for _, batch in zip(range(2), loader, strict=False)]
    state = loader.state_dict()
    again = ResumableLoader(list(range(10)), batch_size=3, drop_last=True)
    again.load_state_dict(state)
    assert seen + list(again) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert list(again) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]], "only the first epoch is shortened"


def test_levels_rise_with_success():
    class Right(Bootcamp):
        """Every response is right."""

        def tasks(self, split):
            inner = super().tasks(split)

            class Easy:
                __len__ = inner.__len__

                def __getitem__(self, i):
                    task = inner[i]
                    task.score = lambda text: 1.0
                    return task

            return Easy()

    data = Right(["add-columns"], level=(1, 3), adaptive=True, window=32, batch_size=4)
    assert {Bootcamp.tasks(data, "train")[i].meta["level"] for i in range(20)} == {1}
    trainer(max_steps=4).fit(policy(), data)  # 16 responses a step
    assert data.current == {"add-columns": 3}
    assert {Bootcamp.tasks(data, "train")[i].meta["level"] for i in range(20)} == {3}
    trainer(max_steps=4).fit(policy(), data)
    assert data.current == {"add-columns": 3}, "the highest level is the last"

    fresh = Right(["add-columns"], level=(1, 3), adaptive=True, window=32)
    fresh.load_state_dict(pickle.loads(pickle.dumps(data.state_dict())))
    assert fresh.current == data.current


def test_worked_solutions_teach():
    run = trainer(max_steps=60)
    run.fit(
        SFT("tiny", lr=3e-3, sampling=Sampling(max_new_tokens=16)),
        Bootcamp(["spell-backwards"], level=0, batch_size=16, hint=False),
    )
    assert float(run.callback_metrics["loss"]) < 1.5  # from log(103) = 4.6


def test_vowels_are_learned_from_nothing():
    run = trainer(max_steps=20)
    module = policy(group=8, sampling=Sampling(max_new_tokens=8), lr=2e-3)
    run.fit(module, Vowels())
    run.test(module, Vowels(), verbose=False)
    assert module.table.rows[-1].score > 0.6  # five of a hundred characters are vowels


class TestReasoningGym:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("reasoning_gym")

    def test_tasks_score_their_references(self):
        from lit_rl.datamodules import ReasoningGym

        data = ReasoningGym(["leg_counting", "spell_backward", "gcd"], val_size=30, test_size=30)
        for split in ("train", "validation", "test"):
            for i in range(15):
                task = pickle.loads(pickle.dumps(data.tasks(split)[i]))
                assert task.score(f"so {task.responses[0]}").correct
                assert not task.score("<answer>zzz</answer>").correct
        train = {data.tasks("train")[i].text() for i in range(300)}
        assert not train & data.held_out()

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("countdown", "runs the answer as code"),
            ("game_of_life_halting", "accepts any text"),
            ("leg_countin", "did you mean leg_counting"),
        ],
    )
    def test_unsound_ones_are_refused(self, name, message):
        from lit_rl.datamodules import ReasoningGym

        with pytest.raises(ValueError, match=message):
            ReasoningGym([name])
