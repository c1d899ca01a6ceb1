"""Strings and compression: runs, prefix codes, borders, common subsequences."""

from __future__ import annotations

import re
from heapq import heapify, heappop, heappush
from itertools import combinations, groupby, pairwise
from random import Random

from .answers import Integers, Text, Words
from .base import Family, Instance


class RunLengthEncode(Family):
    """Each run of equal letters becomes its length and the letter; the work marks the runs."""

    mode = "trace"
    answer = Text("the code without spaces, such as 2a1b")

    def generate(self, rng: Random, level: int) -> Instance:
        text = rng.choice("abcdef")
        for _ in range(3 + 5 * level):
            text += text[-1] if rng.random() < 0.35 else rng.choice("abcdef")
        return {"text": text}

    def prompt(self, x: Instance) -> str:
        return f"Write each run of equal letters as its length and the letter: {x['text']}"

    def solve(self, x: Instance) -> str:
        return "".join(f"{len(list(run))}{letter}" for letter, run in groupby(x["text"]))

    def work(self, x: Instance) -> str:
        return " ".join("".join(run) for _, run in groupby(x["text"]))

    def oracle(self, x: Instance) -> str:
        return re.sub(r"(.)\1*", lambda run: f"{len(run[0])}{run[1]}", x["text"])


class HuffmanBuild(Family):
    """A prefix code of least total length for given letter counts; the work lists Huffman's merges."""

    mode = "optimise"
    unique = False
    answer = Words("the code words in the order of the letters, separated by spaces")

    def generate(self, rng: Random, level: int) -> Instance:
        return {"counts": [rng.randrange(1, 20 + 10 * level) for _ in range(5 + level)]}

    def prompt(self, x: Instance) -> str:
        letters = ", ".join(f"{'abcdefghijklmn'[i]} occurs {n} times" for i, n in enumerate(x["counts"]))
        return (
            f"In a text {letters}. Give each letter a code word of 0s and 1s, "
            "none the start of another, so that the coded text is as short as possible."
        )

    def solve(self, x: Instance) -> list[str]:
        return self._build(x["counts"])[0]

    def check(self, x: Instance, value: list[str]) -> bool:
        if len(value) != len(x["counts"]) or not all(re.fullmatch("[01]+", word) for word in value):
            return False
        prefix_free = not any(b.startswith(a) for a, b in pairwise(sorted(value)))
        return prefix_free and self._total(x["counts"], value) == self._total(x["counts"], self.solve(x))

    def work(self, x: Instance) -> str:
        return "\n".join(self._build(x["counts"])[1])

    def oracle(self, x: Instance) -> list[str]:
        trees: set[tuple[int, ...]] = {(0,)}  # the leaf depths of every shape of code tree
        for _ in x["counts"][1:]:
            trees = {tuple(sorted((*t[:i], *t[i + 1 :], t[i] + 1, t[i] + 1))) for t in trees for i in range(len(t))}
        order = sorted(range(len(x["counts"])), key=lambda i: -x["counts"][i])
        best = min(trees, key=lambda t: (sum(x["counts"][i] * n for i, n in zip(order, t, strict=True)), t))
        words, code = [""] * len(order), 0
        for i, depth in zip(order, best, strict=True):
            words[i] = f"{code >> (best[-1] - depth):0{depth}b}"
            code += 1 << (best[-1] - depth)
        return words

    @staticmethod
    def _total(counts: list[int], words: list[str]) -> int:
        return sum(n * len(word) for n, word in zip(counts, words, strict=True))

    @staticmethod
    def _build(counts: list[int]) -> tuple[list[str], list[str]]:
        words, merges = [""] * len(counts), []
        heap = [(n, [i]) for i, n in enumerate(counts)]
        heapify(heap)
        while len(heap) > 1:
            (n, left), (m, right) = heappop(heap), heappop(heap)
            for bit, group in (("0", left), ("1", right)):
                for i in group:
                    words[i] = bit + words[i]
            merges.append(f"{n}+{m}={n + m}")
            heappush(heap, (n + m, left + right))
        return words, merges


class LongestCommonSubsequence(Family):
    """A longest common subsequence of two words; the work is the table of lengths."""

    mode = "optimise"
    unique = False
    answer = Text("the subsequence without spaces")

    def generate(self, rng: Random, level: int) -> Instance:
        letters = "abcdefghij"[: 5 + level // 2]
        size = 5 + 2 * level
        a = rng.choices(letters, k=size)
        b = list(a)
        for _ in range(2 + 2 * level // 3):
            del b[rng.randrange(len(b))]
        while len(b) < size:
            b.insert(rng.randrange(len(b) + 1), rng.choice(letters))
        return {"a": "".join(a), "b": "".join(b)}

    def prompt(self, x: Instance) -> str:
        return f"Find a longest common subsequence (same order, gaps allowed) of {x['a']} and {x['b']}."

    def solve(self, x: Instance) -> str:
        a, b, table = x["a"], x["b"], self._table(x["a"], x["b"])
        i, j, found = len(a), len(b), ""
        while i and j:
            if a[i - 1] == b[j - 1]:
                i, j, found = i - 1, j - 1, a[i - 1] + found
            elif table[i - 1][j] >= table[i][j - 1]:
                i -= 1
            else:
                j -= 1
        return found

    def check(self, x: Instance, value: str) -> bool:
        return self._within(value, x["a"]) and self._within(value, x["b"]) and len(value) == len(self.solve(x))

    def work(self, x: Instance) -> str:
        rows = self._table(x["a"], x["b"])[1:]
        return "\n".join(f"{letter}: {' '.join(map(str, row[1:]))}" for letter, row in zip(x["a"], rows, strict=True))

    def oracle(self, x: Instance) -> str | None:
        if len(x["a"]) > 12:
            return None
        sizes = range(len(x["a"]), 0, -1)
        return next("".join(s) for n in sizes for s in combinations(x["a"], n) if self._within("".join(s), x["b"]))

    @staticmethod
    def _within(part: str, whole: str) -> bool:
        rest = iter(whole)
        return all(letter in rest for letter in part)

    @staticmethod
    def _table(a: str, b: str) -> list[list[int]]:
        """`table[i][j]` is the length for the first i letters of a and the first j of b."""
        table = [[0] * (len(b) + 1)]
        for p in a:
            row = [0]
            for j, q in enumerate(b):
                row.append(table[-1][j] + 1 if p == q else max(row[-1], table[-1][j + 1]))
            table.append(row)
        return table


class PrefixFunction(Family):
    """The longest border of every prefix; the work names the borders that are not empty."""

    mode = "trace"
    answer = Integers("one length for each prefix, separated by spaces")

    def generate(self, rng: Random, level: int) -> Instance:
        text = rng.choice("abcd")
        while len(text) < 6 + 6 * level:  # often the letter that makes the border longer
            text += text[self.solve({"text": text})[-1]] if rng.random() < 0.4 else rng.choice("abcd")
        return {"text": text}

    def prompt(self, x: Instance) -> str:
        return (
            "A border of a word is a shorter, maybe empty, word that it both starts and ends with. "
            f"For each prefix of {x['text']}, shortest first, give the length of its longest border."
        )

    def solve(self, x: Instance) -> list[int]:
        text, lengths = x["text"], [0]
        for letter in text[1:]:
            k = lengths[-1]
            while k and text[k] != letter:
                k = lengths[k - 1]
            lengths.append(k + (text[k] == letter))
        return lengths

    def work(self, x: Instance) -> str:
        return "\n".join(f"{x['text'][: i + 1]}: {x['text'][:n]}" for i, n in enumerate(self.solve(x)) if n)

    def oracle(self, x: Instance) -> list[int]:
        prefixes = [x["text"][: i + 1] for i in range(len(x["text"]))]
        return [max(k for k in range(len(p)) if p.endswith(p[:k])) for p in prefixes]
