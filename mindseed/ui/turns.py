"""Turns of a conversation on the page: as they were kept, and as they are being written.

A turn of the assistant may be several messages, when it calls tools in between; they stand together as one. Thoughts
are folded, and every call is one line, which opens to what was sent and what came back.
"""
from __future__ import annotations

import json
import time
from typing import Any

import streamlit as st

from mindseed.ui import look
from mindseed.ui.store import Entry
from mindseed.ui.talk import Event, Message, parsed
from mindseed.tasks.tools import TOOLS
from mindseed.ui.words import gettext as _

EVERY_S = 0.05                                    # between two drawings of a text that is growing
THOUGHTS, CALL = ":material/psychology:", ":material/build:"


def grouped(entries: list[Entry]) -> list[list[Entry]]:
    """The path cut into turns: each question alone, and what follows it together."""
    turns: list[list[Entry]] = []
    for entry in entries:
        if entry.role == "user" or not turns or turns[-1][0].role == "user":
            turns.append([])
        turns[-1].append(entry)
    return turns


def show_answer(turn: list[Entry]) -> None:
    """A kept turn of the assistant."""
    results = [entry.message["content"] for entry in turn if entry.role == "tool"]
    for entry in turn:
        if entry.role == "assistant":
            show_thoughts(entry.message.get("reasoning_content"))
            if entry.message.get("content"):
                st.markdown(look.shown(entry.message["content"]))
            for call in entry.message.get("tool_calls") or []:
                show_call(call["name"], call["arguments"], results.pop(0) if results else None)


def show_thoughts(text: str | None) -> None:
    if text and text.strip():
        with st.expander(_("Thoughts"), icon=THOUGHTS, type="compact"):
            st.markdown(look.shown(text.strip()).replace("\n", "  \n"))


def show_call(name: str, arguments: dict[str, Any], result: str | None) -> None:
    icon = f":material/{TOOLS[name].icon}:" if name in TOOLS else CALL
    with st.expander(call_line(name, arguments, result), icon=icon, type="compact"):
        call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        st.code(call, language="json", wrap_lines=True)
        if result is not None:
            st.code(result, language="json", wrap_lines=True)


def call_line(name: str, arguments: dict[str, Any], result: str | None) -> str:
    """`calculate` 27+45 → 72"""
    given = ", ".join(brief(value) for value in arguments.values())
    line = f"**{look.plain(name)}** {code(given)}".strip()
    if result is None:
        return line
    value = parsed(result)
    if "error" in value:
        return f"{line} → :red[{_('error')}]"
    return f"{line} → {code(', '.join(brief(v) for v in value.values()))}"


def brief(value: Any, limit: int = 60) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[:limit - 1] + "…"


def code(text: str) -> str:
    """Inline code in Markdown, whatever is in it."""
    return f"`{' '.join(text.replace('`', 'ˋ').split())}`" if text.strip() else ""


def about_line(turn: list[Entry]) -> str:
    """Who wrote a turn, how much and how fast."""
    abouts = [entry.about for entry in turn if entry.role == "assistant"]
    last, tokens = abouts[-1], sum(about.get("tokens") or 0 for about in abouts)
    return " · ".join(filter(None, [
        last.get("model"), _("{n} tokens", n=tokens) if tokens else None,
        _("{n} tokens/s", n=f"{last['tokens_per_s']:.0f}") if last.get("tokens_per_s") else None,
        {"length": _("cut at the limit"), "context": _("the context is full"), "stopped": _("stopped"),
         "broken": _("broken off")}.get(last.get("finish"))]))


class Live:
    """A turn that is being written, in the container in use when it is made."""

    def __init__(self) -> None:
        self.place = st.container()
        with self.place:
            self.waiting = st.empty()
        self.since: float | None = time.monotonic()           # None: something has come
        self.wait()
        self.begin()

    def begin(self) -> None:
        """A new message of the turn."""
        self.texts = {"reasoning": "", "content": ""}
        self.slots: dict[str, Any] = {}
        self.calls: dict[int, tuple[Any, list[str]]] = {}
        self.drawn = 0.0

    def wait(self) -> None:
        """Nothing new has come. (Every drawing is also a place where Streamlit can interrupt.)"""
        if self.since is None:
            self.waiting.empty()
            return
        seconds = int(time.monotonic() - self.since)
        self.waiting.html(f'<span class="seed-soft">{_("reading ...")}{f" {seconds} s" if seconds else ""}</span>')

    def push(self, event: Event) -> None:
        if self.since is not None:
            self.since = None
            self.waiting.empty()
        if event.kind in self.texts:
            self.texts[event.kind] += event.text
            self.draw(event.kind, last=False)
        elif event.kind in ("call", "arguments"):
            self.flush()
            if event.index not in self.calls:
                self.calls[event.index] = self.place.empty(), ["", ""]
            slot, said = self.calls[event.index]
            said[event.kind == "arguments"] += event.text
            slot.markdown(f"{CALL} **{look.plain(said[0])}** {code(brief(said[1]))}")
        elif event.kind == "message":
            self.flush()
            for i, call in enumerate(event.message.get("tool_calls") or []):
                slot = self.calls[i][0] if i in self.calls else self.place.empty()
                with slot.container():
                    show_call(call["name"], call["arguments"], event.results[i]["content"])
            self.begin()
        elif event.kind == "note":
            self.place.caption(_(event.text))

    def draw(self, kind: str, *, last: bool) -> None:
        """Show what has come of one text, unless that was done a moment ago."""
        if not self.texts[kind].strip() or not last and time.monotonic() - self.drawn < EVERY_S:
            return
        if kind not in self.slots:
            with self.place:
                if kind == "reasoning":
                    with st.expander(_("Thoughts"), icon=THOUGHTS, type="compact"):
                        self.slots[kind] = st.empty()
                else:
                    self.slots[kind] = st.empty()
        text = look.shown(self.texts[kind].strip())
        self.slots[kind].markdown(text.replace("\n", "  \n") if kind == "reasoning" else text)
        self.drawn = time.monotonic()

    def flush(self) -> None:
        for kind in self.texts:
            self.draw(kind, last=True)

    def partial(self) -> Message | None:
        """What the message has come to, if it is not over; calls that are not complete are left out."""
        if not any(self.texts.values()):
            return None
        message: Message = {"role": "assistant", "content": self.texts["content"]}
        return message | ({"reasoning_content": self.texts["reasoning"]} if self.texts["reasoning"] else {})
