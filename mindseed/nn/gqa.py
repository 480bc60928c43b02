"""Grouped-query attention (2305.13245): several query heads share one key/value head, which shrinks the cache by
heads / kv_heads. Queries and keys may be normalised per head before they are rotated (QK-norm, 2302.05442), which
keeps attention logits bounded and training stable at high learning rates.
"""
from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from mindseed.core import LayerState, StateSpec
from mindseed.nn.attend import Layout, attend
from mindseed.nn.linear import Linear
from mindseed.nn.norm import RMSNorm
from mindseed.nn.rope import RopeConfig, rotate


@dataclass(frozen=True, kw_only=True)
class GQAConfig:
    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeConfig = field(default_factory=RopeConfig)
    qk_norm: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs of components")


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
        return StateSpec(per_token={"k": shape, "v": shape})

    def forward(self, x: Tensor, layout: Layout, state: LayerState | None = None) -> Tensor:
        B, T, _ = x.shape
        K = self.config.head_dim
        q = self.q_norm(self.q(x).view(B, T, -1, K))                              # (B, T, H, K)
        k = self.k_norm(self.k(x).view(B, T, -1, K))                              # (B, T, G, K)
        v = self.v(x).view(B, T, -1, K)
        tables = layout.rotary[self.config.rope, K]
        q, k = rotate(q, *tables), rotate(k, *tables)
        if state is not None:
            k, v = state.append(k=k, v=v)                                         # (B, S, G, K): all keys so far
        return self.o(attend(q, k, v, layout).reshape(B, T, -1))


MIXERS = {GQAConfig: GQA}
