"""The model: what may be seen, what is remembered, and the hand-written autograd functions against plain torch."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mindseed.core import Output
from mindseed.models.config import config_from_dict, config_to_dict
from mindseed.models.lm import build
from mindseed.models.presets import PRESETS, shape_of_depth
from mindseed.plan.params import count_params
from mindseed.nn.attend import Layout, attend, attend_oracle
from mindseed.nn.ffn import Gated
from mindseed.nn.linear import BUFFERS
from mindseed.nn.norm import RMSNorm
from mindseed.nn.rope import RopeConfig, rope_tables, rotate
from tests.tiny import VOCAB, flat, pages, random_batch, tiny_model

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def ids_and_positions(rows: int, length: int, seed: int = 0):
    ids = torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    return ids, torch.arange(length).expand(rows, length)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": False}, {"tied": False}, {"kv_heads": 4}, {"kv_heads": 1}])
def test_decode_equals_prefill(changes):
    model = tiny_model(**changes).double().eval()
    ids, positions = ids_and_positions(3, 13)
    with torch.no_grad():
        full = model(ids, positions).logits()
        cache = pages(model, 3)
        cuts = [0, 5, 8, 9, 10, 11, 12, 13]
        parts = [model(ids[:, a:b], positions[:, a:b], cache).logits() for a, b in zip(cuts, cuts[1:])]
    torch.testing.assert_close(torch.cat(parts, 1), full, **EXACT)


def test_prompts_of_unequal_length_share_a_cache():
    model = tiny_model().double().eval()
    ids, _ = ids_and_positions(2, 8)
    lengths = [8, 5]
    padded = torch.tensor([[t if t < n else -1 for t in range(8)] for n in lengths])
    with torch.no_grad():
        cache = pages(model, 2)
        model(ids, padded, cache)
        step = model(torch.tensor([[7], [9]]), torch.tensor([[8], [5]]), cache).logits()[:, 0]
        for row, n in enumerate(lengths):
            alone = torch.cat([ids[row:row + 1, :n], torch.tensor([[(7, 9)[row]]])], 1)
            want = model(alone, torch.arange(n + 1)[None]).logits()[0, -1]
            torch.testing.assert_close(step[row], want, **EXACT)


def test_future_tokens_do_not_leak():
    model = tiny_model().double()
    a, positions = ids_and_positions(2, 12)
    b = a.clone()
    b[:, 7:] = (b[:, 7:] + 1) % VOCAB
    out_a, out_b = model(a, positions).logits(), model(b, positions).logits()
    assert torch.equal(out_a[:, :7], out_b[:, :7])
    assert not torch.equal(out_a[:, 7:], out_b[:, 7:])


def test_only_distances_matter():
    model = tiny_model().double()
    ids, positions = ids_and_positions(1, 12)
    moved = model(ids, positions + 37).logits()
    torch.testing.assert_close(moved, model(ids, positions).logits(), rtol=1e-7, atol=1e-7)
    stretched = model(ids, positions * 3).logits()
    assert (stretched - moved).abs().max() > 1e-3


def test_packed_documents_equal_the_documents_apart():
    model = tiny_model().double()
    a, _ = ids_and_positions(1, 7, seed=1)
    b, _ = ids_and_positions(1, 5, seed=2)
    packed = torch.cat([a, b, torch.zeros(1, 2, dtype=torch.long)], 1)
    positions = torch.cat([torch.arange(7), torch.arange(5), torch.zeros(2, dtype=torch.long)])[None]
    both = model(packed, positions).logits()
    torch.testing.assert_close(both[:, :7], model(a, torch.arange(7)[None]).logits(), **EXACT)
    torch.testing.assert_close(both[:, 7:12], model(b, torch.arange(5)[None]).logits(), **EXACT)


def test_state_spec_is_what_is_stored():
    model = tiny_model()
    state = pages(model, 3, 8)
    ids, positions = ids_and_positions(3, 6)
    model(ids, positions, state)
    for spec, pools in zip(model.state_specs(), state.cache.pools):
        assert {name: (7, 4, *shape) for name, shape in spec.per_token.items()} \
            == {name: tuple(pool.blocks.shape) for name, pool in pools.items()}
        assert spec.bytes_per_token(2) == sum(pool.blocks[0, 0].numel() * 2 for pool in pools.values())


@pytest.mark.parametrize("packed", [False, True])
def test_attend_equals_the_oracle(packed):
    g = torch.Generator().manual_seed(0)
    T = 150                                                                # more than two blocks of queries
    q, k, v = (torch.randn(2, T, n, 8, generator=g, dtype=torch.float64, requires_grad=True) for n in (6, 2, 2))
    positions = random_batch(2, T).positions if packed else torch.arange(T).expand(2, T)
    document = (positions == 0).cumsum(1)
    visible = ((document[:, :, None] == document[:, None, :]) & torch.ones(T, T, dtype=torch.bool).tril())[:, None]
    weight = torch.randn(2, T, 6, 8, generator=g, dtype=torch.float64)
    layout = Layout(positions)
    layout.add_view(None)
    got = attend(q, k, v, layout.views[None])
    grads = torch.autograd.grad((got * weight).sum(), (q, k, v))
    want = attend_oracle(q, k, v, visible)
    torch.testing.assert_close(got, want, **EXACT)
    for a, b in zip(grads, torch.autograd.grad((want * weight).sum(), (q, k, v))):
        torch.testing.assert_close(a, b, **EXACT)


def test_hand_written_gradients():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 8, generator=g, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 3, 4, 8, generator=g, dtype=torch.float64, requires_grad=True)
    norm = RMSNorm(8).double()
    norm.weight.data.uniform_(0.5, 2, generator=g)
    assert torch.autograd.gradcheck(norm, x)
    assert torch.autograd.gradcheck(lambda w: torch.func.functional_call(norm, {"weight": w}, (x,)), norm.weight)
    assert torch.autograd.gradcheck(Gated.apply, (x, y))
    cos, sin = rope_tables(RopeConfig(), 8, torch.arange(3).expand(2, 3), torch.float64)
    assert torch.autograd.gradcheck(lambda z: rotate(z, cos, sin), x)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (8,), norm.weight, 1e-6), **EXACT)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunked_head_equals_log_softmax(chunk):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 6, generator=g, dtype=torch.float64, requires_grad=True)
    head = torch.randn(VOCAB, 6, generator=g, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, VOCAB, (2, 9), generator=g)
    weight, weight_lse = torch.randn(2, 2, 9, generator=g, dtype=torch.float64)
    logps, lse = Output(hidden=hidden, head=head, chunk=chunk).logps_and_lse(targets)
    logits = hidden @ head.T
    want = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(logps, want, **EXACT)
    torch.testing.assert_close(lse, logits.logsumexp(-1), **EXACT)
    got = torch.autograd.grad((logps * weight + lse * weight_lse).sum(), (hidden, head))
    plain = torch.autograd.grad((want * weight + logits.logsumexp(-1) * weight_lse).sum(), (hidden, head))
    for a, b in zip(got, plain):
        torch.testing.assert_close(a, b, **EXACT)


def test_a_model_that_inferred_first_trains_after():
    BUFFERS.__dict__.clear()
    model, batch = tiny_model(), random_batch(3, 16)
    for precision in ("fp32", "bf16"):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            model(batch.ids, batch.positions)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            model(batch.ids, batch.positions).logps(batch.targets).sum().backward()


def test_autocast_does_not_narrow_what_is_wide():
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(2, 9, 16, generator=g), torch.randn(VOCAB, 16, generator=g)
    targets = torch.randint(0, VOCAB, (2, 9), generator=g)
    q, k, v = (torch.randn(2, 9, n, 16, generator=g) for n in (4, 2, 2))
    layout = Layout(torch.arange(9).expand(2, 9))
    layout.add_view(None)
    results = []
    for narrow in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            output = Output(hidden=hidden, head=head, dtype=torch.float32)
            results.append((output.logps(targets), attend(q, k, v, layout.views[None])))
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_recomputation_changes_nothing():
    batch = random_batch(3, 16)
    grads = []
    for recompute in (False, True):
        model = tiny_model().double()
        model.recompute = recompute
        model(batch.ids, batch.positions).logps(batch.targets).sum().backward()
        grads.append(flat(model, "grad"))
    assert torch.equal(*grads)


def test_dropout_is_of_training_only():
    model = tiny_model(dropout=0.5)
    ids, positions = ids_and_positions(2, 8)
    assert not torch.equal(model.train()(ids, positions).hidden, model(ids, positions).hidden)
    assert torch.equal(model.eval()(ids, positions).hidden, model(ids, positions).hidden)


def test_same_seed_same_weights():
    config = PRESETS["toy"].lm_config(vocab_size=100, seq_len=64)
    assert torch.equal(flat(build(config, seed=3)), flat(build(config, seed=3)))
    assert not torch.equal(flat(build(config, seed=3)), flat(build(config, seed=4)))


def test_config_survives_json():
    config = PRESETS["mini"].lm_config(vocab_size=100, seq_len=64)
    assert config_from_dict(config_to_dict(config)) == config
    mixed = replace(config, layers=(config.layers[0], replace(config.layers[1], mixer=replace(
        config.layers[1].mixer, positions=RopeConfig(theta=5.0)))))
    assert config_from_dict(config_to_dict(mixed)) == mixed


def test_presets_have_their_sizes():
    counts = {name: count_params(shape.lm_config(vocab_size=6400, seq_len=512)) for name, shape in PRESETS.items()}
    sizes = {name: params.total for name, params in counts.items()}
    assert sizes["mini"] == 25_830_912 and sizes["small"] == 63_912_192
    assert round(sizes["minimind-moe"] / 1e6) == 198
    for name, params in counts.items():
        low, high = {"toy": (1e6, 3.5e6), "mini": (24e6, 28e6)}.get(name.split("-")[-1], (60e6, 68e6))
        assert low < params.active < high, f"{name}: {params.active:,}"
    depths = [shape_of_depth(d) for d in range(1, 25)]
    assert all(s.heads % s.kv_heads == 0 and s.dim == 64 * s.layers for s in depths)
