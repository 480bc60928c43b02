"""What the policy is asked: rows of problems or conversations, in an order that is a function of (seed, number).

A row may be a problem of the embedded world or of GSM8K ("messages" or "question", and "answer"), code with "tests",
JSON with a "schema", or a conversation, of which everything before the last turn of the assistant is the prompt (as in
MiniMind's rlaif files, whose last turn is empty). What else is in a row stays with it, for the reward.
"""
from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Iterable, Sequence

import numpy as np

from mindseed.base.errors import UserError
from mindseed.base.log import warn
from mindseed.core import Tokenizer
from mindseed.data.formats import BadRow, check, parse, payloads
from mindseed.data.readers import expand
from mindseed.data.shuffle import key_of, shuffled
from mindseed.tokenizers.chat import encode_chat, normalise
from mindseed.tokenizers.template import Template


@dataclass(frozen=True, kw_only=True)
class Prompt:
    messages: list[dict]
    tools: Any = None
    row: dict = field(default_factory=dict)
    name: str = ""                                # file:line


def prompt_of(row: dict, name: str = "", system: str = "") -> Prompt:
    """UserError, naming the row, for what is no prompt."""
    if "question" in row and not ({"messages", "conversations"} & row.keys()):
        given = {"messages": [{"role": "user", "content": row["question"]}]}
    elif isinstance(row.get("prompt"), str):
        given = {"messages": [{"role": "user", "content": row["prompt"]}]}
    else:
        given = {"messages": row["prompt"]} if isinstance(row.get("prompt"), list) else row
    if not {"messages", "conversations"} & {key for key, value in given.items() if value is not None}:
        raise UserError(f"{name}: not a prompt: its keys are {', '.join(row) or 'none'}; expected question, prompt, "
                        "messages or conversations")
    try:
        messages, tools = normalise({key: unanswered(value) if key != "tools" else value for key, value in given.items()
                                     if key in ("messages", "conversations", "tools")})
    except (UserError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{name}: not a prompt: {error}") from None
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise UserError(f"{name}: a prompt needs a turn of the user that is to be answered")
    if system:
        messages = [{"role": "system", "content": system}, *(m for m in messages if m["role"] != "system")]
    return Prompt(messages=messages, tools=tools, row=row, name=name)


def unanswered(messages: Any) -> Any:
    """Without the last turns of the assistant, which may be empty (MiniMind's rlaif files)."""
    while isinstance(messages, list) and len(messages) > 1 and isinstance(messages[-1], dict) and (
            messages[-1].get("role") == "assistant"):
        messages = messages[:-1]
    return messages


def read_prompts(paths: Iterable[str], *, system: str = "") -> list[Prompt]:
    """All prompts of some files. Rows that are none are named and left out; UserError if nothing is left."""
    bad: list[str] = []
    prompts = []
    for path in expand(paths):
        check(path)
        for line, payload in payloads(path):
            try:
                prompts.append(prompt_of(parse(path, payload), f"{path}:{line}", system))
            except (UserError, BadRow) as error:
                bad.append(str(error) if isinstance(error, UserError) else f"{path}:{line}: {error}")
    if not prompts:
        raise UserError("no prompt was found" + (f"; the first row that is none: {bad[0]}" if bad else ""))
    if bad:
        warn(f"{len(bad)} rows are no prompts and are left out, the first: {bad[0]}")
    return prompts


class Prompts:
    """Prompt number i of an endless stream, each epoch in an order of its own; with its ids. `plain` is text with
    {question} in it that takes the place of the chat template, for a model that has only read texts; `room` is the
    option by which answers take theirs."""

    def __init__(self, prompts: Sequence[Prompt], tokenizer: Tokenizer, *, seed: int, template: Template | None = None,
                 thinking: bool | None = None, longest: int | None = None, plain: str = "",
                 room: str = "rollout.max_new") -> None:
        self.tokenizer, self.template, self.thinking, self.seed = tokenizer, template, thinking, seed
        self.plain = plain
        if plain and "{question}" not in plain:
            raise UserError(f"the plain text {plain!r} needs {{question}}, where the question goes")
        if plain and (more := next((p for p in prompts if p.tools or len(p.messages) != 1), None)):
            raise UserError(f"{more.name}: as plain text one question can be asked, without tools and other turns")
        if longest is not None and longest < 1:
            raise UserError(f"{room} leaves nothing of the model's context for a prompt; lower it")
        ids = [self.encode(p.messages, p.tools) for p in prompts]
        kept = [i for i, one in enumerate(ids) if longest is None or len(one) <= longest]
        if not kept:
            raise UserError(f"every prompt is longer than {longest} tokens, which is what the model's context leaves "
                            f"beside an answer; lower {room}, or take shorter prompts")
        if len(kept) < len(ids):
            warn(f"{len(ids) - len(kept)} of {len(ids)} prompts are longer than {longest} tokens and are left out")
        self.prompts, self.ids = [prompts[i] for i in kept], [ids[i] for i in kept]

    def encode(self, messages: list[dict], tools: Any) -> list[int]:
        """The ids up to where the assistant begins."""
        if self.plain:
            bos, text = self.tokenizer.bos_id, self.plain.replace("{question}", messages[0]["content"])
            return [*([] if bos is None else [bos]), *self.tokenizer.encode(text)]
        return encode_chat(self.tokenizer, messages, tools=tools, generation_prompt=True, thinking=self.thinking,
                           template=self.template)[0]

    def rendered(self, messages: list[dict], tools: Any) -> list[int]:
        """The ids of finished turns."""
        return encode_chat(self.tokenizer, messages, tools=tools, template=self.template)[0]

    def tail(self) -> list[int]:
        """The ids that follow the end of a turn of the assistant where a conversation is written out."""
        if self.plain:
            return []
        turns = [[{"role": "user", "content": "x"}, {"role": "assistant", "content": y}] for y in ("x", "y")]
        a, b = (self.rendered(messages, None) for messages in turns)
        last = next(i for i in range(1, len(a) + 1) if a[-i] != b[-i])            # of the end that both share
        return a[len(a) - last + 2:]              # after the token that ends the turn

    def digest(self) -> str:
        """What the prompts are, in short: resuming on others is refused."""
        return hashlib.blake2b(repr(self.ids).encode(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return len(self.prompts)

    def at(self, number: int) -> tuple[Prompt, list[int]]:
        epoch, place = divmod(number, len(self.prompts))
        i = int(shuffled(np.array([place]), len(self.prompts), key_of(self.seed, 5, epoch))[0])
        return self.prompts[i], self.ids[i]
