"""Synthesis: list programs from examples, NAND formulas from truth tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import accumulate, product
from random import Random

from .answers import Text, Words
from .base import Family, Instance

Lists = tuple[tuple[int, ...], ...]

COMMANDS: dict[str, tuple[str, Callable[[tuple[int, ...]], tuple[int, ...]]]] = {
    "rev": ("reverse", lambda v: v[::-1]),
    "sort": ("sort ascending", lambda v: tuple(sorted(v))),
    "inc": ("add 1 to each", lambda v: tuple(a + 1 for a in v)),
    "tail": ("drop the first", lambda v: v[1:]),
    "dbl": ("double each", lambda v: tuple(2 * a for a in v)),
    "sums": ("running sums", lambda v: tuple(accumulate(v))),
    "neg": ("negate each", lambda v: tuple(-a for a in v)),
    "rot": ("move the first to the end", lambda v: v[1:] + v[:1]),
}


class ListTransformSynth(Family):
    """A short program that maps example lists, and hidden ones, to their outputs; the examples determine the rest."""

    mode = "program"
    unique = False
    answer = Words("the commands in order, separated by spaces")

    def generate(self, rng: Random, level: int) -> Instance:
        commands = rng.sample(list(COMMANDS), 4 + level % 4 + (level > 3))
        limit = 2 + level // 4
        while True:
            inputs = tuple(tuple(rng.choices(range(10), k=4 + level // 3)) for _ in range(5))
            reached = self._reach(commands, inputs, limit)
            shown = Counter(outputs[:3] for outputs in reached)
            hard = [o for o, program in reached.items() if len(program) == limit and shown[o[:3]] == 1 and o[0]]
            if hard:
                tests = [[list(i), list(o)] for i, o in zip(inputs, rng.choice(hard), strict=True)]
                return {"commands": commands, "limit": limit, "shown": tests[:3], "hidden": tests[3:]}

    def prompt(self, x: Instance) -> str:
        commands = ", ".join(f"{name} ({COMMANDS[name][0]})" for name in x["commands"])
        tests = "; ".join(f"{' '.join(map(str, i))} -> {' '.join(map(str, o))}" for i, o in x["shown"])
        return f"Commands on lists: {commands}. Find at most {x['limit']} commands, in order, that do {tests}."

    def canonical(self, x: Instance) -> list[object]:
        return [sorted(x["commands"]), x["limit"], x["shown"]]

    def solve(self, x: Instance) -> list[str]:
        inputs, outputs = (tuple(tuple(test[side]) for test in x["shown"]) for side in (0, 1))
        return self._reach(x["commands"], inputs, x["limit"])[outputs]

    def check(self, x: Instance, value: list[str]) -> bool:
        if len(value) > x["limit"] or not all(name in x["commands"] for name in value):
            return False
        return all(list(self._run(value, tuple(i))) == o for i, o in x["shown"] + x["hidden"])

    def work(self, x: Instance) -> str:
        values, lines = tuple(x["shown"][0][0]), []
        for name in self.solve(x):
            values = COMMANDS[name][1](values)
            lines.append(f"{name}: {' '.join(map(str, values))}")
        return "\n".join(lines)

    def oracle(self, x: Instance) -> list[str] | None:
        if x["limit"] > 3:
            return None
        programs = (list(p) for n in range(1, x["limit"] + 1) for p in product(x["commands"], repeat=n))
        return next(p for p in programs if all(list(self._run(p, tuple(i))) == o for i, o in x["shown"]))

    @staticmethod
    def _run(program: list[str], values: tuple[int, ...]) -> tuple[int, ...]:
        for name in program:
            values = COMMANDS[name][1](values)
        return values

    @staticmethod
    def _reach(commands: list[str], inputs: Lists, limit: int) -> dict[Lists, list[str]]:
        """A shortest program for all outputs that at most `limit` commands reach."""
        reached: dict[Lists, list[str]] = {inputs: []}
        front = [inputs]
        for _ in range(limit):
            following = []
            for lists in front:
                for name in commands:
                    outputs = tuple(map(COMMANDS[name][1], lists))
                    if outputs not in reached:
                        reached[outputs] = [*reached[lists], name]
                        following.append(outputs)
            front = following
        return reached


class NandFormula(Family):
    """A formula of NANDs that agrees with rows of a truth table; the work splits them by one input after another."""

    mode = "program"
    unique = False
    answer = Text("the formula without spaces, such as NaNbb")

    def generate(self, rng: Random, level: int) -> Instance:
        inputs = 3 + (level + 2) // 3
        rows = rng.sample(range(2**inputs), 5 + 3 * level)
        ones = rng.sample(rows, rng.randint(len(rows) // 3, len(rows) - len(rows) // 3))
        names = [f"{row:0{inputs}b}" for row in sorted(rows)]
        return {"inputs": "abcdef"[:inputs], "rows": {name: int(int(name, 2) in ones) for name in names}}

    def prompt(self, x: Instance) -> str:
        ones, zeros = (" ".join(row for row, bit in x["rows"].items() if bit == wanted) for wanted in (1, 0))
        return (
            "Npq is 0 if p and q are both 1, else 1. Write a formula in this prefix form with the letters "
            f"{x['inputs']} that is 1 for {x['inputs']} = {ones} and 0 for {zeros}."
        )

    def solve(self, x: Instance) -> str:
        return self._split(x["inputs"], x["rows"], [])

    def check(self, x: Instance, value: str) -> bool:
        if any(c != "N" and c not in x["inputs"] for c in value):
            return False
        rows = list(x["rows"])
        columns = {c: sum(1 << r for r, row in enumerate(rows) if row[i] == "1") for i, c in enumerate(x["inputs"])}
        stack: list[int] = []
        for c in reversed(value):  # all rows at once, one bit each
            if c != "N":
                stack.append(columns[c])
            elif len(stack) < 2:
                return False
            else:
                stack.append(~(stack.pop() & stack.pop()) & ((1 << len(rows)) - 1))
        return stack == [sum(bit << r for r, bit in enumerate(x["rows"].values()))]

    def work(self, x: Instance) -> str:
        lines: list[str] = []
        self._split(x["inputs"], x["rows"], lines)
        return "\n".join(lines[:-1])

    def oracle(self, x: Instance) -> str | None:
        def tree(parts: list[str], join: Callable[[str, str], str]) -> str:
            half = len(parts) // 2
            return join(tree(parts[:half], join), tree(parts[half:], join)) if half else parts[0]

        def both(p: str, q: str) -> str:
            return f"NN{p}{q}N{p}{q}"

        def either(p: str, q: str) -> str:
            return f"NN{p}{p}N{q}{q}"

        if len(x["inputs"]) > 4:
            return None
        ones = [row for row, bit in x["rows"].items() if bit]
        literals = [[c if bit == "1" else f"N{c}{c}" for c, bit in zip(x["inputs"], row, strict=True)] for row in ones]
        return tree([tree(parts, both) for parts in literals], either)

    def _split(self, inputs: str, rows: dict[str, int], lines: list[str]) -> str:
        """A formula for `rows`; `lines` tells how it was put together, its own line last."""
        one = f"N{inputs[0] * 2}"
        one = f"N{inputs[0]}{one}"
        constants = {1: one, 0: f"N{one}{one}"}
        bits = set(rows.values())
        if len(bits) == 1:
            return constants[bits.pop()]
        for i, c in enumerate(inputs):
            if all(int(row[i]) == bit for row, bit in rows.items()):
                return c
            if all(int(row[i]) != bit for row, bit in rows.items()):
                return f"N{c}{c}"
        i = min(range(len(inputs)), key=lambda k: abs(2 * sum(row[k] == "1" for row in rows) - len(rows)))
        c = inputs[i]
        high, low = (
            self._split(inputs, {row: bit for row, bit in rows.items() if row[i] == side}, lines) for side in "10"
        )
        formula = f"NN{c}{high}NN{c}{c}{low}"
        lines.append(f"{c}=1: {high}, {c}=0: {low}, so {formula}")
        return formula
