"""The best way to share a model out over so many devices: every mesh is tried on paper.

What is tried: tensor parallel within a node, pipelines with their schedules, context parallel for rows long enough,
experts over data-parallel ranks, ZeRO with slices over all data-parallel ranks or over those of a node with copies
between nodes, micro-batches that divide the batch, up to MANY tokens, and recomputation, of which the least that fits
is kept. Numbers are powers of two (and, for the pipeline, divisors of the number of layers). A plan that fits into
memory is timed; the best of each mesh is kept, and of those that do not fit, what they are short of.

Left out is what is never better here: GPipe has the bubble of 1F1B and keeps more, DualPipe-V has twice the bubble of
zero-bubble, for torch runs forward and backward one after the other; and under a pipeline, whose pieces are many,
ZeRO-2.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from mindseed.base.mesh import ParallelOptions
from mindseed.models.config import LMConfig
from mindseed.models.splitting import pieces_problems, splitting_problems
from mindseed.nn.moe import MoEConfig
from mindseed.plan.job import Job
from mindseed.plan.machines import Machine
from mindseed.plan.memory import TrainMemory, memory_of
from mindseed.plan.time import StepTime, step_time

ROOM = 0.94                                       # of a device's memory: the rest is the context's and the allocator's
SHORTEST = 2048                                   # tokens of a row that are left to a rank of the context axis
MANY = 65_536                                     # tokens at a time with which a rank's products are large enough
SCHEDULES = ("1f1b", "interleaved", "zero-bubble")
WAYS = (False, "selective", True)


@dataclass(frozen=True)
class Plan:
    job: Job
    memory: TrainMemory
    time: StepTime


@dataclass
class Found:
    """The best plans, fastest first; and of all others, why not."""

    plans: list[Plan] = field(default_factory=list)
    tried: int = 0
    fitting: int = 0
    too_big: list[tuple[int, Job]] = field(default_factory=list)    # (bytes, job), the smallest first
    problems: Counter[str] = field(default_factory=Counter)         # what cannot be split, and how many meshes ask it


def search(config: LMConfig, like: Job, board: Machine, *, rows: int, keep: int = 5,
           refused: Callable[[ParallelOptions], list[str]] = lambda options: []) -> Found:
    """Plans for steps of `rows` rows on `like.world` devices. Precision, optimiser, adapters and so on are those of
    `like`; so is what its options of parallel say about backend, gather and offload. `refused`: why a mesh does not
    suit the run for other reasons than the model's."""
    found, room, before = Found(), ROOM * board.memory, {}
    best: dict[tuple, Plan] = {}
    for options in meshes(config, like, board):
        key = (options.tensor, options.context, options.expert, options.pipe, options.schedule)
        if key not in before:
            before[key] = splitting_problems(config, options, seq_len=like.seq_len)
            found.problems.update(before[key])
        if before[key] or options.problems(like.world):
            continue
        if problems := refused(options):
            found.problems.update(problems)
            continue
        data = like.world // (options.tensor * options.pipe * options.context)
        if rows % data:
            found.problems[f"{rows} rows of a step are no multiple of {data} data-parallel ranks (loop.batch)"] += 1
            continue
        for job in batches(options, like, rows):
            plan = fitting(config, job, board, room, found, keep)
            if plan is None:
                break                             # larger micro-batches will not fit either
            if key[:4] not in best or plan.time.total < best[key[:4]].time.total:
                best[key[:4]] = plan
    found.plans = sorted(best.values(), key=lambda plan: plan.time.total)[:keep]
    return found


def fitting(config: LMConfig, job: Job, board: Machine, room: float, found: Found, keep: int) -> Plan | None:
    """With the least recomputation that fits, or None."""
    for recompute in WAYS[:1] if job.parallel.splits_backward else WAYS:
        job = replace(job, recompute=recompute)
        memory = memory_of(config, job)
        found.tried += 1
        if memory.total <= room:
            found.fitting += 1
            return Plan(job, memory, step_time(config, job, board))
    found.too_big = sorted([*found.too_big, (memory.total, job)], key=lambda x: x[0])[:keep]
    return None


def meshes(config: LMConfig, like: Job, board: Machine) -> Iterator[ParallelOptions]:
    """Every way to lay the axes out."""
    world, given = like.world, like.parallel
    mixtures = [layer.ffn.experts for layer in config.layers if isinstance(layer.ffn, MoEConfig)]
    for tensor in powers(min(world, board.per_node)):
        for pipe in sorted({*powers(min(world // tensor, len(config.layers))),
                            *(d for d in range(2, min(len(config.layers), 64) + 1) if len(config.layers) % d == 0)}):
            for context in powers(max(1, like.seq_len // SHORTEST)):
                if world % (tensor * pipe * context):
                    continue
                data = world // (tensor * pipe * context)
                for schedule in SCHEDULES[:3 if pipe > 1 else 1]:
                    for expert in powers(min([data * context, *mixtures[:1]])) if mixtures else [1]:
                        base = replace(given, tensor=tensor, pipe=pipe, context=context, schedule=schedule,
                                       expert=expert, replicas=1)
                        yield from sharings(base, data, context, expert, board.per_node)


def sharings(base: ParallelOptions, data: int, context: int, expert: int, per_node: int) -> Iterator[ParallelOptions]:
    """ZeRO's stages, and over how many ranks; with experts dealt out that is as many as they lie on."""
    if not base.offload:
        yield replace(base, zero=0)
    if data * context == 1 and not base.offload:
        return
    if expert > 1:
        shards = [expert // context] if expert % context == 0 and data % max(1, expert // context) == 0 else []
    else:
        shards = sorted({data, *(s for s in (per_node,) if s < data and data % s == 0)})
    for shard in shards:
        for zero in (1,) if base.pipe > 1 else (1, 2, 3):    # a pipeline keeps all whole while pieces are on their way
            yield replace(base, zero=zero, replicas=data // shard)


def batches(options: ParallelOptions, like: Job, rows: int) -> Iterator[Job]:
    """Micro-batches that divide the rows of a step, smallest first. A pipeline takes all rows of a rank as one
    micro-batch, cut into pieces."""
    mine = rows // (like.world // (options.tensor * options.pipe * options.context))
    for size in powers(min(mine, max(1, MANY * options.context // like.seq_len))):
        if mine % size:
            continue
        if options.pipe == 1:
            yield replace(like, parallel=options, rows=size, accumulate=mine // size)
            continue
        cut = replace(options, microbatches=mine // size)
        if not pieces_problems(cut):
            yield replace(like, parallel=cut, rows=mine, accumulate=1)


def powers(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [1 << i for i in range(max(1, most).bit_length())]


def nearest(config: LMConfig, job: Job, room: float, *,
            refused: Callable[[Job], Any] = lambda job: ()) -> Job | None:
    """The smallest change to a job that does not fit after which it does: less at a time, more computed again, more
    shared out; None if nothing of that is enough."""
    parallel, tries = job.parallel, []
    for recompute in WAYS[WAYS.index(job.recompute):]:
        tries.append(replace(job, recompute=recompute))
    rows = job.rows
    while rows > 1 and rows % 2 == 0:
        rows //= 2
        tries.append(replace(job, rows=rows, accumulate=job.accumulate * job.rows // rows))
        tries.append(replace(tries[-1], recompute=True))
    if job.sizes.data > 1:
        for zero in range(parallel.zero + 1, 4):
            sharing = replace(parallel, zero=zero)
            if parallel.expert > 1 and sharing.problems(job.world):               # slices over as many as have experts
                sharing = replace(sharing, replicas=max(1, job.sizes.parts // parallel.expert))
            tries += [replace(job, parallel=sharing), replace(job, parallel=sharing, recompute=True)]
            tries.append(replace(job, parallel=sharing, rows=1, accumulate=job.accumulate * job.rows, recompute=True))
    for zero in sorted({max(1, parallel.zero), 3}):
        tries.append(replace(job, parallel=replace(parallel, zero=zero, offload=True), rows=1,
                             accumulate=job.accumulate * job.rows, recompute=True))
    for one in tries:
        if one.parallel.pipe > 1 and one.rows != job.rows or one.parallel.problems(one.world):
            continue
        if one.recompute and one.parallel.splits_backward or refused(one):
            continue
        if memory_of(config, one).total <= room:
            return one
    return None
