"""What a run needs in memory: by the parameter, by the token in flight, and by the token remembered while decoding.

Per parameter, training keeps a float32 weight, its gradient and the optimiser's state (AdamW two numbers, Muon one).
Per token of a micro-batch it keeps what the backward pass will read (activations.py). ZeRO (1910.02054) divides the
former by the ranks that share it, K = 4 bytes of weight and 8 of states:

    stage    weights as they are used      gradients      weights and states that are kept
    0        2 or 4                        4              K
    1        2 or 4                        4              K / n
    2        2 or 4                        4 / n          K / n
    3        (2 or 4) / n                  4 / n          K / n       and one or two blocks whole

Not everything exists at once: gradients grow while activations go. So a plan looks at the moments of a step that may be
the worst (`moments`): the loss, the backward pass of a block, the embedding's gradient, the update. What allocators
waste between tensors is not in it. Logits exist for one chunk at a time only. Decoding keeps what each layer's
StateSpec declares.
"""
from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mindseed.core import StateSpec
from mindseed.models.block import MIXERS
from mindseed.models.config import LayerConfig, LMConfig
from mindseed.models.splitting import reads_words
from mindseed.nn.fused_head import CHUNK_BYTES, KEEP_BYTES
from mindseed.optim.muon import AT_ONCE
from mindseed.optim.paged import PAGE_BYTES
from mindseed.plan.activations import WIDE, around_kept, block_kept, scratch_bytes, transient
from mindseed.plan.job import Chunk, Job, by_model, chunks, unlike
from mindseed.plan.params import Matrix, Params, adapter_matrices, layer_params, norm_params
from mindseed.plan.pipeline import in_flight


# ------------------------------------------------------------------------------------------------------------ decoding

def state_specs(config: LMConfig) -> list[StateSpec]:
    """What each layer remembers while decoding, asked of the layers themselves (built without memory)."""
    with torch.device("meta"):
        return [MIXERS[type(layer.mixer)](config.dim, layer.mixer).state_spec() for layer in config.layers]


def cache_bytes_per_token(config: LMConfig, itemsize: int = 2) -> int:
    """Bytes that decoding adds for every token of every sequence that is longer than any window."""
    return sum(spec.bytes_per_token(itemsize) for spec in state_specs(config) if spec.window is None)


def cache_bytes(config: LMConfig, length: int, itemsize: int = 2) -> int:
    """Bytes that one sequence of `length` tokens takes up: windows stop growing, recurrent memories never grow."""
    return sum(spec.bytes_of(length, itemsize) for spec in state_specs(config))


# ------------------------------------------------------------------------------------------------------------ training

@dataclass(frozen=True, kw_only=True)
class TrainMemory:
    """Bytes on one device, each at its own largest; `moments` says what of it exists together."""

    weights: int                 # float32 masters
    gradients: int
    optimizer: int
    ema: int
    casts: int                   # copies of the weights in the narrow dtype, kept by autocast until they were used
    gathered: int                # whole weights, of which ZeRO keeps parts
    activations: int
    logits: int                  # one chunk and what its loss needs, and the head's gradient in float32 if it learns
    transient: int               # of the backward pass of one block; one block rebuilt; gradients on their way
    communication: int           # buffers of collectives
    scratch: int                 # of the CPU's kernels
    cache: int
    update: int                  # what the optimiser needs for a moment
    host: int                    # in the CPU's memory, for every device
    moments: dict[str, dict[str, float]]

    @property
    def worst(self) -> str:
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by kind at the worst moment."""
        return self.moments[self.worst]

    @property
    def total(self) -> int:
        return int(sum(self.parts.values()))


def plan_memory(config: LMConfig, *, batch_size: int, seq_len: int, itemsize: int = 2, **options) -> TrainMemory:
    """An estimate for `batch_size` rows of `seq_len` tokens in one micro-batch; the allocator's waste is not in it.

    `options` are those of a Job. With `lora_rank` an adapter beside every matrix of the blocks learns, and nothing
    else; with `nf4` Linears are packed and frozen. `states` are those of the optimiser, `paged` says that
    states="paged" has a GPU to page from.
    """
    precision = {2: "bf16", 4: "fp32"}[itemsize]
    return memory_of(config, Job(**{"rows": batch_size, "seq_len": seq_len, "precision": precision} | options))


def memory_of(config: LMConfig, job: Job) -> TrainMemory:
    """Of the rank that needs most."""
    held = chunks(config, job)
    plans = [rank_memory(config, job, rank, held[rank]) for rank in unlike(held)]
    return max(plans, key=lambda plan: plan.total)


@dataclass
class Weights:
    """Numbers of a stretch of a model on one rank before ZeRO: what learns (`dense`, and `experts` that are dealt out),
    what is frozen, in bytes, and the optimiser's bytes; `whole` is what is gathered or cast for a forward pass."""

    dense: float = 0
    experts: float = 0
    frozen: float = 0
    dense_states: float = 0
    expert_states: float = 0
    whole: float = 0                 # entries of dense matrices, frozen ones too
    whole_experts: float = 0
    all_experts: float = 0

    @property
    def numbers(self) -> float:
        """What ZeRO gathers, those of four bits counted as they lie."""
        return self.dense + self.frozen / WIDE

    def plus(self, other: Weights, times: int = 1) -> Weights:
        return Weights(*(a + times * b for a, b in zip(vars(self).values(), vars(other).values())))


def layer_weights(config: LMConfig, layer: LayerConfig, job: Job, *, ahead: bool = False) -> Weights:
    """A block, or (`ahead`) a module for a further token."""
    return weights_of(config, layer, ahead, job.sizes.tensor, job.sizes.expert, job.optimizer, job.states,
                      job.lora_rank, job.nf4)


@by_model
def weights_of(config: LMConfig, layer: LayerConfig, ahead: bool, tensor: int, expert: int, optimizer: str, states: str,
               lora_rank: int, nf4: bool) -> Weights:
    mixer, ffn, vectors = layer_params(config, layer)
    out = Weights()
    every = [*mixer.every, *ffn.every] + [Matrix(config.dim, 2 * config.dim, split="")] * ahead

    def learn(m: Matrix, kind: str) -> None:
        kept = state_bytes(m.entries, kind, states)
        if m.experts and expert > 1:
            out.experts, out.expert_states = out.experts + m.entries, out.expert_states + kept
        else:
            out.dense, out.dense_states = out.dense + m.entries, out.dense_states + kept

    for m in every:
        here = m.local(tensor, expert)
        if m.experts and expert > 1:
            out.whole_experts += here.entries
        else:
            out.whole += here.entries
        if m.experts:
            out.all_experts += here.entries
        if nf4 and m.packs:
            out.frozen += nf4_bytes(here.entries)
        elif lora_rank:
            out.frozen += WIDE * here.entries
        else:
            learn(here, optimizer)
    beside = adapter_matrices(config, lora_rank, every) if lora_rank and not ahead else []
    for m in (m.local(tensor, expert) for m in beside):
        learn(m, "adamw")
        out.whole += m.entries
    vectors += 3 * norm_params(config) * ahead
    if lora_rank:
        out.frozen += WIDE * vectors
    else:
        out.dense, out.dense_states = out.dense + vectors, out.dense_states + 2 * WIDE * vectors
    return out


def table_weights(config: LMConfig, job: Job, held: list[Chunk]) -> Weights:
    """Embedding, positions, last norm and head, as far as they are here. Their learning states are AdamW's."""
    first, last, table = held[0].first, held[-1].last, table_entries(config, job)
    entries = table * (first or last and reads_words(config)) + table * (last and not config.tied)
    entries += config.learned_positions * config.seq_len * config.dim * first + norm_params(config) * last
    read = table * last                                      # the head multiplies; an embedding is only looked up
    if job.lora_rank:
        return Weights(frozen=WIDE * entries, whole=read)
    return Weights(dense=entries, dense_states=2 * WIDE * entries, whole=read)


def table_entries(config: LMConfig, job: Job) -> int:
    """Of the embedding, on a rank that has it."""
    return -(-config.vocab_size // job.sizes.tensor) * config.dim


def has_a_copy(config: LMConfig, held: list[Chunk]) -> bool:
    """Whether another rank of the pipeline has the embedding as well."""
    return reads_words(config) and held[0].first != held[-1].last


def state_bytes(entries: float, optimizer: str, states: str) -> float:
    """Of the optimiser, for a matrix."""
    if states == "8bit" and entries >= 4096:
        return 2 * (entries + WIDE * -(-entries // 256))
    return WIDE * entries if optimizer == "muon" else 2 * WIDE * entries


def zero_bytes(stage: int, ranks: int, *, weights: float, gradients: float, states: float) -> float:
    """Bytes per parameter on a device after ZeRO's paper: 2 + 2 + K / N and so on, with K = `states`."""
    shared = [ranks if stage >= at else 1 for at in (3, 2, 1)]
    return weights / shared[0] + gradients / shared[1] + states / shared[2]


def rank_memory(config: LMConfig, job: Job, rank: int, held: list[Chunk]) -> TrainMemory:
    sizes, stage, a = job.sizes, job.parallel.zero, job.itemsize
    n = sizes.shard * sizes.context if stage else 1
    root, blocks = table_weights(config, job, held), Weights()
    each = [layer_weights(config, layer, job) for chunk in held for layer, _ in chunk.runs]
    modules = [layer_weights(config, layer, job, ahead=True) for layer in (config.mtp if held[-1].last else ())]
    for weights, times in zip([*each, *modules], [t for c in held for _, t in c.runs] + [1] * len(modules)):
        blocks = blocks.plus(weights, times)
    every, largest = blocks.plus(root), max((w.numbers for w in [*each, *modules]), default=0)

    # What is kept through a step: masters, states, and what is made of them to multiply with.
    masters = (WIDE * every.dense + every.frozen) / n + WIDE * every.experts
    states = every.dense_states / n + every.expert_states
    mine, whole = WIDE * (every.dense / n + every.experts), WIDE * (every.dense + every.experts)      # of gradients
    width, sharing = job.gather_itemsize, stage > 0 and n > 1
    narrow = a < WIDE and not job.widened
    casts = a * (every.whole_experts + every.whole * (not stage or width == WIDE)) * narrow
    casts += WIDE * every.all_experts * bool(job.lora_rank)  # experts are multiplied with the sum of both
    gathered = sharing * width * (root.numbers + 2 * largest if lets_go(job) else every.numbers)
    communication = sharing * (width + WIDE) * largest + pipe_buffers(config, job, held)
    cache = job.cache_tokens and job.cache_tokens * cache_bytes_per_token(config, a) / sizes.tensor
    fixed = {"weights": masters, "optimizer": states, "ema": mine * job.ema, "scratch": scratch_bytes(config, job),
             "cache": cache, "gathered": gathered, "communication": communication}
    host = 0.0
    if job.parallel.offload:
        host = masters + states + mine * (1 + job.ema)
        fixed |= {"weights": 0, "optimizer": 0, "ema": 0}
    elif job.states == "paged" and job.paged:
        host, fixed["optimizer"] = states, min(states, PAGE_BYTES)

    # Gradients: before the last micro-batch of a step, and after it.
    several = job.accumulate * job.pieces > 1 or stage == 0 and job.world > 1 and job.parallel.plain  # DDP's buckets
    after = 0 if job.parallel.offload else whole if stage == 0 else mine
    before = several * (after if reduces_at_once(job) else whole)
    kept, borders = kept_by_layer(config, job, rank, held)
    logits, logits_back = head_bytes(config, job) if held[-1].last else (0, 0)
    full = {"activations": kept, "casts": casts, "gradients": before}
    moments = {"the loss": full | {"logits": logits}}
    if held[-1].last and not job.lora_rank:
        moments["the gradient of the head"] = full | {"logits": logits_back}
    done = WIDE * root.dense / n * held[-1].last
    for name, remaining, own, gradients in borders:          # from the last block to the first
        moments[f"the backward pass of {name}"] = {
            "activations": remaining, "casts": casts * remaining / max(kept, 1), "transient": own,
            "gradients": max(before, min(after, done))}
        done += gradients / n
    if held[0].first and not job.lora_rank:
        moments["the gradient of the embedding"] = {"gradients": max(before, after),
                                                    "transient": WIDE * root.dense * config.tied}
    if stage == 0 and not job.parallel.plain and sizes.parts > 1:                 # flat copies, two buckets at a time
        moments["the sum over ranks"] = {"gradients": after, "communication": min(whole, 2 * BUCKET_BYTES)}
    if has_a_copy(config, held):
        moments["the sum of the embedding's copies"] = {"gradients": after,
                                                        "communication": WIDE * table_entries(config, job) / n}
    update = muon_bytes(config, job, held) if job.optimizer == "muon" and not job.lora_rank else 0
    moments["the update"] = {"gradients": after, "update": update, "gathered": 0, "communication": 0}
    return TrainMemory(
        **{k: int(v) for k, v in fixed.items()}, gradients=int(max(before, after)), casts=int(casts),
        activations=int(kept), logits=int(max(logits, logits_back)), update=int(update), host=int(host),
        transient=int(max((own for _, _, own, _ in borders), default=0)),
        moments={name: {k: v for k, v in (fixed | parts).items() if v} for name, parts in moments.items()})


def lets_go(job: Job) -> bool:
    """Whether ZeRO gathers a block's weights whenever it runs (parallel/fsdp.py)."""
    return job.parallel.zero == 3 and job.sizes.pipe == 1


def reduces_at_once(job: Job) -> bool:
    """Whether gradients are reduced after every micro-batch; in a pipeline they wait until all pieces are through."""
    return job.parallel.zero > 1 and job.sizes.pipe == 1


BUCKET_BYTES = 25 << 20                                      # of gradients that are averaged in one go


def kept_by_layer(config: LMConfig, job: Job, rank: int, held: list[Chunk]
                  ) -> tuple[float, list[tuple[str, float, float, float]]]:
    """(bytes of activations at the end of the forward pass, and for the ends of stretches of equal layers, from the
    last block to the first: name, bytes that are left, bytes for a moment, gradients that come until the next)."""
    sizes, a, tokens = job.sizes, job.itemsize, job.tokens
    flying = in_flight(job.parallel.schedule, sizes.pipe, job.pieces, rank) if sizes.pipe > 1 else [1]
    before, behind = (k.on_rank(sizes.tensor, job.sequence) * tokens for k in around_kept(config, a))
    total, borders, number = 0.0, [], 0
    for chunk, pieces in zip(held, flying):
        ahead = [(layer, 1) for layer in config.mtp] if chunk.last else []
        total += pieces * (before * chunk.first + behind * chunk.last)
        for at, (layer, times) in enumerate([*chunk.runs, *ahead]):
            module = at >= len(chunk.runs)
            lora = 0 if module else job.lora_rank
            made = block_kept(config, layer, a, False, lora, job.cpu, job.compiled)
            kept = block_kept(config, layer, a, job.recompute, lora, job.cpu, job.compiled)
            whole = tokens * made.on_rank(sizes.tensor, job.sequence)
            one = tokens * kept.on_rank(sizes.tensor, job.sequence)
            if module:                                       # norms and input of the join, and a head of its own
                total += pieces * tokens * (around_kept(config, a)[1].total + config.dim * (WIDE + 2 * a) + 2 * WIDE)
            if lora and not number and chunk.first and config.placement != "post" and not job.recompute:
                total -= tokens * (config.dim * WIDE + WIDE) / job.sequence       # the first reads a frozen embedding
            own = tokens * transient(config, layer, a).on_rank(sizes.tensor, job.sequence)
            own += whole - one * (job.recompute == "selective") if job.recompute else 0          # the block made again
            weights = layer_weights(config, layer, job, ahead=module)
            gradient = WIDE * (weights.dense + weights.experts)
            own += WIDE * weights.all_experts * (not job.lora_rank)               # of all experts at once
            names = [f"block {number + times}"] + [f"block {number + 1}"] * (times > 1)
            ends = [(names[0], total + pieces * one * times, own, gradient * (times - 1 or 1))]
            ends += [(names[-1], total + pieces * one, own, gradient)] * (times > 1)
            borders, number = ends + borders, number + times
            total += pieces * one * times
    return total, borders


def head_bytes(config: LMConfig, job: Job) -> tuple[float, float]:
    """(forward, backward): logits of one chunk with what is made of them; the head's gradient where it learns."""
    tokens, vocab = job.tokens, -(-config.vocab_size // job.sizes.tensor)
    narrow = WIDE if job.widened else job.itemsize
    gradient = 0 if job.lora_rank else vocab * config.dim * WIDE * (1 + bool(config.mtp))      # of two uses, summed
    if job.cpu or job.precision == "fp16" or job.sizes.tensor > 1:                # core.ChunkedHead
        rows, wide = min(job.chunk, tokens), vocab * WIDE
        again = rows * wide * (2 if tokens > rows else 1) + gradient              # the chunk before is still there
        summed = rows * (wide + vocab * narrow * (narrow < WIDE)) + gradient + (vocab * config.dim * narrow if gradient
                                                                                else 0)
        return rows * wide * 2, max(again, summed) + tokens * config.dim * job.itemsize
    size = tokens * vocab * narrow                                                # nn/fused_head.py
    rows = tokens if size <= KEEP_BYTES else min(tokens, max(job.chunk, CHUNK_BYTES // (vocab * narrow)))
    return rows * vocab * narrow, rows * vocab * narrow + gradient


def pipe_buffers(config: LMConfig, job: Job, held: list[Chunk]) -> float:
    """What torch's stages receive into, for every piece: activations, and their gradients."""
    if job.sizes.pipe == 1:
        return 0
    one = job.tokens / job.sequence * config.dim * WIDE
    return job.pieces * one * sum((not chunk.first) + (not chunk.last) for chunk in held)


class Orthogonal(NamedTuple):
    """Parameters of one shape that Muon updates: a stack of `count` matrices each, as one rank works on them; `number`
    of them, dealt out over `ranks`; `together` of the number go through at once."""

    rows: int
    columns: int
    count: int
    number: int
    ranks: int
    together: int
    copies: bool = False                          # every rank has them all

    @property
    def share(self) -> int:
        """Matrices that a rank does in a step."""
        return self.count * -(-self.number // self.ranks)


def orthogonal(config: LMConfig, job: Job, held: list[Chunk]) -> list[Orthogonal]:
    """What Muon does in a step (optim/muon.py), for the chunks of a rank of the pipeline."""
    found: dict[tuple[int, int, int, int, int, bool], int] = defaultdict(int)
    sizes, tensor, expert = job.sizes, job.sizes.tensor, job.sizes.expert
    shards = sizes.shard * sizes.context if job.parallel.zero else 1
    stretches = [run for chunk in held for run in chunk.runs] + [(layer, 1) for layer in config.mtp] * held[-1].last
    every = [(m, times) for layer, times in stretches for part in layer_params(config, layer)[:2] for m in part.every]
    every += [(Matrix(config.dim, 2 * config.dim, split=""), len(config.mtp))] * bool(held[-1].last and config.mtp)
    for m, times in every:
        inside, most = tensor if m.split else 1, max(1, AT_ONCE // m.entries)
        if not job.parallel.zero and inside == 1 and not (m.experts and expert > 1):
            some = max(sizes.parts, most) * m.count
            found[m.rows, m.columns, 1, sizes.parts, some, sizes.parts > 1] += times * m.count
            continue
        if m.experts:                             # whole where they are
            outside, count, ranks = expert if expert > 1 else shards, -(-m.count // max(expert, shards)), inside
        else:
            outside, count = shards, m.count
            ranks = 1 if shards > 1 and inside > 1 and m.split == "rows" else shards * inside
        found[m.rows, m.columns, count, ranks, inside * outside * most, False] += times
    return [Orthogonal(rows, columns, count, number, min(ranks, number) if copies else ranks, min(number, some),
                       copies and number > 1) for (rows, columns, count, ranks, some, copies), number in found.items()]


def muon_bytes(config: LMConfig, job: Job, held: list[Chunk]) -> float:
    """What orthogonalising needs for a moment: slices stacked, the matrices whole, and four more in the course of an
    iteration."""
    inside = WIDE if job.precision == "fp32" or job.widened else 2

    def one(o: Orthogonal) -> float:
        few, entries = min(o.rows, o.columns), o.rows * o.columns
        if o.copies:
            return o.together * entries * (WIDE + inside + WIDE * (inside < WIDE)) + -(-o.together // o.ranks) * (
                4 * entries * inside + few ** 2 * inside)
        wide = WIDE * (1 + (o.ranks > 1))
        gathered = o.together * entries * WIDE * (job.cpu and o.ranks > 1)        # gloo gathers instead of exchanging
        return o.count * (gathered + -(-o.together // o.ranks) * (entries * (wide + 4 * inside) + few ** 2 * inside))

    return max((one(o) for o in orthogonal(config, job, held)), default=0.0)


def optimizer_bytes(config: LMConfig, optimizer: str, *, states: str = "fp32", lora_rank: int = 0,
                    nf4: bool = False) -> int:
    """AdamW keeps two float32 moments, or of large matrices two bytes and, for every 256, two float32; Muon one moment
    for the matrices of blocks, leaving the rest, adapters among it, to AdamW."""
    return plan_memory(config, batch_size=1, seq_len=1, optimizer=optimizer, states=states, lora_rank=lora_rank,
                       nf4=nf4).optimizer


def nf4_bytes(entries: int) -> int:
    """Of a matrix under double quantisation: half a byte each, a byte for 64, a float32 for 256 such, and a mean."""
    blocks = -(-entries // 64)
    return -(-entries // 2) + blocks + WIDE * -(-blocks // 256) + WIDE


def token_ratio(params: Params, tokens: float) -> float:
    """Training tokens per parameter that a token meets; about 20 is compute-optimal (Chinchilla, 2203.15556)."""
    return tokens / params.active
