"""The step: what must not change a result (accumulation, ranks, a stop in between) and what must stop a run."""
from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from mindseed.base.errors import UserError
from mindseed.core import Batch
from mindseed.data.loader import PackedRows, RowSource
from mindseed.data.mix import Mixture
from mindseed.data.shards import MemoryDocuments
from mindseed.objectives.sft import SFT
from mindseed.optim.ema import EMA
from mindseed.optim.groups import OptimConfig, build_optimizers, parameter_groups
from mindseed.train.loop import Fit, Hook, fit, steps_for_minutes
from mindseed.train.loss_scale import LossScale
from mindseed.train.native import PATIENCE, NativeBackend, NonFinite
from mindseed.train.state import Checkpoints, capture, compare, restore
from mindseed.train.step import Run, train_step
from mindseed.train.validate import evaluate
from tests import spawn
from tests.tiny import VOCAB, Fixed, flat, random_batch, split, tiny_model


def make_run(model, source, *, kind="adamw", accumulate=1, precision="fp32", objective=None, lr=1e-2) -> Run:
    config = OptimConfig(kind=kind, lr=lr)
    objective = objective or SFT()
    backend = NativeBackend(model, objective, build_optimizers(parameter_groups(model, config), config),
                            precision=precision, max_norm=config.max_norm)
    return Run(source, objective, backend, schedule=lambda step: lr / (1 + step), accumulate=accumulate)


def documents(count: int, seed: int) -> MemoryDocuments:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 20, (count,), generator=g).tolist()
    return MemoryDocuments([(torch.randint(0, VOCAB, (n,), generator=g).tolist(), None) for n in lengths])


def mixture(batch_size: int, rank: int = 0, world: int = 1) -> RowSource:
    parts = [(PackedRows(documents(n, n), seq_len=24, seed=5), weight) for n, weight in ((40, 0.7), (30, 0.3))]
    return RowSource(Mixture(parts, seed=5), batch_size=batch_size, rank=rank, world=world)


def steps(run: Run, count: int) -> list[tuple[float, float]]:
    return [(m["loss"], m["grad_norm"]) for m in (train_step(run) for _ in range(count))]


# ------------------------------------------------------------------------------------------------ equivalent runs

@pytest.mark.parametrize("objective", [SFT(), SFT(label_smoothing=0.1, z_loss=1e-2)])
@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_accumulation_changes_nothing(pieces, objective):
    """Uneven counts of supervised tokens, and rows with none: a mean of means would show here."""
    batch = random_batch(8, 24, empty=(2, 3))
    assert pieces < 4 or split(batch, 4)[1].weights.sum() == 0
    one = make_run(tiny_model().double(), Fixed([batch]), objective=objective)
    many = make_run(tiny_model().double(), Fixed(split(batch, pieces)), accumulate=pieces, objective=objective)
    torch.testing.assert_close(torch.tensor(steps(many, 3)), torch.tensor(steps(one, 3)), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(flat(many.backend.model), flat(one.backend.model), rtol=1e-9, atol=1e-9)


def on_rank(rank: int, world: int) -> tuple:
    model = tiny_model(seed=rank).double()                                # DDP must start from rank 0's weights
    pieces = split(random_batch(8, 24, empty=(4, 5)), 4)
    run = make_run(model, Fixed(pieces[rank::world]), accumulate=2)
    out = steps(run, 3)
    streamed = make_run(tiny_model().double(), mixture(2, rank, world), accumulate=2, kind="muon")
    out += steps(streamed, 3)
    return out, flat(model).tolist(), flat(streamed.backend.model).tolist()


def test_two_ranks_equal_one_on_the_union():
    """Loss and gradient norm, since AdamW would hide a wrong scale; one micro-batch has no supervised token."""
    two, weights, streamed_weights = spawn.on_ranks(on_rank)[0]
    one = make_run(tiny_model().double(), Fixed([random_batch(8, 24, empty=(4, 5))]))
    streamed = make_run(tiny_model().double(), mixture(4), accumulate=2, kind="muon")
    want = steps(one, 3) + steps(streamed, 3)
    torch.testing.assert_close(torch.tensor(two), torch.tensor(want), rtol=1e-6, atol=1e-9)
    for got, run in ((weights, one), (streamed_weights, streamed)):
        got = torch.tensor(got, dtype=torch.float64)
        torch.testing.assert_close(got, flat(run.backend.model), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_bitwise(kind, precision):
    def fresh(seed=0):
        model = tiny_model(seed, dropout=0.2).train()
        torch.manual_seed(seed)
        run = make_run(model, mixture(2), kind=kind, accumulate=2, precision=precision)
        ema = EMA(model, 0.9)
        run.after_step.append(ema.update)
        return run, ema

    run, ema = fresh()
    want = steps(run, 8)
    half, half_ema = fresh()
    got = steps(half, 4)
    saved = copy.deepcopy(capture(half, half_ema))
    other, other_ema = fresh(seed=9)
    restore(other, other_ema, saved)
    got += steps(other, 4)
    assert got == want
    assert torch.equal(flat(other.backend.model), flat(run.backend.model))
    assert all(torch.equal(a, b) for a, b in zip(ema.average.values(), other_ema.average.values()))


def test_tokens_are_counted_by_what_is_learnt_from_and_not_by_what_losses_count():
    """A loss may be a mean over pairs or answers, or weigh tokens."""
    batch = random_batch(4, 24, empty=(1,))
    heavy = replace(batch, weights=3 * batch.weights)
    run = make_run(tiny_model(), Fixed([heavy]), objective=Rows())
    assert train_step(run)["supervised"] == run.tokens == int((batch.weights != 0).sum()) > 4


class Rows(SFT):
    """The loss of a row, whatever its length."""

    def count(self, batch: Batch) -> torch.Tensor:
        return (batch.weights != 0).any(-1).sum()


# -------------------------------------------------------------------------------------------------- what stops a run

def test_no_supervised_token_anywhere_is_an_error():
    run = make_run(tiny_model(), Fixed([random_batch(2, 8, empty=(0, 1))]))
    with pytest.raises(UserError, match="supervised"):
        train_step(run)


def test_non_finite_loss_names_its_samples_and_changes_nothing():
    model = tiny_model()
    with torch.no_grad():
        model.embed.weight[7] = torch.inf
    batch = random_batch(4, 8)
    ids = batch.ids.masked_fill(batch.ids == 7, 8)
    ids[2, 3] = 7
    run = make_run(model, Fixed([Batch(ids=ids, targets=batch.targets.clamp_min(8), weights=torch.ones(4, 8),
                                       positions=batch.positions, extra=batch.extra)]))
    model.head = copy.deepcopy(model.embed)                                # a finite head: only row 2 is spoilt
    with torch.no_grad():
        model.head.weight[7] = 0
    before = flat(model).clone()
    with pytest.raises(NonFinite, match=r"loss is nan.*row-2$"):
        train_step(run)
    assert torch.equal(flat(model), before) and run.step == 0


def test_non_finite_gradient_names_the_samples():
    run = make_run(tiny_model(), Fixed([random_batch(2, 8)]))
    next(iter(run.backend.params)).register_hook(lambda g: g * torch.nan)
    before = flat(run.backend.model).clone()
    with pytest.raises(NonFinite, match="gradient norm is nan.*row-0, row-1"):
        train_step(run)
    assert torch.equal(flat(run.backend.model), before)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_fp16_skips_overflowing_steps_and_goes_on(kind):
    run = make_run(tiny_model(), Fixed([random_batch(2, 8)]), kind=kind, precision="fp16")
    run.backend.scaler = LossScale(True, 2.0**40)
    before = flat(run.backend.model).clone()
    train_step(run)
    assert run.backend.skipped == 1 and torch.equal(flat(run.backend.model), before)
    losses = [train_step(run)["loss"] for _ in range(40)]
    assert run.backend.skipped > 1 and run.backend.scaler.scale < 2.0**40
    assert losses[-1] < losses[0]


def test_unsplittable_objective_refuses_accumulation():
    objective = SFT()
    object.__setattr__(objective, "splittable", False)
    with pytest.raises(UserError, match="cut into micro-batches"):
        make_run(tiny_model(), Fixed([random_batch(2, 8)]), accumulate=2, objective=objective)


# ------------------------------------------------------------------------------------------------------- objectives

def test_sft_equals_cross_entropy():
    model, batch = tiny_model().double(), random_batch(4, 16)
    output = model(batch.ids, batch.positions)
    logits = output.logits().flatten(0, 1)
    for smoothing, z in ((0.0, 0.0), (0.1, 0.0), (0.2, 0.03)):
        total, _ = SFT(label_smoothing=smoothing, z_loss=z).loss(output, batch)
        each = torch.nn.functional.cross_entropy(logits, batch.targets.flatten(), reduction="none",
                                                 label_smoothing=smoothing) + z * logits.logsumexp(-1) ** 2
        want = (each * batch.weights.flatten().double()).sum()
        torch.testing.assert_close(total, want)
        got = torch.autograd.grad(total, list(model.parameters()), retain_graph=True)
        plain = torch.autograd.grad(want, list(model.parameters()), retain_graph=True)
        for a, b in zip(got, plain):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_bits_per_byte():
    model, batch = tiny_model().double(), random_batch(4, 16)
    backend = make_run(model, Fixed([batch])).backend
    logps = model(batch.ids, batch.positions).logps(batch.targets)
    told = batch.weights > 0
    bits = -logps[told].sum().item() / math.log(2)
    for weights in (told.float(), told * torch.rand(told.shape).add(0.1), told * 16.0):      # training's own affair
        result = evaluate(backend, split(replace(batch, weights=weights), 2), raw_bytes=100)
        assert result["bits_per_byte"] == pytest.approx(bits / 100)
        assert result["nll"] == pytest.approx(bits * math.log(2) / told.sum().item())
    assert 0 < told.sum() < told.numel()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_tiny_model_overfits(kind):
    batch = random_batch(2, 12)
    run = make_run(tiny_model(), Fixed([batch]), kind=kind, lr=3e-2)
    run.schedule = lambda step: 3e-2
    losses = [train_step(run)["loss"] for _ in range(80)]
    assert losses[-1] < 0.1 * losses[0]


def test_hooks_and_after_step_run_when_they_should():
    seen, updates = [], []
    run = make_run(tiny_model(), Fixed([random_batch(2, 8)]))
    run.after_step.append(lambda: updates.append(run.step))
    fit(Fit(run=run, steps=7, hooks=[
        Hook(every=3, call=lambda s: seen.append((s, run.backend.model.training)) or {}, before_first=True)]))
    assert seen == [(0, False), (3, False), (6, False), (7, False)] and len(updates) == 7
    assert run.backend.model.training


def test_compiled_blocks_give_the_same_step():
    """Packed differently in every batch: the compiled code must not depend on where documents end."""
    runs = [make_run(tiny_model(), Fixed([random_batch(4, 70, seed=s) for s in range(4)])) for _ in range(2)]
    runs[1].backend.model.compile_blocks()
    counts = torch._dynamo.utils.counters["stats"]
    counts.clear()                                # of tests before this one in the same process
    plain, compiled = (torch.tensor(steps(run, 4)) for run in runs)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
    assert 0 < counts["unique_graphs"] <= 6, counts


def test_a_damaged_newer_checkpoint_does_not_cost_the_new_one(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path, keep=1, fingerprints={})
    run = make_run(tiny_model(), Fixed([random_batch(2, 8)]))
    run.step = 20
    damaged = checkpoints.save(run, None)
    (damaged / "trainer.pt").write_bytes(b"x")
    (tmp_path / ".step-00000040.tmp-1").mkdir()                          # what a kill has left
    (tmp_path / ".best.json.tmp-1").write_text("{")
    run.step = 13
    good = checkpoints.save(run, None)
    assert checkpoints.newest()[0] == good and "going back to step-00000013" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*"))


def test_an_average_asked_for_on_resuming_starts_from_the_restored_weights():
    trained = make_run(tiny_model(), Fixed([random_batch(2, 8)]))
    steps(trained, 3)
    saved, fresh = capture(trained, None), make_run(tiny_model(seed=9), Fixed([random_batch(2, 8)]))
    ema = EMA(fresh.backend.model, 0.99)
    restore(fresh, ema, saved)
    ema.swap()
    assert torch.equal(flat(fresh.backend.model), flat(trained.backend.model))


@pytest.mark.parametrize("kind,precision", [("adamw", "fp32"), ("muon", "fp32"), ("muon", "fp16")])
def test_timing_a_few_steps_leaves_no_trace(kind, precision):
    runs = [make_run(tiny_model(), mixture(2), kind=kind, precision=precision, accumulate=2) for _ in range(2)]
    before = copy.deepcopy(capture(runs[0], None))
    assert steps_for_minutes(runs[0], 1.0) > 1
    assert not compare(flatten(before), flatten(capture(runs[0], None)))
    assert steps(runs[0], 3) == steps(runs[1], 3)
    torch.testing.assert_close(flat(runs[0].backend.model), flat(runs[1].backend.model), rtol=0, atol=0)


def flatten(value, name="run") -> dict:
    """Every leaf under its path; tensors as lists, so that two can be told apart by ==."""
    if isinstance(value, dict) or isinstance(value, (list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in items for k, v in flatten(part, f"{name}.{key}").items()}
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value}


def test_fp16_that_never_fits_is_a_fault_in_the_end():
    run = make_run(tiny_model(), Fixed([random_batch(2, 8)]), precision="fp16")
    with torch.no_grad():
        run.backend.model.embed.weight.fill_(torch.inf)
    for _ in range(PATIENCE):
        train_step(run)
    with pytest.raises(NonFinite, match=f"{PATIENCE + 1} steps in a row, at a loss scale of"):
        train_step(run)
