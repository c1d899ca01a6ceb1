"""Automata and formal languages."""

from __future__ import annotations

from functools import cache
from itertools import product
from random import Random
from string import ascii_uppercase

from .answers import Integers, Text, Words
from .base import Family, Instance


def _arrows(moves: dict[str, dict[str, str]]) -> str:
    return ", ".join(f"on {c} {' '.join(f'{p}>{q}' for p, q in row.items())}" for c, row in moves.items())


class DfaRun(Family):
    """The states that a finite automaton passes through."""

    mode = "trace"
    answer = Words("the states in order, separated by spaces")

    def generate(self, rng: Random, level: int) -> Instance:
        states, letters = ascii_uppercase[: 3 + level // 2], "abcd"[: 2 + level // 4]
        while True:
            moves = {c: {p: rng.choice(states) for p in states} for c in letters}
            x = {"moves": moves, "word": "".join(rng.choices(letters, k=3 + 5 * level))}
            if len(set(self.solve(x))) >= len(states) - 1:  # hardly any run ends in a trap
                return x

    def prompt(self, x: Instance) -> str:
        return (
            f"A machine starts in A and moves {_arrows(x['moves'])}. List its state after each letter of {x['word']}."
        )

    def solve(self, x: Instance) -> list[str]:
        state, states = "A", []
        for c in x["word"]:
            state = x["moves"][c][state]
            states.append(state)
        return states

    def work(self, x: Instance) -> str:
        states = self.solve(x)
        return " ".join(f"{p}{c}>{q}" for p, c, q in zip(["A", *states], x["word"], states, strict=False))

    def oracle(self, x: Instance) -> list[str]:
        whole = {p: p for p in x["moves"]["a"]}  # where the word so far leads from every state
        states = []
        for c in x["word"]:
            whole = {p: x["moves"][c][q] for p, q in whole.items()}
            states.append(whole["A"])
        return states


class ShortestAccepted(Family):
    """A shortest word that leads an automaton to its goal; the work lists a shortest word for each state on the way."""

    mode = "optimise"
    unique = False
    answer = Text("the word without spaces")

    def generate(self, rng: Random, level: int) -> Instance:
        distance = 4 + level
        layers = [*range(distance + 1), *(rng.randint(1, distance - 1) for _ in range(level))]
        names = rng.sample(ascii_uppercase[: len(layers)], len(layers))
        moves: dict[str, dict[str, str]] = {"a": {}, "b": {}, "c": {}}
        for p, layer in sorted(zip(names, layers, strict=True)):
            ahead = [q for q, other in zip(names, layers, strict=True) if other == layer + 1]
            back = [q for q, other in zip(names, layers, strict=True) if other <= layer]
            for c, choices in zip(rng.sample("abc", 3), (ahead or back, back, [*back, *ahead]), strict=True):
                moves[c][p] = rng.choice(choices)
        return {"moves": moves, "start": names[0], "goal": names[distance]}

    def prompt(self, x: Instance) -> str:
        return (
            f"A machine starts in {x['start']} and moves {_arrows(x['moves'])}. "
            f"Give a shortest word that ends in {x['goal']}."
        )

    def solve(self, x: Instance) -> str:
        return self._words(x)[x["goal"]]

    def check(self, x: Instance, value: str) -> bool:
        return len(value) == len(self.solve(x)) and set(value) <= set("abc") and self._end(x, value) == x["goal"]

    def work(self, x: Instance) -> str:
        return "\n".join(f"{p}: {word or '-'}" for p, word in self._words(x).items() if p != x["goal"])

    def oracle(self, x: Instance) -> str | None:
        words = ("".join(letters) for size in range(1, 8) for letters in product("abc", repeat=size))
        return next((word for word in words if self._end(x, word) == x["goal"]), None)

    @staticmethod
    def _end(x: Instance, word: str) -> str:
        state = x["start"]
        for c in word:
            state = x["moves"][c][state]
        return state

    @staticmethod
    def _words(x: Instance) -> dict[str, str]:
        """A shortest word to each state, in breadth-first order up to the goal."""
        words, queue = {x["start"]: ""}, [x["start"]]
        for p in queue:
            for c, row in x["moves"].items():
                if row[p] not in words:
                    words[row[p]] = words[p] + c
                    queue.append(row[p])
                    if row[p] == x["goal"]:
                        return words
        return words


class BracketCompletion(Family):
    """A balanced string of three kinds of brackets, half of which is hidden."""

    mode = "complete"
    unique = False
    answer = Text("the completed string without spaces")

    _PAIRS = (("(", ")"), ("[", "]"), ("{", "}"))

    def generate(self, rng: Random, level: int) -> Instance:
        pairs = 4 + 2 * level
        text: list[str] = []
        stack: list[str] = []
        opened = 0
        while opened < pairs or stack:
            if opened < pairs and (not stack or rng.random() < 0.5):
                pair = rng.choice(self._PAIRS)
                text.append(pair[0])
                stack.append(pair[1])
                opened += 1
            else:
                text.append(stack.pop())
        for i in rng.sample(range(2 * pairs), pairs):
            text[i] = "?"
        return {"text": "".join(text)}

    def prompt(self, x: Instance) -> str:
        return f"Replace each ? by one of ( ) [ ] {{ }} so that the brackets are balanced: {x['text']}"

    def solve(self, x: Instance) -> str | None:
        text = x["text"]

        @cache
        def fill(i: int, j: int) -> str | None:
            if i == j:
                return ""
            for k in range(i + 1, j, 2):
                for left, right in self._PAIRS:
                    if text[i] in (left, "?") and text[k] in (right, "?"):
                        inner, rest = fill(i + 1, k), fill(k + 1, j)
                        if inner is not None and rest is not None:
                            return left + inner + right + rest
            return None

        return fill(0, len(text))

    def check(self, x: Instance, value: str) -> bool:
        if len(value) != len(x["text"]) or any(a not in ("?", b) for a, b in zip(x["text"], value, strict=True)):
            return False
        closing = dict(self._PAIRS)
        stack: list[str] = []
        for c in value:
            if c in closing:
                stack.append(closing[c])
            elif not stack or stack.pop() != c:
                return False
        return not stack

    def oracle(self, x: Instance) -> str | None:
        reached = {"": ""}  # a text so far for every stack of brackets to close
        for left, c in zip(range(len(x["text"]) - 1, -1, -1), x["text"], strict=True):
            following: dict[str, str] = {}
            for stack, text in reached.items():
                for opening, closing in self._PAIRS:
                    if c in (opening, "?") and len(stack) < left:
                        following.setdefault(stack + closing, text + opening)
                if stack and c in (stack[-1], "?"):
                    following.setdefault(stack[:-1], text + stack[-1])
            reached = following
            if len(reached) > 500:
                return None
        return reached[""]


class LeftmostDerivation(Family):
    """The rules by which a grammar derives a word. Each yields one letter: whether it was right shows only later."""

    mode = "construct"
    unique = False
    answer = Integers("the rule numbers in order, separated by spaces")

    def generate(self, rng: Random, level: int) -> Instance:
        capitals = "SABC"[: 2 + level // 4]
        size = 4 + 2 * level
        while True:
            rules = []
            for capital in capitals:
                bodies = {rng.choice("ab"): None}
                while len(bodies) < 3 + level // 4:
                    bodies[rng.choice("ab") + "".join(rng.choices(capitals, k=rng.randint(1, 2)))] = None
                rules += [f"{capital}>{body}" for body in rng.sample(list(bodies), len(bodies))]
            if word := self._sample(rng, rules, size):
                return {"rules": rules, "word": word}

    def prompt(self, x: Instance) -> str:
        rules = ", ".join(f"{i}: {rule}" for i, rule in enumerate(x["rules"], 1))
        return f"Derive {x['word']} from S, each rule replacing the leftmost capital. Rules: {rules}."

    def solve(self, x: Instance) -> list[int] | None:
        word, rules = x["word"], x["rules"]

        @cache
        def derive(capitals: str, i: int, j: int) -> list[int] | None:
            """The rules by which `capitals`, at most two, become `word[i:j]`."""
            if len(capitals) > j - i:
                return None
            if not capitals:
                return [] if i == j else None
            if len(capitals) == 2:
                for k in range(i + 1, j):
                    left, right = derive(capitals[0], i, k), derive(capitals[1], k, j)
                    if left is not None and right is not None:
                        return left + right
                return None
            for number, rule in enumerate(rules, 1):
                if rule.startswith(f"{capitals}>{word[i]}") and (rest := derive(rule[3:], i + 1, j)) is not None:
                    return [number, *rest]
            return None

        return derive("S", 0, len(word))

    def check(self, x: Instance, value: list[int]) -> bool:
        if len(value) != len(x["word"]) or not all(1 <= number <= len(x["rules"]) for number in value):
            return False
        stack = "S"
        for number, letter in zip(value, x["word"], strict=True):
            rule = x["rules"][number - 1]
            if not stack or not rule.startswith(f"{stack[0]}>{letter}"):
                return False
            stack = rule[3:] + stack[1:]
        return not stack

    def work(self, x: Instance) -> str:
        forms, stack = ["S"], "S"
        for i, number in enumerate(self.solve(x) or []):
            stack = x["rules"][number - 1][3:] + stack[1:]
            forms.append(x["word"][: i + 1] + stack)
        return " ".join(forms)

    def oracle(self, x: Instance) -> list[int] | None:
        reached: dict[str, list[int]] = {"S": []}  # by the capitals that are left, letter after letter
        for i, letter in enumerate(x["word"], 1):
            following: dict[str, list[int]] = {}
            for stack, used in reached.items():
                for number, rule in enumerate(x["rules"], 1):
                    rest = rule[3:] + stack[1:]
                    if rule.startswith(f"{stack[:1]}>{letter}") and len(rest) <= len(x["word"]) - i:
                        following.setdefault(rest, [*used, number])
            reached = following
            if len(reached) > 500:
                return None
        return reached[""]

    @staticmethod
    def _sample(rng: Random, rules: list[str], size: int) -> str | None:
        """A random word of `size` letters, or None when the derivation gets stuck."""
        word, stack = "", "S"
        for left in reversed(range(size)):  # no more capitals than letters to come, and at least one till the end
            fit = [r for r in rules if r[0] == stack[0] and min(left, 1) <= len(r[3:] + stack[1:]) <= left]
            if not fit:
                return None
            rule = rng.choice(fit)
            word, stack = word + rule[2], rule[3:] + stack[1:]
        return word
