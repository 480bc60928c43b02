"""Conversations in another project's words: the Jinja template of its directory, and the mask of what is learnt.

A model that was taught to talk by others goes on in their format: `Template` renders it as transformers does. What our
own renderer (chat.py) knows by construction, which characters the assistant must produce, is found here by rendering
twice: the conversation up to a turn with the prompt for an answer, and the conversation with that answer. What the
second has more is the answer.

Many templates rewrite the past: they drop the reasoning of earlier turns once the user speaks again. What the model
sees when it gives its second answer is then no continuation of what it saw at the first, so such a conversation becomes
several *lessons*, each ending in an answer as it would be asked for; a template that only appends gives one. A template
that tells the date (Llama 3.2) tells that of the day on which it is rendered.

As in our own format a text can't spell control tokens: where one does, the spelling is broken by a character that
nothing else holds, and mended once the rendering has been cut into control tokens and text. (A template that edits
texts could still put a token together of harmless pieces; only our own format rules this out.)
"""
from __future__ import annotations

import datetime
import functools
import hashlib
import json
import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mindseed.base.errors import UserError
from mindseed.base.files import read_json, read_text
from mindseed.tokenizers.base import ByteLevel
from mindseed.tokenizers.chat import JINJA, Message, Span, Tools, check, text_of

MARKS = ("bos_token", "eos_token", "pad_token", "unk_token")
FORMS = (("", False), ("", True), (None, False), (None, True))        # of calls: templates differ, see `theirs`
PRIVATE = range(0xE000, 0xF900)                   # characters that Unicode leaves to private agreement


@dataclass(frozen=True)
class Template:
    """A chat template and the spellings of the special tokens it may ask for (bos_token ...)."""

    source: str
    marks: tuple[tuple[str, str], ...] = ()

    def hash(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    def text(self, messages: list[Message], *, tools: Tools = None, generation_prompt: bool = False,
             thinking: bool | None = None, moment: datetime.datetime | None = None) -> str:
        """The rendered conversation, as of `moment` [now]. UserError with the template's own words where it refuses
        one, or says nothing of a tool or a call."""
        known: dict[str, Any] = {"tools": tools, "add_generation_prompt": generation_prompt, **dict(self.marks),
                                 "strftime_now": (moment or datetime.datetime.now()).strftime}
        if thinking is not None:
            known |= {"enable_thinking": thinking, "open_thinking": thinking}
        calls = [call for m in messages for call in m.get("tool_calls") or []]
        renamed = [m | {"tool_calls": [anonymous(c) for c in m["tool_calls"]]} if m.get("tool_calls") else m
                   for m in messages]
        problem = "it leaves out a tool or a call of one"
        for form in FORMS if calls else FORMS[:1]:
            try:
                text = self.rendered(messages, form, known)
            except Exception as error:            # a stranger's program may fail in any way
                problem = " ".join(str(error).split()) or type(error).__name__
                continue
            lost = tools and text == self.rendered(messages, form, known | {"tools": [anonymous(t) for t in tools]})
            if not lost and not (calls and text == self.rendered(renamed, form, known)):
                return text
        raise UserError(f"the model's chat template cannot tell this conversation: {problem}")

    def rendered(self, messages: list[Message], form: tuple[str | None, bool], known: dict[str, Any]) -> str:
        return compiled(self.source).render(messages=[theirs(message, *form) for message in messages], **known)

    def spans(self, tokenizer: ByteLevel, messages: list[Message], *, tools: Tools = None,
              generation_prompt: bool = False, thinking: bool | None = None) -> list[Span]:
        """As `chat.render`, with nothing to be learnt."""
        check(messages)
        guard = Guard(tokenizer, self.source, messages, tools)
        return guard.cut(guard.plain(self.text(guard.messages, tools=guard.tools, generation_prompt=generation_prompt,
                                               thinking=thinking)), [])

    def lessons(self, tokenizer: ByteLevel, messages: list[Message], *, tools: Tools = None,
                first: int = 0) -> list[list[Span]]:
        """The conversation for training: one list of spans, or more where the template rewrites the past; answers
        before message `first` are only read. UserError where it rewrites, because of an answer, what the answer was to.
        """
        check(messages)
        guard, moment = Guard(tokenizer, self.source, messages, tools), datetime.datetime.now()

        def told(messages: list[Message], prompt: bool = False) -> str:
            return guard.plain(self.text(messages, tools=guard.tools, generation_prompt=prompt, moment=moment))

        lessons: list[tuple[str, list[tuple[int, int]]]] = []         # text, the answers in it from and to
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i < first:
                continue
            before, whole = guard.messages[:i], told(guard.messages[:i + 1])
            asked = told(before, True)
            if not whole.startswith(told(before)):
                raise UserError("the model's chat template tells what came before an answer otherwise once it is "
                                "there, so what is to be learnt cannot be told apart")
            start = len(asked)
            if not whole.startswith(asked):       # it opens more than the answer has, which begins where two differ
                start = min(common(asked, whole), common(told([*before, says(guard.mark)]), whole))
            answer = (start, len(whole))
            if lessons and whole.startswith(lessons[-1][0]):
                lessons[-1] = whole, [*lessons[-1][1], answer]
            else:
                lessons.append((whole, [answer]))
        return [guard.cut(text, answers) for text, answers in lessons]


    def end(self, tokenizer: ByteLevel) -> int | None:
        """The id that ends an answer; None if it ends in text, or the template does not tell a plain question."""
        try:
            last = [span for span in self.lessons(tokenizer, [{"role": "user", "content": "?"}, {
                "role": "assistant", "content": "!"}])[-1] if span.trainable][-1]
        except (UserError, IndexError):
            return None
        return tokenizer.specials[last.text] if last.control else None


def common(a: str, b: str) -> int:
    """How many characters a and b share from the beginning."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def anonymous(call: dict[str, Any]) -> dict[str, Any]:
    """A call or a tool, in OpenAI's form or bare, under another name: a text that stays the same does not tell it."""
    inner = call.get("function") if isinstance(call.get("function"), dict) else call
    other = inner | {"name": f"{inner.get('name')}?"}
    return call | {"function": other} if inner is not call else other


def says(content: str) -> Message:
    return {"role": "assistant", "content": content}


def theirs(message: Message, nothing: str | None, spelt: bool) -> Message:
    """A message as templates expect it: calls in OpenAI's form, `nothing` for the content that is not there beside
    them, their arguments as an object or `spelt` as JSON."""
    calls = []
    for call in message.get("tool_calls") or []:
        call = call.get("function") or call
        arguments = call.get("arguments") or {}
        calls.append({"type": "function", "function": call | {
            "arguments": to_json(arguments) if spelt and not isinstance(arguments, str) else arguments}})
    content = text_of(message) or (nothing if calls else "")
    return {**message, "content": content} | ({"tool_calls": calls} if calls else {})


class Guard:
    """Keeps the special tokens that texts spell from becoming control tokens. What an answer may hold of markup
    (`<think>`, `<tool_call>`: the tokenizer's visible ones) is left alone there."""

    def __init__(self, tokenizer: ByteLevel, source: str, messages: list[Message], tools: Tools) -> None:
        self.tokenizer = tokenizer
        written = source + json.dumps([messages, tools], ensure_ascii=False)
        self.mark = next(chr(c) for c in PRIVATE if chr(c) not in written)
        self.tools = self.broken(tools, keep=frozenset())
        self.messages = [self.broken(message, keep=tokenizer.visible if message["role"] == "assistant" else frozenset())
                         for message in messages]

    def broken(self, value: Any, *, keep: frozenset[str]) -> Any:
        if isinstance(value, dict):
            return {self.broken(key, keep=keep): self.broken(part, keep=keep) for key, part in value.items()}
        if isinstance(value, list):
            return [self.broken(part, keep=keep) for part in value]
        if not isinstance(value, str):
            return value
        return "".join(part[0] + self.mark + part[1:] if special and part not in keep else part
                       for part, special in self.tokenizer.parts(value))

    def plain(self, text: str) -> str:
        """A rendered text in which the mark stands as itself, where the template escaped it for JSON or for an URL."""
        return re.sub("|".join([rf"\\+u{ord(self.mark):04x}", re.escape(urllib.parse.quote(self.mark))]),
                      self.mark, text, flags=re.IGNORECASE)

    def cut(self, text: str, answers: list[tuple[int, int]]) -> list[Span]:
        """Spans of a rendered text; what lies in `answers` is to be learnt, but for white space after its last
        control token."""
        parts, at = [], 0
        for part, special in self.tokenizer.parts(text):
            parts.append((at, part, special))
            at += len(part)
        spans = []
        for start, part, special in parts:
            if special:
                spans.append(Span(part, any(a < start + len(part) and start < b for a, b in answers), True))
                continue
            borders = sorted({0, len(part), *(x - start for pair in answers for x in pair
                                              if 0 < x - start < len(part))})
            for a, b in zip(borders, borders[1:]):
                learnt = any(first <= start + a < last for first, last in answers)
                tail = learnt and not part[a:b].strip() and any(start + b == last for _, last in answers)
                if piece := part[a:b].replace(self.mark, ""):
                    spans.append(Span(piece, learnt and not (tail and spans and spans[-1].control)))
        return spans


# --------------------------------------------------------------------------------------------------------- from a file

def read_template(path: Path | str) -> tuple[str | None, dict[str, str]]:
    """(Jinja, spellings of bos_token and so on) of a directory, or of that of its tokenizer.json. The template is in
    a file of its own or in tokenizer_config.json, there perhaps as one of several by name."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    file = folder / "tokenizer_config.json"
    config = read_json(file, {str: Any}) if file.exists() else {}
    if (folder / "special_tokens_map.json").exists():                 # where older tokenizers keep them
        config = read_json(folder / "special_tokens_map.json", {str: Any}) | config
    marks = {name: value.get("content") if isinstance(value, dict) else value for name in MARKS
             if (value := config.get(name)) is not None}
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((one.get("template") for one in template
                         if isinstance(one, dict) and one.get("name") == "default"), None)
    if (folder / "chat_template.jinja").exists():
        template = read_text(folder / "chat_template.jinja")
    return (template if isinstance(template, str) else None,
            {name: value for name, value in marks.items() if isinstance(value, str)})


def foreign(source: str | None, marks: dict[str, str]) -> Template | None:
    """How to render what has the chat template `source`; None: in our own format."""
    return None if source is None or source == JINJA else Template(source, tuple(sorted(marks.items())))


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}, by which some templates mark answers: its content, as it is."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """A template in a sandbox that can neither change what it is given nor reach anything else."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    return environment.from_string(source)


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
            sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
