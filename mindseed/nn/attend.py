"""The one attention call, and the one place that knows which tokens may see each other.

`Layout` is made once per forward pass from positions alone: since positions restart at 0 in every packed document, a
running count of zeros numbers the documents. It holds what all layers share: rotary tables, and the mask. Layers ask
`attend(q, k, v, layout)` and need not know whether they are training on packed rows or decoding from a cache.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mindseed.nn.blocked import BlockedAttention, key_ranges, whole_ranges
from mindseed.nn.rope import RopeConfig, rope_tables

Kernel = Callable[..., Tensor]
NOWHERE = 1 << 40                    # the position of a cache slot that no query may see


@dataclass
class Layout:
    """Where the tokens of a batch stand. `mask` is (B, 1, T, S), True where query t may look at key s; None means
    plain causal attention when T = S, and that every key is visible when T = 1."""

    positions: Tensor                                       # (B, T)
    mask: Tensor | None = None
    rotary: dict[tuple[RopeConfig, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    ranges: list[tuple[int, int, int]] | None = None        # which keys a block of queries needs, see blocked.py
    kernel: Kernel = BlockedAttention.apply                 # what attends when there are ranges

    @staticmethod
    def training(positions: Tensor, kernel: Kernel = BlockedAttention.apply) -> Layout:
        """Rows of packed documents: a query sees earlier tokens of its own document."""
        blocked = positions.device.type == "cpu"
        if not (positions[:, 1:] == 0).any():
            T = positions.shape[1]
            return Layout(positions, ranges=whole_ranges(T) if blocked else None, kernel=kernel)
        document = (positions == 0).cumsum(1)                                     # (B, T)
        same = document[:, :, None] == document[:, None, :]                       # (B, T, T)
        ranges = key_ranges(positions) if blocked else None
        return Layout(positions, same.tril_()[:, None], ranges=ranges, kernel=kernel)

    @staticmethod
    def decoding(positions: Tensor, key_positions: Tensor) -> Layout:
        """New tokens after a cache: a query sees keys (B, S) that stand at or before it; NOWHERE hides a key. Position
        -1 is a pad, whose output means nothing."""
        T, S = positions.shape[1], key_positions.shape[1]
        reach = positions.masked_fill(positions < 0, NOWHERE)                     # pads see all: no row without keys
        visible = key_positions[:, None, :] <= reach[:, :, None]                  # (B, T, S)
        if T == 1 and bool(visible.all()):
            return Layout(positions)
        if T == S and torch.equal(positions, torch.arange(T, device=positions.device).expand_as(positions)):
            return Layout(positions)
        return Layout(positions, visible[:, None])

    @property
    def blocked(self) -> bool:
        return self.ranges is not None

    def add_rotary(self, config: RopeConfig, head_dim: int, dtype: torch.dtype) -> None:
        """Make the tables of one kind of rotation, unless they are there."""
        if (config, head_dim) not in self.rotary:
            self.rotary[config, head_dim] = rope_tables(config, head_dim, self.positions, dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Softmax attention of q (B, T, H, K) over k, v (B, S, G, K): query head h reads key head h // (H / G).

    Returns (B, T, H, K). torch's scaled_dot_product_attention aligns `is_causal` top-left, which is wrong for T < S,
    so a plain causal mask is asked for only when T = S.
    """
    B, T, H, K = q.shape
    G = k.shape[2]
    if layout.blocked:
        return layout.kernel(q, k, v, layout.mask, layout.ranges)
    if T == 1:                                    # one query: the heads of a group are like T of one head, and share k
        y = F.scaled_dot_product_attention(
            q.view(B, G, H // G, K), k.transpose(1, 2), v.transpose(1, 2), attn_mask=layout.mask)
        return y.view(B, 1, H, K)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=layout.mask,
        is_causal=layout.mask is None, enable_gqa=H != G)
    return y.transpose(1, 2)


def attend_oracle(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Attention written out, for tests: softmax(q k^T / sqrt(K)) v under a mask (B, 1, T, S)."""
    times = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(times, dim=2) for x in (k, v))                    # (B, S, H, K)
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhts,bshk->bthk", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)
