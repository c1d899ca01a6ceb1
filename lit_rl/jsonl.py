"""Append-only files of JSON lines, which a resumed run continues exactly. Standard library only."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any


def append(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One line a record: all of them or, when OSError is raised, none. A line that a crash cut short is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)
    data = text.encode("utf-8", "backslashreplace")  # half a surrogate pair becomes JSON's own escape of it
    with path.open("a+b", buffering=0) as file:
        end = file.tell()
        if end and file.seek(end - 1) >= 0 and file.read(1) != b"\n":
            data = b"\n" + data
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            with suppress(OSError):
                file.truncate(end)
            raise


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file, none when there is no file; a line that a crash cut short is left out."""
    records = []
    for line in (
        path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    ):  # not splitlines: texts hold U+2028
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def rewind(path: Path, step: int) -> None:
    """Drops the records of `step` and later, which a run that resumes at `step` writes again."""
    records = read(path)
    kept = [record for record in records if record.get("step") is None or record["step"] < step]
    if len(kept) < len(records):
        fresh = path.with_suffix(".tmp")
        fresh.unlink(missing_ok=True)
        append(fresh, kept)
        fresh.touch()
        os.replace(fresh, path)
