"""What a rank does for a piece of a batch: the kernels of its blocks and of the head, and what it tells other ranks
between them.

A block's time is the sum of its kernels' (roofline.py): forward f, gradients of its inputs i and of its weights w, and
what is computed again. Where ranks share a block they wait for each other in the middle of it:

    tensor     activations are gathered and reduced between the products: nothing to hide behind
    expert     tokens travel to their experts and back: the same
    context    keys and values travel while attention to those at hand runs, and results are joined; gradients of keys
               and values follow, and are waited for
"""
from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from mindseed.base.mesh import Sizes
from mindseed.models.config import LayerConfig, LMConfig
from mindseed.nn.ffn import MLPConfig, SwiGLUConfig
from mindseed.nn.fused_head import KEEP_BYTES
from mindseed.nn.gqa import GQAConfig
from mindseed.nn.linear_attention import DeltaConfig
from mindseed.nn.mla import MLAConfig
from mindseed.nn.moe import MoEConfig
from mindseed.plan.activations import WIDE, Kept, shares_again
from mindseed.plan.communication import Group, exchange_s, gather_s, groups, pass_s, share
from mindseed.plan.flops import ATTENTION_FLOPS
from mindseed.plan.job import Chunk, Job, by_model
from mindseed.plan.machines import LAUNCH_S, MEMORY, Machine
from mindseed.plan.params import layer_params
from mindseed.plan.roofline import attention_s, moved_s, product_s

KERNELS = {False: (35, 70), True: (12, 25)}       # of a block, forward and backward; True: compiled
JOIN, JOIN_BACK = 14, 12                          # bytes per entry: partial results of attention added up; gradients
LOGIT = 60                                        # bytes per logit that the plain head moves, forward and backward


@dataclass
class Work:
    """Seconds of some part of a step on one rank: forward, gradients of inputs (with what is computed again), gradients
    of weights. `kinds` says what arithmetic they are, `waits` what ranks wait for by axis; together they are all.
    `sent` are bytes that leave the rank."""

    forward: float = 0.0
    inputs: float = 0.0
    weights: float = 0.0
    kinds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    waits: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    sent: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, other: Work, times: float = 1) -> None:
        self.forward += times * other.forward
        self.inputs += times * other.inputs
        self.weights += times * other.weights
        for mine, theirs in ((self.kinds, other.kinds), (self.sent, other.sent), (self.waits, other.waits)):
            for name, value in theirs.items():
                mine[name] += times * value

    def exchange(self, axis: str, forward: float, back: float, sent: float) -> None:
        """Time in which nothing else happens."""
        self.forward += forward
        self.inputs += back
        self.waits[axis] += forward + back
        self.sent[axis] += sent

    @property
    def total(self) -> float:
        return self.forward + self.inputs + self.weights


# ---------------------------------------------------------------------------------------------------- what memory moves

def mixer_bytes(dim: int, mixer: GQAConfig | MLAConfig | DeltaConfig, a: int) -> Kept:
    """Bytes per token that memory-bound operations of a mixer read and write, fused, forward."""
    if isinstance(mixer, GQAConfig):
        rotated = (mixer.heads + mixer.kv_heads) * mixer.head_dim * 2 * a
        return Kept(inner=rotated * ((mixer.rope is not None) + mixer.qk_norm))
    if isinstance(mixer, MLAConfig):
        return Kept(entry=2 * a * (mixer.kv_rank + mixer.rope_dim + (mixer.q_rank or 0)),
                    inner=2 * a * mixer.heads * 2 * mixer.key_dim)                # queries and keys are put together
    channels = 2 * mixer.key_heads * mixer.key_dim + mixer.heads * mixer.value_dim
    return Kept(inner=2 * a * channels * (mixer.conv + 1) + WIDE * 2 * mixer.heads * 15 * mixer.key_dim)


def ffn_bytes(dim: int, ffn: SwiGLUConfig | MLPConfig | MoEConfig, a: int) -> Kept:
    if isinstance(ffn, MoEConfig):
        return Kept(entry=6 * WIDE * ffn.experts + 4 * dim * a * ffn.top_k,
                    inner=3 * a * (ffn.top_k * ffn.expert_dim + ffn.shared_dim))
    return Kept(inner=(3 if isinstance(ffn, SwiGLUConfig) else 2) * a * ffn.ffn_dim)


def block_bytes(config: LMConfig, layer: LayerConfig, a: int) -> Kept:
    """Norms read the wide stream and write narrow, sums read both and write wide."""
    norms = 4 if config.placement == "sandwich" else 2
    stream = norms * config.dim * (WIDE + a) + 2 * config.dim * (2 * WIDE + a)
    return mixer_bytes(config.dim, layer.mixer, a).plus(ffn_bytes(config.dim, layer.ffn, a)).plus(Kept(stream=stream))


def moved_in(config: LMConfig, layer: LayerConfig, job: Job) -> float:
    """Bytes that memory-bound operations of a block would move if they were fused, forward, on one rank."""
    return job.tokens * block_bytes(config, layer, job.itemsize).on_rank(job.sizes.tensor, job.sequence)


# ------------------------------------------------------------------------------------------------------------- a block

def block_work(config: LMConfig, layer: LayerConfig, job: Job, board: Machine) -> Work:
    """One block on one rank, one piece."""
    return of_block(config, layer, board, job.itemsize, job.tokens, job.seq_len, job.sizes, job.sequence,
                    "fp32" if job.widened else job.precision,
                    shares_again(config, layer, job.recompute, job.cpu), bool(job.lora_rank), job.compiled)


@by_model
def of_block(config: LMConfig, layer: LayerConfig, board: Machine, a: int, tokens: float, seq_len: int, sizes: Sizes,
             sequence: int, kind: str, shares: tuple[float, float, float], lora: bool, compiled: bool) -> Work:
    """Remembered: a search asks for few different ones."""
    work, of = Work(), groups(sizes, board.per_node)
    forward, inputs, weights = products(config, layer, board, kind, tokens, sizes, lora)
    looked, looked_back = attention(layer, board, kind, tokens, seq_len, sizes)
    passing = moved_s(board, tokens * block_bytes(config, layer, a).on_rank(sizes.tensor, sequence), compiled=compiled)
    again = sum(part * times for part, times in zip((forward, looked, passing), shares))

    # A GPU may wait for its CPU, which launches kernels one by one; a CPU has to do both.
    launched = [n * LAUNCH_S for n in KERNELS[compiled]]
    if board.rates:
        launched = [board.overhead / 3, board.overhead * 2 / 3]
    bare = forward + looked + passing, inputs + looked_back + 2 * passing + weights
    idle = [max(0.0, launch - busy * board.gpu) for launch, busy in zip(launched, bare)]
    work.forward = bare[0] + idle[0]
    work.inputs = bare[1] - weights + idle[1] + again
    work.weights = weights
    work.kinds |= {"products": forward + inputs + weights, "attention": looked + looked_back, "memory": 3 * passing,
                   "computed again": again, "launching": sum(idle)}

    stream, over = tokens * config.dim * a, board.bandwidth * MEMORY
    visits = getattr(layer.ffn, "top_k", 0)
    for axis, count, amount in (("tensor", 4, stream), ("expert", 2, stream * visits)):
        if of[axis].ranks > 1 and amount:
            one = (gather_s if axis == "tensor" else exchange_s)(board, of[axis], amount)
            one += 2 * amount / over * (not compiled)        # parts are put together; compiled code does so on its way
            times = count + (count - (axis == "tensor")) * bool(shares[0])        # the last sum is not made again
            work.exchange(axis, count * one, times * one, amount * share(of[axis]) * (count + times))
    if sizes.context > 1 and not isinstance(layer.mixer, DeltaConfig):
        ring(work, layer, board, a, tokens, sizes, of["context"], (looked, looked_back), shares[1])
    return work


def products(config: LMConfig, layer: LayerConfig, board: Machine, kind: str, tokens: float, sizes: Sizes, lora: bool
             ) -> tuple[float, float, float]:
    """Seconds of all matrix products of a block: forward, gradients of inputs, gradients of weights."""
    spent = [0.0, 0.0, 0.0]
    for m in (m for part in layer_params(config, layer)[:2] for m in part.every):
        here, rows = m.local(sizes.tensor, sizes.expert), tokens
        if m.experts:                                        # its tokens are those of all ranks that deal them out
            rows = tokens * sizes.expert * layer.ffn.top_k / layer.ffn.experts
        spent[0] += product_s(board, kind, rows, here.columns, here.rows, here.count)
        spent[1] += product_s(board, kind, rows, here.rows, here.columns, here.count)
        spent[2] += 0 if lora else product_s(board, kind, here.rows, rows, here.columns, here.count)
    return tuple(spent)


def attention(layer: LayerConfig, board: Machine, kind: str, tokens: float, seq_len: int, sizes: Sizes
              ) -> tuple[float, float]:
    """Seconds of attention over the whole past of every token, forward and backward."""
    scores = ATTENTION_FLOPS[type(layer.mixer)](layer.mixer, seq_len, True, False) * tokens / sizes.tensor
    if isinstance(layer.mixer, DeltaConfig):                 # many small products, at a tenth of the usual rate
        return tuple(times * scores / (0.1 * board.attained * board.peaks[kind]) for times in (1, 2))
    return attention_s(board, kind, seq_len, scores, 2.5 * scores)


def ring(work: Work, layer: LayerConfig, board: Machine, a: int, tokens: float, sizes: Sizes, group: Group,
         looked: tuple[float, float], again: float) -> None:
    """Add what parallel/context.py does beside attention itself: keys and values go around, partial results and
    gradients are added up, and gradients of keys and values come home."""
    mixer, rounds, over = layer.mixer, sizes.context - 1, board.bandwidth * MEMORY
    if isinstance(mixer, GQAConfig):
        queries, keys = mixer.heads * mixer.head_dim, 2 * mixer.kv_heads * mixer.head_dim
    else:
        queries, keys = mixer.heads * mixer.value_dim, mixer.heads * (mixer.key_dim + mixer.value_dim)
    queries, keys = (width * tokens / sizes.tensor for width in (queries, keys))
    one, home = (pass_s(board, group, keys * size) for size in (a, WIDE))
    wait = rounds * max(0.0, one - looked[0] / sizes.context) + sizes.context * queries * JOIN / over
    back = rounds * max(0.0, one - looked[1] / sizes.context) + sizes.context * (
        home + (queries + keys) * JOIN_BACK / over)
    work.exchange("context", wait, back + again * wait,
                  keys * (rounds * a * (2 + again) + sizes.context * WIDE))


# ------------------------------------------------------------------------------------------------------------ its ends

def head_work(config: LMConfig, job: Job, board: Machine, chunk: Chunk) -> Work:
    """The embedding; the head and its loss, once more for every further token predicted."""
    work, tensor, a, tokens = Work(), job.sizes.tensor, job.itemsize, job.tokens
    ends = 0                                      # places where the stream is gathered or reduced over `tensor`
    if chunk.first:
        work.forward = work.inputs = moved_s(board, tokens * config.dim * 2 * WIDE, compiled=True)
        ends += 1
    if chunk.last:
        times, vocab = 1 + len(config.mtp), -(-config.vocab_size // tensor)
        kind = "fp32" if job.widened else "bf16" if job.precision == "fp8" else job.precision
        plain = job.cpu or tensor > 1 or job.precision == "fp16"                  # core.ChunkedHead
        rows = min(job.chunk, tokens) if plain else tokens
        one = product_s(board, kind, rows, config.dim, vocab) * tokens / rows
        kept = not plain and tokens * vocab * a <= KEEP_BYTES                     # nn/fused_head.py
        moved = tokens * vocab * (LOGIT if plain else 3 * a) / (board.bandwidth * MEMORY)
        passing = tokens * vocab * board.logit_s or moved
        work.forward += times * (one + passing / 3)
        work.inputs += times * (one * (1 if kept else 2) + passing * 2 / 3)
        work.weights += 0 if job.lora_rank else times * one
        ends += 2 * times
    work.kinds["head"] = work.total
    if tensor > 1 and ends:
        group, stream = groups(job.sizes, board.per_node)["tensor"], tokens * config.dim * a
        wait = ends * gather_s(board, group, stream)
        work.exchange("tensor", wait, wait, 2 * ends * stream * share(group))
    return work
