"""The scheduler alone, with a cache of plain Python that remembers for every place of it which text lies there."""
from __future__ import annotations

import random
from collections import Counter

import pytest

from mindseed.infer.blocks import Blocks
from mindseed.infer.scheduler import Scheduler, Sequence

SEEN: Counter = Counter()


class World:
    """Runs plans as the engine does. A token's entry in the cache is all that it depends on: the weights and the text
    up to it, so that an entry that is read must be that of the reader's own text."""

    def __init__(self, rng: random.Random, windows: list[int | None], *, size: int, count: int, slots: bool = False,
                 guess: bool = True, **settings) -> None:
        self.rng, self.size, self.guess, self.version = rng, size, guess and not slots, 0
        self.scheduler = Scheduler([Blocks(count if w is None else max(count, 4 + (w + 40) // size), size, w)
                                    for w in windows], size, slots=slots, **settings)
        self.memory = [{} for _ in windows]                           # (block, place in it) -> entry
        self.states: dict[int, tuple] = {}                            # slot -> entry of the last token read
        self.limit = (count - 2) * size

    def add(self, prompt, length, **more) -> Sequence:
        sequence = Sequence(ids=list(prompt), **more)
        sequence.owner = {"prompt": len(prompt), "end": min(len(prompt) + length, self.limit), "row": 0}
        self.scheduler.add(sequence)
        return sequence

    def entry(self, ids, position) -> tuple:
        return self.version, tuple(ids[:position + 1])

    def step(self) -> None:
        scheduler = self.scheduler
        for s in scheduler.running:
            left = len(s.ids) - s.computed
            s.guesses = self.rng.choice([0, 0, 1, 3]) if left == 1 and len(s.ids) > s.owner["prompt"] else 0
            s.guesses = min(s.guesses, max(s.owner["end"] - len(s.ids) - 1, 0))
            s.guesses *= self.guess
        before, preemptions = list(scheduler.running), scheduler.preemptions
        plan = scheduler.plan()
        self.check_plan(plan, before, preemptions)
        for kind, source, target in plan.copies:
            assert source and target
            for place in range(self.size):
                self.memory[kind][target, place] = self.memory[kind].get((source, place))
        for slot in plan.fresh:
            self.states[slot] = None
        writes: Counter = Counter()
        for work in plan.work:
            self.compute(work, writes)
        assert not writes or max(writes.values()) == 1, "two rows write to one place"
        for work in plan.work:
            self.finish(work)
        scheduler.check()
        for s in scheduler.running:               # what is held is what is needed, and no more
            assert all(len(table) == -(-s.computed // self.size) for table in s.tables)

    def check_plan(self, plan, before, preemptions) -> None:
        scheduler = self.scheduler
        assert plan.work and len({id(w.sequence) for w in plan.work}) == len(plan.work)
        assert all(w.sequence in scheduler.running and w.count > 0 for w in plan.work)
        spent = sum(w.count for w in plan.work if w.count > 1 or w.sequence not in before)
        assert spent <= scheduler.chunk
        first = min(scheduler.running)
        assert any(w.sequence is first for w in plan.work), "who comes first must always go on"
        if scheduler.preemptions > preemptions:   # the last were sent away, and nobody came but those they gave way to
            gone, stayed = ([s for s in before if (s in scheduler.running) == here] for here in (False, True))
            assert gone and (not stayed or min(gone) > max(stayed))
            assert all(s.priority < min(gone).priority for s in scheduler.running if s not in stayed)
        if scheduler.waiting:
            waits = min(scheduler.waiting).priority
            assert not any(w.count > 1 and w.sequence.priority > waits for w in plan.work), "reads before its turn"

    def compute(self, work, writes) -> None:
        s = work.sequence
        work.drafts = [self.rng.choice([self.next(s.ids), 99]) for _ in range(work.guesses)]
        text = s.ids[:work.start + work.count] + work.drafts
        for kind, (blocks, table, memory) in enumerate(zip(self.scheduler.kinds, s.tables, self.memory)):
            for position in range(work.start, len(text)):
                block, place = table[position // self.size], position % self.size
                assert block and blocks.writable(block), "a shared block is written"
                writes[kind, block, place] += 1
                memory[block, place] = self.entry(text, position)
            window = blocks.window
            for query in range(work.start, len(text)):
                for position in range(0 if window is None else max(query - window + 1, 0), query + 1):
                    found = memory.get((table[position // self.size], position % self.size))
                    assert found == self.entry(text, position), "a query reads what is not its own"
        if s.slot is not None:
            assert self.states.get(s.slot) == (self.entry(s.ids, work.start - 1) if work.start else None)
            self.states[s.slot] = self.entry(text, len(text) - 1)

    def next(self, ids) -> int:
        """The next token, of this text and these weights; few, so that texts come again."""
        return hash((self.version, *ids[-3:])) % 3

    def finish(self, work) -> None:
        scheduler, s = self.scheduler, work.sequence
        if not work.drafts:
            scheduler.computed(s, work.count)
        if not work.last:
            return
        rows = [s]
        while s.forks:
            twin = scheduler.fork(s)
            twin.owner = dict(s.owner)
            if twin.slot is not None:
                self.states[twin.slot] = self.states[s.slot]
            rows.append(twin)
            SEEN["forks"] += 1
        for row in rows:
            right = 0
            while True:
                token = self.next(row.ids)
                row.ids.append(token)
                if len(row.ids) >= row.owner["end"]:
                    scheduler.remove(row)
                    break
                if row is not s or right >= len(work.drafts) or work.drafts[right] != token:
                    break
                right += 1
            SEEN["right guesses"] += right
            if row is s and work.drafts and s.alive:
                scheduler.computed(s, work.count + right)

    def check_empty(self) -> None:
        assert not self.scheduler.running and not self.scheduler.waiting
        assert all(b.free == b.count - 1 for b in self.scheduler.kinds)


def some_world(rng: random.Random) -> World:
    slots = rng.random() < 0.2
    windows = rng.choice([[None], [None], [None, 3], [1], [5, None, 2], []] if slots else
                         [[None], [None], [None, 3], [1], [5, None, 2], [4]])
    return World(rng, windows, size=rng.choice([1, 2, 3, 4]), count=rng.randint(8, 24), slots=slots,
                 max_seqs=rng.randint(1, 6), chunk=rng.choice([1, 2, 5, 9, 40]), caching=rng.random() < 0.8)


@pytest.mark.parametrize("seed", range(250))
def test_nothing_is_lost_shared_or_read_wrongly(seed):
    """Requests, cancellations, preemptions, guesses, several answers and new weights in any order."""
    rng = random.Random(seed)
    world = some_world(rng)
    scheduler, texts = world.scheduler, [[rng.randrange(3) for _ in range(30)] for _ in range(2)]
    left, steps, alive = 14, 0, []
    while left or scheduler.running or scheduler.waiting:
        while left and rng.random() < 0.5:
            prompt = rng.choice(texts)[:rng.randint(1, min(world.limit - 1, 30))]
            alive.append(world.add(prompt, rng.randint(1, 9), priority=rng.choice([0, 0, 1]),
                                   forks=rng.randint(0, min(2, scheduler.max_seqs - 1)), reuse=rng.random() < 0.9))
            left -= 1
        everyone = [*scheduler.running, *scheduler.waiting]
        if everyone and rng.random() < 0.05:
            lost = rng.choice(everyone)
            SEEN["cancelled " + ("running" if lost in scheduler.running else "waiting")] += 1
            SEEN["cancelled before its forks"] += bool(lost.forks)
            scheduler.remove(lost)
            scheduler.remove(lost)                                    # once more changes nothing
            scheduler.check()
        if rng.random() < 0.01:
            world.version += 1
            scheduler.new_weights(bytes([world.version]))
            scheduler.check()
            SEEN["new weights"] += 1
        if scheduler.running or scheduler.waiting:
            world.step()
            steps += 1
        assert steps < 4000, "nobody gets to an end"
    world.check_empty()
    SEEN["preempted"] += scheduler.preemptions
    SEEN["cached"] += sum(s.cached for s in alive)
    SEEN["full hits"] += sum(0 < s.cached == s.owner["prompt"] - 1 for s in alive)


def test_the_fuzzer_met_what_it_is_for():
    if SEEN["preempted"] == 0:
        pytest.skip("the tests above were not run")
    for what in ("forks", "right guesses", "cancelled running", "cancelled waiting", "cancelled before its forks",
                 "new weights", "preempted", "cached", "full hits"):
        assert SEEN[what] > 10, SEEN


# ------------------------------------------------------------------------------------------------------ one at a time

def world_of(windows=(None,), *, size=4, count=12, max_seqs=4, chunk=100, **more) -> World:
    return World(random.Random(0), list(windows), size=size, count=count, max_seqs=max_seqs, chunk=chunk, guess=False,
                 **more)


def run(world, steps=200) -> None:
    for _ in range(steps):
        if not (world.scheduler.running or world.scheduler.waiting):
            return
        world.step()
    raise AssertionError("not finished")


def test_the_lower_priority_number_is_admitted_first_and_preempted_last():
    world = world_of(max_seqs=1)
    late, soon = world.add([1] * 5, 3, priority=1), world.add([2] * 5, 3, priority=0)
    world.step()
    assert world.scheduler.running == [soon]
    run(world)
    world = world_of(count=8, size=2, chunk=3)                        # 7 blocks for both to grow in
    low, high = world.add([1] * 4, 8, priority=1), None
    world.step()
    high = world.add([2] * 4, 8, priority=0)
    run(world)
    assert low.preempted and not high.preempted and late.preempted == 0


def test_who_is_more_urgent_waits_for_nobody_less_urgent():
    for more in ({"max_seqs": 2}, {"count": 14, "size": 2}, {"chunk": 4}):        # seats, blocks, budget are short
        world = world_of(**{"count": 60, "chunk": 40, **more})
        idle = [world.add([i] * (25 if "chunk" in more else 9), 30, priority=5) for i in (1, 2)]
        for _ in range(2):
            world.step()
        urgent = world.add([3] * 9, 3, priority=-1)
        for _ in range(3 + 9 // 4):
            world.step()
        assert len(urgent.ids) > 9, more
        run(world)
        assert not any(s.alive for s in (*idle, urgent))


def test_of_equals_the_latest_is_preempted_and_comes_back_first():
    world = world_of(count=9, size=2)
    first, second, third = (world.add([i] * 3, 9) for i in range(3))
    world.step()
    order = []
    while world.scheduler.running or world.scheduler.waiting:
        world.step()
        order += [s for s in (first, second, third) if not s.alive and s not in order]
    assert order == [first, second, third] and third.preempted >= second.preempted >= first.preempted == 0


def test_long_prompts_are_read_beside_those_who_write():
    world = world_of(count=40, chunk=6)
    writer = world.add([1] * 3, 40)
    world.step()
    reader = world.add([2] * 30, 2)
    lengths = []
    while reader.alive:
        lengths.append(len(writer.ids))
        world.step()
    assert lengths == list(range(4, 4 + len(lengths))) and len(lengths) == 6      # 30 tokens, 6 at a time, and one more


def test_a_prompt_that_is_there_as_a_whole_is_copied_where_it_is_continued():
    world = world_of(size=4)
    first = world.add([1, 2, 0, 1, 2, 0, 1, 2], 8)
    world.step()
    second = world.add([1, 2, 0, 1, 2, 0, 1, 2], 8)
    plan = world.scheduler.plan()
    mine = next(w for w in plan.work if w.sequence is second)
    assert (mine.start, mine.count, second.cached) == (7, 1, 7)
    assert [(kind, source) for kind, source, _ in plan.copies] == [(0, first.tables[0][1])]
    assert second.tables[0][0] == first.tables[0][0] and second.tables[0][1] != first.tables[0][1]


def test_answers_to_one_prompt_share_it_until_they_differ():
    world = world_of(size=4, count=20)
    [first] = [world.add([0, 1, 2, 0, 1, 2], 6, forks=2)]
    world.step()
    tables = [s.tables[0] for s in world.scheduler.running]
    assert len(tables) == 3 and len({tuple(t) for t in tables}) == 1
    plan = world.scheduler.plan()
    assert len(plan.copies) == 2                                      # the last to write needs no copy
    assert len({s.tables[0][0] for s in world.scheduler.running}) == 1
    assert len({s.tables[0][1] for s in world.scheduler.running}) == 3
    assert first.forks == 0


def test_seats_are_kept_for_further_answers():
    world = world_of(max_seqs=3, chunk=2)
    world.add([1] * 9, 3, forks=2)
    other = world.add([2] * 3, 3)
    while world.scheduler.waiting:
        assert other not in world.scheduler.running
        world.step()
        assert sum(1 + s.forks for s in world.scheduler.running) <= 3


def test_a_window_gives_back_what_is_out_of_sight():
    world = world_of([None, 5], size=2, count=40)
    one = world.add([1] * 20, 20)
    while one.alive:
        world.step()
        if one.alive:
            assert sum(map(bool, one.tables[1])) <= 4 and all(one.tables[0])
