"""Named shapes, and the one dial: from a depth, width, heads and feed-forward follow.

| preset | layers | dim | heads | kv_heads | head_dim | ffn_dim | parameters with 6400 tokens |
|---|---|---|---|---|---|---|---|
| toy | 4 | 192 | 6 | 2 | 32 | 512 | 2.8M |
| mini | 8 | 512 | 8 | 2 | 64 | 1408 | 25.8M |
| small | 8 | 768 | 8 | 4 | 96 | 2432 | 63.9M, MiniMind's shape |
"""
from __future__ import annotations

from dataclasses import dataclass, replace

from mindseed.base.errors import UserError
from mindseed.models.config import LayerConfig, LMConfig
from mindseed.nn.ffn import SwiGLUConfig
from mindseed.nn.gqa import GQAConfig
from mindseed.nn.rope import RopeConfig


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A uniform decoder in the words a user would choose; `lm_config` spells it out layer by layer."""

    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    theta: float = 10_000.0
    qk_norm: bool = True
    tied: bool = True
    dropout: float = 0.0
    norm_eps: float = 1e-6

    def lm_config(self, *, vocab_size: int, seq_len: int) -> LMConfig:
        """The full configuration; a shape that cannot be built is a UserError that says which option to change."""
        try:
            mixer = GQAConfig(heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim,
                              rope=RopeConfig(theta=self.theta), qk_norm=self.qk_norm, norm_eps=self.norm_eps)
            layer = LayerConfig(mixer=mixer, ffn=SwiGLUConfig(ffn_dim=self.ffn_dim))
            return LMConfig(vocab_size=vocab_size, dim=self.dim, layers=(layer,) * self.layers, seq_len=seq_len,
                            tied=self.tied, dropout=self.dropout, norm_eps=self.norm_eps)
        except ValueError as error:
            raise UserError(f"this model cannot be built: {error}") from None


PRESETS = {
    "toy": Shape(layers=4, dim=192, heads=6, kv_heads=2, head_dim=32, ffn_dim=512),
    "mini": Shape(layers=8, dim=512, heads=8, kv_heads=2, head_dim=64, ffn_dim=1408, theta=1e6),
    "small": Shape(layers=8, dim=768, heads=8, kv_heads=4, head_dim=96, ffn_dim=2432, theta=1e6),
}


def preset(name: str) -> Shape:
    if name not in PRESETS:
        raise UserError(f"model.preset={name!r} is not known; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def shape_of_depth(depth: int) -> Shape:
    """The dial: `dim = 64 * depth`, heads of 64, one key/value head per two query heads, feed-forward 8/3 of dim.

    The ratio of width to depth is that of nanochat's dial; the feed-forward is rounded up to a multiple of 64.
    """
    if depth < 1:
        raise UserError(f"depth={depth} must be at least 1")
    dim = 64 * depth
    kv_heads = depth // 2 if depth % 2 == 0 else depth
    return Shape(layers=depth, dim=dim, heads=depth, kv_heads=kv_heads, head_dim=64,
                 ffn_dim=-(-8 * dim // 3 // 64) * 64, theta=10_000.0 if dim < 512 else 1e6)


def override(shape: Shape, **changes: object) -> Shape:
    """`shape` with every change that is not None."""
    return replace(shape, **{key: value for key, value in changes.items() if value is not None})
