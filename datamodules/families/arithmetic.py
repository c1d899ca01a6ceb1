"""Arithmetic with whole numbers and fractions."""

from __future__ import annotations

import re
from functools import cmp_to_key
from itertools import permutations, product
from math import lcm
from operator import add, mul, sub
from random import Random
from typing import Any

from .answers import Integer, Integers, Rational, Text
from .base import Family, Instance

Tree = Any
"""An expression: a whole number or [operator, left, right]."""

_OPERATORS = {"+": add, "-": sub, "*": mul}
_BINDING = {"+": 1, "-": 1, "*": 2}
_DIGITS = "0123456789abcdef"


def _random_tree(rng: Random, leaves: int, top: int) -> Tree:
    if leaves == 1:
        return rng.randint(1, top)
    left = rng.randrange(1, leaves)
    return [rng.choice("+-*"), _random_tree(rng, left, top), _random_tree(rng, leaves - left, top)]


def _show(tree: Tree, binding: int = 0) -> str:
    if isinstance(tree, int):
        return str(tree)
    operator, left, right = tree
    own = _BINDING[operator]
    text = f"{_show(left, own)}{operator}{_show(right, own + 1)}"
    return f"({text})" if own < binding else text


def _read(text: str) -> Tree:
    """The tree of an infix text of at most 99 tokens; ValueError if it is anything else."""
    tokens = re.findall(r"[0-9]+|\S", text.replace("×", "*").replace("−", "-"))
    if len(tokens) > 99:
        raise ValueError("too long")
    tokens = ["", *reversed(tokens)]

    def operand(binding: int) -> Tree:
        token = tokens.pop()
        if token == "(":
            tree = operand(1)
            if tokens.pop() != ")":
                raise ValueError("no closing parenthesis")
        elif re.fullmatch("[0-9]{1,9}", token):
            tree = int(token)
        else:
            raise ValueError(f"unexpected {token!r}")
        while tokens and _BINDING.get(tokens[-1], 0) >= binding:
            operator = tokens.pop()
            tree = [operator, tree, operand(_BINDING[operator] + 1)]
        return tree

    tree = operand(1)
    if tokens != [""]:
        raise ValueError("something follows the expression")
    return tree


def _evaluate(tree: Tree, steps: list[str]) -> int:
    """The value; appends one line for each operation."""
    if isinstance(tree, int):
        return tree
    left, right = _evaluate(tree[1], steps), _evaluate(tree[2], steps)
    value = _OPERATORS[tree[0]](left, right)
    steps.append(f"{left}{tree[0]}{right if right >= 0 else f'({right})'}={value}")
    return value


def _leaves(tree: Tree) -> list[int]:
    return [tree] if isinstance(tree, int) else _leaves(tree[1]) + _leaves(tree[2])


class AddColumns(Family):
    """Sum of several integers; the work adds them one by one."""

    mode = "value"
    answer = Integer()

    def generate(self, rng: Random, level: int) -> Instance:
        terms, digits = 3 + level // 4, 1 + (level + 1) // 2
        return {"terms": [rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(terms)]}

    def prompt(self, x: Instance) -> str:
        return f"Compute {' + '.join(map(str, x['terms']))}."

    def solve(self, x: Instance) -> int:
        return sum(x["terms"])

    def work(self, x: Instance) -> str:
        lines, total = [], x["terms"][0]
        for term in x["terms"][1:]:
            lines.append(f"{total}+{term}={total + term}")
            total += term
        return "\n".join(lines)

    def oracle(self, x: Instance) -> int:
        width = max(len(str(t)) for t in x["terms"])
        digits, carry = [], 0
        for place in range(width):  # by hand, from the last column
            carry += sum(int(str(t).zfill(width)[-1 - place]) for t in x["terms"])
            digits.append(str(carry % 10))
            carry //= 10
        return int(str(carry) + "".join(reversed(digits)))


class NestedBracketExpression(Family):
    """Value of an expression with + - * and parentheses."""

    mode = "value"
    answer = Integer()

    def generate(self, rng: Random, level: int) -> Instance:
        return {"tree": _random_tree(rng, 3 + (level + 1) // 2, 9 + 3 * level)}

    def prompt(self, x: Instance) -> str:
        return f"Compute {_show(x['tree'])}."

    def solve(self, x: Instance) -> int:
        return _evaluate(x["tree"], [])

    def work(self, x: Instance) -> str:
        steps: list[str] = []
        _evaluate(x["tree"], steps)
        return "\n".join(steps)

    def oracle(self, x: Instance) -> int:
        return _evaluate(_read(_show(x["tree"])), [])


class LongDivisionSteps(Family):
    """Long division: every intermediate remainder, then the quotient."""

    mode = "trace"
    answer = Integers("the remainder after each digit, then the quotient")

    def generate(self, rng: Random, level: int) -> Instance:
        digits = 2 if level == 0 else 3 + level
        return {
            "dividend": rng.randrange(10 ** (digits - 1), 10**digits),
            "divisor": rng.randrange(2, 10 * (level + 1)),
        }

    def prompt(self, x: Instance) -> str:
        return f"Divide {x['dividend']} by {x['divisor']} digit by digit from the left, with remainders."

    def solve(self, x: Instance) -> list[int]:
        rests, rest = [], 0
        for digit in str(x["dividend"]):
            rest = (10 * rest + int(digit)) % x["divisor"]
            rests.append(rest)
        return [*rests, x["dividend"] // x["divisor"]]

    def work(self, x: Instance) -> str:
        lines, rest, divisor = [], 0, x["divisor"]
        for digit in str(x["dividend"]):
            part = 10 * rest + int(digit)
            rest = part % divisor
            lines.append(f"{part}={part // divisor}*{divisor}+{rest}")
        return "\n".join(lines)

    def oracle(self, x: Instance) -> list[int]:
        text = str(x["dividend"])
        return [int(text[: i + 1]) % x["divisor"] for i in range(len(text))] + [int(text) // x["divisor"]]


class BaseConversion(Family):
    """A whole number from one base to another."""

    mode = "value"
    answer = Text("the digits, a to f for 10 to 15", fold=True)

    def generate(self, rng: Random, level: int) -> Instance:
        if level == 0:
            return {"digits": str(rng.randrange(4, 100)), "base": 10, "to": rng.randrange(2, 6)}
        base, to = rng.sample(range(2, 11 if level < 4 else 17), 2)
        n = rng.randrange(2 ** (8 + 2 * level), 2 ** (10 + 2 * level))
        return {"digits": self._write(n, base), "base": base, "to": to}

    def _write(self, n: int, base: int) -> str:
        text = ""
        while n:
            n, digit = divmod(n, base)
            text = _DIGITS[digit] + text
        return text

    def prompt(self, x: Instance) -> str:
        return f"Convert {x['digits']} from base {x['base']} to base {x['to']}."

    def solve(self, x: Instance) -> str:
        return self._write(int(x["digits"], x["base"]), x["to"])

    def work(self, x: Instance) -> str:
        lines, base, to = [], x["base"], x["to"]
        n = _DIGITS.index(x["digits"][0])
        if base == 10:
            n = int(x["digits"])
        else:
            for digit in x["digits"][1:]:
                lines.append(f"{n}*{base}+{_DIGITS.index(digit)}={n * base + _DIGITS.index(digit)}")
                n = n * base + _DIGITS.index(digit)
        while n:
            lines.append(f"{n}={n // to}*{to}+{n % to}")
            n //= to
        return "\n".join(lines)

    def oracle(self, x: Instance) -> str:
        n = sum(_DIGITS.index(d) * x["base"] ** i for i, d in enumerate(reversed(x["digits"])))
        power = 1
        while power * x["to"] <= n:
            power *= x["to"]
        text = ""
        while power:  # greedily from the highest power
            text += _DIGITS[n // power]
            n, power = n % power, power // x["to"]
        return text


class FractionSum(Family):
    """Sum and difference of fractions."""

    mode = "value"
    answer = Rational()

    def generate(self, rng: Random, level: int) -> Instance:
        if level == 0:
            return {"terms": [[rng.randint(1, 5), rng.randint(2, 6)] for _ in range(2)]}
        top = 12 + 3 * level
        terms = [[rng.choice([-1, 1]) * rng.randint(1, top + 5), rng.randint(2, top)] for _ in range(2 + level // 3)]
        terms[0][0] = abs(terms[0][0])
        return {"terms": terms}

    def _join(self, terms: list[list[int]]) -> str:
        return "".join(f"{'-' if n < 0 else '+'}{abs(n)}/{d}" for n, d in terms).removeprefix("+")

    def prompt(self, x: Instance) -> str:
        return f"Compute {self._join(x['terms'])}."

    def solve(self, x: Instance) -> str:
        common = lcm(*(d for _, d in x["terms"]))
        return self.answer.parse(f"{sum(n * common // d for n, d in x['terms'])}/{common}")

    def work(self, x: Instance) -> str:
        common = lcm(*(d for _, d in x["terms"]))
        terms = [[n * common // d, common] for n, d in x["terms"]]
        return f"{self._join(terms)}={sum(n for n, _ in terms)}/{common}"

    def oracle(self, x: Instance) -> str:
        top, bottom = 0, 1
        for n, d in x["terms"]:  # cross-multiplied, not reduced
            top, bottom = top * d + n * bottom, bottom * d
        return f"{top}/{bottom}"


class MissingDigitsInSum(Family):
    """An addition some of whose digits are hidden; any digits that make it true count."""

    mode = "inverse"
    answer = Integers("the digit of each ? in order")
    unique = False

    def generate(self, rng: Random, level: int) -> Instance:
        width = 2 + (level + 1) // 2
        terms = [rng.randrange(10 ** (width - 1), 10**width) for _ in range(2)]
        rows = [list(str(n)) for n in [*terms, sum(terms)]]
        for place in range(1, width + 1):
            for row in rng.sample(rows, 1 + (rng.random() < level / 18)):
                row[-place] = "?"
        return {"rows": ["".join(row) for row in rows]}

    def prompt(self, x: Instance) -> str:
        a, b, total = x["rows"]
        return f"Find the digits: {a} + {b} = {total}. No number starts with 0."

    def _columns(self, rows: list[str]) -> list[tuple[int, ...]]:
        """Digits of each column from the right, with the carry into it at the end."""

        def choices(row: str, place: int) -> list[int]:
            if place >= len(row):
                return [0]
            digit = row[-1 - place]
            return [int(digit)] if digit != "?" else list(range(place == len(row) - 1, 10))

        width = max(map(len, rows))
        ways: list[dict[int, tuple[int, ...]]] = [{0: ()}]  # by the carry out of a column: its digits and carry in
        for place in range(width):
            ways.append({})
            for carry in ways[-2]:
                for a, b, total in product(*(choices(row, place) for row in rows)):
                    out, last = divmod(a + b + carry, 10)
                    if last == total:
                        ways[-1].setdefault(out, (a, b, total, carry))
        columns, carry = [], 0
        for way in reversed(ways[1:]):
            columns.append(way[carry])
            carry = way[carry][3]
        return columns[::-1]

    def solve(self, x: Instance) -> list[int]:
        columns = self._columns(x["rows"])
        return [
            columns[len(row) - 1 - i][r]
            for r, row in enumerate(x["rows"])
            for i, digit in enumerate(row)
            if digit == "?"
        ]

    def check(self, x: Instance, value: list[int]) -> bool:
        text = " ".join(x["rows"])
        if len(value) != text.count("?") or not all(0 <= digit <= 9 for digit in value):
            return False
        a, b, total = text.replace("?", "{}").format(*value).split()
        return int(a) + int(b) == int(total) and "0" not in (a[0], b[0], total[0])

    def work(self, x: Instance) -> str:
        return "\n".join(f"{a}+{b}{'+1' * carry}={a + b + carry}" for a, b, _, carry in self._columns(x["rows"]))

    def oracle(self, x: Instance) -> list[int] | None:
        holes = "".join(x["rows"]).count("?")
        if holes > 4:
            return None
        return next(list(digits) for digits in product(range(9, -1, -1), repeat=holes) if self.check(x, list(digits)))


class AllNumbersTarget(Family):
    """An expression that uses every given number once and has the wanted value."""

    mode = "construct"
    answer = Text("an expression such as (1+2)*3")
    unique = False

    def generate(self, rng: Random, level: int) -> Instance:
        while True:
            tree = _random_tree(rng, 3 + (level + 2) // 3, 9 + 3 * level)
            target = _evaluate(tree, [])
            if 1 <= target <= 50 * (level + 1):
                numbers = _leaves(tree)
                rng.shuffle(numbers)
                return {"numbers": numbers, "target": target, "solution": _show(tree)}

    def prompt(self, x: Instance) -> str:
        numbers = ", ".join(map(str, x["numbers"]))
        return f"Make {x['target']} from {numbers}: use each number once, with + - * and parentheses."

    def solve(self, x: Instance) -> str:
        return x["solution"]

    def check(self, x: Instance, value: str) -> bool:
        try:
            tree = _read(value)
        except ValueError:
            return False
        return sorted(_leaves(tree)) == sorted(x["numbers"]) and _evaluate(tree, []) == x["target"]

    def work(self, x: Instance) -> str:
        steps: list[str] = []
        _evaluate(_read(x["solution"]), steps)
        return "\n".join(steps)

    def oracle(self, x: Instance) -> str | None:
        if len(x["numbers"]) > 4:
            return None

        def search(trees: list[Tree]) -> Tree:
            if len(trees) == 1:
                return trees[0] if _evaluate(trees[0], []) == x["target"] else None
            for left, right, *rest in permutations(trees):
                for operator in "*+-":
                    if found := search([[operator, left, right], *rest]):
                        return found
            return None

        return _show(search(x["numbers"]))

    def canonical(self, x: Instance) -> Any:
        return [sorted(x["numbers"]), x["target"]]

    def size(self, x: Instance) -> float:
        return len(x["numbers"])


class LargestNumberFromParts(Family):
    """Numbers joined in the order that makes the largest number."""

    mode = "optimise"
    answer = Integer("the joined number")

    def generate(self, rng: Random, level: int) -> Instance:
        digits = [1] if level == 0 else [1, 2] if level < 5 else [1, 2, 3]
        figures = rng.sample("123456789", 4 if level else 9)  # few different ones: the order is not plain
        sizes = rng.choices(digits, k=3 + (level + 1) // 2)
        return {"parts": [int("".join(rng.choices(figures, k=size))) for size in sizes]}

    def prompt(self, x: Instance) -> str:
        return f"Join {', '.join(map(str, x['parts']))} in the order that gives the largest number."

    def _order(self, x: Instance) -> list[str]:
        def compare(a: str, b: str) -> int:
            return int(b + a) - int(a + b)

        return sorted(map(str, x["parts"]), key=cmp_to_key(compare))

    def solve(self, x: Instance) -> int:
        return int("".join(self._order(x)))

    def work(self, x: Instance) -> str:
        return " ".join(self._order(x))

    def oracle(self, x: Instance) -> int | None:
        if len(x["parts"]) > 6:
            return None
        return max(int("".join(order)) for order in permutations(map(str, x["parts"])))
