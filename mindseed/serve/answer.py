"""Answers in OpenAI's shapes, put together token by token: what a stream sends piece by piece, a plain answer whole.

Both come from the same steps, `push(token)` giving the new part, so a streamed answer joined is the plain one. The
log-probabilities of a token go out with the text that it helped to make; those of a stop string that was cut off, and
of a stop token, are dropped with it.
"""
from __future__ import annotations

import uuid
from typing import Any

from mindseed.infer.engine import Token
from mindseed.serve.ask import CLOSE, OPEN, Ask
from mindseed.serve.served import Served
from mindseed.tokenizers.base import Stream
from mindseed.tokenizers.reply import Piece, Reply

LEAST = -9999.0                                   # what JSON is told of minus infinity
FINISH = {"stop": "stop", "length": "length", "context": "length"}


class Usage:
    """Tokens of all prompts and answers of one request."""

    def __init__(self, asks: list[Ask]) -> None:
        self.prompt = sum(len(ask.request.prompt) for ask in asks)
        self.hits: dict[int, int] = {}            # of each prompt, the tokens that were found in the cache
        self.completion = self.reasoning = 0

    def count(self, ask: Ask, token: Token, *, thinking: bool = False) -> None:
        self.hits[id(ask)] = max(self.hits.get(id(ask), 0), token.cached)
        self.completion += not ask.empty
        self.reasoning += thinking

    @property
    def cached(self) -> int:
        return sum(self.hits.values())

    def body(self) -> dict[str, Any]:
        return {"prompt_tokens": self.prompt, "completion_tokens": self.completion,
                "total_tokens": self.prompt + self.completion,
                "prompt_tokens_details": {"cached_tokens": self.cached},
                "completion_tokens_details": {"reasoning_tokens": self.reasoning}}


class Held:
    """Tokens whose text has not come out yet."""

    def __init__(self, served: Served) -> None:
        self.stop_ids, self.tokens = served.stop_ids, []

    def push(self, token: Token) -> list[Token]:
        """The tokens that are to be reported now."""
        cut = token.finish == "stop" and (token.id in self.stop_ids or not token.text)
        self.tokens += [] if token.id in self.stop_ids and token.finish == "stop" else [token]
        if token.text or (token.finish is not None and not cut):
            out, self.tokens = self.tokens, []
            return out
        return []


class ChatChoice:
    """One answer of a chat."""

    def __init__(self, served: Served, ask: Ask, index: int, usage: Usage) -> None:
        self.served, self.ask, self.index, self.usage = served, ask, index, usage
        self.reply = Reply(thinking=ask.thinking, tools=ask.tools, certain=ask.certain,
                           signs=served.tokenizer.specials)
        self.held = Held(served)
        self.thinking = ask.thinking
        self.entries: list[dict[str, Any]] = []               # log-probabilities on their way out
        self.reported: list[dict[str, Any]] = []
        self.content, self.reasoning = [], []
        self.calls: list[dict[str, Any]] = []
        self.finish: str | None = None

    def first(self) -> dict[str, Any]:
        return self.chunk({"role": "assistant", "content": ""})

    def push(self, token: Token) -> list[dict[str, Any]]:
        """The chunks' choices that a token adds to a stream; none while its text is held back."""
        self.count(token)
        if self.ask.report:
            self.entries += [self.entry(one) for one in self.held.push(token)]
        pieces = self.reply.push(token.signed) if token.signed else []
        if token.finish is not None:
            pieces += self.reply.close()
        chunks = [self.chunk(self.delta(piece)) for piece in pieces if piece.text or piece.kind == "call"]
        if token.finish is not None:
            called = self.calls and token.finish == "stop"
            self.finish = "tool_calls" if called else FINISH[token.finish]
            chunks.append(self.chunk({}))
        if chunks and self.entries:
            chunks[0]["logprobs"] = {"content": self.entries, "refusal": None}
            self.reported, self.entries = self.reported + self.entries, []
        return chunks

    def count(self, token: Token) -> None:
        specials = self.served.tokenizer.specials
        self.thinking = self.thinking or token.id == specials.get(OPEN)
        self.usage.count(self.ask, token, thinking=self.thinking)
        self.thinking = self.thinking and token.id != specials.get(CLOSE)

    def delta(self, piece: Piece) -> dict[str, Any]:
        if piece.kind == "call":
            self.calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
                               "function": {"name": piece.text, "arguments": ""}})
            call = self.calls[piece.index]
            return {"tool_calls": [{"index": piece.index, **call, "function": dict(call["function"])}]}
        if piece.kind == "arguments":
            self.calls[piece.index]["function"]["arguments"] += piece.text
            return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
        (self.content if piece.kind == "content" else self.reasoning).append(piece.text)
        return {"content" if piece.kind == "content" else "reasoning_content": piece.text}

    def chunk(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None if delta else self.finish}

    def entry(self, token: Token) -> dict[str, Any]:
        def one(id: int, logp: float) -> dict[str, Any]:
            return {"token": self.served.spell(id), "logprob": max(logp, LEAST),
                    "bytes": list(self.served.bytes_of(id))}

        return one(token.id, token.logp) | {"top_logprobs": [one(id, logp) for id, logp in token.top]}

    def whole(self) -> dict[str, Any]:
        """The choice of an answer that is not streamed."""
        content = "".join(self.content)
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if self.calls else ""),
                                   "refusal": None}
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        if self.calls:
            message["tool_calls"] = self.calls
        logprobs = {"content": self.reported, "refusal": None} if self.ask.report else None
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.finish}


class TextChoice:
    """One continuation of a text."""

    def __init__(self, served: Served, ask: Ask, index: int, usage: Usage) -> None:
        self.served, self.ask, self.index, self.usage = served, ask, index, usage
        self.held, self.at = Held(served), Stream(served.tokenizer)
        self.offset, self.text = 0, []
        self.logprobs: dict[str, list[Any]] = empty()         # of what is on its way out
        self.reported: dict[str, list[Any]] = empty()
        self.finish: str | None = None
        self.begun = False

    def first(self) -> None:
        return None

    def push(self, token: Token) -> list[dict[str, Any]]:
        self.usage.count(self.ask, token)
        text = ""
        if not self.begun:
            self.begun = True
            text = self.echo(token) if self.ask.echo else ""
        if self.ask.empty:                        # the token was only made to read the prompt
            self.finish = "length"
        else:
            for one in self.held.push(token) if self.ask.report else ():
                self.report(one.id, one.logp, [*one.top, (one.id, one.logp)])
            text += token.text
            self.finish = token.finish and FINISH[token.finish]
        if not text and not self.finish:
            return []
        self.text.append(text)
        logprobs, self.logprobs = self.logprobs, empty()
        for name, values in logprobs.items():
            self.reported[name] += values
        return [{"index": self.index, "text": text, "logprobs": logprobs if self.ask.report else None,
                 "finish_reason": self.finish}]

    def echo(self, token: Token) -> str:
        """The prompt, before the first token's text; its first token has a probability only if one was before it."""
        ids = self.ask.request.prompt[self.ask.begin:]
        if self.ask.report:
            for id, logp, top in zip(ids, (token.prompt_logps or ())[self.ask.begin:],
                                     token.prompt_top[self.ask.begin:]):
                self.report(id, logp, [] if logp is None else [*top, (id, logp)])
        return self.served.tokenizer.decode(ids)

    def report(self, id: int, logp: float | None, top: list[tuple[int, float]]) -> None:
        into = self.logprobs
        into["tokens"].append(self.served.spell(id))
        into["token_logprobs"].append(logp)
        into["top_logprobs"].append(None if logp is None else {
            self.served.spell(id): max(p, LEAST) for id, p in top})
        into["text_offset"].append(self.offset)
        self.offset += len(self.at.push(id))

    def whole(self) -> dict[str, Any]:
        return {"index": self.index, "text": "".join(self.text), "finish_reason": self.finish,
                "logprobs": self.reported if self.ask.report else None}


def empty() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
