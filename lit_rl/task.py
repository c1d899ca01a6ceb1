"""Task: a prompt, what is known of good responses, and how to score one. Plain data: no torch, no Lightning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]
"""One chat turn: `{"role": "user", "content": "..."}`."""

LONGEST = 10_000
"""Characters of a verdict's answer and reason that are kept."""
LARGEST = 1e30
"""Score beyond which float32 arithmetic would overflow."""


@dataclass
class Verdict:
    """What a verifier says of one response."""

    correct: bool
    score: float
    """In [0, 1] for the built-in verifiers; the reward before shaping."""
    answer: str | None = None
    """The parsed answer in canonical form, which is what votes are counted over; None when nothing parsed."""
    reason: str = ""
    """Why the response is not right, or why the verifier could not tell."""
    valid: bool = True
    """False when the verifier itself failed or timed out: such a row is masked, never rewarded with zero."""
    parts: dict[str, float] = field(default_factory=dict)
    """Named components of the score, logged side by side."""

    @staticmethod
    def invalid(reason: str) -> Verdict:
        """The verifier failed: nothing is known of the response."""
        return Verdict(False, 0.0, None, reason, valid=False)

    @staticmethod
    def of(value: Any) -> Verdict:
        """A verdict, all of plain types, from whatever a scoring function returned.

        Accepts a Verdict, a bool, a finite number (correct when it is at least 1), a mapping of named numbers (their
        sum is the score), or None ("cannot tell", which is invalid). NaN and anything else are invalid, with a reason.
        """
        if value is None:
            return Verdict.invalid("the verifier returned None")
        try:
            if isinstance(value, Verdict):
                answer = None if value.answer is None else str(value.answer)[:LONGEST]
                named = {str(k): float(v) for k, v in value.parts.items()}
                reason, valid = str(value.reason)[:LONGEST], bool(value.valid)
                verdict = Verdict(bool(value.correct), float(value.score), answer, reason, valid, named)
            elif isinstance(value, Mapping):
                named = {str(k): float(v) for k, v in value.items()}
                verdict = Verdict(sum(named.values()) >= 1.0, sum(named.values()), parts=named)
            else:
                verdict = Verdict(float(value) >= 1.0, float(value))
        except (TypeError, ValueError):
            return Verdict.invalid(f"the verifier returned a {type(value).__name__}: expected a Verdict or a number")
        if not abs(verdict.score) <= LARGEST:
            return Verdict.invalid(f"the verifier returned {verdict.score}")
        return verdict


@dataclass
class Task:
    """What every DataModule yields. Must stay picklable and not frozen (Lightning rebuilds containers in a batch)."""

    prompt: str | list[Message]
    score: Callable[[str], Any] | None = None
    """Scores the text of one response; anything `Verdict.of` takes. None: the task is only good for imitation."""
    responses: list[str] = field(default_factory=list)
    """Known responses: worked solutions, demonstrations, the two sides of a preference pair."""
    rewards: list[float] = field(default_factory=list)
    """One reward a response; empty when all are simply good."""
    family: str = ""
    """The group by which results are reported, such as a bootcamp family or a data set's name."""
    id: str = ""
    """Names the task in logs and seeds its sampling; the prompt itself when empty."""
    meta: dict[str, Any] = field(default_factory=dict)
    index: int | None = None
    """Its place in the training data, by which a resumed run makes it again; loaders set it."""
    turn: tuple[int, ...] = ()
    """Its place in the run: the step and the round of it in which it was asked for, and its position there; policies set it."""

    def text(self) -> str:
        """The prompt as plain text, for logs."""
        return (
            self.prompt
            if isinstance(self.prompt, str)
            else "\n".join(f"{m['role']}: {m['content']}" for m in self.prompt)
        )

    def key(self) -> str:
        return self.id or self.text()
