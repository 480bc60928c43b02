"""Who computes what in the next forward pass.

Continuous batching (Orca, OSDI 2022): the batch is put together anew for every pass. A sequence is a list of ids of
which the first `computed` are in the cache; a pass computes some more, and once all are, it gives the next token. So a
prompt and an answer are the same thing, reading and writing the same work:

    decoding          one id is left to compute: one token, and with guesses of what follows (speculation) a few more
    a prompt          many are left; at most `chunk` of all prompts' tokens in one pass (Sarathi, 2308.16369), so that
                      those who are writing are not held up by somebody's long prompt
    preemption        no block is free for a sequence that must grow: the one that is served last gives back all of its
                      blocks and waits; its ids are computed again when there is room, as if they had been its prompt

Sequences are served by priority, then by arrival; whoever waits is not held up by those of a lower priority: they stop
reading, or give back their blocks and seats, until it has been seated. Of what a sequence knows about its request
nothing is read here but numbers; there are no tensors.
"""
from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Any

from mindseed.infer.blocks import Blocks, extend_names, salt_of


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One answer in the making. `tables` has a list of block numbers for every kind of layer, 0 where a block is out of
    sight; `slot` is its place among the states of fixed size; `forks` are the further answers to the same prompt,
    which come into being once it is read."""

    ids: list[int]
    priority: int = 0
    arrival: int = 0
    forks: int = 0
    reuse: bool = True                   # may its prompt be found in the cache?
    adapter: str | None = None           # with which it is computed
    owner: Any = None                    # whatever the engine hangs on it
    computed: int = 0
    cached: int = 0                      # of the prompt, found in the cache when it was admitted for the first time
    tables: list[list[int]] = field(default_factory=list)
    slot: int | None = None
    names: list[bytes] = field(default_factory=list)
    drafted: int = 0                     # how many of its ids a draft model has read
    guesses: int = 0                     # how many guesses it would like to verify with the next token
    preempted: int = 0
    running: bool = False
    alive: bool = True

    @property
    def order(self) -> tuple[int, int]:
        return self.priority, self.arrival

    def __lt__(self, other: Sequence) -> bool:
        return self.order < other.order


@dataclass
class Work:
    """Compute ids[start : start + count] of a sequence, and then up to `guesses` tokens that may follow: `drafts`."""

    sequence: Sequence
    start: int
    count: int
    guesses: int = 0
    drafts: list[int] = field(default_factory=list)

    @property
    def last(self) -> bool:
        """Whether the next token is known afterwards."""
        return self.start + self.count == len(self.sequence.ids)


@dataclass
class Plan:
    work: list[Work] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)     # (kind of layer, from block, to block)
    fresh: list[int] = field(default_factory=list)                       # slots that begin empty


class Scheduler:
    """Sequences waiting and running. `kinds` are the blocks of every kind of layer; `slots` is the number of states of
    fixed size, whose presence forbids that a beginning is taken from the cache."""

    def __init__(self, kinds: list[Blocks], block_size: int, *, max_seqs: int, chunk: int, slots: bool = False,
                 caching: bool = True) -> None:
        self.kinds, self.block_size, self.max_seqs, self.chunk = kinds, block_size, max_seqs, chunk
        self.caching = caching and not slots
        self.free_slots = list(range(max_seqs, 0, -1)) if slots else None       # slot 0 belongs to nobody
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.salt = b""
        self.preemptions = self.arrivals = 0

    # -------------------------------------------------------------------------------------------------- coming, going

    def add(self, sequence: Sequence) -> None:
        self.arrivals += 1
        sequence.arrival = self.arrivals
        heapq.heappush(self.waiting, sequence)

    def remove(self, sequence: Sequence) -> None:
        """It is finished or cancelled: what it holds is free at once."""
        sequence.alive = False
        if sequence.running:
            self.stop(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
            heapq.heapify(self.waiting)

    def fork(self, sequence: Sequence) -> Sequence:
        """Another answer to the same, wholly read prompt, which shares all of its blocks."""
        assert sequence.forks > 0
        sequence.forks -= 1
        self.arrivals += 1
        twin = Sequence(ids=list(sequence.ids), priority=sequence.priority, arrival=self.arrivals,
                        computed=sequence.computed, drafted=sequence.drafted, cached=sequence.cached,
                        names=list(sequence.names), tables=[list(table) for table in sequence.tables],
                        owner=sequence.owner, reuse=sequence.reuse, adapter=sequence.adapter)
        for blocks, table in zip(self.kinds, twin.tables):
            for block in filter(None, table):
                blocks.hold(block)
        if self.free_slots is not None:
            twin.slot = self.free_slots.pop()
        twin.running = True
        self.running.append(twin)
        return twin

    def stop(self, sequence: Sequence) -> None:
        """Off the running ones, and what it holds is free."""
        self.running.remove(sequence)
        sequence.running = False
        self.release(sequence)

    def release(self, sequence: Sequence) -> None:
        for blocks, table in zip(self.kinds, sequence.tables):
            for block in reversed(table):         # the end of a text is the first to be forgotten
                if block:
                    blocks.drop(block)
        sequence.tables, sequence.computed, sequence.drafted, sequence.guesses = [], 0, 0, 0
        if sequence.slot is not None:
            self.free_slots.append(sequence.slot)
            sequence.slot = None

    def preempt(self, sequence: Sequence) -> None:
        self.stop(sequence)
        self.preemptions += 1
        sequence.preempted += 1
        heapq.heappush(self.waiting, sequence)

    # ------------------------------------------------------------------------------------------------------- planning

    def plan(self) -> Plan:
        """What the next pass computes. Blocks for it are taken; whoever cannot have them is preempted."""
        self.give_way()
        plan, budget, before = Plan(), self.chunk, self.preemptions
        first = self.waiting[0].priority if self.waiting else None
        self.running.sort()
        for sequence in list(self.running):
            if not sequence.running:
                continue                          # preempted for one that comes before it
            left = len(sequence.ids) - sequence.computed
            if left > 1 and first is not None and first < sequence.priority:
                continue                          # the budget for reading is that of the one who waits
            count = left if left == 1 else min(left, budget)
            if count and self.make_room(sequence, count):
                self.assign(sequence, count, plan)
                budget -= count if left > 1 else 0
        if self.preemptions == before:
            self.admit(budget, plan)
        return plan

    def give_way(self) -> None:
        """Preempt those of a lower priority than the first who waits, as far as it has no seat or no blocks."""
        while self.waiting and self.running:
            first, victim = self.waiting[0], max(self.running)
            if victim.priority <= first.priority:
                return
            if self.seat(first, self.chunk):
                self.release(first)
                return
            self.preempt(victim)

    def admit(self, budget: int, plan: Plan) -> None:
        while self.waiting and budget > 0:
            sequence = self.waiting[0]
            count = self.seat(sequence, budget)
            if not count:
                return
            heapq.heappop(self.waiting)
            self.running.append(sequence)
            sequence.running = True
            if self.free_slots is not None:
                sequence.slot = self.free_slots.pop()
                plan.fresh.append(sequence.slot)
            if not sequence.preempted:
                sequence.cached = sequence.computed
            self.assign(sequence, count, plan)
            budget -= count

    def seat(self, sequence: Sequence, budget: int) -> int:
        """How many ids of a waiting sequence could be computed now, its beginning then being held; 0 if there is no
        seat or no block for it."""
        seats = sum(1 + running.forks for running in self.running)
        if seats + 1 + sequence.forks > self.max_seqs:
            return 0
        self.find_beginning(sequence)
        count = min(len(sequence.ids) - sequence.computed, budget)
        spare = len(self.running)                 # so that those who run can grow for a while
        if self.fits(sequence, count, spare):
            return count
        self.release(sequence)
        return 0

    def find_beginning(self, sequence: Sequence) -> None:
        """Hold the blocks of the longest beginning that is still in the cache. At least one id is left to compute,
        since somebody wants to know what follows it; its block is then a shared one, and written as a copy."""
        sequence.tables = [[] for _ in self.kinds]
        if not (self.caching and sequence.reuse):
            return
        size = self.block_size
        names = extend_names(sequence.names, sequence.ids, size, self.salt + salt_of(sequence.adapter))
        found = len(names)
        for blocks in self.kinds:
            if blocks.window is None:
                found = next((i for i, name in enumerate(names[:found]) if blocks.find(name) is None), found)
        while found:
            computed = min(found * size, len(sequence.ids) - 1)
            if all(blocks.find(names[i]) is not None for blocks in self.kinds if blocks.window is not None
                   for i in range(blocks.out_of_sight(computed), found)):
                break
            found -= 1
        if not found:
            return
        sequence.computed = sequence.drafted = computed
        for blocks, table in zip(self.kinds, sequence.tables):
            first = blocks.out_of_sight(computed)
            for i in range(found):
                block = blocks.find(names[i]) if i >= first else 0
                table.append(block)
                if block:
                    blocks.hold(block)

    def needs(self, sequence: Sequence, count: int) -> list[int]:
        """New blocks of every kind for `count` more tokens, copies of shared ones included."""
        end, needs = sequence.computed + count, []
        for blocks, table in zip(self.kinds, sequence.tables):
            new = max(-(-end // self.block_size) - len(table), 0)
            at = sequence.computed // self.block_size
            needs.append(new + (at < len(table) and not blocks.writable(table[at])))
        return needs

    def fits(self, sequence: Sequence, count: int, spare: int = 0) -> bool:
        return all(need + spare * (need > 0) <= blocks.free
                   for need, blocks in zip(self.needs(sequence, count), self.kinds))

    def make_room(self, sequence: Sequence, count: int) -> bool:
        """Preempt whoever is served last until `sequence` can grow; False if that was itself. Sequences are planned in
        order, so none that has been planned is ever the last."""
        if sequence.guesses and not self.fits(sequence, count + sequence.guesses):
            sequence.guesses = 0
        while not self.fits(sequence, count):
            victim = max(self.running)
            self.preempt(victim)
            if victim is sequence:
                return False
        return True

    def assign(self, sequence: Sequence, count: int, plan: Plan) -> None:
        """Take the blocks and write the work down."""
        guesses = sequence.guesses if sequence.computed + count == len(sequence.ids) else 0
        end, at = sequence.computed + count + guesses, sequence.computed // self.block_size
        for kind, (blocks, table) in enumerate(zip(self.kinds, sequence.tables)):
            if at < len(table) and not blocks.writable(table[at]):
                copy = blocks.take()
                plan.copies.append((kind, table[at], copy))
                blocks.drop(table[at])
                table[at] = copy
            while len(table) * self.block_size < end:
                table.append(blocks.take())
        plan.work.append(Work(sequence, sequence.computed, count, guesses))

    # ------------------------------------------------------------------------------------------------- after the pass

    def computed(self, sequence: Sequence, count: int) -> None:
        """The next `count` of its ids are in the cache now (guesses that proved right are among its ids): name the
        blocks that are full, give back those that are out of sight and those that only wrong guesses needed."""
        size, before = self.block_size, sequence.computed
        sequence.computed += count
        full = range(before // size, sequence.computed // size)
        if self.caching and full:
            extend_names(sequence.names, sequence.ids, size, self.salt + salt_of(sequence.adapter))
        for blocks, table in zip(self.kinds, sequence.tables):
            if self.caching:
                for i in full:
                    blocks.name(table[i], sequence.names[i])
            for i in range(blocks.out_of_sight(sequence.computed) - 1, -1, -1):
                if not table[i]:
                    break
                blocks.drop(table[i])
                table[i] = 0
            while len(table) > -(-sequence.computed // size):
                blocks.drop(table.pop())

    def new_weights(self, salt: bytes) -> None:
        """Forget what other weights computed: every running sequence is read again."""
        self.salt = salt
        for blocks in self.kinds:
            blocks.forget_all()
        for sequence in list(self.running):
            self.preempt(sequence)
        for sequence in self.waiting:
            sequence.names = []

    def check(self) -> None:
        """Assert that no block and no slot is lost or held twice. For tests; cheap enough for every step."""
        for kind, blocks in enumerate(self.kinds):
            blocks.check(s.tables[kind] for s in self.running)
        assert not any(s.tables and any(map(any, s.tables)) for s in self.waiting), "a waiting sequence holds blocks"
        if self.free_slots is not None:
            held = [s.slot for s in self.running]
            assert sorted(held + self.free_slots) == list(range(1, self.max_seqs + 1)), "slots are lost or shared"
        assert sum(1 + s.forks for s in self.running) <= self.max_seqs
