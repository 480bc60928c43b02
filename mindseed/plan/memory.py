"""What a run needs in memory: by the parameter, by the token in flight, and by the token remembered while decoding.

Per parameter, training keeps a float32 weight, its gradient and the optimiser's state (AdamW two numbers, Muon one).
Per token of a micro-batch it keeps what the backward pass will read, the activations; the list in
`activation_bytes_per_token` names each of them, in the order in which a block makes them, and a test compares the sum
with the tensors that autograd really saves. Logits exist for one chunk at a time only. Decoding keeps what each layer's
StateSpec declares.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch

from mindseed.core import StateSpec
from mindseed.models.block import MIXERS
from mindseed.models.config import LayerConfig, LMConfig
from mindseed.nn.ffn import MLPConfig, SwiGLUConfig
from mindseed.nn.gqa import GQAConfig
from mindseed.nn.linear_attention import CHUNK, DeltaConfig
from mindseed.nn.mla import MLAConfig
from mindseed.nn.moe import MoEConfig
from mindseed.optim.paged import PAGE_BYTES
from mindseed.plan.params import Params, adapter_matrices, count_params, every_matrix, layer_params

WIDE = 4                                                     # bytes of float32, in which the residual stream is kept


def gqa_activations(dim: int, c: GQAConfig, a: int) -> int:
    """Bytes per token; `a` is the item size in which products run."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    unrotated = (q + kv) * a + (c.heads + c.kv_heads) * WIDE if c.qk_norm else 0         # inputs of the QK-norms
    return (dim * a                                          # input of the projections
            + unrotated
            + (q + 2 * kv) * a                               # rotated q and k, and v
            + q * a)                                         # attention's result, read by `o`


def mla_activations(dim: int, c: MLAConfig, a: int) -> int:
    """Bytes per token of the expanded form."""
    through = 2 * c.q_rank * a + WIDE if c.q_rank else 0     # before and after the norm of the queries' bottleneck
    return (dim * a + through
            + (c.kv_rank + c.rope_dim) * a + WIDE + c.kv_rank * a          # latent before and after its norm
            + 2 * c.heads * c.key_dim * a                    # queries and keys
            + c.heads * (c.plain_dim + c.value_dim) * a      # what keys and values are cut from
            + c.heads * c.value_dim * a)                     # attention's result


def delta_activations(dim: int, c: DeltaConfig, a: int) -> int:
    """Bytes per token of the chunked form. What autograd keeps of a chunk is many small tensors; how many of each width
    was counted by measurement, and a test holds the sum to what is kept."""
    channels = 2 * c.key_heads * c.key_dim + c.heads * c.value_dim
    gates = dim * WIDE if a < WIDE else 0
    chunk = c.heads * (6 * CHUNK + 10 * c.key_dim + 5 * c.value_dim) * WIDE
    return dim * a + gates + channels * (c.conv + 1) * a + chunk + 4 * c.heads * c.value_dim * a


def swiglu_activations(dim: int, c: SwiGLUConfig, a: int) -> int:
    """Bytes per token: the input, gate and up, and their product, which `down` reads."""
    return (dim + 3 * c.ffn_dim) * a


def mlp_activations(dim: int, c: MLPConfig, a: int) -> int:
    """Bytes per token: the input, what the activation reads, and what it gives (relu keeps that alone)."""
    kept = {"relu": 1, "relu2": 2}.get(c.activation, 2)
    return (dim + kept * c.ffn_dim) * a


def moe_activations(dim: int, c: MoEConfig, a: int) -> int:
    """Bytes per token: the input and the router's copy of it, scores; per visit the input, gate, up, the answer, and
    where it was sorted to."""
    router = (dim * WIDE if a < WIDE else 0) + c.experts * WIDE
    visit = (2 * dim + 2 * c.expert_dim) * a + 3 * 8 + 2 * WIDE
    return (dim + 3 * c.shared_dim) * a + router + c.top_k * visit


MIXER_ACTIVATIONS = {GQAConfig: gqa_activations, MLAConfig: mla_activations, DeltaConfig: delta_activations}
FFN_ACTIVATIONS = {SwiGLUConfig: swiglu_activations, MLPConfig: mlp_activations, MoEConfig: moe_activations}


def activation_bytes_per_token(config: LMConfig, *, itemsize: int = 2, recompute: bool = False,
                               lora_rank: int = 0) -> float:
    """Bytes that autograd keeps per token of a micro-batch, without the casts of the weights (see `plan_memory`).

    `itemsize` is 2 under bf16 or fp16 autocast and 4 in float32. Masks of packed rows and dropout's masks are not
    counted. Under `recompute` a block keeps its input only, and one block at a time is rebuilt. An adapter keeps what
    is between its two matrices, and reads an input that the base would keep; modules for further tokens, which have
    none, count as if they had.
    """
    norm = config.dim * WIDE + WIDE                          # RMSNorm keeps its input and one number
    narrow = config.dim * (WIDE if config.norm == "layer" else itemsize) + WIDE   # LayerNorm keeps it wide
    norms = {"pre": 2 * norm, "post": 2 * narrow, "sandwich": 2 * norm + 2 * narrow}[config.placement]

    def between(layer: LayerConfig) -> int:
        parts = [m for part in layer_params(config, layer)[:2] for m in part.every]
        return lora_rank * itemsize * sum(m.adapts and m.count == 1 for m in parts)

    def block(layer: LayerConfig) -> int:
        return (norms + MIXER_ACTIVATIONS[type(layer.mixer)](config.dim, layer.mixer, itemsize)
                + FFN_ACTIVATIONS[type(layer.ffn)](config.dim, layer.ffn, itemsize))

    blocks = [block(layer) + between(layer) for layer in config.layers] + [block(layer) for layer in config.mtp]
    if lora_rank and config.placement != "post":
        blocks[0] -= norm                                    # the first one reads a frozen embedding
    tables = sum({(rope, width): width for rope, width in map(rotary, (*config.layers, *config.mtp)) if rope}.values())
    head = norm + config.dim * itemsize + WIDE               # last norm, input of the head, its partition sums
    around = 2 * 8 + tables * WIDE + head                    # ids and targets; cos and sin, K/2 each
    around += len(config.mtp) * (head + norm + WIDE + 2 * config.dim * itemsize)        # norms and input of the join
    if recompute:
        return around + len(blocks) * config.dim * WIDE + max(blocks)
    return around + sum(blocks)


def rotary(layer: LayerConfig) -> tuple[object, int]:
    """(kind of rotation, its width) of a layer."""
    mixer = layer.mixer
    return getattr(mixer, "rope", None), getattr(mixer, "rope_dim", getattr(mixer, "head_dim", 0))


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


@dataclass(frozen=True, kw_only=True)
class TrainMemory:
    """Bytes on one device, at the worst moment of a step."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    casts: int                   # copies of the weights in the narrow dtype, kept by autocast until the step ends
    activations: int
    logits: int                  # one chunk in both dtypes, and the head's gradient in float32 if it learns

    @property
    def total(self) -> int:
        return sum((self.weights, self.gradients, self.optimizer, self.ema, self.casts, self.activations, self.logits))


def plan_memory(config: LMConfig, *, batch_size: int, seq_len: int, itemsize: int = 2, optimizer: str = "adamw",
                ema: bool = False, recompute: bool = False, chunk: int = 1024, lora_rank: int = 0,
                nf4: bool = False, states: str = "fp32", paged: bool = False) -> TrainMemory:
    """An estimate for `batch_size` rows of `seq_len` tokens in one micro-batch; the allocator's waste is not in it.

    With `lora_rank` an adapter beside every matrix of the blocks learns, and nothing else; with `nf4` Linears are
    packed and frozen. `states` are those of the optimiser, `paged` says that states="paged" has a GPU to page from.
    """
    params, tokens, rows = count_params(config), batch_size * seq_len, min(chunk, batch_size * seq_len)
    packed = [m for m in every_matrix(config, ahead=True) if nf4 and m.packs]
    thin = adapter_matrices(config, lora_rank) if lora_rank else []
    away, added = sum(m.entries for m in packed), sum(m.entries for m in thin)
    learning = added if lora_rank else params.total - away
    casts = itemsize * (params.matrices - away + added + config.vocab_size * config.dim) if itemsize < WIDE else 0
    if lora_rank:                                            # experts are multiplied with the sum of both
        casts += WIDE * sum(m.entries for m in every_matrix(config, ahead=False) if m.count > 1)
    kept = optimizer_bytes(config, optimizer, states=states, lora_rank=lora_rank, nf4=nf4)
    return TrainMemory(
        weights=WIDE * (params.total - away + added) + sum(nf4_bytes(m.entries) for m in packed),
        gradients=WIDE * learning,
        optimizer=min(kept, PAGE_BYTES) if states == "paged" and paged else kept,
        ema=WIDE * learning if ema else 0,
        casts=casts,
        activations=int(tokens * activation_bytes_per_token(config, itemsize=itemsize, recompute=recompute,
                                                            lora_rank=lora_rank)),
        logits=rows * config.vocab_size * (itemsize + WIDE)
        + (0 if lora_rank else WIDE * config.vocab_size * config.dim))


def optimizer_bytes(config: LMConfig, optimizer: str, *, states: str = "fp32", lora_rank: int = 0,
                    nf4: bool = False) -> int:
    """AdamW keeps two float32 moments, or of large matrices two bytes and, for every 256, two float32; Muon one moment
    for the matrices of blocks, leaving the rest, adapters among it, to AdamW."""
    params, muon = count_params(config), optimizer == "muon" and not lora_rank
    rest = 0 if lora_rank else params.total - params.matrices
    matrices = adapter_matrices(config, lora_rank) if lora_rank else [
        m for m in every_matrix(config, ahead=True) if not (nf4 and m.packs)]

    def bytes_of(entries: int) -> int:
        if states == "8bit" and entries >= 4096:
            return 2 * (entries + WIDE * -(-entries // 256))
        return WIDE * entries if muon else 2 * WIDE * entries

    return sum(bytes_of(m.entries) for m in matrices) + 2 * WIDE * rest


def nf4_bytes(entries: int) -> int:
    """Of a matrix under double quantisation: half a byte each, a byte for 64, a float32 for 256 such, and a mean."""
    blocks = -(-entries // 64)
    return -(-entries // 2) + blocks + WIDE * -(-blocks // 256) + WIDE


def token_ratio(params: Params, tokens: float) -> float:
    """Training tokens per parameter; about 20 is compute-optimal (Chinchilla, 2203.15556)."""
    return tokens / params.total
