"""Blocks of the cache against a plain model of what they promise."""
from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mindseed.infer.blocks import Blocks, extend_names

COUNT = 7
NAMES = [bytes([i]) for i in range(9)]


class BlocksMachine(RuleBasedStateMachine):
    """Holders with lists of blocks; names of what is in them; idle blocks in the order in which they were left."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks(COUNT, 4)
        self.held: list[int] = []
        self.names: dict[bytes, int] = {}
        self.nameless, self.named = list(range(1, COUNT)), []         # idle: what is taken first, and what last

    @precondition(lambda self: self.blocks.free)
    @rule()
    def take(self):
        block, unused = self.blocks.take(), self.nameless or self.named
        assert block == unused[0] if unused is self.named else block in self.nameless
        unused.remove(block)
        self.names = {name: b for name, b in self.names.items() if b != block}
        self.held.append(block)
        assert self.blocks.writable(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def hold(self, data):
        block = data.draw(st.sampled_from(self.held))
        self.blocks.hold(block)
        self.held.append(block)
        assert not self.blocks.writable(block)

    @rule(name=st.sampled_from(NAMES))
    def find_and_hold(self, name):
        block = self.blocks.find(name)
        assert block == self.names.get(name)
        if block is not None:
            self.blocks.hold(block)
            self.held.append(block)
            self.named = [b for b in self.named if b != block]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drop(self, data):
        block = data.draw(st.sampled_from(self.held))
        self.blocks.drop(block)
        self.held.remove(block)
        if block not in self.held:
            (self.named if block in self.names.values() else self.nameless).append(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def name(self, data, name):
        block = data.draw(st.sampled_from(self.held))
        self.blocks.name(block, name)
        if name not in self.names and block not in self.names.values():
            self.names[name] = block
        assert self.blocks.find(name) == self.names[name] if name in self.names else self.blocks.find(name) is None

    @rule()
    def forget(self):
        self.blocks.forget_all()
        self.names = {}
        self.nameless, self.named = self.nameless + self.named, []

    @invariant()
    def books(self):
        self.blocks.check([[block, 0] for block in self.held])
        counts = Counter(self.held)
        assert self.blocks.free == COUNT - 1 - len(counts)
        for block in counts:
            assert self.blocks.writable(block) == (counts[block] == 1 and block not in self.names.values())


TestBlocks = BlocksMachine.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_books_notice_what_is_wrong():
    for spoil in (lambda b: b.holders.__setitem__(2, 1), lambda b: b.idle.pop(3), lambda b: b.named.pop(b"x")):
        blocks = Blocks(5, 4)
        block = blocks.take()
        blocks.name(block, b"x")
        blocks.check([[block]])
        spoil(blocks)
        with pytest.raises(AssertionError):
            blocks.check([[block]])
    with pytest.raises(AssertionError, match="more often"):
        blocks.drop(4)


def test_texts_are_forgotten_in_the_order_in_which_they_were_left():
    blocks = Blocks(5, 4)
    a, b, c, d = (blocks.take() for _ in range(4))
    for name, block in zip(NAMES, (a, b, c)):
        blocks.name(block, name)
    for block in (b, d, a, c):
        blocks.drop(block)
    blocks.hold(b)                                # used once more, so that it is the last to go
    blocks.drop(b)
    assert [blocks.take() for _ in range(4)] == [d, a, c, b]


@given(ids=st.lists(st.integers(0, 1 << 40), max_size=20), more=st.lists(st.integers(0, 3), max_size=9),
       size=st.integers(1, 5))
def test_names_are_those_of_beginnings(ids, more, size):
    names = extend_names([], ids, size)
    assert len(names) == len(ids) // size == len(set(names))
    whole = extend_names([], ids + more, size)
    assert extend_names(list(names), ids + more, size) == whole and whole[:len(names)] == names
    if ids:
        changed = extend_names([], [ids[0] + 1, *ids[1:]], size)
        assert not set(changed) & set(names)      # blocks with the same tokens behind another beginning
    assert not set(extend_names([], ids, size, b"new weights")) & set(names)


@given(window=st.integers(1, 20), size=st.integers(1, 6), position=st.integers(0, 60))
def test_out_of_sight_is_what_no_later_query_sees(window, size, position):
    blocks = Blocks(2, size, window)
    seen = {p // size for query in range(position, position + 40) for p in range(max(query - window + 1, 0), query)}
    first = blocks.out_of_sight(position)
    before = set(range(position // size))         # the block that is written next is never given back
    assert first <= position // size and set(range(first)) == before - {b for b in range(first, 99)}
    assert not seen & set(range(first)) and (first in seen | {position // size})
    assert Blocks(2, size).out_of_sight(position) == 0
