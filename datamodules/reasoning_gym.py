"""ReasoningGym: the procedural data sets of the package reasoning-gym as tasks (extra `reasoning-gym`)."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from lit_rl.task import Task, Verdict

from .base import TaskData
from .families.answers import AnswerError, extract, wrap

_CODE = "its scorer runs the answer as code"
REFUSED = {
    **dict.fromkeys(
        ("binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication", "puzzle24",
         "simple_integration", "spiral_matrix", "string_insertion"), _CODE),
    "game_of_life_halting": "its scorer accepts any text",
    "coin_flip": 'its scorer gives "0" full marks',
    **dict.fromkeys(("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"), "it has no reference answer"),
    "composite": "name its members instead",
}  # fmt: skip
"""Data sets of reasoning-gym 0.1.25 that are not safe or not sound to train on, and why."""
STRIDE = 10**8
"""Seeds of a split. Item i of seed s is drawn from s + i there, so that neighbouring seeds share their items."""


@dataclass
class Score:
    """Judges a response by the data set's own scorer; picklable."""

    dataset: str
    entry: dict[str, Any]

    def __call__(self, text: str) -> Verdict:
        import reasoning_gym

        try:
            answer = extract(text)
        except AnswerError as error:
            return Verdict(False, 0.0, None, str(error))
        score = float(reasoning_gym.get_score_answer_fn(self.dataset)(answer, self.entry))
        return Verdict(score >= 1.0, score, answer, "" if score >= 1.0 else "wrong answer")


class ReasoningGym(TaskData):
    """Tasks of reasoning-gym, data sets in turn, each with the package's default difficulty.

    Answers are read by lit-rl's grammar (the last `<answer>` block). Training skips questions of the held-out sets. Data
    sets whose scorers execute the answer, or accept wrong ones, are refused.

    Args:
        datasets: Names, or names with settings such as {"leg_counting": {"max_animals": 5}}.
        size: Training tasks.
        val_size: Validation tasks.
        test_size: Test tasks.
        seed: Of the training tasks; the held-out ones are always the same.
        kwargs: As in TaskData.
    """

    def __init__(
        self,
        datasets: list[str] | dict[str, dict[str, Any]],
        *,
        size: int = 100_000,
        val_size: int = 200,
        test_size: int = 400,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        try:
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise ImportError(
                "ReasoningGym needs the package reasoning-gym: pip install 'lit-rl[reasoning-gym]'"
            ) from error
        self.settings = datasets if isinstance(datasets, dict) else {name: {} for name in datasets}
        for name in self.settings:
            if name in REFUSED:
                raise ValueError(f"reasoning-gym's {name} is refused: {REFUSED[name]}")
            if name not in DATASETS:
                close = get_close_matches(name, DATASETS, n=3)
                raise ValueError(
                    f"reasoning-gym has no data set {name!r}"
                    + (f": did you mean {' or '.join(close)}?" if close else "")
                )
        if not self.settings or not 0 < size <= STRIDE or val_size < 1 or test_size < 1:
            raise ValueError(
                f"ReasoningGym needs data sets, and sizes from 1 to {STRIDE}: got {size}, {val_size}, {test_size}"
            )
        self.sizes = {"train": size, "validation": val_size, "test": test_size}
        self.seeds = {"validation": 0, "test": STRIDE, "train": (2 + seed) * STRIDE}
        self._held_out: set[str] | None = None

    def tasks(self, split: str) -> _Split:
        return _Split(self, split)

    def held_out(self) -> set[str]:
        if self._held_out is None:
            self._held_out = {
                t.text()
                for split in ("validation", "test")
                for t in map(self.tasks(split).__getitem__, range(self.sizes[split]))
            }
        return self._held_out


class _Split:
    def __init__(self, data: ReasoningGym, split: str) -> None:
        import reasoning_gym

        self.data, self.split = data, split
        self.sets = [
            (name, reasoning_gym.create_dataset(name, seed=data.seeds[split], size=data.sizes[split], **settings))
            for name, settings in data.settings.items()
        ]

    def __len__(self) -> int:
        return self.data.sizes[self.split]

    def __getitem__(self, index: int) -> Task:
        if not 0 <= index < len(self):
            raise IndexError(f"task {index} of {len(self)}")
        turn, place = divmod(index, len(self.sets))
        name, source = self.sets[place]
        for shift in range(200):
            number = (turn + shift * 7919) % len(source)
            entry = source[number]
            prompt = f"{entry['question']}\nEnd with {wrap('the answer')}."
            if self.split != "train" or prompt not in self.data.held_out():
                return Task(
                    prompt,
                    Score(name, entry),
                    [wrap(str(entry["answer"]))],
                    family=name,
                    id=f"{name}/{self.split}/{number}",
                )
        raise ValueError(
            f"reasoning-gym's {name} holds too few questions beside the held-out ones: change its settings"
        )
