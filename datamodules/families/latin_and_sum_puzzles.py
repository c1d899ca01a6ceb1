"""Grids to complete: each symbol once a line, or prescribed sums. Every puzzle has one solution."""

from __future__ import annotations

from fractions import Fraction
from itertools import chain, pairwise, permutations
from random import Random

from .answers import Grid, Integers
from .base import Family, Instance

Cells = list[int]
"""A grid in reading order, 0 for an empty cell."""
Equation = tuple[dict[int, int], int]
"""The sign of each cell in a sum, and the sum."""


def _read(text: str) -> list[list[str]]:
    return [row.split() for row in text.split(" / ")]


def _write(rows: list[list[int]]) -> str:
    return " / ".join(" ".join(str(v) if v else "." for v in row) for row in rows)


def _shuffled(rng: Random, n: int, band: int) -> list[int]:
    """The lines 0..n-1 in an order that keeps bands of `band` lines together."""
    bands = rng.sample(range(n // band), n // band)
    return [b * band + i for b in bands for i in rng.sample(range(band), band)]


class _AllDifferent(Family):
    """Squares with the symbols 1..n once in each group of cells."""

    mode = "complete"
    answer = Grid("the full grid, rows separated by /")
    sizes: list[tuple[int, int, int]]
    """By level: side, rows of a box, most empty cells."""

    def groups(self, n: int) -> list[list[int]]:
        """For each cell the numbers of its groups."""
        return [[r, n + c] for r in range(n) for c in range(n)]

    def generate(self, rng: Random, level: int) -> Instance:
        n, high, empty = self.sizes[level]
        symbols = rng.sample(range(1, n + 1), n)
        rows, columns = _shuffled(rng, n, high), _shuffled(rng, n, n // high)
        cells = [symbols[(r % high * (n // high) + r // high + c) % n] for r in rows for c in columns]
        for i in rng.sample(range(n * n), n * n):
            if cells.count(0) == empty:
                break
            kept, cells[i] = cells[i], 0
            if len(self.search(cells[:], n)) > 1:
                cells[i] = kept
        return {"grid": _write([cells[i : i + n] for i in range(0, n * n, n)])}

    def search(self, cells: Cells, n: int) -> list[Cells]:
        """Up to two solutions; the cell with the fewest choices first."""
        groups = self.groups(n)
        used = [0] * (3 * n)
        for i, v in enumerate(cells):
            if v:
                for g in groups[i]:
                    used[g] |= 1 << v
        found: list[Cells] = []

        def fill(empty: list[int]) -> None:
            if not empty:
                found.append(cells[:])
                return
            best, choices = -1, 0
            for i in empty:
                taken = 0
                for g in groups[i]:
                    taken |= used[g]
                free = ~taken & (1 << n + 1) - 2
                if best < 0 or free.bit_count() < choices.bit_count():
                    best, choices = i, free
                    if not free & free - 1:
                        break
            rest = [i for i in empty if i != best]
            for v in range(1, n + 1):
                if choices >> v & 1 and len(found) < 2:
                    cells[best] = v
                    for g in groups[best]:
                        used[g] ^= 1 << v
                    fill(rest)
                    for g in groups[best]:
                        used[g] ^= 1 << v
            cells[best] = 0

        fill([i for i, v in enumerate(cells) if not v])
        return found

    def cells(self, x: Instance) -> tuple[Cells, int]:
        rows = _read(x["grid"])
        return [0 if v == "." else int(v) for row in rows for v in row], len(rows)

    def solve(self, x: Instance) -> list[list[str]]:
        cells, n = self.cells(x)
        full = list(map(str, self.search(cells, n)[0]))
        return [full[i : i + n] for i in range(0, n * n, n)]

    def check(self, x: Instance, value: list[list[str]]) -> bool:
        givens = _read(x["grid"])
        n = len(givens)
        if [len(row) for row in value] != [n] * n:
            return False
        if any(given not in (".", v) for given, v in zip(chain(*givens), chain(*value), strict=True)):
            return False
        symbols = {str(v) for v in range(1, n + 1)}
        seen = {(g, v) for gs, v in zip(self.groups(n), chain(*value), strict=True) for g in gs if v in symbols}
        return len(seen) == n * n * len(self.groups(n)[0])

    def work(self, x: Instance) -> str | None:
        """Cells with one choice left, one after the other; None when that does not fill the grid."""
        cells, n = self.cells(x)
        groups, lines = self.groups(n), []
        progress = True
        while progress:
            progress = False
            for i in range(n * n):
                taken = {v for v, gs in zip(cells, groups, strict=True) if v and set(gs) & set(groups[i])}
                if not cells[i] and len(taken) == n - 1:
                    cells[i] = next(v for v in range(1, n + 1) if v not in taken)
                    lines.append(f"r{i // n + 1}c{i % n + 1}={cells[i]}")
                    progress = True
        return "\n".join(lines) if all(cells) else None

    def oracle(self, x: Instance) -> list[list[str]] | None:
        if x["grid"].count(".") > 22:
            return None
        rows = _read(x["grid"])
        groups = self.groups(len(rows))

        def fill(i: int) -> bool:  # in reading order
            if i == len(groups):
                return True
            r, c = divmod(i, len(rows))
            if rows[r][c] != ".":
                return fill(i + 1)
            near = [j for j, gs in enumerate(groups) if set(gs) & set(groups[i])]
            for v in map(str, range(1, len(rows) + 1)):
                if all(rows[j // len(rows)][j % len(rows)] != v for j in near):
                    rows[r][c] = v
                    if fill(i + 1):
                        return True
            rows[r][c] = "."
            return False

        fill(0)
        return rows


class LatinComplete(_AllDifferent):
    """A Latin square with holes."""

    sizes = [(3, 1, 4), (4, 1, 6), (4, 1, 9), (5, 1, 12), (5, 1, 15), (6, 1, 19), (6, 1, 22)]
    sizes += [(7, 1, 28), (8, 1, 36), (9, 1, 45)]

    def prompt(self, x: Instance) -> str:
        return f"Fill . so that each row and column has 1 to {len(_read(x['grid']))} once: {x['grid']}"


class Sudoku(_AllDifferent):
    """Sudoku with 4, 6 or 9 rows."""

    sizes = [(4, 2, 4), (4, 2, 7), (4, 2, 10), (6, 2, 14), (6, 2, 18), (6, 2, 22)]
    sizes += [(9, 3, 36), (9, 3, 42), (9, 3, 47), (9, 3, 52)]

    def groups(self, n: int) -> list[list[int]]:
        high = 3 if n == 9 else 2
        wide = n // high
        return [[r, n + c, 2 * n + r // high * high + c // wide] for r in range(n) for c in range(n)]

    def prompt(self, x: Instance) -> str:
        n = len(_read(x["grid"]))
        box = {4: "2x2 box", 6: "box of 2 rows and 3 columns", 9: "3x3 box"}[n]
        return f"Fill . so that each row, column and {box} has 1 to {n} once: {x['grid']}"


class _Sums(Family):
    """Grids of positive numbers under linear equations, which can be solved one unknown at a time."""

    mode = "complete"
    answer = Integers("the missing numbers in reading order, separated by spaces")

    def equations(self, x: Instance) -> list[Equation]:
        raise NotImplementedError

    def puzzle(self, rng: Random, x: Instance, rows: list[list[int]], empty: int) -> Instance:
        """`x` with a grid that has up to `empty` holes."""
        sides, cells = [len(row) for row in rows], list(chain(*rows))
        for i in rng.sample(range(len(cells)), len(cells)):
            if cells.count(0) == empty:
                break
            kept, cells[i] = cells[i], 0
            if 0 in self.propagate(cells, self.equations(x | {"sides": sides}))[0]:
                cells[i] = kept
        return x | {"sides": sides, "grid": _write(self.rows(cells, sides))}

    def rows(self, cells: list, sides: list[int]) -> list[list]:
        starts = [sum(sides[:r]) for r in range(len(sides))]
        return [cells[start : start + side] for start, side in zip(starts, sides, strict=True)]

    def cells(self, x: Instance) -> Cells:
        return [0 if v == "." else int(v) for row in _read(x["grid"]) for v in row]

    def propagate(self, cells: Cells, equations: list[Equation]) -> tuple[Cells, list[tuple[int, Equation]]]:
        """Fills cells that are the last unknown of an equation, as long as there are any."""
        cells, steps = cells[:], []
        progress = True
        while progress:
            progress = False
            for signs, total in equations:
                unknown = [i for i in signs if not cells[i]]
                if len(unknown) == 1:
                    i = unknown[0]
                    cells[i] = signs[i] * (total - sum(sign * cells[j] for j, sign in signs.items()))
                    steps.append((i, (signs, total)))
                    progress = True
        return cells, steps

    def solve(self, x: Instance) -> list[int]:
        holes = self.cells(x)
        full, _ = self.propagate(holes, self.equations(x))
        return [v for v, hole in zip(full, holes, strict=True) if not hole]

    def work(self, x: Instance) -> str:
        cells, steps = self.propagate(self.cells(x), self.equations(x))
        lines = []
        for i, (signs, total) in steps:
            terms = [(signs[i], total)] if total else []
            terms += sorted(((-sign * signs[i], cells[j]) for j, sign in signs.items() if j != i), reverse=True)
            text = "".join("+-"[sign < 0] + str(v) for sign, v in terms).removeprefix("+")
            row = next(r for r in range(len(x["sides"])) if i < sum(x["sides"][: r + 1]))
            lines.append(f"r{row + 1}c{i - sum(x['sides'][:row]) + 1}={text}={cells[i]}")
        return "\n".join(lines)

    def oracle(self, x: Instance) -> list[int]:
        cells = self.cells(x)
        unknown = [i for i, v in enumerate(cells) if not v]
        matrix = []
        for signs, total in self.equations(x):
            known = sum(sign * cells[i] for i, sign in signs.items())
            matrix.append([Fraction(signs.get(i, 0)) for i in unknown] + [Fraction(total - known)])
        for column in range(len(unknown)):  # Gauss and Jordan
            pivot = next(r for r in range(column, len(matrix)) if matrix[r][column])
            matrix[column], matrix[pivot] = matrix[pivot], matrix[column]
            lead = matrix[column] = [v / matrix[column][column] for v in matrix[column]]
            for r, row in enumerate(matrix):
                if r != column and row[column]:
                    matrix[r] = [v - row[column] * w for v, w in zip(row, lead, strict=True)]
        return [int(row[-1]) for row in matrix[: len(unknown)]]


class MagicSquareComplete(_Sums):
    """A magic square with holes; numbers may repeat."""

    def generate(self, rng: Random, level: int) -> Instance:
        n = 3 if level < 4 else 4 if level < 7 else 5
        rows = self.three(rng, 9 + 20 * level) if n == 3 else self.larger(rng, n, 3 * level)
        return self.puzzle(rng, {"sum": sum(rows[0])}, rows, (3, 4, 5, 6, 6, 7, 8, 10, 12, 14)[level])

    def three(self, rng: Random, top: int) -> list[list[int]]:
        middle = rng.randint(4, top)
        a, b = rng.choice([-1, 1]) * rng.randint(1, middle // 2), rng.randint(0, (middle - 1) // 2)
        offsets = [[b, -a - b, a], [a - b, 0, b - a], [-a, a + b, -b]]
        return [[middle + d for d in row] for row in offsets]

    def larger(self, rng: Random, n: int, top: int) -> list[list[int]]:
        """A sum of permutation matrices that have one 1 on each diagonal."""
        base = rng.randint(1, top)
        rows = [[base] * n for _ in range(n)]
        for p in permutations(range(n)):
            if sum(p[r] == r for r in range(n)) == 1 == sum(p[r] == n - 1 - r for r in range(n)):
                weight = rng.randint(0, top)
                for r in range(n):
                    rows[r][p[r]] += weight
        return rows

    def equations(self, x: Instance) -> list[Equation]:
        n = len(x["sides"])
        lines = [[(r, c) for c in range(n)] for r in range(n)] + [[(r, c) for r in range(n)] for c in range(n)]
        lines += [[(r, r) for r in range(n)], [(r, n - 1 - r) for r in range(n)]]
        return [({r * n + c: 1 for r, c in line}, x["sum"]) for line in lines]

    def prompt(self, x: Instance) -> str:
        return f"Fill . so that each row, column and diagonal adds up to {x['sum']}: {x['grid']}"


class NumberPyramid(_Sums):
    """A pyramid in which each number is the sum of the two below it."""

    def generate(self, rng: Random, level: int) -> Instance:
        height = 3 + (level + 1) // 2
        top = 9 if level == 0 else 60
        rows = [[rng.randint(1, top) for _ in range(height)]]
        while len(rows[0]) > 1:
            rows.insert(0, [a + b for a, b in pairwise(rows[0])])
        if level == 0:
            return {"sides": [1, 2, 3], "grid": _write([[0], [0, 0], rows[2]])}
        return self.puzzle(rng, {}, rows, height * (height - 1) // 2)

    def equations(self, x: Instance) -> list[Equation]:
        starts = [r * (r + 1) // 2 for r in range(len(x["sides"]))]
        return [
            ({starts[r + 1] + c: 1, starts[r + 1] + c + 1: 1, starts[r] + c: -1}, 0)
            for r in reversed(range(len(starts) - 1))
            for c in range(r + 1)
        ]

    def prompt(self, x: Instance) -> str:
        return f"Fill . in this pyramid, given from the top: each number is the sum of the two below it. {x['grid']}"
