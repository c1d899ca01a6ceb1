"""Files of records: a run's own, of JSON lines, which are appended to and continued exactly; and those a user gives."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_rl.checks import ConfigurationError


def append(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One line a record: all of them or, when OSError is raised, none. A line that a crash cut short is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join(map(line, records))
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


def ends_with(path: Path, record: dict[str, Any]) -> bool:
    """Whether it is the last one of the file: a resumed run repeats what it was stopped at."""
    if not path.is_file():  # nor of a device, which has no end
        return False
    data = line(record)
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(data)))
        return file.read() == data


def line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=False, default=str) + "\n"
    return text.encode("utf-8", "backslashreplace")  # half a surrogate pair becomes JSON's own escape of it


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file, none when there is no file; a line that a crash cut short is left out."""
    return [record for _, record in _lines(path)]


def records(path: Path | str) -> Iterator[Any]:
    """Those of a file that a user gives, JSON lines or (if pyarrow is installed) Parquet; ConfigurationError names the line that
    is not JSON."""
    path = Path(path)
    if path.suffix != ".parquet":
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    try:
                        yield json.loads(text)
                    except ValueError as error:  # UnicodeDecodeError too
                        raise ConfigurationError(f"line {number} of {path} is not JSON: {error}") from error
        return
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigurationError(f"to read {path}, install pyarrow, or give it as JSON lines") from error
    for batch in ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


def rewind(path: Path, step: int) -> None:
    """Drops the records of `step` and later, which a run that resumes at `step` writes again, and lines cut short."""
    if not path.is_file():
        return
    kept = [line for line, record in _lines(path) if record.get("step") is None or record["step"] < step]
    text = "".join(line + "\n" for line in kept).encode()
    if text != path.read_bytes():
        fresh = path.with_suffix(".tmp")
        fresh.write_bytes(text)
        os.replace(fresh, path)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # not splitlines: texts hold U+2028
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            yield line, record
