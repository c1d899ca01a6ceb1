"""The one answer grammar of all families: the last `<answer>...</answer>` block, holding one typed value.

Lenient about dress (bold, code marks, LaTeX dollars and boxes, a trailing full stop), strict about content, and bounded:
nothing a model writes is executed, and no text makes parsing slow. A type parses text to a value, renders a value back
in canonical form (which votes are counted over), says its form in the prompt, and makes near misses for the gates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import Any

MAX_CHARS = 20_000
"""Longest answer block that is looked at."""
MAX_DIGITS = 1_000
"""Longest number, in digits."""

OPEN, CLOSE = "<answer>", "</answer>"


class AnswerError(ValueError):
    """The text holds no answer of the wanted type; the message says why."""


def wrap(answer: str) -> str:
    return f"{OPEN}{answer}{CLOSE}"


def extract(text: str) -> str:
    """The content of the last complete answer block after the thinking, without its dress."""
    if "</think>" in text:
        text = text.rpartition("</think>")[2]
    elif "<think>" in text:
        raise AnswerError("the thinking never ended")
    before, close, _ = text.rpartition(CLOSE)
    _, open_, content = before.rpartition(OPEN)
    if not close or not open_:
        raise AnswerError(f"no {OPEN}...{CLOSE} block")
    if len(content) > MAX_CHARS:
        raise AnswerError(f"the answer has {len(content)} characters: the limit is {MAX_CHARS}")
    return undress(content)


def undress(content: str) -> str:
    content = content.strip()
    if content.startswith("```") and content.endswith("```") and len(content) >= 6:
        content = re.sub(r"\A[a-z]*\n", "", content[3:-3]).strip()
    for _ in range(4):  # a few layers, in any order
        before = content
        if content.endswith(".") and not content.endswith(".."):
            content = content[:-1].rstrip()
        for left, right in (("**", "**"), ("`", "`"), ("$", "$"), ("\\(", "\\)"), ("\\boxed{", "}"), ("\\text{", "}")):
            if len(content) >= len(left) + len(right) and content.startswith(left) and content.endswith(right):
                content = content[len(left) : -len(right)].strip()
        if content == before:
            break
    return content


def _int(text: str) -> int:
    text = text.strip().replace("\u2212", "-")
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+", text, re.ASCII):
        text = text.replace(",", "")
    if not re.fullmatch(r"[+-]?\d+", text, re.ASCII):
        raise AnswerError(f"{text[:40]!r} is not an integer")
    if len(text) > MAX_DIGITS:
        raise AnswerError(f"a number of {len(text)} digits: the limit is {MAX_DIGITS}")
    return int(text)


def _items(text: str) -> list[str]:
    """Splits on commas, semicolons or white space, inside optional brackets."""
    text = text.strip()
    if len(text) >= 2 and text[0] + text[-1] in ("[]", "()", "{}"):
        text = text[1:-1]
    return [part for part in re.split(r"\s*[,;]\s*|\s+", text.strip()) if part]


class Type:
    """One type of answer."""

    form: str
    """How the prompt describes it."""

    def parse(self, text: str) -> Any:
        """The value, a JSON type; raises AnswerError."""
        raise NotImplementedError

    def render(self, value: Any) -> str:
        """The canonical text, which parses back to the value."""
        return str(value)

    def near_misses(self, value: Any, rng: Random) -> Iterator[Any]:
        """Values close to a right one and different from it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Integer(Type):
    form: str = "an integer"

    def parse(self, text: str) -> int:
        return _int(text)

    def near_misses(self, value: int, rng: Random) -> Iterator[int]:
        for other in (
            value + 1,
            value - 1,
            -value - 1,
            value + 2,
            value - 2,
            value * 10 + 1,
            value + 10,
            value - 10,
            2 * value + 3,
            value // 2 - 1,
            value + 9,
            value - 9,
            value + 100,
            -value + 5,
            3 * value + 7,
        ):
            if other != value:
                yield other


@dataclass(frozen=True)
class Rational(Type):
    """A fraction such as 3/4, an integer or a terminating decimal; the value is the string of the lowest terms."""

    form: str = "an integer or a fraction such as 3/4"

    def parse(self, text: str) -> str:
        text = text.strip()
        if latex := re.fullmatch(r"([+-]?)\\d?frac\{([+-]?\d+)\}\{(\d+)\}", text, re.ASCII):
            text = f"{latex[1]}{latex[2]}/{latex[3]}"
        top, slash, bottom = text.partition("/")
        if not slash and (decimal := re.fullmatch(r"([+-]?\d*)\.(\d+)", text, re.ASCII)):
            if len(text) > MAX_DIGITS:
                raise AnswerError(f"a number of {len(text)} digits: the limit is {MAX_DIGITS}")
            return str(
                Fraction(
                    int((decimal[1] if decimal[1] not in ("", "+", "-") else decimal[1] + "0") + decimal[2]),
                    10 ** len(decimal[2]),
                )
            )
        denominator = _int(bottom) if slash else 1
        if denominator == 0:
            raise AnswerError("a fraction with denominator 0")
        return str(Fraction(_int(top), denominator))

    def near_misses(self, value: str, rng: Random) -> Iterator[str]:
        x = Fraction(value)
        shifts = (1, -1, Fraction(1, 2), Fraction(1, x.denominator + 1), Fraction(-1, x.denominator + 1), 2, -2, 10)
        for other in (*(x + d for d in shifts), -x - 1, x * 2 + 3, x / 2 + 1, x / 3 - 1, x * 3 + 2, x + Fraction(1, 7)):
            if other != x:
                yield str(other)


@dataclass(frozen=True)
class Text(Type):
    """One line of text: white space folded, compared with case unless `fold`."""

    form: str = "text"
    fold: bool = False

    def parse(self, text: str) -> str:
        text = " ".join(text.split())
        if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
            text = text[1:-1]
        if not text:
            raise AnswerError("an empty answer")
        return text.casefold() if self.fold else text

    def near_misses(self, value: str, rng: Random) -> Iterator[str]:
        letters = sorted(set(value)) or ["a"]
        seen = {self.parse(value)}
        for _ in range(60):
            i = rng.randrange(len(value) + 1)
            other = [
                value[:i] + rng.choice(letters) + value[i:],
                value[: max(i - 1, 0)] + value[i:],
                value[: max(i - 1, 0)] + rng.choice([*letters, "x", "7"]) + value[i:],
                value[:i] + value[i + 1 : i + 2] + value[i : i + 1] + value[i + 2 :],
            ][rng.randrange(4)]
            if other.strip() and self.parse(other) not in seen:
                seen.add(self.parse(other))
                yield other


@dataclass(frozen=True)
class Integers(Type):
    """A list of integers, separated by spaces or commas; the value is a list."""

    form: str = "integers separated by spaces"

    def parse(self, text: str) -> list[int]:
        return [_int(part) for part in _items(text)]

    def render(self, value: list[int]) -> str:
        return " ".join(map(str, value))

    def near_misses(self, value: list[int], rng: Random) -> Iterator[list[int]]:
        yield from _list_misses(value, lambda x: x + rng.choice([-2, -1, 1, 2]), rng)


@dataclass(frozen=True)
class Words(Type):
    """A list of words without spaces, separated by spaces or commas; the value is a list."""

    form: str = "words separated by spaces"
    fold: bool = False

    def parse(self, text: str) -> list[str]:
        return [part.casefold() if self.fold else part for part in _items(text)]

    def render(self, value: list[str]) -> str:
        return " ".join(value)

    def near_misses(self, value: list[str], rng: Random) -> Iterator[list[str]]:
        yield from _list_misses(value, lambda x: rng.choice([*value, x + x[-1:], x[:-1] or "z"]), rng)


@dataclass(frozen=True)
class Grid(Type):
    """Rows of cells: one row a line or separated by slashes, cells by spaces, or none where all cells are one character.

    The value is a list of lists of strings."""

    form: str = "rows separated by / with cells separated by spaces"

    def parse(self, text: str) -> list[list[str]]:
        text = re.sub(r"[\[\]\"',]", " ", re.sub(r"\]\s*,\s*\[", "/", text))
        rows = [row.split() for row in re.split(r"[/\n]", text) if row.strip()]
        if not rows:
            raise AnswerError("a grid without rows")
        return [list(row[0]) if len(row) == 1 and len(rows) > 1 else row for row in rows]

    def render(self, value: list[list[str]]) -> str:
        return " / ".join(" ".join(map(str, row)) for row in value)

    def near_misses(self, value: list[list[str]], rng: Random) -> Iterator[list[list[str]]]:
        symbols = sorted({cell for row in value for cell in row})
        for _ in range(40):
            grid = [list(row) for row in value]
            r = rng.randrange(len(grid))
            c = rng.randrange(len(grid[r]))
            grid[r][c] = rng.choice([*symbols, "0", "9"])
            if grid != value:
                yield grid
        yield value[:-1] or [["?"]]
        yield [*value, value[0]]


def _list_misses(value: list[Any], change: Any, rng: Random) -> Iterator[list[Any]]:
    for _ in range(60):
        other = list(value)
        kind = rng.randrange(4)
        i = rng.randrange(len(other)) if other else 0
        if kind == 0 and other:
            other[i] = change(other[i])
        elif kind == 1 and other:
            del other[i]
        elif kind == 2 and len(other) > 1:
            j = rng.randrange(len(other))
            other[i], other[j] = other[j], other[i]
        elif other:
            other.insert(i, other[rng.randrange(len(other))])
        if other != value:
            yield other
