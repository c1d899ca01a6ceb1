"""Divisibility, primes, congruences and sums of whole numbers."""

from __future__ import annotations

from math import gcd, prod
from random import Random
from typing import Any

from .answers import Integer, Integers
from .base import Family, Instance


def _factors(n: int) -> list[int]:
    """The prime factors of a small n, ascending."""
    found, p = [], 2
    while p * p <= n:
        while n % p == 0:
            found.append(p)
            n //= p
        p += 1
    return found + [n] * (n > 1)


def _bezout(a: int, b: int) -> tuple[int, int, int]:
    """g, s, t with g = gcd(a, b) = s*a + t*b."""
    s, t, s_next, t_next = 1, 0, 0, 1
    while b:
        q = a // b
        a, b = b, a - q * b
        s, s_next = s_next, s - q * s_next
        t, t_next = t_next, t - q * t_next
    return a, s, t


class GcdByEuclid(Family):
    """Euclid's algorithm: every remainder, then the greatest common divisor."""

    mode = "trace"
    answer = Integers("each remainder a mod b (the last is 0), then the gcd")

    def generate(self, rng: Random, level: int) -> Instance:
        top = 1_500 * 4 ** (level - 1) if level else 36
        g = rng.randint(1, 3 + level)
        small, large = sorted(rng.sample(range(2, top // g), 2))
        return {"a": g * large, "b": g * small}

    def prompt(self, x: Instance) -> str:
        return f"From (a, b) = ({x['a']}, {x['b']}), replace (a, b) by (b, a mod b) until b = 0."

    def solve(self, x: Instance) -> list[int]:
        a, b, rests = x["a"], x["b"], []
        while b:
            a, b = b, a % b
            rests.append(b)
        return [*rests, a]

    def work(self, x: Instance) -> str:
        left = [x["a"], x["b"], *self.solve(x)]
        return "\n".join(f"{a}-{a // b}*{b}={r}" for a, b, r in zip(left, left[1:], left[2:-1], strict=False))

    def oracle(self, x: Instance) -> list[int] | None:
        a, b, rests = x["a"], x["b"], []
        if a > 10**5:
            return None
        while b:
            rests.append(a - max(range(0, a + 1, b)))
            a, b = b, rests[-1]
        return [*rests, max(d for d in range(1, x["b"] + 1) if x["a"] % d == x["b"] % d == 0)]


class PrimeFactorisation(Family):
    """A number, or a product of numbers, written as a product of primes."""

    mode = "construct"
    answer = Integers("the primes, repeated as often as they divide, in any order")
    unique = False

    def generate(self, rng: Random, level: int) -> Instance:
        top = 400 + 60 * level**2
        numbers: list[int] = []
        while len(numbers) < 1 + (level > 0) + level // 5:
            n = rng.randint(4, top)
            if len(_factors(n)) > 1:
                numbers.append(n)
        return {"numbers": numbers}

    def prompt(self, x: Instance) -> str:
        return f"Write {' * '.join(map(str, x['numbers']))} as a product of primes."

    def solve(self, x: Instance) -> list[int]:
        return sorted(p for n in x["numbers"] for p in _factors(n))

    def check(self, x: Instance, value: list[int]) -> bool:
        top = max(x["numbers"])
        if not all(2 <= p <= top for p in value) or len(value) > 100:
            return False
        return prod(value) == prod(x["numbers"]) and all(_factors(p) == [p] for p in value)

    def work(self, x: Instance) -> str:
        return "\n".join(f"{n}={'*'.join(map(str, _factors(n)))}" for n in x["numbers"])

    def oracle(self, x: Instance) -> list[int]:
        left, found = prod(x["numbers"]), []
        for d in range(max(x["numbers"]), 1, -1):  # divides by every prime, largest first
            if left % d == 0 and all(d % e for e in range(2, d)):
                while left % d == 0:
                    left //= d
                    found.append(d)
        return found

    def canonical(self, x: Instance) -> Any:
        return prod(x["numbers"])


class ModularInverse(Family):
    """The inverse of a number modulo another; the work is Euclid's algorithm on multiples of the number."""

    mode = "inverse"
    answer = Integer("x")

    def generate(self, rng: Random, level: int) -> Instance:
        top = 1_000 * 4 ** (level - 1) if level else 40
        while True:
            m = rng.randint(top // 2 if level else 5, top)
            a = rng.randint(2, m - 2)
            if gcd(a, m) == 1:
                return {"a": a, "m": m}

    def prompt(self, x: Instance) -> str:
        return f"Find x with 0 < x < {x['m']} such that {x['a']} * x leaves remainder 1 when divided by {x['m']}."

    def solve(self, x: Instance) -> int:
        return pow(x["a"], -1, x["m"])

    def work(self, x: Instance) -> str:
        (r, s), (r_next, s_next), lines = (x["m"], 0), (x["a"], 1), []
        while r_next > 1:
            q = r // r_next
            (r, s), (r_next, s_next) = (r_next, s_next), (r - q * r_next, s - q * s_next)
            lines.append(f"{r_next}={s_next}*{x['a']}")
        return "\n".join([*lines, f"{s_next}+{x['m']}={s_next + x['m']}"] if s_next < 0 else lines)

    def oracle(self, x: Instance) -> int | None:
        if x["m"] > 20_000:
            return None
        return next(k for k in range(x["m"]) if x["a"] * k % x["m"] == 1)


class ChineseRemainder(Family):
    """The smallest number with given remainders modulo coprime numbers."""

    mode = "inverse"
    answer = Integer("the smallest x >= 0")

    def generate(self, rng: Random, level: int) -> Instance:
        count, top = 2 + (level + 2) // 3, 9 + 4 * level
        moduli: list[int] = []
        while len(moduli) < count:
            m = rng.randint(3, top)
            if all(gcd(m, other) == 1 for other in moduli):
                moduli.append(m)
            elif rng.random() < 0.1:
                moduli.clear()
        return {"clues": [[rng.randrange(m), m] for m in moduli]}

    def prompt(self, x: Instance) -> str:
        return f"Find x: {', '.join(f'x mod {m} = {r}' for r, m in x['clues'])}."

    def _stages(self, x: Instance) -> list[tuple[int, int]]:
        """The solution of the first clues and its modulus, after each clue."""
        value, modulus, stages = 0, 1, []
        for r, m in x["clues"]:
            value += modulus * ((r - value) * pow(modulus, -1, m) % m)
            modulus *= m
            stages.append((value, modulus))
        return stages

    def solve(self, x: Instance) -> int:
        return self._stages(x)[-1][0]

    def work(self, x: Instance) -> str:
        return "\n".join(f"x mod {modulus} = {value}" for value, modulus in self._stages(x))

    def oracle(self, x: Instance) -> int:
        whole = prod(m for _, m in x["clues"])
        total = 0
        for r, m in x["clues"]:
            rest = whole // m
            total += r * rest * next(k for k in range(m) if k * rest % m == 1)
        return total % whole

    def canonical(self, x: Instance) -> Any:
        return sorted(x["clues"])


class LinearDiophantine(Family):
    """Whole numbers that solve a*x + b*y = c, or a common divisor of a and b that shows that there are none."""

    mode = "decide"
    answer = Integers("x y, or d alone")
    unique = False

    def generate(self, rng: Random, level: int) -> Instance:
        d = rng.choice([2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37][: 5 + level])
        solvable, g, spread = rng.random() < 0.6, rng.choice([1, d]), 3 + 3 * level
        while True:
            u, v = (rng.randint(1, 6 + 20 * level) for _ in range(2))
            if gcd(u, v) > 1:
                continue
            if not solvable:
                c = rng.randint(1, 2 * d * (u + v))
                if c % d:
                    return {"a": d * u, "b": d * v, "c": c}
            else:
                c = abs(u * rng.randint(-spread, spread) + v * rng.randint(-spread, spread))
                if c and (level == 0 or (c % u and c % v)):
                    return {"a": g * u, "b": g * v, "c": g * c}

    def prompt(self, x: Instance) -> str:
        a, b, c = x["a"], x["b"], x["c"]
        return f"Find integers x, y with {a}x + {b}y = {c}, or else a d > 1 that divides {a} and {b} but not {c}."

    def solve(self, x: Instance) -> list[int]:
        g, s, t = _bezout(x["a"], x["b"])
        times, rest = divmod(x["c"], g)
        return [g] if rest else [s * times, t * times]

    def check(self, x: Instance, value: list[int]) -> bool:
        if len(value) == 1:
            d = value[0]
            return d > 1 and x["a"] % d == x["b"] % d == 0 and x["c"] % d != 0
        return len(value) == 2 and x["a"] * value[0] + x["b"] * value[1] == x["c"]

    def work(self, x: Instance) -> str:
        g, s, t = _bezout(x["a"], x["b"])
        if x["c"] % g:
            return f"gcd={g}\n{x['c']}={x['c'] // g}*{g}+{x['c'] % g}"
        return f"gcd={g}={s}*{x['a']}{t:+}*{x['b']}\n{x['c']}={x['c'] // g}*{g}"

    def oracle(self, x: Instance) -> list[int]:
        a, b, c = x["a"], x["b"], x["c"]
        for k in range(b):
            if (c - a * k) % b == 0:
                return [k, (c - a * k) // b]
        return [next(d for d in range(2, a + 1) if a % d == b % d == 0 and c % d)]


class SmallestNonRepresentableSum(Family):
    """The smallest positive number that is no sum of some of the given ones."""

    mode = "optimise"
    answer = Integer()

    def generate(self, rng: Random, level: int) -> Instance:
        count = 5 + level
        gap, reach, numbers = rng.randint(1 + count // 2, count), 0, []
        for i in range(count):
            if i < gap:
                numbers.append(rng.randint(1 + reach // 3, reach + 1))
                reach += numbers[-1]
            else:
                numbers.append(rng.randint(reach + 2, 3 * reach + 20))
        rng.shuffle(numbers)
        return {"numbers": numbers}

    def prompt(self, x: Instance) -> str:
        numbers = ", ".join(map(str, x["numbers"]))
        return f"What is the smallest positive integer that is no sum of some of {numbers}, each used at most once?"

    def solve(self, x: Instance) -> int:
        reach = 0
        for n in sorted(x["numbers"]):
            if n > reach + 1:
                break
            reach += n
        return reach + 1

    def work(self, x: Instance) -> str:
        reach, lines = 0, []
        for n in sorted(x["numbers"]):
            if n > reach + 1:
                lines.append(f"{n}>{reach + 1}")
                break
            lines.append(f"{reach}+{n}={reach + n}")
            reach += n
        return "\n".join(lines)

    def oracle(self, x: Instance) -> int:
        sums = 1  # bit s is set when s is a sum
        for n in x["numbers"]:
            sums |= sums << n
        return next(s for s in range(sum(x["numbers"]) + 2) if not sums >> s & 1)

    def canonical(self, x: Instance) -> Any:
        return sorted(x["numbers"])
