"""Answers worth learning from: several are drawn to every prompt, and what is wrong with one decides whether it stays.

The same steps make a teacher's answers into a student's lessons (distillation from text, as of DeepSeek-R1's small
models, 2501.12948) and a policy's own right answers into its next lessons (rejection sampling: STaR, 2203.14465; RFT,
2308.01825). They differ in who answers, an engine here or a server (endpoint.py), and in what is kept.

A conversation of several turns is answered turn after turn, each in the light of the answers before it. Where tools
have answered, only the last turn is said anew: their results belong to the calls that were made. A turn that calls a
tool ends the conversation, as nobody carries the call out.

Results come in the order of the prompts, and an answer depends on its seed and on nothing beside it: a hash of the
run's seed, the number of the prompt and the number of the answer, so that another seed asks for other answers.
"""
from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from mindseed.base.errors import UserError
from mindseed.data.clean import fault
from mindseed.data.dedup import digest
from mindseed.data.shuffle import key_of
from mindseed.infer.engine import Engine, Request
from mindseed.infer.rows import Completion, TooLong
from mindseed.infer.sample import Sampling
from mindseed.rl.env import OPENED
from mindseed.rl.prompts import Prompt
from mindseed.tokenizers.chat import encode_chat, parse_answer, render_answer, to_json
from mindseed.tokenizers.template import Template

NEXT_TURN = 1_000_003                             # between the seeds of turns
SEEDS = 1 << 31                                   # what every server takes


def seed_of(seed: int, number: int, answer: int) -> int:
    return key_of(seed, 9, number, answer) % SEEDS


@dataclass(frozen=True, kw_only=True)
class Answer:
    """`messages` are the whole conversation, the last of them the answer; `text` is that turn as a model writes it,
    with its thoughts and calls, as graders read it."""

    messages: list[dict]
    text: str
    tokens: int = 0                               # of all turns that were written
    faulty: str = ""                              # why it should not be kept

    @property
    def message(self) -> dict:
        return self.messages[-1]


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What became of one prompt: the answers that are kept, and why others were dropped."""

    prompt: Prompt
    answers: list[Answer]
    dropped: Counter[str] = field(default_factory=Counter)
    tokens: int = 0


Keep = Callable[[Prompt, Answer], bool]


def sample_answers(engine: Engine, prompts: Iterable[Prompt], *, n: int = 1, sampling: Sampling = Sampling(),
                   keep: Keep | None = None, max_new: int = 512, stop: tuple[str, ...] = (),
                   template: Template | None = None, thinking: bool | None = None, every_turn: bool = False,
                   longest: int | None = None, first: int = 0) -> Iterator[Sampled]:
    """`n` answers to every prompt, as many at once as the engine writes.

    Dropped are those with a fault (data/clean.py; `longest` are characters), repetitions among the n, and what `keep`
    refuses. `first` is the number of the first prompt, for seeds. `every_turn` answers all turns of the user, else the
    last. The engine must have nothing else to do.
    """
    if n > engine.config.max_queue:
        raise UserError(f"n={n} answers to a prompt are more than the {engine.config.max_queue} that may wait")
    ahead = min(max(2, -(-2 * engine.config.max_seqs // n)), max(1, engine.config.max_queue // n))
    line: deque[tuple[Prompt, list[Talk]]] = deque()
    writing: dict[int, tuple[Talk, Completion]] = {}
    todo = enumerate(prompts, start=first)

    def ask(talk: Talk) -> None:
        """The next turn, until the conversation is over."""
        while talk.next_turn():
            ids = encode_chat(engine.tokenizer, talk.messages, tools=talk.prompt.tools, generation_prompt=True,
                              thinking=thinking, template=template)[0]
            try:
                id = engine.submit(Request(prompt=ids, sampling=replace(sampling, seed=talk.seed), max_new=max_new,
                                           stop=stop))
            except TooLong:
                talk.faulty = "prompt too long"
                continue
            writing[id] = talk, Completion()
            return

    try:
        while True:
            while len(line) < ahead and (following := next(todo, None)) is not None:
                number, prompt = following
                talks = [Talk(prompt, seed_of(sampling.seed, number, i), every_turn, longest) for i in range(n)]
                line.append((prompt, talks))
                for talk in talks:
                    ask(talk)
            while line and all(talk.over for talk in line[0][1]):
                yield settle(*line.popleft(), keep)
            if not line and not writing:
                return
            for id, token in engine.step() if writing else []:
                talk, written = writing[id]
                written.add(token)
                if token.finish is not None:
                    del writing[id]
                    text = (OPENED if thinking else "") + written.text
                    talk.hear(parse_answer(text), written.finish, len(written.ids), text)
                    ask(talk)
            for id in engine.failed.keys() & writing.keys():
                raise engine.failed.pop(id)
    finally:
        for id in writing:
            engine.cancel(id)


class Talk:
    """One conversation on its way: `messages` as far as it has come."""

    def __init__(self, prompt: Prompt, seed: int, every_turn: bool, longest: int | None) -> None:
        self.prompt, self.seed, self.longest = prompt, seed - NEXT_TURN, longest
        self.left = deque(turns_of(prompt.messages, every_turn))
        self.messages: list[dict] = []
        self.text, self.tokens, self.faulty, self.over = "", 0, "", False

    def next_turn(self) -> bool:
        """Append what is to be answered next; False: the conversation is over."""
        self.over = not self.left or bool(self.faulty) or bool(self.messages and self.messages[-1].get("tool_calls"))
        if not self.over:
            self.messages += self.left.popleft()
            self.seed = (self.seed + NEXT_TURN) % SEEDS
        return not self.over

    def hear(self, turn: dict[str, Any], finish: str, tokens: int, text: str | None = None) -> None:
        """The answer to the turn before: content, reasoning_content, tool_calls."""
        message = {"role": "assistant", "content": turn.get("content") or ""}
        message |= {key: turn[key] for key in ("reasoning_content", "tool_calls") if turn.get(key)}
        self.messages.append(message)
        self.tokens += tokens
        self.text = "".join(span.text for span in render_answer(message)) if text is None else text
        self.faulty = fault(message, finish, tools=bool(self.prompt.tools), longest=self.longest)


def turns_of(messages: list[dict], every_turn: bool) -> list[list[dict]]:
    """The conversation in pieces, after each of which the assistant is to speak. Its own turns fall out where they
    answer a user, or end it."""
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not every_turn or any(message["role"] == "tool" for message in messages):
        return [messages]
    pieces: list[list[dict]] = [[]]
    for message in messages:
        if message["role"] == "assistant" and any(m["role"] == "user" for m in pieces[-1]):
            pieces.append([])
        elif message["role"] != "assistant" or pieces[-1] or len(pieces) == 1:
            pieces[-1].append(message)
    return [piece for piece in pieces if piece]


def settle(prompt: Prompt, talks: list[Talk], keep: Keep | None) -> Sampled:
    """What is kept of the conversations about one prompt."""
    kept, dropped, seen = [], Counter(), set()
    for talk in talks:
        answer = Answer(messages=talk.messages, text=talk.text, tokens=talk.tokens, faulty=talk.faulty)
        mark = digest(to_json(answer.messages))
        why = answer.faulty or ("repeated" if mark in seen else "")
        seen.add(mark)
        if not why and keep is not None and not keep(prompt, answer):
            why = "refused"
        if why:
            dropped[why] += 1
        else:
            kept.append(answer)
    return Sampled(prompt=prompt, answers=kept, dropped=dropped, tokens=sum(talk.tokens for talk in talks))
