"""How byte-pair encoding arrives at its tokens, one merge at a time: to look at, not to encode with.

`replay` goes over a piece as bpe.py says it should, in the plainest way (find the pair of lowest rank, merge the
leftmost one, begin again), and keeps every state in between. It costs O(n^2) where the encoder takes O(n log n), and
ends at the same tokens, which a test holds it to.
"""
from __future__ import annotations

from dataclasses import dataclass

from mindseed.tokenizers.base import ByteLevel
from mindseed.tokenizers.bpe import BPE


@dataclass(frozen=True, kw_only=True)
class Step:
    """A state of the piece, and the merge that led to it."""

    ids: tuple[int, ...]
    at: int | None = None            # which of `ids` is new; None: the bytes, before any merge
    rank: int | None = None          # of the merge: the how-manieth one that was learnt


def replay(tokenizer: BPE, piece: bytes) -> list[Step]:
    """The states of a piece from single bytes to tokens. A vocabulary may hold whole words that no merge makes."""
    whole = tokenizer._ids.get(piece) if tokenizer.whole_words else None
    if whole is not None:
        return [Step(ids=(whole,))]
    steps = [Step(ids=tuple(tokenizer._byte_ids[b] for b in piece))]
    while True:
        ids = steps[-1].ids
        known = [(tokenizer._ranks[pair][0], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in tokenizer._ranks]
        if not known:
            return steps
        rank, i = min(known)
        merged = tokenizer._ranks[ids[i], ids[i + 1]][1]
        steps.append(Step(ids=(*ids[:i], merged, *ids[i + 2:]), at=i, rank=rank))


def birth(tokenizer: ByteLevel, id: int) -> list[Step] | None:
    """The merges that make the token `id` of its bytes; None: it is special, or no merge makes it."""
    if not isinstance(tokenizer, BPE) or id not in tokenizer.tokens:
        return None
    steps = replay(tokenizer, tokenizer.tokens[id])
    return steps if steps[-1].ids == (id,) else None
