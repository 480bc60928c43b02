"""Attention in blocks of queries, for training on a CPU.

torch's fused CPU kernel is slow in its backward pass and reads a mask for every pair of tokens. Here a block of
queries meets only the keys it may see: none after its end, and none before the start of the oldest document in it, so
packed rows of short documents cost little. Probabilities of one block are all that ever exists; the backward pass
makes them again (FlashAttention's recomputation, 2205.14135), with a softmax and not from a saved log partition
function: exp of the -inf that a mask leaves is ten times slower than softmax, which knows its own way around it. The
query heads that share a key head are laid side by side as more query rows, so keys are never copied.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mindseed.nn.linear import scratch

BLOCK = 64                                    # queries per block


def key_ranges(positions: Tensor, window: int | None = None, block: int = BLOCK) -> list[tuple[int, int, int]]:
    """(first query, stop, first key) of every block: the keys before the first one belong to finished documents, or
    lie outside the window.

    positions (B, T) restart at 0 with every document.
    """
    T = positions.shape[1]
    zeros = torch.where(positions == 0, torch.arange(T), 0)
    first = zeros.cummax(1).values.amin(0).tolist()                               # where the oldest document began
    return [(i, min(i + block, T), max(first[i], 0 if window is None else i - window + 1)) for i in range(0, T, block)]


class BlockedAttention(torch.autograd.Function):
    """q (B, T, H, K), k (B, T, G, K), v (B, T, G, V), mask (B, 1, T, T) or None for plain causal -> (B, T, H, V).

    Scores are multiplied by `scale`; `window` limits how many keys a query sees (a mask has it in it already);
    `slopes` (H,) are ALiBi's.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ranges: list, scale: float,
                window: int | None, slopes: Tensor | None) -> Tensor:
        B, G = q.shape[0], k.shape[2]
        wide = torch.promote_types(q.dtype, torch.float32)
        qg, kg, vg = (by_group(x, G, wide, name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
        score = Score(mask, scale, window, None if slopes is None else slopes.to(wide).view(G, -1).repeat(B, 1))
        y = scratch("y", (*qg.shape[:3], v.shape[-1]), wide)                      # (B G, R, T, V)
        with torch.autocast(q.device.type, enabled=False):            # which would narrow the products again
            for i, stop, first in ranges:
                p = score.probabilities(qg, kg, i, stop, first)                   # (B G, R, t, s)
                y[:, :, i:stop] = multiply(p, vg[:, 0, first:stop])
        out = q.new_empty(*q.shape[:3], v.shape[-1]).copy_(from_groups(y, B))     # whose memory the projection keeps
        ctx.save_for_backward(q, k, v, out)
        ctx.ranges, ctx.score = ranges, score
        return out

    @staticmethod
    def backward(ctx, g: Tensor):
        q, k, v, out = ctx.saved_tensors
        B, G, score = q.shape[0], k.shape[2], ctx.score
        wide = torch.promote_types(q.dtype, torch.float32)
        qg, kg, vg, gg = (by_group(x, G, wide, name) for x, name in ((q, "q"), (k, "k"), (v, "v"), (g, "g")))
        delta = by_group(out, G, wide, "y").mul_(gg).sum(-1, keepdim=True)        # (B G, R, T, 1)
        dq, dk, dv = (scratch(f"d{name}", x.shape, wide) for x, name in ((qg, "q"), (kg, "k"), (vg, "v")))
        dk.zero_()
        dv.zero_()
        for i, stop, first in ctx.ranges:
            p = score.probabilities(qg, kg, i, stop, first)
            gi = gg[:, :, i:stop]
            dv[:, 0, first:stop] += gather(p, gi)
            ds = multiply(gi, vg[:, 0, first:stop].mT).sub_(delta[:, :, i:stop]).mul_(p).mul_(score.scale)
            dq[:, :, i:stop] = multiply(ds, kg[:, 0, first:stop])
            dk[:, 0, first:stop] += gather(ds, qg[:, :, i:stop])
        dq, dk, dv = (x.new_empty(x.shape).copy_(from_groups(dx, B)) for x, dx in ((q, dq), (k, dk), (v, dv)))
        return dq, dk, dv, None, None, None, None, None


@dataclass(frozen=True)
class Score:
    """How scores become probabilities, the same forward and backward."""

    mask: Tensor | None                           # (B, 1, T, T)
    scale: float
    window: int | None
    slopes: Tensor | None                         # (B G, R)

    def probabilities(self, q: Tensor, k: Tensor, i: int, stop: int, first: int) -> Tensor:
        """Softmax of the scaled and masked scores of queries i..stop over keys first..stop: (B G, R, t, s)."""
        s = multiply(q[:, :, i:stop], k[:, 0, first:stop].mT).mul_(self.scale)
        if self.slopes is not None:
            keys, queries = torch.arange(first, stop), torch.arange(i, stop)
            s.add_(self.slopes[:, :, None, None] * (keys - queries[:, None]))
        if self.mask is not None:
            B = self.mask.shape[0]
            s.view(B, -1, *s.shape[2:]).masked_fill_(~self.mask[:, :, i:stop, first:stop], -torch.inf)
            return s.softmax(-1)
        future = torch.ones(stop - i, stop - i, dtype=torch.bool, device=s.device).triu_(1)
        s[..., i - first:].masked_fill_(future, -torch.inf)                       # only the last square is cut
        if self.window is not None:
            past = torch.ones(stop - i, stop - first, dtype=torch.bool, device=s.device)
            s.masked_fill_(past.tril_(i - first - self.window), -torch.inf)
        return s.softmax(-1)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """(N, R, t, x) @ (N, x, z) -> (N, R, t, z), the R groups as more rows of one product."""
    return torch.bmm(a.flatten(1, 2), b).unflatten(1, a.shape[1:3])


def gather(a: Tensor, b: Tensor) -> Tensor:
    """sum over R and t of a (N, R, t, s) times b (N, R, t, K) -> (N, s, K)."""
    return torch.bmm(a.flatten(1, 2).mT, b.flatten(1, 2))


def by_group(x: Tensor, groups: int, dtype: torch.dtype, name: str) -> Tensor:
    """(B, T, H, K) -> (B G, H / G, T, K), contiguous, in the buffer of that name."""
    B, T, H, K = x.shape
    grouped = scratch(name, (B, groups, H // groups, T, K), dtype)
    grouped.copy_(x.view(B, T, groups, H // groups, K).permute(0, 2, 3, 1, 4))
    return grouped.flatten(0, 1)


def from_groups(x: Tensor, batch: int) -> Tensor:
    """(B G, R, T, K) -> (B, T, G R, K)."""
    return x.unflatten(0, (batch, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
