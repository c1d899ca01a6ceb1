"""Cellular automata, forwards and backwards."""

from __future__ import annotations

from random import Random

from .answers import Text
from .base import Family, Instance


def _random_rule(rng: Random) -> str:
    """The next values for the neighbourhoods 000, 001, ..., 111, neither value in the majority by far."""
    ones = rng.sample(range(8), rng.randint(3, 5))
    return "".join(str(int(i in ones)) for i in range(8))


def _rule_text(rule: str) -> str:
    table = " ".join(f"{i:03b}>{bit}" for i, bit in enumerate(rule))
    return f"In a ring of cells, the left neighbour, the cell and the right one give its next value: {table}."


def _step(rule: str, row: str) -> str:
    return "".join(rule[int(row[i - 1] + row[i] + row[(i + 1) % len(row)], 2)] for i in range(len(row)))


class EcaRun(Family):
    """An elementary cellular automaton on a ring; the work lists each step's neighbourhoods."""

    mode = "trace"
    answer = Text("the final row without spaces")

    def generate(self, rng: Random, level: int) -> Instance:
        while True:
            row = "".join(rng.choices("01", k=6 + 4 * level))
            x = {"rule": _random_rule(rng), "row": row, "steps": 1 + level // 2}
            if len(set(self.solve(x))) == 2:
                return x

    def prompt(self, x: Instance) -> str:
        steps = "1 step" if x["steps"] == 1 else f"{x['steps']} steps"
        return f"{_rule_text(x['rule'])} Run {steps} from {x['row']}."

    def solve(self, x: Instance) -> str:
        row = x["row"]
        for _ in range(x["steps"]):
            row = _step(x["rule"], row)
        return row

    def work(self, x: Instance) -> str:
        row, lines = x["row"], []
        for _ in range(x["steps"]):
            lines += [row, " ".join(row[i - 1] + row[i] + row[(i + 1) % len(row)] for i in range(len(row)))]
            row = _step(x["rule"], row)
        return "\n".join(lines[1:])

    def oracle(self, x: Instance) -> str:
        size, cells = len(x["row"]), int(x["row"], 2)
        full = (1 << size) - 1
        for _ in range(x["steps"]):
            left, right = cells >> 1 | (cells & 1) << (size - 1), (cells << 1 | cells >> (size - 1)) & full
            following = 0
            for i in (i for i in range(8) if x["rule"][i] == "1"):
                masks = (c if i & bit else ~c & full for c, bit in ((left, 4), (cells, 2), (right, 1)))
                a, b, c = masks
                following |= a & b & c
            cells = following
        return f"{cells:0{size}b}"


class EcaPreimage(Family):
    """A row that an elementary cellular automaton turns into a given one."""

    mode = "inverse"
    unique = False
    answer = Text("the row before the step, without spaces")

    def generate(self, rng: Random, level: int) -> Instance:
        while True:
            rule = _random_rule(rng)
            row = _step(rule, "".join(rng.choices("01", k=8 + 3 * level)))
            if len(set(row)) == 2:
                return {"rule": rule, "row": row}

    def prompt(self, x: Instance) -> str:
        return f"{_rule_text(x['rule'])} Find a row that becomes {x['row']} in one step."

    def solve(self, x: Instance) -> str:
        rule, row = x["rule"], x["row"]
        for start in ("00", "01", "10", "11"):
            words = {start: start}  # one beginning for each last two cells: nothing else matters for what follows
            for wanted in row[1:-1]:
                longer = [word + c for word in words.values() for c in "01" if rule[int(word[-2:] + c, 2)] == wanted]
                words = {word[-2:]: word for word in longer}
            for word in words.values():
                if _step(rule, word) == row:
                    return word
        raise ValueError("the row has no predecessor")

    def check(self, x: Instance, value: str) -> bool:
        return len(value) == len(x["row"]) and set(value) <= set("01") and _step(x["rule"], value) == x["row"]

    def oracle(self, x: Instance) -> str | None:
        size = len(x["row"])
        if size > 14:
            return None
        words = (f"{cells:0{size}b}" for cells in range(2**size))
        return next(word for word in words if _step(x["rule"], word) == x["row"])
