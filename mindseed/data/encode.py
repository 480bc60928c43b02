"""Rows into documents: what a worker process of `prepare` does with a chunk of a file.

A text becomes `[begin] + ids + [end]`, a conversation what the one chat renderer makes of it, with the mask of what is
to be learned; a preference row becomes two conversations, chosen then rejected, of which only what follows the prompt
that they share is learned, as with an answer that was judged by itself. A chunk is encoded by one call of the bulk
encoder. Which split a row falls into is decided by a hash of its content and nothing else: it does not depend on
order, on the file or on the number of workers, and equal rows never end up on both sides.
"""
from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Iterator

import numpy as np

from mindseed.base.errors import UserError
from mindseed.data import fim
from mindseed.data.formats import BadRow, json_type, parse, payloads
from mindseed.data.readers import kind_of
from mindseed.tokenizers.base import DOCUMENT_MARKS, document_marks
from mindseed.tokenizers.chat import Span, encode_spans, normalise, render
from mindseed.tokenizers.template import Template

CHUNK_BYTES, CHUNK_ROWS = 1 << 20, 2048           # one unit of work: whichever comes first
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Chunk:
    """Some consecutive payloads of one file."""

    source: int
    path: Path
    payloads: list[tuple[int, Any]]               # (line, payload)


@dataclass
class Pieces:
    """Documents of one split and one chunk, as the columns of a shard."""

    ids: np.ndarray
    trainable: np.ndarray | None
    columns: dict[str, np.ndarray]                # lengths, bytes, chat, source, line; label where answers are judged


@dataclass
class Encoded:
    """What became of a chunk."""

    source: int
    rows: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    supervised: dict[str, int] = field(default_factory=dict)          # split -> tokens that are learned
    splits: dict[str, Pieces] = field(default_factory=dict)
    skipped: list[tuple[int, str]] = field(default_factory=list)      # (line, reason)


def chunks(paths: list[Path]) -> Iterator[Chunk]:
    """The files cut into units of work; the cuts depend on nothing but the files."""
    for source, path in enumerate(paths):
        held, size = [], 0
        for line, payload in payloads(path):
            held.append((line, payload))
            size += len(payload) if isinstance(payload, bytes) else 0
            if size >= CHUNK_BYTES or len(held) >= CHUNK_ROWS:
                yield Chunk(source, path, held)
                held, size = [], 0
        if held:
            yield Chunk(source, path, held)


@dataclass(frozen=True)
class Encoder:
    """Encodes chunks. `heldout` is the share of rows kept apart, chosen with `seed`; `fim_rate` is that of the texts to
    train on that are told with their middle last; `template` is how conversations are told [our own format]."""

    tokenizer: Any
    heldout: float
    seed: int
    fim_rate: float = 0.0
    template: Template | None = None

    def split_of(self, canonical: str) -> str:
        digest = hashlib.blake2b(canonical.encode(), digest_size=8, key=str(self.seed).encode()).digest()
        return "heldout" if int.from_bytes(digest, "big") < self.heldout * 2.0 ** 64 else "train"

    def __call__(self, chunk: Chunk) -> Encoded:
        done, labels = Encoded(chunk.source), {}
        texts, chats = [], []                     # (line, split, text), (line, split, kind, sides, known)
        for line, payload in chunk.payloads:
            done.rows += 1
            try:
                row = parse(chunk.path, payload)
                kind = kind_of(row)
                if kind == "text":
                    texts.append((line, self.split_of(_encodable(row["text"])), row["text"]))
                else:
                    sides, known = conversations(row, kind)
                    canonical = _encodable(json.dumps(sides, ensure_ascii=False, sort_keys=True))
                    chats.append((line, self.split_of(canonical), kind, sides, known))
                    if kind == "unpaired":
                        labels[line] = truth(row["label"])
            except BadRow as reason:
                done.skipped.append((line, str(reason).encode(errors="backslashreplace").decode()))
            else:
                done.kinds[kind] = done.kinds.get(kind, 0) + 1
        documents = self._texts(texts) + self._chats(chats, done)
        documents.sort(key=lambda document: document[0])              # by line; stable, so pairs stay together
        for split in SPLITS:
            if mine := [document for document in documents if document[1] == split]:
                done.splits[split] = self.pieces(mine, chunk.source, labels)
                done.supervised[split] = sum(
                    len(ids) - 1 if mask is None else sum(mask[1:]) for _, _, ids, mask, _ in mine)
        done.skipped.sort()
        return done

    def _texts(self, texts: list) -> list[tuple]:
        cut = [fim.chosen(text, self.fim_rate, self.seed) if self.fim_rate and split == "train" else None
               for _, split, text in texts]
        pieces = [part for (_, _, text), parts in zip(texts, cut) for part in parts or (text,)]
        encoded = iter(self.tokenizer.encode_batch(pieces) if pieces else [])
        bos, eos = (self.tokenizer.specials[mark] for mark in require_marks(self.tokenizer))
        marks = fim.markers(self.tokenizer) if self.fim_rate else (0, 0, 0)
        documents = []
        for (line, split, text), parts in zip(texts, cut):
            ids = fim.fim_ids(tuple(next(encoded) for _ in parts), marks) if parts else next(encoded)
            documents.append((line, split, [bos, *ids, eos], None, len(text.encode())))
        return documents

    def _chats(self, chats: list, done: Encoded) -> list[tuple]:
        told = []                                 # (line, split, kind, the spans of its documents)
        for line, split, kind, sides, known in chats:
            try:
                group = [lesson for messages, tools in sides
                         for lesson in self._lessons(messages, tools, known)[None if kind == "chat" else -1:]]
            except UserError as error:
                self._drop(done, line, kind, str(error))
                continue
            if kind == "preference" and group[0] == group[1]:
                self._drop(done, line, kind, EQUAL)
            else:
                told.append((line, split, kind, group))
        encoded = iter(encode_spans(self.tokenizer, [spans for *_, group in told for spans in group]))
        documents = []
        for line, split, kind, group in told:
            made = [(line, split, *next(encoded), sum(len(span.text.encode()) for span in spans
                                                      if span.trainable and not span.control)) for spans in group]
            some = [document for document in made if any(document[3][1:])]
            if not some or kind == "preference" and len(some) < 2:
                self._drop(done, line, kind, "no token of the assistant to learn")
            else:
                documents.extend(some)
        return documents

    def _lessons(self, messages: list[dict], tools: Any, known: int) -> list[list[Span]]:
        """The documents of a conversation whose first `known` messages are only read: one, or more in a template that
        rewrites the past, the last with its end."""
        if self.template is not None:
            return self.template.lessons(self.tokenizer, messages, tools=tools, first=known)
        spans = render(messages, tools=tools)
        read = len(render(messages[:known], tools=tools)) if known else 0
        return [[replace(span, trainable=False) for span in spans[:read]] + spans[read:]]

    @staticmethod
    def _drop(done: Encoded, line: int, kind: str, reason: str) -> None:
        done.skipped.append((line, reason))
        done.kinds[kind] -= 1

    def pieces(self, documents: list[tuple], source: int, labels: dict[int, bool] | None = None) -> Pieces:
        """`labels` are those of judged answers, by their lines."""
        dtype = np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.uint32
        lines, _, ids, masks, sizes = zip(*documents)
        trainable = None
        if any(mask is not None for mask in masks):
            trainable = np.concatenate([np.ones(len(i), np.uint8) if mask is None else np.asarray(mask, np.uint8)
                                        for i, mask in zip(ids, masks)])
        judged = {"label": np.array([labels.get(line, True) for line in lines], np.uint8)} if labels else {}
        return Pieces(np.concatenate([np.array(i, dtype) for i in ids]), trainable, judged | {
            "lengths": np.array([len(i) for i in ids], np.int64),
            "bytes": np.array(sizes, np.int64),
            "chat": np.array([mask is not None for mask in masks], np.uint8),
            "source": np.full(len(ids), source, np.int32),
            "line": np.array(lines, np.int64)})


def require_marks(tokenizer: Any) -> tuple[str, str]:
    if marks := document_marks(tokenizer.specials):
        return marks
    raise UserError("this tokenizer has no special tokens for the beginning and the end of a document; known are "
                    f"{', '.join(map(' '.join, DOCUMENT_MARKS))}. Train one with `mindseed tokenizer`")


def _encodable(text: str) -> str:
    """The text itself; BadRow if it holds half a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"the text holds half a character (a lone surrogate) at position {error.start}") from None
    return text


# ------------------------------------------------------------------------------------------ rows into conversations

EQUAL = "chosen and rejected are the same, so neither is preferred"
Conversation = tuple[list[dict], Any]             # messages, tools


def conversations(row: dict, kind: str) -> tuple[list[Conversation], int]:
    """(the conversations of a row: one, or for a preference row chosen and rejected; how many messages of each are only
    read). Raises BadRow."""
    if kind == "steps":
        raise BadRow("rewards of steps are trained on from the file itself, without preparing it")
    if kind == "chat":
        return [conversation(row, "")], 0
    if kind == "unpaired":
        truth(row["label"])
        one = conversation(_side(row, "completion"), "prompt and completion: ")
        return [one], require_answers({"completion": one[0]}, prompt_length(one[0]))
    chosen, rejected = (conversation(_side(row, name), f"{name}: ") for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise BadRow(EQUAL)
    if chosen[1] != rejected[1]:
        raise BadRow("chosen and rejected have different tools, so they do not answer the same prompt")
    differ = (i for i, (a, b) in enumerate(zip(chosen[0], rejected[0])) if a != b)
    known = next(differ, min(len(chosen[0]), len(rejected[0])))
    return [chosen, rejected], require_answers({"chosen": chosen[0], "rejected": rejected[0]}, known)


def conversation(row: dict, where: str) -> Conversation:
    try:
        messages, tools = normalise(row)
    except (UserError, ValueError, TypeError, KeyError) as error:
        raise BadRow(f"{where}not a conversation: {error}") from None
    if not any(message.get("role") == "assistant" for message in messages):
        raise BadRow(f"{where}no assistant turn, so there is nothing to learn")
    return messages, tools


def prompt_length(messages: list[dict]) -> int:
    """Messages up to the last question; what follows is the answer, with the calls of tools on its way."""
    asked = [i for i, message in enumerate(messages) if message["role"] not in ("assistant", "tool")]
    return asked[-1] + 1 if asked else 0


def require_answers(sides: dict[str, list[dict]], known: int) -> int:
    """`known`, if the first so many messages are a prompt and what follows on every side is an answer to it."""
    if any(prompt_length(messages) > known for messages in sides.values()):
        raise BadRow(f"chosen and rejected have no prompt in common: message {known} differs, before the last answer")
    for name, messages in sides.items():
        if not known:
            raise BadRow(f"{name} answers no prompt")
        if not messages[known:] or messages[-1]["role"] != "assistant":
            raise BadRow(f"{name} ends without an answer{'' if messages[known:] else ' of its own'}")
        if messages[known]["role"] != "assistant":
            raise BadRow(f"chosen and rejected differ in message {known}, a tool's result, which nobody chose")
    return known


def truth(label: Any) -> bool:
    if type(label) is not bool and label not in (0, 1):
        raise BadRow(f'"label" must be true (desirable) or false, not {json_type(label)}')
    return bool(label)


def _answers(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"


def _side(row: dict, name: str) -> dict:
    """A side of a preference row, or a judged completion, as a conversation: a list of messages, or an answer to the
    row's prompt."""
    value, prompt = row[name], row.get("prompt")
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}] if prompt else []
    if isinstance(value, str) and before:
        return {"messages": [*before, {"role": "assistant", "content": value}]}
    if isinstance(value, list):
        return {"messages": value if value and not _answers(value[0]) else [*before, *value]}
    raise BadRow(f'"{name}" must be a list of messages, or an answer beside a "prompt"')


