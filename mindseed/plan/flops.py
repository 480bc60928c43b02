"""How much arithmetic a token costs.

A product of a vector with a matrix of n entries takes 2n floating-point operations (a multiplication and an addition
each). A forward pass therefore costs 2 x (entries of all matrices a token meets, the head among them) plus attention,
whose scores and weighted values take 2 x 2 x heads x head_dim for each of the keys a query sees: (T + 1) / 2 of them
on average under a causal mask. The backward pass costs twice the forward pass: one product for the gradient of the
input, one for that of the weights.

MFU divides these *model* FLOPs by the time and the peak. What is computed again to save memory (the chunked head's
logits, blocks under recomputation) is counted apart: it takes time but is not progress. Many reports, following PaLM
(2204.02311), count attention as if every query saw all T keys; `causal=False` gives their figure.
Norms, rotations, softmax and the like are left out, as everywhere: they are bound by memory, not arithmetic.
"""
from __future__ import annotations

from dataclasses import dataclass

from mindseed.models.config import LayerConfig, LMConfig
from mindseed.nn.ffn import MLPConfig, SwiGLUConfig
from mindseed.nn.gqa import GQAConfig
from mindseed.nn.linear_attention import CHUNK, DeltaConfig
from mindseed.nn.mla import MLAConfig
from mindseed.nn.moe import MoEConfig
from mindseed.nn.recompute import Recompute
from mindseed.plan.params import layer_params


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations per token of training."""

    forward: float
    backward: float
    recompute: float             # forward work that the backward pass repeats

    @property
    def model(self) -> float:
        """What counts for MFU."""
        return self.forward + self.backward

    @property
    def hardware(self) -> float:
        """What the machine computes."""
        return self.model + self.recompute


def mean_keys(seq_len: int, window: int | None, causal: bool) -> float:
    """How many keys a query of a row of `seq_len` tokens sees, on average."""
    w = min(window or seq_len, seq_len)
    if not causal:
        return w
    return w - w * (w - 1) / 2 / seq_len                     # the first w queries see 1, 2, ..., w, all others w


def gqa_attention(c: GQAConfig, seq_len: int, causal: bool, decoding: bool) -> float:
    """Scores and weighted values of one query."""
    return 4 * mean_keys(seq_len, c.window, causal) * c.heads * c.head_dim


def mla_attention(c: MLAConfig, seq_len: int, causal: bool, decoding: bool) -> float:
    """Over keys and values of every head; while decoding, over the latents themselves."""
    widths = 2 * c.kv_rank + c.rope_dim if decoding else c.key_dim + c.value_dim
    return 2 * mean_keys(seq_len, None, causal) * c.heads * widths


def delta_attention(c: DeltaConfig, seq_len: int, causal: bool, decoding: bool) -> float:
    """Products of the recurrent form, or of the chunked form with its triangular systems."""
    memory = 6 * c.key_dim * c.value_dim
    chunk = CHUNK * (4 * c.key_dim + c.key_dim + 3 * c.value_dim)
    filters = 2 * c.conv * (2 * c.key_heads * c.key_dim + c.heads * c.value_dim)
    return filters + c.heads * (memory if decoding else memory + chunk)


ATTENTION_FLOPS = {GQAConfig: gqa_attention, MLAConfig: mla_attention, DeltaConfig: delta_attention}

# The product that ends a block: recomputation stops before it, for nothing reads its result backwards.
LAST_PRODUCT = {
    SwiGLUConfig: lambda dim, c: 2 * dim * c.ffn_dim,
    MLPConfig: lambda dim, c: 2 * dim * c.ffn_dim,
    MoEConfig: lambda dim, c: 0,                             # of its answers the weights' gradients are made
}


def layer_flops(config: LMConfig, layer: LayerConfig, seq_len: int, causal: bool,
                decoding: bool = False) -> tuple[float, float]:
    """(products with matrices and attention, attention alone) of one token in one layer, forward."""
    mixer, ffn, _ = layer_params(config, layer)
    attention = ATTENTION_FLOPS[type(layer.mixer)](layer.mixer, seq_len, causal, decoding)
    return 2 * (mixer.active + ffn.active) + attention, attention


def flops_per_token(config: LMConfig, seq_len: int, *, causal: bool = True, recompute: Recompute = False) -> Flops:
    """Training cost of one token in rows of `seq_len` tokens that are one document each, multi-token prediction
    included. Selective recomputation is that of a GPU: every second product is repeated, attention is not.

    Packed rows of shorter documents cost less attention, so for them this is an upper bound.
    """
    blocks = repeated = scores = second = 0.0
    for layer in (*config.layers, *config.mtp):
        block, attention = layer_flops(config, layer, seq_len, causal)
        scores += attention / 2                   # no kernel keeps them: the backward pass makes them again
        blocks += block
        repeated += block
        second += (block - attention) * every_second(config, layer)
    if config.placement == "pre":                 # elsewhere, and in prediction modules, a norm reads the last product
        repeated -= sum(LAST_PRODUCT[type(layer.ffn)](config.dim, layer.ffn) for layer in config.layers)
    join = len(config.mtp) * 4 * config.dim ** 2             # of hidden vectors and embeddings
    blocks, repeated = blocks + join, repeated + join
    heads = (1 + len(config.mtp)) * 2 * config.vocab_size * config.dim
    return Flops(forward=blocks + heads, backward=2 * (blocks + heads),
                 recompute=heads + scores + {False: 0, True: repeated, "selective": second}[recompute])


def every_second(config: LMConfig, layer: LayerConfig) -> float:
    """The share of a block's products that selective recomputation (nn/recompute.py) repeats: it counts them, keeps
    every second, and repeats the others, of which the last is needed only where a norm reads it."""
    products = [m for part in layer_params(config, layer)[:2] for m in part.every]
    flops = [m.rows * m.columns * (layer.ffn.top_k if m.experts else 1) for m in products]
    if config.placement == "pre" and len(flops) % 2:
        return sum(flops[:-1:2]) / sum(flops)
    return sum(flops[::2]) / sum(flops)


def decode_flops(config: LMConfig, length: int) -> float:
    """Operations to generate one token after `length` tokens whose keys are cached."""
    blocks = sum(layer_flops(config, layer, length, False, decoding=True)[0] for layer in config.layers)
    return blocks + 2 * config.vocab_size * config.dim
