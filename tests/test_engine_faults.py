"""What goes wrong with one request is that request's alone; and engines that several ask at once."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mindseed.base.errors import UserError
from mindseed.infer.engine import Engine, EngineConfig, QueueFull, Request
from mindseed.infer.generate import generate_uncached
from mindseed.infer.sample import Chooser, NotFinite, Sampling, choose
from mindseed.nn.linear import Linear
from mindseed.tokenizers.byte import Byte
from tests.oracle import GREEDY, Oracle, check_books, check_empty, sharp_model
from tests.test_infer_generate import byte_model
from tests.tiny import KITS, VOCAB, kit

POISON = 60                                       # whoever reads this token computes no numbers any more


def poisoned(name: str):
    """(a model that overflows where it reads one token, and the same without that fault); neither says it."""
    good, bad = sharp_model(KITS[name]), sharp_model(KITS[name])
    for model in (good, bad):
        model.head = Linear(32, VOCAB, role="column")
        model.head.weight = torch.nn.Parameter(good.embed.weight.detach().clone())
        with torch.no_grad():
            model.head.weight[POISON] = 0
    with torch.no_grad():
        bad.embed.weight[POISON, 0] = torch.inf
    return bad, good


@pytest.mark.parametrize("name", ["gqa", "window", "mla", "alibi, window", "mixed", "moe"])
@pytest.mark.parametrize("settings", [{}, {"chunk": 3, "block_size": 2}, {"cache_tokens": 60, "block_size": 4}],
                         ids=["roomy", "chunks", "narrow"])
def test_numbers_that_overflow_cost_one_request_its_answer(name, settings):
    """The others are answered as if it had never been, in the same pass and from the blocks that it leaves."""
    bad, good = poisoned(name)
    oracle, engine = Oracle(good, most=6), Engine(bad, None, EngineConfig(**settings))
    ill = [[1, 2, POISON], [POISON], [5, *range(20), POISON], [9] * 17 + [POISON, 3]]
    for turn in range(3):
        asked = [Request(prompt=p, sampling=GREEDY, max_new=6, n=1 + (i == 2), stop_ids=(), prompt_logps=i == 1)
                 for i, p in enumerate([*ill, [1, 2, 3], [7] * 9, [5, 4], [9] * 17, [8, 8, 2, turn]])]
        number, got = {engine.submit(request): i for i, request in enumerate(asked)}, {}
        while engine.busy:
            for job, token in engine.step():
                got.setdefault(number[job], []).append(token.id)
            check_books(engine)
        failed = {number[job] for job in engine.failed}
        assert failed == set(range(4)) and all(isinstance(error, NotFinite) for error in engine.failed.values())
        assert not failed & set(got)
        engine.failed.clear()
        for i in range(4, 9):
            want, _ = oracle.expected(asked[i], engine.limit)
            assert got[i] == want
        for pools in engine.cache.pools:
            assert all(pool.blocks.isfinite().all() for pool in pools.values())
    check_empty(engine)
    healthy = [Request(prompt=p, sampling=GREEDY, max_new=6, stop_ids=()) for p in ([1, 2, 3], [7] * 9, [9] * 17)]
    for request, [answer] in zip(healthy, engine.generate(healthy)):
        oracle.check(request, answer, engine.limit)
    with pytest.raises(UserError, match="not finite"):
        engine.generate([healthy[0], replace(healthy[0], prompt=[POISON])])
    check_empty(engine)


@pytest.mark.parametrize("name", ["gqa", "window", "mla", "alibi, window"])
def test_what_pads_have_written_is_never_read(name):
    """Block 0 belongs to nobody, so that anything may lie there."""
    oracle = Oracle(sharp_model(KITS[name]))
    engine = Engine(oracle.model, None, EngineConfig(block_size=2, chunk=9))
    asked = [Request(prompt=list(range(n)), sampling=GREEDY, max_new=8, stop_ids=()) for n in (1, 15, 3, 22, 8)]
    number, got = {engine.submit(request): i for i, request in enumerate(asked)}, {}
    while engine.busy:
        for pools in engine.cache.pools:
            for pool in pools.values():
                pool.blocks[0] = torch.nan
        for job, token in engine.step():
            got.setdefault(number[job], []).append(token.id)
    assert not engine.failed
    for i, request in enumerate(asked):
        assert got[i] == oracle.expected(request, engine.limit)[0]


def test_rows_that_are_no_numbers_are_named():
    logits = torch.zeros(4, 5)
    logits[1, 2], logits[3] = torch.nan, torch.inf
    with pytest.raises(NotFinite) as caught:
        choose(logits, [Chooser(sampling=Sampling(), seed=i) for i in range(4)])
    assert caught.value.rows == [1, 3]


class Refuses:
    """A grammar and its matcher which cannot go on after some tokens: of what use it is to ask, or to be told."""

    done = may_stop = False

    def __init__(self, where: str, after: int) -> None:
        self.where, self.after, self.count = where, after, 0

    def start(self):
        return Refuses(self.where, self.after)

    def allowed(self):
        if self.where == "asked" and self.count >= self.after:
            raise UserError("cannot be followed from here")
        return torch.full((Byte().vocab_size,), not (self.where == "nothing" and self.count >= self.after))

    def advance(self, id):
        self.count += 1
        if self.where == "told" and self.count > self.after:
            raise UserError("cannot be followed from here")


@pytest.mark.parametrize("where", ["asked", "told", "nothing"])
@pytest.mark.parametrize("draft", ["off", "ngram"])
def test_a_grammar_without_a_way_on_costs_one_request_its_answer(where, draft):
    model = byte_model()
    engine = Engine(model, Byte(), EngineConfig(draft=draft, block_size=4))
    asked = [Request(prompt=[1, 60, 60, 60], max_new=12, sampling=Sampling(seed=i), stop_ids=(), n=2) for i in range(3)]
    asked[1] = replace(asked[1], grammar=Refuses(where, 3))
    number, got = {engine.submit(request): i for i, request in enumerate(asked)}, {}
    while engine.busy:
        for job, token in engine.step():
            got.setdefault((number[job], token.row), []).append(token.id)
        check_books(engine)
    [job] = engine.failed
    assert number[job] == 1 and len(got[1, 0]) == 3
    for i in (0, 2):
        for row in range(2):
            [want] = generate_uncached(model, Byte(), [asked[i].prompt], sampling=Sampling(seed=i + row), max_new=12,
                                       stop_ids=())
            assert got[i, row] == want.ids
    check_empty(engine)


# ------------------------------------------------------------------------------------------------------ shared engines

def test_generate_waits_in_a_line_that_others_fill():
    model = sharp_model(KITS["gqa"])
    engine, oracle = Engine(model, None, EngineConfig(max_queue=2, max_seqs=1)), Oracle(model)
    others = [engine.submit(Request(prompt=[i], sampling=GREEDY, max_new=3)) for i in range(2)]
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        engine.submit(Request(prompt=[3]))
    mine = [Request(prompt=[7, i], sampling=GREEDY, max_new=4, stop_ids=()) for i in range(6)]
    for request, [answer] in zip(mine, engine.generate(mine)):
        oracle.check(request, answer, engine.limit)
    kept = engine.step()                          # what came for the others meanwhile
    assert [id for id, _ in kept] == [others[0]] * 3 + [others[1]] * 3 and not engine.busy


def test_who_stops_listening_cancels_the_rest_and_nothing_else():
    engine = Engine(sharp_model(KITS["gqa"]), None, EngineConfig(max_queue=3))
    other = engine.submit(Request(prompt=[4], max_new=20, stop_ids=()))
    tokens = engine.stream([Request(prompt=[i], max_new=20, n=2) for i in range(5)])
    for _ in range(3):
        next(tokens)
    tokens.close()
    check_books(engine)
    assert list(engine.jobs) == [other]
    engine.cancel(other)
    engine.cancel(other)
    check_empty(engine)


def test_a_request_may_be_cancelled_while_its_tokens_are_handed_out():
    engine, seen = Engine(sharp_model(KITS["gqa"]), None), []

    def stop(i, token):
        seen.append(i)
        if len(seen) == 4:
            for job in list(engine.jobs):
                engine.cancel(job)

    engine.generate([Request(prompt=[i], max_new=20, stop_ids=()) for i in range(3)], stop)
    assert len(seen) <= 6                         # those of the pass that was under way
    check_empty(engine)


def test_no_request_leaves_a_mark_when_one_of_many_is_wrong():
    engine = Engine(sharp_model(KITS["gqa"]), None)
    with pytest.raises(UserError, match="max_new=0"):
        engine.generate([Request(prompt=[1]), Request(prompt=[1], max_new=0)])
    check_empty(engine)
    assert engine.stats().prompt_tokens == 0


@pytest.mark.parametrize("changes, words", [
    ({"prompt": []}, "empty"), ({"prompt": [61]}, "id 61"), ({"prompt": [-1]}, "id -1"), ({"prompt": [1] * 32}, "32"),
    ({"max_new": 0}, "max_new=0"), ({"n": 0}, "n=0"), ({"n": 65}, "n=65"), ({"top_logps": -1}, "top_logps=-1"),
    ({"sampling": Sampling(logit_bias=((61, 1.0),))}, "token 61")])
def test_requests_that_cannot_be_answered(changes, words):
    engine = Engine(sharp_model(KITS["gqa"]), None)
    with pytest.raises(UserError, match=words):
        engine.submit(Request(**{"prompt": [1]} | changes))
    check_empty(engine)


# --------------------------------------------------------------------------------------------------------------- limits

@pytest.mark.parametrize("tokens", [1, 4, 17, 31])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_a_cache_smaller_than_the_context_is_the_context(tokens, size):
    model = sharp_model(kit("gqa", "window"))
    engine, oracle = Engine(model, None, EngineConfig(cache_tokens=tokens, block_size=size, chunk=5)), Oracle(model, 40)
    assert engine.limit == min(32, max(-(-tokens // size), 2) * size)
    longest = Request(prompt=list(range(engine.limit - 1)), sampling=GREEDY, max_new=9, stop_ids=())
    short = Request(prompt=[1], sampling=GREEDY, max_new=40, stop_ids=())
    for request, [answer] in zip([longest, short], engine.generate([longest, short])):
        oracle.check(request, answer, engine.limit)
        assert answer.finish == "context"
    with pytest.raises(UserError, match=f"context is {engine.limit}"):
        engine.submit(Request(prompt=[1] * engine.limit))


def test_a_long_prompt_in_small_chunks_beside_others():
    model = sharp_model(replace(kit("gqa", "alibi, window"), seq_len=300))
    engine, oracle = Engine(model, None, EngineConfig(chunk=2, block_size=8, cache_tokens=320)), Oracle(model)
    asked = [Request(prompt=[i % 61 for i in range(n)], sampling=GREEDY, max_new=8, stop_ids=())
             for n in (290, 3, 150, 1)]
    for request, [answer] in zip(asked, engine.generate(asked)):
        oracle.check(request, answer, engine.limit)
    assert engine.stats().preemptions or engine.stats().cached_tokens
    check_empty(engine)


def test_stop_strings_in_a_crowd():
    """Found across tokens, with several answers, speculation and preemption; the same text as the oracle's."""
    model = byte_model()
    prompts = [[1, 70 + i, 71, 70 + i, 71] for i in range(4)]
    free = generate_uncached(model, Byte(), prompts, max_new=30, stop_ids=(), sampling=Sampling(seed=2), seeds=[2] * 4)
    stops = tuple(c.text[8:10] for c in free)
    for settings in ({}, {"draft": "ngram", "cache_tokens": 60, "block_size": 4}):
        engine = Engine(model, Byte(), EngineConfig(**settings))
        asked = [Request(prompt=p, max_new=30, stop_ids=(), stop=stops, sampling=Sampling(seed=2), n=2)
                 for p in prompts]
        for request, answers in zip(asked, engine.generate(asked)):
            for row, got in enumerate(answers):
                [want] = generate_uncached(model, Byte(), [request.prompt], max_new=30, stop_ids=(), stop=stops,
                                           sampling=Sampling(seed=2 + row))
                assert (got.text, got.ids, got.finish) == (want.text, want.ids, want.finish)
        check_empty(engine)
