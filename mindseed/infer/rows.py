"""One answer in the making, from the ids that are chosen to the text that may be shown.

Text comes in pieces that are no characters yet, and its end may be the beginning of a stop string; both are held back
until it is known. What was shown is never taken back.
"""
from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from mindseed.base.errors import UserError
from mindseed.core import Tokenizer
from mindseed.tokenizers.base import EOS, PAD, Stream, document_marks, with_signs, without_signs

Finish = Literal["stop", "length", "context"]     # a stop id or string; max_new reached; no room left in the context


class TooLong(UserError):
    """A prompt that leaves no room for an answer."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token of one answer. `text` is what may be shown by now; it never contains a stop id or string. `signed` is
    the same with special tokens as signs (tokenizers/base.py), for who looks for them.

    `logp` is the log-probability under the model itself, `sampled_logp` that under the distribution it was drawn from
    (0 if that was the likeliest token). The rest is there if it was asked for, `prompt_logps` with the first token.
    """

    row: int
    id: int
    text: str
    logp: float | None
    finish: Finish | None
    signed: str = ""
    sampled_logp: float | None = None
    top: tuple[tuple[int, float], ...] = ()       # the likeliest ids and their log-probabilities under the model
    prompt_logps: tuple[float | None, ...] | None = None      # nothing is said of the first token
    prompt_top: tuple[tuple[tuple[int, float], ...], ...] = ()      # what would have been likeliest there
    cached: int = 0                               # with the first token: how much of the prompt was in the cache


@dataclass(kw_only=True)
class Completion:
    """What a prompt was answered with. `ids` are all that the model chose, a final stop id included; `text` is without
    it and without the stop string. `logps` are the model's own log-probabilities, before temperature and filters;
    `sampled_logps` those of the distribution that was drawn from."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    logps: list[float] = field(default_factory=list)
    sampled_logps: list[float] = field(default_factory=list)
    prompt_logps: list[float | None] = field(default_factory=list)
    finish: Finish = "length"

    def add(self, token: Token) -> None:
        self.ids.append(token.id)
        self.text += token.text
        if token.logp is not None:
            self.logps.append(token.logp)
        if token.sampled_logp is not None:
            self.sampled_logps.append(token.sampled_logp)
        if token.prompt_logps is not None:
            self.prompt_logps = list(token.prompt_logps)
        if token.finish is not None:
            self.finish = token.finish


class Row:
    """One answer in the making: its text so far, and whether it is finished."""

    def __init__(self, index: int, tokenizer: Tokenizer | None, stop: Collection[str], stop_ids: frozenset[int],
                 room: int, max_new: int) -> None:
        self.index, self.stop_ids, self.room, self.max_new = index, stop_ids, room, max_new
        self.text = None if tokenizer is None else Stream(tokenizer, signs=True)
        self.stop = [s for s in stop if s]
        if tokenizer is not None:
            self.stop = [*dict.fromkeys([*self.stop, *(with_signs(s, tokenizer.specials) for s in self.stop)])]
        self.begun = [0] * len(self.stop)         # of each, how many characters the text ends in
        self.held = ""                            # text that may yet turn out to begin a stop string
        self.count = 0
        self.finish: Finish | None = None

    def push(self, id: int, logp: float | None, *, end: bool = False, **more: object) -> Token:
        """The next token; `end` if nothing may follow it. `more` are further fields of the Token."""
        self.count += 1
        if id in self.stop_ids:
            text, self.finish = self.flush(), "stop"
        else:
            text, stopped = self.release(self.text.push(id)) if self.text else ("", False)
            if stopped:
                self.finish = "stop"
            elif end:
                text, self.finish = text + self.flush(), "stop"
            elif self.count >= min(self.room, self.max_new):
                self.finish = "length" if self.count >= self.max_new else "context"
                text += self.flush()
        return Token(row=self.index, id=id, text=without_signs(text), signed=text, logp=logp, finish=self.finish,
                     **more)

    def flush(self) -> str:
        """All that was held back, when no more text will come."""
        text, stopped = self.release(self.text.close()) if self.text else ("", False)
        held, self.held = "" if stopped else self.held, ""
        return text + held

    def release(self, text: str) -> tuple[str, bool]:
        """(what may be shown, whether a stop string is complete): holds back an end that could begin a stop string."""
        before, text = len(self.held), self.held + text
        ends = [self.search(i, text[before:]) for i in range(len(self.stop))]
        found = [before + end - len(stop) for end, stop in zip(ends, self.stop) if end]
        if found:
            self.held = ""
            return text[:min(found)], True
        keep = max(self.begun, default=0)
        self.held = text[len(text) - keep:]
        return text[:len(text) - keep], False

    def search(self, i: int, text: str) -> int:
        """Where stop string i ends in the text that is new, 0 if it does not (Knuth, Morris and Pratt, 1977: every
        character is looked at once, whatever the string)."""
        stop, back, matched = self.stop[i], fallbacks(self.stop[i]), self.begun[i]
        for at, c in enumerate(text):
            while matched and stop[matched] != c:
                matched = back[matched - 1]
            matched += stop[matched] == c
            if matched == len(stop):
                return at + 1
        self.begun[i] = matched
        return 0


@lru_cache(1024)
def fallbacks(stop: str) -> list[int]:
    """For every beginning of a string, the length of the longest shorter one that it ends in."""
    found = [0] * len(stop)
    for at in range(1, len(stop)):
        matched = found[at - 1]
        while matched and stop[at] != stop[matched]:
            matched = found[matched - 1]
        found[at] = matched + (stop[at] == stop[matched])
    return found


def ends_of(tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The ids that end an answer if nobody says which: a tokenizer's end of text and of turn."""
    known = {} if tokenizer is None else tokenizer.specials
    return tuple(dict.fromkeys(known[mark] for mark in (EOS, PAD, *(document_marks(known) or ())[1:]) if mark in known))


def check_prompt(prompt: list[int], limit: int, rows: int, name: str = "the prompt", *,
                 gaps: Collection[int] = ()) -> None:
    """UserError for ids that a model with this context and this many embeddings cannot go on from."""
    if not prompt:
        raise UserError(f"{name} is empty; a text begins with the tokenizer's begin token")
    if len(prompt) >= limit:
        raise TooLong(f"{name} has {len(prompt)} tokens and the model's context is {limit}, which leaves no room for "
                      "an answer; shorten it")
    if not 0 <= min(prompt) <= max(prompt) < rows:
        raise UserError(f"{name} has the id {max(prompt, key=lambda id: abs(id - rows / 2))}; the model's vocabulary "
                        f"is 0 to {rows - 1}: it was encoded with another tokenizer")
    if gaps and (bad := [id for id in prompt if id in gaps]):
        raise UserError(f"{name} has the id {bad[0]}, which is no token of the model's vocabulary")
