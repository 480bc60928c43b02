"""An answer taken apart while it is being written: reasoning, content and tool calls, each as early as it is certain.

`chat.parse_answer` reads a whole answer. Whoever shows one as it comes must decide before the end, and what was shown
can't be taken back. So text is held while it could still become something else, and no longer: the beginning of a tag
("<tool_ca"), the line end that would belong to a call, white space that a thought would end in, and a call until it
is whole, for one that breaks off is content. Whether it may still become whole is known at every character: `Scan`
follows JSON with a stack, as Python's own parser would read it.

The pieces, joined, are what parse_answer says of the whole text, with one exception that no stream could keep: there
a </think> without a <think> makes reasoning of all that stands before it. Here it is content, unless the prompt had
opened the block (`thinking`).

Where the tokenizer has the tags as special tokens, only these are tags, and text that spells one is text: an answer
that quotes a web page must not call a tool because of what stands there. A special token comes as its sign
(base.SIGNS).
"""
from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Literal

from mindseed.tokenizers.base import EOS, SIGNS, without_signs
from mindseed.tokenizers.chat import read_call, sayable, to_json

THINK, THINK_END, CALL, CALL_END = "<think>", "</think>", "<tool_call>", "</tool_call>"
SPACE = " \t\n\r"                                 # of JSON
NAME = re.compile(r'\{[ \t\n\r]*"name"[ \t\n\r]*:[ \t\n\r]*("(?:[^"\\]|\\.)*")')
ARGUMENTS = re.compile(NAME.pattern + r'[ \t\n\r]*,[ \t\n\r]*"arguments"[ \t\n\r]*:[ \t\n\r]*')


@dataclass(frozen=True, slots=True)
class Piece:
    """Some more text of one kind, never empty but for a call's name. A "call" brings the name, and `index` counts the
    calls; its "arguments" follow, as JSON."""

    kind: Literal["reasoning", "content", "call", "arguments"]
    text: str
    index: int = 0


class Reply:
    """One answer. `thinking`: the prompt has opened a think block. `tools` False: <tool_call> is ordinary text.

    `certain`: a grammar guarantees that calls are valid, so the name is told at once and the arguments as they are
    written; otherwise both are told when the call is whole. (Where the guarantee is broken, arguments may stay
    unfinished, and what follows them is content.) `signs`: the tags that are special tokens, and come as signs.
    """

    def __init__(self, *, thinking: bool = False, tools: bool = True, certain: bool = False,
                 signs: Collection[str] = ()) -> None:
        self.tools, self.certain = tools, certain
        self.think, self.think_end, self.call, self.call_end, self.end = (
            SIGNS[tag] if tag in signs else tag for tag in (THINK, THINK_END, CALL, CALL_END, EOS))
        self._call_start = re.compile(rf"\n?{self.call}\s*")
        self._call_stop = re.compile(rf"\s*{self.call_end}")
        self._step = self._thought if thinking else self._start
        self._tail = ""                           # may become the end marker
        self._held = ""                           # not decided yet
        self._fresh = True                        # white space is dropped where a thought or the content begins
        self._over = False
        self._index = 0
        self._open = Open()                       # the call that is being read
        self._pieces: list[Piece] = []

    def push(self, text: str) -> list[Piece]:
        """What more of the answer is certain with this text. Reading stops at <|im_end|>."""
        return [] if self._over else self._read(self._tail + text, final=False)

    def close(self) -> list[Piece]:
        """The answer has ended: what was held back."""
        return [] if self._over else self._read(self._tail, final=True)

    def _read(self, text: str, *, final: bool) -> list[Piece]:
        ready, end, _ = text.partition(self.end)
        self._over = final = final or bool(end)
        self._tail = "" if final else ready[len(ready) - partial(ready, self.end):]
        self._held += ready.removesuffix(self._tail)
        while self._step(final):
            pass
        pieces, self._pieces = self._pieces, []
        return pieces

    def _tell(self, kind: str, text: str) -> None:
        text = without_signs(text)
        index = self._index if kind in ("call", "arguments") else 0
        last = self._pieces[-1] if self._pieces else None
        if last and kind != "call" and (last.kind, last.index) == (kind, index):
            self._pieces[-1] = replace(last, text=last.text + text)
        elif text or kind == "call":
            self._pieces.append(Piece(kind, text, index))

    # Each step looks at what is held and tells what it can; True: another step is to go on with the rest.

    def _start(self, final: bool) -> bool:
        self._held = self._held.lstrip()
        if not final and self.think.startswith(self._held) and self._held != self.think:
            return False
        opened = self._held.startswith(self.think)
        self._held = self._held.removeprefix(self.think)
        self._step = self._thought if opened else self._content
        return True

    def _thought(self, final: bool) -> bool:
        if self._fresh:
            self._held = self._held.lstrip()
        inside, end, rest = self._held.partition(self.think_end)
        if not end and not final:
            inside = inside[:len(inside) - partial(inside, self.think_end)]
        text = inside.rstrip()
        self._fresh = self._fresh and not text
        self._tell("reasoning", text)
        self._held = rest if end else "" if final else self._held[len(text):]
        if end:
            self._step, self._fresh = self._content, True
        return bool(end)

    def _content(self, final: bool) -> bool:
        if self._fresh:
            self._held = self._held.lstrip()
            self._fresh = not self._held
        at = self._held.find(self.call) if self.tools else -1
        found = at >= 0
        if found:
            at -= self._held[:at].endswith("\n")
            self._step, self._open = self._call, Open()
        else:
            kept = max(partial(self._held, self.call), partial(self._held, "\n" + self.call))
            at = len(self._held) - (kept if self.tools and not final else 0)
        self._tell("content", self._held[:at])
        self._held = self._held[at:]
        return found

    def _call(self, final: bool) -> bool:
        """What is held begins with the tag of a call."""
        held, call = self._held, self._open
        begin = self._call_start.match(held).end()
        call.at = max(call.at, begin)
        sound = True                              # it may still become a call
        while sound and call.at < len(held) and call.scan.open:
            sound = call.scan.push(held[call.at])
            call.at += sound
            if self.certain and sound:
                self._foresee(held, begin)
        if call.said is not None:
            until = call.end or call.at
            self._tell("arguments", held[call.said:until])
            call.said = until
        rest = held[call.at:].lstrip()
        closed = sound and not call.scan.open and rest.startswith(self.call_end)
        if sound and not closed and not final and (call.scan.open or self.call_end.startswith(rest)):
            return False
        found = read_call(held, begin, self._call_stop) if closed else None
        self._step = self._content
        if found and not call.told:
            self._tell("call", found[0]["name"])
        if found and call.said is None:
            self._tell("arguments", to_json(found[0]["arguments"]))
        if found or call.told:
            ended = sound and self.call_end.startswith(rest)               # the answer did, inside the closing tag
            self._held = rest.removeprefix(self.call_end) if closed else "" if ended else held[call.at:]
            self._index += 1
        else:
            self._tell("content", held[:begin])
            self._held = held[begin:]
        return True

    def _foresee(self, held: str, begin: int) -> None:
        """With the last character the name may be known, or the arguments begin or end."""
        call, last, depth = self._open, held[self._open.at - 1], len(self._open.scan.stack)
        if not call.told:
            known = NAME.fullmatch(held, begin, call.at) if last == '"' and depth == 1 else None
            if known and sayable(name := json.loads(known[1])):
                call.told = True
                self._tell("call", name)
        elif call.said is None:
            if last == "{" and depth == 2 and ARGUMENTS.fullmatch(held, begin, call.at - 1):
                call.said = call.at - 1
        elif call.end is None and depth == 1:
            call.end = call.at


def partial(text: str, tag: str) -> int:
    """How many characters at the end of the text may be the beginning of a tag that is not all there yet."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


# ------------------------------------------------------------------------------------------------------- half a call

NUMBER = {                                        # state: {kind of character: next state}; 9 is any digit but 0
    "-": {"0": "0", "9": "9"}, "0": {".": ".", "e": "e"}, "9": {"9": "9", "0": "9", ".": ".", "e": "e"},
    ".": {"9": "f", "0": "f"}, "f": {"9": "f", "0": "f", "e": "e"},
    "e": {"9": "x", "0": "x", "+": "+"}, "+": {"9": "x", "0": "x"}, "x": {"9": "x", "0": "x"},
}
WHOLE = "09fx"                                    # the states in which a number may end
WORDS = {"t": "rue", "f": "alse", "n": "ull", "N": "aN", "I": "nfinity"}        # of Python's JSON


class Scan:
    """Reads a JSON object character by character, as json.loads would.

    `want` is what may come next: a value, a key, ":" or "," (or the end of what is open); inside a token, `token` says
    which kind and `left` what is left of it.
    """

    def __init__(self) -> None:
        self.stack: list[str] = []                # "{" and "[" that are open
        self.open = True                          # the object is not closed yet
        self.want = "object"
        self.token = ""                           # "string", "word", or a state of NUMBER
        self.left = ""                            # of a word; of an escape in a string: "\\", then an x per hex digit

    def push(self, c: str) -> bool:
        """The next character; False if it can't be one, and then nothing more may be pushed."""
        if self.token == "string":
            return self._string(c)
        if self.token == "word":
            fits, self.left = c == self.left[0], self.left[1:]
            return fits and (bool(self.left) or self._ended())
        if self.token:
            kind = "9" if c in "123456789" else "e" if c in "eE" else "+" if c in "+-" else c
            if self.token == "-" and c == "I":
                self.token, self.left = "word", WORDS[c]
                return True
            if kind in NUMBER[self.token]:
                self.token = NUMBER[self.token][kind]
                return True
            if self.token not in WHOLE:
                return False
            self._ended()
        return c in SPACE and self.want != "object" or self._mark(c)

    def _string(self, c: str) -> bool:
        if self.left == "\\":
            self.left = "xxxx" if c == "u" else ""
            return c in '"\\/bfnrtu'
        if self.left:
            self.left = self.left[1:]
            return c in "0123456789abcdefABCDEF"
        self.left = "\\" if c == "\\" else ""
        return self._ended() if c == '"' else c >= " "

    def _ended(self) -> bool:
        """A value or a key is complete."""
        self.token = ""
        self.want = ":" if self.want.startswith("key") else ","
        return True

    def _mark(self, c: str) -> bool:
        """A character between tokens, or the first of one."""
        if c in "}]":
            empty = self.want == ("key or }" if c == "}" else "value or ]")
            if not empty and self.want != "," or self.stack[-1] != ("{" if c == "}" else "["):
                return False
            self.stack.pop()
            self.open, self.want = bool(self.stack), ","
            return True
        if c in ":,":
            fits = self.want == c
            self.want = "value" if c == ":" or self.stack[-1:] == ["["] else "key"
            return fits
        if self.want.startswith("key"):
            self.token = "string"
            return c == '"'
        if c == "{" and self.want != "," and self.want != ":":
            self.stack.append(c)
            self.want = "key or }"
            return True
        if not self.want.startswith("value"):
            return False
        if c == "[":
            self.stack.append(c)
            self.want = "value or ]"
        elif c == '"':
            self.token = "string"
        elif c in WORDS:
            self.token, self.left = "word", WORDS[c]
        elif c == "-" or c in "0123456789":
            self.token = c if c in "-0" else "9"
        else:
            return False
        return True


@dataclass
class Open:
    """How far a call was read: its JSON up to `at`, its name `told`, its arguments `said` so far and complete at `end`
    (places in what is held)."""

    scan: Scan = field(default_factory=Scan)
    at: int = 0
    told: bool = False
    said: int | None = None
    end: int | None = None
