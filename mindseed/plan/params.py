"""How many parameters a model has, by part, from its configuration alone.

Each formula stands beside the kind of layer it counts, keyed by the config's type like the registries that build the
layers; a test compares every one with real tensors. A tied head is counted once, under the embedding.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from mindseed.models.config import LayerConfig, LMConfig
from mindseed.nn.ffn import MLPConfig, SwiGLUConfig
from mindseed.nn.gqa import GQAConfig
from mindseed.nn.linear_attention import DeltaConfig
from mindseed.nn.mla import MLAConfig
from mindseed.nn.moe import MoEConfig


class Matrix(NamedTuple):
    """`count` matrices of one shape, and what may be done with them: an adapter beside each, four bits for each, and
    the dim that tensor parallel splits (nn/linear.py's roles: column spreads rows, what comes out)."""

    rows: int
    columns: int
    count: int = 1
    adapts: bool = True
    packs: bool = True
    split: Literal["rows", "columns", ""] = "rows"
    experts: bool = False            # of which a token visits some

    @property
    def entries(self) -> int:
        return self.count * self.rows * self.columns

    def local(self, tensor: int, expert: int = 1) -> Matrix:
        """What a rank has of it: a part of each, and of a mixture's experts some."""
        rows, columns = self.rows, self.columns
        if self.split == "rows":
            rows = -(-rows // tensor)
        elif self.split == "columns":
            columns = -(-columns // tensor)
        return self._replace(rows=rows, columns=columns, count=-(-self.count // (expert if self.experts else 1)))


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """The parameters of one mixer or feed-forward. Of the entries of its matrices, `idle` are those that one token is
    not multiplied with, where a router chooses among experts. `vectors` is the rest: norms, gates, filters."""

    every: tuple[Matrix, ...]
    idle: int = 0
    vectors: int = 0

    @property
    def matrices(self) -> int:
        return sum(m.entries for m in self.every)

    @property
    def active(self) -> int:
        return self.matrices - self.idle


def back(dim: int, width: int) -> Matrix:
    """The way out, into the residual stream."""
    return Matrix(dim, width, split="columns")


def gqa(dim: int, c: GQAConfig) -> Matrices:
    """Queries and the way out are D x HK, keys and values D x GK each."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return Matrices(every=(Matrix(q, dim), Matrix(kv, dim), Matrix(kv, dim), back(dim, q)),
                    vectors=2 * c.head_dim if c.qk_norm else 0)


def mla(dim: int, c: MLAConfig) -> Matrices:
    """Queries straight or through their bottleneck; down to the latent and up to keys and values; the way out."""
    keys, values = c.heads * c.key_dim, c.heads * c.value_dim
    queries = (Matrix(keys, dim),) if c.q_rank is None else (
        Matrix(c.q_rank, dim, split=""), Matrix(keys, c.q_rank))
    return Matrices(every=(*queries, Matrix(c.kv_rank + c.rope_dim, dim, split=""),
                           Matrix(c.heads * c.plain_dim + values, c.kv_rank), back(dim, values)),
                    vectors=c.kv_rank + (c.q_rank or 0))


def delta(dim: int, c: DeltaConfig) -> Matrices:
    """Queries and keys D x GK; values, their gate and the way out D x HV; two gates per head; the filters."""
    keys, values, gate = c.key_heads * c.key_dim, c.heads * c.value_dim, Matrix(c.heads, dim, packs=False)
    return Matrices(every=(Matrix(keys, dim), Matrix(keys, dim), Matrix(values, dim), Matrix(values, dim), gate, gate,
                           back(dim, values)),
                    vectors=(2 * keys + values) * c.conv + 2 * c.heads + c.value_dim)


def swiglu(dim: int, c: SwiGLUConfig) -> Matrices:
    """Gate, up and down: three D x F."""
    return Matrices(every=three(dim, c.ffn_dim))


def three(dim: int, width: int) -> tuple[Matrix, ...]:
    return (Matrix(width, dim), Matrix(width, dim), back(dim, width))


def mlp(dim: int, c: MLPConfig) -> Matrices:
    """Up and down: two D x F."""
    return Matrices(every=(Matrix(c.ffn_dim, dim), back(dim, c.ffn_dim)))


def moe(dim: int, c: MoEConfig) -> Matrices:
    """The router, E experts of three D x F, of which k are visited, and the shared one."""
    experts = tuple(m._replace(count=c.experts, packs=False, experts=True) for m in three(dim, c.expert_dim))
    shared = three(dim, c.shared_dim) if c.shared_dim else ()
    return Matrices(every=(Matrix(c.experts, dim, adapts=False, packs=False, split=""), *experts, *shared),
                    idle=(c.experts - c.top_k) * 3 * dim * c.expert_dim)


MIXER_PARAMS = {GQAConfig: gqa, MLAConfig: mla, DeltaConfig: delta}
FFN_PARAMS = {SwiGLUConfig: swiglu, MLPConfig: mlp, MoEConfig: moe}


@dataclass(frozen=True, kw_only=True)
class Params:
    """Counts by part. `head` is 0 when it is tied to the embedding; `mtp` is what multi-token prediction adds."""

    embedding: int
    attention: int
    ffn: int
    vectors: int
    head: int
    mtp: int
    matrices: int                # two-dimensional weights inside blocks, those of `mtp` too: what Muon updates
    active: int                  # what one token passes through when the model is used: no `mtp`, only chosen experts

    @property
    def total(self) -> int:
        return self.embedding + self.attention + self.ffn + self.vectors + self.head + self.mtp


def norm_params(config: LMConfig) -> int:
    """One normalisation: a weight, and for LayerNorm a bias."""
    return config.dim * (2 if config.norm == "layer" else 1)


def layer_params(config: LMConfig, layer: LayerConfig) -> tuple[Matrices, Matrices, int]:
    """(mixer, feed-forward, vectors of both and of the block's norms)."""
    mixer = MIXER_PARAMS[type(layer.mixer)](config.dim, layer.mixer)
    ffn = FFN_PARAMS[type(layer.ffn)](config.dim, layer.ffn)
    norms = norm_params(config) * (4 if config.placement == "sandwich" else 2)
    return mixer, ffn, mixer.vectors + ffn.vectors + norms


def count_params(config: LMConfig) -> Params:
    """Parameters by part; `count_params(config).total` equals the number of elements of the built model."""
    layers = [layer_params(config, layer) for layer in config.layers]
    ahead = [layer_params(config, layer) for layer in config.mtp]
    join, norm, table = 2 * config.dim ** 2, norm_params(config), config.vocab_size * config.dim
    attention, ffn = sum(m.matrices for m, _, _ in layers), sum(f.matrices for _, f, _ in layers)
    ahead_matrices = sum(m.matrices + f.matrices + join for m, f, _ in ahead)
    parts = dict(embedding=table + (config.seq_len * config.dim if config.learned_positions else 0),
                 attention=attention, ffn=ffn, vectors=norm + sum(v for _, _, v in layers),
                 head=0 if config.tied else table)
    idle = sum(part.idle for m, f, _ in layers for part in (m, f))
    return Params(**parts, mtp=ahead_matrices + sum(v + 3 * norm for _, _, v in ahead),
                  matrices=attention + ffn + ahead_matrices, active=sum(parts.values()) - idle)


def every_matrix(config: LMConfig, *, ahead: bool) -> list[Matrix]:
    """The matrices of all blocks; `ahead`: of the modules for further tokens as well."""
    layers = (*config.layers, *config.mtp) if ahead else config.layers
    found = [m for layer in layers for part in layer_params(config, layer)[:2] for m in part.every]
    return found + [Matrix(config.dim, 2 * config.dim, split="")] * (len(config.mtp) if ahead else 0)


def adapter_matrices(config: LMConfig, rank: int, beside: list[Matrix] | None = None) -> list[Matrix]:
    """A and B of an adapter beside every matrix of the blocks that can have one, or beside those given."""
    found = every_matrix(config, ahead=False) if beside is None else beside
    return [pair for m in found if m.adapts for pair in (
        m._replace(rows=rank, split="columns" if m.split == "columns" else ""),
        m._replace(columns=rank, split="rows" if m.split == "rows" else ""))]
