"""The same answers as rejection.py, from a server of OpenAI's API instead of an engine: any model that one may ask.

Conversations go out side by side, each in a thread that waits for its answers; what they come to is handed out in the
order of the prompts. What a server won't answer is dropped with that reason; too many such in a row end the work, for
then the fault is in how it is asked.
"""
from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

from mindseed.agents.chat_client import ChatClient, Refused
from mindseed.base.errors import UserError
from mindseed.rl.prompts import Prompt
from mindseed.rl.rejection import Keep, Sampled, Talk, seed_of, settle
from mindseed.tokenizers.chat import normal_call, parse_answer, to_json

PATIENCE = 8                                      # requests refused in a row


def ask_endpoint(client: ChatClient, prompts: Iterable[Prompt], *, model: str, n: int = 1, seed: int = 0,
                 keep: Keep | None = None, concurrency: int = 16, settings: dict[str, Any] | None = None,
                 every_turn: bool = False, longest: int | None = None, first: int = 0) -> Iterator[Sampled]:
    """`n` answers to every prompt, in the order of the prompts. `settings` are further fields of every request
    (temperature, max_tokens ...)."""
    line: deque[tuple[Prompt, list[Talk], list[Future]]] = deque()
    todo, refusals = enumerate(prompts, start=first), Refusals()

    def hold(talk: Talk) -> None:
        while talk.next_turn():
            tools = {"tools": talk.prompt.tools} if talk.prompt.tools else {}
            try:
                choice = client.chat(model=model, messages=wire(talk.messages), seed=talk.seed, **tools,
                                     **settings or {})
            except Refused as error:
                talk.faulty = "refused by the server"
                refusals.count(error)
                continue
            refusals.clear()
            finish = {"tool_calls": "stop", "function_call": "stop"}.get(choice.get("finish_reason"),
                                                                        choice.get("finish_reason"))
            tokens = choice["usage"].get("completion_tokens")
            talk.hear(turn_of(choice["message"]), finish, tokens if isinstance(tokens, int) else 0)

    pool = Threads(concurrency)
    try:
        while True:
            while len(line) < max(2, -(-2 * concurrency // n)) and (following := next(todo, None)) is not None:
                number, prompt = following
                talks = [Talk(prompt, seed_of(seed, number, i), every_turn, longest) for i in range(n)]
                line.append((prompt, talks, [pool.submit(hold, talk) for talk in talks]))
            if not line:
                return
            for future in line[0][2]:
                future.result()
            prompt, talks, _ = line.popleft()
            yield settle(prompt, talks, keep)
    finally:
        pool.end()
        client.close()


class Threads:
    """A pool of threads that hold up nobody's end: some may wait for a server for minutes."""

    def __init__(self, count: int) -> None:
        self.todo: queue.SimpleQueue[tuple[Future, Callable, tuple] | None] = queue.SimpleQueue()
        self.count = count
        for _ in range(count):
            threading.Thread(target=self.work, daemon=True).start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        future: Future = Future()
        self.todo.put((future, function, arguments))
        return future

    def work(self) -> None:
        while (job := self.todo.get()) is not None:
            future, function, arguments = job
            try:
                future.set_result(function(*arguments))
            except BaseException as error:        # whoever asks for the result is told
                future.set_exception(error)

    def end(self) -> None:
        """Nothing more is begun."""
        with contextlib.suppress(queue.Empty):
            while True:
                self.todo.get_nowait()
        for _ in range(self.count):
            self.todo.put(None)


class Refusals:
    """Counts them over all threads; raises UserError with the last one when there are too many in a row."""

    def __init__(self) -> None:
        self.lock, self.row = threading.Lock(), 0

    def count(self, error: Refused) -> None:
        with self.lock:
            self.row += 1
            if self.row >= PATIENCE:
                raise UserError(f"{error}; {self.row} requests in a row were refused")

    def clear(self) -> None:
        with self.lock:
            self.row = 0


def wire(messages: list[dict]) -> list[dict]:
    """Our messages in OpenAI's form, in which calls have ids and results name them."""
    sent, open_, number = [], deque(), 0
    for message in messages:
        one = {"role": message["role"], "content": message.get("content") or ""}
        if message.get("tool_calls"):
            one["tool_calls"] = []
            for call in message["tool_calls"]:
                number += 1
                one["tool_calls"].append({"id": f"call_{number}", "type": "function", "function": {
                    "name": call["name"], "arguments": to_json(call.get("arguments") or {})}})
            open_.extend(call["id"] for call in one["tool_calls"])
        if message["role"] == "tool":
            one["tool_call_id"] = open_.popleft() if open_ else "call_0"
        sent.append(one)
    return sent


def turn_of(message: dict[str, Any]) -> dict[str, Any]:
    """A server's message as `parse_answer` gives one; thoughts may stand in a field of their own or in the text."""
    content = message.get("content") if isinstance(message.get("content"), str) else ""
    thoughts = [message[key] for key in ("reasoning_content", "reasoning") if isinstance(message.get(key), str)]
    turn = {"content": content, "reasoning_content": thoughts[0], "tool_calls": []} if thoughts else \
        parse_answer(content)
    for call in message.get("tool_calls") or []:
        try:
            turn["tool_calls"].append(normal_call(call, 0))
        except (UserError, KeyError, TypeError, AttributeError):
            turn["content"] += "<tool_call>"      # what is no call is no answer either
    return turn
