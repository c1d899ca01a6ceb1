"""Graphs: paths, orders, colourings, cycles and trees."""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from itertools import combinations, pairwise, product
from random import Random
from string import ascii_lowercase

from .answers import Words
from .base import Family, Instance

Edge = list[str]


def _connected(rng: Random, names: list[str], pairs: list[tuple[str, str]], extra: int) -> list[Edge]:
    """A random spanning tree out of `pairs`, and `extra` more of them, in random order and direction."""
    rng.shuffle(pairs)
    root = {name: name for name in names}
    tree: list[tuple[str, str]] = []
    rest: list[tuple[str, str]] = []
    for pair in pairs:
        (tree if _join(root, *pair) else rest).append(pair)
    chosen = [rng.sample(pair, 2) for pair in tree + rest[:extra]]
    rng.shuffle(chosen)
    return chosen


def _join(root: dict[str, str], a: str, b: str) -> bool:
    """Joins two sets of a union-find forest; False when they were one already."""
    while root[a] != a:
        a = root[a]
    while root[b] != b:
        b = root[b]
    root[a] = b
    return a != b


def _neighbours(edges: list[Edge]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for a, b in edges:
        found.setdefault(a, []).append(b)
        found.setdefault(b, []).append(a)
    return found


def _list(edges: list[Edge]) -> str:
    return " ".join(f"{a}-{b}" for a, b in edges)


class _Weighted(Family):
    """An undirected connected graph with a positive weight on each edge."""

    unique = False

    def graph(self, rng: Random, level: int) -> list[list]:
        names = rng.sample(ascii_lowercase, 3 + level)
        edges = _connected(rng, names, list(combinations(names, 2)), 1 + level + level // 2)
        return [[a, b, rng.randint(1, 9 + 5 * level)] for a, b in edges]

    def listed(self, x: Instance) -> str:
        return ", ".join(f"{a}-{b} {w}" for a, b, w in x["edges"])


class ShortestPath(_Weighted):
    """A lightest path between two nodes; the work settles nodes by distance, as Dijkstra does."""

    mode = "optimise"
    answer = Words("all nodes of the path in order, separated by spaces")

    def generate(self, rng: Random, level: int) -> Instance:
        edges = self.graph(rng, level)
        start = rng.choice(edges)[0]
        return {"edges": edges, "start": start, "end": self.settle(edges, start)[-1][1]}

    def prompt(self, x: Instance) -> str:
        return f"Roads and lengths: {self.listed(x)}. Find a shortest way from {x['start']} to {x['end']}."

    def settle(self, edges: list[list], start: str) -> list[tuple[int, str, str]]:
        """Distance, node and the node before it, nearest first."""
        ways: dict[str, list[tuple[str, int]]] = {}
        for a, b, w in edges:
            ways.setdefault(a, []).append((b, w))
            ways.setdefault(b, []).append((a, w))
        settled: dict[str, tuple[int, str, str]] = {}
        heap = [(0, start, "")]
        while heap:
            distance, node, before = heappop(heap)
            if node in settled:
                continue
            settled[node] = distance, node, before
            for other, w in ways[node]:
                if other not in settled:
                    heappush(heap, (distance + w, other, node))
        return list(settled.values())

    def solve(self, x: Instance) -> list[str]:
        before = {node: previous for _, node, previous in self.settle(x["edges"], x["start"])}
        path = [x["end"]]
        while path[-1] != x["start"]:
            path.append(before[path[-1]])
        return path[::-1]

    def length(self, x: Instance, path: list[str]) -> int | None:
        weight = {pair: w for a, b, w in x["edges"] for pair in ((a, b), (b, a))}
        steps = list(pairwise(path))
        return sum(weight[step] for step in steps) if all(step in weight for step in steps) else None

    def check(self, x: Instance, value: list[str]) -> bool:
        if not value or len(value) > len(x["edges"]) + 1 or (value[0], value[-1]) != (x["start"], x["end"]):
            return False
        return self.length(x, value) == self.length(x, self.solve(x))

    def work(self, x: Instance) -> str:
        lines = []
        for distance, node, before in self.settle(x["edges"], x["start"]):
            lines.append(f"{node} {distance} via {before}" if before else f"{node} {distance}")
            if node == x["end"]:
                break
        return "\n".join(lines)

    def oracle(self, x: Instance) -> list[str]:
        best = {x["start"]: (0, [x["start"]])}
        arcs = [arc for a, b, w in x["edges"] for arc in ((a, b, w), (b, a, w))]
        for _ in arcs:  # Bellman and Ford
            for a, b, w in arcs:
                if a in best and (b not in best or best[a][0] + w < best[b][0]):
                    best[b] = best[a][0] + w, [*best[a][1], b]
        return best[x["end"]][1]


class MinimumSpanningTree(_Weighted):
    """The edges of a lightest spanning tree; the work is Kruskal's."""

    mode = "optimise"
    answer = Words("the tree's edges such as a-b, separated by spaces")

    def generate(self, rng: Random, level: int) -> Instance:
        return {"edges": self.graph(rng, level)}

    def prompt(self, x: Instance) -> str:
        return f"Find a minimum spanning tree: {self.listed(x)}."

    def kruskal(self, x: Instance) -> list[tuple[list, bool]]:
        """The edges by weight, and whether each is taken, until all nodes are joined."""
        root = {node: node for a, b, _ in x["edges"] for node in (a, b)}
        steps, wanted = [], len(root) - 1
        for edge in sorted(x["edges"], key=lambda edge: edge[2]):
            taken = _join(root, edge[0], edge[1])
            steps.append((edge, taken))
            wanted -= taken
            if not wanted:
                break
        return steps

    def solve(self, x: Instance) -> list[str]:
        return [f"{a}-{b}" for (a, b, _), taken in self.kruskal(x) if taken]

    def check(self, x: Instance, value: list[str]) -> bool:
        named = {text: edge for edge in x["edges"] for text in (f"{edge[0]}-{edge[1]}", f"{edge[1]}-{edge[0]}")}
        best = [edge[2] for edge, taken in self.kruskal(x) if taken]
        if len(value) != len(best) or any(text not in named for text in value):
            return False
        root = {node: node for a, b, _ in x["edges"] for node in (a, b)}
        tree = [named[text] for text in value]
        return all(_join(root, a, b) for a, b, _ in tree) and sum(w for *_, w in tree) == sum(best)

    def work(self, x: Instance) -> str:
        return "\n".join(f"{a}-{b} {w} {'yes' if taken else 'no'}" for (a, b, w), taken in self.kruskal(x))

    def oracle(self, x: Instance) -> list[str]:
        nodes = {node for a, b, _ in x["edges"] for node in (a, b)}
        inside, tree = {x["edges"][0][0]}, []
        while inside != nodes:  # Prim
            a, b, _ = min((e for e in x["edges"] if (e[0] in inside) != (e[1] in inside)), key=lambda edge: edge[2])
            inside |= {a, b}
            tree.append(f"{a}-{b}")
        return tree


class TopologicalSort(Family):
    """Any order of the nodes that respects the arcs; the work takes free nodes one by one."""

    mode = "construct"
    answer = Words("all letters in order, separated by spaces")
    unique = False

    def generate(self, rng: Random, level: int) -> Instance:
        names = rng.sample(ascii_lowercase, 3 + level + level // 2)
        rank = {name: i for i, name in enumerate(names)}
        pairs = [[name, rng.choice([other for other in names if other != name])] for name in names]
        pairs += [rng.sample(names, 2) for _ in range(level)]
        arcs = list(dict.fromkeys(tuple(sorted(pair, key=rank.__getitem__)) for pair in pairs))
        rng.shuffle(arcs)
        return {"arcs": [list(arc) for arc in arcs]}

    def prompt(self, x: Instance) -> str:
        arcs = " ".join(f"{a}<{b}" for a, b in x["arcs"])
        return f"Order the letters so that in each pair the left one comes first: {arcs}"

    def steps(self, x: Instance) -> list[list[str]]:
        """The free letters before each step; the first one is taken."""
        before: dict[str, set[str]] = {name: set() for arc in x["arcs"] for name in arc}
        for a, b in x["arcs"]:
            before[b].add(a)
        steps = []
        while before:
            steps.append([name for name, waits in before.items() if not waits])
            taken = steps[-1][0]
            del before[taken]
            for waits in before.values():
                waits.discard(taken)
        return steps

    def solve(self, x: Instance) -> list[str]:
        return [free[0] for free in self.steps(x)]

    def check(self, x: Instance, value: list[str]) -> bool:
        place = {name: i for i, name in enumerate(value)}
        names = {name for arc in x["arcs"] for name in arc}
        return len(value) == len(place) and place.keys() == names and all(place[a] < place[b] for a, b in x["arcs"])

    def work(self, x: Instance) -> str:
        return "\n".join(f"free {' '.join(free)}: {free[0]}" for free in self.steps(x))

    def oracle(self, x: Instance) -> list[str]:
        after: dict[str, list[str]] = {name: [] for arc in x["arcs"] for name in arc}
        for a, b in x["arcs"]:
            after[a].append(b)
        done: list[str] = []

        def visit(name: str) -> None:
            for other in after[name]:
                if other not in done:
                    visit(other)
            done.append(name)

        for name in after:
            if name not in done:
                visit(name)
        return done[::-1]


class GraphColoring(Family):
    """Any proper colouring with three colours, of a graph that has one."""

    mode = "construct"
    answer = Words("each node with its colour, such as a1 b3, separated by spaces")
    unique = False

    def generate(self, rng: Random, level: int) -> Instance:
        names = rng.sample(ascii_lowercase, 3 + level + level // 2)
        colour = {name: i % 3 for i, name in enumerate(names)}
        pairs = [(a, b) for a, b in combinations(names, 2) if colour[a] != colour[b]]
        return {"edges": _connected(rng, names, pairs, level + level // 3 + rng.randrange(2))}

    def prompt(self, x: Instance) -> str:
        return f"Colour each node 1, 2 or 3 so that joined nodes differ: {_list(x['edges'])}"

    def colours(self, x: Instance) -> list[tuple[str, list[str], str]]:
        """Node, colours that its coloured neighbours rule out, and its colour, most constrained node first."""
        near = _neighbours(x["edges"])
        steps: list[tuple[str, list[str], str]] = []
        colour: dict[str, str] = {}

        def banned(node: str) -> list[str]:
            return sorted({colour[other] for other in near[node] if other in colour})

        def search() -> bool:
            left = [node for node in near if node not in colour]
            if not left:
                return True
            node = max(left, key=lambda node: (len(banned(node)), len(near[node])))
            out = banned(node)
            for c in "123":
                if c not in out:
                    colour[node] = c
                    steps.append((node, out, c))
                    if search():
                        return True
                    steps.pop()
                    del colour[node]
            return False

        search()
        return steps

    def solve(self, x: Instance) -> list[str]:
        colour = {node: c for node, _, c in self.colours(x)}
        return [node + colour[node] for node in _neighbours(x["edges"])]

    def check(self, x: Instance, value: list[str]) -> bool:
        colour = {text[:1]: text[1:] for text in value}
        if len(value) != len(colour) or colour.keys() != _neighbours(x["edges"]).keys():
            return False
        return set(colour.values()) <= set("123") and all(colour[a] != colour[b] for a, b in x["edges"])

    def work(self, x: Instance) -> str:
        return "\n".join(
            f"{node} not {' '.join(out)}: {c}" if out else f"{node}: {c}" for node, out, c in self.colours(x)
        )

    def oracle(self, x: Instance) -> list[str] | None:
        nodes = list(_neighbours(x["edges"]))
        if len(nodes) > 7:
            return None
        choices = ([node + c for node, c in zip(nodes, cs, strict=True)] for cs in product("123", repeat=len(nodes)))
        return next(choice for choice in choices if self.check(x, choice))


class BipartiteOrOddCycle(Family):
    """Two sides with all edges between them, or an odd cycle, which rules such sides out."""

    mode = "decide"
    answer = Words("`two` and one side's nodes, or `odd` and the cycle's nodes in order, separated by spaces")
    unique = False

    def generate(self, rng: Random, level: int) -> Instance:
        names = rng.sample(ascii_lowercase, 3 + level + level // 2)
        half = len(names) // 2 + rng.randrange(2)
        edges = _connected(rng, names, list(product(names[:half], names[half:])), level // 2 + rng.randrange(2))
        if rng.random() < 0.5:
            inside = [*combinations(names[:half], 2), *combinations(names[half:], 2)]
            edges.insert(rng.randrange(len(edges) + 1), rng.sample(rng.choice(inside), 2))
        return {"edges": edges}

    def prompt(self, x: Instance) -> str:
        return f"Split the nodes into two sides without edges inside a side, or find an odd cycle: {_list(x['edges'])}"

    def search(self, x: Instance) -> tuple[dict[str, list[str]], tuple[str, str] | None]:
        """Each node's path from the first node, breadth first, and an edge inside a side, if any."""
        near = _neighbours(x["edges"])
        first = next(iter(near))
        path = {first: [first]}
        queue = deque([first])
        while queue:
            node = queue.popleft()
            for other in near[node]:
                if other not in path:
                    path[other] = [*path[node], other]
                    queue.append(other)
        clash = next(((a, b) for a, b in x["edges"] if (len(path[a]) - len(path[b])) % 2 == 0), None)
        return path, clash

    def solve(self, x: Instance) -> list[str]:
        path, clash = self.search(x)
        if clash is None:
            return ["two", *(node for node, way in path.items() if len(way) % 2)]
        left, right = path[clash[0]], path[clash[1]]
        shared = sum(a == b for a, b in zip(left, right, strict=False))
        return ["odd", *left[shared - 1 :], *reversed(right[shared:])]

    def check(self, x: Instance, value: list[str]) -> bool:
        kind, nodes = value[:1], value[1:]
        if len(set(nodes)) != len(nodes) or not set(nodes) <= _neighbours(x["edges"]).keys():
            return False
        if kind == ["two"]:
            return all((a in nodes) != (b in nodes) for a, b in x["edges"])
        edges = {frozenset(edge) for edge in x["edges"]}
        return (
            kind == ["odd"]
            and len(nodes) % 2 == 1
            and all(frozenset(step) in edges for step in pairwise([*nodes, *nodes[:1]]))
        )

    def work(self, x: Instance) -> str:
        path, clash = self.search(x)
        lines = [f"{node} {1 + len(way) % 2}" + (f" via {way[-2]}" if way[1:] else "") for node, way in path.items()]
        return "\n".join(lines + ([f"{clash[0]}-{clash[1]} same side"] if clash else []))

    def oracle(self, x: Instance) -> list[str]:
        near = _neighbours(x["edges"])
        walks: list[list[str]] = []
        for first in near:  # walks by parity: a shortest odd closed walk is a cycle
            seen = {(first, 0): [first]}
            queue = deque(seen)
            while queue:
                node, parity = queue.popleft()
                for other in near[node]:
                    if (other, 1 - parity) not in seen:
                        seen[other, 1 - parity] = [*seen[node, parity], other]
                        queue.append((other, 1 - parity))
            if (first, 1) not in seen:
                return ["two", *(node for node, parity in seen if parity)]
            walks.append(seen[first, 1][:-1])
        return ["odd", *min(walks, key=len)]
