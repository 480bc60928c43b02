"""Multi-head latent attention (DeepSeek-V2, 2405.04434): keys and values of all heads are made from one short vector
per token, the latent, and the latent is what the cache holds.

Rotation would stand in the way of that, since it sits between the latent and the key; so a key has two parts: a plain
one made from the latent, per head, and a small rotated one that all heads share. Queries have the same two parts and
may be made through a bottleneck of their own.

There are two ways to compute the same attention. *Expanded*: make every head's keys and values from the latents, then
attend; the way of training, cheap when there are as many queries as keys. *Absorbed*: q . (W c) = (W^T q) . c, so turn
each query into the latent's space once and attend to the latents themselves, as if they were one shared key and value
head; the way of decoding, where nothing per head and per past token is ever made.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mindseed.core import LayerState, StateSpec
from mindseed.nn.attend import Layout, attend
from mindseed.nn.linear import Linear
from mindseed.nn.norm import RMSNorm
from mindseed.nn.rope import RopeConfig, YarnScaling, mscale, rotate


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    heads: int
    kv_rank: int                     # width of the latent
    q_rank: int | None               # width of the queries' bottleneck; None: queries straight from x
    plain_dim: int                   # width of the unrotated part of a head's keys and queries
    rope_dim: int                    # width of the rotated part
    value_dim: int                   # width of a head's values
    rope: RopeConfig = field(default_factory=lambda: RopeConfig(interleaved=True))
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_rank, 1 if self.q_rank is None else self.q_rank, self.plain_dim, self.value_dim) < 1:
            raise ValueError(f"heads={self.heads}, kv_rank={self.kv_rank}, q_rank={self.q_rank}, "
                             f"plain_dim={self.plain_dim} and value_dim={self.value_dim} must be at least 1")
        if self.rope_dim < 2 or self.rope_dim % 2:
            raise ValueError(f"rope_dim={self.rope_dim} must be even: rotary positions turn pairs of components")
        if self.rope.depends_on_length:
            raise ValueError("latent attention caches rotated keys, so its angles cannot change as the text grows: "
                             "use yarn, linear or llama3 scaling instead of dynamic")

    @property
    def key_dim(self) -> int:
        return self.plain_dim + self.rope_dim

    @property
    def scale(self) -> float:
        """On the scores. DeepSeek's YaRN sharpens them here, and not through the rotary tables."""
        s = self.rope.scaling
        sharpen = mscale(s.factor, s.mscale_all_dim) if isinstance(s, YarnScaling) and s.mscale_all_dim else 1.0
        return sharpen ** 2 / math.sqrt(self.key_dim)

    def absorbing_is_cheaper(self, queries: int, keys: int) -> bool:
        """Whether moving the queries and attending to latents takes fewer products than making keys and values."""
        head, latent = self.plain_dim + self.value_dim, self.kv_rank
        return queries * latent * head + queries * keys * 2 * latent < keys * latent * head + queries * keys * head


class MLA(nn.Module):
    """(B, T, D) -> (B, T, D). P plain and R rotary width of keys, V of values, C of the latent."""

    def __init__(self, dim: int, config: MLAConfig) -> None:
        super().__init__()
        self.config = c = config
        if c.q_rank is None:
            self.q = Linear(dim, c.heads * c.key_dim, role="column")
        else:
            self.q_down = Linear(dim, c.q_rank, role="replicated")
            self.q_norm = RMSNorm(c.q_rank, c.norm_eps)
            self.q_up = Linear(c.q_rank, c.heads * c.key_dim, role="column")
        self.kv_down = Linear(dim, c.kv_rank + c.rope_dim, role="replicated")
        self.kv_norm = RMSNorm(c.kv_rank, c.norm_eps)
        self.kv_up = Linear(c.kv_rank, c.heads * (c.plain_dim + c.value_dim), role="column")
        self.o = Linear(c.heads * c.value_dim, dim, role="row")

    def state_spec(self) -> StateSpec:
        return StateSpec(per_token={"latent": (self.config.kv_rank,), "k_rope": (self.config.rope_dim,)})

    def add_to(self, layout: Layout, dtype: torch.dtype) -> None:
        layout.add_view(None)
        layout.add_rotary(self.config.rope, self.config.rope_dim, dtype)

    def forward(self, x: Tensor, layout: Layout, state: LayerState | None = None) -> Tensor:
        c, (B, T, _) = self.config, x.shape
        tables, view = layout.rotary[c.rope, c.rope_dim], layout.views[None]
        q = self.q(x) if c.q_rank is None else self.q_up(self.q_norm(self.q_down(x)))
        q_plain, q_rope = q.view(B, T, -1, c.key_dim).split([c.plain_dim, c.rope_dim], dim=-1)   # (B, T, H, P), (.., R)
        latent, k_rope = self.kv_down(x).split([c.kv_rank, c.rope_dim], dim=-1)                # (B, T, C), (B, T, R)
        latent = self.kv_norm(latent)
        q_rope = rotate(q_rope, *tables, interleaved=c.rope.interleaved)
        k_rope = rotate(k_rope[:, :, None], *tables, interleaved=c.rope.interleaved)[:, :, 0]
        if state is None:
            y = self.expanded(q_plain, q_rope, latent, k_rope, view)
        else:
            latent, k_rope = state.append(latent=latent, k_rope=k_rope)                        # (B, S, C), (B, S, R)
            absorb = self.kv_up.one_matrix and c.absorbing_is_cheaper(T, latent.shape[1])
            y = (self.absorbed if absorb else self.expanded)(q_plain, q_rope, latent, k_rope, view)
        return self.o(y.reshape(B, T, -1))

    def expanded(self, q_plain: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, view) -> Tensor:
        """Every head's keys and values made from the latents: (B, T, H, V)."""
        c = self.config
        k_plain, v = self.kv_up(latent).unflatten(-1, (-1, c.plain_dim + c.value_dim)).split(
            [c.plain_dim, c.value_dim], dim=-1)
        k = torch.cat([k_plain, k_rope[:, :, None].expand(*k_plain.shape[:3], -1)], dim=-1)       # (B, S, H, P + R)
        return attend(torch.cat([q_plain, q_rope], dim=-1), k, v, view, scale=c.scale)

    def absorbed(self, q_plain: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, view) -> Tensor:
        """Queries moved into the latent's space, and what they find there moved out again: (B, T, H, V)."""
        c = self.config
        key_up, value_up = self.kv_up.dense().view(c.heads, -1, c.kv_rank).split([c.plain_dim, c.value_dim], dim=1)
        q_latent = torch.einsum("bthp,hpc->bthc", q_plain, key_up.to(q_plain.dtype))           # (B, T, H, C)
        keys = torch.cat([latent, k_rope], dim=-1)[:, :, None]                                 # (B, S, 1, C + R)
        found = attend(torch.cat([q_latent, q_rope], dim=-1), keys, latent[:, :, None], view, scale=c.scale)
        return torch.einsum("bthc,hvc->bthv", found, value_up.to(found.dtype))
