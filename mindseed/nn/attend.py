"""The one attention call, and the one place that knows which tokens may see each other.

`Layout` is made once per forward pass from positions alone: since positions restart at 0 in every packed document, a
running count of zeros numbers the documents. It holds what layers share: rotary tables, and one `View` for every
window in use (None: the whole past). Layers ask `attend(q, k, v, view)` and need not know whether they are training
on packed rows or decoding from a cache.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mindseed.nn.blocked import BlockedAttention, key_ranges
from mindseed.nn.flash import Spans, spans
from mindseed.nn.flash_triton import flash_attend, installed
from mindseed.nn.flex import BlockMask, block_mask, flex_attend
from mindseed.nn.linear import product_dtype
from mindseed.nn.rope import RopeConfig, rope_tables

Kernel = Callable[..., Tensor]
Window = int | None
NOWHERE = 1 << 40                    # the position of a cache slot that no query may see

# How training attends where it is asked for "auto", by kind of device (elsewhere: sdpa). The choices:
#   sdpa     torch's fused attention, with a mask of all pairs of tokens where rows are packed or a window is used
#   blocked  blocked.py, in blocks of queries: on a CPU only
#   flex     flex.py, torch's FlexAttention, where rows are packed or a window is used, else sdpa: on a GPU only
#   flash    flash_triton.py, our FlashAttention: a Triton kernel on a GPU, and flash.py in its place elsewhere
#   fastest  sdpa where every key of the past is seen, else flash: on an H100 sdpa was the faster one there (2.5 ms to
#            2.9 with heads of 128, 3.06 to 3.17 with heads of 64), and flash 4 to 14 times as fast as sdpa with a mask
AUTO = {"cpu": "blocked", "cuda": "fastest"}


@dataclass(frozen=True)
class View:
    """What the queries of one kind of layer see. `mask` is (B, 1, T, S), True where query t may look at key s; None
    means plain causal attention (within `window`) when T = S, and that every key is visible when T = 1."""

    mask: Tensor | None = None
    window: Window = None
    ranges: list[tuple[int, int, int]] | None = None        # which keys a block of queries needs, see blocked.py
    distance: Tensor | None = None                          # (B or 1, T, S): how far back a key lies, for ALiBi
    kernel: Kernel = BlockedAttention.apply                 # what attends when there are ranges
    blocks: BlockMask | None = None                         # the mask as FlexAttention takes it
    spans: Spans | None = None                              # the mask as FlashAttention takes it
    ring: Kernel | None = None                              # attends with other ranks' keys, see parallel/context.py


@dataclass
class Layout:
    """Where the tokens of a batch stand."""

    positions: Tensor                                       # (B, T)
    key_positions: Mapping[Window, Tensor] | None = None    # while decoding: (B, S) by window
    attention: str = "auto"                                 # how training attends, see AUTO
    blocked: Kernel = BlockedAttention.apply
    ring: Callable[[Tensor, Window], Kernel] | None = None  # where other ranks hold the rest of these rows
    views: dict[Window, View] = field(default_factory=dict)
    rotary: dict[tuple[RopeConfig, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    key_rotary: dict[tuple[RopeConfig, int, Window], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.packed = self.key_positions is None and bool((self.positions[:, 1:] == 0).any())

    def add_view(self, window: Window, *, distance: bool = False) -> None:
        """Make the view of one window, unless it is there; `distance` for layers that weigh how far a key lies."""
        view = self.views.get(window) or (self.training if self.key_positions is None else self.decoding)(window)
        if distance and view.distance is None and view.blocks is None and view.spans is None:
            keys = self.positions if self.key_positions is None else self.key_positions[window]
            back = self.positions[:, :, None] - keys[:, None, :]                   # pads would look far ahead
            view = replace(view, distance=back.clamp_min(0))
        self.views[window] = view

    def training(self, window: Window) -> View:
        """Rows of packed documents: a query sees earlier tokens of its own document."""
        if self.ring is not None:
            return View(window=window, ring=self.ring(self.positions, window))
        T, kind = self.positions.shape[1], self.positions.device.type
        window = None if window is not None and window >= T else window
        plain = not self.packed and window is None
        how = AUTO.get(kind, "sdpa") if self.attention == "auto" else self.attention
        if how == "fastest":
            how = "sdpa" if plain or not installed() else "flash"
        if how == "flash":
            return View(window=window, spans=Spans() if plain else spans(self.positions, window))
        if how == "flex" and not plain:
            return View(window=window, blocks=block_mask(self.positions, window))
        ranges = key_ranges(self.positions, window) if how == "blocked" else None
        if plain or ranges and not self.packed:
            return View(None, window, ranges, kernel=self.blocked)
        document = (self.positions == 0).cumsum(1)                                # (B, T)
        mask = (document[:, :, None] == document[:, None, :]).tril_()             # (B, T, T)
        if window is not None:
            mask &= torch.ones(T, T, dtype=torch.bool, device=mask.device).triu_(1 - window)
        return View(mask[:, None], window, ranges, kernel=self.blocked)

    def decoding(self, window: Window) -> View:
        """New tokens after a cache: a query sees keys (B, S) that stand at or before it, `window` of them; NOWHERE
        hides a key. Position -1 is a pad, whose output means nothing."""
        positions, keys = self.positions, self.key_positions[window]
        T, S = positions.shape[1], keys.shape[1]
        reach = positions.masked_fill(positions < 0, NOWHERE)                     # pads see all: no row without keys
        visible = keys[:, None, :] <= reach[:, :, None]                           # (B, T, S)
        if window is not None:
            visible &= keys[:, None, :] > positions[:, :, None] - window
        if T == 1 and bool(visible.all()):
            return View()
        if T == S and (window is None or window >= T) and torch.equal(
                positions, torch.arange(T, device=positions.device).expand_as(positions)):
            return View()
        return View(visible[:, None])

    def add_rotary(self, config: RopeConfig, head_dim: int, dtype: torch.dtype, window: Window = None) -> None:
        """Make the tables of one kind of rotation, unless they are there."""
        if config.depends_on_length and self.key_positions is not None:
            length, keys = self.positions.amax(1) + 1, self.key_positions[window]
            self.key_rotary[config, head_dim, window] = rope_tables(
                config, head_dim, keys.masked_fill(keys == NOWHERE, 0), dtype, length)
        if (config, head_dim) not in self.rotary:
            self.rotary[config, head_dim] = rope_tables(config, head_dim, self.positions, dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, view: View, *, scale: float | None = None,
           slopes: Tensor | None = None) -> Tensor:
    """Softmax attention of q (B, T, H, K) over k (B, S, G, K) and v (B, S, G, V): query head h reads key head
    h // (H / G). Returns (B, T, H, V).

    `scale` multiplies the scores, 1 / sqrt(K) by default; `slopes` (H,) take slope x distance from them (ALiBi).
    torch's scaled_dot_product_attention aligns `is_causal` top-left, which is wrong for T < S, so a plain causal mask
    is asked for only when T = S.
    """
    B, T, H, K = q.shape
    G = k.shape[2]
    if view.ring is not None:
        return view.ring(q, k, v, scale or 1 / math.sqrt(K))
    if view.spans is not None:
        q, k, v = (x.to(product_dtype(x)) for x in (q, k, v))
        return flash_attend(q, k, v, view.spans, scale or 1 / math.sqrt(K), slopes)
    if view.blocks is not None:
        return flex_attend(q, k, v, view.blocks, scale=scale, slopes=slopes)
    if view.ranges is not None:
        return view.kernel(q, k, v, view.mask, view.ranges, scale or 1 / math.sqrt(K), view.window, slopes)
    mask = view.mask
    if slopes is not None:
        bias = -slopes[:, None, None] * view.distance[:, None]                    # (B, H, T, S)
        if mask is None and T > 1:
            mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril_()
        mask = (bias if mask is None else bias.masked_fill(~mask, -torch.inf)).to(q.dtype)
    if T == 1 and slopes is None:                 # one query: the heads of a group are like T of one head, and share k
        y = F.scaled_dot_product_attention(
            q.view(B, G, H // G, K), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale)
        return y.reshape(B, 1, H, v.shape[-1])
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
        is_causal=mask is None and T > 1, enable_gqa=H != G, scale=scale)
    return y.transpose(1, 2)


def attend_oracle(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, scale: float | None = None,
                  bias: Tensor | None = None) -> Tensor:
    """Attention written out, for tests: softmax(q k^T / sqrt(K) + bias) v under a mask (B, 1, T, S)."""
    times = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(times, dim=2) for x in (k, v))                    # (B, S, H, K)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * (scale or 1 / math.sqrt(q.shape[-1]))
    scores = scores if bias is None else scores + bias
    return torch.einsum("bhts,bshk->bthk", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)
