"""Sorting and searching in lists of numbers."""

from __future__ import annotations

import re
from bisect import insort
from collections import deque
from heapq import heappushpop
from itertools import combinations
from random import Random

from .answers import Integers, Words
from .base import Family, Instance


def _show(values: list[int]) -> str:
    return " ".join(map(str, values))


class SortNumbers(Family):
    """A list in ascending order; the work selects the smallest number again and again."""

    mode = "value"
    answer = Integers("the sorted numbers separated by spaces")

    def generate(self, rng: Random, level: int) -> Instance:
        high = 10 ** (1 + (level + 1) // 2)
        return {"values": [rng.randrange(-high if level >= 5 else 0, high) for _ in range(3 + 2 * level)]}

    def prompt(self, x: Instance) -> str:
        return f"Sort in ascending order: {_show(x['values'])}"

    def solve(self, x: Instance) -> list[int]:
        return sorted(x["values"])

    def work(self, x: Instance) -> str:
        values, lines = list(x["values"]), []
        while values:
            lines.append(f"{_show(values)}: {min(values)}")
            values.remove(min(values))
        return "\n".join(lines)

    def oracle(self, x: Instance) -> list[int]:
        result: list[int] = []
        for value in x["values"]:
            insort(result, value)
        return result


class BubblePasses(Family):
    """A list after some passes of bubble sort; the work shows the passes before the last."""

    mode = "trace"
    answer = Integers("the list separated by spaces")

    def generate(self, rng: Random, level: int) -> Instance:
        high = 10 if level == 0 else 100 if level < 5 else 1000
        return {"values": [rng.randrange(high) for _ in range(4 + level)], "passes": 1 + level // 2}

    def prompt(self, x: Instance) -> str:
        passes = "pass" if x["passes"] == 1 else "passes"
        return (
            "A pass goes through a list from left to right and swaps neighbours when the left one is larger. "
            f"List {_show(x['values'])} after {x['passes']} {passes}."
        )

    def solve(self, x: Instance) -> list[int]:
        return self._passes(x)[-1]

    def work(self, x: Instance) -> str:
        return "\n".join(map(_show, self._passes(x)[:-1]))

    def oracle(self, x: Instance) -> list[int]:
        held = sorted(x["values"][: x["passes"]])  # k passes carry the k largest along, as a heap of k would
        return [heappushpop(held, value) for value in x["values"][x["passes"] :]] + sorted(held)

    @staticmethod
    def _passes(x: Instance) -> list[list[int]]:
        values, lists = list(x["values"]), []
        for _ in range(x["passes"]):
            for i in range(len(values) - 1):
                if values[i] > values[i + 1]:
                    values[i], values[i + 1] = values[i + 1], values[i]
            lists.append(list(values))
        return lists


class MinSwaps(Family):
    """The fewest swaps that sort a list; the work shows the list after each."""

    mode = "optimise"
    unique = False
    answer = Words("the swaps in order as pairs of places, counted from 1, such as 1-3, separated by spaces")

    def generate(self, rng: Random, level: int) -> Instance:
        size = 4 + level
        while True:
            values = rng.sample(range(10 if level == 0 else 100), size)
            if values != sorted(values):
                return {"values": values}

    def prompt(self, x: Instance) -> str:
        return f"Sort {_show(x['values'])} in ascending order with as few swaps of any two numbers as possible."

    def solve(self, x: Instance) -> list[str]:
        return [f"{i + 1}-{j + 1}" for i, j, _ in self._swaps(x["values"])]

    def check(self, x: Instance, value: list[str]) -> bool:
        values = list(x["values"])
        if len(value) != len(self._swaps(values)):
            return False
        for swap in value:
            pair = re.fullmatch(r"(\d{1,3})-(\d{1,3})", swap, re.ASCII)
            if not pair:
                return False
            i, j = int(pair[1]) - 1, int(pair[2]) - 1
            if not (0 <= i < len(values) and 0 <= j < len(values)):
                return False
            values[i], values[j] = values[j], values[i]
        return values == sorted(values)

    def work(self, x: Instance) -> str:
        return "\n".join(f"{i + 1}-{j + 1}: {_show(after)}" for i, j, after in self._swaps(x["values"]))

    def oracle(self, x: Instance) -> list[str] | None:
        if len(x["values"]) > 6:
            return None
        start, goal = tuple(x["values"]), tuple(sorted(x["values"]))
        swaps: dict[tuple[int, ...], list[str]] = {start: []}
        queue = deque([start])
        while goal not in swaps:
            values = queue.popleft()
            for i, j in combinations(range(len(values)), 2):
                after = list(values)
                after[i], after[j] = after[j], after[i]
                if tuple(after) not in swaps:
                    swaps[tuple(after)] = [*swaps[values], f"{i + 1}-{j + 1}"]
                    queue.append(tuple(after))
        return swaps[goal]

    @staticmethod
    def _swaps(values: list[int]) -> list[tuple[int, int, list[int]]]:
        """Each swap brings one number home, from the first place to the last; with the list after it."""
        values, swaps = list(values), []
        for i, wanted in enumerate(sorted(values)):
            if values[i] != wanted:
                j = values.index(wanted)
                values[i], values[j] = values[j], values[i]
                swaps.append((i, j, list(values)))
        return swaps


class LargestWithPlace(Family):
    """The largest number and its place; the work lists the records from left to right."""

    mode = "value"
    answer = Integers("the number and its place, separated by a space")

    def generate(self, rng: Random, level: int) -> Instance:
        high = 10 ** (2 + level // 2)
        return {"values": [rng.randrange(-high if level >= 4 else 0, high) for _ in range(4 + 4 * level)]}

    def prompt(self, x: Instance) -> str:
        return f"Find the largest number and its first place, counted from 1: {_show(x['values'])}"

    def solve(self, x: Instance) -> list[int]:
        largest = max(x["values"])
        return [largest, x["values"].index(largest) + 1]

    def work(self, x: Instance) -> str:
        records: list[str] = []
        for i, value in enumerate(x["values"]):
            if all(value > other for other in x["values"][:i]):
                records.append(f"{value} at {i + 1}")
        return "\n".join(records)

    def oracle(self, x: Instance) -> list[int]:
        place, largest = sorted(enumerate(x["values"], 1), key=lambda item: (-item[1], item[0]))[0]
        return [largest, place]
