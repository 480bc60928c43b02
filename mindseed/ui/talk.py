"""Talking to the server, through the official client of the API that it serves.

`reply` is one turn of the assistant as the studio means it: the model answers, and if it calls tools they are run and
it is asked again, until it has nothing more to call. It comes as `Event`s while it is being written.
"""
from __future__ import annotations

import contextlib
import functools
import ipaddress
import json
import queue
import socket
import ssl
import threading
import time
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Callable, Generator, Iterator, Literal
from urllib.parse import urlsplit

import httpx
import openai

from mindseed.base.errors import UserError
from mindseed.tasks.tools import TOOLS, execute

ROUNDS = 6                                        # of calls in one turn; a model that never stops calling is stopped
FORGOTTEN = "The context is full: the oldest part of the conversation was left out."
STOPPED = "The model called tools again and again, and was stopped."
FORM, NO_JSON = "its form is not that of the API", "it is no JSON"
NOTHING, NO_END = "no piece of an answer is in it", "it stops before the answer's end"
Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a conversation is led. None: what the model's own directory says."""

    model: str = ""
    system: str = ""
    turns: int = 0                                # questions of the past that are sent along; 0: all
    thinking: Literal["auto", "on", "off"] = "auto"
    tools: tuple[str, ...] = ()
    must_call: bool = False                       # the first thing it does is to call a tool
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int = 512
    seed: int | None = None                       # None: another answer each time

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Settings:
        """What was stored, by whichever version: unknown names and tools are left out."""
        known = {f.name for f in fields(cls)}
        values = {name: value for name, value in stored.items() if name in known}
        return cls(**values | {"tools": tuple(name for name in values.get("tools", ()) if name in TOOLS)})

    def stored(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Event:
    """kind: "reasoning", "content", "call" and "arguments" carry more text of the message being written, the last two
    of the call `index`; "message" is that message, complete, and what its calls resulted in; "note" is a remark."""

    kind: Literal["reasoning", "content", "call", "arguments", "message", "note"]
    text: str = ""
    index: int = 0
    message: Message = field(default_factory=dict)
    results: list[Message] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)


class Unreachable(UserError):
    """The server does not answer."""


class Garbled(UserError):
    """What came is no answer of such a server: it is something else, or it broke off. `session.told` says so in the
    reader's language."""

    def __init__(self, server: str, what: str, piece: str = "") -> None:
        super().__init__(f"what came from {server} is not the answer of a model server ({what}{piece}); check the "
                         "address, and that `mindseed serve` or another server of the OpenAI API runs there")
        self.server, self.what, self.piece = server, what, piece


class Refused(UserError):
    """The server answers that it won't; `code` is the API's word for why."""

    def __init__(self, text: str, code: str | None) -> None:
        super().__init__(text)
        self.code = code


def connect(server: str, *, key: str = "") -> openai.OpenAI:
    """A client of the server at an address without /v1. On this machine no proxy stands in between."""
    return openai.OpenAI(base_url=f"{server}/v1", api_key=key or "none", max_retries=0, http_client=dialler(server))


def dialler(server: str) -> httpx.Client:
    host = urlsplit(server).hostname or ""
    with contextlib.suppress(ValueError):
        host = "localhost" if ipaddress.ip_address(host).is_loopback else host
    return httpx.Client(trust_env=host != "localhost", timeout=httpx.Timeout(600.0, connect=3.0), verify=certificates())


@functools.cache
def certificates() -> ssl.SSLContext:
    """To read them takes longer than a short answer."""
    return httpx.create_ssl_context()


def address(client: openai.OpenAI) -> str:
    """Of its server, as the user gave it."""
    return str(client.base_url).removesuffix("/").removesuffix("/v1")


@contextlib.contextmanager
def plainly(client: openai.OpenAI) -> Iterator[None]:
    """Failures of the connection and of the server as errors that a reader understands."""
    try:
        yield
    except openai.APIResponseValidationError:
        raise Garbled(address(client), FORM) from None
    except openai.APIConnectionError as error:
        raise Unreachable(str(error.__cause__ or error)) from None
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        raise Refused(str(body.get("message") or error.message), body.get("code")) from None
    except openai.APIError as error:              # in the middle of a stream
        raise Refused(error.message, error.code) from None
    except httpx.HTTPError as error:
        raise Unreachable(str(error) or type(error).__name__) from None
    except json.JSONDecodeError as error:
        raise Garbled(address(client), NO_JSON, f": {error.doc[:60]!r}") from None
    except (AttributeError, LookupError, TypeError, ValueError) as error:     # openai checks no forms, and so trips
        raise Garbled(address(client), FORM) from error


def models(client: openai.OpenAI) -> dict[str, int | None]:
    """The names that the server answers to, and the context of each in tokens, if it says that."""
    with plainly(client):
        found = {model.id: getattr(model, "max_model_len", None)
                 for model in client.with_options(timeout=5).models.list().data}
        if not all(isinstance(name, str) for name in found):
            raise Garbled(address(client), FORM)
        return {name: size if type(size) is int and size > 0 else None for name, size in found.items()}


def asked(settings: Settings, *, chat: bool = True) -> dict[str, Any]:
    """Settings as arguments of the client."""
    more: dict[str, Any] = {} if settings.top_k is None else {"top_k": settings.top_k}
    if chat and settings.thinking != "auto":
        more["chat_template_kwargs"] = {"enable_thinking": settings.thinking == "on"}
    plain = {"temperature": settings.temperature, "top_p": settings.top_p, "seed": settings.seed,
             "max_tokens": settings.max_tokens}
    return {"model": settings.model, "extra_body": more, **{k: v for k, v in plain.items() if v is not None}}


def recent(messages: list[Message], turns: int) -> list[Message]:
    """The last `turns` questions with all that followed them; 0: everything."""
    starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
    return messages[starts[-turns]:] if turns and len(starts) > turns else messages


def sent(messages: list[Message]) -> list[Message]:
    """Messages as the API spells them: calls get ids, by which their results are told apart."""
    out, waiting = [], []
    for i, message in enumerate(messages):
        message = dict(message)
        if calls := message.get("tool_calls"):
            waiting = [f"call_{i}_{j}" for j in range(len(calls))]
            message["tool_calls"] = [{"id": id, "type": "function", "function": {
                "name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}}
                for id, call in zip(waiting, calls)]
        if message["role"] == "tool":
            message["tool_call_id"] = waiting.pop(0) if waiting else f"call_{i}"
        out.append(message)
    return out


def reply(client: openai.OpenAI, settings: Settings, messages: list[Message]) -> Iterator[Event]:
    """The assistant's turn after `messages`. Where the context is too short for all of them the oldest are left out,
    with a note. Closing the iterator ends the request at once."""
    history = recent(messages, settings.turns)
    new: list[Message] = []
    before = len(history)
    for turn in range(ROUNDS):
        force = settings.must_call and turn == 0
        while True:
            try:
                written, about = yield from one(client, settings, [*history, *new], must_call=force)
                break
            except Refused as error:
                questions = sum(message["role"] == "user" for message in history)
                if error.code != "context_length_exceeded" or questions < 2:
                    raise
                if len(history) == before:
                    yield Event(kind="note", text=FORGOTTEN)
                history = recent(history, questions - 1)
        calls = written.get("tool_calls") or []
        results = [{"role": "tool", "content": execute(call["name"], call["arguments"])} for call in calls]
        new += [written, *results]
        yield Event(kind="message", message=written, results=results, about=about)
        if not calls:
            return
    yield Event(kind="note", text=STOPPED)


def one(client: openai.OpenAI, settings: Settings, messages: list[Message], *,
        must_call: bool) -> Generator[Event, None, tuple[Message, dict[str, Any]]]:
    """One message of the assistant, piece by piece; returns it, and what is remembered beside it."""
    head = [{"role": "system", "content": settings.system}] if settings.system else []
    extra: dict[str, Any] = {}
    if settings.tools:
        extra = {"tools": [TOOLS[name].openai() for name in settings.tools],
                 "tool_choice": "required" if must_call else "auto"}
    extra |= {"messages": head + sent(messages), "stream_options": {"include_usage": True}, **asked(settings)}
    draft, began = Draft(), time.monotonic()
    with plainly(client), client.chat.completions.create(stream=True, **extra) as chunks:
        for chunk in chunks:
            draft.since = draft.since or time.monotonic()
            draft.tokens = chunk.usage.completion_tokens if chunk.usage else draft.tokens
            for choice in chunk.choices:
                draft.finish = choice.finish_reason or draft.finish
                yield from draft.add(choice.delta)
    draft.require_end(client)
    return draft.message(), draft.about(settings.model, began)


@dataclass(kw_only=True)
class Draft:
    """A message while it is being written."""

    reasoning: str = ""
    content: str = ""
    calls: list[list[str]] = field(default_factory=list)          # [name, arguments as JSON]
    finish: str | None = None
    tokens: int | None = None
    since: float | None = None                                    # when its first piece came

    def add(self, delta: Any) -> Iterator[Event]:
        if text := getattr(delta, "reasoning_content", None):
            self.reasoning += text
            yield Event(kind="reasoning", text=text)
        if delta.content:
            self.content += delta.content
            yield Event(kind="content", text=delta.content)
        for call in delta.tool_calls or []:
            while len(self.calls) <= call.index:
                self.calls.append(["", ""])
            if call.function and call.function.name:
                self.calls[call.index][0] += call.function.name
                yield Event(kind="call", text=call.function.name, index=call.index)
            if call.function and call.function.arguments:
                self.calls[call.index][1] += call.function.arguments
                yield Event(kind="arguments", text=call.function.arguments, index=call.index)

    def require_end(self, client: openai.OpenAI) -> None:
        """Every answer says why it ends; one that does not was cut off on its way, or is a page of something else."""
        if self.finish is None:
            raise Garbled(address(client), NOTHING if self.since is None else NO_END)

    def message(self) -> Message:
        message: Message = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [{"name": name, "arguments": parsed(text)} for name, text in self.calls]
        return message

    def about(self, model: str, began: float) -> dict[str, Any]:
        """What is remembered beside the message."""
        now = time.monotonic()
        writing = now - (self.since or now)
        speed = (self.tokens - 1) / writing if self.tokens and self.tokens > 1 and writing > 0 else None
        return {"model": model, "finish": self.finish, "tokens": self.tokens, "seconds": round(now - began, 3),
                "first_s": None if self.since is None else round(self.since - began, 3),
                "tokens_per_s": speed and round(speed, 1)}


def parsed(arguments: str) -> dict[str, Any]:
    """A call's arguments; what is no object stays readable, and the tool will refuse it."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(value := json.loads(arguments or "{}"), dict):
            return value
    return {"?": arguments}


def continue_text(client: openai.OpenAI, settings: Settings, prompt: str) -> Iterator[Event]:
    """What the model writes after a text that is no conversation, as one that has only been pretrained can."""
    draft, began = Draft(), time.monotonic()
    extra = {"prompt": prompt, "stream_options": {"include_usage": True}, **asked(settings, chat=False)}
    with plainly(client), client.completions.create(stream=True, **extra) as chunks:
        for chunk in chunks:
            draft.since = draft.since or time.monotonic()
            draft.tokens = chunk.usage.completion_tokens if chunk.usage else draft.tokens
            for choice in chunk.choices:
                draft.finish, draft.content = choice.finish_reason or draft.finish, draft.content + choice.text
                yield Event(kind="content", text=choice.text)
    draft.require_end(client)
    yield Event(kind="message", message=draft.message(), about=draft.about(settings.model, began))


class Writing:
    """Events of a turn that is written in a thread of its own, so that whoever waits for them can be interrupted.

    `write` is `reply` or `continue_text`. It gets a client with connections of its own, which `stop` cuts: a thread
    that waits for a server's first word looks at nothing else.
    """

    def __init__(self, client: openai.OpenAI, write: Callable[..., Iterator[Event]], settings: Settings,
                 asked: list[Message] | str) -> None:
        self.events: queue.Queue[Event | None] = queue.Queue()
        self.failed: Exception | None = None      # why it ended before its time
        self.over, self.stopped = False, threading.Event()
        self.lines: list[Any] = []                # httpcore's streams
        self.http = dialler(address(client))
        self.http.event_hooks = {"request": [lambda request: request.extensions.update(trace=self.connected)]}
        events = write(client.with_options(http_client=self.http), settings, asked)
        threading.Thread(target=self.run, args=(events,), daemon=True).start()

    def run(self, events: Iterator[Event]) -> None:
        try:
            with self.http, contextlib.closing(events):
                for event in events:
                    self.events.put(event)
                    if self.stopped.is_set():
                        return
        except Exception as error:                # a fault of ours, too, must not look like an end
            self.failed = None if self.stopped.is_set() else error
        finally:
            self.events.put(None)

    def connected(self, name: str, info: dict[str, Any]) -> None:
        """What httpcore reports: here, that a connection is there, or that it is now encrypted."""
        if name.endswith((".connect_tcp.complete", ".start_tls.complete")):
            self.lines.append(info["return_value"])
            if self.stopped.is_set():
                self.cut()

    def cut(self) -> None:
        for line in list(self.lines):
            with contextlib.suppress(OSError):    # closed by now
                line.get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    def take(self, wait_s: float) -> Event | None:
        """The next event; None if none comes in that time, or `over`."""
        try:
            event = self.events.get(timeout=wait_s)
        except queue.Empty:
            return None
        self.over = event is None
        return event

    def stop(self) -> None:
        """End the request, at whatever point it is; the server stops writing, or never begins."""
        self.stopped.set()
        self.cut()


def again(settings: Settings, versions: int) -> Settings:
    """The settings for another answer to the same question: a fixed seed would only give the same one."""
    return settings if settings.seed is None else replace(settings, seed=settings.seed + versions)
