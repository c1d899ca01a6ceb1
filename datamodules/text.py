"""Text: windows of tokens, from files of any size."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from glob import glob
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lit_rl import models
from lit_rl.checks import ConfigurationError, require
from lit_rl.task import Task

from .base import TaskData

SPLITS = "train", "validation", "test"
ABOUT = "about.json"
AT_ONCE = 1000
"""Documents that are tokenised together."""


class Text(TaskData):
    """Windows of text to learn with `Pretrain`: documents, each ended by the end-of-sequence token, stand one after another,
    and every token is predicted once an epoch. (So a window may hold several documents, which see each other.)

    The policy's own tokenizer makes the tokens, once, into a folder of memory-mapped files. A document's words alone decide
    which split it is in, so no held-out document is in training, not even as a copy.

    Args:
        files: Text files, .jsonl files with a "text" on each line, or patterns such as "corpus/**/*.txt".
        length: Tokens that a window predicts.
        separator: What stands between two documents of a text file, such as "\\n\\n"; None: a file is one.
        held_out: Share of the documents that are for validation, and as many again for the test.
        cache: Where folders of tokens are kept.
        shuffle, **kwargs: As in TaskData.
    """

    def __init__(
        self,
        files: list[str],
        length: int = 256,
        *,
        separator: str | None = None,
        held_out: float = 0.05,
        cache: str = "tokens",
        shuffle: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(shuffle=shuffle, **kwargs)
        require(length >= 1, "length", length, "at least 1")
        require(0 <= held_out < 0.5, "held_out", held_out, "a share of at least 0 and below one half")
        require(separator != "", "separator", repr(separator), "None or some characters")
        self.length, self.separator, self.held_out, self.cache = length, separator, held_out, Path(cache)
        self.files = [path for pattern in files for path in _files(pattern)]
        require(bool(self.files), "files", files, "one or more files")
        self._tokens: dict[str, Any] = {}

    # ---------------------------------------------------------------- from text to tokens, once

    def _policy(self) -> Any:
        policy = getattr(self.trainer, "lightning_module", None)
        if not getattr(policy, "reads_tokens", False):
            raise ConfigurationError(f"Text yields tokens, which Pretrain learns, and not {type(policy).__name__}")
        return policy

    def _folder(self) -> Path:
        """Named by all that decides what is in it."""
        tokenizer = self._policy().tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        how = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
        what = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in self.files]
        about = json.dumps([how, what, self.separator, self.held_out, self._policy().eos[:1]])
        return self.cache / blake2b(about.encode(), digest_size=8).hexdigest()

    def prepare_data(self) -> None:
        folder = self._folder()
        if (folder / ABOUT).is_file():
            return
        part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        part.mkdir(parents=True)
        try:
            self._write(part)
            os.replace(part, folder)
        except OSError:
            if not (folder / ABOUT).is_file():  # another process has not made it in the meantime
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _write(self, folder: Path) -> None:
        policy = self._policy()
        end = policy.eos[:1]
        dtype = np.dtype(np.uint16 if max(len(policy.tokenizer), *end, 0) <= 2**16 else np.uint32)
        about = {split: {"documents": 0, "tokens": 0} for split in SPLITS}
        files = {split: (folder / f"{split}.bin").open("wb") for split in SPLITS}
        documents = (text for path in self.files for text in _documents(path, self.separator) if text)
        try:
            while texts := list(islice(documents, AT_ONCE)):
                encoded = policy.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
                for text, ids in zip(texts, encoded, strict=True):
                    split = self._split(text)
                    files[split].write(np.array([*ids, *end], dtype=dtype).tobytes())
                    about[split]["documents"] += 1
                    about[split]["tokens"] += len(ids) + len(end)
        finally:
            for file in files.values():
                file.close()
        (folder / ABOUT).write_text(json.dumps({"dtype": dtype.name, **about}, indent=1))

    def _split(self, text: str) -> str:
        place = int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big") / 2**64
        return SPLITS[1 if place < self.held_out else 2 if place < 2 * self.held_out else 0]

    # ---------------------------------------------------------------- from tokens to windows

    def setup(self, stage: str) -> None:
        context = models.context_length(self._policy().model)
        require(self.length <= context, "length", self.length, f"at most the model's context of {context}")
        folder = self._folder()
        self.about = json.loads((folder / ABOUT).read_text())
        for split in SPLITS:
            some = self.about[split]["tokens"] > 0  # an empty file cannot be mapped
            file, dtype = folder / f"{split}.bin", np.dtype(self.about["dtype"])
            self._tokens[split] = np.memmap(file, dtype, mode="r") if some else np.empty(0, dtype)

    def tasks(self, split: str) -> Any:
        windows = _Windows(split, self._tokens[split], self.length)
        ranks = self.trainer.world_size if self.trainer else 1
        fewest = self.batch_size * ranks if split == "train" else 1
        if len(windows) < fewest:
            raise ConfigurationError(
                f"the text has {self.about[split]['tokens']} tokens in {self.about[split]['documents']} documents for {split},"
                f" which are {len(windows)} windows of {self.length}: {fewest} are needed. Give more text, a shorter length, a"
                " smaller batch_size, or, where documents are few, a `separator` and a larger `held_out`"
            )
        return windows


class _Windows:
    def __init__(self, split: str, tokens: Any, length: int) -> None:
        self.split, self.tokens, self.length = split, tokens, length

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1) // self.length

    def __getitem__(self, index: int) -> Task:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.length
        window = self.tokens[start : start + self.length + 1].tolist()  # one more, from which the first is predicted
        return Task("", id=f"text/{self.split}/{index}", meta={"tokens": window})


def _files(pattern: str) -> list[Path]:
    found = sorted(Path(name) for name in glob(os.path.expanduser(pattern), recursive=True) if Path(name).is_file())
    if not found:
        raise ConfigurationError(f"files has {pattern!r}: there is no such file")
    return found


def _documents(path: Path, separator: str | None) -> Iterator[str]:
    try:
        if path.suffix != ".jsonl":
            text = path.read_text(encoding="utf-8")
            yield from [text] if separator is None else text.split(separator)
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _text_of(path, number, line)
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not text in UTF-8: {error}") from error


def _text_of(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"line {number} of {path} is not JSON: {error}") from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ConfigurationError(f'line {number} of {path} has no "text"')
    return text
