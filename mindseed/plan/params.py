"""How many parameters a model has, by part, from its configuration alone.

Each formula stands beside the kind of layer it counts, keyed by the config's type like the registries that build the
layers; a test compares every one with real tensors. A tied head is counted once, under the embedding.
"""
from __future__ import annotations

from dataclasses import dataclass

from mindseed.models.config import LMConfig
from mindseed.nn.ffn import SwiGLUConfig
from mindseed.nn.gqa import GQAConfig


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """The parameters of one mixer or feed-forward. `active` are the matrix entries that one token is multiplied
    with: fewer than `matrices` where a router chooses among experts."""

    matrices: int
    active: int
    norms: int = 0


def gqa(dim: int, c: GQAConfig) -> Matrices:
    """Queries and the way out are D x HK, keys and values D x GK each."""
    entries = 2 * dim * c.head_dim * (c.heads + c.kv_heads)
    return Matrices(matrices=entries, active=entries, norms=2 * c.head_dim if c.qk_norm else 0)


def swiglu(dim: int, c: SwiGLUConfig) -> Matrices:
    """Gate, up and down: three D x F."""
    return Matrices(matrices=3 * dim * c.ffn_dim, active=3 * dim * c.ffn_dim)


MIXER_PARAMS = {GQAConfig: gqa}
FFN_PARAMS = {SwiGLUConfig: swiglu}


@dataclass(frozen=True, kw_only=True)
class Params:
    """Counts by part. `head` is 0 when it is tied to the embedding."""

    embedding: int
    attention: int
    ffn: int
    norms: int
    head: int
    active: int                  # what one token passes through: total less the experts it is not sent to

    @property
    def total(self) -> int:
        return self.embedding + self.attention + self.ffn + self.norms + self.head

    @property
    def matrices(self) -> int:
        """Two-dimensional weights inside the blocks: what Muon updates."""
        return self.attention + self.ffn


def count_params(config: LMConfig) -> Params:
    """Parameters by part; `count_params(config).total` equals the number of elements of the built model."""
    mixers = [MIXER_PARAMS[type(layer.mixer)](config.dim, layer.mixer) for layer in config.layers]
    ffns = [FFN_PARAMS[type(layer.ffn)](config.dim, layer.ffn) for layer in config.layers]
    table = config.vocab_size * config.dim
    parts = dict(embedding=table, attention=sum(m.matrices for m in mixers), ffn=sum(f.matrices for f in ffns),
                 norms=config.dim * (2 * len(config.layers) + 1) + sum(m.norms for m in [*mixers, *ffns]),
                 head=0 if config.tied else table)
    idle = sum(m.matrices - m.active for m in [*mixers, *ffns])
    return Params(**parts, active=sum(parts.values()) - idle)
