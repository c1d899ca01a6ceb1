"""Scheduling and assignment with a best plan as the answer."""

from __future__ import annotations

from itertools import pairwise, permutations
from random import Random
from string import ascii_lowercase

from .answers import Integers, Words
from .base import Family, Instance


class IntervalScheduling(Family):
    """As many compatible intervals as possible; the work goes through them by their ends."""

    mode = "optimise"
    answer = Words("the chosen intervals' letters separated by spaces")
    unique = False

    def generate(self, rng: Random, level: int) -> Instance:
        names, day = rng.sample(ascii_lowercase, 3 + level + level // 2), 9 + 6 * level
        intervals = []
        for name in names:
            start = rng.randrange(day)
            intervals.append([name, start, rng.randint(start + 1, min(day, start + 5 + level))])
        return {"intervals": intervals}

    def prompt(self, x: Instance) -> str:
        intervals = ", ".join(f"{name} {start}-{end}" for name, start, end in x["intervals"])
        return f"Choose as many intervals as possible that do not overlap (ends may touch): {intervals}"

    def steps(self, x: Instance) -> list[tuple[str, int, int, bool]]:
        steps, free = [], 0
        for name, start, end in sorted(x["intervals"], key=lambda interval: interval[2]):
            steps.append((name, start, end, start >= free))
            free = end if start >= free else free
        return steps

    def solve(self, x: Instance) -> list[str]:
        return [name for name, _, _, taken in self.steps(x) if taken]

    def check(self, x: Instance, value: list[str]) -> bool:
        intervals = {name: (start, end) for name, start, end in x["intervals"]}
        if len(value) != len(self.solve(x)) or not set(value) <= intervals.keys():
            return False
        chosen = sorted(intervals[name] for name in value)
        return all(a[1] <= b[0] for a, b in pairwise(chosen))

    def work(self, x: Instance) -> str:
        return "\n".join(
            f"{name} {start}-{end} {'yes' if taken else 'no'}" for name, start, end, taken in self.steps(x)
        )

    def oracle(self, x: Instance) -> list[str]:
        chains: list[tuple[int, list[str]]] = []  # the longest chain from each interval on, latest start first
        for name, start, end in sorted(x["intervals"], key=lambda interval: -interval[1]):
            rest = max((chain for begin, chain in chains if begin >= end), key=len, default=[])
            chains.append((start, [name, *rest]))
        return max((chain for _, chain in chains), key=len)


class FlowShopJohnson(Family):
    """An order of jobs for two machines in a row with the earliest end, by Johnson's rule."""

    mode = "optimise"
    answer = Words("the jobs' letters in order, separated by spaces")
    unique = False

    def generate(self, rng: Random, level: int) -> Instance:
        while True:
            names, top = rng.sample(ascii_lowercase, 3 + level), 9 + 5 * level
            x = {"jobs": [[name, rng.randint(1, top), rng.randint(1, top)] for name in names]}
            if self.end(x, names) > self.end(x, self.solve(x)):
                return x

    def prompt(self, x: Instance) -> str:
        jobs = ", ".join(f"{name} {first} {second}" for name, first, second in x["jobs"])
        return (
            "Each job needs machine 1, then machine 2; a machine does one job at a time. "
            f"Order the jobs to end soonest. Job, times on 1 and 2: {jobs}"
        )

    def end(self, x: Instance, order: list[str]) -> int:
        times = {name: (first, second) for name, first, second in x["jobs"]}
        one = two = 0
        for name in order:
            one += times[name][0]
            two = max(one, two) + times[name][1]
        return two

    def steps(self, x: Instance) -> list[tuple[int, str, bool]]:
        """The smallest time left, its job, and whether it is on machine 1."""
        return sorted(((min(a, b), name, a <= b) for name, a, b in x["jobs"]), key=lambda step: step[0])

    def solve(self, x: Instance) -> list[str]:
        steps = self.steps(x)
        return [name for _, name, front in steps if front] + [name for _, name, front in reversed(steps) if not front]

    def check(self, x: Instance, value: list[str]) -> bool:
        return sorted(value) == sorted(job[0] for job in x["jobs"]) and self.end(x, value) == self.end(x, self.solve(x))

    def work(self, x: Instance) -> str:
        return "\n".join(f"{time} {name} {'first' if front else 'last'}" for time, name, front in self.steps(x))

    def oracle(self, x: Instance) -> list[str] | None:
        if len(x["jobs"]) > 6:
            return None
        orders = [list(order) for order in permutations(name for name, *_ in x["jobs"])]
        return min(orders, key=lambda order: self.end(x, order))


class AssignmentProblem(Family):
    """A cheapest one-to-one choice of columns for rows."""

    mode = "optimise"
    answer = Integers("each row's column (1 is the first), separated by spaces")
    unique = False

    def generate(self, rng: Random, level: int) -> Instance:
        n, top = 3 + (level + 1) // 2, 9 if level < 2 else 20 * level
        return {"costs": [[rng.randint(1, top) for _ in range(n)] for _ in range(n)]}

    def prompt(self, x: Instance) -> str:
        rows = " / ".join(" ".join(map(str, row)) for row in x["costs"])
        return f"Choose one number in each row, all in different columns, with the least sum: {rows}"

    def solve(self, x: Instance) -> list[int]:
        best: dict[int, tuple[int, list[int]]] = {0: (0, [])}  # by the set of used columns, as bits
        for row in x["costs"]:
            after: dict[int, tuple[int, list[int]]] = {}
            for used, (cost, columns) in best.items():
                for c, price in enumerate(row):
                    key = used | 1 << c
                    if key != used and (key not in after or cost + price < after[key][0]):
                        after[key] = cost + price, [*columns, c + 1]
            best = after
        return next(iter(best.values()))[1]

    def cost(self, x: Instance, columns: list[int]) -> int:
        return sum(row[c - 1] for row, c in zip(x["costs"], columns, strict=True))

    def check(self, x: Instance, value: list[int]) -> bool:
        permuted = sorted(value) == list(range(1, len(x["costs"]) + 1))
        return permuted and self.cost(x, value) == self.cost(x, self.solve(x))

    def work(self, x: Instance) -> str | None:
        if len(x["costs"]) > 4:
            return None
        lines = []
        for columns in permutations(range(1, len(x["costs"]) + 1)):
            chosen = [row[c - 1] for row, c in zip(x["costs"], columns, strict=True)]
            lines.append(f"{' '.join(map(str, columns))}: {'+'.join(map(str, chosen))}={sum(chosen)}")
        return "\n".join(lines)

    def oracle(self, x: Instance) -> list[int] | None:
        if len(x["costs"]) > 6:
            return None
        return list(min(permutations(range(1, len(x["costs"]) + 1)), key=lambda columns: self.cost(x, list(columns))))
