"""The simplest tokenizer that loses nothing: one token per byte of UTF-8.

No training, 256 tokens, any text; but an English letter costs one token and a Chinese character three, so sequences
are long. It is the floor that BPE climbs from, and the tokenizer for tests that must not depend on training.
"""
from __future__ import annotations

from typing import Any

from mindseed.tokenizers.base import MARKUP, SPECIALS, ByteLevel, require_unicode, special_ids


class Byte(ByteLevel):
    """Byte b has id `len(specials) + b`."""

    def __init__(self, specials: tuple[str, ...] = SPECIALS, visible: frozenset[str] = frozenset(MARKUP)) -> None:
        self.first = len(specials)
        super().__init__({self.first + b: bytes([b]) for b in range(256)}, special_ids(specials), visible)

    def encode_plain(self, text: str) -> list[int]:
        return [self.first + b for b in text.encode()]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        for text in texts:
            require_unicode(text)
        return [self.encode_plain(text) for text in texts]

    def spec(self) -> dict[str, Any]:
        return {"merges": [], "splits": [], "nfc": False, "whole_words": False}
