"""How long a step takes: the work of the slowest rank (work.py), the pipeline's bubble, what data-parallel ranks wait
for, the update.

Communication (communication.py) is counted whole, and of it what arithmetic cannot hide:

    ZeRO       a block is gathered while the one before computes, forward and backward; what a block's time does not
               cover is waited for, and so is the first gather and the last reduction
    DDP        buckets are reduced during the last backward pass, but for the last one; beside other axes than data
               parallelism everything is reduced after it
    pipe       a rank's message must arrive before the next rank begins: part of the bubble

What is hidden still slows the arithmetic beside it (HIDDEN). Not modelled: ranks that are slower than others, uneven
load of experts, reading data, validation.
"""
from __future__ import annotations

from dataclasses import dataclass

from mindseed.models.config import LMConfig
from mindseed.plan.activations import WIDE
from mindseed.plan.communication import Group, Transfer, exchange_s, gather_s, groups, pass_s, reduce_s, share
from mindseed.plan.flops import flops_per_token
from mindseed.plan.job import Chunk, Job, by_model, chunks, unlike
from mindseed.plan.machines import HIDDEN, MEMORY, Machine
from mindseed.plan.memory import (
    BUCKET_BYTES, Weights, has_a_copy, layer_weights, lets_go, orthogonal, reduces_at_once, table_entries,
    table_weights)
from mindseed.plan.pipeline import bubble_s
from mindseed.plan.roofline import moved_s, product_s
from mindseed.plan.work import Work, block_work, head_work

UPDATE_BYTES = 40                                 # per parameter: AdamW moves seven numbers, clipping three
WHAT = {"tensor": "gathered and reduced activations", "expert": "tokens to their experts and back",
        "context": "keys and values around the ring"}


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimiser step, on the rank that the others wait for."""

    total: float
    kinds: dict[str, float]                       # products, attention, memory, head, update, bubble, waiting ...: all
    transfers: tuple[Transfer, ...]
    tokens: int                                   # of a step, all ranks together
    world: int
    model_flops: float                            # of a step
    peak: float                                   # FLOP/s of a device

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.total

    @property
    def mfu(self) -> float:
        return self.model_flops / self.total / self.world / self.peak


@dataclass
class Rank:
    """What one rank of the pipeline does and holds."""

    work: Work
    weights: Weights
    largest: Weights                              # of one block


def step_time(config: LMConfig, job: Job, board: Machine) -> StepTime:
    held, sizes = chunks(config, job), job.sizes
    ranks = [rank_work(config, job, board, held[rank]) for rank in unlike(held)]
    slowest = max(ranks, key=lambda rank: rank.work.total)
    work, times = slowest.work, job.accumulate * job.pieces
    transfers = [Transfer(axis=axis, what=WHAT[axis], sent=work.sent[axis] * times, seconds=wait * times,
                          exposed=wait * times) for axis, wait in work.waits.items()]
    idle = late = 0.0
    if sizes.pipe > 1:
        group, size = groups(sizes, board.per_node)["pipe"], job.tokens / job.sequence * config.dim * WIDE
        one, messages = pass_s(board, group, size), 2 * times * len(held[0])
        first = 2 * job.accumulate * (sizes.pipe - 1) * one  # until the first piece is there, nothing hides it
        transfers.append(Transfer(axis="pipe", what="activations and their gradients", sent=messages * size,
                                  seconds=messages * one, exposed=min(first, messages * one)))
        if has_a_copy(config, held[0]):
            size = WIDE * table_entries(config, job) / (sizes.shard * sizes.context if job.parallel.zero else 1)
            late = pass_s(board, group, size)
            transfers.append(Transfer(axis="pipe", what="gradients of the embedding's copies", sent=size, seconds=late,
                                      exposed=late))
        idle = first + job.accumulate * bubble_s(job.parallel.schedule, sizes.pipe, work.forward, work.inputs,
                                                 work.weights)
    waited, shared = data_parallel(job, board, slowest)
    waited += late
    update = update_s(job, board, config, slowest.weights)
    kinds = {name: value * times for name, value in work.kinds.items()}
    kinds |= {"update": update, "bubble": idle, "waiting": waited + times * sum(work.waits.values())}
    return StepTime(total=times * work.total + idle + waited + update, transfers=(*transfers, *shared),
                    kinds={name: value for name, value in kinds.items() if value > 0}, tokens=job.tokens_per_step,
                    world=job.world, model_flops=flops_of(config, job.seq_len) * job.tokens_per_step,
                    peak=board.peaks["bf16" if job.precision == "fp8" else job.precision])


@by_model
def flops_of(config: LMConfig, seq_len: int) -> float:
    return flops_per_token(config, seq_len).model


def rank_work(config: LMConfig, job: Job, board: Machine, held: list[Chunk]) -> Rank:
    """Of one piece."""
    rank = Rank(Work(), Weights(), Weights())
    for chunk in held:
        for layer, times in chunk.runs:
            rank.work.add(block_work(config, layer, job, board), times)
            one = layer_weights(config, layer, job)
            rank.weights = rank.weights.plus(one, times)
            rank.largest = max(rank.largest, one, key=lambda weights: weights.numbers)
        for layer in config.mtp if chunk.last else ():
            rank.work.add(block_work(config, layer, job, board))
            rank.weights = rank.weights.plus(layer_weights(config, layer, job, ahead=True))
        rank.work.add(head_work(config, job, board, chunk))
    rank.weights = rank.weights.plus(table_weights(config, job, held))
    return rank


def data_parallel(job: Job, board: Machine, rank: Rank) -> tuple[float, list[Transfer]]:
    """Gathers of weights and sums of gradients: (seconds waited in a step, transfers)."""
    sizes, stage, of, weights = job.sizes, job.parallel.zero, groups(job.sizes, board.per_node), rank.weights
    waited, found, micro = 0.0, [], job.accumulate * job.pieces

    def note(axis: str, what: str, sent: float, seconds: float, exposed: float) -> None:
        nonlocal waited
        if seconds > 0:
            exposed = min(exposed, seconds)
            waited += exposed + HIDDEN * (seconds - exposed)
            found.append(Transfer(axis=axis, what=what, sent=sent, seconds=seconds, exposed=exposed))

    if sizes.expert > 1 and weights.experts:      # what is dealt out is summed over its copies alone
        copies, size = Group(sizes.parts // sizes.expert, of["parts"].per_node), WIDE * weights.experts
        seconds = reduce_s(board, copies, size)
        note("replica", "gradients of experts", 2 * size * share(copies), seconds, seconds)
    back = rank.work.inputs + rank.work.weights
    if stage == 0:
        group, size = of["parts"], WIDE * weights.dense
        seconds, tail = reduce_s(board, group, size), reduce_s(board, group, min(size, BUCKET_BYTES))
        exposed = tail + max(0.0, seconds - tail - back) if job.parallel.plain else seconds
        note("replica", "gradients", 2 * size * share(group), seconds, exposed)
        return waited, found
    group, width, dense = of["sharded"], job.gather_itemsize, weights.numbers
    blocks = max(1.0, dense / max(1.0, rank.largest.numbers))
    gathers, sums = (2 * micro if lets_go(job) else 1), (micro if reduces_at_once(job) else 1)
    one, summed = gather_s(board, group, width * dense / blocks), gather_s(board, group, WIDE * weights.dense / blocks)
    if sizes.replica > 1:
        summed += reduce_s(board, of["replica"], WIDE * weights.dense / blocks / group.ranks)
    late = one + (blocks - 1) * max(0.0, one - rank.work.forward / blocks)
    late_back = summed + (blocks - 1) * max(0.0, summed + one * lets_go(job) - back / blocks)
    note("shard", "weights", gathers * width * dense * share(group), gathers * one * blocks,
         (micro if lets_go(job) else 1) * late)
    note("shard", "gradients", sums * WIDE * weights.dense * share(group), sums * summed * blocks, sums * late_back)
    copied = gathers * 2 * width * dense + sums * (width + WIDE) * weights.dense  # into buffers and out of them
    return waited + (copied / (board.bandwidth * MEMORY) if group.ranks > 1 else 0.0), found


def update_s(job: Job, board: Machine, config: LMConfig, weights: Weights) -> float:
    """The optimiser's step, clipping included; with offload on the CPU, at a few times the speed of the way there."""
    n = job.sizes.shard * job.sizes.context if job.parallel.zero else 1
    count = weights.dense / n + weights.experts
    if job.parallel.offload:
        return count * 2 * WIDE / board.host_link + count * UPDATE_BYTES / (4 * board.host_link)
    spent = count / board.update_rate if board.update_rate else count * UPDATE_BYTES / (board.bandwidth * MEMORY)
    return spent + (muon_s(job, board, config) if job.optimizer == "muon" and not job.lora_rank else 0.0)


def muon_s(job: Job, board: Machine, config: LMConfig, iterations: int = 5) -> float:
    """Newton-Schulz iterations of a rank's share of the matrices, which come to it whole, and leave."""
    wide = job.precision == "fp32" or job.widened or "bf16" not in board.peaks
    kind, spent = "fp32" if wide else "bf16", 0.0
    of = groups(job.sizes, board.per_node)
    group = of["sharded" if job.parallel.zero else "tensor"]
    for o in orthogonal(config, job, chunks(config, job)[0]):
        few, many = sorted((o.rows, o.columns))
        spent += iterations * (product_s(board, kind, few, many, few, o.share) + product_s(
            board, kind, few, few, few, o.share) + product_s(board, kind, few, few, many, o.share))
        spent += moved_s(board, iterations * 6 * WIDE * few * many * o.share, compiled=True)
        if o.copies:
            spent += gather_s(board, of["parts"], (WIDE if wide else 2) * few * many * o.number)
        else:
            spent += 2 * exchange_s(board, group, WIDE * few * many * o.share) * (o.ranks > 1)
    return spent
