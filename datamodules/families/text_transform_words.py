"""Transformations of words and letters."""

from __future__ import annotations

from collections import Counter
from itertools import zip_longest
from random import Random
from string import ascii_lowercase

from .answers import Integers, Text, Words
from .base import Family, Instance


class SpellBackwards(Family):
    """A word spelled from its last letter to its first."""

    mode = "value"
    answer = Text("the reversed text")

    def generate(self, rng: Random, level: int) -> Instance:
        return {"text": "".join(rng.choices(ascii_lowercase[: 8 + 4 * level], k=3 + 3 * level))}

    def prompt(self, x: Instance) -> str:
        return f"Spell backwards: {x['text']}"

    def solve(self, x: Instance) -> str:
        return x["text"][::-1]

    def oracle(self, x: Instance) -> str:
        text = ""
        for letter in x["text"]:
            text = letter + text
        return text


class SortByCustomKey(Family):
    """Words sorted like a dictionary of another alphabet; the work spells each word in ranks."""

    mode = "value"
    answer = Words("the sorted words separated by spaces")

    def generate(self, rng: Random, level: int) -> Instance:
        alphabet = "".join(rng.sample("abcdefghi", 4 + level // 2))
        size = 1 + level // 2
        words: list[str] = []
        while len(words) < 3 + level:
            start = rng.choice(words)[: rng.randrange(size)] if words else ""  # shared beginnings make it worth sorting
            words.append(start + "".join(rng.choices(alphabet, k=size - len(start))))
        return {"alphabet": alphabet, "words": words}

    def prompt(self, x: Instance) -> str:
        return f"In an alphabet with the order {x['alphabet']}, sort alphabetically: {' '.join(x['words'])}"

    def solve(self, x: Instance) -> list[str]:
        return sorted(x["words"], key=lambda word: [x["alphabet"].index(c) for c in word])

    def work(self, x: Instance) -> str:
        ranks = {c: str(i + 1) for i, c in enumerate(x["alphabet"])}
        return "\n".join(f"{word}={''.join(ranks[c] for c in word)}" for word in x["words"])

    def oracle(self, x: Instance) -> list[str]:
        words = x["words"]
        for place in reversed(range(len(words[0]))):  # radix sort
            words = [word for c in x["alphabet"] for word in words if word[place] == c]
        return words


class LetterCount(Family):
    """How often each of several letters occurs; the work gathers them."""

    mode = "value"
    answer = Integers("the counts in the order asked, separated by spaces")

    def generate(self, rng: Random, level: int) -> Instance:
        letters = rng.sample(ascii_lowercase, 4 + level // 2)
        return {"letters": letters[:-1], "text": "".join(rng.choices(letters, k=6 + 4 * level))}

    def prompt(self, x: Instance) -> str:
        return f"How often does each of {', '.join(x['letters'])} occur in {x['text']}?"

    def solve(self, x: Instance) -> list[int]:
        return [x["text"].count(c) for c in x["letters"]]

    def work(self, x: Instance) -> str:
        return "\n".join(f"{c}: {c * x['text'].count(c) or '-'}" for c in x["letters"])

    def oracle(self, x: Instance) -> list[int]:
        counts: Counter[str] = Counter(x["text"])
        return [counts[c] for c in x["letters"]]


class InterleaveWords(Family):
    """Words merged letter by letter in turn; the work writes one round after another."""

    mode = "value"
    answer = Text("the merged letters without spaces")

    def generate(self, rng: Random, level: int) -> Instance:
        sizes = [rng.randint(2 + level // 2, 2 + level) for _ in range(2 + level // 3)]
        return {"words": ["".join(rng.choices(ascii_lowercase, k=size)) for size in sizes]}

    def prompt(self, x: Instance) -> str:
        return f"Merge the words, taking one letter of each in turn and skipping used-up words: {' '.join(x['words'])}"

    def solve(self, x: Instance) -> str:
        return "".join(self._rounds(x))

    def work(self, x: Instance) -> str:
        return " ".join(self._rounds(x))

    def oracle(self, x: Instance) -> str:
        places = sorted((i, w) for w, word in enumerate(x["words"]) for i in range(len(word)))
        return "".join(x["words"][w][i] for i, w in places)

    @staticmethod
    def _rounds(x: Instance) -> list[str]:
        return ["".join(letters) for letters in zip_longest(*x["words"], fillvalue="")]
