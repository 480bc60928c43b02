"""Planned memory against the bytes that tensors really take in a step, moment by moment."""
from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mindseed.adapt.lora import LoRAConfig, add_adapter
from mindseed.base.hardware import fast_bfloat16
from mindseed.base.mesh import ParallelOptions
from mindseed.core import Batch
from mindseed.models.config import LMConfig
from mindseed.models.lm import build
from mindseed.models.presets import Shape, mixture
from mindseed.nn.linear import BUFFERS
from mindseed.objectives.sft import SFT
from mindseed.optim.groups import OptimConfig, build_optimizers, parameter_groups
from mindseed.parallel.pipeline import keep_own_blocks
from mindseed.plan.job import Job, chunks
from mindseed.plan.memory import memory_of, rank_memory
from mindseed.plan.meter import peak_bytes
from mindseed.train.native import NativeBackend
from tests.spawn import on_ranks

SHAPE = Shape(layers=3, dim=96, heads=4, kv_heads=2, head_dim=24, ffn_dim=256)
FEW = Job(rows=4, seq_len=64, precision="fp32", cpu=True)
SETTINGS: dict[str, tuple[Shape, int, Job]] = {
    "adamw": (SHAPE, 800, FEW),
    "muon": (replace(SHAPE, ffn_dim=768), 300, replace(FEW, rows=1, optimizer="muon")),
    "bf16": (SHAPE, 800, replace(FEW, precision="bf16", widened=not fast_bfloat16())),
    "lora": (SHAPE, 800, replace(FEW, lora_rank=4)),
    "recomputed": (replace(SHAPE, layers=6), 300, replace(FEW, rows=8, recompute=True)),
    "selectively recomputed": (replace(SHAPE, layers=6), 300, replace(FEW, rows=8, recompute="selective")),
    "two micro-batches": (SHAPE, 800, replace(FEW, accumulate=2)),
    "long": (SHAPE, 300, replace(FEW, rows=1, seq_len=1024)),
    "further tokens": (replace(SHAPE, mtp=2), 800, FEW),
    "several chunks of logits": (SHAPE, 800, replace(FEW, rows=20)),
    "large vocabulary": (replace(SHAPE, tied=False), 6000, replace(FEW, rows=1)),
    "wide feed-forward": (replace(SHAPE, layers=2, ffn_dim=1024), 64, FEW),
    "mixture": (mixture(SHAPE, 128), 800, FEW),
    "plain": (replace(SHAPE, norm="layer", activation="gelu", positions="learned"), 800, FEW)}


def config_of(name: str) -> LMConfig:
    shape, vocab, job = SETTINGS[name]
    return shape.lm_config(vocab_size=vocab, seq_len=job.seq_len)


def steps(config: LMConfig, job: Job):
    """A callable that does one step, after one that made the optimiser's states."""
    model, optim = build(config).train(), OptimConfig(kind=job.optimizer, lr=1e-3)
    model.recompute = job.recompute
    if job.lora_rank:
        add_adapter(model, LoRAConfig(rank=job.lora_rank))
    backend = NativeBackend(model, SFT(), build_optimizers(parameter_groups(model, optim), optim),
                            precision=job.precision)
    ids = torch.randint(0, config.vocab_size, (job.rows, job.seq_len + 1))
    batch = Batch(ids=ids[:, :-1], targets=ids[:, 1:], weights=torch.ones(job.rows, job.seq_len),
                  positions=torch.arange(job.seq_len).expand(job.rows, -1))

    def step() -> None:
        for i in range(job.accumulate):
            backend.forward_backward(batch, scale=torch.tensor(1e-3), last=i == job.accumulate - 1)
        backend.step(1e-3)

    step()
    return step


@pytest.mark.parametrize("name", SETTINGS)
def test_the_peak_of_a_step_is_the_planned_one(name):
    config, job = config_of(name), SETTINGS[name][2]
    BUFFERS.__dict__.clear()                      # which other tests have filled
    measured = peak_bytes(lambda: steps(config, job))
    assert memory_of(config, job).total == pytest.approx(measured, rel=0.1)


def test_the_meter_counts_what_is_there_at_once_and_nothing_from_before():
    kept = torch.zeros(1 << 20)

    def prepare():
        mine = torch.zeros(1 << 18)               # 1 MB that stays
        torch.zeros(1 << 21).sum()                # 8 MB on the way, before it counts

        def run() -> None:
            for _ in range(3):
                torch.zeros(1 << 19).add_(mine.sum() + kept[0])                   # 2 MB at a time

        return run

    assert peak_bytes(prepare) == pytest.approx((1 << 20) + (1 << 21), rel=0.001)


def held_by(rank: int, ranks: int) -> list[int]:
    """Bytes of this rank's weights and states under each stage of ZeRO."""
    from mindseed.base import dist
    from mindseed.parallel.mesh import make_mesh
    from mindseed.parallel.parallelize import parallelize
    found = []
    for stage in (1, 2, 3):
        mesh = make_mesh(ParallelOptions(zero=stage), torch.device("cpu"))
        model, optim = build(config_of("adamw")).train(), OptimConfig(kind="adamw", lr=1e-3)
        parallelize(model, mesh)
        backend = NativeBackend(model, SFT(), build_optimizers(parameter_groups(model, optim), optim), mesh=mesh)
        ids = torch.randint(0, 800, (1, 65))
        backend.forward_backward(Batch(ids=ids[:, :-1], targets=ids[:, 1:], weights=torch.ones(1, 64),
                                       positions=torch.arange(64)[None]), scale=torch.tensor(1.0), last=True)
        backend.step(1e-3)
        states = [x for o in backend.optimizers for state in o.state.values() for x in state.values()
                  if isinstance(x, torch.Tensor) and x.ndim]
        found.append(sum(dist.local(x).nbytes for x in [*model.parameters(), *states]))
    return found


def test_slices_of_zero_are_as_large_as_planned():
    job = replace(FEW, world=2, rows=1)
    planned = [memory_of(config_of("adamw"), replace(job, parallel=ParallelOptions(zero=stage))) for stage in (1, 2, 3)]
    for held in on_ranks(held_by):
        assert held == [pytest.approx(plan.weights + plan.optimizer, rel=0.01) for plan in planned]


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero-bubble"])
@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pipe", [2, 3])
def test_every_rank_of_a_pipeline_has_the_weights_that_are_planned(schedule, ahead, tied, pipe):
    """The embedding too, of which the last stage may need a copy."""
    shape = replace(SHAPE, layers=7, tied=tied, mtp=ahead, positions="learned")
    config, options = shape.lm_config(vocab_size=300, seq_len=64), ParallelOptions(pipe=pipe, schedule=schedule)
    job = replace(FEW, world=pipe, parallel=options)
    for rank, held in enumerate(chunks(config, job)):
        model = build(config)
        keep_own_blocks(model, SimpleNamespace(sizes=options.sizes(pipe), options=options, place=lambda axis: rank))
        assert rank_memory(config, job, rank, held).weights == 4 * sum(p.numel() for p in model.parameters())
