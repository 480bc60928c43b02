"""Grouped-query attention (2305.13245): several query heads share one key/value head, which shrinks the cache by
heads / kv_heads. Queries and keys may be normalised per head before they are rotated (QK-norm, 2302.05442), which
keeps attention logits bounded and training stable at high learning rates. With a `window`, a query sees that many
tokens only, itself among them (2004.05150): layers above still hear of what lies further back, one window per layer,
and the cache stops growing.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mindseed.core import LayerState, StateSpec
from mindseed.nn.alibi import AlibiConfig, alibi_slopes
from mindseed.nn.attend import Layout, attend
from mindseed.nn.linear import Linear
from mindseed.nn.norm import RMSNorm
from mindseed.nn.rope import RopeConfig, rotate


@dataclass(frozen=True, kw_only=True)
class GQAConfig:
    heads: int
    kv_heads: int
    head_dim: int
    positions: RopeConfig | AlibiConfig | None = field(default_factory=RopeConfig)     # None: no positions in attention
    qk_norm: bool = True
    window: int | None = None        # tokens a query sees; None: all
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs of components")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1 token")

    @property
    def rope(self) -> RopeConfig | None:
        return self.positions if isinstance(self.positions, RopeConfig) else None


class GQA(nn.Module):
    """(B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, config: GQAConfig) -> None:
        super().__init__()
        self.config = c = config
        self.q = Linear(dim, c.heads * c.head_dim, role="column")
        self.k = Linear(dim, c.kv_heads * c.head_dim, role="column")
        self.v = Linear(dim, c.kv_heads * c.head_dim, role="column")
        self.o = Linear(c.heads * c.head_dim, dim, role="row")
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def state_spec(self) -> StateSpec:
        shape = (self.config.kv_heads, self.config.head_dim)
        return StateSpec(per_token={"k": shape, "v": shape}, window=self.config.window)

    def add_to(self, layout: Layout, dtype: torch.dtype) -> None:
        """What this layer will ask of the layout."""
        c = self.config
        layout.add_view(c.window, distance=isinstance(c.positions, AlibiConfig))
        if c.rope:
            layout.add_rotary(c.rope, c.head_dim, dtype, c.window)

    def forward(self, x: Tensor, layout: Layout, state: LayerState | None = None) -> Tensor:
        c, (B, T, _) = self.config, x.shape
        q = self.q_norm(self.q(x).view(B, T, -1, c.head_dim))                     # (B, T, H, K)
        k = self.k_norm(self.k(x).view(B, T, -1, c.head_dim))                     # (B, T, G, K)
        v = self.v(x).view(B, T, -1, c.head_dim)
        if c.rope and c.rope.depends_on_length:
            q, k, v = self.rotate_late(q, k, v, layout, state)
        else:
            if c.rope:
                tables, pairs = layout.rotary[c.rope, c.head_dim], c.rope.interleaved
                q, k = rotate(q, *tables, interleaved=pairs), rotate(k, *tables, interleaved=pairs)
            if state is not None:
                k, v = state.append(k=k, v=v)                                     # (B, S, G, K): all keys so far
        slopes = alibi_slopes(c.heads).to(x.device) if isinstance(c.positions, AlibiConfig) else None
        return self.o(attend(q, k, v, layout.views[c.window], slopes=slopes).reshape(B, T, -1))

    def rotate_late(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout,
                    state: LayerState | None) -> tuple[Tensor, Tensor, Tensor]:
        """Where angles change as the text grows, the cache holds keys unrotated, and all are turned anew."""
        c = self.config
        tables = key_tables = layout.rotary[c.rope, c.head_dim]
        if state is not None:
            k, v = state.append(k=k, v=v)
            key_tables = layout.key_rotary[c.rope, c.head_dim, c.window]
        pairs = c.rope.interleaved
        return rotate(q, *tables, interleaved=pairs), rotate(k, *key_tables, interleaved=pairs), v
