"""Operations on data structures, and what they leave behind."""

from __future__ import annotations

import heapq
from random import Random

from .answers import Integers
from .base import Family, Instance

Tree = tuple[int, "Tree", "Tree"] | None
"""Key, left and right subtree."""


def _ops(ops: list[int | None]) -> str:
    return ", ".join("pop" if op is None else f"push {op}" for op in ops)


class StackOps(Family):
    """A stack after pushes and pops; the work shows it after each operation."""

    mode = "trace"
    answer = Integers("the numbers from bottom to top, separated by spaces")

    def generate(self, rng: Random, level: int) -> Instance:
        size = 0
        ops: list[int | None] = []
        while len(ops) < 4 + 3 * level or size < 2:
            pop = size > 0 and rng.random() < 0.4
            size += -1 if pop else 1
            ops.append(None if pop else rng.randrange(10 if level == 0 else 100))
        return {"ops": ops}

    def prompt(self, x: Instance) -> str:
        return f"A stack is empty. Then: {_ops(x['ops'])}. List the stack."

    def solve(self, x: Instance) -> list[int]:
        return self._states(x)[-1]

    def work(self, x: Instance) -> str:
        return "\n".join(" ".join(map(str, state)) or "-" for state in self._states(x)[:-1])

    def oracle(self, x: Instance) -> list[int]:
        left, pops = [], 0
        for op in reversed(x["ops"]):  # a pop takes the nearest push before it
            if op is None:
                pops += 1
            elif pops:
                pops -= 1
            else:
                left.append(op)
        return left[::-1]

    @staticmethod
    def _states(x: Instance) -> list[list[int]]:
        states: list[list[int]] = [[]]
        for op in x["ops"]:
            states.append(states[-1][:-1] if op is None else [*states[-1], op])
        return states[1:]


class DequeOps(Family):
    """A queue with two ends after insertions and removals at both."""

    mode = "trace"
    answer = Integers("the numbers from left to right, separated by spaces")

    def generate(self, rng: Random, level: int) -> Instance:
        size = 0
        ops: list[str] = []
        while len(ops) < 5 + 3 * level or size < 2:
            pop = size > 0 and rng.random() < 0.4
            size += -1 if pop else 1
            ops.append(rng.choice("LR") + ("-" if pop else str(rng.randrange(10 if level == 0 else 100))))
        return {"ops": ops}

    def prompt(self, x: Instance) -> str:
        return (
            "A list is empty. L5 inserts 5 at its left end, R5 at its right end, L- and R- remove the number there. "
            f"List what is left after {' '.join(x['ops'])}."
        )

    def solve(self, x: Instance) -> list[int]:
        return self._states(x)[-1]

    def work(self, x: Instance) -> str:
        return "\n".join(" ".join(map(str, state)) or "-" for state in self._states(x)[:-1])

    def oracle(self, x: Instance) -> list[int]:
        tape: dict[int, int] = {}  # the list lies on tape[left:right]
        left = right = 0
        for op in x["ops"]:
            if op == "L-":
                left += 1
            elif op == "R-":
                right -= 1
            elif op[0] == "L":
                left -= 1
                tape[left] = int(op[1:])
            else:
                tape[right] = int(op[1:])
                right += 1
        return [tape[i] for i in range(left, right)]

    @staticmethod
    def _states(x: Instance) -> list[list[int]]:
        states: list[list[int]] = [[]]
        for op in x["ops"]:
            now = states[-1]
            if op[1:] == "-":
                states.append(now[1:] if op[0] == "L" else now[:-1])
            else:
                states.append([int(op[1:]), *now] if op[0] == "L" else [*now, int(op[1:])])
        return states[1:]


class BstInsertDelete(Family):
    """A binary search tree after insertions and deletions; the work gives the way down to each key."""

    mode = "trace"
    answer = Integers("the keys in preorder, separated by spaces")

    def generate(self, rng: Random, level: int) -> Instance:
        keys = rng.sample(range(10 if level == 0 else 100), 4 + level + level // 2)
        return {"insert": keys, "delete": rng.sample(keys, max(0, level - 4))}

    def prompt(self, x: Instance) -> str:
        text = f"Insert {' '.join(map(str, x['insert']))} into an empty binary search tree"
        if x["delete"]:
            text += (
                f", then delete {' '.join(map(str, x['delete']))} (a key with two children is replaced by "
                "the smallest of its right subtree, one with a single child by that child)"
            )
        return f"{text}. List it in preorder (root, left, right)."

    def solve(self, x: Instance) -> list[int]:
        return self._preorder(self._trees(x)[-1])

    def work(self, x: Instance) -> str:
        trees = self._trees(x)
        ways = [f"{key}: {self._way(trees[i], key) or 'root'}" for i, key in enumerate(x["insert"])]
        built = trees[len(x["insert"]) : -1]  # the states before the last deletion, if there is one
        return "\n".join([*ways, *(" ".join(map(str, self._preorder(tree))) for tree in built)])

    def oracle(self, x: Instance) -> list[int] | None:
        def preorder(keys: list[int]) -> list[int]:
            if not keys:
                return []
            root = keys[0]
            return [root, *preorder([k for k in keys if k < root]), *preorder([k for k in keys if k > root])]

        return None if x["delete"] else preorder(x["insert"])

    @classmethod
    def _trees(cls, x: Instance) -> list[Tree]:
        trees: list[Tree] = [None]
        for key in x["insert"]:
            trees.append(cls._insert(trees[-1], key))
        for key in x["delete"]:
            trees.append(cls._delete(trees[-1], key))
        return trees

    @classmethod
    def _insert(cls, tree: Tree, key: int) -> Tree:
        if tree is None:
            return (key, None, None)
        root, left, right = tree
        return (root, cls._insert(left, key), right) if key < root else (root, left, cls._insert(right, key))

    @classmethod
    def _delete(cls, tree: Tree, key: int) -> Tree:
        if tree is None:
            return None
        root, left, right = tree
        if key < root:
            return (root, cls._delete(left, key), right)
        if key > root:
            return (root, left, cls._delete(right, key))
        if left is None or right is None:
            return left or right
        heir = min(cls._preorder(right))
        return (heir, left, cls._delete(right, heir))

    @classmethod
    def _preorder(cls, tree: Tree) -> list[int]:
        return [] if tree is None else [tree[0], *cls._preorder(tree[1]), *cls._preorder(tree[2])]

    @staticmethod
    def _way(tree: Tree, key: int) -> str:
        way = ""
        while tree is not None:
            way += "L" if key < tree[0] else "R"
            tree = tree[1] if key < tree[0] else tree[2]
        return way


class BinaryHeap(Family):
    """The array of a binary heap after pushes and pops; the work shows it after each operation."""

    mode = "trace"
    answer = Integers("the array separated by spaces")

    def generate(self, rng: Random, level: int) -> Instance:
        keys = rng.sample(range(10 if level == 0 else 100), 4 + 2 * level)
        ops: list[int | None] = list(keys)
        for _ in range(level // 2):
            ops.insert(rng.randint(level, len(ops)), None)  # `level` pushes come first, so the heap is never empty
        return {"ops": ops}

    def prompt(self, x: Instance) -> str:
        pop = (
            " pop takes the root away, puts the last key there and swaps it with its smaller child "
            "while that child is smaller."
            if None in x["ops"]
            else ""
        )
        return (
            "A min-heap is an array, empty at first. push puts a key at the end and swaps it with its parent "
            f"while the parent is larger.{pop} Do {_ops(x['ops'])}."
        )

    def solve(self, x: Instance) -> list[int]:
        return self._states(x)[-1]

    def work(self, x: Instance) -> str:
        return "\n".join(" ".join(map(str, state)) for state in self._states(x)[:-1])

    def oracle(self, x: Instance) -> list[int]:
        heap: list[int] = []
        for op in x["ops"]:
            if op is None:
                heapq.heappop(heap)
            else:
                heapq.heappush(heap, op)
        return heap

    @classmethod
    def _states(cls, x: Instance) -> list[list[int]]:
        states: list[list[int]] = [[]]
        for op in x["ops"]:
            heap = list(states[-1])
            if op is None:
                cls._sink(heap)
            else:
                heap.append(op)
                i = len(heap) - 1
                while i and heap[(i - 1) // 2] > heap[i]:
                    heap[(i - 1) // 2], heap[i] = heap[i], heap[(i - 1) // 2]
                    i = (i - 1) // 2
            states.append(heap)
        return states[1:]

    @staticmethod
    def _sink(heap: list[int]) -> None:
        """Removes the root."""
        heap[0] = heap[-1]
        heap.pop()
        i = 0
        while children := [j for j in (2 * i + 1, 2 * i + 2) if j < len(heap)]:
            j = min(children, key=lambda child: heap[child])
            if heap[i] < heap[j]:
                return
            heap[i], heap[j] = heap[j], heap[i]
            i = j
