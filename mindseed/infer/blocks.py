"""Blocks of the cache: who holds them, and which of them hold a text that may come again.

A cache that gave every sequence room for the longest possible answer would be mostly empty. So the memory is cut into
blocks of a few tokens, and a sequence owns a table of block numbers that grows as it does (PagedAttention, 2309.06180).
Blocks are counted, so that several sequences may hold the same one: answers to one prompt, or requests that begin with
the same system prompt. A block that is full and that somebody may share is never written again; whoever must write into
one gets a copy first (copy-on-write).

A full block has a name: the hash of its tokens and of the name of the block before it, so that equal names mean equal
texts from the beginning on. Blocks that nobody holds keep their contents and names until they are needed for something
else, the longest unused first; a new request that begins with the same text finds them and need not compute them.

Everything here is about integers; `paged.py` has the tensors.
"""
from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable


class Blocks:
    """The blocks of all layers that look equally far back. Number 0 belongs to nobody: pads are written there."""

    def __init__(self, count: int, block_size: int, window: int | None = None) -> None:
        self.count, self.block_size, self.window = count, block_size, window
        self.holders = [0] * count
        self.idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, count))     # the longest unused first
        self.name_of: dict[int, bytes] = {}
        self.named: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody holds; some of them still remember a text."""
        return len(self.idle)

    def take(self) -> int:
        """A block to write into, held once. The caller has made sure that there is one."""
        block, _ = self.idle.popitem(last=False)
        self.forget(block)
        self.holders[block] = 1
        return block

    def hold(self, block: int) -> None:
        """One holder more, perhaps of a block that was idle."""
        self.idle.pop(block, None)
        self.holders[block] += 1

    def drop(self, block: int) -> None:
        """One holder less. A block without a name is the next to be used again, one with a name the last."""
        self.holders[block] -= 1
        assert self.holders[block] >= 0, f"block {block} was dropped more often than held"
        if not self.holders[block]:
            self.idle[block] = None
            if block not in self.name_of:
                self.idle.move_to_end(block, last=False)

    def writable(self, block: int) -> bool:
        """Whether its only holder may write into it: nobody else reads it, now or by its name."""
        return self.holders[block] == 1 and block not in self.name_of

    def name(self, block: int, name: bytes) -> None:
        """Remember what a full block holds. If another one already holds the same, that one stays the one found."""
        if block not in self.name_of and name not in self.named:
            self.name_of[block], self.named[name] = name, block

    def find(self, name: bytes) -> int | None:
        return self.named.get(name)

    def forget(self, block: int) -> None:
        if (name := self.name_of.pop(block, None)) is not None:
            del self.named[name]

    def forget_all(self, blocks: Iterable[int] | None = None) -> None:
        """No text of these is found again [of all: the weights have changed]."""
        for block in list(self.name_of) if blocks is None else blocks:
            self.forget(block)

    def out_of_sight(self, next_position: int) -> int:
        """How many blocks from the beginning no query at or after this position can see."""
        return 0 if self.window is None else max(next_position - self.window + 1, 0) // self.block_size

    def check(self, tables: Iterable[list[int]]) -> None:
        """Every block is held as often as it stands in the tables, and is idle if in none. For tests."""
        counted = [0] * self.count
        for table in tables:
            for block in table:
                counted[block] += block != 0
        assert counted == self.holders, f"held {self.holders}, but the tables say {counted}"
        assert set(self.idle) == {b for b in range(1, self.count) if not counted[b]}, "idle blocks are held, or lost"
        assert {v: k for k, v in self.name_of.items()} == self.named, "names and blocks do not agree"


def salt_of(adapter: str | None) -> bytes:
    """What tells texts apart that were computed with different adapters."""
    return b"" if adapter is None else hashlib.blake2b(adapter.encode(), digest_size=16).digest()


def extend_names(names: list[bytes], ids: list[int], block_size: int, salt: bytes = b"") -> list[bytes]:
    """Append to `names` those of the full blocks of `ids` that it does not have yet, and return it.

    `salt` tells texts apart that were computed by other weights.
    """
    for start in range(len(names) * block_size, len(ids) - block_size + 1, block_size):
        before = names[-1] if names else salt
        names.append(hashlib.blake2b(before + array("q", ids[start:start + block_size]).tobytes(),
                                     digest_size=16).digest())
    return names
