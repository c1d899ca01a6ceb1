"""Classical ciphers and an error-correcting code."""

from __future__ import annotations

from functools import reduce
from itertools import cycle
from operator import xor
from random import Random
from string import ascii_lowercase as ALPHABET

from .answers import Text, Words
from .base import Family, Instance


def _shift(text: str, by: int) -> str:
    return "".join(ALPHABET[(ALPHABET.index(c) + by) % 26] for c in text)


def _random_text(rng: Random, size: int) -> str:
    return "".join(rng.choices(ALPHABET, k=size))


class Caesar(Family):
    """A text is recovered from its Caesar cipher with a known shift, letter by letter."""

    mode = "inverse"
    answer = Text("the original text")

    def generate(self, rng: Random, level: int) -> Instance:
        return {"shift": rng.randint(1, 3 if level == 0 else 25), "cipher": _random_text(rng, 3 + 3 * level)}

    def prompt(self, x: Instance) -> str:
        moved = f"Each letter was moved forward in the alphabet by {x['shift']} (a follows z), giving {x['cipher']}."
        return f"{moved} Find the text."

    def solve(self, x: Instance) -> str:
        return _shift(x["cipher"], -x["shift"])

    def work(self, x: Instance) -> str:
        return " ".join(f"{c}>{p}" for c, p in zip(x["cipher"], self.solve(x), strict=True))

    def oracle(self, x: Instance) -> str:
        moved = ALPHABET[x["shift"] :] + ALPHABET[: x["shift"]]
        return x["cipher"].translate(str.maketrans(moved, ALPHABET))


class CaesarCrack(Family):
    """The shift is unknown but a part of the text is given; the work finds its place first."""

    mode = "inverse"
    answer = Text("the original text")

    def generate(self, rng: Random, level: int) -> Instance:
        while True:
            text = _random_text(rng, 4 + 5 * level)
            crib_size = 2 if level == 0 else 3
            start = rng.randrange(len(text) - crib_size + 1)
            x = {"crib": text[start : start + crib_size], "cipher": _shift(text, rng.randint(1, 25))}
            if sum(x["crib"] in _shift(x["cipher"], by) for by in range(26)) == 1:
                return x

    def prompt(self, x: Instance) -> str:
        return (
            "All letters were moved forward in the alphabet by the same unknown number (a follows z), "
            f"giving {x['cipher']}. The text contains {x['crib']}. Find the text."
        )

    def solve(self, x: Instance) -> str:
        return _shift(x["cipher"], -self._place(x)[1])

    def work(self, x: Instance) -> str:
        place, shift = self._place(x)
        letters = zip(x["cipher"], self.solve(x), strict=True)
        found = f"{x['crib']} became {x['cipher'][place : place + len(x['crib'])]}: shift {shift}"
        return f"{found}\n{' '.join(f'{c}>{p}' for c, p in letters)}"

    def oracle(self, x: Instance) -> str:
        return next(text for by in range(26) if x["crib"] in (text := _shift(x["cipher"], by)))

    @staticmethod
    def _place(x: Instance) -> tuple[int, int]:
        """Where the crib is, and the shift: neighbours keep their distance."""
        crib, cipher = ([ALPHABET.index(c) for c in x[key]] for key in ("crib", "cipher"))
        for place in range(len(cipher) - len(crib) + 1):
            shifts = [(c - p) % 26 for c, p in zip(cipher[place:], crib, strict=False)]
            if len(set(shifts)) == 1:
                return place, shifts[0]
        raise ValueError("the crib does not occur")


class Vigenere(Family):
    """Encryption with a repeated key, letter by letter."""

    mode = "trace"
    answer = Text("the encrypted text")

    def generate(self, rng: Random, level: int) -> Instance:
        return {"key": _random_text(rng, 2 + level // 2), "text": _random_text(rng, 3 + 4 * level)}

    def prompt(self, x: Instance) -> str:
        return (
            f"Encrypt {x['text']} with the key {x['key']}, repeated: each key letter moves "
            "its letter forward by 0 for a, 1 for b and so on (a follows z)."
        )

    def solve(self, x: Instance) -> str:
        return "".join(_shift(c, ALPHABET.index(k)) for c, k in zip(x["text"], cycle(x["key"]), strict=False))

    def work(self, x: Instance) -> str:
        columns = zip(x["text"], cycle(x["key"]), self.solve(x), strict=False)
        return " ".join(f"{c}+{k}={e}" for c, k, e in columns)

    def oracle(self, x: Instance) -> str:
        cipher = [""] * len(x["text"])
        for i, k in enumerate(x["key"]):  # all letters under one key letter at once
            start = ALPHABET.index(k)
            table = str.maketrans(ALPHABET, ALPHABET[start:] + ALPHABET[:start])
            cipher[i :: len(x["key"])] = x["text"][i :: len(x["key"])].translate(table)
        return "".join(cipher)


class HammingCodeCorrect(Family):
    """Words of a Hamming code with at most one wrong bit each are restored; the work computes the syndromes."""

    mode = "inverse"
    answer = Words("the restored words separated by spaces")

    def generate(self, rng: Random, level: int) -> Instance:
        checks = 3 + level // 4
        words = []
        for _ in range(2 + level % 4):
            bits = [0, *rng.choices([0, 1], k=2**checks - 1)]  # index = position
            syndrome = self._syndrome(bits)
            for place in (1 << k for k in range(checks)):
                bits[place] ^= bool(syndrome & place)
            if flipped := rng.randrange(2**checks):
                bits[flipped] ^= 1
            words.append("".join(map(str, bits[1:])))
        return {"words": words}

    def prompt(self, x: Instance) -> str:
        return (
            "In a valid word the XOR of the positions of its 1s is 0 (positions count from 1 at the left). "
            f"In each word at most one bit was flipped. Restore {' '.join(x['words'])}."
        )

    def solve(self, x: Instance) -> list[str]:
        restored = []
        for word in x["words"]:
            bits = [0, *map(int, word)]
            if wrong := self._syndrome(bits):
                bits[wrong] ^= 1
            restored.append("".join(map(str, bits[1:])))
        return restored

    def work(self, x: Instance) -> str:
        lines = []
        for word in x["words"]:
            bits = [0, *map(int, word)]
            lines.append(f"{'^'.join(str(i) for i, bit in enumerate(bits) if bit) or '0'}={self._syndrome(bits)}")
        return "\n".join(lines)

    def oracle(self, x: Instance) -> list[str]:
        restored = []
        for word in x["words"]:
            flips = [word, *(f"{word[:i]}{'10'[int(word[i])]}{word[i + 1 :]}" for i in range(len(word)))]
            checks = [1 << k for k in range(len(word).bit_length())]
            groups = [[i for i in range(len(word)) if (i + 1) & check] for check in checks]
            restored.append(next(w for w in flips if all(sum(w[i] == "1" for i in g) % 2 == 0 for g in groups)))
        return restored

    @staticmethod
    def _syndrome(bits: list[int]) -> int:
        return reduce(xor, (i for i, bit in enumerate(bits) if bit), 0)
