"""Many adapters over one base in one batch: every row is answered as by a model into which its adapter was merged."""
from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from mindseed.adapt.lora import (LoRAConfig, adaptable, add_adapter, merge, parts_of, remove_adapter, set_active,
                                 without_adapters)
from mindseed.base.errors import UserError
from mindseed.infer.engine import Engine, EngineConfig, Request
from mindseed.infer.sample import Sampling
from mindseed.models.lm import LM
from mindseed.nn.adapters import switch_of
from tests.oracle import GREEDY, Oracle, drive, sharp_model
from tests.test_lora import IDS, POSITIONS, decoded, hidden, shake
from tests.tiny import KITS, VOCAB, kit_model

NAMES = ("a", "b", "c")
PLAIN = [name for name in KITS if "moe" not in name]


def add_three(model: LM, seed: int = 0, size: float = 0.1) -> None:
    """Of different kinds, ranks and targets: a row whose adapter has no part in a matrix meets the base there."""
    up = [t for t in ("kv_up", "up", "v") if any(name.endswith(f".{t}") for name in adaptable(model))]
    for i, (name, config) in enumerate(zip(NAMES, (LoRAConfig(rank=3), LoRAConfig(rank=2, dora=True, targets=tuple(up)),
                                                   LoRAConfig(rank=5, rs=True, targets=("o", "blocks.0.*"))))):
        add_adapter(model, config, name, seed=seed + i)
    shake(model, *NAMES, seed=seed, size=size)
    set_active(model, {})


def alone(model: LM, answer=hidden) -> dict[str | None, torch.Tensor]:
    """What each adapter answers if it is the only one."""
    found = {None: answer(model)}
    for name in NAMES:
        set_active(model, {name: 1.0})
        found[name] = answer(model)
    set_active(model, {})
    return found


@pytest.mark.parametrize("name", PLAIN)
def test_every_row_has_its_own_adapter(name):
    """Reading at once, and token by token into a cache, where latent attention would take one matrix apart."""
    model = kit_model(KITS[name])
    add_three(model)
    want, cached = alone(model), alone(model, decoded)
    with torch.no_grad():
        for rows in (("a", "b", None), ("c", "c", "a"), ("b", "b", "b"), (None, "c", None), (None,) * 3):
            with switch_of(model).rows_use(rows):
                got, step_by_step = hidden(model), decoded(model)
            for i, which in enumerate(rows):
                torch.testing.assert_close(got[i], want[which][i], rtol=1e-9, atol=1e-9)
                torch.testing.assert_close(step_by_step[i], cached[which][i], rtol=1e-9, atol=1e-9)
            with switch_of(model).rows_use(rows), without_adapters(model):
                torch.testing.assert_close(hidden(model), want[None], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(hidden(model), want[None], rtol=1e-9, atol=1e-9)            # and afterwards none


def test_rows_learn_what_they_would_alone():
    model = kit_model(KITS["gqa"])
    add_three(model)
    for name in NAMES:
        for part in parts_of(model, name).values():
            part.requires_grad_(True)
    pull = torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with switch_of(model).rows_use(["b", "a", "b"]):
        (hidden(model) * pull).sum().backward()
    got = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad()
    for name, rows in (("a", [1]), ("b", [0, 2])):
        set_active(model, {name: 1.0})
        (model(IDS[rows], POSITIONS[rows]).hidden * pull[rows]).sum().backward()
    want = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    for key, x in got.items():
        torch.testing.assert_close(x, want[key], rtol=1e-9, atol=1e-9)


def test_stacks_follow_what_is_added_removed_and_learnt():
    model = kit_model(KITS["gqa"])
    add_three(model)
    switch = switch_of(model)

    def check(*rows):
        with torch.no_grad(), switch.rows_use(rows):
            got = hidden(model)
        for i, which in enumerate(rows):
            set_active(model, {} if which is None else {which: 1.0})
            torch.testing.assert_close(got[i], hidden(model)[i])
        set_active(model, {})

    with torch.no_grad():
        check("a", None, "c")
        add_adapter(model, LoRAConfig(rank=7), "d")
        shake(model, "d")
        set_active(model, {})
        check("a", None, "d")
        shake(model, "a", seed=5)
        Engine(model, None).update_weights(model)                     # who changes them says so
        check("a", "b", "d")
        remove_adapter(model, "b")
        check("a", "c", "d")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_a_base_of_half_the_width(dtype):
    model = kit_model(KITS["gqa"]).to(dtype)
    add_three(model, size=0.05)
    want = alone(model)
    with torch.no_grad(), switch_of(model).rows_use(["a", "b", "c"]):
        got = hidden(model)
    assert got.dtype == dtype
    for i, name in enumerate(NAMES):
        assert (got[i] - want[name][i]).abs().float().mean() < 0.05


# --------------------------------------------------------------------------------------------------------- the engine

def merged_models(name: str, seed: int = 0) -> tuple[LM, dict[str | None, LM]]:
    """A model with three adapters; and for each name a plain model in which that one is merged."""
    model, plain = sharp_model(KITS[name], seed), {}
    add_three(model, size=0.06)
    for which in (None, *NAMES):
        plain[which] = sharp_model(KITS[name], seed)
        add_three(plain[which], size=0.06)
        if which is None:
            for other in NAMES:
                remove_adapter(plain[which], other)
        else:
            set_active(plain[which], {which: 1.0})
            merge(plain[which], keep=False)
    return model, plain


@pytest.mark.parametrize("name", ["gqa", "window", "mla", "mixed"])
def test_a_mixed_batch_answers_as_each_merged_model_alone(name):
    """Random arrivals, cancellations, preemptions; the same few texts under all adapters, with prefixes kept."""
    model, plain = merged_models(name)
    oracles = {which: Oracle(one, most=6) for which, one in plain.items()}
    rng = random.Random(name)
    texts = [[rng.randrange(VOCAB) for _ in range(20)] for _ in range(2)]
    cached = 0
    for settings in ({"block_size": 4}, {"block_size": 2, "cache_tokens": 48, "chunk": 6},
                     {"block_size": 8, "max_seqs": 3}):
        engine = Engine(model, None, EngineConfig(**settings))
        requests = [Request(prompt=rng.choice(texts)[:rng.randint(1, 20)], sampling=GREEDY, max_new=rng.randint(1, 6),
                            n=rng.choice([1, 1, 2]), stop_ids=(), prompt_logps=rng.random() < 0.2,
                            adapter=rng.choice([None, *NAMES])) for _ in range(10 if name == "mixed" else 24)]
        for request, (answers, whole) in zip(requests, drive(engine, requests, rng, cancel=0.05, rush=0.9)):
            for got in answers:
                oracles[request.adapter].check(request, got, engine.limit, whole=whole)
        cached += engine.stats().cached_tokens
    assert sum(oracle.near_ties for oracle in oracles.values()) <= 1
    assert cached > 50 or name == "mixed"                            # which has states of fixed size, not kept
    answers = {tuple(oracle.answer(texts[0]).ids) for oracle in oracles.values()}
    assert len(answers) == 4                                          # or nothing here could fail


@pytest.mark.parametrize("together", [True, False])
def test_no_block_is_shared_between_adapters(together):
    """One prompt under all of them, twice: what is found in the cache is what the same adapter has read."""
    model, plain = merged_models("gqa")
    engine = Engine(model, None, EngineConfig(block_size=4))
    prompt = IDS[0, :12].tolist() + [7]
    names = [None, *NAMES]
    for again in range(2):
        before = engine.stats().cached_tokens
        for group in [names] if together else [[name] for name in names]:
            requests = [Request(prompt=prompt, sampling=GREEDY, max_new=5, stop_ids=(), adapter=name) for name in group]
            for name, [got] in zip(group, engine.generate(requests)):
                Oracle(plain[name]).check(requests[0], got, engine.limit)
        assert engine.stats().cached_tokens - before == (48 if again else 0)
    assert len({name for name in engine.kinds[0].named}) == 4 * 4     # 17 ids of each, in blocks of 4


def test_guesses_by_a_draft_or_the_text_change_no_answer():
    model, plain = merged_models("gqa")
    draft = sharp_model(KITS["gqa"], 3)
    prompts = [IDS[i].tolist() for i in range(3)]
    for config, more in ((EngineConfig(draft="ngram"), {}), (EngineConfig(draft="model"), {"draft_model": draft})):
        engine = Engine(model, None, config, **more)
        requests = [Request(prompt=p, sampling=Sampling(seed=4), max_new=12, stop_ids=(), adapter=name)
                    for p in prompts for name in (None, *NAMES)]
        for request, [got] in zip(requests, engine.generate(requests)):
            [[want]] = Engine(plain[request.adapter], None, EngineConfig()).generate([replace(request, adapter=None)])
            assert got.ids == want.ids
        assert engine.stats().drafted


def test_vectors_of_texts_have_the_adapter_too():
    model, plain = merged_models("gqa")
    engine, texts = Engine(model, None), [IDS[0].tolist(), IDS[1, :5].tolist()]
    for name in (None, *NAMES):
        want = Engine(plain[name], None).embed(texts)
        torch.testing.assert_close(engine.embed(texts, name), want, rtol=1e-4, atol=1e-4)


def test_adapters_that_a_request_cannot_have():
    model = sharp_model(KITS["gqa"])
    request = Request(prompt=[1, 2], sampling=GREEDY, max_new=2, adapter="a")
    with pytest.raises(UserError, match="there is no adapter 'a'; the model has none"):
        Engine(model, None).submit(request)
    with pytest.raises(UserError, match="there is no adapter 'a'"):
        Engine(model, None).embed([[1, 2]], "a")
    add_three(model)
    engine = Engine(model, None)
    with pytest.raises(UserError, match="there is no adapter 'x'; a, b, c are there"):
        engine.submit(replace(request, adapter="x"))
    set_active(model, {"b": 1.0})
    with pytest.raises(UserError, match="active for all rows"):
        engine.submit(request)
    [[one]] = engine.generate([replace(request, adapter=None)])       # the model as it stands
    set_active(model, {})
    engine.update_weights(model)
    [[two]] = engine.generate([replace(request, adapter="b")])
    assert one.ids == two.ids
    mixture = sharp_model(KITS["moe"])
    add_adapter(mixture, LoRAConfig(targets=("q", "blocks.*.shared.up")), "fine")
    add_adapter(mixture, LoRAConfig(), "routed")
    set_active(mixture, {})
    engine = Engine(mixture, None)
    engine.generate([replace(request, adapter="fine"), replace(request, adapter=None)])
    with pytest.raises(UserError, match="routed experts"):
        engine.submit(replace(request, adapter="routed"))


def test_a_mixture_answers_by_rows_where_its_experts_are_left_alone():
    model = kit_model(KITS["moe"])
    add_adapter(model, LoRAConfig(rank=2, targets=("q", "blocks.*.shared.*")), "a")
    add_adapter(model, LoRAConfig(rank=2), "routed", seed=1)
    shake(model, "a", "routed")
    set_active(model, {"a": 1.0})
    want = hidden(model)
    set_active(model, {})
    base = hidden(model)
    with torch.no_grad(), switch_of(model).rows_use(["a", None, "a"]):
        torch.testing.assert_close(hidden(model), torch.stack([want[0], base[1], want[2]]))


def test_an_engine_hears_of_adapters_that_came_later():
    """By update_weights; its kernels had copies of a model without them."""
    model, other = (sharp_model(KITS["gqa"]) for _ in range(2))
    engine = Engine(model, None)
    request = Request(prompt=IDS[0].tolist(), sampling=GREEDY, max_new=8, stop_ids=())
    [[before]] = engine.generate([request])
    for one in (model, other):
        add_adapter(one, LoRAConfig(rank=4))
        shake(one, "default")
    engine.update_weights(model)
    [[after]] = engine.generate([request])
    merge(other)
    [[want]] = Engine(other, None).generate([request])
    assert after.ids == want.ids != before.ids
