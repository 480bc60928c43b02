"""States of optimisers in 8 bits and in pages: near AdamW's, the same after a resume, and where they are said to be."""
from __future__ import annotations

import copy
import io
import sys
from dataclasses import replace

import pytest
import torch

from mindseed.base.errors import UserError
from mindseed.objectives.sft import SFT
from mindseed.optim.groups import OptimConfig, build_optimizers, parameter_groups
from mindseed.optim.muon import Muon
from mindseed.optim.paged import Paged
from mindseed.quant.nf4 import dynamic_values
from mindseed.recipes.options import TrainOptions, without_effect
from mindseed.train.native import NativeBackend
from mindseed.train.state import capture, restore
from mindseed.train.step import Run, train_step
from tests.tiny import Fixed, flat, random_batch, tiny_model

EIGHT = OptimConfig(kind="adamw", lr=1e-2, states="8bit")
WIDE = {"dim": 64, "ffn_dim": 80}                            # matrices of more than 4096 entries


def make_run(config: OptimConfig, seed: int = 0, wrap=lambda o: o) -> Run:
    model = tiny_model(seed, **WIDE).train()
    optimizers = [wrap(o) for o in build_optimizers(parameter_groups(model, config), config)]
    backend = NativeBackend(model, SFT(), optimizers, max_norm=config.max_norm)
    batches = [random_batch(4, 24, seed=s) for s in range(3)]
    return Run(Fixed(batches), SFT(), backend, schedule=lambda step: 1e-2 / (1 + step))


def losses(run: Run, count: int) -> list[float]:
    return [train_step(run)["loss"] for _ in range(count)]


def through_a_file(saved: dict) -> dict:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def goes_on_to_the_bit(make) -> None:
    run, half, other = make(0), make(0), make(9)
    want = losses(run, 6)
    got = losses(half, 3)
    restore(other, None, through_a_file(capture(half, None)))
    assert got + losses(other, 3) == want
    assert torch.equal(flat(other.backend.model), flat(run.backend.model))


# -------------------------------------------------------------------------------------------------------------- 8 bits

@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def test_large_matrices_are_packed_and_nothing_else(bitsandbytes):
    run = make_run(EIGHT)
    losses(run, 1)
    plain, small = run.backend.optimizers
    assert type(plain) is torch.optim.AdamW and type(small) is bitsandbytes.optim.AdamW8bit
    names = {p: name for name, p in run.backend.model.named_parameters()}
    assert all(name.startswith("blocks.") and p.ndim == 2 for p, name in names.items() if p in small.state)
    assert {p for p in names if "norm" in names[p] or names[p] == "embed.weight"} <= plain.state.keys()
    packed = {names[p]: state["state1"].dtype == torch.uint8 for p, state in small.state.items()}
    assert packed == {names[p]: p.numel() >= 4096 for p in small.state} and len({*packed.values()}) == 2
    for p, state in small.state.items():
        if packed[names[p]]:
            assert state["state1"].nbytes == state["state2"].nbytes == p.numel()
            assert torch.equal(state["qmap1"], dynamic_values(torch.device("cpu")))


def test_updates_are_nearly_those_of_adamw(bitsandbytes):
    """By the distance that both have gone; packed first moments are off by some percent of a block's largest."""
    exact, packed = make_run(replace(EIGHT, states="fp32")), make_run(EIGHT)
    start = flat(exact.backend.model).clone()
    far = losses(exact, 30), losses(packed, 30)
    gone = [flat(run.backend.model) - start for run in (exact, packed)]
    assert 0 < (gone[0] - gone[1]).norm() < 0.1 * gone[0].norm()
    torch.testing.assert_close(torch.tensor(far[1]), torch.tensor(far[0]), rtol=0.02, atol=0)


def test_a_run_in_8_bits_goes_on_to_the_bit(bitsandbytes):
    goes_on_to_the_bit(lambda seed: make_run(EIGHT, seed))


def test_decay_and_rate_of_a_resumed_run_are_those_asked_for_now(bitsandbytes):
    run = make_run(EIGHT)
    losses(run, 1)
    other = make_run(replace(EIGHT, weight_decay=0.5, beta1=0.5))
    restore(other, None, through_a_file(capture(run, None)))
    group = other.backend.optimizers[1].param_groups[0]
    assert group["weight_decay"] == 0.5 and group["betas"] == (0.5, 0.95)


def test_bitsandbytes_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"needs bitsandbytes: .*\[8bit\]"):
        make_run(EIGHT)


def test_muon_has_no_8_bits():
    with pytest.raises(ValueError, match="set kind to adamw"):
        OptimConfig(kind="muon", states="8bit")


# --------------------------------------------------------------------------------------------------------------- pages

class Away(Paged):
    """Pages where both memories are the CPU's: what comes over is a copy, and is spoilt when it has gone home."""

    def __init__(self, inner, page_bytes=20_000) -> None:
        super().__init__(inner, page_bytes)
        self.over, self.most = 0, 0

    def fetch(self, x, param):
        if isinstance(x, torch.Tensor):
            self.over += x.nbytes
            self.most = max(self.most, self.over)
            return x.clone()
        return x

    def send(self, x, home):
        back = super().send(x, home)
        if isinstance(x, torch.Tensor):
            self.over = max(0, self.over - x.nbytes)
            if back is x:
                back = x.clone()
            x.fill_(torch.nan)
        return back


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_pages_change_nothing(kind):
    config = OptimConfig(kind=kind, lr=1e-2)
    whole, paged = make_run(config), make_run(config, wrap=Away)
    assert losses(paged, 5) == losses(whole, 5)
    assert torch.equal(flat(paged.backend.model), flat(whole.backend.model))
    for a, b in zip(paged.backend.optimizers, whole.backend.optimizers):
        size = sum(x.nbytes for state in b.state.values() for x in state.values())
        largest = max(sum(x.nbytes for x in state.values()) for state in b.state.values())
        assert a.over == 0 and largest <= a.most <= max(20_000, largest) < size


def test_states_stay_in_the_memory_that_they_were_given():
    """Pinned memory is taken once; a step writes into it."""
    paged = make_run(OptimConfig(kind="adamw", lr=1e-2), wrap=Away)
    losses(paged, 1)
    optimizer = paged.backend.optimizers[0]
    places = {(p, name): x.data_ptr() for p, state in optimizer.state.items() for name, x in state.items()}
    losses(paged, 2)
    assert places == {(p, name): x.data_ptr() for p, state in optimizer.state.items() for name, x in state.items()}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_paged_run_goes_on_to_the_bit(kind):
    goes_on_to_the_bit(lambda seed: make_run(OptimConfig(kind=kind, lr=1e-2), seed, wrap=Away))


@pytest.mark.parametrize("first, then", [(lambda o: o, Away), (Away, lambda o: o)], ids=["into", "out of"])
def test_checkpoints_are_the_same_with_and_without_pages(first, then):
    config = OptimConfig(kind="muon", lr=1e-2)
    run, other = make_run(config, wrap=first), make_run(config, 9, wrap=then)
    losses(run, 3)
    restore(other, None, through_a_file(capture(run, None)))
    assert losses(other, 3) == losses(run, 3)
    assert torch.equal(flat(other.backend.model), flat(run.backend.model))


def test_parameters_without_a_gradient_are_left_alone():
    a, b = (torch.nn.Parameter(torch.randn(4, 3)) for _ in range(2))
    paged = Away(Muon([a, b], lr=0.1))
    a.grad, before = torch.ones(4, 3), b.clone()
    paged.step()
    assert torch.equal(b, before) and b not in paged.state and a in paged.state
    assert paged.state_dict()["param_groups"][0]["params"] == [0, 1]


def test_a_step_that_fails_leaves_the_groups_whole():
    a = torch.nn.Parameter(torch.randn(4, 3))
    inner = Muon([a], lr=0.1)
    paged = Away(inner)
    a.grad = torch.ones(4, 3)
    inner.update = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        paged.step()
    assert inner.param_groups is paged.param_groups and inner.param_groups[0]["params"] == [a]


def test_on_a_cpu_pages_have_no_effect_and_say_so():
    config = OptimConfig(lr=1e-2, states="paged")
    assert not any(isinstance(o, Paged) for o in build_optimizers(parameter_groups(tiny_model(), config), config))
    options = TrainOptions(device="cpu", optim=config)
    assert without_effect(options) == [
        "optim.states has no effect: states are paged from a CUDA GPU, and this runs on cpu"]
    assert without_effect(replace(options, optim=replace(config, states="fp32"))) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_on_a_gpu_states_lie_on_the_cpu(kind):
    finals = []
    for states in ("fp32", "paged"):
        config = OptimConfig(kind=kind, lr=1e-2, states=states)
        model = tiny_model(**WIDE).cuda().train()
        optimizers = build_optimizers(parameter_groups(model, config), config)
        backend = NativeBackend(model, SFT(), optimizers)
        run = Run(Fixed([random_batch(4, 24)]), SFT(), backend, schedule=lambda s: 1e-2, device=torch.device("cuda"))
        losses(run, 3)
        for optimizer in optimizers:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        losses(run, 3)
        home = {x.device.type for o in optimizers for s in o.state.values() for x in s.values() if x.ndim}
        pinned = all(x.is_pinned() for o in optimizers for s in o.state.values() for x in s.values() if not x.is_cuda)
        assert home == {"cuda" if states == "fp32" else "cpu"} and pinned
        finals.append(flat(model))
    torch.testing.assert_close(*finals)
