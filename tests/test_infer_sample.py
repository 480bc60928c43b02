"""Choosing a token: each filter against transformers, the drawing against its distribution, seeds against batches."""
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from mindseed.base.errors import UserError
from mindseed.infer.sample import Chooser, Sampling, choose, filtered, gumbel, penalised


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


def choosers(sampling, prompts, seeds, vocab=97):
    return [Chooser.of(sampling, seed, prompt, vocab) for prompt, seed in zip(prompts, seeds)]


def draws(logits, rows, times):
    """Tokens (times, B) drawn from the same logits again and again."""
    found = []
    for _ in range(times):
        found.append(choose(logits, rows).ids)
        for row, id in zip(rows, found[-1].tolist()):
            row.chose(id)
    return torch.stack(found)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.8}, {"temperature": 0.5}, {"min_p": 0.2}], ids=str)
def test_draws_follow_the_distribution(options):
    """Over many seeds at one step, and over many steps of one seed."""
    logits, sampling = torch.tensor([[2.0, 1.0, 0.0, -1.0, -40.0]]), Sampling(**options)
    want = spread(logits, sampling)[0]
    over_seeds = choose(logits.expand(20_000, -1), choosers(sampling, [[0]] * 20_000, range(20_000), 5)).ids
    over_steps = choose(logits.expand(20_000, -1), [Chooser(sampling=sampling, seed=7, step=i) for i in range(20_000)]
                        ).ids
    for ids in (over_seeds, over_steps):
        share = torch.bincount(ids, minlength=5) / 20_000
        assert (share - want).abs().max() < 5 * 0.5 / 20_000**0.5
        assert (share[want == 0] == 0).all()


def test_a_row_draws_the_same_whoever_is_beside_it():
    logits, sampling = random_logits(4), Sampling(top_p=0.9, repetition_penalty=1.2)

    def drawn(rows, other=sampling):
        made = choosers(sampling, [[r, 2 * r] for r in rows], [100 + r for r in rows])
        extra = choosers(other, [[5]], [3])
        return draws(torch.cat([logits[rows], logits[:1]]), made + extra, 20)

    together = drawn([0, 1, 2, 3])
    for row in range(4):
        assert torch.equal(drawn([row])[:, 0], together[:, row])
        assert torch.equal(drawn([row], Sampling(temperature=0))[:, 0], together[:, row])
    assert not torch.equal(together[:, 0], together[:, 1])


def test_choosing_changes_nothing_until_it_is_told():
    logits = random_logits(2)
    rows = choosers(Sampling(frequency_penalty=1.0), [[1], [2]], [7, 8])
    before = logits.clone()
    assert torch.equal(choose(logits, rows).ids, choose(logits, rows).ids) and torch.equal(logits, before)
    assert len({tuple(x) for x in draws(logits, rows, 9).tolist()}) > 1


def test_greedy_is_the_largest_after_the_penalty():
    logits = torch.tensor([[1.0, 1.2, -3.0]])
    assert choose(logits, choosers(Sampling(temperature=0), [[1]], [0], 3)).ids.item() == 1
    rows = choosers(Sampling(temperature=0, repetition_penalty=1.5), [[1]], [0], 3)
    assert draws(logits, rows, 2)[:, 0].tolist() == [0, 1]                 # 1.2 / 1.5, then both are penalised


def test_penalties_and_biases_are_those_of_their_formula():
    logits, prompt, answer = random_logits(1), [3, 4, 4], [4, 5, 5, 5]
    sampling = Sampling(frequency_penalty=0.5, presence_penalty=0.25, temperature=0.7,
                        logit_bias=((4, 1.5), (9, -100.0)))
    [row] = choosers(sampling, [prompt], [1])
    for id in answer:
        row.chose(id)
    want = logits.clone()
    want[0, 4] += 1.5 - 0.5 - 0.25
    want[0, 5] += -3 * 0.5 - 0.25                                          # prompts do not count here
    want[0, 9] -= 100
    got = choose(logits, [row])
    probs = (want / 0.7).log_softmax(-1)
    assert got.sampled_logps.item() == pytest.approx(probs[0, got.ids.item()].item(), abs=1e-5)
    assert got.logps.item() == pytest.approx(logits.log_softmax(-1)[0, got.ids.item()].item(), abs=1e-5)
    noise = gumbel(torch.tensor([[1]]), torch.tensor([[4]]), torch.arange(97)[None])
    assert got.ids.item() == (probs + noise).argmax().item()


def test_what_a_grammar_forbids_is_never_drawn():
    logits, rows = random_logits(2).expand(2, -1), choosers(Sampling(), [[0], [0]], [1, 1])
    rows[0].allowed = torch.arange(97) < 3
    ids = draws(logits, rows, 200)
    assert ids[:, 0].max() < 3 and ids[:, 1].max() >= 3
    assert set(ids[:, 0].tolist()) == {0, 1, 2}
    rows[0].allowed = torch.arange(97) == 90
    choice = choose(logits, rows)
    assert choice.ids[0] == 90 and choice.sampled_logps[0].item() == 0


# -------------------------------------------------------------------------------------------------------------- noise

def grid(n=120):
    """Uniform numbers (seeds, steps, ids) beneath the noise of a cube of neighbours."""
    at = torch.arange(n)
    seeds, steps = at.repeat_interleave(n)[:, None], at.repeat(n)[:, None]
    return (-(-gumbel(seeds, steps, torch.arange(64).expand(n * n, -1))).exp()).exp().view(n, n, 64)


def test_noise_is_uniform_and_independent_over_seeds_steps_and_ids():
    u = grid()
    n = u.numel()
    counts = torch.histc(u, 100, 0, 1)
    assert ((counts - n / 100).square() / (n / 100)).sum() < 99 + 5 * (2 * 99) ** 0.5       # chi-square, 99 degrees
    for flat in (u.mean((1, 2)), u.mean((0, 2)), u.mean((0, 1))):          # no seed, step or id is favoured
        each = n / len(flat)
        assert ((flat - 0.5).abs() < 5 / (12 * each) ** 0.5).all()
    v = u - 0.5
    pairs = {"seed": (v[1:], v[:-1]), "step": (v[:, 1:], v[:, :-1]), "id": (v[..., 1:], v[..., :-1]),
             "seed and step": (v[1:, :-1], v[:-1, 1:]), "step and id": (v[:, 1:, :-1], v[:, :-1, 1:]),
             "both": (v[1:, 1:], v[:-1, :-1]), "seed for step": (v, v.transpose(0, 1))}
    for name, (a, b) in pairs.items():
        if name == "seed for step":                                        # all but its diagonal
            off = ~torch.eye(len(v), dtype=torch.bool)
            a, b = a[off], b[off]
        assert (a * b).mean().abs() * 12 < 6 / a.numel() ** 0.5, name
    for stride in (2, 4, 16, 64):
        a, b = v[:-stride], v[stride:]
        assert (a * b).mean().abs() * 12 < 6 / a.numel() ** 0.5


def test_noise_of_far_seeds_is_finite_and_different():
    seeds = torch.tensor([0, 1, (1 << 62) + 3, (1 << 63) - 1])[:, None]
    noise = gumbel(seeds, torch.full_like(seeds, 5), torch.arange(1000).expand(4, -1))
    assert noise.isfinite().all() and noise.dtype == torch.float64
    assert torch.unique(noise).numel() == noise.numel()


def test_noise_is_known():
    """Seeds keep their meaning: answers that were drawn once can be drawn again, by later versions too."""
    noise = gumbel(torch.tensor([[42]]), torch.tensor([[3]]), torch.tensor([[0, 1, 999]]))[0]
    assert noise.tolist() == pytest.approx([-0.6952001108887773, 1.7981610375035824, -1.651177456927423], abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, (1 << 63) - 1), step=st.integers(0, 1 << 20), id=st.integers(0, 1 << 20))
def test_noise_is_splitmix_of_whole_numbers(seed, step, id):
    """The same in Python's integers, which have no sign and no wrap."""
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1

    def mix(x):
        x &= mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31

    bits = mix(mix(mix(seed + golden) + (step + 1) * golden) + (id + 1) * golden) >> 12
    want = -math.log(-math.log((bits + 0.5) * 2.0 ** -52))
    assert gumbel(*(torch.tensor([[x]]) for x in (seed, step, id))).item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("options, words", [
    ({"temperature": -0.1}, "temperature=-0.1"), ({"temperature": float("nan")}, "temperature=nan"),
    ({"temperature": float("inf")}, "temperature=inf"), ({"top_p": 0}, "top_p=0.*above 0"), ({"top_p": -1}, "top_p=-1"),
    ({"top_p": 1.5}, "top_p=1.5"), ({"top_k": -1}, "top_k=-1"), ({"min_p": -0.2}, "min_p=-0.2"),
    ({"min_p": 1.0}, "min_p=1.0"), ({"repetition_penalty": 0}, "repetition_penalty=0"),
    ({"repetition_penalty": -2}, "repetition_penalty=-2"), ({"seed": -1}, "seed=-1"), 
    ({"frequency_penalty": 101}, "frequency_penalty=101"),
    ({"presence_penalty": float("nan")}, "presence_penalty=nan"), ({"logit_bias": ((1, 1e5),)}, "logit_bias"),
    ({"seed": 1 << 63}, "seed=")])
def test_values_out_of_range_are_named(options, words):
    with pytest.raises(UserError, match=words):
        Sampling(**options)
