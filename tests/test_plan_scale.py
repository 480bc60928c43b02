"""Plans for many devices: against torch's own schedules, explicit rings and meshes, and the papers' formulas."""
from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules

from mindseed.base.mesh import ParallelOptions, Sizes
from mindseed.models.config import LMConfig
from mindseed.models.presets import PRESETS, Shape
from mindseed.plan import communication, roofline
from mindseed.plan.activations import block_kept
from mindseed.plan.communication import Group, gather_s, groups
from mindseed.plan.job import Job, chunks, stages_of
from mindseed.plan.machines import BOARDS, Machine, machine
from mindseed.plan.memory import memory_of, rank_memory, zero_bytes
from mindseed.plan.params import count_params
from mindseed.plan.pipeline import bubble_s, in_flight
from mindseed.plan.published import published
from mindseed.plan.search import ROOM, nearest, search
from mindseed.plan.time import rank_work, step_time

SMALL = Shape(layers=8, dim=512, heads=8, kv_heads=8, head_dim=64, ffn_dim=1024, tied=False).lm_config(
    vocab_size=4096, seq_len=1024)
FEW = Job(rows=4, seq_len=1024)


# ------------------------------------------------------------------------------------------------------------ pipelines

class Stage:
    """As much of a stage as a schedule asks for while it makes its lists of actions."""

    def __init__(self, index: int, ranks: int, stages: int) -> None:
        self.stage_index, self.group_size, self.num_stages, self.group_rank = index, ranks, stages, 0
        self.is_first, self.is_last, self.has_backward, self.submod, self.device = index == 0, False, True, None, "cpu"

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


Action = tuple[str, int, int]                     # F, B, I or W; stage; piece


def actions(schedule: str, ranks: int, pieces: int) -> dict[int, list[list[Action]]]:
    """What every rank does in turn, from torch; what overlaps is one entry, of whose parts results leave at its end."""
    if schedule == "1f1b":                        # whose list torch keeps for display only, and numbers otherwise
        return {r: [[(kind, r, i)] for kind, i in one_forward_one_backward(min(pieces, ranks - r - 1), pieces)]
                for r in range(ranks)}
    if schedule == "gpipe":
        return {r: [[(kind, r, i)] for kind in "FB" for i in range(pieces)] for r in range(ranks)}
    made = {"interleaved": schedules.ScheduleInterleaved1F1B, "zero-bubble": schedules.ScheduleZBVZeroBubble,
            "dualpipe-v": schedules.ScheduleDualPipeV}[schedule](
        [Stage(i, ranks, 2 * ranks) for i in stages_of(schedule, ranks, 0)], n_microbatches=pieces,
        loss_fn=lambda *args: None)
    short = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    entries = {rank: [[(short[part.computation_type.name], part.stage_index, part.microbatch_index)
                       for part in action.sub_actions or [action] if part.computation_type.name in short]
                      for action in done if action is not None] for rank, done in made.pipeline_order.items()}
    return {rank: [entry for entry in some if entry] for rank, some in entries.items()}


def one_forward_one_backward(ahead: int, pieces: int):
    yield from (("F", i) for i in range(ahead))
    for i in range(pieces):
        if ahead + i < pieces:
            yield "F", ahead + i
        yield "B", i


def simulate(schedule: str, ranks: int, pieces: int, took: dict[str, float]) -> tuple[float, list[int]]:
    """(seconds until all ranks are through, most pieces kept on each), with seconds by kind of action of one stage."""
    todo = {rank: list(some) for rank, some in actions(schedule, ranks, pieces).items()}
    last = max(stage for some in todo.values() for entry in some for _, stage, _ in entry)
    ends: dict[Action, float] = {}
    clock, kept, most = [0.0] * ranks, [0] * ranks, [0] * ranks

    def before(kind: str, stage: int, piece: int) -> list[Action]:
        if kind == "F":
            return [("F", stage - 1, piece)] if stage else []
        if kind == "W":
            return [("I", stage, piece)]
        return [("F", stage, piece)] + ([("I", stage + 1, piece)] if stage < last else [])

    while any(todo.values()):
        moved = False
        for rank, some in todo.items():
            while some and all(need in ends for part in some[0] for need in before(*part)):
                entry, moved = some.pop(0), True
                for part in entry:
                    start = max([clock[rank], *(ends[need] for need in before(*part))])
                    clock[rank] = start + (took["I"] + took["W"] if part[0] == "B" else took[part[0]])
                    kept[rank] += {"F": 1, "B": -1, "W": -1, "I": 0}[part[0]]
                    most[rank] = max(most[rank], kept[rank])
                ends |= {("I" if kind == "B" else kind, stage, piece): clock[rank] for kind, stage, piece in entry}
        assert moved, "the schedule waits for itself"
    return max(clock), most


@pytest.mark.parametrize("ranks, pieces", [(2, 8), (4, 8), (4, 16), (8, 32)])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero-bubble", "dualpipe-v"])
def test_bubbles_and_pieces_under_way_are_those_of_torchs_schedules(schedule, ranks, pieces):
    per = len(stages_of(schedule, ranks, 0))
    for f, i, w in ((1.0, 1.0, 1.0), (1.0, 1.3, 0.7), (1.0, 0.95, 1.05)):
        total, most = simulate(schedule, ranks, pieces, {"F": f / per, "I": i / per, "W": w / per})
        idle = total - pieces * (f + i + w)
        exact = schedule in ("gpipe", "1f1b", "interleaved")
        assert bubble_s(schedule, ranks, f, i, w) == pytest.approx(idle, rel=1e-9 if exact else 0.1)
        assert most == [sum(in_flight(schedule, ranks, pieces, rank)) for rank in range(ranks)]


def test_equal_thirds_give_the_papers_bubbles():
    """2104.04473: (p - 1) / (v m) of the work. 2412.19437: (p - 1)(F&B + B - 3W) with the times of a stage."""
    assert bubble_s("1f1b", 8, 1, 1, 1) / (32 * 3) == 7 / 32
    assert bubble_s("interleaved", 8, 1, 1, 1) / (32 * 3) == 7 / (2 * 32)
    assert bubble_s("dualpipe-v", 8, 1, 1, 1) == 7 * (1.5 + 1.0 - 3 * 0.5)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero-bubble"])
@pytest.mark.parametrize("pipe", [1, 2, 3, 4])
def test_stages_hold_every_layer_once(schedule, pipe):
    config = replace(SMALL, layers=SMALL.layers[:7] * 2)
    held = chunks(config, replace(FEW, world=pipe, parallel=ParallelOptions(pipe=pipe, schedule=schedule)))
    assert len(held) == pipe
    assert sum(times for rank in held for chunk in rank for _, times in chunk.runs) == 14
    assert sum(chunk.first for rank in held for chunk in rank) == sum(c.last for r in held for c in r) == 1


# -------------------------------------------------------------------------------------------------------- communication

@pytest.mark.parametrize("sizes", [Sizes(pipe=2, replica=2, shard=4, context=2, tensor=2, expert=8),
                                   Sizes(shard=8, tensor=8), Sizes(pipe=4, shard=4, tensor=4, expert=2),
                                   Sizes(replica=16), Sizes(pipe=2, shard=2, context=4, tensor=1, expert=8)])
def test_groups_lie_in_nodes_as_ranks_do(sizes):
    ranks = np.arange(sizes.world).reshape(sizes.pipe, sizes.replica, sizes.shard, sizes.context, sizes.tensor)
    axes = {"pipe": ranks[:, 0, 0, 0, 0], "replica": ranks[0, :, 0, 0, 0], "shard": ranks[0, 0, :, 0, 0],
            "context": ranks[0, 0, 0, :, 0], "tensor": ranks[0, 0, 0, 0, :], "sharded": ranks[0, 0, :, :, 0].ravel(),
            "parts": ranks[0, :, :, :, 0].ravel()}
    axes["expert"] = axes["parts"][:sizes.expert]
    for name, group in groups(sizes, 8).items():
        nodes = len(set(axes[name] // 8))
        assert (group.ranks, group.nodes) == (len(axes[name]), nodes), name


def test_a_ring_sends_what_the_formula_says():
    """Every rank passes on a chunk per round; after n - 1 rounds all have all."""
    for n in (2, 3, 8):
        have, sent = [{rank} for rank in range(n)], [0] * n
        for step in range(n - 1):
            for rank in range(n):
                have[(rank + 1) % n].add((rank - step) % n)
                sent[rank] += 1
        assert all(chunks == set(range(n)) for chunks in have)
        assert communication.share(Group(n, n)) == sent[0] / n


def test_collectives_take_the_slower_of_link_and_network():
    board = machine("H100")
    inside, across, alone = Group(8, 8), Group(16, 8), Group(16, 1)
    size = 1e9
    assert gather_s(board, inside, size) == pytest.approx(size * 7 / 8 / (450e9 * 0.8), rel=0.05)
    assert gather_s(board, across, size) == pytest.approx(size * 15 / 16 / (450e9 * 0.8), rel=0.05)     # 8 cards help
    assert gather_s(replace(board, network=5e9), across, size) == pytest.approx(size / 2 / (8 * 5e9 * 0.8), rel=0.05)
    assert gather_s(board, alone, size) == pytest.approx(size * 15 / 16 / (50e9 * 0.8), rel=0.05)
    assert gather_s(board, Group(1, 1), size) == 0
    assert communication.reduce_s(board, alone, size) == 2 * gather_s(board, alone, size)
    assert communication.exchange_s(board, alone, size) == pytest.approx(size * 15 / 16 / 40e9, rel=0.05)
    assert communication.exchange_s(board, inside, size) == pytest.approx(size * 7 / 8 / 360e9, rel=0.05)


def sent(job: Job, *axes: str) -> float:
    return sum(t.sent for t in step_time(SMALL, job, machine("H100")).transfers if t.axis in axes)


def test_zero_sends_what_its_paper_says():
    """1910.02054, section 7: 2 numbers per parameter for data parallelism and the first two stages, 3 for the third."""
    job = replace(FEW, world=8, parallel=ParallelOptions(gather="fp32"))
    plain = sent(job, "replica")
    assert plain == pytest.approx(2 * 7 / 8 * 4 * count_params(SMALL).total)
    by_stage = [sent(replace(job, parallel=replace(job.parallel, zero=zero)), "shard") for zero in (1, 2, 3)]
    assert by_stage == [pytest.approx(plain), pytest.approx(plain), pytest.approx(1.5 * plain)]
    narrow = replace(job, parallel=ParallelOptions(zero=3))
    assert sent(narrow, "shard") == pytest.approx(plain)     # weights in two bytes, twice; gradients in four


def test_micro_batches_send_again_only_where_little_is_kept():
    job = replace(FEW, world=8, parallel=ParallelOptions(zero=1))
    for zero, times in ((0, 1), (1, 1), (3, 4)):
        once = replace(job, parallel=ParallelOptions(zero=zero))
        axis = "shard" if zero else "replica"
        assert sent(replace(once, accumulate=4), axis) == pytest.approx(times * sent(once, axis))


def test_gradients_hide_behind_the_backward_pass_under_ddp_alone():
    def reduced(**axes):
        time = step_time(SMALL, replace(FEW, rows=8, world=16, parallel=ParallelOptions(**axes)), machine("H100"))
        return next(t for t in time.transfers if t.axis == "replica")
    alone, beside = reduced(), reduced(tensor=2)
    assert alone.exposed < 0.8 * alone.seconds and beside.exposed == beside.seconds


def test_tensor_parallel_moves_the_stream_four_times_each_way():
    """And all but the last once more in a pass that is computed again; those of embedding and head come on top."""
    job = replace(FEW, world=4, parallel=ParallelOptions(tensor=4))
    stream = 4 * 1024 * 512 * 2 * 3 / 4
    assert sent(job, "tensor") == pytest.approx(stream * (8 * 8 + 2 * 3))
    assert sent(replace(job, recompute=True), "tensor") == pytest.approx(stream * (8 * 11 + 2 * 3))


def test_experts_get_their_tokens_and_give_them_back():
    config = PRESETS["qwen3-moe-mini"].lm_config(vocab_size=6400, seq_len=512)
    job = Job(rows=2, seq_len=512, world=4, parallel=ParallelOptions(expert=4))
    moved = [t for t in step_time(config, job, machine("H100")).transfers if t.axis == "expert"]
    assert moved[0].sent == pytest.approx(8 * 4 * 2 * (2 * 512 * 512 * 2) * 3 / 4)           # layers, ways, top_k
    assert moved[0].seconds == moved[0].exposed > 0
    alone = step_time(config, replace(job, parallel=ParallelOptions()), machine("H100")).kinds["products"]
    dealt = step_time(config, job, machine("H100")).kinds["products"]
    assert dealt == pytest.approx(alone, rel=0.1)  # fewer experts, each with the tokens of all ranks: as much work


# --------------------------------------------------------------------------------------------------------------- memory

@settings(max_examples=40, deadline=None)
@given(stage=st.integers(0, 3), ranks=st.sampled_from([1, 2, 4, 8, 64, 1024]), layers=st.integers(1, 6),
       replicas=st.sampled_from([1, 2]))
def test_memory_follows_zeros_formulas(stage, ranks, layers, replicas):
    """Weights as they are used, gradients over several micro-batches, and what is kept: 1910.02054's table."""
    config = replace(SMALL, layers=SMALL.layers[:layers])
    parallel = ParallelOptions(zero=stage, replicas=replicas if stage else 1)
    job = Job(rows=1, seq_len=64, accumulate=2, world=ranks * (replicas if stage else 1), parallel=parallel)
    plan, size = memory_of(config, job), count_params(config).total
    expected = zero_bytes(stage, ranks, weights=0, gradients=4, states=12)
    assert plan.weights + plan.optimizer + plan.gradients == pytest.approx(size * expected, abs=16)
    if stage in (1, 2) and ranks > 1:
        assert plan.gathered == 2 * size
    if stage == 3 and ranks > 1:                  # what lies around the blocks, and two of them
        block = count_params(config).attention // layers + count_params(config).ffn // layers + 2 * 512 + 2 * 64
        assert plan.gathered == 2 * (2 * 4096 * 512 + 512 + 2 * block)


def test_zeros_paper_in_its_own_example():
    """Figure 1 of 1910.02054: 7.5B parameters on 64 devices."""
    found = [7.5 * zero_bytes(stage, 64, weights=2, gradients=2, states=12) for stage in range(4)]
    assert found == [pytest.approx(size, abs=0.06) for size in (120, 31.4, 16.6, 1.9)]


@pytest.mark.parametrize("axis", ["tensor", "pipe", "context", "zero", "recompute", "selective", "offload", "rows"])
def test_memory_falls_with_everything_that_saves_it(axis):
    job = replace(FEW, rows=8, world=4, parallel=ParallelOptions(zero=1))
    less = {"recompute": replace(job, recompute=True), "selective": replace(job, recompute="selective"),
            "rows": replace(job, rows=2), "zero": replace(job, parallel=ParallelOptions(zero=3)),
            "offload": replace(job, parallel=ParallelOptions(zero=1, offload=True)),
            "pipe": replace(job, parallel=ParallelOptions(zero=1, pipe=4, microbatches=8))}
    other = less.get(axis) or replace(job, parallel=ParallelOptions(zero=1, **{axis: 2}))
    assert memory_of(SMALL, other).total < memory_of(SMALL, job).total


def test_what_a_block_keeps_by_name():
    """Heads of 64, widths 512 and 1024; the stream in float32, all else in two bytes."""
    layer, queries, sums = SMALL.layers[0], 8 * 64, 8 * 4
    assert block_kept(SMALL, layer, 2, True).total == 4 * 512
    kept = 4 * 512 + 2 * (512 + 512 + 1024)                  # its input; k, o and up of q, k, v, o, gate, up, down
    assert block_kept(SMALL, layer, 2, "selective").total == kept + 2 * queries + sums
    assert block_kept(SMALL, layer, 2, "selective", 0, True).total == kept
    compiled = block_kept(SMALL, layer, 2, False, 0, False, True)
    assert compiled.total == 4 * 512 + 2 * (4 * 512 + 2 * 1024) + 2 * queries + sums
    assert compiled.on_rank(2, 2) == 4 * 256 + 2 * (3 * 256 + 512 + 2 * 512) + queries + sums / 2     # o is whole


def test_a_pipelines_first_rank_keeps_more_pieces_and_the_schedules_differ():
    def activations(schedule):
        job = replace(FEW, rows=16, world=4, parallel=ParallelOptions(pipe=4, schedule=schedule, microbatches=16))
        return memory_of(SMALL, job).activations
    assert activations("gpipe") > 3 * activations("1f1b")
    assert activations("1f1b") < activations("interleaved") < activations("gpipe")


def test_what_an_engine_remembers_counts():
    plain, beside = (memory_of(SMALL, replace(FEW, cache_tokens=n)) for n in (0, 10_000))
    assert beside.total - plain.total == beside.cache == 10_000 * 8 * 2 * 8 * 64 * 2


# ----------------------------------------------------------------------------------------------------------------- time

def test_no_product_beats_the_roofline():
    board = machine("H100")
    draw = random.Random(0)
    for _ in range(200):
        m, k, n = (draw.randrange(1, 20_000) for _ in range(3))
        took = roofline.product_s(board, "bf16", m, k, n)
        assert took >= 2 * m * k * n / (board.peaks["bf16"] * board.attained)
        assert took >= 2 * (m * k + k * n + m * n) / board.bandwidth
        assert roofline.product_s(board, "bf16", 2 * m, k, n) >= took * 0.999
    large = roofline.product_s(board, "bf16", 16_384, 8192, 8192)
    assert 2 * 16_384 * 8192 * 8192 / large > 0.9 * board.attained * board.peaks["bf16"]


def test_measured_rates_are_met_at_their_sizes_and_lie_between_them_elsewhere():
    sizes = (64, 512, 4096)
    rate = lambda m, k, n: 1e9 * (m * k * n) ** 0.25                              # noqa: E731
    table = tuple((m, k, n, rate(m, k, n)) for m in sizes for k in sizes for n in sizes)
    board = Machine(name="x", source="measured", peaks={"fp32": 1e12}, rates={"fp32": table})
    for m, k, n in ((64, 512, 4096), (512, 512, 512), (100, 1000, 3000)):
        assert roofline.product_s(board, "fp32", m, k, n) == pytest.approx(2 * m * k * n / rate(m, k, n))
    assert roofline.product_s(board, "fp32", 8, 512, 512) == pytest.approx(2 * 8 * 512**2 / rate(64, 512, 512))


@pytest.mark.parametrize("name", BOARDS)
def test_a_step_can_be_timed_on_every_board(name):
    board = machine(name.lower())
    job = replace(FEW, precision="bf16" if "bf16" in board.peaks else "fp16")
    time = step_time(SMALL, job, board)
    assert 0 < time.mfu < board.attained
    assert time.total == pytest.approx(sum(time.kinds.values()), rel=1e-6)


@pytest.mark.parametrize("parallel", [ParallelOptions(zero=3), ParallelOptions(tensor=4), ParallelOptions(context=4),
                                      ParallelOptions(pipe=4, microbatches=8), ParallelOptions(zero=2, tensor=2),
                                      ParallelOptions(pipe=2, tensor=2, schedule="zero-bubble", microbatches=8)])
def test_the_parts_of_a_step_add_up(parallel):
    time = step_time(SMALL, replace(FEW, rows=8, world=4, parallel=parallel), machine("H100"))
    assert time.total == pytest.approx(sum(time.kinds.values()), rel=1e-6)
    assert time.tokens == 8 * 1024 * (4 // parallel.tensor // parallel.pipe // parallel.context)
    assert all(t.exposed <= t.seconds * (1 + 1e-9) for t in time.transfers)


def test_what_a_slow_network_costs():
    job = replace(FEW, world=16, parallel=ParallelOptions(zero=3))
    fast, slow = (step_time(SMALL, job, replace(machine("H100"), network=bw)) for bw in (50e9, 1e9))
    assert slow.total > 2 * fast.total and slow.kinds["waiting"] > 0.5 * slow.total


# --------------------------------------------------------------------------------------------------------------- search

def test_the_best_plan_is_the_best_of_all_that_fit():
    board = replace(machine("H100"), memory=3e8)
    found = search(SMALL, replace(FEW, world=8), board, rows=32, keep=50)
    assert found.plans == sorted(found.plans, key=lambda plan: plan.time.total)
    assert found.too_big and found.too_big[0][0] > ROOM * board.memory
    best = found.plans[0]
    for plan in found.plans:
        assert plan.memory.total <= ROOM * board.memory and plan.job.tokens_per_step == 32 * 1024
        assert plan.time.total == step_time(SMALL, plan.job, board).total
    draw = random.Random(0)
    for _ in range(300):                          # others, tried at random
        axes = {"tensor": draw.choice([1, 2, 4, 8]), "pipe": draw.choice([1, 2, 4]), "zero": draw.choice([0, 1, 2, 3])}
        if 8 % (axes["tensor"] * axes["pipe"]):
            continue
        data = 8 // axes["tensor"] // axes["pipe"]
        rows = draw.choice([n for n in (1, 2, 4, 8, 16, 32) if n <= 32 // data])
        parallel = ParallelOptions(**axes, microbatches=rows if axes["pipe"] > 1 else None)
        job = replace(FEW, world=8, rows=rows, accumulate=32 // data // rows, parallel=parallel,
                      recompute=draw.choice([False, "selective", True]))
        if memory_of(SMALL, job).total <= ROOM * board.memory:
            assert step_time(SMALL, job, board).total >= best.time.total * 0.9999, job


def test_a_search_over_sixteen_thousand_devices_stays_small():
    """Pure arithmetic; and what was tried was worth it."""
    config = published("llama3.1-405b")
    found = search(config, Job(rows=1, seq_len=8192, world=16_384), machine("H100"), rows=2048)
    assert found.fitting > 100 and found.tried < 20_000
    assert 0.3 < found.plans[0].time.mfu < 0.6 and found.plans[0].job.sizes.world == 16_384
    assert not found.plans[0].job.parallel.problems(16_384)


def test_a_search_says_what_it_is_short_of():
    found = search(published("llama3.1-70b"), Job(rows=1, seq_len=8192, world=8), machine("RTX 4090"), rows=8)
    assert not found.plans and found.fitting == 0
    need, job = found.too_big[0]
    assert need > ROOM * 24e9 and need == memory_of(published("llama3.1-70b"), job).total
    assert need <= min(n for n, _ in found.too_big)


def test_mixtures_are_searched_with_their_experts_dealt_out():
    config: LMConfig = published("qwen3-30b-a3b")
    found = search(config, Job(rows=1, seq_len=4096, world=8), machine("H200"), rows=16, keep=40)
    assert any(plan.job.parallel.expert > 1 for plan in found.plans)


def test_the_nearest_setting_that_fits():
    board = machine("H100")
    config = published("llama3.1-8b")
    job = Job(rows=4, seq_len=8192, world=8, parallel=ParallelOptions(zero=1), accumulate=2)
    assert memory_of(config, job).total > ROOM * board.memory
    better = nearest(config, job, ROOM * board.memory)
    assert memory_of(config, better).total <= ROOM * board.memory and better.tokens_per_step == job.tokens_per_step
    assert nearest(config, Job(rows=1, seq_len=8192), ROOM * 8e9) is None


def test_unknown_hardware_is_named_with_what_was_meant():
    from mindseed.base.errors import UserError
    with pytest.raises(UserError, match="hardware=H1000 is not in the table of data sheets; did you mean H100"):
        machine("H1000")
    assert SimpleNamespace(**vars(machine("rtx 4090"))).name == "RTX 4090"


@pytest.mark.parametrize("name, pipe, schedule", [("llama-13b", 16, "1f1b"), ("llama3.1-405b", 16, "interleaved"),
                                                  ("deepseek-v3", 16, "1f1b"), ("qwen3-8b", 5, "zero-bubble")])
def test_the_rank_that_needs_most_is_planned_wherever_it_stands(name, pipe, schedule):
    """Later stages may have a block more, and first blocks may be of a smaller kind."""
    config = published(name)
    job = Job(rows=2 * pipe * 2, seq_len=2048, world=pipe * 4, optimizer="adamw",
              parallel=ParallelOptions(pipe=pipe, schedule=schedule, zero=1))
    held = chunks(config, job)
    every = [rank_memory(config, job, rank, held[rank]).total for rank in range(pipe)]
    assert memory_of(config, job).total == max(every)
    slowest = max(rank_work(config, job, machine("h100"), some).work.total for some in held)
    assert step_time(config, job, machine("h100")).total >= job.pieces * slowest
