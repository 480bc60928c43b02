"""Talk to a model in the terminal: answers stream, the conversation is remembered, /help lists the commands.

From a pipe, every line is a question and every answer is printed plainly, so `echo "2+2?" | mindseed chat DIR` works
in a script; such questions are independent unless --history is given. `--prompt` asks once and leaves.
"""
from __future__ import annotations

import json
import sys
import time
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterator, Literal, TextIO

from rich.console import Console
from rich.text import Text

from mindseed.base.config import option
from mindseed.base.errors import UserError
from mindseed.base.files import read_text, write_text
from mindseed.base.log import console, notes, warn
from mindseed.infer.engine import Engine, EngineConfig, Request
from mindseed.infer.rows import Token
from mindseed.infer.sample import Sampling
from mindseed.interop.directory import Loaded
from mindseed.recipes.answer import AnswerOptions, not_unicode, warn_of_foreign_chat
from mindseed.tokenizers.chat import encode_chat, parse_answer

OPENED = {True: "<think>\n", False: "<think>\n\n</think>\n\n", None: ""}  # what the prompt already says of it
THINKING = {"on": True, "off": False, "auto": None}
COMMANDS = {
    "/help": "this list",
    "/reset": "forget the conversation, keep the system prompt",
    "/retry": "answer the last question again, with another seed",
    "/system TEXT": "set the system prompt and start anew; without TEXT: none",
    "/think on|off|auto": "make the model think first, keep it from it, or let it choose",
    "/set NAME VALUE": "temperature, top_k, top_p, min_p, repetition_penalty or seed",
    "/save FILE": "append the conversation to a .jsonl file that `train` can read",
    "/exit": "leave (or Ctrl-D)",
}


@dataclass(frozen=True, kw_only=True)
class Options(AnswerOptions):
    prompt: str | None = option(None, help="ask this, print the answer and leave")
    system: str = option("", help="system prompt")
    think: Literal["on", "off", "auto"] = option("auto", help="think first, don't, or as the model likes",
                                                 elsewhere=("open_thinking on",))
    history: bool = option(False, help="from a pipe: remember earlier lines, as in a terminal",
                           elsewhere=("historys",))


def main(options: Options) -> int:
    loaded = options.load("chat")
    warn_of_foreign_chat(loaded, options.model)
    talk = Conversation(loaded, options.sampling(loaded), engine=options.engine(loaded, max_seqs=1),
                        max_new=options.max_new, stop=options.stop, system=options.system,
                        thinking=THINKING[options.think])
    if options.prompt is not None:
        show_plain(talk.ask(options.prompt))
    elif sys.stdin.isatty():
        chat_in_terminal(talk, options)
    else:
        answer_lines(talk, sys.stdin, keep=options.history)
    return 0


class Conversation:
    """Messages so far, and how to get the next one."""

    def __init__(self, loaded: Loaded, sampling: Sampling, *, max_new: int, engine: Engine | None = None,
                 stop: tuple[str, ...] = (), system: str = "", thinking: bool | None = None) -> None:
        self.loaded, self.sampling, self.max_new, self.stop = loaded, sampling, max_new, stop
        self.engine = engine or Engine.of(loaded, EngineConfig(max_seqs=1))       # remembers what was said
        self.system, self.thinking = system, thinking
        self.messages: list[dict] = []
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, question: str) -> Iterator[Token]:
        """The tokens of the answer. Once they end, or the caller stops, question and answer belong to the conversation.

        UserError if the question alone does not fit; an earlier part that no longer fits is forgotten with a warning.
        """
        self.messages.append({"role": "user", "content": question})
        try:
            prompt = self.fit()
        except UserError:
            self.messages.pop()
            raise
        request = Request(prompt=prompt, sampling=self.sampling, max_new=self.max_new, stop=self.stop)
        text = ""
        try:
            for _, token in self.engine.stream([request]):
                text += token.text
                yield token
        finally:
            answer = parse_answer(OPENED[self.thinking] + text)
            self.messages.append({"role": "assistant"} | {k: v for k, v in answer.items() if v not in (None, [])})

    def fit(self) -> list[int]:
        """The ids of the prompt; forgets the oldest turns while they leave too little room for an answer."""
        limit = self.engine.limit
        head = 1 if self.system else 0
        while True:
            ids, _ = encode_chat(self.loaded.tokenizer, self.messages, generation_prompt=True, thinking=self.thinking,
                                 template=self.loaded.template)
            turns = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
            if len(ids) + min(self.max_new, limit // 4) <= limit or len(turns) == 1:
                break
            del self.messages[head:turns[1]]
            warn(f"the context of {limit} tokens is full; the oldest question and answer are forgotten")
        if len(ids) >= limit:
            raise UserError(f"the question has {len(ids)} tokens with its chat markup and the model's context is "
                            f"{limit}, which leaves no room for an answer; shorten it")
        return ids

    def retry(self) -> str | None:
        """Take back the last question and return it; another seed from here on."""
        turns = [i for i, m in enumerate(self.messages) if m["role"] == "user"]
        if not turns:
            return None
        question = self.messages[turns[-1]]["content"]
        del self.messages[turns[-1]:]
        self.sampling = replace(self.sampling, seed=self.sampling.seed + 1)
        return question

    def save(self, path: str) -> None:
        """Append the conversation as one row of a .jsonl file."""
        file = Path(path)
        before = read_text(file) if file.exists() else ""
        if before and not before.endswith("\n"):
            before += "\n"
        write_text(file, before + json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------------------------------------------------- from a pipe

def answer_lines(talk: Conversation, lines: TextIO, *, keep: bool) -> None:
    try:
        for line in lines:
            if question := line.strip():
                if not keep:
                    talk.reset()
                show_plain(talk.ask(question))
    except UnicodeDecodeError as error:
        raise not_unicode("the questions are", error) from None


def show_plain(tokens: Iterator[Token]) -> None:
    for token in tokens:
        print(printable(token.text), end="", flush=True)
    print(flush=True)


def printable(text: str) -> str:
    """Text without control characters, by which a model's answer could steer the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


# -------------------------------------------------------------------------------------------------------- in a terminal

def chat_in_terminal(talk: Conversation, options: Options) -> None:
    import readline  # noqa: F401                                 # line editing and history for input()
    config = talk.loaded.model.config
    parameters = sum(p.numel() for p in talk.loaded.model.parameters())
    console.print(f"[bold]{options.model}[/]  {parameters / 1e6:.1f}M parameters, context {config.seq_len} tokens; "
                  "/help lists the commands")
    while True:
        try:
            line = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        except UnicodeDecodeError as error:
            notes.print(f"error: {not_unicode('the line is', error)}", style="red", markup=False, soft_wrap=True)
            continue
        try:
            question = command(talk, line) if line.startswith("/") else line
            if question is Leave:
                return
            if question:
                show(talk.ask(question), console, thinking=talk.thinking is True)
        except UserError as error:
            notes.print(f"error: {error}", style="red", markup=False, soft_wrap=True)


class Leave:
    """What a command returns to end the chat."""


def command(talk: Conversation, line: str) -> str | type[Leave] | None:
    """Obey a line that begins with a slash. Returns a question to ask, `Leave`, or None."""
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    if word in ("/exit", "/quit", "/q"):
        return Leave
    if word == "/help":
        for name, what in COMMANDS.items():
            console.print(f"  {name:20} {what}", markup=False)
    elif word == "/reset":
        talk.reset()
        console.print("forgotten", style="dim")
    elif word == "/retry":
        if (question := talk.retry()) is None:
            raise UserError("there is no question to answer again")
        return question
    elif word == "/system":
        talk.system = rest
        talk.reset()
        console.print("a new conversation" + (" with this system prompt" if rest else ""), style="dim")
    elif word == "/think":
        if rest not in THINKING:
            raise UserError("/think takes on, off or auto")
        talk.thinking = THINKING[rest]
        console.print(f"thinking: {rest}", style="dim")
    elif word == "/set":
        talk.sampling = changed(talk.sampling, rest)
        console.print(str(talk.sampling), style="dim", markup=False)
    elif word == "/save":
        if not rest:
            raise UserError("/save takes the name of a .jsonl file")
        talk.save(rest)
        console.print(f"appended to {rest}", style="dim", markup=False)
    else:
        raise UserError(f"{word} is not a command; /help lists them")
    return None


def changed(sampling: Sampling, words: str) -> Sampling:
    name, _, value = words.partition(" ")
    if name not in vars(sampling):
        raise UserError(f"/set takes one of {', '.join(vars(sampling))} and a value")
    try:
        return replace(sampling, **{name: type(getattr(sampling, name))(value)})
    except (ValueError, TypeError):
        raise UserError(f"{name} must be a number, not {value!r}") from None


def show(tokens: Iterator[Token], out: Console, *, thinking: bool) -> None:
    """Print an answer as it comes, thoughts dimmed, and its speed; Ctrl-C ends the answer, not the chat."""
    count, started, since = 0, time.perf_counter(), None
    try:
        for token in tokens:
            since = since or time.perf_counter()              # reading the prompt does not count as writing
            count += 1
            thinking = (thinking or "<think>" in token.text) and token.text != "</think>"
            out.print(Text(printable(token.text), style="dim" if thinking or token.text == "</think>" else ""), end="",
                      soft_wrap=True)
            reason = token.finish
    except KeyboardInterrupt:
        reason = "interrupted"
        tokens.close()
    seconds = time.perf_counter() - (since or started)
    speed = f", {(count - 1) / seconds:.0f} tokens/s" if count > 1 and seconds > 0 else ""
    why = {"length": ", cut at --max-new", "context": ", the context is full", "interrupted": ", interrupted"}
    out.print(f"\n{count} tokens{speed}{why.get(reason, '')}", style="dim")
