"""Propositional logic: models, countermodels, and who tells the truth."""

from __future__ import annotations

from itertools import product
from random import Random
from string import ascii_lowercase
from typing import Any

from .answers import Words
from .base import Family, Instance

Values = dict[str, bool]


def _parse(tokens: list[str], names: list[str]) -> Values | None:
    """Values from tokens such as a=1, one for each name; None for anything else."""
    values = {token[:-2]: token[-1] == "1" for token in tokens if token[-2:] in ("=0", "=1")}
    return values if len(values) == len(tokens) == len(names) and values.keys() == set(names) else None


def _render(values: Values) -> list[str]:
    return [f"{name}={value:d}" for name, value in values.items()]


def _all(names: list[str]) -> list[Values]:
    return [dict(zip(names, values, strict=True)) for values in product((False, True), repeat=len(names))]


class SatAssignment(Family):
    """A model of clauses that have one; the work is a run of unit propagation with the right guesses."""

    mode = "construct"
    answer = Words("each variable with its value, such as a=1 b=0")
    unique = False

    def generate(self, rng: Random, level: int) -> Instance:
        names, width = rng.sample(ascii_lowercase, 3 + level + level // 3), 2 if level == 0 else 3
        hidden = {name: rng.random() < 0.5 for name in names}
        clauses: list[list[str]] = []
        while len(clauses) < len(names) * (5 + level) // 4:
            clause = [rng.choice(["", "!"]) + name for name in rng.sample(names, width)]
            new = all(set(clause) != set(other) for other in clauses)
            if new and any(self.true(literal, hidden) for literal in clause):
                clauses.append(clause)
        return {"clauses": clauses}

    def true(self, literal: str, values: Values) -> bool:
        return values[literal[-1]] == (literal[0] != "!")

    def names(self, x: Instance) -> list[str]:
        return list(dict.fromkeys(literal[-1] for clause in x["clauses"] for literal in clause))

    def prompt(self, x: Instance) -> str:
        return f"Make every clause true (| or, ! not): {', '.join('|'.join(clause) for clause in x['clauses'])}"

    def search(self, clauses: list[list[str]], values: Values) -> tuple[Values, list[str]] | None:
        """A model that extends `values`, with the reasons of what it adds."""
        values, lines = values.copy(), list[str]()
        while True:
            left = [c for c in clauses if not any(lit[-1] in values and self.true(lit, values) for lit in c)]
            if not left:
                return values, lines
            clause = min(left, key=lambda c: sum(lit[-1] not in values for lit in c))
            free = [lit for lit in clause if lit[-1] not in values]
            if not free:
                return None
            if len(free) > 1:
                break
            values[free[0][-1]] = free[0][0] != "!"
            lines.append(f"{free[0][-1]}={values[free[0][-1]]:d} from {'|'.join(clause)}")
        name = free[0][-1]
        for guess in (free[0][0] != "!", free[0][0] == "!"):
            found = self.search(left, values | {name: guess})
            if found:
                return found[0], [*lines, f"{name}={guess:d} guess", *found[1]]
        return None

    def solve(self, x: Instance) -> list[str]:
        found = self.search(x["clauses"], {})
        values = found[0] if found else {}
        return _render({name: values.get(name, False) for name in self.names(x)})

    def check(self, x: Instance, value: list[str]) -> bool:
        values = _parse(value, self.names(x))
        return values is not None and all(any(self.true(lit, values) for lit in clause) for clause in x["clauses"])

    def work(self, x: Instance) -> str:
        found = self.search(x["clauses"], {})
        return "\n".join(found[1] if found else [])

    def oracle(self, x: Instance) -> list[str] | None:
        if len(self.names(x)) > 9:
            return None
        return next(tokens for values in _all(self.names(x)) if self.check(x, tokens := _render(values)))


class KnightsAndKnaves(Family):
    """Who tells the truth; the work tries kinds person by person and names the first whose claim does not fit."""

    mode = "inverse"
    answer = Words("each letter with 1 for knight or 0 for knave, such as a=1 b=0")
    unique = False  # in any order

    def generate(self, rng: Random, level: int) -> Instance:
        names = rng.sample(ascii_lowercase, 2 + (2 * level + 2) // 3)
        worlds = _all(names)
        while True:
            x = {"claims": {name: self.claim(rng, name, names, level) for name in names}}
            models = (values for values in worlds if self.liar(x, values) is None)
            if next(models, None) and not next(models, None):
                return x

    def claim(self, rng: Random, speaker: str, names: list[str], level: int) -> list:
        """What a person says: a kind of claim and its parts."""
        others = [name for name in names if name != speaker]
        kind = rng.choice(["is", "same", "other", "and", "or", "count"][: min(6, 3 + level)])
        if kind == "is":
            return [kind, rng.choice(others), rng.randrange(2)]
        if kind == "count":
            return [kind, rng.randint(1, len(names) - 1)]
        a, b = rng.sample(names, 2)
        return [kind, a, b] if kind in ("same", "other") else [kind, a, rng.randrange(2), b, rng.randrange(2)]

    def prompt(self, x: Instance) -> str:
        claims = "; ".join(f"{name}: {self.say(claim)}" for name, claim in x["claims"].items())
        return f"Knights tell the truth, knaves lie. Who is what? {claims}"

    def say(self, claim: list) -> str:
        kind, *parts = claim
        noun = ["knave", "knight"]
        if kind == "is":
            return f"{parts[0]} is a {noun[parts[1]]}"
        if kind == "count":
            return f"exactly {parts[0]} of us {'is a knight' if parts[0] == 1 else 'are knights'}"
        if kind in ("same", "other"):
            return f"{parts[0]} and {parts[1]} are {'alike' if kind == 'same' else 'unlike'}"
        a, v, b, w = parts
        return f"{a} is a {noun[v]} {kind} {b} is a {noun[w]}{' (or both)' if kind == 'or' else ''}"

    def holds(self, claim: list, values: Values, people: int) -> bool | None:
        """Whether a claim is true; None while someone that it is about is open."""
        kind, *parts = claim
        if kind == "count":
            return sum(values.values()) == parts[0] if len(values) == people else None
        if not all(part in values for part in parts if isinstance(part, str)):
            return None
        if kind == "is":
            return values[parts[0]] == parts[1]
        if kind in ("same", "other"):
            return (values[parts[0]] == values[parts[1]]) == (kind == "same")
        a, v, b, w = parts
        return (any if kind == "or" else all)((values[a] == v, values[b] == w))

    def liar(self, x: Instance, values: Values) -> str | None:
        """The first person whose claim does not fit."""
        claims = x["claims"]
        return next((n for n in values if self.holds(claims[n], values, len(claims)) not in (None, values[n])), None)

    def search(self, x: Instance, values: Values, lines: list[str]) -> Values | None:
        open_ = [name for name in x["claims"] if name not in values]
        if not open_:
            return values
        for value in (True, False):
            tried = values | {open_[0]: value}
            wrong = self.liar(x, tried)
            lines.append(f"{' '.join(_render(tried))}{f': not {wrong}' if wrong else ''}")
            found = None if wrong else self.search(x, tried, lines)
            if found:
                return found
        return None

    def solve(self, x: Instance) -> list[str]:
        return _render(self.search(x, {}, []) or {})

    def check(self, x: Instance, value: list[str]) -> bool:
        values = _parse(value, list(x["claims"]))
        return values is not None and self.liar(x, values) is None

    def work(self, x: Instance) -> str | None:
        lines: list[str] = []
        self.search(x, {}, lines)
        return "\n".join(lines) if len(lines) < 40 else None

    def oracle(self, x: Instance) -> list[str]:
        return next(_render(values) for values in _all(sorted(x["claims"])) if self.liar(x, values) is None)


class TautologyOrCountermodel(Family):
    """Whether a formula is always true, or values that make it false; the work is the truth table up to those."""

    mode = "decide"
    answer = Words("`tautology`, or values that make it false such as a=1 b=0")
    unique = False
    low_entropy = True

    def generate(self, rng: Random, level: int) -> Instance:
        names = rng.sample(ascii_lowercase, 2 + (level + 2) // 3)
        wanted = rng.random() < 0.3
        while True:
            literals = [*names, *rng.choices(names, k=(level + rng.randrange(2)) // 3)]
            left = self.formula(rng, rng.sample(literals, len(literals)))
            right = self.weaken(rng, self.rewrite(rng, left), names)
            x = {"formula": ["->", left, right if wanted else self.spoil(rng, right)]}
            rows = [self.value(x["formula"], values) for values in _all(self.names(x["formula"]))]
            if all(rows) if wanted else 0 < rows.count(False) <= len(rows) // 4:
                return x

    def formula(self, rng: Random, names: list[str]) -> Any:
        """A formula in which the names occur in this order."""
        if len(names) == 1:
            return rng.choice([names[0], ["!", names[0]]])
        cut = rng.randrange(1, len(names))
        return [rng.choice(["&", "|", "->"]), self.formula(rng, names[:cut]), self.formula(rng, names[cut:])]

    def negate(self, f: Any) -> Any:
        return f[1] if f[0] == "!" else ["!", f]

    def rewrite(self, rng: Random, f: Any) -> Any:
        """An equivalent formula."""
        if len(f) < 3:
            return f
        op, (a, b) = f[0], (self.rewrite(rng, part) for part in f[1:])
        if op == "->":
            return rng.choice([f, ["|", self.negate(a), b], ["->", self.negate(b), self.negate(a)]])
        dual = ["!", ["|" if op == "&" else "&", self.negate(a), self.negate(b)]]
        return rng.choice([[op, b, a], dual, [op, a, b]])

    def weaken(self, rng: Random, f: Any, names: list[str]) -> Any:
        """A formula that follows from `f`."""
        extra = self.formula(rng, [rng.choice(names)])
        return rng.choice([f, ["|", f, extra], ["->", extra, f]])

    def spoil(self, rng: Random, f: Any) -> Any:
        """The formula with one literal negated."""
        if len(f) < 3:
            return self.negate(f) if f[0] == "!" or isinstance(f, str) else f
        part = rng.choice([1, 2])
        return [self.spoil(rng, g) if i == part else g for i, g in enumerate(f)]

    def show(self, f: Any, outer: bool = False) -> str:
        if isinstance(f, str):
            return f
        if f[0] == "!":
            return "!" + self.show(f[1])
        text = f"{self.show(f[1])} {f[0]} {self.show(f[2])}"
        return text if outer else f"({text})"

    def prompt(self, x: Instance) -> str:
        formula = self.show(x["formula"], outer=True)
        return f"Is this true for all values (! not, & and, | or, -> implies)? {formula}"

    def names(self, f: Any) -> list[str]:
        return sorted(set(self.show(f)) & set(ascii_lowercase))

    def value(self, f: Any, values: Values) -> bool:
        if isinstance(f, str):
            return values[f]
        parts = [self.value(g, values) for g in f[1:]]
        return {"!": not parts[0], "&": all(parts), "|": any(parts), "->": not parts[0] or parts[-1]}[f[0]]

    def false_at(self, x: Instance) -> Values | None:
        return next((v for v in _all(self.names(x["formula"])) if not self.value(x["formula"], v)), None)

    def solve(self, x: Instance) -> list[str]:
        values = self.false_at(x)
        return _render(values) if values else ["tautology"]

    def check(self, x: Instance, value: list[str]) -> bool:
        if value == ["tautology"]:
            return self.false_at(x) is None
        values = _parse(value, self.names(x["formula"]))
        return values is not None and not self.value(x["formula"], values)

    def work(self, x: Instance) -> str | None:
        lines = []
        for values in _all(self.names(x["formula"])):
            lines.append(f"{' '.join(_render(values))}: {self.value(x['formula'], values):d}")
            if lines[-1].endswith(": 0"):
                break
        return "\n".join(lines) if len(lines) <= 16 else None

    def oracle(self, x: Instance) -> list[str]:
        def branch(wants: list[tuple[Any, bool]], values: Values) -> Values | None:
            """A tableau: values under which each formula has its wanted truth."""
            if not wants:
                return values
            (f, truth), rest = wants[0], wants[1:]
            if isinstance(f, str):
                return branch(rest, values | {f: truth}) if values.get(f, truth) == truth else None
            if f[0] == "!":
                return branch([(f[1], not truth), *rest], values)
            first = (f[1], truth != (f[0] == "->"))
            if truth == (f[0] == "&"):
                return branch([first, (f[2], truth), *rest], values)
            found = branch([first, *rest], values)
            return found if found is not None else branch([(f[2], truth), *rest], values)

        values = branch([(x["formula"], False)], {})
        if values is None:
            return ["tautology"]
        return _render({name: values.get(name, False) for name in self.names(x["formula"])})
