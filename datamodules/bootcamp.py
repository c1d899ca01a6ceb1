"""Bootcamp: verifiable tasks without end, from families with integer levels."""

from __future__ import annotations

from bisect import bisect
from collections import defaultdict
from hashlib import blake2b
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info

from lit_rl import ranks
from lit_rl.checks import require
from lit_rl.task import Task

from .base import TaskData
from .families import Family, draw, families, family

if TYPE_CHECKING:
    import lightning.pytorch as L

    from lit_rl.experience import Experience

STRIDE = 10**9
"""Indices of one training seed."""


class Bootcamp(TaskData):
    """Tasks of bootcamp families: prompts for RL, worked solutions for SFT, held-out sets for evaluation.

    Training item i is drawn from the families by their weights, evenly over the levels; held-out items take families and
    levels in turn, so that each counts the same. Questions of the three splits never overlap.

    Args:
        families: Names (or import paths of your own), or names with weights; all that lit-rl ships when empty.
        level: One level, or the lowest and highest.
        size: Training tasks; an epoch goes once through them.
        val_size: Validation tasks.
        test_size: Test tasks.
        seed: Of the training tasks; the held-out ones are always the same.
        hint: Whether prompts end with how to answer. A model that was warm-started on worked solutions knows, and reads less.
        adaptive: Start each family at the lowest level and raise it by one, up to the highest, whenever
            `promote_at` of its last `window` responses at the current level are right. Training only.
        promote_at: Share of right responses.
        window: Responses that are looked at.
        kwargs: As in TaskData.
    """

    def __init__(
        self,
        families: list[str] | dict[str, float] = [],  # noqa: B006  (never changed in place)
        level: int | tuple[int, int] = (0, 2),
        *,
        size: int = 1_000_000,
        val_size: int = 200,
        test_size: int = 400,
        seed: int = 0,
        hint: bool = True,
        adaptive: bool = False,
        promote_at: float = 0.9,
        window: int = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.weights = _resolve(families)
        low, high = (level, level) if isinstance(level, int) else tuple(level)
        if low > high:
            raise ValueError(f"level is ({low}, {high}): the lowest comes first")
        for member in self.weights:
            if not 0 <= low <= high <= member.max_level:
                raise ValueError(
                    f"level is ({low}, {high}), but family {member.name} has levels 0 to {member.max_level}"
                )
        for name, value in {"size": size, "val_size": val_size, "test_size": test_size, "window": window}.items():
            require(value >= 1, name, value, "at least 1")
        require(size <= STRIDE, "size", size, f"at most {STRIDE}")
        require(0 < promote_at <= 1, "promote_at", promote_at, "a share above 0 and at most 1")
        self.low, self.high, self.size, self.seed, self.hint = low, high, size, seed, hint
        self.sizes = {"train": size, "validation": val_size, "test": test_size}
        self.adaptive, self.promote_at, self.window = adaptive, promote_at, window
        self.current = {member.name: low for member in self.weights}
        self.recent: dict[str, list[bool]] = defaultdict(list)
        self._before: tuple[int, dict[str, Any]] = (-1, {})
        """The latest step, and the state before it."""

    def tasks(self, split: str) -> _Split:
        return _Split(self, split)

    def on_rollout(self, trainer: L.Trainer, policy: L.LightningModule, experience: Experience) -> None:
        """Promotes families whose current level is mastered, by the responses of all ranks."""
        if not self.adaptive:
            return
        if trainer.global_step != self._before[0]:  # not so in the further rounds of dynamic sampling
            self._before = trainer.global_step, self._state()
        outcomes = [
            (task.family, task.meta.get("level"), verdict.correct)
            for task, verdict, given in zip(
                (experience.tasks[g] for g in experience.group.tolist()),
                experience.verdicts,
                experience.off_policy.tolist(),
                strict=True,
            )
            if verdict.valid and not given
        ]
        for name, level, correct in (outcome for part in ranks.gather(outcomes) for outcome in part):
            if level == self.current.get(name):
                self.recent[name].append(correct)
        for name, recent in self.recent.items():
            del recent[: -self.window]
            if (
                len(recent) == self.window
                and sum(recent) >= self.promote_at * self.window
                and self.current[name] < self.high
            ):
                self.current[name] += 1
                recent.clear()
                rank_zero_info(f"{name} is promoted to level {self.current[name]}")
            policy.log(f"level/{name}", float(self.current[name]))

    def _state(self) -> dict[str, Any]:
        return {"current": dict(self.current), "recent": {k: list(v) for k, v in self.recent.items()}}

    def state_dict(self) -> dict[str, Any]:
        """Of a step that is interrupted, the state before it: a resumed run takes it again."""
        step, before = self._before
        return before if self.trainer is not None and self.trainer.global_step == step else self._state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._before = (-1, {})
        self.current.update(state["current"])
        self.recent = defaultdict(list, {k: list(v) for k, v in state["recent"].items()})


class _Split:
    """A split's tasks, by index."""

    def __init__(self, data: Bootcamp, split: str) -> None:
        self.data, self.split = data, split
        self.members = list(data.weights)
        self.cumulative = list(accumulate(data.weights.values()))

    def __len__(self) -> int:
        return self.data.sizes[self.split]

    def __getitem__(self, index: int) -> Task:
        data = self.data
        if not 0 <= index < len(self):
            raise IndexError(f"task {index} of {len(self)}")
        levels = data.high - data.low + 1
        if self.split != "train":
            turn, place = divmod(index, len(self.members))
            return draw(self.members[place], self.split, data.low + turn % levels, turn // levels).task(data.hint)  # type: ignore[arg-type]
        number = index + STRIDE * data.seed
        chance = [
            int.from_bytes(blake2b(f"{number}/{what}".encode(), digest_size=8).digest(), "big") / 2**64
            for what in ("family", "level")
        ]
        member = self.members[bisect(self.cumulative, chance[0] * self.cumulative[-1], hi=len(self.members) - 1)]
        level = data.current[member.name] if data.adaptive else data.low + int(chance[1] * levels)
        return draw(member, "train", level, number).task(data.hint)

    def again(self, index: int, id: str) -> Task:
        """Training item `index` at the level that its `id` says, whatever the present one is."""
        name, _, _, level, number = id.rsplit("/", 4)
        return draw(family(name), "train", int(level), int(number)).task(self.data.hint)


def _resolve(names: list[str] | dict[str, float]) -> dict[Family, float]:
    weights = names if isinstance(names, dict) else dict.fromkeys(names or families(), 1.0)
    for name, weight in weights.items():
        if not weight > 0:
            raise ValueError(
                f"the weight of family {name} is {weight}: it must be above 0; leave the family out instead"
            )
    return {family(name): float(weight) for name, weight in weights.items()}
