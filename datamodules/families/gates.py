"""The gates every family passes: right answers score one, wrong ones do not, nothing can be guessed, hacked or repeated.

`check(family)` runs them all on any family and returns one `Gate` each; `lit-rl bootcamp check` prints them.
"""

from __future__ import annotations

import ast
import inspect
import json
import math
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import mean

from .answers import wrap
from .base import Family, Question, draw, fingerprint

CONSTANTS = [
    "0", "1", "2", "-1", "3", "4", "5", "10", "12", "100", "1/2", "yes", "no", "YES", "NO", "true", "false",
    "none", "impossible", "A", "B", "a", "0 0", "1 2 3", "[]",
]  # fmt: skip
FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "parse_expr",
    "sympify",
    "pickle",
    "marshal",
    "yaml",
    "literal_eval",
}
DRAWS = 1_000
GENERATION_MS, VERIFICATION_MS = 100.0, 50.0


@dataclass
class Gate:
    name: str
    passed: bool
    detail: str


def check(family: Family, instances: int = 200) -> list[Gate]:
    """Runs every gate; an exception inside one fails it with the exception's text."""
    levels = range(family.max_level + 1)
    per_level = math.ceil(instances / len(levels))
    questions = [draw(family, "train", level, i) for level in levels for i in range(per_level)]
    gates: list[tuple[str, Callable[[], str | None]]] = [
        ("right answers score one", lambda: _right(questions)),
        ("a second method agrees", lambda: _second(questions)),
        ("near misses fail", lambda: _near_misses(questions)),
        ("constants fail", lambda: _constants(questions)),
        ("other answers fail", lambda: _others(questions)),
        ("no code is run", lambda: _no_code(family, questions)),
        ("any text is judged", lambda: _any_text(questions)),
        ("same in every process", lambda: _same(family)),
        ("questions do not repeat", lambda: _repeats(family)),
        ("splits do not overlap", lambda: _splits(family)),
        ("fast", lambda: _fast(family)),
        ("prompts fit", lambda: _prompts(questions)),
        ("levels grow", lambda: _grow(questions)),
    ]
    results = []
    for name, gate in gates:
        try:
            problem = gate()
        except Exception as error:  # a broken family must not stop the report
            problem = f"{type(error).__name__}: {error}"
        results.append(Gate(name, problem is None, problem or "ok"))
    return results


def _right(questions: list[Question]) -> str | None:
    for q in questions:
        trip = Question(q.family, json.loads(json.dumps(q.instance)), q.split, q.level, q.index)
        for what, text in (
            ("answer", wrap(q.right)),
            ("worked solution", q.solution),
            ("dressed answer", f"So: {wrap(f' **{q.right}**. ')}"),
        ):
            for question, how in ((q, ""), (trip, " after a JSON round trip")):
                if (verdict := question(text)).score != 1.0:
                    return f"{q.id}: the right {what} {text[-80:]!r} scores {verdict.score}{how} ({verdict.reason})"
    return None


def _second(questions: list[Question]) -> str | None:
    found = [(q, value) for q in questions if (value := q.family.oracle(q.instance)) is not None]
    need = min(60, len(questions) // 4)
    if len(found) < need:
        return f"`oracle` solved {len(found)} of {len(questions)} questions: at least {need} are wanted"
    for q, value in found:
        text = wrap(q.family.answer.render(value))
        if (verdict := q(text)).score != 1.0:
            return f"{q.id}: the second method's answer {text[:80]} scores {verdict.score}; `solve` says {q.right[:80]}"
    return None


def _misses(q: Question) -> Iterator[str]:
    for value in q.family.answer.near_misses(q.family.solve(q.instance), Random(q.id)):
        if (text := q.family.answer.render(value)) != q.right:
            yield text


def _near_misses(questions: list[Question]) -> str | None:
    tried = failed = 0
    for q in questions:
        for text in list(_misses(q))[:30]:
            tried += 1
            if q(wrap(text)).score < 1.0:
                failed += 1
            elif q.family.unique:
                return (
                    f"{q.id}: the near miss {text[:80]!r} of {q.right[:80]!r} is accepted, and the family says unique"
                )
    if failed < 12 * len(questions) * 0.4:
        return f"only {failed} of {tried} near misses of {len(questions)} answers fail"
    return None


def _limit(family: Family, strict: float) -> float:
    return 0.40 if family.low_entropy else strict


def _constants(questions: list[Question]) -> str | None:
    family = questions[0].family
    own = [text for text, _ in Counter(q.right for q in questions).most_common(5)]
    for text in [*CONSTANTS, *own]:
        share = mean(q(wrap(text)).score >= 1.0 for q in questions)
        if share > _limit(family, 0.10):
            return f"the constant {text[:40]!r} is right in {share:.0%} of the questions (limit {_limit(family, 0.10):.0%})"
    return None


def _others(questions: list[Question]) -> str | None:
    order = list(range(len(questions)))
    Random(0).shuffle(order)
    pairs = [(questions[i], questions[j]) for i, j in zip(order, order[1:] + order[:1], strict=True)]
    pairs += [(a, b) for a, b in pairwise(questions) if a.level == b.level]
    share = mean(q(wrap(other.right)).score >= 1.0 for q, other in pairs)
    limit = _limit(questions[0].family, 0.05)
    return (
        None
        if share <= limit
        else f"another question's answer is right in {share:.0%} of the cases (limit {limit:.0%})"
    )


def _no_code(family: Family, questions: list[Question]) -> str | None:
    for node in ast.walk(ast.parse(Path(inspect.getfile(type(family))).read_text())):
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        owner = node.value.id if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else ""
        modules = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if (name in FORBIDDEN and owner != "re") or FORBIDDEN & set(modules):
            return f"{Path(inspect.getfile(type(family))).name} uses {name or modules}"
    with tempfile.TemporaryDirectory() as folder:
        witness = Path(folder) / "ran"
        for q in questions[:: max(1, len(questions) // 20)]:
            for code in (
                f"__import__('pathlib').Path({str(witness)!r}).touch()",
                f"open({str(witness)!r}, 'w')",
                "len('x' * 24)",
                "(lambda: 1)()",
            ):
                if q(wrap(code)).score >= 1.0:
                    return f"{q.id}: {code!r} is accepted"
        return "a verifier ran the response's code" if witness.exists() else None


def _any_text(questions: list[Question]) -> str | None:
    long = ["[" * 5_000, "9" * 100_000, "1 " * 9_000, "a" * 19_000, "1" * 5_000 + "/" + "2" * 5_000, "((((" * 900]
    odd = [
        "",
        " ",
        "<answer>",
        "</answer><answer>",
        "-",
        "NaN",
        "inf",
        "1e999999",
        "\x00",
        "٣",
        "²",
        "½",
        "🙂",
        "1/0",
        "{}",
        "/",
    ]
    for q in questions[:: max(1, len(questions) // 10)]:
        for text in [*long, *odd, ";;;", "x=1"]:
            start = time.process_time()
            verdict = q(wrap(text))
            if verdict.correct:
                return f"{q.id}: {text[:40]!r} is accepted"
            if not math.isfinite(verdict.score) or not 0 <= verdict.score <= 1:
                return f"{q.id}: {text[:40]!r} scores {verdict.score}"
            if (took := time.process_time() - start) > 1.0:
                return f"{q.id}: judging {text[:40]!r} took {took:.1f} s"
        if q("").correct or q(wrap(q.right)[:-1]).correct:
            return f"{q.id}: a response without a complete answer block is accepted"
    return None


def digest(family: Family) -> str:
    """A hash over a few questions, prompts, answers and worked solutions of each level: the golden value of a version."""
    texts = []
    for level in range(family.max_level + 1):
        q = draw(family, "test", level, 3)
        texts.append([q.instance, q.prompt, q.right, q.solution])
    return blake2b(json.dumps(texts, sort_keys=True).encode(), digest_size=8).hexdigest()


def _same(family: Family) -> str | None:
    path = f"{type(family).__module__}.{type(family).__qualname__}"
    code = (
        "from lit_rl.datamodules.families import families, family; from lit_rl.datamodules.families.gates import digest;"
        f"families(); print(digest(family({path!r})))"
    )
    here = digest(family)
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
        if run.stdout.strip() != here:
            return f"another process draws other questions: {run.stdout.strip() or run.stderr.strip()[-200:]} against {here}"
    return None


def _repeats(family: Family) -> str | None:
    for level in sorted({1, family.max_level // 2, family.max_level}):
        prompts = {draw(family, "train", level, 10_000 + i).prompt for i in range(DRAWS)}
        if (share := 1 - len(prompts) / DRAWS) >= 0.01:
            return f"{share:.1%} of {DRAWS} draws at level {level} repeat a question"
    return None


def _splits(family: Family) -> str | None:
    seen: dict[int, str] = {}
    for split in ("train", "validation", "test"):
        for level in {0, family.max_level}:
            for i in range(60):
                mark = fingerprint(family, draw(family, split, level, i).instance)
                if seen.setdefault(mark, split) != split:
                    return f"a {split} question is also in {seen[mark]}"
    return None


def _fast(family: Family) -> str | None:
    drawing, judging = [], []
    for i in range(40):
        start = time.process_time()
        q = draw(family, "train", family.max_level, 20_000 + i)
        drawing.append((time.process_time() - start) * 1e3)
        text = q.solution
        start = time.process_time()
        q(text)
        judging.append((time.process_time() - start) * 1e3)
    for what, times, limit in (("generation", drawing, GENERATION_MS), ("verification", judging, VERIFICATION_MS)):
        if (p95 := sorted(times)[int(0.95 * len(times))]) > limit:
            return f"{what} takes {p95:.0f} ms at the 95th percentile (limit {limit:.0f})"
    return None


def _prompts(questions: list[Question]) -> str | None:
    longest = max(questions, key=lambda q: len(q.prompt))
    limit = longest.family.max_prompt
    return (
        None
        if len(longest.prompt) <= limit
        else f"{longest.id}: the prompt has {len(longest.prompt)} characters (limit {limit})"
    )


def _grow(questions: list[Question]) -> str | None:
    family = questions[0].family
    sizes = [
        mean(family.size(q.instance) for q in questions if q.level == level) for level in range(family.max_level + 1)
    ]
    third = max(1, len(sizes) // 3)
    low, high = mean(sizes[:third]), mean(sizes[-third:])
    return (
        None
        if high > low
        else f"the mean size does not grow with the level: {low:.1f} at the low third, {high:.1f} at the high third"
    )
