"""Context parallel: ranks share every sequence, and keys and values travel around a ring (2310.01889).

Each rank has the queries, keys and values of its own tokens. Keys and values are passed on to the next rank, one round
after the other, while attention to those at hand is computed; after as many rounds as ranks, every query has met every
key. The partial results are joined by the logarithm of what each softmax was divided by, as FlashAttention joins its
tiles. In the backward pass keys and values travel once more, and their gradients with them, until they are home.

Under a causal mask the last tokens have the most to do. So a sequence is cut into twice as many pieces as ranks, and a
rank takes one from the front and one from the back (2311.09431). Where a query's document began follows from its
place and its position, so packed documents and windows need no mask: what a query sees is an interval.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from torch import Tensor

from mindseed.core import Batch, tokens_ahead
from mindseed.nn.flash import Spans
from mindseed.nn.flash_triton import flash_backward, flash_forward
from mindseed.parallel.mesh import Mesh


class Ring:
    """The ranks of one sequence, and which of its tokens each has."""

    def __init__(self, mesh: Mesh) -> None:
        self.group, self.rank, self.size = mesh.group("context"), mesh.place("context"), mesh.sizes.context
        peers = [torch_dist.get_global_rank(self.group, (self.rank + step) % self.size) for step in (1, -1)]
        self.next, self.before = peers

    def pieces(self, rank: int) -> tuple[int, int]:
        """Of 2 n pieces of a sequence, those of a rank."""
        return rank, 2 * self.size - 1 - rank

    def cut(self, batch: Batch) -> Batch:
        """This rank's part (B, T / n) of every row, after padding to a width that divides."""
        T = batch.ids.shape[1]
        missing = -T % (2 * self.size)

        def part(x: Tensor) -> Tensor:
            return self.part(F.pad(x, (0, missing)))

        extra = {name: part(x) if x.ndim == 2 and x.shape[1] == T else x for name, x in batch.extra.items()}
        return replace(batch, ids=part(batch.ids), targets=part(batch.targets), weights=part(batch.weights),
                       positions=part(batch.positions), extra=extra)

    def whole(self, x: Tensor) -> Tensor:
        """(B, T / n) of this rank and all others -> (B, T), in the order of the row."""
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        torch_dist.all_gather(parts, x.contiguous(), group=self.group)
        pieces = {}
        for rank, part in enumerate(parts):
            pieces |= dict(zip(self.pieces(rank), part.chunk(2, dim=1)))
        return torch.cat([pieces[i] for i in range(2 * self.size)], dim=1)

    def ahead(self, x: Tensor, distance: int) -> Tensor:
        """As core.tokens_ahead, across the ends of pieces."""
        return self.part(tokens_ahead(self.whole(x), distance))

    def part(self, x: Tensor) -> Tensor:
        """(B, T) -> (B, T / n): this rank's pieces."""
        pieces = x.chunk(2 * self.size, dim=1)
        return torch.cat([pieces[i] for i in self.pieces(self.rank)], dim=1)

    def attention(self, positions: Tensor, window: int | None) -> Callable[..., Tensor]:
        """What attends for a layer: (q, k, v, scale) -> (B, T, H, V). positions (B, T) are this rank's."""
        half = positions.shape[1] // 2
        steps = torch.arange(half, device=positions.device)
        index = torch.cat([piece * half + steps for piece in self.pieces(self.rank)])       # (T,): place in the row
        lo = index - positions                                                    # where each token's document began
        if window is not None:
            lo = torch.maximum(lo, index - (window - 1))
        return functools.partial(RingAttention.apply, self, lo.int(), index.int().expand_as(lo))

    def seen(self, lo: Tensor, hi: Tensor, source: int) -> Iterator[tuple[slice, Spans]]:
        """The pieces of the keys of rank `source` that some query here sees, and which of its keys each does."""
        half = lo.shape[1] // 2
        for i, piece in enumerate(self.pieces(source)):
            first = piece * half
            if int(hi.max()) >= first and int(lo.min()) < first + half:
                yield slice(i * half, (i + 1) * half), Spans(lo - first, hi - first)

    def pass_on(self, *tensors: Tensor) -> Callable[[], list[Tensor]]:
        """Start sending to the next rank; returns what waits for, and gives, what comes from the one before."""
        arriving = [torch.empty_like(x) for x in tensors]
        ops = [torch_dist.P2POp(torch_dist.isend, x, self.next, self.group) for x in tensors]
        ops += [torch_dist.P2POp(torch_dist.irecv, x, self.before, self.group) for x in arriving]
        works = torch_dist.batch_isend_irecv(ops)

        def arrived() -> list[Tensor]:
            for work in works:
                work.wait()
            ops.clear()                           # until then what is sent must live
            return arriving

        return arrived


class RingAttention(torch.autograd.Function):
    """(q, k, v) of this rank's tokens -> attention of its queries to the keys of all ranks."""

    @staticmethod
    def forward(ctx, ring: Ring, lo: Tensor, hi: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros(*q.shape[:3], v.shape[-1], dtype=wide)                  # (B, T, H, V)
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=wide)      # (B, H, T)
        keys, values = k.contiguous(), v.contiguous()
        for step in range(ring.size):
            last = step == ring.size - 1
            arrived = None if last else ring.pass_on(keys, values)
            for piece, spans in ring.seen(lo, hi, (ring.rank - step) % ring.size):
                part, its_lse = flash_forward(q, keys[:, piece], values[:, piece], spans, scale)
                out, lse = join(out, lse, part, its_lse)
            if not last:
                keys, values = arrived()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, lo, hi)
        ctx.ring, ctx.scale = ring, scale
        return out

    @staticmethod
    def backward(ctx, g_out: Tensor):
        q, k, v, out, lse, lo, hi = ctx.saved_tensors
        ring, wide = ctx.ring, torch.promote_types(q.dtype, torch.float32)
        g_q = torch.zeros_like(q, dtype=wide)
        keys, values = k.contiguous(), v.contiguous()
        followed = None                           # what waits for the gradients of the ranks before
        for step in range(ring.size):
            last = step == ring.size - 1
            arrived = None if last else ring.pass_on(keys, values)
            g_keys, g_values = (torch.zeros_like(x, dtype=wide) for x in (keys, values))
            for piece, spans in ring.seen(lo, hi, (ring.rank - step) % ring.size):
                gq, gk, gv = flash_backward(g_out, q, keys[:, piece], values[:, piece], out, lse, spans, ctx.scale)
                g_q += gq
                g_keys[:, piece] += gk
                g_values[:, piece] += gv
            if not last:
                keys, values = arrived()
            for own, theirs in zip((g_keys, g_values), followed() if followed else ()):
                own += theirs
            followed = ring.pass_on(g_keys, g_values)     # they follow their keys, while the next round computes
        g_keys, g_values = followed()             # and come home
        return None, None, None, g_q.to(q.dtype), g_keys.to(k.dtype), g_values.to(v.dtype), None


def join(out: Tensor, lse: Tensor, more: Tensor, its_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from attention over each: out (B, T, H, V), lse (B, H, T)."""
    both = torch.logaddexp(lse, its_lse)
    base = both.masked_fill(both == -torch.inf, 0)                                # neither has seen a key
    a, b = ((x - base).exp().transpose(1, 2)[..., None] for x in (lse, its_lse))
    return out * a + more * b, both
