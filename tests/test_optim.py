"""Optimisers against torch's, schedules at their corners, and which parameter goes where."""
from __future__ import annotations

import pytest
import torch

from mindseed.optim.ema import EMA
from mindseed.optim.groups import OptimConfig, build_optimizers, parameter_groups
from mindseed.optim.muon import Muon, orthogonalise
from mindseed.optim.schedule import ScheduleConfig, learning_rate
from tests.tiny import flat, tiny_model


@pytest.mark.parity
def test_muon_equals_torch():
    g = torch.Generator().manual_seed(0)
    shapes = [(8, 12), (8, 12), (20, 6), (5, 5)]
    ours = [torch.nn.Parameter(torch.randn(s, generator=g)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
    a = Muon(ours, **options)
    b = torch.optim.Muon(theirs, nesterov=True, adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=0.02, atol=2e-3)        # both iterate in bfloat16, ours in one batch


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (3, 4, 9)])
def test_orthogonalise_keeps_directions_and_levels_sizes(shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = orthogonalise(x)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ y @ vh.mT                                          # diagonal, with the new singular values
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-9
    assert 0.3 < values.min() and values.max() < 1.3


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_one_group(tied):
    model = tiny_model(tied=tied)
    groups = {g.name: g for g in parameter_groups(model, OptimConfig(kind="muon", lr=1.0))}
    named = [n for g in groups.values() for n in g.names]
    assert sorted(named) == sorted(n for n, _ in model.named_parameters())
    assert all("norm" in n for n in groups["vectors"].names)
    assert set(groups["embeddings"].names) == ({"embed.weight"} if tied else {"embed.weight", "head.weight"})
    assert all(n.startswith("blocks.") for n in groups["matrices"].names)
    assert groups["vectors"].weight_decay == groups["embeddings"].weight_decay == 0
    optimizers = build_optimizers(list(groups.values()), OptimConfig(kind="muon", lr=1.0))
    assert [type(o).__name__ for o in optimizers] == ["AdamW", "Muon"]
    adamw = OptimConfig(kind="adamw", lr=1.0)
    assert len(build_optimizers(parameter_groups(model, adamw), adamw)) == 1


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_schedules(kind):
    at = learning_rate(ScheduleConfig(kind=kind, warmup_steps=10, decay=0.25, final=0.1), peak=2.0, steps=110)
    rates = [at(s) for s in range(110)]
    assert all(a < b for a, b in zip(rates[:10], rates[1:11])) and rates[0] > 0
    assert max(rates) == pytest.approx(2.0, rel=0.01)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    if kind == "constant":
        assert rates[-1] == 2.0
    else:
        assert 0.2 <= rates[-1] < 0.35
    if kind == "wsd":
        assert rates[80] == 2.0 and rates[90] < 2.0
    assert all(learning_rate(ScheduleConfig(kind=kind), peak=1.0, steps=1)(0) > 0 for _ in (0,))


def test_ema_is_the_weighted_mean_of_the_past():
    model = tiny_model().double()
    ema = EMA(model, 0.9)
    want = flat(model).clone()
    for step in range(1, 30):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        ema.update()
        decay = min(0.9, (1 + step) / (10 + step))
        want = decay * want + (1 - decay) * flat(model)
    before = flat(model).clone()
    with ema.applied():
        torch.testing.assert_close(flat(model), want)
    assert torch.equal(flat(model), before)
