"""Byte-level byte-pair encoding: start from bytes, merge the pair that was learnt first, until none is left.

Training (bpe_train.py) leaves an ordered list of merges; the position in the list is the merge's rank. Encoding
replays it: within each piece that split.py cuts, the adjacent pair of lowest rank is merged, again and again. Frequent
words end as one token, rare ones as several, and since the 256 bytes are tokens nothing is unknown.

Neural machine translation of rare words with subword units (1508.07909); on bytes since GPT-2. `encode` is the
readable form, `encode_batch` the same merges in the Rust `tokenizers`, several times faster; a test proves them equal.
"""
from __future__ import annotations

import heapq
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from mindseed.base.errors import UserError
from mindseed.tokenizers.base import MARKUP, SPECIALS, ByteLevel, require_bytes, require_unicode, special_ids
from mindseed.tokenizers.split import Splitter

CACHE_PIECES = 1 << 16                            # words repeat: the ids of this many are remembered,
CACHE_CHARS = 32                                  # unless they are long, for then they hardly return

# GPT-2's printable stand-ins for bytes, in which tokenizer.json spells tokens: visible Latin-1 stands for itself,
# the other 68 bytes for U+0100 and on. BYTE_ORDER sorts bytes by their stand-in: the order of their ids.
_PLAIN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_ORDER = [*_PLAIN, *(b for b in range(256) if b not in _PLAIN)]
STAND_IN = {b: chr(b if i < len(_PLAIN) else 0x100 + i - len(_PLAIN)) for i, b in enumerate(BYTE_ORDER)}


class BPE(ByteLevel):
    """Byte-level BPE over any numbering of tokens.

    `merges[rank] = (left id, right id)`; the result is the token whose bytes are both joined. `whole_words` takes a
    piece that is itself a token without replaying merges (Llama 3's `ignore_merges`). UserError if a merge speaks of
    a token that does not exist, or makes a special one.
    """

    def __init__(self, tokens: dict[int, bytes], merges: list[tuple[int, int]], *, specials: dict[str, int],
                 visible: frozenset[str] = frozenset(MARKUP), splitter: Splitter | None = None,
                 whole_words: bool = False) -> None:
        super().__init__(tokens, specials, visible)
        self.merges = merges
        self.splitter = splitter or Splitter()
        self.whole_words = whole_words
        self._byte_ids = require_bytes(tokens)
        self._ids = {token: id for id, token in tokens.items()}
        if len(self._ids) != len(tokens):
            raise UserError("two tokens of the vocabulary have the same bytes")
        self._ranks: dict[tuple[int, int], tuple[int, int]] = {}          # pair -> (rank, id of the merged token)
        for rank, (a, b) in enumerate(merges):
            merged = self._ids.get(tokens[a] + tokens[b]) if a in tokens and b in tokens else None
            if merged is None:
                raise UserError(f"merge {rank} joins ids {a} and {b}, but they or their union are no ordinary tokens")
            self._ranks[a, b] = rank, merged
        self._cache: dict[str, list[int]] = {}
        self._bulk: Tokenizer | None = None

    @classmethod
    def from_merges(cls, merges: list[tuple[int, int]], *, specials: tuple[str, ...] = SPECIALS,
                    visible: frozenset[str] = frozenset(MARKUP), splitter: Splitter | None = None) -> BPE:
        """Our own numbering: special tokens from id 0, the bytes in BYTE_ORDER, then one id per new token.

        A merge whose bytes are a token already (reached another way) takes no new id.
        """
        tokens = {len(specials) + i: bytes([b]) for i, b in enumerate(BYTE_ORDER)}
        known = set(tokens.values())
        for a, b in merges:
            if (token := tokens[a] + tokens[b]) not in known:
                tokens[len(specials) + len(tokens)] = token
                known.add(token)
        return cls(tokens, merges, specials=special_ids(specials), visible=visible, splitter=splitter)

    def encode_plain(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in self.splitter(text):
            known = self._cache.get(piece)
            if known is None:
                known = self.encode_piece(piece.encode())
                if len(self._cache) >= CACHE_PIECES:
                    self._cache.clear()
                if len(piece) <= CACHE_CHARS:
                    self._cache[piece] = known
            ids += known
        return ids

    def encode_piece(self, piece: bytes) -> list[int]:
        """Replay the merges within one piece: lowest rank first, leftmost first among equals.

        The tokens form a linked list and the candidate pairs a heap, so n bytes cost O(n log n) even where a piece is
        a megabyte of one letter. A candidate is checked when it is popped, for its neighbours may have merged since.
        """
        if self.whole_words and piece in self._ids:
            return [self._ids[piece]]
        ids: list[int | None] = [self._byte_ids[b] for b in piece]        # None: merged into the token to its left
        before, after = list(range(-1, len(ids) - 1)), list(range(1, len(ids) + 1))
        heap = [(self._ranks[pair][0], i, self._ranks[pair][1])           # (rank, position, merged id)
                for i, pair in enumerate(zip(ids, ids[1:])) if pair in self._ranks]
        heapq.heapify(heap)
        while heap:
            _, i, merged = heapq.heappop(heap)
            j = after[i]
            if ids[i] is None or j == len(ids) or self._ranks.get((ids[i], ids[j]), (0, None))[1] != merged:
                continue                                                  # outdated
            ids[i], ids[j], after[i] = merged, None, after[j]
            if after[j] < len(ids):
                before[after[j]] = i
            for left, right in ((before[i], i), (i, after[i])):
                if left >= 0 and right < len(ids) and (ids[left], ids[right]) in self._ranks:
                    rank, union = self._ranks[ids[left], ids[right]]
                    heapq.heappush(heap, (rank, left, union))
        return [id for id in ids if id is not None]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """As `encode` of each text, through the Rust library, in parallel over texts."""
        if self._bulk is None:
            self._bulk = self._rust()
        try:
            return [e.ids for e in self._bulk.encode_batch_fast(texts, add_special_tokens=False)]
        except (UnicodeEncodeError, TypeError):
            for text in texts:
                require_unicode(text)
            raise

    def _rust(self) -> Tokenizer:
        """Our vocabulary and merges as a Rust tokenizer that knows no special tokens, so none can arise."""
        spell = {id: spell_bytes(token) for id, token in self.tokens.items()}
        model = models.BPE(vocab={spelling: id for id, spelling in spell.items()},
                           merges=[(spell[a], spell[b]) for a, b in self.merges], ignore_merges=self.whole_words)
        rust = Tokenizer(model)
        if self.splitter.nfc:
            rust.normalizer = normalizers.NFC()
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        rust.pre_tokenizer = pre_tokenizers.Sequence([self.splitter.rust, byte_level])
        return rust

    def spec(self) -> dict[str, Any]:
        return {"merges": [list(pair) for pair in self.merges], "splits": list(self.splitter.steps),
                "nfc": self.splitter.nfc, "whole_words": self.whole_words}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_bulk": None, "_cache": {}}


def spell_bytes(token: bytes) -> str:
    """A token in tokenizer.json's spelling, e.g. b" the" as "\u0120the"."""
    return "".join(STAND_IN[b] for b in token)
