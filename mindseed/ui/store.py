"""Conversations, kept across restarts: one SQLite file.

A conversation is a tree. Every message knows the one it follows, and the conversation knows its `leaf`, the message
that it ends with; what is shown and sent is the path from the root to the leaf. So asking again, or editing what was
asked, takes nothing away: the new message is a sibling of the old one, and `choose` goes back to it.

Every call opens the file anew, which costs less than a millisecond and lets the studio's threads, or two studios, do
without a lock of ours.
"""
from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

from mindseed.base.errors import UserError
from mindseed.base.files import make_folder

VERSION = 2
TABLES = {                                        # autoincrement: the id of what was deleted is never given again
    "conversation": "id integer primary key autoincrement, title text not null, updated real not null, leaf integer, "
                    "settings text not null",
    "message": "id integer primary key autoincrement, conversation integer not null references conversation "
               "on delete cascade, parent integer references message on delete cascade, message text not null, "
               "about text not null",
    "setting": "name text primary key, value text not null"}
UNFINISHED = ("stopped", "broken", "length", "context")           # how an answer ends that is only half of one


@dataclass(frozen=True, kw_only=True)
class Conversation:
    id: int
    title: str
    updated: float                                # seconds since 1970
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A message where it stands: `versions` are the ids of its siblings and its own, the oldest first."""

    id: int
    parent: int | None
    message: dict[str, Any]                       # role, content, reasoning_content, tool_calls
    about: dict[str, Any] = field(default_factory=dict)        # model, tokens, seconds ...
    versions: tuple[int, ...] = ()

    @property
    def role(self) -> str:
        return self.message["role"]


class Gone(UserError):
    """The conversation, or the message, was deleted meanwhile."""


class Store:
    def __init__(self, folder: Path | str) -> None:
        self.database = Path(folder) / "studio.sqlite3"
        with self.open():                         # a place that cannot be used is told of at once
            pass

    @contextlib.contextmanager
    def open(self) -> Iterator[sqlite3.Connection]:
        """A connection whose changes are kept if the block ends well, all or none."""
        make_folder(self.database.parent)
        try:
            with contextlib.closing(sqlite3.connect(self.database, timeout=10)) as file:
                self.prepare(file)
                file.execute("pragma foreign_keys = on")
                with file:
                    yield file
        except sqlite3.IntegrityError:
            raise Gone("the conversation was deleted meanwhile") from None
        except sqlite3.Error as error:
            raise UserError(f"{self.database} cannot be used ({error}); mend it, or name another folder with "
                            "--data") from None

    def prepare(self, file: sqlite3.Connection) -> None:
        """Make the tables of a new file, or make those of an older version anew; two processes may try at once."""
        def version() -> int:
            return file.execute("pragma user_version").fetchone()[0]

        if version() > VERSION:
            raise UserError(f"{self.database} was written by a newer mindseed; use that one, or another --data folder")
        if version() == VERSION:
            return
        file.execute("begin immediate")
        with file:
            before = version()                    # perhaps the other one has done it
            for name, columns in TABLES.items() if before < VERSION else ():
                file.execute(f"create table new_{name} ({columns})")
                if before:
                    file.execute(f"insert into new_{name} select * from {name}")
                    file.execute(f"drop table {name}")
                file.execute(f"alter table new_{name} rename to {name}")
            if before < VERSION:
                file.execute("create index message_place on message (conversation, parent)")
                file.execute(f"pragma user_version = {VERSION}")

    # ------------------------------------------------------------------------------------------------- conversations

    def conversations(self) -> list[Conversation]:
        """All of them, the one used last first."""
        with self.open() as file:
            rows = file.execute("select id, title, updated, settings from conversation order by updated desc, id desc")
            return [Conversation(id=i, title=title, updated=at, settings=json.loads(s)) for i, title, at, s in rows]

    def conversation(self, id: int) -> Conversation | None:
        return next((c for c in self.conversations() if c.id == id), None)

    def create(self, title: str, settings: dict[str, Any]) -> int:
        with self.open() as file:
            return file.execute("insert into conversation (title, updated, settings) values (?, ?, ?)",
                                (title, time.time(), spell(settings))).lastrowid

    def rename(self, conversation: int, title: str) -> None:
        with self.open() as file:
            file.execute("update conversation set title = ? where id = ?", (title, conversation))

    def configure(self, conversation: int, settings: dict[str, Any]) -> None:
        with self.open() as file:
            file.execute("update conversation set settings = ? where id = ?", (spell(settings), conversation))

    def delete(self, conversation: int) -> None:
        with self.open() as file:
            file.execute("delete from conversation where id = ?", (conversation,))

    # ------------------------------------------------------------------------------------------------------ messages

    def add(self, conversation: int, message: dict[str, Any], *, parent: int | None,
            about: dict[str, Any] | None = None) -> int:
        """Put a message after `parent` (None: at the beginning); the conversation ends with it from now on."""
        with self.open() as file:
            id = file.execute("insert into message (conversation, parent, message, about) values (?, ?, ?, ?)",
                              (conversation, parent, spell(message), spell(about or {}))).lastrowid
            file.execute("update conversation set leaf = ?, updated = ? where id = ?", (id, time.time(), conversation))
            return id

    def path(self, conversation: int) -> list[Entry]:
        """The messages from the first to the leaf."""
        with self.open() as file:
            rows = file.execute("select id, parent, message, about from message where conversation = ? order by id",
                                (conversation,)).fetchall()
            found = file.execute("select leaf from conversation where id = ?", (conversation,)).fetchone()
        by_id = {row[0]: row for row in rows}
        siblings: dict[int | None, list[int]] = {}
        for id, parent, *_ in rows:
            siblings.setdefault(parent, []).append(id)
        entries, at = [], found[0] if found else None
        while at is not None:
            id, parent, message, about = by_id[at]
            entries.append(Entry(id=id, parent=parent, message=json.loads(message), about=json.loads(about),
                                 versions=tuple(siblings[parent])))
            at = parent
        return entries[::-1]

    def count_after(self, message: int) -> int:
        """How many messages follow this one directly: versions of what comes next."""
        with self.open() as file:
            return file.execute("select count(*) from message where parent = ?", (message,)).fetchone()[0]

    def end_at(self, conversation: int, message: int | None) -> None:
        """Let the conversation end with this message (None: before the first), for now."""
        with self.open() as file:
            file.execute("update conversation set leaf = ? where id = ?", (message, conversation))

    def choose(self, conversation: int, message: int) -> None:
        """Show this version of a message, and of all that follows it the version written last."""
        with self.open() as file:
            at = message
            while after := file.execute("select max(id) from message where parent = ?", (at,)).fetchone()[0]:
                at = after
        self.end_at(conversation, at)

    # ------------------------------------------------------------------------------------------------------ settings

    def get(self, name: str, default: Any = None) -> Any:
        with self.open() as file:
            row = file.execute("select value from setting where name = ?", (name,)).fetchone()
        return default if row is None else json.loads(row[0])

    def put(self, name: str, value: Any) -> None:
        with self.open() as file:
            file.execute("insert or replace into setting values (?, ?)", (name, spell(value)))


def spell(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# -------------------------------------------------------------------------------------------------------------- export

def as_row(entries: list[Entry], *, system: str = "", tools: list[dict] | None = None) -> dict[str, Any] | None:
    """A conversation as a row that `mindseed train` reads; None if no answer is in it. A question without an answer,
    and what the assistant left empty, stay out; so does an answer that is only half there, with its question: a model
    would learn from it to break off."""
    messages: list[dict[str, Any]] = []
    asked = 0                                     # where the last question stands
    half = False                                  # its answer broke off: nothing more is taken up to the next question
    for entry in entries:
        if entry.role == "user":
            asked, half = len(messages), False
        if entry.role == "assistant" and entry.about.get("finish") in UNFINISHED:
            half = True
            del messages[asked:]
        if not half and (entry.role != "assistant" or any(entry.message.get(k) for k in ("content", "tool_calls"))):
            messages.append(dict(entry.message))
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        return None
    head = [{"role": "system", "content": system}] if system else []
    return {"messages": [*head, *messages]} | ({"tools": tools} if tools else {})


def as_markdown(title: str, entries: list[Entry], *, system: str = "") -> str:
    parts = [f"# {title}", *([f"> {line}" for line in system.splitlines()] if system else [])]
    names = {"user": "User", "assistant": "Assistant", "tool": "Tool"}
    last = None
    for entry in entries:
        message = entry.message
        if entry.role in ("user", "assistant") and entry.role != last:
            model = f" ({entry.about['model']})" if entry.about.get("model") else ""
            parts.append(f"## {names[entry.role]}{model}")
        last = "assistant" if entry.role == "tool" else entry.role
        if message.get("reasoning_content"):
            parts.append("\n".join(f"> {line}" for line in message["reasoning_content"].splitlines()))
        if entry.role == "tool":
            parts.append(f"Result: `{message['content']}`")
        elif message.get("content"):
            parts.append(message["content"])
        parts += [f"Call: `{call['name']}({spell(call['arguments'])})`" for call in message.get("tool_calls") or []]
    return "\n\n".join(parts) + "\n"
