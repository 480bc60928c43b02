"""Plans against what has been published: parameters and arithmetic of models, memory and speed of runs."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mindseed.base.mesh import ParallelOptions
from mindseed.models.presets import PRESETS, Shape
from mindseed.plan.flops import flops_per_token
from mindseed.plan.job import Job
from mindseed.plan.machines import Machine, capped, machine
from mindseed.plan.memory import memory_of, plan_memory, zero_bytes
from mindseed.plan.params import count_params
from mindseed.plan.published import PUBLISHED, published
from mindseed.plan.time import step_time


# ------------------------------------------------------------------------------------------------------ worked examples

PARAMETERS = {                                    # of the weights that were published; GPT-3's paper says 174,600M
    "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-70b": 68_976_648_192, "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496, "llama3.1-405b": 405_853_388_800, "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360, "qwen3-30b-a3b": 30_532_122_624, "deepseek-v3": 671_026_404_352}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_parameters_of_their_weights(name):
    total = count_params(published(name)).total
    if name in PARAMETERS:
        assert total == PARAMETERS[name]
    else:
        assert total == pytest.approx(174.6e9, rel=0.001)


def test_llama_7b_part_by_part():
    params = count_params(published("llama-7b"))
    assert params.embedding == params.head == 32_000 * 4096 == 131_072_000
    assert params.attention == 32 * 4 * 4096 * 4096 == 2_147_483_648
    assert params.ffn == 32 * 3 * 4096 * 11_008 == 4_328_521_728
    assert params.vectors == (2 * 32 + 1) * 4096 == 266_240


def test_a_billion_parameters_in_float32_take_sixteen_gigabytes_before_activations():
    assert 1e9 * zero_bytes(0, 1, weights=4, gradients=4, states=8) == 16e9
    plan = plan_memory(published("llama-7b"), batch_size=1, seq_len=128, itemsize=4)
    assert plan.weights + plan.gradients + plan.optimizer == 16 * 6_738_415_616


def test_gpt3_took_its_arithmetic():
    """3.14e23 in table D.1 of 2005.14165, which leaves attention's scores out: 1.4% here."""
    flops = 300e9 * flops_per_token(published("gpt3"), 2048).model
    assert 3.14e23 < flops == pytest.approx(3.14e23, rel=0.02)


def test_deepseek_activates_37_billion():
    assert count_params(published("deepseek-v3")).active == pytest.approx(37.6e9, rel=0.02)


# ------------------------------------------------------------------------------------------------- runs of others

# torchtitan's report (2410.06511; its benchmarks of December 2024 and June 2025, its docs/performance.md of September
# 2024): tokens a second and device. Everything else is in docs/PLANNING.md.
H100 = replace(capped(machine("H100"), 500, 700), memory=96e9, bandwidth=2.4e12)


def titan(model: str, said: float, world: int, rows: int, *, board: Machine = H100, recompute: Any = "selective",
          seq_len: int = 8192, compiled: bool = True, precision: str = "bf16", **axes) -> Any:
    job = Job(rows=rows, seq_len=seq_len, world=world, parallel=ParallelOptions(zero=3, **axes), recompute=recompute,
              compiled=compiled, precision=precision)
    words = [model, str(world), precision, *(f"{k} {v}" for k, v in axes.items()), str(seq_len),
             "" if compiled else "eager"]
    return pytest.param(model, job, board, said, id=" ".join(filter(None, words)))


A100, H200 = machine("A100"), machine("H200")
PIPED = {"precision": "fp8", "recompute": True, "tensor": 8, "pipe": 8, "microbatches": 8}
ROWS = [
    titan("llama3.1-8b", 5762, 8, 2, compiled=False), titan("llama3.1-8b", 6667, 8, 2),
    titan("llama3.1-8b", 8532, 8, 2, precision="fp8"), titan("llama3.1-8b", 5605, 128, 2, compiled=False),
    titan("llama3.1-8b", 6514, 128, 2), titan("llama3.1-8b", 8380, 128, 2, precision="fp8"),
    titan("llama3.1-8b", 3890, 8, 1, precision="fp8", recompute=True, seq_len=32_768),
    titan("llama3.1-8b", 2540, 8, 1, precision="fp8", recompute=True, seq_len=65_536, context=2),
    titan("llama3.1-70b", 829, 256, 16, precision="fp8", recompute=True, tensor=8),
    titan("llama3.1-70b", 597.3, 256, 16, recompute=True, tensor=8),
    titan("llama3.1-8b", 4378, 64, 12, tensor=8), titan("llama3.1-8b", 5078.1, 64, 12, precision="fp8", tensor=8),
    titan("llama3.1-405b", 100, 512, 32, **PIPED),
    titan("llama3.1-405b", 128, 512, 32, **PIPED,
          schedule="interleaved"),
    titan("llama3.1-405b", 76, 512, 8, **PIPED, seq_len=32_768),
    titan("llama3.1-405b", 47, 512, 8, **PIPED, seq_len=65_536,
          context=2),
    titan("llama3.1-8b", 10_938, 32, 2, board=H200, precision="fp8"),
    titan("llama3.1-8b", 10_753, 64, 2, board=H200, precision="fp8"),
    titan("llama3.1-8b", 2973, 64, 1, board=A100, compiled=False),
    titan("llama3.1-70b", 331, 64, 1, board=A100, recompute=True, compiled=False),
    titan("llama-13b", 2162, 64, 2, board=A100, recompute=False, seq_len=4096, compiled=False),
    titan("llama-13b", 1904, 64, 2, board=A100, seq_len=4096, compiled=False),
    titan("llama-70b", 355, 64, 1, board=A100, seq_len=4096, compiled=False),
    titan("llama-70b", 353, 64, 2, board=A100, seq_len=4096, compiled=False, recompute=True)]
LONG = [                                          # ring attention over many ranks: theirs lost more than ours plans
    titan("llama3.1-8b", 1071, 8, 1, precision="fp8", recompute=True, seq_len=131_072, context=4),
    titan("llama3.1-8b", 548, 8, 1, precision="fp8", recompute=True, seq_len=262_144, context=8),
    titan("llama3.1-405b", 31, 512, 8, **PIPED, seq_len=131_072,
          context=4),
    titan("llama3.1-405b", 16, 512, 8, **PIPED, seq_len=262_144,
          context=8)]


@pytest.mark.parametrize("model, job, board, said", ROWS)
def test_published_speeds_are_met_within_a_fifth(model, job, board, said):
    assert step_time(published(model), job, board).tokens_per_s / job.world == pytest.approx(said, rel=0.2)


@pytest.mark.parametrize("model, job, board, said", LONG)
def test_published_speeds_of_long_contexts_are_met_within_six_tenths(model, job, board, said):
    assert said < step_time(published(model), job, board).tokens_per_s / job.world < 1.6 * said


@pytest.mark.parametrize("world, pieces, said", [(8192, 32, 0.43), (16_384, 16, 0.41)])
def test_llama_3s_own_runs_are_met_with_the_bubble_of_their_schedule(world, pieces, said):
    """2407.21783, table 4: 405B, tensor 8, pipe 16. A layer a stage: eight stages on a rank."""
    parallel = ParallelOptions(zero=1, tensor=8, pipe=16, schedule="interleaved", microbatches=pieces)
    job = Job(rows=pieces, seq_len=8192, world=world, parallel=parallel, compiled=True)
    time = step_time(published("llama3.1-405b"), job, machine("H100"))
    theirs = (time.total - time.kinds["bubble"]) * (1 + 15 / (8 * pieces))
    assert time.mfu * time.total / theirs == pytest.approx(said, rel=0.05)


def test_deepseeks_own_run_would_wait_for_its_experts_half_of_the_time():
    """2412.19437: 180,000 H800 hours for 10^12 tokens, exchanges hidden by DualPipe, which ours are not."""
    parallel = ParallelOptions(zero=1, replicas=2, expert=64, pipe=16, schedule="dualpipe-v", microbatches=60)
    job = Job(rows=60, seq_len=4096, world=2048, parallel=parallel, precision="fp8", compiled=True)
    time, said = step_time(published("deepseek-v3"), job, machine("H800")), 1e12 / 180_000 / 3600
    assert 0.4 * said < time.tokens_per_s / 2048 < 0.6 * said
    busy = time.total - time.kinds["waiting"]
    assert time.tokens / busy / 2048 == pytest.approx(said, rel=0.15)


# -------------------------------------------------------------------------------------------------------- runs of ours

# What benchmarks/train_cuda.py measured on one H100 (docs/BENCHMARKS.md): milliseconds of a step and GB at its peak.
SMALL, LARGE = PRESETS["small"], Shape(layers=24, dim=1024, heads=16, kv_heads=8, head_dim=64, ffn_dim=3328, theta=1e6)
MEASURED = {"350M, compiled": (LARGE, 32_768, Job(rows=16, seq_len=2048, compiled=True), 178, 28.2),
            "350M, compiled, recomputed": (LARGE, 32_768, Job(rows=16, seq_len=2048, compiled=True, recompute=True),
                                           266, 10.3),
            "64M, compiled": (SMALL, 6400, Job(rows=32, seq_len=1024, compiled=True), 40.6, 6.7),
            "64M, eager": (SMALL, 6400, Job(rows=32, seq_len=1024), 113, 9.7)}


@pytest.mark.parametrize("name", MEASURED)
def test_steps_on_an_h100_take_the_planned_time_and_memory(name):
    shape, vocab, job, took, peak = MEASURED[name]
    config = shape.lm_config(vocab_size=vocab, seq_len=job.seq_len)
    assert 1e3 * step_time(config, job, machine("H100")).total == pytest.approx(took, rel=0.2)
    assert memory_of(config, job).total / 1e9 == pytest.approx(peak, rel=0.1)
