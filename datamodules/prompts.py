"""Prompts: tasks from files of your own, judged by their right answers or by reward functions."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lit_rl import jsonl
from lit_rl.checks import ConfigurationError, require
from lit_rl.task import Message, Task, Verdict

from .base import TaskData
from .families.answers import AnswerError, Rational, Text, extract, undress, wrap

TRL_OWN = "prompts", "completions", "prompt", "completion"
"""Names of a reward function's arguments that no field of a record takes."""
HINT = f"End with {wrap('the answer')}."


class Prompts(TaskData):
    """Tasks from files of records, JSON lines or (if pyarrow is installed) Parquet: each has a prompt, and its right answer or
    what reward functions need. Training leaves out prompts that are held out too.

    Args:
        train: The file of training records.
        validation: That of the records looked at in training; None for none.
        test: And of those that `test` evaluates; None for none.
        prompt: The field of the prompt: text, or a list of chat messages.
        answer: The field of the right answer: a number or text, as it is or after "####" (as in GSM8K). A response is right
            when its last `<answer>` block or, without one, its last \\boxed{} says the same: numbers are compared exactly, as
            fractions, and other texts without case and white space around.
        rewards: Reward functions, or their import paths, as TRL's are: `f(prompts, completions, **fields)`, with lists of one (of
            messages where the prompt is of messages), returns a list of one number, or of None where it does not apply. Their
            sum is the reward, and a response of at least 1 counts as right. In place of `answer`.
        unlabelled: Training records have no right answers, for MajorityVote and RLCCF, which vote for them.
        family: The field by which results are reported, such as the source of a record; None: the file's name.
        response: The field of a worked solution (for SFT and OffPolicyMixing): text, or a list of texts.
        hint: What prompts end with, on a line of its own, to say how to give the answer, such as "Put the final answer into
            \\boxed{}."; "" for nothing. Where `rewards` judge, prompts stay as they are.
        kwargs: As in TaskData.
    """

    def __init__(
        self,
        train: str,
        validation: str | None = None,
        test: str | None = None,
        *,
        prompt: str = "prompt",
        answer: str | None = None,
        rewards: list[str | Callable[..., Any]] = [],  # noqa: B006  (never changed in place)
        unlabelled: bool = False,
        response: str | None = None,
        family: str | None = None,
        hint: str = HINT,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.files = {"train": train, "validation": validation, "test": test}
        for name, file in self.files.items():
            require(file is None or Path(file).is_file(), name, file, "a file")
        limit = "left out where there are `rewards`, which judge by themselves"
        require(answer is None or not rewards, "answer", answer, limit)
        what = (
            "the field of the right answer, or left out for `rewards`, a `response`, or prompts that are `unlabelled`"
        )
        require(bool(answer or rewards or response or unlabelled), "answer", answer, what)
        require(not unlabelled or not rewards, "unlabelled", unlabelled, "false where `rewards` judge")
        self.prompt, self.answer, self.unlabelled = prompt, answer, unlabelled
        self.response, self.family, self.hint = response, family, hint
        self.rewards = tuple(map(function, rewards))
        self._tasks: dict[str, list[Task]] = {}

    def setup(self, stage: str) -> None:
        split = {"validate": "validation", "test": "test", "predict": self.predict}.get(stage, "train")
        require(self.files[split] is not None, split, None, f"a file of records, to {getattr(stage, 'value', stage)}")

    def tasks(self, split: str) -> list[Task]:
        if split not in self._tasks:
            self._tasks[split] = self._read(split)
        return self._tasks[split]

    def _read(self, split: str) -> list[Task]:
        file = self.files[split]
        if file is None:
            return []
        made = []
        for number, record in enumerate(jsonl.records(file), 1):
            try:
                made.append(self._task(record, split))
            except ValueError as error:
                raise ConfigurationError(f"record {number} of {file} {error}") from error
        require(bool(made), split, file, "a file with records: this one is empty")
        if split != "train":
            return made
        held_out = {task.text() for other in ("validation", "test") for task in self.tasks(other)}
        kept = [task for task in made if task.text() not in held_out]
        if len(kept) < len(made):
            left_out = len(made) - len(kept)
            rank_zero_info(f"{left_out} of {len(made)} records of {file} are held out too: they are left out.")
        return kept

    def _task(self, record: Any, split: str) -> Task:
        """Raises ValueError that says what is wrong with the record."""
        prompt = _field(record, self.prompt)
        score: Right | Rewarded | None = None
        if not isinstance(prompt, str) and not _is_chat(prompt):
            raise ValueError(f"has no prompt in {self.prompt!r}: expected text, or messages that end with a user's")
        if self.rewards:
            score = Rewarded(self.rewards, prompt, {k: v for k, v in record.items() if k not in TRL_OWN})
        elif self.answer or self.unlabelled:
            known = None if self.unlabelled and split == "train" else self.answer
            score = Right(None if known is None else _gold(record, known))
            prompt = _hinted(prompt, self.hint) if self.hint else prompt
        responses = [] if self.response is None else _field(record, self.response)
        responses = [responses] if isinstance(responses, str) else responses
        if not isinstance(responses, list) or not all(isinstance(text, str) for text in responses):
            raise ValueError(f"has no worked solution in {self.response!r}: expected text, or a list of texts")
        family = str(_field(record, self.family)) if self.family else Path(self.files[split] or "").stem
        task = Task(prompt, score, responses, family=family)
        task.id = (
            f"{split}/{blake2b(task.text().encode('utf-8', 'replace'), digest_size=8).hexdigest()}"  # of no other file
        )
        return task


@dataclass
class Right:
    """Judges a response by a known answer, or says only what it answers; picklable."""

    answer: str | None

    def __call__(self, text: str) -> Verdict:
        try:
            given = _value(_final(text))
        except AnswerError as error:
            return Verdict(False, 0.0, None, str(error))
        right = given == self.answer
        reason = "the right answer is not known" if self.answer is None else "" if right else "wrong answer"
        return Verdict(right, float(right), given, reason)


@dataclass
class Rewarded:
    """Judges a response by reward functions with TRL's signature; picklable where they are."""

    functions: Sequence[Callable[..., Sequence[float | None]]]
    prompt: str | list[Message]
    fields: dict[str, Any]

    def __call__(self, text: str) -> Verdict:
        completion = text if isinstance(self.prompt, str) else [{"role": "assistant", "content": text}]
        fields = {name: [value] for name, value in self.fields.items()}
        parts = {}
        for f in self.functions:
            (reward,) = f(prompts=[self.prompt], completions=[completion], **fields)
            if reward is not None:
                parts[f.__name__] = reward
        return Verdict.of(parts or None)


def function(path: str | Callable[..., Any]) -> Callable[..., Any]:
    """A function, or the one that an import path names; raises ConfigurationError."""
    try:
        found = locate(path) if isinstance(path, str) else path
    except ErrorDuringImport as error:
        raise ConfigurationError(f"rewards has {path}, which cannot be imported: {error}") from error
    what = "a function that can be imported, such as mine.reward in a file mine.py in the working directory"
    require(callable(found), "rewards", path, what)
    require(not inspect.iscoroutinefunction(found), "rewards", path, "an ordinary function, not an async one")
    return found  # type: ignore[return-value]


def _field(record: Any, name: str) -> Any:
    if not isinstance(record, dict) or record.get(name) is None:
        known = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"has no {name!r}, but {known}: name the field that it has")
    return record[name]


def _gold(record: Any, name: str) -> str:
    try:
        return _value(str(_field(record, name)).rpartition("####")[2])
    except AnswerError as error:
        raise ValueError(f"has no right answer in {name!r}: {error}") from error


def _is_chat(prompt: Any) -> bool:
    messages = isinstance(prompt, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
    )
    return messages and bool(prompt) and prompt[-1]["role"] != "assistant"


def _hinted(prompt: str | list[Message], hint: str) -> str | list[Message]:
    if isinstance(prompt, str):
        return f"{prompt}\n{hint}"
    return [*prompt[:-1], prompt[-1] | {"content": f"{prompt[-1]['content']}\n{hint}"}]


def _final(text: str) -> str:
    """What a response ends by answering; raises AnswerError."""
    try:
        return extract(text)
    except AnswerError:
        said = text.rpartition("</think>")[2]
        _, boxed, rest = said.rpartition("\\boxed{")
        depth = 1
        for i, c in enumerate(rest if boxed and "<think>" not in said else ""):
            depth += (c == "{") - (c == "}")
            if not depth:
                return rest[:i]
        raise


def _value(text: str) -> str:
    """The canonical form of an answer; raises AnswerError where there is none."""
    text = undress(text)
    try:
        return Rational().parse(re.sub(r"\A\\?\$|\\?%\Z", "", text))
    except AnswerError:
        return Text(fold=True).parse(text)
