"""Every mixer and every position scheme: what may be seen, what is remembered, and two forms of one computation."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mindseed.infer.engine import Engine, EngineConfig, Request
from mindseed.models.config import LMConfig, config_from_dict, config_to_dict
from mindseed.nn.alibi import alibi_slopes
from mindseed.nn.attend import Layout, attend, attend_oracle
from mindseed.nn.gqa import GQAConfig
from mindseed.nn.linear_attention import DeltaConfig, chunked, recurrent
from mindseed.nn.mla import MLA
from mindseed.nn.rope import RopeConfig, rope_tables, rotate
from tests.tiny import (DYNAMIC, KITS, MIXER_KIT, VOCAB, flat, kit, kit_model, pages, random_batch, some_rows,
                        tiny_model)

EXACT = {"rtol": 1e-8, "atol": 1e-8}


@pytest.fixture(params=KITS.values(), ids=KITS.keys())
def config(request) -> LMConfig:
    return request.param


def ids_and_positions(rows: int, length: int, seed: int = 0):
    ids = torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    return ids, torch.arange(length).expand(rows, length)


@torch.no_grad()
def test_decode_equals_prefill(config):
    model = kit_model(config)
    ids, positions = ids_and_positions(3, 17)
    full = model(ids, positions).logits()
    for size, cuts in ((4, [0, 5, 8, 9, 10, 11, 17]), (1, list(range(18))), (3, [0, 1, 2, 9, 10, 17])):
        cache = pages(model, 3, block_size=size)
        parts = [model(ids[:, a:b], positions[:, a:b], cache).logits() for a, b in zip(cuts, cuts[1:])]
        torch.testing.assert_close(torch.cat(parts, 1), full, **EXACT)


@torch.no_grad()
def test_prompts_of_unequal_length_share_a_cache(config):
    model = kit_model(config)
    ids, _ = ids_and_positions(3, 8)
    lengths, more = [8, 5, 1], torch.randint(0, VOCAB, (3, 4))
    padded = torch.tensor([[t if t < n else -1 for t in range(8)] for n in lengths])
    cache = pages(model, 3)
    model(ids, padded, cache)
    rows, step = [0, 1, 2], None
    for i in range(4):
        if i == 2:                                                       # a sequence ends, the others go on
            rows = [0, 2]
            cache = some_rows(cache, rows)
        at = torch.tensor([[lengths[row] + i] for row in rows])
        step = model(more[rows, i:i + 1], at, cache).logits()[:, 0]
    for row, got in zip(rows, step):
        alone = torch.cat([ids[row, :lengths[row]], more[row]])[None]
        want = model(alone, torch.arange(alone.shape[1])[None]).logits()[0, -1]
        torch.testing.assert_close(got, want, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[0, 6, 7, 8], [0, 1, 2, 3, 8], [0, 8]])
def test_prompts_of_unequal_length_may_be_read_in_chunks(config, cuts):
    """A row whose prompt has ended meets pads, alone in a chunk too, and then goes on."""
    model, lengths = kit_model(config), [8, 3, 6]
    ids, positions = ids_and_positions(3, 12)
    padded = torch.tensor([[t if t < n else -1 for t in range(8)] for n in lengths])
    cache = pages(model, 3)
    for a, b in zip(cuts, cuts[1:]):
        model(ids[:, a:b], padded[:, a:b], cache)
    for i in range(4):
        at = torch.tensor([[n + i] for n in lengths])
        got = model(ids.gather(1, at), at, cache).logits()[:, 0]
    for row, n in enumerate(lengths):
        want = model(ids[row:row + 1, :n + 4], positions[row:row + 1, :n + 4]).logits()[0, -1]
        torch.testing.assert_close(got[row], want, **EXACT)


def test_future_tokens_do_not_leak(config):
    for training in (False, True):
        model = kit_model(config).train(training)
        a, positions = ids_and_positions(2, 12)
        b = a.clone()
        b[:, 7:] = (b[:, 7:] + 1) % VOCAB
        out_a, out_b = model(a, positions), model(b, positions)
        torch.testing.assert_close(out_a.hidden[:, :7], out_b.hidden[:, :7], rtol=1e-12, atol=1e-12)
        assert (out_a.hidden[:, 7:] - out_b.hidden[:, 7:]).abs().amin(-1).max() > 1e-6
        for distance, (x, y) in enumerate(zip(out_a.further, out_b.further), start=1):
            torch.testing.assert_close(x[:, :7 - distance], y[:, :7 - distance], rtol=1e-12, atol=1e-12)
            assert (x[:, 7 - distance] - y[:, 7 - distance]).abs().max() > 1e-6


RELATIVE = {name: c for name, c in KITS.items() if not c.learned_positions and not any(
    isinstance(layer.mixer, DeltaConfig) for layer in c.layers)}        # a recurrence is told where a text begins


@pytest.mark.parametrize("config", RELATIVE.values(), ids=RELATIVE.keys())
def test_only_distances_matter_where_positions_are_relative(config):
    model = kit_model(config)
    ids, positions = ids_and_positions(1, 12)
    moved = model(ids, positions + 37).logits()
    torch.testing.assert_close(moved, model(ids, positions).logits(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in MIXER_KIT if n not in ("delta", "linear attention", "window 1")])
def test_distances_do_matter(name):
    model = kit_model(kit(name, name))
    ids, positions = ids_and_positions(1, 12)
    changed = model(ids, positions * 3).logits()
    far = (changed - model(ids, positions).logits()).abs().max()
    no_positions = isinstance(MIXER_KIT[name], GQAConfig) and MIXER_KIT[name].positions is None
    packed_alibi = "alibi" in name                                       # on rows without a cache it counts tokens
    assert far < 1e-9 if no_positions or packed_alibi else far > 1e-3


def test_packed_documents_equal_the_documents_apart(config):
    model = kit_model(config)
    lengths = (67, 5, 80)                                                # across chunks and blocks of queries
    config = replace(config, seq_len=256)
    model = kit_model(config)
    documents = [ids_and_positions(1, n, seed=n) for n in lengths]
    ids = torch.cat([*(d for d, _ in documents), torch.zeros(1, 2, dtype=torch.long)], 1)
    positions = torch.cat([*(p for _, p in documents), torch.zeros(1, 2, dtype=torch.long)], 1)
    both, start = model(ids, positions).logits(), 0
    for document, at in documents:
        n = document.shape[1]
        torch.testing.assert_close(both[:, start:start + n], model(document, at).logits(), rtol=1e-6, atol=1e-6)
        start += n


@torch.no_grad()
def test_state_spec_is_what_is_stored(config):
    model, (ids, positions) = kit_model(config), ids_and_positions(3, 6)
    state = pages(model, 3, 8)                                           # 6 blocks of 4 tokens, and the one for pads
    for a, b in ((0, 5), (5, 6)):
        model(ids[:, a:b], positions[:, a:b], state)
        for spec, pools, sequences in zip(model.state_specs(), state.cache.pools, state.cache.sequences):
            assert {name: (7, 4, *shape) for name, shape in spec.per_token.items()} \
                == {name: tuple(pool.blocks.shape) for name, pool in pools.items()}
            assert {name: (4, *shape) for name, shape in spec.per_seq.items()} \
                == {name: tuple(x.shape) for name, x in sequences.items()}
            assert spec.bytes_per_token(8) * 28 == sum(pool.blocks.nbytes for pool in pools.values())
            assert spec.bytes_per_seq(8) * 4 == sum(x.nbytes for x in sequences.values())


@torch.no_grad()
def test_a_window_keeps_its_tokens_only_and_sees_them_all():
    model = kit_model(kit("window", "window"))
    engine = Engine(model, None, EngineConfig(block_size=1))
    engine.submit(Request(prompt=[5] * 20, max_new=10))
    while engine.step():                                                 # two, and the one that comes next
        assert [sum(map(bool, table)) for s in engine.scheduler.running for table in s.tables] in ([2], [])
    ids, positions = ids_and_positions(2, 30)
    far = ids.clone()
    far[:, :25] = (far[:, :25] + 1) % VOCAB                              # two layers of 3 see 4 tokens back at most
    torch.testing.assert_close(model(far, positions).logits()[:, 29:], model(ids, positions).logits()[:, 29:], **EXACT)
    far[:, 25] = (far[:, 25] + 1) % VOCAB
    assert (model(far, positions).logits()[:, 29] - model(ids, positions).logits()[:, 29]).abs().max() > 1e-6


@pytest.mark.parametrize("layers, length", [(1, 14), (2, 6)])
@torch.no_grad()
def test_dynamic_scaling_decodes_as_if_the_whole_text_were_read_anew(layers, length):
    """With two layers only up to the trained length: beyond it, what the second layer remembers of a token was made
    when the text was shorter, and its angles smaller."""
    model = kit_model(kit(*[DYNAMIC] * layers))
    ids, positions = ids_and_positions(2, length)
    cache = pages(model, 2)
    model(ids[:, :4], positions[:, :4], cache)
    for t in range(4, length):
        step = model(ids[:, t:t + 1], positions[:, t:t + 1], cache).logits()[:, 0]
        torch.testing.assert_close(step, model(ids[:, :t + 1], positions[:, :t + 1]).logits()[:, -1], **EXACT)


@torch.no_grad()
def test_dynamic_scaling_goes_by_the_length_of_each_text():
    """A short text beside a long one keeps its angles, with a cache and without."""
    model, lengths = kit_model(kit(DYNAMIC)), [14, 7, 3]
    ids, positions = ids_and_positions(3, 15)
    padded = torch.tensor([[t if t < n else -1 for t in range(14)] for n in lengths])
    state, alone = pages(model, 3), [model(ids[i:i + 1, :n], positions[:1, :n]).logits() for i, n in enumerate(lengths)]
    for together in (model(ids[:, :14], padded, state), model(ids[:, :14], padded.masked_fill(padded < 0, 0))):
        for got, want, n in zip(together.logits(), alone, lengths):
            torch.testing.assert_close(got[:n], want[0], **EXACT)
    at = torch.tensor(lengths)[:, None]
    step = model(ids.gather(1, at), at, state).logits()
    for i, n in enumerate(lengths):
        want = model(ids[i:i + 1, :n + 1], positions[:1, :n + 1]).logits()[0, -1:]
        torch.testing.assert_close(step[i], want, **EXACT)


@pytest.mark.parametrize("name", ["mla", "mla, plain queries"])
@torch.no_grad()
def test_absorbed_equals_expanded(name, monkeypatch):
    model = kit_model(kit(name, name))
    ids, positions = ids_and_positions(2, 15)
    outs = []
    for way in (True, False):
        monkeypatch.setattr(type(MIXER_KIT[name]), "absorbing_is_cheaper", lambda self, queries, keys, way=way: way)
        used = []
        monkeypatch.setattr(MLA, "absorbed", lambda self, *a, f=MLA.absorbed: (used.append(1), f(self, *a))[1])
        cache = pages(model, 2)
        outs.append(torch.cat([model(ids[:, a:b], positions[:, a:b], cache).logits()
                               for a, b in ((0, 9), (9, 10), (10, 15))], 1))
        assert bool(used) == way
        monkeypatch.undo()
    torch.testing.assert_close(*outs, **EXACT)
    torch.testing.assert_close(outs[0], model(ids, positions).logits(), **EXACT)


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_chunked_equals_recurrent(chunk, delta):
    g = torch.Generator().manual_seed(0)
    B, T, H, K, V = 2, 23, 3, 5, 4
    q, k = (torch.nn.functional.normalize(torch.randn(B, T, H, K, generator=g, dtype=torch.float64), dim=-1)
            for _ in range(2))
    v = torch.randn(B, T, H, V, generator=g, dtype=torch.float64)
    log_a, b = -torch.rand(B, T, H, generator=g).double() * 3, torch.rand(B, T, H, generator=g).double()
    memory = torch.randn(B, H, K, V, generator=g, dtype=torch.float64)
    positions = random_batch(B, T, seed=3).positions.clone()
    positions[0] = torch.arange(7, 7 + T)                                # goes on from a memory
    positions[1, -3:] = -1                                               # ends in pads
    inputs = [x.requires_grad_() for x in (q, k, v, log_a, b, memory)]
    weight, weight_memory = torch.randn(B, T, H, V, generator=g).double(), torch.randn_like(memory)
    weight[1, -3:] = 0
    results = []
    for form in (lambda *a: recurrent(*a, delta=delta), lambda *a: chunked(*a, delta=delta, chunk=chunk)):
        y, after = form(q, k, v, log_a, b, positions, memory)
        grads = torch.autograd.grad((y * weight).sum() + (after * weight_memory).sum(), inputs, allow_unused=True)
        results.append((y * (weight != 0), after, *(g for g in grads)))
    for want, got in zip(*results):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("window", [None, 1, 5, 70, 1000])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_attend_equals_the_oracle(packed, alibi, window):
    g = torch.Generator().manual_seed(0)
    T = 150                                                              # more than two blocks of queries
    q, k = (torch.randn(2, T, n, 8, generator=g, dtype=torch.float64, requires_grad=True) for n in (6, 2))
    v = torch.randn(2, T, 2, 5, generator=g, dtype=torch.float64, requires_grad=True)
    positions = random_batch(2, T).positions if packed else torch.arange(T).expand(2, T)
    layout = Layout(positions)
    layout.add_view(window, distance=alibi)
    document = (positions == 0).cumsum(1)
    back = torch.arange(T)[:, None] - torch.arange(T)
    visible = (document[:, :, None] == document[:, None, :]) & (back >= 0) & (back < (window or T))
    slopes = alibi_slopes(6).double() if alibi else None
    bias = -slopes[:, None, None] * back if alibi else None
    weight = torch.randn(2, T, 6, 5, generator=g, dtype=torch.float64)
    want = attend_oracle(q, k, v, visible[:, None], scale=0.3, bias=bias)
    flexible = Layout(positions, attention="flex")
    flexible.add_view(window, distance=alibi)
    assert (flexible.views[window].blocks is not None) == (packed or window is not None and window < T)
    with torch.no_grad():                                                # it has no backward pass on a CPU
        got = attend(q.detach(), k.detach(), v.detach(), flexible.views[window], scale=0.3, slopes=slopes)
    torch.testing.assert_close(got, want.detach(), **EXACT)
    wanted = torch.autograd.grad((want * weight).sum(), (q, k, v))
    views = [layout.views[window], replace(layout.views[window], ranges=None, mask=visible[:, None])]   # blocked, SDPA
    for view in views:
        got = attend(q, k, v, view, scale=0.3, slopes=slopes)
        torch.testing.assert_close(got, want, **EXACT)
        for a, b in zip(torch.autograd.grad((got * weight).sum(), (q, k, v)), wanted):
            torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has a backward pass on GPUs only")
@pytest.mark.parametrize("changes", [{}, {"pattern": "S", "window": 70}])
def test_flex_attention_learns_as_masks_do(changes):
    model = tiny_model(head_dim=16, **changes).cuda()
    batch, gradients = random_batch(2, 300).to("cuda"), []
    for model.attention in ("sdpa", "flex"):
        loss = model(batch.ids, batch.positions).logps(batch.targets).mul(batch.weights).sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*gradients):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


def test_recomputation_changes_nothing(config):
    batch, grads = random_batch(3, 16), []
    for recompute in (False, True):
        model = kit_model(config).train()
        model.recompute = recompute
        output = model(batch.ids, batch.positions)
        loss = sum(h.square().sum() for h in (output.hidden, *output.further))
        (loss + sum(a.sum() for a in output.aux.values())).backward()
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        grads.append(flat(model, "grad"))
    assert torch.equal(*grads)


def test_config_survives_json(config):
    assert config_from_dict(config_to_dict(config)) == config


def test_interleaved_rotation_is_the_same_rotation_of_other_pairs():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 8, generator=g, dtype=torch.float64, requires_grad=True)
    tables = rope_tables(RopeConfig(), 8, torch.arange(3).expand(2, 3), torch.float64)
    shuffle = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    turned = rotate(x, *tables, interleaved=True)
    torch.testing.assert_close(turned[..., shuffle], rotate(x[..., shuffle], *tables), **EXACT)
    assert torch.autograd.gradcheck(lambda z: rotate(z, *tables, interleaved=True), x)
