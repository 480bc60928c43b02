"""Text on disk, one row at a time: from files, folders and globs to dictionaries, in constant memory.

How files become rows is told in formats.py. What a row means is told by its keys alone (`kind_of`): the files that
MiniMind's users have are read unchanged.
"""
from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

from mindseed.base.errors import UserError
from mindseed.data.formats import FORMATS, BadRow, check, json_type, parse, payloads, suffix_of

ACCEPTED = ('{"text"}, {"conversations": [...]}, {"messages": [...]}, {"instruction", "input", "output"}, '
            '{"question", "answer"}, {"chosen", "rejected"}, '
            '{"prompt", "completion", "label"} or {"prompt", "steps", "labels"}')


@dataclass(frozen=True, slots=True)
class Row:
    """A parsed row and where it stands: `line` counts from 1 (for parquet: the row's number)."""

    file: str
    line: int
    row: dict[str, Any]

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


def read_rows(paths: Iterable[str | Path], *, bad: Callable[[str, int, str], None] | None = None) -> Iterator[Row]:
    """Every row of the files that `paths` name, in a fixed order, holding one row at a time.

    A bad row is given to `bad(file, line, reason)` and skipped; without `bad` it is a UserError.
    """
    for path in expand(paths):
        check(path)
        for line, payload in payloads(path):
            try:
                row = Row(str(path), line, parse(path, payload))
                kind_of(row.row)
            except BadRow as reason:
                if bad is None:
                    raise UserError(f"{path}:{line}: {reason}") from None
                bad(str(path), line, str(reason))
            else:
                yield row


# ---------------------------------------------------------------------------------------------- what a row means

def kind_of(row: dict[str, Any]) -> str:
    """"preference", "unpaired" (an answer judged by itself), "steps" (a chain of them, each judged), "chat" or "text",
    by the keys of the row that are not null; raises BadRow with the keys found if it is none.

    The narrower schema wins: Alpaca's own files also carry the whole prompt under "text".
    """
    keys = {key for key, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= keys:
        return "preference"
    if {"prompt", "completion", "label"} <= keys:
        return "unpaired"
    if "labels" in keys and {"steps", "completions"} & keys:
        return "steps"
    if {"conversations", "messages"} & keys or {"instruction", "output"} <= keys:
        return "chat"
    if {"question", "answer"} <= keys and not {"text", "context", "choices"} & keys:
        return "chat"
    if "text" in row:
        if not isinstance(row["text"], str):
            raise BadRow(f'"text" is {json_type(row["text"])}, not a string')
        if not row["text"].strip():
            raise BadRow("the text is empty")
        return "text"
    found = ", ".join(f'"{key}"' for key in row) or "none"
    raise BadRow(f"unknown schema: the keys are {found}; accepted are {ACCEPTED}")


def row_texts(row: dict[str, Any]) -> Iterator[str]:
    """Every natural text inside a row, for training a tokenizer: contents, reasoning, chosen and rejected answers."""
    for key in ("text", "prompt", "instruction", "input", "output", "conversations", "messages", "chosen", "rejected",
                "completion", "completions", "steps", "question", "answer"):
        yield from _texts(row.get(key))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if value:
            yield value
    elif isinstance(value, dict):
        for key in ("content", "reasoning_content"):
            yield from _texts(value.get(key))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


# -------------------------------------------------------------------------------------------------- which files

def expand(paths: Iterable[str | Path]) -> list[Path]:
    """The files that files, folders and globs name: each once, sorted by path, so that the order never depends on
    the file system. Of a folder only the kinds that can be read are taken (hidden files never)."""
    found: dict[Path, Path] = {}
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        path = Path(path)
        if path.is_dir():
            files = [p for p in path.rglob("*") if p.is_file() and suffix_of(p)
                     and not any(part.startswith(".") for part in p.relative_to(path).parts)]
            if not files:
                raise UserError(f"{path} holds no file of a known kind ({', '.join(FORMATS)})")
        elif path.is_file():
            files = [path]
        else:
            files = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
            if not files:
                raise UserError(f"no file matches {path}" if glob.has_magic(str(path)) else f"{path} does not exist")
        for file in files:
            found.setdefault(file.resolve(), file)
    if not found:
        raise UserError("no data files were named")
    return sorted(found.values(), key=str)
