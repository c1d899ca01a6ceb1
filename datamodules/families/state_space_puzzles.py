"""Puzzles of states and moves; the answer is a list of moves."""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from itertools import pairwise
from math import inf
from random import Random
from string import ascii_lowercase

from .answers import Integers, Words
from .base import Family, Instance


class WaterJugs(Family):
    """Measuring an amount with two jugs, from empty, in any number of moves; the work gives both contents."""

    mode = "construct"
    answer = Words("the moves in order, separated by spaces")
    unique = False

    def generate(self, rng: Random, level: int) -> Instance:
        wanted = 2 + 2 * level
        while True:
            sizes = rng.sample(range(2, 10 + 7 * level), 2)
            x = {"jugs": [[name, size] for name, size in zip(rng.sample(ascii_lowercase, 2), sizes, strict=True)]}
            nearest: dict[int, int] = {}
            for state, path in self.reach(x).items():
                for amount in state:
                    nearest.setdefault(amount, len(path))
            targets = [amount for amount, moves in nearest.items() if wanted <= moves <= wanted + 1]
            if targets:
                return x | {"target": rng.choice(targets)}

    def prompt(self, x: Instance) -> str:
        (a, size), (b, other) = x["jugs"]
        return (
            f"Jugs {a} (of {size}) and {b} (of {other}) are empty. +{a} fills {a}, -{a} empties {a}, "
            f"{a}{b} pours {a} into {b} until {a} is empty or {b} full; so do +{b}, -{b}, {b}{a}. "
            f"End with {x['target']} in a jug."
        )

    def move(self, x: Instance, state: tuple[int, int], move: str) -> tuple[int, int] | None:
        """The contents after a move; None when there is no such move."""
        (a, size), (b, other) = x["jugs"]
        p, q = state
        after = {
            f"+{a}": (size, q),
            f"+{b}": (p, other),
            f"-{a}": (0, q),
            f"-{b}": (p, 0),
            f"{a}{b}": (max(0, p + q - other), min(other, p + q)),
            f"{b}{a}": (min(size, p + q), max(0, p + q - size)),
        }
        return after.get(move)

    def reach(self, x: Instance) -> dict[tuple[int, int], list[str]]:
        """Every reachable state with a shortest way to it, nearest first."""
        a, b = (name for name, _ in x["jugs"])
        paths: dict[tuple[int, int], list[str]] = {(0, 0): []}
        queue = deque(paths)
        while queue:
            state = queue.popleft()
            for move in (f"+{a}", f"+{b}", f"-{a}", f"-{b}", a + b, b + a):
                after = self.move(x, state, move)
                if after is not None and after not in paths:
                    paths[after] = [*paths[state], move]
                    queue.append(after)
        return paths

    def solve(self, x: Instance) -> list[str]:
        return next(path for state, path in self.reach(x).items() if x["target"] in state)

    def states(self, x: Instance, moves: list[str]) -> list[tuple[int, int]] | None:
        states = [(0, 0)]
        for move in moves:
            after = self.move(x, states[-1], move)
            if after is None:
                return None
            states.append(after)
        return states

    def check(self, x: Instance, value: list[str]) -> bool:
        states = self.states(x, value)
        return states is not None and x["target"] in states[-1]

    def work(self, x: Instance) -> str:
        moves = self.solve(x)
        return "\n".join(f"{m} {p} {q}" for m, (p, q) in zip(moves, (self.states(x, moves) or [])[1:], strict=True))

    def size(self, x: Instance) -> float:
        return len(self.solve(x))

    def oracle(self, x: Instance) -> list[str]:
        (a, size), (b, other) = x["jugs"]
        p, q = 0, 0
        moves: list[str] = []
        while x["target"] not in (p, q):  # always fill the first jug and empty the second
            if p == 0:
                p, move = size, f"+{a}"
            elif q == other:
                q, move = 0, f"-{b}"
            else:
                poured = min(p, other - q)
                p, q, move = p - poured, q + poured, a + b
            moves.append(move)
        return moves


class Pancake(Family):
    """Sorting by the fewest prefix reversals; the work gives the row after each flip."""

    mode = "optimise"
    answer = Integers("the values of k in order, separated by spaces")
    unique = False

    def generate(self, rng: Random, level: int) -> Instance:
        while True:
            row = rng.sample(range(1, 10 if level == 0 else 100), 3 + level)
            if row != sorted(row):
                return {"row": row}

    def prompt(self, x: Instance) -> str:
        row = " ".join(map(str, x["row"]))
        return f"Flip k reverses the first k numbers. Sort into rising order with the fewest flips: {row}"

    def solve(self, x: Instance) -> list[int]:
        ranks = sorted(x["row"])
        start = [ranks.index(v) for v in x["row"]] + [len(ranks)]

        def gaps(row: list[int]) -> int:
            return sum(abs(a - b) != 1 for a, b in pairwise(row))

        def deepen(row: list[int], left: int, last: int) -> list[int] | None:
            """At most `left` flips that sort the row: each one closes at most one gap."""
            missing = gaps(row)
            if missing == 0 and row[0] == 0:
                return []
            if missing > left or left == 0:
                return None
            for k in range(2, len(row)):
                if k != last:
                    rest = deepen(row[:k][::-1] + row[k:], left - 1, k)
                    if rest is not None:
                        return [k, *rest]
            return None

        limit = gaps(start)
        while (flips := deepen(start, limit, 0)) is None:
            limit += 1
        return flips

    def flip(self, row: list[int], k: int) -> list[int]:
        return row[:k][::-1] + row[k:]

    def check(self, x: Instance, value: list[int]) -> bool:
        row = x["row"]
        if len(value) > 2 * len(row) or not all(1 <= k <= len(row) for k in value):
            return False
        for k in value:
            row = self.flip(row, k)
        return row == sorted(row) and len(value) == len(self.solve(x))

    def work(self, x: Instance) -> str:
        row, lines = x["row"], []
        for k in self.solve(x):
            row = self.flip(row, k)
            lines.append(f"{k}: {' '.join(map(str, row))}")
        return "\n".join(lines)

    def oracle(self, x: Instance) -> list[int] | None:
        if len(x["row"]) > 6:
            return None
        paths: dict[tuple[int, ...], list[int]] = {tuple(x["row"]): []}
        queue = deque(paths)
        while queue:
            row = queue.popleft()
            if list(row) == sorted(row):
                return paths[row]
            for k in range(2, len(row) + 1):
                after = tuple(self.flip(list(row), k))
                if after not in paths:
                    paths[after] = [*paths[row], k]
                    queue.append(after)
        return None


class SlidingPuzzle(Family):
    """Sliding tiles from one position to another in any number of moves; the work gives the positions."""

    mode = "construct"
    answer = Words("the tiles slid, in order, separated by spaces")
    unique = False

    def generate(self, rng: Random, level: int) -> Instance:
        high = 2 if level < 4 else 3
        tiles = rng.sample(ascii_lowercase, 3 * high - 1)
        start = tiles.copy()
        start.insert(rng.randrange(3 * high), "_")
        while True:
            goal, last = start, ""
            for _ in range(1 + rng.randrange(2) + 3 * level):
                last = rng.choice([tile for tile in self.movable(goal) if tile != last])
                goal = self.slide(goal, last)
            if goal != start:
                return {"start": start, "goal": goal}

    def prompt(self, x: Instance) -> str:
        return f"Slide adjacent tiles into the gap _ to turn {self.show(x['start'])} into {self.show(x['goal'])}."

    def show(self, tiles: list[str]) -> str:
        return " / ".join(" ".join(tiles[i : i + 3]) for i in range(0, len(tiles), 3))

    def movable(self, tiles: list[str]) -> list[str]:
        r, c = divmod(tiles.index("_"), 3)
        return [tile for i, tile in enumerate(tiles) if abs(i // 3 - r) + abs(i % 3 - c) == 1]

    def slide(self, tiles: list[str], tile: str) -> list[str]:
        return [tile if t == "_" else "_" if t == tile else t for t in tiles]

    def solve(self, x: Instance) -> list[str]:
        goal = {tile: divmod(i, 3) for i, tile in enumerate(x["goal"])}

        def far(tiles: list[str]) -> int:
            return sum(
                abs(i // 3 - goal[tile][0]) + abs(i % 3 - goal[tile][1]) for i, tile in enumerate(tiles) if tile != "_"
            )

        best: dict[str, float] = {}
        heap: list[tuple[int, list[str], list[str]]] = [(2 * far(x["start"]), [], x["start"])]
        while True:  # best first, with moves made counted half
            _, moves, tiles = heappop(heap)
            if tiles == x["goal"]:
                return moves
            for tile in self.movable(tiles):
                after = self.slide(tiles, tile)
                if len(moves) + 1 < best.get("".join(after), inf):
                    best["".join(after)] = len(moves) + 1
                    heappush(heap, (len(moves) + 1 + 2 * far(after), [*moves, tile], after))

    def check(self, x: Instance, value: list[str]) -> bool:
        tiles = x["start"]
        for tile in value:
            if tile not in self.movable(tiles):
                return False
            tiles = self.slide(tiles, tile)
        return tiles == x["goal"]

    def work(self, x: Instance) -> str:
        tiles, lines = x["start"], []
        for tile in self.solve(x):
            tiles = self.slide(tiles, tile)
            lines.append(f"{tile}: {self.show(tiles)}")
        return "\n".join(lines)

    def size(self, x: Instance) -> float:
        return len(self.solve(x))

    def oracle(self, x: Instance) -> list[str] | None:
        ahead: dict[str, list[str]] = {"".join(x["start"]): []}
        behind: dict[str, list[str]] = {"".join(x["goal"]): []}
        for turn in range(24):  # breadth first from both ends
            known = behind if turn % 2 else ahead
            edge = max(map(len, known.values()))
            for text, moves in [item for item in known.items() if len(item[1]) == edge]:
                for tile in self.movable(list(text)):
                    known.setdefault("".join(self.slide(list(text), tile)), [*moves, tile])
            for text, moves in ahead.items():
                if text in behind:
                    return moves + behind[text][::-1]
        return None
