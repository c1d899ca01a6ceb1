"""Best choices by dynamic programming; the answer is the choice itself, not only its value."""

from __future__ import annotations

from bisect import bisect_left
from itertools import combinations, combinations_with_replacement, count, pairwise
from random import Random
from string import ascii_lowercase

from .answers import Integers, Words
from .base import Family, Instance


class Knapsack01(Family):
    """The most valuable items that fit; the work keeps, after each item, the loads that no other load beats."""

    name = "knapsack-01"
    mode = "optimise"
    answer = Words("the chosen items' letters separated by spaces")
    unique = False

    def generate(self, rng: Random, level: int) -> Instance:
        names, top = rng.sample(ascii_lowercase, 3 + level), 9 + 4 * level
        weights = [rng.randint(1, top) for _ in names]
        items = [[name, weight, rng.randint(1, top)] for name, weight in zip(names, weights, strict=True)]
        return {"items": items, "limit": max(min(weights), rng.randint(sum(weights) // 3, 3 * sum(weights) // 4))}

    def prompt(self, x: Instance) -> str:
        items = ", ".join(f"{name} {weight} {value}" for name, weight, value in x["items"])
        return f"Take items of most total value and total weight at most {x['limit']}. Item, weight, value: {items}"

    def fronts(self, x: Instance) -> list[list[tuple[int, int, str]]]:
        """After each item the undominated loads: weight, value, letters."""
        fronts = [[(0, 0, "")]]
        for name, weight, value in x["items"]:
            grown = [(w + weight, v + value, chosen + name) for w, v, chosen in fronts[-1] if w + weight <= x["limit"]]
            front: list[tuple[int, int, str]] = []
            for load in sorted(fronts[-1] + grown, key=lambda load: (load[0], -load[1])):
                if not front or load[1] > front[-1][1]:
                    front.append(load)
            fronts.append(front)
        return fronts[1:]

    def solve(self, x: Instance) -> list[str]:
        return list(self.fronts(x)[-1][-1][2])

    def check(self, x: Instance, value: list[str]) -> bool:
        items = {name: (weight, worth) for name, weight, worth in x["items"]}
        if len(set(value)) != len(value) or not set(value) <= items.keys():
            return False
        fits = sum(items[name][0] for name in value) <= x["limit"]
        return fits and sum(items[name][1] for name in value) == self.fronts(x)[-1][-1][1]

    def work(self, x: Instance) -> str | None:
        if len(x["items"]) > 7:
            return None
        fronts = zip(x["items"], self.fronts(x), strict=True)
        return "\n".join(
            f"{item[0]}: " + ", ".join(f"{chosen} {w} {v}" for w, v, chosen in front if chosen)
            for item, front in fronts
        )

    def oracle(self, x: Instance) -> list[str] | None:
        if len(x["items"]) > 9:
            return None
        loads = [load for n in range(len(x["items"]) + 1) for load in combinations(x["items"], n)]
        fitting = [load for load in loads if sum(weight for _, weight, _ in load) <= x["limit"]]
        return [name for name, *_ in max(fitting, key=lambda load: sum(value for *_, value in load))]


class LongestIncreasingSubsequence(Family):
    """The work gives, for each number, a longest increasing subsequence that ends with it."""

    mode = "optimise"
    answer = Integers("the subsequence's numbers separated by spaces")
    unique = False

    def generate(self, rng: Random, level: int) -> Instance:
        top = 10 if level == 0 else 100 if level < 4 else 1_000
        while True:
            numbers = rng.sample(range(1, top), 4 + 2 * level)
            if numbers != sorted(numbers, reverse=True):
                return {"numbers": numbers}

    def prompt(self, x: Instance) -> str:
        return f"Find a longest increasing subsequence (order kept, gaps allowed): {' '.join(map(str, x['numbers']))}"

    def endings(self, x: Instance) -> list[list[int]]:
        endings: list[list[int]] = []
        for number in x["numbers"]:
            endings.append([*max((e for e in endings if e[-1] < number), key=len, default=[]), number])
        return endings

    def solve(self, x: Instance) -> list[int]:
        return max(self.endings(x), key=len)

    def check(self, x: Instance, value: list[int]) -> bool:
        piles: list[int] = []
        for number in x["numbers"]:
            place = bisect_left(piles, number)
            piles[place : place + 1] = [number]
        rest = iter(x["numbers"])
        rising = all(a < b for a, b in pairwise(value))
        return len(value) == len(piles) and rising and all(number in rest for number in value)

    def work(self, x: Instance) -> str:
        return "\n".join(f"{ending[-1]}: {' '.join(map(str, ending))}" for ending in self.endings(x))

    def oracle(self, x: Instance) -> list[int]:
        best: list[list[int]] = [[] for _ in range(len(x["numbers"]) + 1)]
        for number in sorted(x["numbers"]):  # the longest common subsequence with the sorted numbers
            row: list[list[int]] = [[]]
            for i, other in enumerate(x["numbers"]):
                row.append([*best[i], number] if number == other else max(best[i + 1], row[i], key=len))
            best = row
        return best[-1]


class CoinChangeMinimum(Family):
    """The fewest coins for an amount; the work lists what may be left to pay after one coin, two coins and so on."""

    mode = "optimise"
    answer = Integers("the coins paid, each as often as it is used, separated by spaces")
    unique = False

    def generate(self, rng: Random, level: int) -> Instance:
        coins = sorted(rng.sample(range(1, 10 + 30 * level), 3 + level // 3))
        return {"coins": coins, "amount": sum(rng.choices(coins, k=(2 if level == 0 else 3) + level))}

    def prompt(self, x: Instance) -> str:
        return f"Pay exactly {x['amount']} with as few coins as possible; coins: {' '.join(map(str, x['coins']))}"

    def layers(self, x: Instance) -> list[dict[int, int]]:
        """Amounts first left after 0, 1, ... coins, each with the last coin, until nothing is left."""
        layers, seen = [{x["amount"]: 0}], {x["amount"]}
        while 0 not in layers[-1]:
            layer: dict[int, int] = {}
            for left in layers[-1]:
                for coin in reversed(x["coins"]):
                    if coin <= left and left - coin not in seen:
                        seen.add(left - coin)
                        layer[left - coin] = coin
            layers.append(layer)
        return layers

    def solve(self, x: Instance) -> list[int]:
        left, paid = 0, []
        for layer in reversed(self.layers(x)[1:]):
            paid.append(layer[left])
            left += layer[left]
        return paid[::-1]

    def check(self, x: Instance, value: list[int]) -> bool:
        if len(value) > x["amount"] or not set(value) <= set(x["coins"]) or sum(value) != x["amount"]:
            return False
        fewest = [0]
        for amount in range(1, x["amount"] + 1):
            fewest.append(
                1 + min((fewest[amount - coin] for coin in x["coins"] if coin <= amount), default=x["amount"])
            )
        return len(value) == fewest[-1]

    def work(self, x: Instance) -> str | None:
        if x["amount"] > 150:
            return None
        return "\n".join(f"{n}: {' '.join(map(str, layer))}" for n, layer in enumerate(self.layers(x)))

    def oracle(self, x: Instance) -> list[int]:
        picks = (pick for n in count(1) for pick in combinations_with_replacement(x["coins"], n))
        return list(next(pick for pick in picks if sum(pick) == x["amount"]))


class SubsetSum(Family):
    """Numbers with a given sum, or none; the work lists the new sums up to the total that each number adds."""

    mode = "decide"
    answer = Words("the chosen numbers separated by spaces, or impossible", fold=True)
    unique = False
    low_entropy = True

    def generate(self, rng: Random, level: int) -> Instance:
        top = 10 if level == 0 else 100 if level < 3 else 1_000 if level < 6 else 10_000
        while True:
            numbers = rng.sample(range(1, top), 3 + level)
            total = sum(rng.sample(numbers, rng.randint(2, 2 + level)))
            if rng.random() < 0.7:
                return {"numbers": numbers, "total": total}
            if not self.reachable(numbers, total := total + rng.choice([-2, -1, 1, 2])):
                return {"numbers": numbers, "total": total}

    def reachable(self, numbers: list[int], total: int) -> bool:
        sums = 1
        for number in numbers:
            sums |= sums << number
        return bool(sums >> total & 1)

    def prompt(self, x: Instance) -> str:
        return f"Which of {' '.join(map(str, x['numbers']))} add up to {x['total']}? Use each at most once."

    def sums(self, x: Instance) -> list[dict[int, list[int]]]:
        """After each number the sums up to the total, each with its numbers."""
        made: list[dict[int, list[int]]] = [{0: []}]
        for number in x["numbers"]:
            new = {s + number: [*parts, number] for s, parts in made[-1].items() if s + number <= x["total"]}
            made.append(new | made[-1])
        return made[1:]

    def solve(self, x: Instance) -> list[str]:
        found = self.sums(x)[-1].get(x["total"])
        return [str(number) for number in found] if found else ["impossible"]

    def check(self, x: Instance, value: list[str]) -> bool:
        if value == ["impossible"]:
            return not self.reachable(x["numbers"], x["total"])
        numbers = {str(number): number for number in x["numbers"]}
        if len(set(value)) != len(value) or not set(value) <= numbers.keys():
            return False
        return sum(numbers[text] for text in value) == x["total"]

    def work(self, x: Instance) -> str | None:
        if len(x["numbers"]) > 6:
            return None
        lines, seen = [], {0}
        for number, sums in zip(x["numbers"], self.sums(x), strict=True):
            lines.append(f"{number}: {' '.join(str(s) for s in sorted(sums) if s not in seen)}")
            seen.update(sums)
        found = self.solve(x)
        return "\n".join([*lines, f"{'+'.join(found)}={x['total']}" if found != ["impossible"] else f"no {x['total']}"])

    def oracle(self, x: Instance) -> list[str] | None:
        if len(x["numbers"]) > 9:
            return None
        sizes = range(1, len(x["numbers"]) + 1)
        picks = (pick for n in sizes for pick in combinations(x["numbers"], n) if sum(pick) == x["total"])
        return [str(number) for number in next(picks, ())] or ["impossible"]
