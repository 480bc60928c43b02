"""FlashAttention (2205.14135, 2307.08691) in a few lines of torch: what the kernel of flash_triton.py does, to be read
and to be compared with.

Attention is softmax(q k^T) v, and q k^T has T x S entries: too many to write to memory and read again. Three ideas
spare that.

    Tiling. Some queries meet some keys at a time, and what is computed of a tile never leaves the chip.
    Online softmax. A row of scores need not be known whole. Keep the largest score so far, and the sum and the weighted
    mean of values with exp(score - largest) as weights. When a larger one comes, fade what was gathered by
    exp(largest before - largest now). The end is the same softmax, to the last rounding.
    Recomputation. The backward pass makes each tile of probabilities again instead of reading it: exp(score - lse)
    with the logarithm lse of the sum of exponentials, one number per query, which is all that forward leaves behind.

Which keys a query sees is an interval: `Spans`. Its ends only grow along a row, so the keys that some queries need are
an interval too, and all tiles outside it are passed over: packed documents of 400 tokens cost what 400 tokens cost.

Queries need not see all keys at once. Attention over two sets of keys is two results, joined by the weights
softmax(lse_1, lse_2); and backward given the joint lse and output is right for either set alone (ring attention).
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

TILE = 128                                    # queries, and keys


@dataclass(frozen=True)
class Spans:
    """Query i of row b sees the keys lo[b, i] <= j <= hi[b, i] among those that there are; none where lo > hi.

    `lo` and `hi` are int32 (B, T) and never fall along a row; left out, they are 0 and i: plain causal attention. Ends
    may lie outside the keys, so for a chunk of keys that begins at `offset` subtract that from both. `since` and
    `until` (B, S) say the same from the side of the keys (`by_key`); who leaves them out has them made when needed.
    """

    lo: Tensor | None = None
    hi: Tensor | None = None
    since: Tensor | None = None
    until: Tensor | None = None

    def by_key(self, keys: int) -> Spans:
        """With `since` and `until`: key j is seen by the queries since[b, j] <= i <= until[b, j]. None where that is
        every query from j, and every query to the last."""
        pairs = (self.lo, self.until), (self.hi, self.since)
        if all(end is None or turned is not None and turned.shape[1] == keys for end, turned in pairs):
            return self
        given = self.hi if self.lo is None else self.lo
        j = torch.arange(keys, dtype=torch.int32, device=given.device).repeat(len(given), 1)
        since = None if self.hi is None else torch.searchsorted(self.hi.contiguous(), j, out_int32=True)
        until = None if self.lo is None else torch.searchsorted(self.lo.contiguous(), j, out_int32=True, right=True) - 1
        return replace(self, since=since, until=until)

    def ends(self, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The first and the last key that there is for each query, (B or 1, T) each; none where first > last."""
        i = torch.arange(queries, device=device)[None]
        first, last = torch.zeros_like(i) if self.lo is None else self.lo, i if self.hi is None else self.hi
        return first.clamp(min=0), last.clamp(max=keys - 1)


def spans(positions: Tensor, window: int | None = None) -> Spans:
    """What tokens of packed documents see: those before them in their document, at most `window` with themselves.
    positions (B, T) restart at 0 with every document."""
    T = positions.shape[1]
    at = torch.arange(T, dtype=torch.int32, device=positions.device)
    lo = torch.where(positions == 0, at, 0).cummax(1).values                      # where the document began
    if window is not None:
        lo = torch.maximum(lo, at - (window - 1))
    return Spans(lo).by_key(T)


def flash_forward(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float,
                  slopes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention of q (B, T, H, K) to k (B, S, G, K) and v (B, S, G, V): out (B, T, H, V), and the logarithm of each
    softmax's sum, lse (B, H, T), in at least float32. Query head h reads key head h // (H / G).

    A query without keys has out 0 and lse -inf. `slopes` (H,) take slope x (i - j) from the scores (ALiBi).
    """
    (B, T, H, _), (S, G, V) = q.shape, v.shape[1:]
    wide = torch.promote_types(q.dtype, torch.float32)
    qg = by_group(q, G, wide)                                                     # (B, G, R, T, K)
    kg, vg = (by_group(x, G, wide)[:, :, 0] for x in (k, v))                      # (B, G, S, K), (B, G, S, V)
    tile = Tile(spans.ends(T, S, q.device), scale, slopes, G)
    out, lse = qg.new_empty(*qg.shape[:4], V), qg.new_empty(qg.shape[:4])
    with torch.autocast(q.device.type, enabled=False):                # which would narrow the products again
        for i, tiles_of_keys in tile.needed():
            best = torch.full_like(lse[..., i, None], -torch.inf)                 # (B, G, R, t, 1): largest score
            total, mean = torch.zeros_like(best), torch.zeros_like(out[..., i, :])
            for j in tiles_of_keys:
                scores = tile.scores(qg, kg, i, j)                                # (B, G, R, t, s)
                new = torch.maximum(best, scores.amax(-1, keepdim=True))
                base = new.masked_fill(new == -torch.inf, 0)                      # nothing seen yet: weights are 0
                weights, fade = torch.exp(scores - base), torch.exp(best - base)
                total = total * fade + weights.sum(-1, keepdim=True)
                mean = mean * fade + torch.einsum("bgrts,bgsv->bgrtv", weights, vg[..., j, :])
                best = new
            out[..., i, :] = mean / total.masked_fill(total == 0, 1)
            lse[..., i] = (best + total.log())[..., 0]
    return from_groups(out).to(q.dtype), lse.flatten(1, 2)


def flash_backward(g_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans, scale: float,
                   slopes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given that of `out`. Where keys are seen in several sets, `out` and `lse` are those of
    all of them, and the gradients of q add up.

    With p = softmax(s) and out = p v, the gradient of s is p (g v^T - sum(p (g v^T))), and that sum over keys is
    sum(g out) over the values' width: a number per query, known before any tile is.
    """
    (B, T, H, _), (S, G, _) = q.shape, v.shape[1:]
    wide = torch.promote_types(q.dtype, torch.float32)
    qg, gg, og = (by_group(x, G, wide) for x in (q, g_out, out))                  # (B, G, R, T, K or V)
    kg, vg = (by_group(x, G, wide)[:, :, 0] for x in (k, v))                      # (B, G, S, K), (B, G, S, V)
    tile = Tile(spans.ends(T, S, q.device), scale, slopes, G)
    lse = lse.unflatten(1, (G, -1))[..., None]                                    # (B, G, R, T, 1)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)                           # no keys: probabilities are 0
    delta = (gg * og).sum(-1, keepdim=True)
    gq, gk, gv = (torch.zeros_like(x) for x in (qg, kg, vg))
    with torch.autocast(q.device.type, enabled=False):
        for i, tiles_of_keys in tile.needed():
            for j in tiles_of_keys:
                p = torch.exp(tile.scores(qg, kg, i, j) - lse[..., i, :])         # (B, G, R, t, s)
                g_p = torch.einsum("bgrtv,bgsv->bgrts", gg[..., i, :], vg[..., j, :])
                g_s = p * (g_p - delta[..., i, :]) * scale
                gv[:, :, j] += torch.einsum("bgrts,bgrtv->bgsv", p, gg[..., i, :])
                gk[:, :, j] += torch.einsum("bgrts,bgrtk->bgsk", g_s, qg[..., i, :])
                gq[..., i, :] += torch.einsum("bgrts,bgsk->bgrtk", g_s, kg[..., j, :])
    return from_groups(gq).to(q.dtype), gk.transpose(1, 2).to(k.dtype), gv.transpose(1, 2).to(v.dtype)


class FlashAttention(torch.autograd.Function):
    """Both passes as one differentiable function: (B, T, H, V). Of its inputs and results, all is kept but scores."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float,
                slopes: Tensor | None = None) -> Tensor:
        out, lse = flash_forward(q, k, v, spans, scale, slopes)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = spans, scale, slopes
        return out

    @staticmethod
    def backward(ctx, g_out: Tensor):
        return *flash_backward(g_out, *ctx.saved_tensors, *ctx.rest), None, None, None


flash_attend = FlashAttention.apply


@dataclass(frozen=True)
class Tile:
    """Which tiles there are, and the scores of one."""

    ends: tuple[Tensor, Tensor]               # first and last key of each query, (B or 1, T)
    scale: float
    slopes: Tensor | None
    groups: int

    def needed(self) -> Iterator[tuple[slice, Iterator[slice]]]:
        """Tiles of queries, each with the tiles of keys that some row needs."""
        first, last = self.ends
        for start in range(0, first.shape[1], TILE):
            stop = min(start + TILE, first.shape[1])
            begin, end = int(first[:, start].min()), int(last[:, stop - 1].max()) + 1
            yield slice(start, stop), (slice(j, min(j + TILE, end)) for j in range(begin, end, TILE))

    def scores(self, q: Tensor, k: Tensor, i: slice, j: slice) -> Tensor:
        """Scaled scores of queries i and keys j, -inf where they may not meet: (B, G, R, t, s)."""
        s = torch.einsum("bgrtk,bgsk->bgrts", q[..., i, :], k[..., j, :]) * self.scale
        first, last = (end[:, None, None, i, None] for end in self.ends)          # (B or 1, 1, 1, t, 1)
        keys = torch.arange(j.start, j.stop, device=s.device)
        if self.slopes is not None:
            back = torch.arange(i.start, i.stop, device=s.device)[:, None] - keys
            s = s - self.slopes.to(s.dtype).view(self.groups, -1, 1, 1) * back
        return s.masked_fill((keys < first) | (keys > last), -torch.inf)


def by_group(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """(B, T, H, K) -> (B, G, H / G, T, K): the query heads that share a key head side by side."""
    return x.to(dtype).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)


def from_groups(x: Tensor) -> Tensor:
    """(B, G, R, T, K) -> (B, T, G R, K)."""
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)
