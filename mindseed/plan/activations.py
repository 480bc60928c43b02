"""What the backward pass will read: bytes per token of everything that a block keeps, named in the order in which it is
made.

A test compares the sums with the tensors that autograd really saves. Each byte belongs to one of three kinds, because
ranks that share a block share them differently (parallel/tensor.py):

    stream    between the matrices: inputs of norms. Sequence parallel cuts them by tokens
    entry     what enters a region of heads or features, whole on every rank
    inner     within a region: heads, features. Tensor parallel cuts them

Beside what is kept, a block needs for a moment what its backward pass makes on the way (`transient`).
"""
from __future__ import annotations

from typing import NamedTuple

from mindseed.models.config import LayerConfig, LMConfig
from mindseed.nn.ffn import MLPConfig, SwiGLUConfig
from mindseed.nn.gqa import GQAConfig
from mindseed.nn.linear_attention import CHUNK, DeltaConfig
from mindseed.nn.mla import MLAConfig
from mindseed.nn.moe import MoEConfig
from mindseed.nn.recompute import Recompute
from mindseed.plan.flops import LAST_PRODUCT, every_second
from mindseed.plan.job import Job, by_model
from mindseed.plan.params import layer_params

WIDE = 4                                                     # bytes of float32, in which the residual stream is kept


class Kept(NamedTuple):
    """Bytes per token."""

    stream: float = 0
    entry: float = 0
    inner: float = 0

    def plus(self, other: Kept) -> Kept:
        return Kept(*(a + b for a, b in zip(self, other)))

    def on_rank(self, tensor: int, sequence: int) -> float:
        return self.stream / sequence + self.entry + self.inner / tensor

    @property
    def total(self) -> float:
        return sum(self)


def gqa_activations(dim: int, c: GQAConfig, a: int) -> Kept:
    """`a` is the item size in which products run."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    unrotated = (q + kv) * a + (c.heads + c.kv_heads) * WIDE if c.qk_norm else 0         # inputs of the QK-norms
    return Kept(entry=dim * a,                               # input of the projections
                inner=unrotated
                + (q + 2 * kv) * a                           # rotated q and k, and v
                + q * a)                                     # attention's result, read by `o`


def mla_activations(dim: int, c: MLAConfig, a: int) -> Kept:
    """The expanded form. Latents are the same on every rank."""
    through = 2 * c.q_rank * a + WIDE if c.q_rank else 0     # before and after the norm of the queries' bottleneck
    latent = (c.kv_rank + c.rope_dim) * a + WIDE + c.kv_rank * a                  # before and after its norm
    return Kept(entry=dim * a + through + latent,
                inner=2 * c.heads * c.key_dim * a            # queries and keys
                + c.heads * (c.plain_dim + c.value_dim) * a  # what keys and values are cut from
                + c.heads * c.value_dim * a)                 # attention's result


def delta_activations(dim: int, c: DeltaConfig, a: int) -> Kept:
    """The chunked form. What autograd keeps of a chunk is many small tensors; how many of each width was counted by
    measurement, and a test holds the sum to what is kept."""
    channels = 2 * c.key_heads * c.key_dim + c.heads * c.value_dim
    gates = dim * WIDE if a < WIDE else 0
    chunk = c.heads * (6 * CHUNK + 10 * c.key_dim + 5 * c.value_dim) * WIDE
    return Kept(entry=dim * a + gates, inner=channels * (c.conv + 1) * a + chunk + 4 * c.heads * c.value_dim * a)


def swiglu_activations(dim: int, c: SwiGLUConfig, a: int) -> Kept:
    """The input, gate and up, and their product, which `down` reads."""
    return Kept(entry=dim * a, inner=3 * c.ffn_dim * a)


def mlp_activations(dim: int, c: MLPConfig, a: int) -> Kept:
    """The input, what the activation reads, and what it gives (relu keeps that alone)."""
    kept = {"relu": 1, "relu2": 2}.get(c.activation, 2)
    return Kept(entry=dim * a, inner=kept * c.ffn_dim * a)


def moe_activations(dim: int, c: MoEConfig, a: int) -> Kept:
    """The input and the router's copy of it, scores; per visit the input, gate, up, the answer, and where it was sorted
    to."""
    router = (dim * WIDE if a < WIDE else 0) + c.experts * WIDE
    return Kept(entry=dim * a + router + c.top_k * (2 * dim * a + 3 * 8 + 2 * WIDE),
                inner=3 * c.shared_dim * a + c.top_k * 2 * c.expert_dim * a)


MIXER_ACTIVATIONS = {GQAConfig: gqa_activations, MLAConfig: mla_activations, DeltaConfig: delta_activations}
FFN_ACTIVATIONS = {SwiGLUConfig: swiglu_activations, MLPConfig: mlp_activations, MoEConfig: moe_activations}


def gqa_transient(dim: int, c: GQAConfig, a: int) -> Kept:
    """Gradients of q, k, v and of the result."""
    return Kept(entry=dim * a, inner=2 * (c.heads + c.kv_heads) * c.head_dim * a)


def mla_transient(dim: int, c: MLAConfig, a: int) -> Kept:
    return Kept(entry=dim * a, inner=c.heads * (2 * c.key_dim + c.value_dim + c.plain_dim) * a)


def delta_transient(dim: int, c: DeltaConfig, a: int) -> Kept:
    return Kept(entry=dim * a, inner=c.heads * (6 * c.key_dim + 6 * c.value_dim) * WIDE)


def swiglu_transient(dim: int, c: SwiGLUConfig, a: int) -> Kept:
    """SiLU of the gate, its gradient on the way and at the end; the gradient of the product takes its place."""
    return Kept(inner=3 * c.ffn_dim * a)


def mlp_transient(dim: int, c: MLPConfig, a: int) -> Kept:
    return Kept(inner=c.ffn_dim * a)


def moe_transient(dim: int, c: MoEConfig, a: int) -> Kept:
    """Gradients of all visits, sorted, before and after the experts."""
    return Kept(entry=2 * c.top_k * dim * a)


TRANSIENT = {GQAConfig: gqa_transient, MLAConfig: mla_transient, DeltaConfig: delta_transient,
             SwiGLUConfig: swiglu_transient, MLPConfig: mlp_transient, MoEConfig: moe_transient}


def norm_bytes(config: LMConfig, a: int) -> int:
    """What the norms of a block keep, of a token."""
    norm = config.dim * WIDE + WIDE                          # RMSNorm keeps its input and one number
    narrow = config.dim * (WIDE if config.norm == "layer" else a) + WIDE          # LayerNorm keeps it wide
    return {"pre": 2 * norm, "post": 2 * narrow, "sandwich": 2 * norm + 2 * narrow}[config.placement]


def product_outputs(config: LMConfig, layer: LayerConfig, a: int, which: slice) -> Kept:
    """What some of a block's products give, in their order, and (on a GPU) attention with its partition sums."""
    kept = {"entry": 0.0, "inner": 0.0}
    for m in [m for part in layer_params(config, layer)[:2] for m in part.every][which]:
        kept["inner" if m.split == "rows" else "entry"] += m.rows * (layer.ffn.top_k if m.experts else 1) * a
    heads = getattr(layer.mixer, "heads", 0) * (not isinstance(layer.mixer, DeltaConfig))
    width = getattr(layer.mixer, "value_dim", 0) or getattr(layer.mixer, "head_dim", 0)
    return Kept(**kept).plus(Kept(inner=heads * (width * a + WIDE)))


@by_model
def shares_again(config: LMConfig, layer: LayerConfig, recompute: Recompute, cpu: bool) -> tuple[float, float, float]:
    """Of products, attention and the rest, what the backward pass runs again. On a CPU attention is our own, which is
    no single operation that could be kept."""
    if recompute == "selective":
        return every_second(config, layer), float(cpu), 1.0
    if not recompute:
        return 0.0, 0.0, 0.0
    mixer, ffn, _ = layer_params(config, layer)
    last = LAST_PRODUCT[type(layer.ffn)](config.dim, layer.ffn) if config.placement == "pre" else 0
    return 1 - last / (2 * (mixer.active + ffn.active)), 1.0, 1.0


@by_model
def block_kept(config: LMConfig, layer: LayerConfig, a: int, recompute: Recompute = False, lora_rank: int = 0,
               cpu: bool = False, compiled: bool = False) -> Kept:
    """What one block keeps until its backward pass. Under selective recomputation (2205.05198) that is its input, what
    every second product gave, and on a GPU the result of attention. Compiled blocks do much the same by themselves: of
    a dense block they keep its input and what products gave, and make again whatever is cheap (the least cut through
    the graph of both passes)."""
    if recompute is True:
        return Kept(stream=config.dim * WIDE)
    if recompute == "selective":
        kept = product_outputs(config, layer, a, slice(1, None, 2)).plus(Kept(stream=config.dim * WIDE))
        heads = 0 if isinstance(layer.mixer, DeltaConfig) else layer.mixer.heads * cpu
        width = getattr(layer.mixer, "value_dim", 0) or getattr(layer.mixer, "head_dim", 0)
        return kept.plus(Kept(inner=-heads * (width * a + WIDE)))                 # a CPU makes attention again
    if compiled and not lora_rank and not isinstance(layer.mixer, DeltaConfig) and not isinstance(layer.ffn, MoEConfig):
        return product_outputs(config, layer, a, slice(0, -1)).plus(Kept(stream=config.dim * WIDE))
    between = lora_rank * a * sum(m.adapts and not m.experts for part in layer_params(config, layer)[:2]
                                  for m in part.every)       # between the two matrices of an adapter
    mixer = MIXER_ACTIVATIONS[type(layer.mixer)](config.dim, layer.mixer, a)
    ffn = FFN_ACTIVATIONS[type(layer.ffn)](config.dim, layer.ffn, a)
    return mixer.plus(ffn).plus(Kept(stream=norm_bytes(config, a), inner=between))


@by_model
def transient(config: LMConfig, layer: LayerConfig, a: int) -> Kept:
    """What the backward pass of a block needs for a moment, at the larger of its two halves."""
    halves = [TRANSIENT[type(part)](config.dim, part, a) for part in (layer.mixer, layer.ffn)]
    return max(halves, key=lambda kept: kept.total)


@by_model
def around_kept(config: LMConfig, a: int) -> tuple[Kept, Kept]:
    """What is kept before the first block and behind the last, of a token: (ids and rotary tables, last norm and input
    of the head)."""
    tables = sum({(rope, width): width for rope, width in map(rotary, (*config.layers, *config.mtp)) if rope}.values())
    norm = config.dim * WIDE + WIDE
    return (Kept(entry=2 * 8 + tables * WIDE),               # ids and targets; cos and sin, K/2 each
            Kept(stream=norm, entry=config.dim * a + WIDE))  # input of the head, its partition sums


def rotary(layer: LayerConfig) -> tuple[object, int]:
    """(kind of rotation, its width) of a layer."""
    mixer = layer.mixer
    return getattr(mixer, "rope", None), getattr(mixer, "rope_dim", getattr(mixer, "head_dim", 0))


def activation_bytes_per_token(config: LMConfig, *, itemsize: int = 2, recompute: Recompute = False,
                               lora_rank: int = 0) -> float:
    """Bytes that autograd keeps per token of a micro-batch on one device, without the casts of the weights.

    `itemsize` is 2 under bf16 or fp16 autocast and 4 in float32. Masks of packed rows and dropout's masks are not
    counted. Under `recompute` a block keeps its input only, and one block at a time is rebuilt. An adapter keeps what
    is between its two matrices, and reads an input that the base would keep; modules for further tokens, which have
    none, count as if they had.
    """
    before, behind = around_kept(config, itemsize)
    blocks = [block_kept(config, layer, itemsize, recompute, lora_rank).total for layer in config.layers]
    blocks += [block_kept(config, layer, itemsize, recompute).total for layer in config.mtp]
    if lora_rank and config.placement != "post" and not recompute:
        blocks[0] -= config.dim * WIDE + WIDE                # the first one reads a frozen embedding
    join = len(config.mtp) * (behind.total + config.dim * WIDE + WIDE + WIDE + 2 * config.dim * itemsize)
    rebuilt = max(block_kept(config, layer, itemsize, False, lora_rank).total for layer in (
        *config.layers, *config.mtp)) if recompute else 0
    return before.total + behind.total + join + sum(blocks) + rebuilt


def scratch_bytes(config: LMConfig, job: Job) -> float:
    """Buffers that the CPU's own kernels keep for good (nn/linear.py, nn/blocked.py, nn/grouped.py)."""
    if not job.cpu:
        return 0
    rows, tensor, named = job.tokens, job.sizes.tensor, {}

    def buffer(name: str, entries: float) -> None:
        named[name] = max(named.get(name, 0), entries * WIDE)

    for layer in {*config.layers, *config.mtp}:
        mixer, ffn = layer.mixer, layer.ffn
        if not isinstance(mixer, DeltaConfig) and job.sizes.context == 1:
            width = getattr(mixer, "head_dim", 0)
            key, value = width or mixer.key_dim, width or mixer.value_dim
            heads, groups = mixer.heads / tensor, getattr(mixer, "kv_heads", mixer.heads) / tensor
            for name in ("q", "dq"):
                buffer(name, rows * heads * key)
            for name in ("y", "g"):
                buffer(name, rows * heads * value)
            for name in ("k", "dk"):
                buffer(name, rows * groups * key)
            for name in ("v", "dv"):
                buffer(name, rows * groups * value)
        if isinstance(ffn, MoEConfig):
            busiest = rows * ffn.top_k / ffn.experts * job.sizes.expert           # more where the load is uneven
            for name, width in (("x", config.dim), *((n, ffn.expert_dim / tensor) for n in "abhst")):
                buffer(f"expert {name}", busiest * width)
        if job.widened:
            for part in layer_params(config, layer)[:2]:
                for m in (m.local(tensor) for m in part.every if not m.experts):
                    buffer("in", rows * max(m.rows, m.columns))
                    buffer("out", rows * max(m.rows, m.columns))
                    buffer("saved", rows * m.columns)
    return sum(named.values())
