"""Equations and polynomials."""

from __future__ import annotations

from fractions import Fraction
from math import gcd, isqrt
from random import Random

from .answers import Integers, Rational
from .base import Family, Instance


def _show(coefficients: list[int], symbol: str = "x") -> str:
    """A polynomial as text; coefficients from the highest power down."""
    terms = []
    for i, c in enumerate(coefficients):
        power = len(coefficients) - 1 - i
        symbols = "" if power == 0 else symbol if power == 1 else f"{symbol}^{power}"
        if c:
            terms.append(f"{'-' if c < 0 else ''}{'' if abs(c) == 1 and power else abs(c)}{symbols}")
    return " + ".join(terms).replace("+ -", "- ") or "0"


def _times(p: list[int], q: list[int]) -> list[int]:
    product = [0] * (len(p) + len(q) - 1)
    for i, a in enumerate(p):
        for j, b in enumerate(q):
            product[i + j] += a * b
    return product


def _nonzero(rng: Random, top: int) -> int:
    return rng.choice([-1, 1]) * rng.randint(1, top)


class LinearEquation(Family):
    """One equation in x, linear after expanding brackets."""

    mode = "value"
    answer = Rational("the value of x, an integer or a fraction")

    def generate(self, rng: Random, level: int) -> Instance:
        if level == 0:
            a, b = rng.randint(2, 9), rng.randint(1, 9)
            return {"left": [[1, a, b]], "right": [[1, 0, a * rng.randint(0, 9) + b]]}
        while True:
            left, right = ([[1, rng.randint(1, 9), rng.randint(-20, 20)]] for _ in range(2))
            for _ in range(level // 2):
                rng.choice([left, right]).append([_nonzero(rng, 9), _nonzero(rng, 3 + level), _nonzero(rng, 9 + level)])
            (p, q), (r, s) = self._collect(left), self._collect(right)
            if p == r:
                continue
            if level < 5:  # the constant on the right makes x whole
                right[0][2] += (p - r) * rng.randint(-30, 30) + q - s
            return {"left": left, "right": right}

    def _collect(self, side: list[list[int]]) -> tuple[int, int]:
        return sum(k * p for k, p, _ in side), sum(k * q for k, _, q in side)

    def _side(self, side: list[list[int]]) -> str:
        terms = [_show([p, q]) if k == 1 else f"{'-' if k == -1 else k}({_show([p, q])})" for k, p, q in side]
        return " + ".join(terms).replace("+ -", "- ")

    def prompt(self, x: Instance) -> str:
        return f"Solve {self._side(x['left'])} = {self._side(x['right'])}."

    def solve(self, x: Instance) -> str:
        (p, q), (r, s) = self._collect(x["left"]), self._collect(x["right"])
        return str(Fraction(s - q, p - r))

    def work(self, x: Instance) -> str:
        (p, q), (r, s) = self._collect(x["left"]), self._collect(x["right"])
        collected = f"{_show([p, q])} = {_show([r, s])}\n" if r else ""
        return f"{collected}{_show([p - r, 0])} = {s - q}"

    def oracle(self, x: Instance) -> str:
        def excess(value: int) -> int:
            left, right = (sum(k * (p * value + q) for k, p, q in x[side]) for side in ("left", "right"))
            return left - right

        return str(Fraction(excess(0), excess(0) - excess(1)))  # where the line through two points meets 0


class LinearSystem(Family):
    """Two to four linear equations with a whole solution; the work eliminates one unknown after another."""

    mode = "value"
    answer = Integers("the values in the order of the unknowns")

    def generate(self, rng: Random, level: int) -> Instance:
        n = 2 + level // 4
        while True:
            if level == 0:
                rows = [[rng.randint(1, 3) for _ in range(n)] for _ in range(n)]
                values = [rng.randint(0, 9) for _ in range(n)]
            else:
                rows = [[_nonzero(rng, 3 + level) for _ in range(n)] for _ in range(n)]
                values = [rng.randint(-6 - 2 * level, 6 + 2 * level) for _ in range(n)]
            if self._determinant(rows):
                return {"rows": [[*row, sum(a * v for a, v in zip(row, values, strict=True))] for row in rows]}

    def _determinant(self, rows: list[list[int]]) -> int:
        if len(rows) == 1:
            return rows[0][0]
        minors = ([row[:j] + row[j + 1 :] for row in rows[1:]] for j in range(len(rows)))
        return sum((-1) ** j * rows[0][j] * self._determinant(minor) for j, minor in enumerate(minors) if rows[0][j])

    def _equation(self, row: list[int]) -> str:
        terms = [_show([a, 0], symbol) for a, symbol in zip(row, "xyzw"[: len(row) - 1], strict=False) if a]
        return f"{' + '.join(terms).replace('+ -', '- ')} = {row[-1]}"

    def prompt(self, x: Instance) -> str:
        return f"Solve for {', '.join('xyzw'[: len(x['rows'])])}: {'; '.join(map(self._equation, x['rows']))}."

    def _solve(self, x: Instance) -> tuple[list[int], list[str]]:
        """The values, and the equations met on the way."""
        rows, lines = [list(row) for row in x["rows"]], []
        n = len(rows)
        for i in range(n):
            pivot = next(j for j in range(i, n) if rows[j][i])
            rows[i], rows[pivot] = rows[pivot], rows[i]
            for j in range(i + 1, n):
                if rows[j][i]:
                    row = [a * rows[i][i] - b * rows[j][i] for a, b in zip(rows[j], rows[i], strict=True)]
                    rows[j] = [a // gcd(*row) for a in row]
                    lines.append(self._equation(rows[j]))
        values = [0] * n
        for i in reversed(range(n)):
            values[i] = (rows[i][n] - sum(rows[i][j] * values[j] for j in range(i + 1, n))) // rows[i][i]
            if (line := f"{'xyzw'[i]} = {values[i]}") != lines[-1]:
                lines.append(line)
        return values, lines

    def solve(self, x: Instance) -> list[int]:
        return self._solve(x)[0]

    def work(self, x: Instance) -> str:
        return "\n".join(self._solve(x)[1])

    def oracle(self, x: Instance) -> list[int]:
        n = len(x["rows"])
        whole = self._determinant([row[:n] for row in x["rows"]])
        return [
            self._determinant([[*row[:i], row[n], *row[i + 1 : n]] for row in x["rows"]]) // whole for i in range(n)
        ]


class PolynomialInterpolate(Family):
    """The whole coefficients of a polynomial of known degree from its values."""

    mode = "inverse"
    answer = Integers("the coefficients from the highest power to the constant")

    def generate(self, rng: Random, level: int) -> Instance:
        degree = 1 + level // 3
        if level == 0:
            coefficients, places = [rng.randint(1, 9), rng.randint(0, 9)], range(4)
        else:
            top = 30 + 5 * level
            coefficients = [_nonzero(rng, top), *(rng.randint(-top, top) for _ in range(degree))]
            places = range(-2 - level, 4 + level)
        points = []
        for at in sorted(rng.sample(places, degree + 1)):
            value = 0
            for c in coefficients:
                value = value * at + c
            points.append([at, value])
        return {"points": points}

    def prompt(self, x: Instance) -> str:
        forms = ["ax + b", "ax^2 + bx + c", "ax^3 + bx^2 + cx + d", "ax^4 + bx^3 + cx^2 + dx + e"]
        values = ", ".join(f"p({at}) = {value}" for at, value in x["points"])
        return f"Let p(x) = {forms[len(x['points']) - 2]}, {values}. Find p."

    def _newton(self, x: Instance) -> tuple[list[int], list[str]]:
        places, table = [at for at, _ in x["points"]], [value for _, value in x["points"]]
        firsts, lines = [table[0]], []
        for order in range(1, len(places)):
            gaps = [places[i + order] - places[i] for i in range(len(table) - 1)]
            steps = list(zip(table, table[1:], gaps, strict=False))
            lines += [f"({b}-{a})/{gap}={(b - a) // gap}".replace("--", "+") for a, b, gap in steps]
            table = [(b - a) // gap for a, b, gap in steps]
            firsts.append(table[0])
        coefficients = [firsts[-1]]
        for first, at in zip(reversed(firsts[:-1]), reversed(places[:-1]), strict=True):
            product = _times(coefficients, [1, -at])
            coefficients = [*product[:-1], product[-1] + first]
            lines.append(_show(coefficients))
        return coefficients, lines

    def solve(self, x: Instance) -> list[int]:
        return self._newton(x)[0]

    def work(self, x: Instance) -> str:
        return "\n".join(self._newton(x)[1])

    def oracle(self, x: Instance) -> list[int]:
        total = [Fraction(0)] * len(x["points"])  # Lagrange's sum
        for at, value in x["points"]:
            basis, scale = [1], 1
            for other, _ in x["points"]:
                if other != at:
                    basis, scale = _times(basis, [1, -other]), scale * (at - other)
            total = [t + Fraction(value * b, scale) for t, b in zip(total, basis, strict=True)]
        return [int(t) for t in total]


class FactorOverIntegers(Family):
    """A polynomial written as a product of linear factors; order, signs and common factors are free."""

    mode = "construct"
    answer = Integers("p and q of each factor in turn")
    unique = False

    def generate(self, rng: Random, level: int) -> Instance:
        leads, top = (1, 12) if level == 0 else (5 + level, 40 + 5 * level) if level < 5 else (level - 1, 6 * level)
        polynomial = [1]
        for _ in range(2 if level < 5 else 3):
            polynomial = _times(polynomial, [rng.randint(1, leads), _nonzero(rng, top)])
        return {"polynomial": polynomial}

    def prompt(self, x: Instance) -> str:
        count = len(x["polynomial"]) - 1
        return f"Factor {_show(x['polynomial'])} into {count} factors px + q with integers p, q."

    def solve(self, x: Instance) -> list[int]:
        left, answer = list(x["polynomial"]), []
        while len(left) > 2:
            p, q = self._factor(left)
            answer += [p, q]
            left = self._divide(left, p, q)
        return [*answer, *left]

    def _factor(self, polynomial: list[int]) -> tuple[int, int]:
        """A linear factor in lowest terms, by the rational root theorem."""
        last = abs(polynomial[-1])
        sizes = [d for k in range(1, isqrt(last) + 1) if last % k == 0 for d in (k, last // k)]
        for p in (d for d in range(1, polynomial[0] + 1) if polynomial[0] % d == 0):
            for q in (sign * size for size in sorted(sizes) for sign in (1, -1)):
                value = 0
                for i, c in enumerate(polynomial):
                    value = value * -q + c * p**i
                if value == 0:
                    return p, q
        raise ValueError("no linear factor")

    def _divide(self, polynomial: list[int], p: int, q: int) -> list[int]:
        quotient, rest = [], 0
        for c in polynomial[:-1]:
            quotient.append((c - rest) // p)
            rest = quotient[-1] * q
        return quotient

    def check(self, x: Instance, value: list[int]) -> bool:
        if len(value) != 2 * len(x["polynomial"]) - 2:
            return False
        product = [1]
        for i in range(0, len(value), 2):
            product = _times(product, value[i : i + 2])
        return product == x["polynomial"]

    def work(self, x: Instance) -> str:
        polynomial, answer = x["polynomial"], self.solve(x)
        lines = []
        if len(polynomial) == 4:
            polynomial = self._divide(polynomial, *answer[:2])
            lines.append(f"({_show(answer[:2])})({_show(polynomial)})")
        p, q, r, s = answer[-4:]
        lines += [f"{p * s}*{q * r}={polynomial[0] * polynomial[2]}", f"{p * s}{q * r:+}={polynomial[1]}"]
        return "\n".join(lines)

    def oracle(self, x: Instance) -> list[int] | None:
        if len(x["polynomial"]) != 3:
            return None
        a, b, c = x["polynomial"]
        half = b + isqrt(b * b - 4 * a * c)  # 4a(ax^2 + bx + c) = (2ax + b + s)(2ax + b - s)
        shared = gcd(2 * a, half)
        p, q = 2 * a // shared, half // shared
        return [p, q, a // p, c // q]
