"""A file of lines that grows for hours and may be killed at any moment: beside it stands how far it has come.

Results are appended in their order, each with all its lines (or none) in one go; then a line goes into the journal,
`.NAME.journal`: how many results there are, where the file ends, and the figures so far. After a kill the file is cut
where its journal's last whole line says, so every result is there once or not at all, and what follows is what would
have followed. The journal's first line says what the file is made of; with something else, going on is refused.
Whoever has finished removes the journal.
"""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mindseed.base.errors import UserError
from mindseed.base.files import make_folder, misfit, parse_json

ENTRY = {"done": int, "bytes": int, "figures": {str: Any}}


class Journal:
    """Opens both files, `path` new or as far as it has come. `about` is plain JSON. `done` results are there, with
    `figures` as of the last one."""

    def __init__(self, path: Path | str, about: dict[str, Any]) -> None:
        self.path = Path(path)
        self.beside = beside(self.path)
        self.done, self.figures, end = 0, {}, 0
        make_folder(self.path.parent)
        if self.beside.exists():
            lines = self.beside.read_bytes().split(b"\n")[:-1]                    # the last may be half a line
            header = read_line(self.beside, lines[0], {"about": {str: Any}}) if lines else {"about": about}
            if changed := changes(header["about"], about):
                raise UserError(f"{self.path} was begun otherwise ({'; '.join(changed)}); give the options it was "
                                "begun with to go on, choose another place, or start anew with --overwrite")
            size = self.path.stat().st_size if self.path.exists() else 0
            entries = [read_line(self.beside, line, ENTRY) for line in lines[1:]]
            while entries and entries[-1]["bytes"] > size:                        # the disk has lost more than that
                entries.pop()
            if entries:
                self.done, end, self.figures = (entries[-1][key] for key in ("done", "bytes", "figures"))
            kept = [{"about": about}, *entries]
        else:
            kept = [{"about": about}]
        self.notes, self.file, self.size = open(self.beside, "wb"), open(self.path, "ab"), end
        self.file.truncate(end)
        for one in kept:
            self.note(one)

    def add(self, lines: list[str], figures: dict[str, Any]) -> None:
        """The next result. UserError if the disk is full."""
        data = "".join(line + "\n" for line in lines).encode()
        try:
            self.file.write(data)
            self.file.flush()
            self.note({"done": self.done + 1, "bytes": self.size + len(data), "figures": figures})
        except OSError as error:
            raise UserError(f"could not write {self.path}: {error.strerror}; free some space, and give the same "
                            "command to go on") from None
        self.done, self.size, self.figures = self.done + 1, self.size + len(data), figures

    def note(self, value: dict[str, Any]) -> None:
        self.notes.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        self.notes.flush()

    def close(self) -> None:
        os.fsync(self.file.fileno())
        self.file.close()
        self.notes.close()


def beside(path: Path) -> Path:
    """Where the journal of a file lies."""
    return path.with_name(f".{path.name}.journal")


def read_line(path: Path, line: bytes, shape: Any) -> Any:
    try:
        value = parse_json(line)
        problem = misfit(value, shape)
    except ValueError as error:
        problem = str(error)
    if problem:
        raise UserError(f"{path} is damaged ({problem}); start anew with --overwrite")
    return value


def changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`name was this, is that` for all that differs."""
    plain = parse_json(json.dumps(now))
    return [f"{key} was {short(then.get(key))}, is {short(plain.get(key))}" for key in {**then, **plain}
            if then.get(key) != plain.get(key)]


def short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
