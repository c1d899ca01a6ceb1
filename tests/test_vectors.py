"""Every function that has reference vectors, against them.

The vectors are the JSON files in tests/vectors, or in the folder that LIT_RL_VECTORS names. A case may stand anywhere in
a file; the first entry of CHECKS whose keys it has checks it. What nothing answers to is skipped, by its name.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from paper_checks import CHECKS as OF_PAPERS
from vector_checks import CHECKS as OF_OBJECTIVES
from vector_checks import Check, Unanswered

SHIPPED = Path(__file__).parent / "vectors"
VECTORS = Path(os.environ.get("LIT_RL_VECTORS", SHIPPED))
CHECKS = [*OF_OBJECTIVES, *OF_PAPERS]
UNANSWERED: set[str] = set()
"""Cases of the shipped files that have no entry in CHECKS yet."""


def cases(data: dict) -> Iterator[dict]:
    """The entries of every list, and every other dictionary, but for "meta", which may have lists of its own."""
    for key, value in data.items():
        if key == "meta":
            yield from cases(value)
        elif isinstance(value, dict):
            yield {"name": key, **value}
        elif isinstance(value, list):
            yield from ({"name": entry.get("case", key), **entry} for entry in value if isinstance(entry, dict))


def keys(case: dict) -> set[str]:
    return {case["name"], *case, *case.get("inputs", ()), *case.get("params", ())}


def found(folder: Path) -> Iterator[tuple[str, dict, str, Check | None]]:
    """(file, case, name in its `expected`, its check)"""
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text())
        for case in cases(data):
            case = {**data.get(case.get("same_inputs"), {}), **case}
            check = next((check for form, check in CHECKS if form <= keys(case)), None)
            names = case.get("expected") if check else None
            for name in names if isinstance(names, dict) else [""]:
                yield path.stem, case, name, check


def label(file: str, case: dict, name: str, _: Check | None) -> str:
    return ":".join(filter(None, (file, case["name"], name)))


FOUND = list(found(VECTORS))


@pytest.mark.parametrize(("file", "case", "name", "check"), FOUND, ids=[label(*f) for f in FOUND])
def test_vectors(file: str, case: dict, name: str, check: Check | None) -> None:
    try:
        if check is None:
            raise Unanswered("its keys")
        check(case, name)
    except Unanswered as unanswered:
        pytest.skip(f"{label(file, case, name, check)}: nothing here answers to {unanswered}")


def test_every_file_has_cases() -> None:
    assert {file for file, *_ in FOUND} == {path.stem for path in VECTORS.glob("*.json")}
    assert any(check for *_, check in FOUND), f"nothing to check in {VECTORS}"


def test_the_shipped_cases_are_checked() -> None:
    assert {case["name"] for _, case, _, check in found(SHIPPED) if not check} == UNANSWERED
