"""The frame of a bootcamp: what a family of tasks is, how instances are drawn, and how a response is judged.

Standard library only, so that families serve any trainer: `question = draw("two-sum", "train", level=2, index=7)`,
then `question.prompt`, `question.solution`, `question(text) -> Verdict`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import blake2b
from importlib import import_module
from pkgutil import iter_modules
from random import Random
from typing import Any, ClassVar, Literal, get_args

from lit_rl.task import Task, Verdict

from .answers import AnswerError, Type, extract, wrap

Instance = dict[str, Any]
"""Everything a question is made of; JSON values only, so that a round trip through a file changes nothing."""
Mode = Literal["value", "trace", "construct", "complete", "optimise", "decide", "inverse", "program"]
"""What a question asks: a value; each step of a procedure; any object with a property; the rest of a puzzle; a best
object; yes with a witness or no; the hidden input of a procedure; a program, circuit or expression."""
Split = Literal["train", "validation", "test"]

_BUCKETS: dict[str, range] = {"test": range(0, 1), "validation": range(1, 2), "train": range(2, 10)}
_ATTEMPTS = 500

REGISTRY: dict[str, Family] = {}
"""Every family by name; `families()` fills it with the built-in ones, a subclass adds itself when it is defined."""


class Family:
    """A generator of questions that one procedure solves, with an integer level, and a verifier. Holds no state.

    Subclass it, and it is known by the kebab case of its name. Required: `answer`, `mode`, `generate`, `prompt`, `solve`.
    """

    name: ClassVar[str]
    category: ClassVar[str]
    """The module's name unless given."""
    mode: ClassVar[Mode]
    answer: ClassVar[Type]
    version: ClassVar[int] = 1
    """Raise it whenever the same (level, index) would give another question."""
    max_level: ClassVar[int] = 9
    low_entropy: ClassVar[bool] = False
    """True when a constant may be right in more than a tenth (never more than four tenths) of the questions."""
    unique: ClassVar[bool] = True
    """False when a question may have several right answers."""
    max_prompt: ClassVar[int] = 2_000
    """Longest prompt at the highest level, in characters."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__name__.startswith("_"):
            return  # a shared base
        cls.name = cls.__dict__.get("name") or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()
        if not hasattr(cls, "category"):
            cls.category = cls.__module__.rpartition(".")[2].replace("_", "-")
        if getattr(cls, "mode", None) not in get_args(Mode):
            raise TypeError(
                f"family {cls.name}: mode is {getattr(cls, 'mode', None)!r}, not one of {', '.join(get_args(Mode))}"
            )
        if not isinstance(getattr(cls, "answer", None), Type):
            raise TypeError(f"family {cls.name}: `answer` must be an answer type, such as answers.Integer()")
        other = REGISTRY.get(cls.name)
        if other is not None and (type(other).__module__, type(other).__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise ValueError(f"two families are called {cls.name}: {type(other).__module__} and {cls.__module__}")
        REGISTRY[cls.name] = cls()

    def generate(self, rng: Random, level: int) -> Instance:
        """A question of this level; all randomness from `rng`."""
        raise NotImplementedError

    def prompt(self, x: Instance) -> str:
        """The question, complete: rules, indexing, ties, what to answer when nothing fits. The answer's form is added."""
        raise NotImplementedError

    def solve(self, x: Instance) -> Any:
        """A right answer, a value of the type `answer`."""
        raise NotImplementedError

    def check(self, x: Instance, value: Any) -> bool | float:
        """Whether a parsed answer is right; a number in [0, 1) is partial credit. Must be pure and fast."""
        return bool(value == self.solve(x))

    def work(self, x: Instance) -> str | None:
        """The steps that lead to `solve`'s answer, as a pupil would write them; None when the family has none."""
        return None

    def oracle(self, x: Instance) -> Any:
        """A right answer found by an independent method (brute force, say), for the gates; None when `x` is too large."""
        return None

    def canonical(self, x: Instance) -> Any:
        """What makes two instances the same question; splits never share one."""
        return x

    def size(self, x: Instance) -> float:
        """A measure of difficulty whose mean grows with the level."""
        return len(json.dumps(x))

    def judge(self, x: Instance, text: str) -> Verdict:
        """The verdict on a response. Exceptions of `check` pass: the scorer turns them into an invalid verdict."""
        try:
            value = self.answer.parse(extract(text))
        except AnswerError as error:
            return Verdict(False, 0.0, None, str(error))
        score = float(self.check(x, value))
        return Verdict(score >= 1.0, score, self.answer.render(value), "" if score >= 1.0 else "wrong answer")


@dataclass
class Question:
    """One instance of a family. Calling it with a response's text gives the verdict; picklable."""

    family: Family
    instance: Instance
    split: str
    level: int
    index: int

    def __call__(self, text: str) -> Verdict:
        return self.family.judge(self.instance, text)

    @property
    def prompt(self) -> str:
        return f"{self.family.prompt(self.instance)}\nEnd with {wrap(self.family.answer.form)}."

    @property
    def right(self) -> str:
        """A right answer in canonical form."""
        return self.family.answer.render(self.family.solve(self.instance))

    @property
    def solution(self) -> str:
        """A worked solution that ends with the right answer; the bare answer where the family has no worked one."""
        work = self.family.work(self.instance)
        return f"{work}\n{wrap(self.right)}" if work else wrap(self.right)

    @property
    def id(self) -> str:
        return f"{self.family.name}/v{self.family.version}/{self.split}/{self.level}/{self.index}"

    def task(self, hint: bool = True) -> Task:
        """As a task; without the `hint` the prompt leaves out how to answer."""
        meta = {"split": self.split, "level": self.level, "index": self.index, "category": self.family.category}
        prompt = self.prompt if hint else self.family.prompt(self.instance)
        return Task(prompt, self, [self.solution], family=self.family.name, id=self.id, meta=meta)


def families() -> dict[str, Family]:
    """All known families by name, sorted."""
    here = import_module("lit_rl.datamodules.families")
    for module in iter_modules(here.__path__):
        if module.name not in ("answers", "base", "gates"):
            import_module(f"{here.__name__}.{module.name}")
    return dict(sorted(REGISTRY.items()))


def family(name: str) -> Family:
    """A family by its name, or by the import path of a user's own class; unknown names get a suggestion."""
    if name in REGISTRY:
        return REGISTRY[name]
    known = families()
    if name in known:
        return known[name]
    if "." in name:
        module, _, attribute = name.rpartition(".")
        try:
            found = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"cannot import the family {name!r}: {error}") from error
        if isinstance(found, type) and issubclass(found, Family):
            return REGISTRY[found.name]
        raise ValueError(f"{name!r} is not a subclass of lit_rl.datamodules.families.Family")
    close = get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "`lit-rl bootcamp list` names them all."
    raise ValueError(f"there is no family {name!r}: {hint}")


def fingerprint(family: Family, x: Instance) -> int:
    """A hash of the question itself, whatever level and index drew it."""
    text = json.dumps([family.name, family.version, family.canonical(x)], sort_keys=True)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def draw(family_: Family | str, split: Split, level: int, index: int) -> Question:
    """Question number `index` of a split: the same in every process, for ever (until the family's version changes).

    Each distinct question belongs to one split by a hash of itself (8 : 1 : 1 for train, validation and test), and
    candidates are drawn until one belongs to the wanted split: the splits cannot overlap, however small the family.
    """
    chosen = family(family_) if isinstance(family_, str) else family_
    if not 0 <= level <= chosen.max_level:
        raise ValueError(f"family {chosen.name} has levels 0 to {chosen.max_level}, not {level}")
    if split not in _BUCKETS:
        raise ValueError(f"split is {split!r}: it must be one of {', '.join(_BUCKETS)}")
    key = f"{chosen.name}\0{chosen.version}\0{split}\0{level}\0{index}"
    rng = Random(int.from_bytes(blake2b(key.encode(), digest_size=16).digest(), "big"))
    for _ in range(_ATTEMPTS):
        x = chosen.generate(rng, level)
        if fingerprint(chosen, x) % 10 in _BUCKETS[split]:
            return Question(chosen, x, split, level, index)
    raise ValueError(
        f"family {chosen.name} has no {split} question at level {level}: it holds too few instances, raise the level"
    )
