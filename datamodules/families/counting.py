"""Counting, ranking and reconstructing arrangements, paths and tables."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from math import comb, factorial, prod
from random import Random
from string import ascii_lowercase
from typing import Any

from .answers import Grid, Integer, Integers, Text
from .base import Family, Instance


class LatticePathsObstacles(Family):
    """Number of right and down paths through a grid with blocked cells; the work counts the paths to each cell."""

    mode = "value"
    answer = Integer()

    def generate(self, rng: Random, level: int) -> Instance:
        while True:
            height, width = (4 + level + rng.randint(0, 1) for _ in range(2))
            cells = [["."] * width for _ in range(height)]
            blocked = height * width // 6 + 1 if level else height * width // 8
            for spot in rng.sample(range(1, height * width - 1), blocked):
                cells[spot // width][spot % width] = "#"
            x = {"rows": ["".join(row) for row in cells]}
            if self.solve(x) > 1:
                return x

    def prompt(self, x: Instance) -> str:
        grid = "\n".join(x["rows"])
        return f"Count the paths from the top left to the bottom right cell, by steps right or down, off #:\n{grid}"

    def _counts(self, rows: list[str]) -> list[list[int]]:
        counts: list[list[int]] = []
        for r, row in enumerate(rows):
            counts.append([])
            for c, cell in enumerate(row):
                above = counts[r - 1][c] if r else int(c == 0)
                counts[r].append(0 if cell == "#" else above + (counts[r][c - 1] if c else 0))
        return counts

    def solve(self, x: Instance) -> int:
        return self._counts(x["rows"])[-1][-1]

    def work(self, x: Instance) -> str:
        return "\n".join(" ".join(map(str, row)) for row in self._counts(x["rows"]))

    def oracle(self, x: Instance) -> int:
        def free(start: tuple[int, int], end: tuple[int, int]) -> int:
            down, right = end[0] - start[0], end[1] - start[1]
            return comb(down + right, down) if down >= 0 and right >= 0 else 0

        rows = x["rows"]
        ends = [(r, c) for r, row in enumerate(rows) for c, cell in enumerate(row) if cell == "#"]
        ends.append((len(rows) - 1, len(rows[0]) - 1))
        first: list[int] = []  # paths whose first blocked cell, or end, is this one
        for i, end in enumerate(ends):
            first.append(free((0, 0), end) - sum(first[j] * free(ends[j], end) for j in range(i)))
        return first[-1]


def _arrangements(letters: str) -> int:
    return factorial(len(letters)) // prod(map(factorial, Counter(letters).values()))


def _random_letters(rng: Random, level: int) -> str:
    """A word, with repeated letters from level 3 on."""
    length = 3 if level == 0 else 4 + level
    if level < 3:
        return "".join(rng.sample(ascii_lowercase, length))
    alphabet = rng.sample(ascii_lowercase, length * 2 // 3)
    return "".join([*alphabet, *rng.choices(alphabet, k=length - len(alphabet))])


class PermutationRank(Family):
    """Position of a word among all arrangements of its letters."""

    mode = "value"
    answer = Integer()

    def generate(self, rng: Random, level: int) -> Instance:
        letters = list(_random_letters(rng, level))
        rng.shuffle(letters)
        return {"word": "".join(letters)}

    def prompt(self, x: Instance) -> str:
        listed = "the alphabetical list of all distinct arrangements of its letters"
        return f"At which position (the first is 1) is {x['word']} in {listed}?"

    def _before(self, word: str) -> list[tuple[str, int]]:
        """The prefixes of earlier words, with how many words each begins."""
        found = []
        for i, letter in enumerate(word):
            for smaller in sorted({c for c in word[i:] if c < letter}):
                found.append((word[:i] + smaller, _arrangements(word[i:].replace(smaller, "", 1))))
        return found

    def solve(self, x: Instance) -> int:
        return 1 + sum(count for _, count in self._before(x["word"]))

    def work(self, x: Instance) -> str:
        lines, total = [], 0
        for prefix, count in self._before(x["word"]):
            lines.append(f"{prefix}: {total}+{count}={total + count}")
            total += count
        return "\n".join([*lines, f"{total}+1={total + 1}"])

    def oracle(self, x: Instance) -> int | None:
        word = x["word"]
        if len(word) > 7:
            return None
        return sorted(set(map("".join, permutations(word)))).index(word) + 1


class KthMultisetPermutation(Family):
    """The arrangement of letters at a given position of the alphabetical list."""

    mode = "inverse"
    answer = Text("the arrangement")

    def generate(self, rng: Random, level: int) -> Instance:
        letters = "".join(sorted(_random_letters(rng, level)))
        return {"letters": letters, "k": rng.randint(1, _arrangements(letters))}

    def prompt(self, x: Instance) -> str:
        listed = f"the alphabetical list of all distinct arrangements of {x['letters']}"
        return f"Which is number {x['k']} (the first is 1) in {listed}?"

    def _descend(self, x: Instance) -> list[tuple[str, int]]:
        """Each prefix of the word, with the word's position among those with this prefix."""
        prefix, left, k, found = "", x["letters"], x["k"], []
        while left:
            for letter in sorted(set(left)):
                rest = left.replace(letter, "", 1)
                if k <= _arrangements(rest):
                    break
                k -= _arrangements(rest)
            prefix, left = prefix + letter, rest
            found.append((prefix, k))
        return found

    def solve(self, x: Instance) -> str:
        return self._descend(x)[-1][0]

    def work(self, x: Instance) -> str:
        return "\n".join(f"{prefix} {k}" for prefix, k in self._descend(x)[:-1])

    def oracle(self, x: Instance) -> str | None:
        if len(x["letters"]) > 7:
            return None
        return sorted(set(map("".join, permutations(x["letters"]))))[x["k"] - 1]


class InversionTableDecode(Family):
    """The permutation in which given numbers of larger entries stand before 1, 2, ..., n."""

    mode = "inverse"
    answer = Integers("the permutation")

    def generate(self, rng: Random, level: int) -> Instance:
        n = rng.randint(5, 6) if level == 0 else 8 + level
        return {"larger": [rng.randint(0, n - value) for value in range(1, n + 1)]}

    def prompt(self, x: Instance) -> str:
        n, numbers = len(x["larger"]), " ".join(map(str, x["larger"]))
        return f"In a permutation, the number of larger entries anywhere before 1, 2, ..., {n} is {numbers}. Find it."

    def _stages(self, x: Instance) -> list[list[int]]:
        stages: list[list[int]] = [[]]
        for value in range(len(x["larger"]), 0, -1):
            at = x["larger"][value - 1]
            stages.append([*stages[-1][:at], value, *stages[-1][at:]])
        return stages[1:]

    def solve(self, x: Instance) -> list[int]:
        return self._stages(x)[-1]

    def work(self, x: Instance) -> str:
        return "\n".join(" ".join(map(str, stage)) for stage in self._stages(x)[:-1])

    def oracle(self, x: Instance) -> list[int]:
        places = [0] * len(x["larger"])
        for value, larger in enumerate(x["larger"], start=1):  # larger values fill the free places before it
            free = [i for i, taken in enumerate(places) if not taken]
            places[free[larger]] = value
        return places


class ContingencyTable(Family):
    """A table of whole numbers with given sums of rows and columns, from level 4 on with a largest entry."""

    mode = "construct"
    answer = Grid()
    unique = False

    def generate(self, rng: Random, level: int) -> Instance:
        n, top = 2 + (level + 1) // 2, 5 + 2 * level
        table = [[rng.randint(0, top) for _ in range(n)] for _ in range(n)]
        columns = [sum(column) for column in zip(*table, strict=True)]
        cap = max(map(max, table)) if level >= 4 else 0
        return {"rows": [sum(row) for row in table], "columns": columns, "cap": cap, "table": table}

    def prompt(self, x: Instance) -> str:
        rows, columns = (" ".join(map(str, x[side])) for side in ("rows", "columns"))
        limit = f" No entry exceeds {x['cap']}." if x["cap"] else ""
        return f"Fill a table with integers >= 0 so that the row sums are {rows} and the column sums {columns}.{limit}"

    def solve(self, x: Instance) -> list[list[str]]:
        return [list(map(str, row)) for row in x["table"]]

    def check(self, x: Instance, value: list[list[str]]) -> bool:
        if [len(row) for row in value] != [len(x["columns"])] * len(x["rows"]):
            return False
        if not all(cell.isascii() and cell.isdecimal() and len(cell) <= 6 for row in value for cell in row):
            return False
        table = [list(map(int, row)) for row in value]
        if x["cap"] and max(map(max, table)) > x["cap"]:
            return False
        return list(map(sum, table)) == x["rows"] and list(map(sum, zip(*table, strict=True))) == x["columns"]

    def oracle(self, x: Instance) -> list[list[str]] | None:
        if x["cap"]:
            return None
        columns, table = list(x["columns"]), []
        for left in x["rows"]:
            row = []
            for c, column in enumerate(columns):
                row.append(min(left, column))  # as much as possible to the first columns
                left -= row[c]
                columns[c] -= row[c]
            table.append(list(map(str, row)))
        return table

    def canonical(self, x: Instance) -> Any:
        return [x["rows"], x["columns"], x["cap"]]
