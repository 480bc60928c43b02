"""Choosing a token: each filter against transformers, the drawing against its distribution, seeds against batches."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from mindseed.base.errors import UserError
from mindseed.infer.sample import Sampler, Sampling, filtered, penalised


def spread(logits, sampling):
    """`filtered` as (B, V) probabilities in the order of ids."""
    probs, ids = filtered(logits, sampling)
    return torch.zeros(logits.shape, dtype=probs.dtype).scatter_(1, ids, probs)


def random_logits(rows=5, vocab=97, seed=0):
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parity
@pytest.mark.parametrize("options", [
    {"temperature": 0.3}, {"temperature": 2.5}, {"top_k": 1}, {"top_k": 7}, {"top_k": 1000}, {"top_p": 0.9},
    {"top_p": 1e-6}, {"top_p": 0.4, "temperature": 1.7}, {"min_p": 0.05}, {"min_p": 0.9},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8}, {"temperature": 1.3, "top_k": 30, "top_p": 0.95, "min_p": 0.1},
    {"top_p": 0.95, "min_p": 0.02}], ids=str)
def test_filters_equal_those_of_transformers(options):
    processors = pytest.importorskip("transformers.generation.logits_process")
    kinds = {"temperature": processors.TemperatureLogitsWarper, "top_k": processors.TopKLogitsWarper,
             "top_p": processors.TopPLogitsWarper, "min_p": processors.MinPLogitsWarper}
    logits = random_logits()
    want = logits.clone()
    for name in ("temperature", "top_k", "top_p", "min_p"):
        if name in options:
            want = kinds[name](options[name])(None, want)
    got = spread(logits, Sampling(**options))
    torch.testing.assert_close(got, want.softmax(-1))
    assert torch.equal(got > 0, want > -torch.inf)


@pytest.mark.parity
@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_equals_that_of_transformers(penalty):
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits, ids = random_logits(), torch.randint(0, 97, (5, 30))
    seen = torch.zeros(5, 97, dtype=torch.bool).scatter_(1, ids, True)
    want = processors.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    torch.testing.assert_close(penalised(logits, seen, penalty), want)


@settings(max_examples=50, deadline=None)
@given(temperature=st.floats(0.05, 5), top_k=st.integers(0, 60), top_p=st.floats(0.01, 1), min_p=st.floats(0, 0.99),
       seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_something_always_remains_and_sums_to_one(temperature, top_k, top_p, min_p, seed, dtype):
    logits = random_logits(seed=seed).to(dtype)
    probs, ids = filtered(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
    torch.testing.assert_close(probs.sum(-1), torch.ones(5, dtype=probs.dtype))
    assert probs.dtype == torch.promote_types(dtype, torch.float32)
    best = probs.argmax(-1, keepdim=True)
    assert torch.equal(logits.gather(1, ids.gather(1, best))[:, 0], logits.amax(-1))


def test_draws_follow_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -40.0]]).expand(20_000, -1)
    for options in ({}, {"top_k": 3}, {"top_p": 0.8}):
        sampler = Sampler(Sampling(**options), [[0]] * 20_000, list(range(20_000)), 5)
        share = torch.bincount(sampler(logits), minlength=5) / 20_000
        want = spread(logits[:1], Sampling(**options))[0]
        assert (share - want).abs().max() < 5 * 0.5 / 20_000**0.5
        assert (share[want == 0] == 0).all()


def test_a_row_draws_the_same_whoever_is_beside_it():
    logits = random_logits(4)
    sampling = Sampling(top_p=0.9, repetition_penalty=1.2)

    def draws(rows):
        sampler = Sampler(sampling, [[r, 2 * r] for r in rows], [100 + r for r in rows], 97)
        return torch.stack([sampler(logits[rows]) for _ in range(20)])

    together = draws([0, 1, 2, 3])
    for row in range(4):
        assert torch.equal(draws([row])[:, 0], together[:, row])
    assert not torch.equal(together[:, 0], together[:, 1])


def test_kept_rows_go_on_as_before():
    logits, sampling = random_logits(3), Sampling(repetition_penalty=2.0)
    whole, cut = (Sampler(sampling, [[1], [2], [3]], [7, 8, 9], 97) for _ in range(2))
    assert torch.equal(whole(logits), cut(logits))
    cut.keep([0, 2])
    for _ in range(9):
        assert torch.equal(whole(logits)[[0, 2]], cut(logits[[0, 2]]))


def test_greedy_is_the_largest_after_the_penalty():
    logits = torch.tensor([[1.0, 1.2, -3.0]])
    assert Sampler(Sampling(temperature=0), [[1]], [0], 3)(logits).item() == 1
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=1.5), [[1]], [0], 3)
    assert [sampler(logits).item() for _ in range(2)] == [0, 1]            # 1.2 / 1.5, then both are penalised


@pytest.mark.parametrize("options, words", [
    ({"temperature": -0.1}, "temperature=-0.1"), ({"temperature": float("nan")}, "temperature=nan"),
    ({"temperature": float("inf")}, "temperature=inf"), ({"top_p": 0}, "top_p=0.*above 0"), ({"top_p": -1}, "top_p=-1"),
    ({"top_p": 1.5}, "top_p=1.5"), ({"top_k": -1}, "top_k=-1"), ({"min_p": -0.2}, "min_p=-0.2"),
    ({"min_p": 1.0}, "min_p=1.0"), ({"repetition_penalty": 0}, "repetition_penalty=0"),
    ({"repetition_penalty": -2}, "repetition_penalty=-2"), ({"seed": -1}, "seed=-1")])
def test_values_out_of_range_are_named(options, words):
    with pytest.raises(UserError, match=words):
        Sampling(**options)
