"""Execution of small programs: forwards, and backwards to the input."""

from __future__ import annotations

from collections.abc import Callable
from operator import add, mul, sub
from random import Random

from .answers import Integer, Integers
from .base import Family, Instance


class RegisterVm(Family):
    """A register machine with jumps runs to its end; the work lists every assignment."""

    mode = "trace"
    answer = Integers("the final values of the registers in alphabetical order, separated by spaces")

    _STEPS, _LARGEST = 100, 999

    def generate(self, rng: Random, level: int) -> Instance:
        names = "ABCDE"[: 2 + (level + 1) // 3]
        while True:
            start = {name: rng.randint(1, 9) for name in names}
            data = names if level < 2 else names[:-1]  # from level 2 on, the last register counts rounds
            lines = [self._assignment(rng, data) for _ in range(3 + level // 2)]
            if level >= 4:  # an `if` that may skip the line after it
                at = rng.randrange(len(lines) - 1)
                left, right = rng.sample(data, 2)
                lines.insert(at, f"if {left} < {right} goto {at + 3}")
            if level >= 2:
                start[names[-1]] = rng.randint(2, 2 + level // 3)
                lines += [f"{names[-1]} -= 1", f"if {names[-1]} > 0 goto 1"]
            x = {"start": start, "lines": lines}
            trace = self._trace(x)
            if trace and all(abs(value) <= self._LARGEST for _, value in trace):
                return x

    def prompt(self, x: Instance) -> str:
        start = ", ".join(f"{name}={value}" for name, value in x["start"].items())
        lines = "\n".join(f"{i}: {line}" for i, line in enumerate(x["lines"], 1))
        return f"Start with {start} and run the lines in order:\n{lines}"

    def solve(self, x: Instance) -> list[int]:
        return list({**x["start"], **dict(self._trace(x) or [])}.values())

    def work(self, x: Instance) -> str:
        return "\n".join(f"{name}={value}" for name, value in self._trace(x) or [])

    def oracle(self, x: Instance) -> list[int]:
        names = list(x["start"])
        first = [*x["start"].values(), 1]
        rows = {name: [int(i == j) for j in range(len(first))] for i, name in enumerate(names)}
        rows["1"] = [0] * len(names) + [1]  # every register as a linear function of the first values and 1

        def row(term: str) -> list[int]:
            return rows[term] if term in rows else [int(term) * a for a in rows["1"]]

        def value(term: str) -> int:
            return sum(a * b for a, b in zip(row(term), first, strict=True))

        line = 0
        while line < len(x["lines"]):
            tokens = x["lines"][line].split()
            if tokens[0] == "if":
                left, right = value(tokens[1]), value(tokens[3])
                line = int(tokens[5]) - 1 if (left < right) == (tokens[2] == "<") and left != right else line + 1
                continue
            sign = {"=": 0, "+=": 1, "-=": -1}[tokens[1]]
            old, new = rows[tokens[0]], row(tokens[2])
            rows[tokens[0]] = [a + sign * b if sign else b for a, b in zip(old, new, strict=True)]
            line += 1
        return [value(name) for name in names]

    @staticmethod
    def _assignment(rng: Random, names: str) -> str:
        target, source = rng.sample(names, 2)
        operator = rng.choice(["=", "+=", "+=", "-=", "-="])
        return f"{target} {operator} {source if rng.random() < 0.6 else rng.randint(2, 9)}"

    def _trace(self, x: Instance) -> list[tuple[str, int]] | None:
        """All assignments in order; None if the program doesn't end in time."""
        registers, at = dict(x["start"]), 0
        trace: list[tuple[str, int]] = []
        for _ in range(self._STEPS):
            if at >= len(x["lines"]):
                return trace
            match x["lines"][at].split():
                case ["if", left, comparison, right, "goto", goal]:
                    a, b = (registers[t] if t in registers else int(t) for t in (left, right))
                    at = int(goal) - 1 if (a < b if comparison == "<" else a > b) else at + 1
                case [target, operator, source]:
                    value = registers[source] if source in registers else int(source)
                    old = registers[target]
                    registers[target] = {"=": value, "+=": old + value, "-=": old - value}[operator]
                    trace.append((target, registers[target]))
                    at += 1
        return None


class ForthRpn(Family):
    """A stack program of numbers, arithmetic and stack words; the work shows the stack after each operation."""

    mode = "value"
    answer = Integers("the final stack from bottom to top, separated by spaces")

    _LARGEST = 999
    _ARITHMETIC: dict[str, Callable[[int, int], int]] = {"+": add, "-": sub, "*": mul}
    _WORDS = {
        "dup": "dup pushes a copy of the top",
        "drop": "drop removes the top",
        "swap": "swap exchanges the top two",
        "over": "over pushes a copy of the second",
    }

    def generate(self, rng: Random, level: int) -> Instance:
        words = [*self._ARITHMETIC, *list(self._WORDS)[: (level + 1) // 2]]
        stack: list[int] = []
        tokens: list[int | str] = []
        while len(tokens) < 5 + 3 * level:
            token: int | str = rng.choice(words) if len(stack) > 1 and rng.random() < 0.6 else rng.randint(1, 9)
            after = self._apply(stack, token)
            if after and abs(after[-1]) <= self._LARGEST:
                stack = after
                tokens.append(token)
        return {"tokens": tokens}

    def prompt(self, x: Instance) -> str:
        words = "".join(f"; {text}" for word, text in self._WORDS.items() if word in x["tokens"])
        program = " ".join(map(str, x["tokens"]))
        return (
            f"Numbers are pushed on a stack; + - * replace the top two, a below b, by a+b, a-b, a*b{words}: {program}"
        )

    def solve(self, x: Instance) -> list[int]:
        stack: list[int] = []
        for token in x["tokens"]:
            stack = self._apply(stack, token)
        return stack

    def work(self, x: Instance) -> str:
        stack: list[int] = []
        lines = []
        for token in x["tokens"]:
            stack = self._apply(stack, token)
            if isinstance(token, str):
                lines.append(f"{token}: {' '.join(map(str, stack))}")
        return "\n".join(lines)

    def oracle(self, x: Instance) -> list[int]:
        items = list(x["tokens"])
        while word := next((item for item in items if isinstance(item, str)), None):  # rewrites the program
            i = items.index(word)
            a, b = items[i - 2 : i]
            rewritten = {"dup": [a, b, b], "drop": [a], "swap": [b, a], "over": [a, b, a]}.get(word)
            if rewritten is None:
                rewritten = [self._ARITHMETIC[word](a, b)]
            items[i - 2 : i + 1] = rewritten
        return items

    @classmethod
    def _apply(cls, stack: list[int], token: int | str) -> list[int]:
        if isinstance(token, int):
            return [*stack, token]
        *rest, a, b = stack
        match token:
            case "dup":
                return [*rest, a, b, b]
            case "drop":
                return [*rest, a]
            case "swap":
                return [*rest, b, a]
            case "over":
                return [*rest, a, b, a]
        return [*rest, cls._ARITHMETIC[token](a, b)]


class InputForOutput(Family):
    """An input for which a program prints a given number; the work undoes its steps from the last to the first."""

    mode = "inverse"
    unique = False
    answer = Integer("the whole number x")

    _TEXTS = {
        "+": "add {}",
        "-": "subtract {}",
        "*": "multiply by {}",
        "even": "halve if even, else add {}",
        "above": "subtract {0} if above {0}, else double",
    }

    def generate(self, rng: Random, level: int) -> Instance:
        steps: list[list[str | int]] = []
        for _ in range(2 + level):
            kind = rng.choice(["+", "-", "*", "even", "even", "above"] if level >= 2 else ["+", "-", "*"])
            amount = (
                rng.randint(2, 5) if kind == "*" else rng.randrange(1, 10 * (level + 1), 2 if kind == "even" else 1)
            )
            steps.append([kind, amount])
        limit = 10 ** (2 + (level + 1) // 3) - 1
        return {"limit": limit, "steps": steps, "output": self._run(steps, rng.randint(0, limit))[-1]}

    def prompt(self, x: Instance) -> str:
        steps = "; ".join(self._TEXTS[kind].format(amount) for kind, amount in x["steps"])
        return f"Take a whole number x from 0 to {x['limit']}; {steps}. The result is {x['output']}. Find such an x."

    def solve(self, x: Instance) -> int:
        values = {x["output"]}
        for kind, n in reversed(x["steps"]):
            values = {before for value in values for before in self._undo(kind, n, value)}
        return min(value for value in values if 0 <= value <= x["limit"])

    def check(self, x: Instance, value: int) -> bool:
        return 0 <= value <= x["limit"] and self._run(x["steps"], value)[-1] == x["output"]

    def work(self, x: Instance) -> str:
        values = self._run(x["steps"], self.solve(x))
        lines = []
        for (kind, n), before, after in reversed(list(zip(x["steps"], values, values[1:], strict=False))):
            if kind == "even":
                kind = "half" if before % 2 == 0 else "+"
            elif kind == "above":
                kind = "-" if before > n else "double"
            undone = {"+": f"-{n}", "-": f"+{n}", "*": f"/{n}", "half": "*2", "double": "/2"}[kind]
            lines.append(f"{after}{undone}={before}")
        return "\n".join(lines)

    def oracle(self, x: Instance) -> int | None:
        if x["limit"] > 999:
            return None
        return next(v for v in range(x["limit"], -1, -1) if self._run(x["steps"], v)[-1] == x["output"])

    @staticmethod
    def _run(steps: list[list[str | int]], value: int) -> list[int]:
        """The value before the first step and after each one."""
        values = [value]
        for kind, n in steps:
            match kind, int(n):
                case "+", k:
                    value += k
                case "-", k:
                    value -= k
                case "*", k:
                    value *= k
                case "even", k:
                    value = value + k if value % 2 else value // 2
                case "above", k:
                    value = value - k if value > k else 2 * value
            values.append(value)
        return values

    @staticmethod
    def _undo(kind: str, n: int, value: int) -> list[int]:
        match kind:
            case "+":
                return [value - n]
            case "-":
                return [value + n]
            case "*":
                return [value // n] if value % n == 0 else []
            case "even":
                return [2 * value, *([value - n] if (value - n) % 2 else [])]
        return [*([value + n] if value > 0 else []), *([value // 2] if value % 2 == 0 and value // 2 <= n else [])]
