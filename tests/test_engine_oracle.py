"""The engine against plain uncached decoding: whatever shares its batch and its cache, an answer stays the same."""
from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from mindseed.infer.engine import Engine, EngineConfig, Request
from mindseed.infer.generate import generate_uncached
from mindseed.infer.sample import Chooser, Sampling, choose
from tests.oracle import GREEDY, Oracle, check_books, check_empty, drive, sharp_model
from tests.tiny import KITS, VOCAB, kit

REQUESTS = 25                                     # in a round; more rounds where a pass is cheap, 2000 and more in all
ROUNDS = {name: 2 for name in ("delta", "linear attention", "mixed", "layer norm, post", "moe", "moe, groups")} | {
    name: 5 for name in ("gqa", "no qk-norm", "window", "window 1", "interleaved", "linear", "yarn", "llama3")}
SEEN: dict[str, Counter] = {}


def some_prompts(rng: random.Random, limit: int) -> list[list[int]]:
    """A few texts and beginnings of them, some with another end: what a cache of prefixes lives on."""
    texts = [[rng.randrange(VOCAB) for _ in range(limit)] for _ in range(2)]
    prompts = [rng.choice(texts)[:rng.randint(1, limit - 1)] for _ in range(9)]
    prompts += [p[:rng.randint(0, len(p))] + [rng.randrange(VOCAB) for _ in range(3)] for p in prompts[:4]]
    return [p[:limit - 1] for p in prompts]


def some_config(rng: random.Random, **fixed) -> EngineConfig:
    """Small caches, odd blocks and chunks; often the cache is smaller than the context."""
    return EngineConfig(**{
        "block_size": rng.choice([1, 2, 3, 4, 8, 16]), "max_seqs": rng.choice([1, 4, 8, 12, 20]),
        "cache_tokens": rng.choice([None, 24, 32, 40, 64, 100]), "chunk": rng.choice([3, 10, 40, 512]),
        "prefix_caching": rng.random() < 0.8, "fused": rng.random() < 0.5} | fixed)


def some_request(rng: random.Random, prompt: list[int], engine: Engine, **fixed) -> Request:
    return Request(**{"prompt": prompt, "sampling": GREEDY, "max_new": rng.randint(1, 6),
                      "stop_ids": rng.choice([(), (), (3, 17, 40)]), "priority": rng.choice([0, 0, 0, 1, 2]),
                      "n": rng.randint(1, min(3, engine.config.max_seqs)), "top_logps": rng.choice([0, 0, 2]),
                      "prompt_logps": rng.random() < 0.15} | fixed)


@pytest.mark.parametrize("name", KITS)
def test_answers_are_those_of_uncached_decoding(name):
    """Random arrivals, lengths, sizes, priorities, cancellations, preemptions, shared beginnings, several answers."""
    rng, oracle, seen = random.Random(name), Oracle(sharp_model(KITS[name]), most=6), SEEN.setdefault(name, Counter())
    prompts = some_prompts(rng, oracle.model.config.seq_len)
    for _ in range(ROUNDS.get(name, 4)):
        engine = Engine(oracle.model, None, some_config(rng))
        fitting = [p for p in prompts if len(p) < engine.limit]
        requests = [some_request(rng, rng.choice(fitting), engine) for _ in range(REQUESTS)]
        for request, (answers, whole) in zip(requests, drive(engine, requests, rng, cancel=0.06, rush=0.88, seen=seen)):
            for answer in answers:
                oracle.check(request, answer, engine.limit, whole=whole)
        seen["requests"] += len(requests)
    assert oracle.near_ties <= 1


def test_the_fuzzer_met_what_it_is_for():
    """Runs after the tests above, which count what happened to them."""
    if len(SEEN) < len(KITS):
        pytest.skip("not all kits were run")
    total = sum(SEEN.values(), Counter())
    assert total["requests"] >= 2000
    for what, least in (("preempted", 100), ("preempted forks", 10), ("cancelled", 150), ("cached", 4000),
                        ("full hits", 100)):
        assert total[what] >= least, total


# ----------------------------------------------------------------------------------------------------- sampled answers

SAMPLINGS = [
    Sampling(seed=3), Sampling(temperature=0.6, top_k=20, seed=11), Sampling(top_p=0.8, min_p=0.05, seed=1 << 62),
    Sampling(repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=-0.4, temperature=1.4, seed=5),
    Sampling(logit_bias=((7, 6.0), (8, -50.0), (60, 2.5)), seed=8), replace(GREEDY, repetition_penalty=1.5),
    replace(GREEDY, frequency_penalty=1.0, logit_bias=((5, 3.0),))]
CROWDS = {"alone": {"max_seqs": 1}, "together": {}, "preempted": {"max_seqs": 9, "cache_tokens": 40, "block_size": 3},
          "by and by": {"chunk": 2, "block_size": 1}, "guessing": {"draft": "ngram"}, "our kernels": {"fused": True}}


@pytest.mark.parametrize("name", ["gqa", "window", "mla", "delta", "moe"])
def test_a_seed_gives_one_answer_whatever_is_around_it(name):
    """Every way of choosing, beside every other, equals uncached decoding: ids and both kinds of log-probabilities."""
    rng, model = random.Random(name), sharp_model(KITS[name])
    prompts = some_prompts(rng, 20)
    asked = [(rng.choice(prompts), sampling) for sampling in SAMPLINGS]
    want = {}
    for prompt, sampling in asked:
        for i in range(2):
            seed = (sampling.seed + i) % (1 << 63)
            [want[tuple(prompt), sampling, i]] = generate_uncached(
                model, None, [prompt], sampling=replace(sampling, seed=seed), max_new=7, stop_ids=())
    for crowd, settings in CROWDS.items():
        if name in ("moe", "delta") and crowd not in ("together", "preempted"):
            continue                              # they take their time
        if settings.get("draft") and any(spec.per_seq for spec in model.state_specs()):
            continue
        engine = Engine(model, None, EngineConfig(**{"fused": False} | settings))
        n = min(2, engine.config.max_seqs)
        requests = [Request(prompt=prompt, sampling=sampling, max_new=7, n=n, stop_ids=())
                    for prompt, sampling in asked]
        for request, (answers, _) in zip(requests, drive(engine, requests, rng, rush=0.9)):
            for i, got in enumerate(answers):
                best = want[tuple(request.prompt), request.sampling, i]
                assert (got.ids, got.finish) == (best.ids, best.finish), crowd
                for a, b in ((got.logps, best.logps), (got.sampled_logps, best.sampled_logps)):
                    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        assert crowd != "preempted" or engine.stats().preemptions or name in ("window", "delta")   # hardly any memory


def test_log_probabilities_of_answer_prompt_and_alternatives_are_direct_computation():
    model, prompt = sharp_model(KITS["gqa"], dtype=torch.float64), [5, 9, 9, 2, 40, 5, 9]
    sampling = Sampling(temperature=0.7, top_k=9, min_p=0.02, logit_bias=((3, 1.0),), frequency_penalty=0.5, seed=2)
    engine = Engine(model, None, EngineConfig(chunk=3, block_size=2))
    for _ in range(2):                                                # the second finds the first in the cache
        job = engine.submit(Request(prompt=prompt, sampling=sampling, max_new=6, top_logps=4, prompt_logps=True))
        tokens = []
        while engine.busy:
            tokens += [token for _, token in engine.step()]
        ids = prompt + [token.id for token in tokens]
        with torch.inference_mode():
            logits = model(torch.tensor([ids]), torch.arange(len(ids))[None]).logits()[0]
        logps = logits.log_softmax(-1)
        assert tokens[0].prompt_logps[0] is None and all(token.prompt_logps is None for token in tokens[1:])
        for i, logp in enumerate(tokens[0].prompt_logps[1:], start=1):
            assert logp == pytest.approx(logps[i - 1, ids[i]].item(), abs=1e-9)
        for i, token in enumerate(tokens):
            at = len(prompt) + i - 1
            assert token.logp == pytest.approx(logps[at, token.id].item(), abs=1e-9)
            best = logps[at].topk(4)
            assert [id for id, _ in token.top] == best.indices.tolist()
            torch.testing.assert_close([p for _, p in token.top], best.values.tolist())
            changed = logits[at].clone()
            changed[3] += 1.0
            for before in tokens[:i]:
                changed[before.id] -= 0.5
            kept = changed.topk(9)
            probs = (kept.values / 0.7).softmax(-1)
            probs = probs.where(probs >= 0.02 * probs.max(), 0)
            probs = probs / probs.sum()
            assert token.sampled_logp == pytest.approx(probs[kept.indices == token.id].log().item(), abs=1e-9)
    assert job == 1 and engine.stats().prompt_tokens == 14


# ----------------------------------------------------------------------------------------------------------- precision

@pytest.mark.parametrize("name", ["gqa", "mla", "mixed"])
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_narrow_caches_stay_close(name, kind):
    """The same tokens, forced, have nearly the same log-probabilities; int8 does not depend on chunks either."""
    model = sharp_model(KITS[name])
    exact = Oracle(model)
    narrow = model if kind == "int8" else sharp_model(KITS[name], dtype=torch.bfloat16)
    rng, found = random.Random(name), {}
    prompts = some_prompts(rng, 28)
    for chunk in (512, 3):
        config = EngineConfig(cache_dtype="int8" if kind == "int8" else "auto", chunk=chunk, block_size=4,
                              fused=False)
        engine = Engine(narrow, None, config)
        requests = [Request(prompt=prompt, sampling=GREEDY, max_new=2, prompt_logps=True) for prompt in prompts]
        found[chunk] = [answers[0] for answers, _ in drive(engine, requests, rng, rush=1.0)]
        off = torch.cat([
            torch.tensor(got.prompt_logps[1:]) - exact.logps(p)[:-1].gather(1, torch.tensor(p[1:])[:, None])[:, 0]
            for p, got in zip(prompts, found[chunk]) if len(p) > 1])
        assert off.abs().mean() < 0.25 and off.abs().max() > 1e-6
    if kind == "int8":
        assert engine.cache.bytes < Engine(model, None, EngineConfig(block_size=4)).cache.bytes
        for a, b in zip(found[512], found[3]):
            torch.testing.assert_close(a.prompt_logps[1:], b.prompt_logps[1:], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["gqa", "mla", "window"])
def test_int8_answers_do_not_depend_on_what_is_shared(name):
    """Shared beginnings and their copies carry their scales with them."""
    model, prompt = sharp_model(KITS[name]), [3, 1, 4, 1, 5, 9, 2, 6]
    requests = [Request(prompt=prompt[:n], sampling=Sampling(seed=5), max_new=6, n=3, stop_ids=())
                for n in (8, 8, 6, 8, 4)]
    apart = [Engine(model, None, EngineConfig(cache_dtype="int8", prefix_caching=False, max_seqs=1)).generate(
        [replace(request, n=1, sampling=Sampling(seed=5 + i)) for i in range(3)]) for request in requests]
    engine = Engine(model, None, EngineConfig(cache_dtype="int8", block_size=4))
    for request, alone in zip(requests, apart):
        [together] = engine.generate([request])
        for got, [want] in zip(together, alone):
            assert got.ids == want.ids
            torch.testing.assert_close(got.logps, want.logps, rtol=1e-4, atol=1e-4)
    assert engine.stats().cached_tokens > 8


# -------------------------------------------------------------------------------------------------------- new weights

@pytest.mark.parametrize("name, draft", [("gqa", "off"), ("gqa", "ngram"), ("window", "ngram"), ("mixed", "off")])
def test_answers_go_on_under_new_weights(name, draft):
    config = KITS[name]
    old, new, mine = sharp_model(config, 0), sharp_model(config, 1), sharp_model(config, 0)
    engine = Engine(mine, None, EngineConfig(block_size=2, chunk=8, max_seqs=3, draft=draft))
    rng = random.Random(1)
    prompts = some_prompts(rng, 16)[:8]
    requests = [Request(prompt=p, sampling=Sampling(seed=i) if i % 2 else GREEDY, max_new=14, n=1 + (i == 3),
                        stop_ids=()) for i, p in enumerate(prompts)]
    number = [engine.submit(request) for request in requests]
    got = {}

    def steps(count):
        for _ in range(count):
            for job, token in engine.step():
                got.setdefault((number.index(job), token.row), []).append(token.id)
            check_books(engine)

    steps(6)
    before = {key: list(ids) for key, ids in got.items()}
    pointers = [p.data_ptr() for p in mine.parameters()]
    cached = engine.stats().cached_tokens
    engine.update_weights(new)
    check_books(engine)
    assert [p.data_ptr() for p in mine.parameters()] == pointers and before and len(before) < 9
    steps(200)
    check_empty(engine)
    for i, request in enumerate(requests):
        for row in range(request.n):
            start = before.get((i, row), [])
            seeded = replace(request.sampling, seed=request.sampling.seed + row)
            ids = list(request.prompt)
            for model, count in ((old, len(start)), (new, 14 - len(start))):
                for _ in range(count):                                # the noise goes on where it was
                    ids += one_more(model, ids, len(ids) - len(request.prompt), seeded)
            assert got[i, row] == ids[len(request.prompt):]
    engine.generate([requests[0]])
    assert engine.stats().cached_tokens > cached or name == "mixed"   # what the new ones read is found again
    with pytest.raises(Exception, match="another shape"):
        engine.update_weights(sharp_model(kit("alibi")))


def one_more(model, ids, step, sampling) -> list[int]:
    """The token after `ids`, chosen as number `step` of an answer."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids]), torch.arange(len(ids))[None]).logits()[:, -1]
    return choose(logits, [Chooser(sampling=sampling, seed=sampling.seed, step=step)]).ids.tolist()


def test_a_prompt_read_under_old_weights_is_not_found_under_new_ones():
    mine, new = sharp_model(KITS["gqa"], 0), sharp_model(KITS["gqa"], 1)
    engine = Engine(mine, None, EngineConfig(block_size=2))
    request = Request(prompt=[4, 8, 15, 16, 23, 42, 3], sampling=GREEDY, max_new=4)
    engine.generate([request])
    names = set(engine.kinds[0].named)
    engine.update_weights(new)
    assert names and not engine.kinds[0].named
    [[got]] = engine.generate([request])
    Oracle(new).check(request, got, engine.limit)
    assert engine.stats().cached_tokens == 0 and engine.kinds[0].named and not names & set(engine.kinds[0].named)
