"""Guessing ahead changes how fast answers come and nothing else: not one token, and no distribution."""
from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from mindseed.base.errors import UserError
from mindseed.infer.engine import Engine, EngineConfig, Request
from mindseed.infer.generate import generate_uncached
from mindseed.infer.sample import Sampling, filtered
from mindseed.models.config import LayerConfig
from mindseed.models.lm import build
from mindseed.models.presets import Shape
from tests.oracle import GREEDY, Oracle, drive, sharp_model
from tests.tiny import DYNAMIC, FFN_KIT, KITS, MIXER_KIT, VOCAB, kit, randomise

AHEAD = kit("gqa", "window", mtp=tuple(
    LayerConfig(mixer=MIXER_KIT[name], ffn=FFN_KIT["swiglu"]) for name in ("gqa", "window")))
PAIRS = {                                         # kind of drafter: the model, the draft model
    "ngram, gqa": ("ngram", "gqa", None), "ngram, window": ("ngram", "window", None),
    "ngram, mla": ("ngram", "mla", None), "ngram, alibi": ("ngram", "alibi, window", None),
    "ngram, learned": ("ngram", "learned", None), "ngram, moe": ("ngram", "moe", None),
    "itself": ("model", "gqa", "gqa"), "windows for all": ("model", "gqa", "window"),
    "all for windows": ("model", "window", "mla"), "moe for mla": ("model", "mla", "moe"),
    "mtp": ("mtp", KITS["moe, groups"], None), "mtp, two": ("mtp", AHEAD, None)}


def pair(name):
    """(kind, model, draft model). A draft is right now and then, since its head is the model's."""
    kind, model, draft = PAIRS[name]
    model = sharp_model(KITS[model] if isinstance(model, str) else model)
    if draft is None:
        return kind, model, None
    draft = sharp_model(KITS[draft], 0)
    with torch.no_grad():
        draft.embed.weight.copy_(model.embed.weight)
    return kind, model, draft


def prompts_of(rng: random.Random) -> list[list[int]]:
    """Texts that repeat themselves."""
    words = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 4))] for _ in range(3)]
    return [sum((rng.choice(words) for _ in range(rng.randint(1, 7))), [])[:20] for _ in range(8)]


@pytest.mark.parametrize("name", PAIRS)
def test_no_guess_changes_an_answer(name):
    kind, model, draft = pair(name)
    rng, oracle = random.Random(name), Oracle(model, most=12)
    prompts, drafted = prompts_of(rng), 0
    for settings in ({"draft_tokens": 7, "block_size": 3}, {"cache_tokens": 40, "block_size": 2, "chunk": 7}):
        engine = Engine(model, None, EngineConfig(**{"draft": kind, "draft_tokens": 3, "max_seqs": 8} | settings),
                        draft_model=draft)
        ways = [GREEDY, Sampling(seed=7, temperature=0.5)]
        requests = [Request(prompt=rng.choice(prompts), sampling=rng.choice(ways),
                            max_new=rng.randint(1, 12), stop_ids=rng.choice([(), (5, 6)]), n=rng.choice([1, 1, 2]))
                    for _ in range(12)]
        for request, (answers, whole) in zip(requests, drive(engine, requests, rng, cancel=0.03, rush=0.9)):
            for i, got in enumerate(answers):
                if request.sampling.greedy:
                    oracle.check(request, got, engine.limit, whole=whole)
                    continue
                sampling = replace(request.sampling, seed=7 + i)
                [want] = generate_uncached(model, None, [request.prompt], sampling=sampling, max_new=request.max_new,
                                           stop_ids=request.stop_ids)
                assert got.ids == want.ids[:len(got.ids)] and (not whole or got.finish == want.finish)
        stats = engine.stats()
        assert 0 <= stats.accepted <= stats.drafted
        drafted += stats.drafted
    assert drafted > 25 and oracle.near_ties <= 1


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=4), Sampling(temperature=0.8, top_p=0.9, seed=4)],
                         ids=["greedy", "plain", "nucleus"])
def test_a_draft_that_is_the_model_is_always_right(sampling):
    model = sharp_model(KITS["gqa"], dtype=torch.float64)
    requests = [Request(prompt=[3 * i, i, 7], sampling=sampling, max_new=21, n=2, stop_ids=()) for i in range(5)]
    stats = {}
    for tokens in (1, 4):
        engine = Engine(model, None, EngineConfig(draft="model", draft_tokens=tokens), draft_model=model)
        engine.generate(requests)
        stats[tokens] = engine.stats()
        assert stats[tokens].drafted == stats[tokens].accepted > 0
        assert stats[tokens].generated_tokens == 210
    # one token with the prompt, then five at a time, or two
    assert (stats[4].steps, stats[4].accepted) == (5, 160) and (stats[1].steps, stats[1].accepted) == (11, 100)


def test_a_draft_that_is_the_model_is_right_after_every_interruption():
    model = sharp_model(KITS["gqa"], dtype=torch.float64)
    config = EngineConfig(draft="model", cache_tokens=48, block_size=4, chunk=9, prefix_caching=False)
    engine = Engine(model, None, config, draft_model=model)
    engine.generate([Request(prompt=[3 * i, i, 7], sampling=Sampling(seed=i), max_new=21, n=2, stop_ids=())
                     for i in range(5)])
    stats = engine.stats()
    assert stats.preemptions and stats.drafted == stats.accepted > 50


def plain_model(vocab: int, modules: int = 2):
    """What it says next depends on the last token alone, and its modules for further tokens know how."""
    shape = Shape(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, ffn_dim=16, mtp=modules)
    model = build(shape.lm_config(vocab_size=vocab, seq_len=32)).double().eval()
    randomise(model)
    with torch.no_grad():
        model.embed.weight.mul_(4)
        model.norm.weight.mul_(torch.linspace(-2, 2, 16))             # else every token would follow itself
        for block in (*model.blocks, *(module.block for module in model.mtp)):
            block.mixer.o.weight.zero_()
            block.ffn.down.weight.zero_()
        for module in model.mtp:
            module.join.weight.copy_(torch.cat([torch.eye(16), torch.zeros(16, 16)], 1))
            module.embed_norm.weight.fill_(1)
            module.norm.weight.copy_(model.norm.weight)
    return model


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=4)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("settings", [{}, {"chunk": 3, "block_size": 2}, {"cache_tokens": 48, "block_size": 4}],
                         ids=["roomy", "chunks", "narrow"])
def test_modules_that_know_what_follows_are_always_right(sampling, settings):
    engine = Engine(plain_model(VOCAB), None, EngineConfig(**{"draft": "mtp", "draft_tokens": 9} | settings))
    requests = [Request(prompt=[i] * (i + 1), sampling=sampling, max_new=13, stop_ids=()) for i in range(5)]
    want = generate_uncached(engine.model, None, [r.prompt for r in requests], sampling=GREEDY, max_new=13, stop_ids=())
    got = engine.generate(requests)
    assert not sampling.greedy or [c.ids for [c] in got] == [c.ids for c in want]
    stats = engine.stats()
    assert stats.drafted == stats.accepted >= 5 * 6
    assert settings or (stats.steps, stats.drafted) == (5, 5 * 8)     # 1 + 3 + 3 + 3 + 3 tokens
    assert "cache_tokens" not in settings or stats.preemptions


@pytest.mark.parametrize("settings", [{}, {"chunk": 3, "block_size": 2}], ids=str)
def test_guesses_of_modules_are_those_of_the_whole_text(settings):
    """The first module's, whose cache never rests on a guess, against its training pass over all that is there."""
    model = sharp_model(KITS["moe, groups"], dtype=torch.float64)
    engine = Engine(model, None, EngineConfig(**{"draft": "mtp", "fused": False} | settings))
    for prompt in ([5, 6, 7, 8, 9, 3, 2], [1], [40, 40]):
        engine.submit(Request(prompt=prompt, sampling=GREEDY, max_new=8, stop_ids=()))
    compared = 0
    while engine.busy:
        engine.step()
        for s in engine.scheduler.running:
            if s.owner.guess:
                ids = torch.tensor([s.ids])
                with torch.no_grad():
                    out = model.train()(ids, torch.arange(len(s.ids))[None])
                model.eval()
                assert s.owner.guess[0] == (out.further[0][0, -2] @ out.head.T).argmax().item()
                compared += 1
    assert compared >= 15


# ------------------------------------------------------------------------------------------------------- distributions

@pytest.mark.parametrize("kind", ["off", "ngram", "model", "mtp"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.5, top_p=0.9)], ids=["plain", "nucleus"])
def test_first_tokens_have_the_models_own_distribution(kind, sampling):
    """Chi-square of the first four tokens over many seeds, against all texts that there are."""
    V, T, seeds, prompt = 3, 4, 3000, [0, 1, 2, 0, 1, 2, 0, 1]
    model = build(Shape(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, ffn_dim=16, mtp=1).lm_config(
        vocab_size=V, seq_len=32)).eval()
    randomise(model)
    with torch.no_grad():
        model.embed.weight.mul_(1.2)
    draft = build(model.config, seed=1).eval() if kind == "model" else None
    texts = list(itertools.product(range(V), repeat=T))
    exact = torch.ones(len(texts), dtype=torch.float64)
    ids = torch.tensor([prompt + list(text) for text in texts])
    with torch.inference_mode():
        logits = model(ids, torch.arange(ids.shape[1]).expand_as(ids)).logits()
    for t in range(T):
        probs, order = filtered(logits[:, len(prompt) + t - 1], sampling)
        probs = torch.zeros(len(texts), V).scatter_(1, order, probs).double()
        exact *= probs.gather(1, ids[:, len(prompt) + t:len(prompt) + t + 1])[:, 0]
    assert exact.sum().item() == pytest.approx(1) and exact.max() < 0.6
    engine = Engine(model, None, EngineConfig(draft=kind, draft_tokens=2, max_seqs=200), draft_model=draft)
    requests = [Request(prompt=prompt, sampling=replace(sampling, seed=1000 + i), max_new=T, n=200, stop_ids=())
                for i in range(0, seeds, 200)]
    counts = Counter(tuple(answer.ids) for answers in engine.generate(requests) for answer in answers)
    assert sum(counts.values()) == seeds
    observed = torch.tensor([counts[text] for text in texts], dtype=torch.float64)
    assert not observed[exact == 0].any()
    many = exact * seeds >= 5                     # the rare ones are taken together
    o, e = (torch.cat([x[many], x[~many].sum()[None]]) for x in (observed, exact * seeds))
    o, e = o[e > 0], e[e > 0]
    degrees = len(e) - 1
    assert degrees > 10 and ((o - e).square() / e).sum() < degrees + 4 * (2 * degrees) ** 0.5
    assert kind == "off" or engine.stats().drafted > 300


# --------------------------------------------------------------------------------------------------------------- errors

@pytest.mark.parametrize("kind, model, draft, words", [
    ("off", "gqa", "gqa", 'draft="off"'), ("ngram", "gqa", "gqa", "draft model was given"),
    ("model", "gqa", None, "needs a draft model"), ("mtp", "gqa", None, "no modules for further tokens"),
    ("ngram", "delta", None, "the model has linear attention"), ("model", "gqa", "mixed", "the draft model has linear"),
    ("ngram", kit(DYNAMIC), None, "the model has dynamic rope"),
    ("model", "gqa", kit("gqa", vocab_size=VOCAB - 1), "has 60 tokens and the model 61"),
    ("model", "gqa", kit("gqa", seq_len=16, learned_positions=True), "knows 16 positions")])
def test_drafts_that_cannot_be(kind, model, draft, words):
    draft = None if draft is None else sharp_model(KITS[draft] if isinstance(draft, str) else draft)
    with pytest.raises(UserError, match=words):
        model = sharp_model(KITS[model] if isinstance(model, str) else model)
        Engine(model, None, EngineConfig(draft=kind), draft_model=draft)
