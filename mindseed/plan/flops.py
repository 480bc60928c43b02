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

from mindseed.models.config import LMConfig
from mindseed.nn.ffn import SwiGLUConfig
from mindseed.nn.gqa import GQAConfig
from mindseed.plan.params import FFN_PARAMS, MIXER_PARAMS


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


def gqa_attention(c: GQAConfig, keys: float) -> float:
    """Scores and weighted values of one query over `keys` keys."""
    return 4 * keys * c.heads * c.head_dim


def swiglu_last(dim: int, c: SwiGLUConfig) -> float:
    """The product that ends a block: recomputation stops before it, for nothing reads its result backwards."""
    return 2 * dim * c.ffn_dim


ATTENTION_FLOPS = {GQAConfig: gqa_attention}
LAST_PRODUCT = {SwiGLUConfig: swiglu_last}


def flops_per_token(config: LMConfig, seq_len: int, *, causal: bool = True, recompute: bool = False) -> Flops:
    """Training cost of one token in rows of `seq_len` tokens that are one document each.

    Packed rows of shorter documents cost less attention, so for them this is an upper bound.
    """
    keys = (seq_len + 1) / 2 if causal else seq_len
    blocks = repeated = scores = 0.0
    for layer in config.layers:
        matrices = (MIXER_PARAMS[type(layer.mixer)](config.dim, layer.mixer).active
                    + FFN_PARAMS[type(layer.ffn)](config.dim, layer.ffn).active)
        attention = ATTENTION_FLOPS[type(layer.mixer)](layer.mixer, keys)
        block = 2 * matrices + attention
        scores += attention / 2                   # no kernel keeps them: the backward pass makes them again
        blocks += block
        repeated += block - LAST_PRODUCT[type(layer.ffn)](config.dim, layer.ffn)
    head = 2 * config.vocab_size * config.dim
    return Flops(forward=blocks + head, backward=2 * (blocks + head), recompute=head + scores + repeated * recompute)


def decode_flops(config: LMConfig, length: int) -> float:
    """Operations to generate one token after `length` tokens whose keys are cached."""
    return flops_per_token(config, length, causal=False).forward
