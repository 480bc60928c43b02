"""What every byte-level tokenizer shares: special tokens, decoding, and the promise that text stays text.

A byte-level vocabulary holds all 256 bytes, so any text has ids and nothing is ever "unknown". On top of the bytes
come special tokens, which mark structure (where a document ends, who is speaking). They are control signals, so the
text of a user or of a web page must not be able to produce them: `encode("<|im_end|>")` spells the marker out in
ordinary tokens, and only `allow_special=True`, or an id that a program puts in, makes the special one. (Hugging
Face's tokenizers do parse markers in any text; that is the one place where we differ from them, on purpose.)
"""
from __future__ import annotations

import codecs
import hashlib
import json
import re
from abc import ABC, abstractmethod
from typing import Any, Collection, Iterator

from mindseed.base.errors import UserError

PAD, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2                  # in our own vocabularies; others: tokenizer.specials[EOS]

# Markup that programs parse out of an answer. It stays visible when special tokens are skipped in decoding.
MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
MEDIA = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
         "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>")
BUFFERS = tuple(f"<|buffer_{i}|>" for i in range(19))     # free ids: a later token needs no new embedding matrix
SPECIALS = (PAD, BOS, EOS, *MARKUP, *MEDIA, *BUFFERS)     # 36 spellings; the position is the id

# One character for each special token that is looked for in an answer, so that it can't be mixed up with text that
# spells it. They are noncharacters of Unicode, which no text holds; should bytes of an answer say one, it is U+FFFD.
SIGNS = {mark: chr(0xFDD0 + i) for i, mark in enumerate(("<think>", "</think>", "<tool_call>", "</tool_call>", EOS))}
SPELLED = {ord(sign): mark for mark, sign in SIGNS.items()}
NO_SIGNS = dict.fromkeys(SPELLED, "\ufffd")

# What stands at a document's beginning and end, here and in Qwen, in Llama 3, DeepSeek, Llama 2 and GPT-2.
DOCUMENT_MARKS = ((BOS, EOS), ("<|begin_of_text|>", "<|end_of_text|>"),
                  ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"), ("<s>", "</s>"), (PAD, PAD))


def document_marks(specials: Collection[str]) -> tuple[str, str] | None:
    """Spellings of the special tokens at the beginning and the end of a document; None if the tokenizer has none."""
    return next((marks for marks in DOCUMENT_MARKS if all(mark in specials for mark in marks)), None)


class ByteLevel(ABC):
    """A vocabulary of byte strings plus special tokens. Subclasses say how plain text becomes ids.

    `tokens[id]` is the byte string of an ordinary token. Ids may have gaps (foreign vocabularies do);
    `vocab_size` is one more than the largest id, the rows an embedding needs.
    """

    def __init__(self, tokens: dict[int, bytes], specials: dict[str, int], visible: frozenset[str]) -> None:
        if clash := sorted(set(tokens) & set(specials.values())):
            raise UserError(f"ids {clash[:5]} are both ordinary and special tokens; a vocabulary needs one of the two")
        self.tokens = tokens
        self.specials = specials
        self.visible = visible & specials.keys()
        self.vocab_size = max([*tokens, *specials.values()]) + 1
        self._spelling = {id: spelling.encode() for spelling, id in specials.items()}
        self._hidden = {id for spelling, id in specials.items() if spelling not in self.visible}
        longest_first = sorted(specials, key=len, reverse=True)
        self._marker = re.compile("|".join(map(re.escape, longest_first))) if specials else re.compile(r"(?!)")

    @abstractmethod
    def encode_plain(self, text: str) -> list[int]:
        """Ids of text in which nothing is special."""

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of many texts in which nothing is special: the same as `encode` of each, in bulk."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Everything that decides which ids a text gets, as plain JSON values."""

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of a text. With `allow_special` the spelling of a special token becomes it, the longest match first."""
        require_unicode(text)
        if not allow_special:
            return self.encode_plain(text)
        ids = []
        for part, special in self.parts(text):
            ids += [self.specials[part]] if special else self.encode_plain(part)
        return ids

    def parts(self, text: str) -> Iterator[tuple[str, bool]]:
        """The text cut at every spelling of a special token, the longest first: (part, whether it is one)."""
        start = 0
        for match in self._marker.finditer(text):
            if start < match.start():
                yield text[start:match.start()], False
            yield match[0], True
            start = match.end()
        if start < len(text):
            yield text[start:], False

    def decode(self, ids: list[int], *, skip_special: bool = False) -> str:
        """Text of ids; bytes that are not valid UTF-8 become U+FFFD.

        `skip_special` drops the special tokens, all but the `visible` ones (`<think>`, `<tool_call>`, ...), which are
        part of an answer. An id outside the vocabulary raises UserError.
        """
        return b"".join(self.token_bytes(id, skip_special=skip_special) for id in ids).decode("utf-8", "replace")

    def token_bytes(self, id: int, *, skip_special: bool = False) -> bytes:
        if id in self._spelling:
            return b"" if skip_special and id in self._hidden else self._spelling[id]
        if id not in self.tokens:
            raise UserError(f"id {id} is not in this tokenizer's vocabulary of {self.vocab_size}; "
                            "the ids come from another tokenizer or from a model with a larger vocabulary")
        return self.tokens[id]

    @property
    def pad_id(self) -> int:
        return self._special(PAD)

    @property
    def bos_id(self) -> int:
        return self._special(BOS)

    @property
    def eos_id(self) -> int:
        return self._special(EOS)

    def _special(self, spelling: str) -> int:
        if spelling not in self.specials:
            raise UserError(f"this tokenizer has no special token {spelling}; it cannot mark documents or speakers")
        return self.specials[spelling]

    def hash(self) -> str:
        """sha256 of all that decides the ids; equal hashes mean equal ids on every text."""
        vocabulary = {
            "tokens": [[id, token.hex()] for id, token in sorted(self.tokens.items())],
            "specials": sorted(self.specials.items()),
            **self.spec(),
        }
        return hashlib.sha256(json.dumps(vocabulary, sort_keys=True).encode()).hexdigest()


class Stream:
    """Decode ids one at a time. A character whose bytes are not all there yet is held back.

    The pieces that `push` returns, and the rest from `close`, join to `tokenizer.decode(ids)`; with `signs`, special
    tokens that have one come as that (`without_signs` spells them).
    """

    def __init__(self, tokenizer: ByteLevel, *, skip_special: bool = False, signs: bool = False) -> None:
        self.tokenizer = tokenizer
        self.skip_special = skip_special
        known = tokenizer.specials if signs else {}
        self._signs = {known[mark]: sign for mark, sign in SIGNS.items() if mark in known}
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        if id in self._signs:
            return self.close() + self._signs[id]
        text = self._utf8.decode(self.tokenizer.token_bytes(id, skip_special=self.skip_special))
        return text.translate(NO_SIGNS) if self._signs else text

    def close(self) -> str:
        """What was held back, as U+FFFD: the ids ended inside a character."""
        return self._utf8.decode(b"", final=True)


def with_signs(text: str, specials: Collection[str]) -> str:
    """The text with these special tokens as signs."""
    for mark, sign in SIGNS.items():
        text = text.replace(mark, sign) if mark in specials else text
    return text


def without_signs(text: str) -> str:
    return text.translate(SPELLED)


def require_unicode(text: str) -> None:
    """Refuse lone surrogates, which JSON's \\ud800 escapes can smuggle into a Python string: they have no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the text is not valid Unicode: a lone surrogate U+{ord(text[error.start]):04X} at character "
                        f"{error.start}; remove it or repair the file's encoding") from None


def special_ids(spellings: tuple[str, ...] = SPECIALS) -> dict[str, int]:
    """Special tokens in the order given, from id 0."""
    if repeated := [s for s in spellings if spellings.count(s) > 1 or not s]:
        raise UserError(f"special tokens must be non-empty and differ; look at {sorted(set(repeated))}")
    return {spelling: id for id, spelling in enumerate(spellings)}


def require_bytes(tokens: dict[int, bytes]) -> dict[int, int]:
    """byte -> id. Raises UserError unless all 256 single bytes are tokens, so that every text can be encoded."""
    ids = {token[0]: id for id, token in tokens.items() if len(token) == 1}
    if missing := [f"{b:02X}" for b in range(256) if b not in ids]:
        raise UserError(f"the vocabulary lacks {len(missing)} of the 256 bytes ({' '.join(missing[:8])} ...), "
                        "so some texts would have no ids; only complete byte-level vocabularies can be used")
    return ids
