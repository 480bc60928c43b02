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
from mindseed.models.config import LMConfig
from mindseed.nn.ffn import SwiGLUConfig
from mindseed.nn.gqa import MIXERS, GQAConfig
from mindseed.plan.params import Params, count_params

WIDE = 4                                                     # bytes of float32, in which the residual stream is kept


def gqa_activations(dim: int, c: GQAConfig, a: int) -> int:
    """Bytes per token; `a` is the item size in which products run."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    unrotated = (q + kv) * a + (c.heads + c.kv_heads) * WIDE if c.qk_norm else 0         # inputs of the QK-norms
    return (dim * a                                          # input of the projections
            + unrotated
            + (q + 2 * kv) * a                               # rotated q and k, and v
            + q * a)                                         # attention's result, read by `o`


def swiglu_activations(dim: int, c: SwiGLUConfig, a: int) -> int:
    """Bytes per token: the input, gate and up, and their product, which `down` reads."""
    return (dim + 3 * c.ffn_dim) * a


MIXER_ACTIVATIONS = {GQAConfig: gqa_activations}
FFN_ACTIVATIONS = {SwiGLUConfig: swiglu_activations}


def activation_bytes_per_token(config: LMConfig, *, itemsize: int = 2, recompute: bool = False) -> float:
    """Bytes that autograd keeps per token of a micro-batch, without the casts of the weights (see `plan_memory`).

    `itemsize` is 2 under bf16 or fp16 autocast and 4 in float32. Masks of packed rows and dropout's masks are not
    counted. Under `recompute` a block keeps its input only, and one block at a time is rebuilt.
    """
    norm = config.dim * WIDE + WIDE                          # RMSNorm keeps its input and one number
    blocks = [2 * norm + MIXER_ACTIVATIONS[type(layer.mixer)](config.dim, layer.mixer, itemsize)
              + FFN_ACTIVATIONS[type(layer.ffn)](config.dim, layer.ffn, itemsize) for layer in config.layers]
    ropes = {(layer.mixer.rope, layer.mixer.head_dim) for layer in config.layers}
    around = (2 * 8                                          # ids and targets
              + sum(head_dim for _, head_dim in ropes) * WIDE                            # cos and sin, K/2 each
              + norm + config.dim * itemsize + WIDE)         # last norm, input of the head, its partition sums
    if recompute:
        return around + len(blocks) * config.dim * WIDE + max(blocks)
    return around + sum(blocks)


def state_specs(config: LMConfig) -> list[StateSpec]:
    """What each layer remembers while decoding, asked of the layers themselves (built without memory)."""
    with torch.device("meta"):
        return [MIXERS[type(layer.mixer)](config.dim, layer.mixer).state_spec() for layer in config.layers]


def cache_bytes_per_token(config: LMConfig, itemsize: int = 2) -> int:
    """Bytes that decoding adds for every token of every sequence."""
    return sum(spec.bytes_per_token(itemsize) for spec in state_specs(config))


@dataclass(frozen=True, kw_only=True)
class TrainMemory:
    """Bytes on one device, at the worst moment of a step."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    casts: int                   # copies of the weights in the narrow dtype, kept by autocast until the step ends
    activations: int
    logits: int                  # one chunk in both dtypes, and the head's gradient in float32

    @property
    def total(self) -> int:
        return sum((self.weights, self.gradients, self.optimizer, self.ema, self.casts, self.activations, self.logits))


def plan_memory(config: LMConfig, *, batch_size: int, seq_len: int, itemsize: int = 2, optimizer: str = "adamw",
                ema: bool = False, recompute: bool = False, chunk: int = 1024) -> TrainMemory:
    """An estimate for `batch_size` rows of `seq_len` tokens in one micro-batch; the allocator's waste is not in it."""
    params = count_params(config)
    tokens = batch_size * seq_len
    rows = min(chunk, tokens)
    return TrainMemory(
        weights=WIDE * params.total,
        gradients=WIDE * params.total,
        optimizer=optimizer_bytes(params, optimizer),
        ema=WIDE * params.total if ema else 0,
        casts=itemsize * (params.matrices + config.vocab_size * config.dim) if itemsize < WIDE else 0,
        activations=int(tokens * activation_bytes_per_token(config, itemsize=itemsize, recompute=recompute)),
        logits=rows * config.vocab_size * (itemsize + WIDE) + WIDE * config.vocab_size * config.dim)


def optimizer_bytes(params: Params, optimizer: str) -> int:
    """AdamW keeps two float32 moments; Muon one for the matrices of blocks and leaves the rest to AdamW."""
    if optimizer == "muon":
        return WIDE * params.matrices + 2 * WIDE * (params.total - params.matrices)
    return 2 * WIDE * params.total


def token_ratio(params: Params, tokens: float) -> float:
    """Training tokens per parameter; about 20 is compute-optimal (Chinchilla, 2203.15556)."""
    return tokens / params.total
