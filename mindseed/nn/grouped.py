"""The same product with another matrix for every stretch of rows, and the sorting of rows around it.

Where torch has a grouped product that suits (bfloat16 on a GPU), it is used; elsewhere a loop over the experts, which
loses little as long as each has some dozens of rows. The backward passes are written out because autograd's own would
sum one full gradient per expert and scatter where it could gather.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mindseed.nn.linear import product_dtype


def grouped_product(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x (M, in) in stretches of `counts` (E,) rows, each times its matrix of weight (E, out, in): (M, out)."""
    kind = x.device.type
    keep = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if kind == "cuda" and keep == torch.bfloat16 and x.shape[1] % 8 == weight.shape[1] % 8 == 0:
        ends = counts.cumsum(0).to(torch.int32)
        return F.grouped_mm(x.to(keep), weight.to(keep).mT, offs=ends)
    with torch.autocast(kind, enabled=False):
        return GroupedProduct.apply(x, weight, counts.tolist(), keep, product_dtype(x))


class GroupedProduct(torch.autograd.Function):
    """The loop. Rows are kept in `keep`, products run in `dtype` (see nn/linear.py for why they may differ)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, counts: list[int], keep: torch.dtype, dtype: torch.dtype) -> Tensor:
        x = x.to(keep)
        y = x.new_empty(len(x), weight.shape[1])
        for e, rows in stretches(counts):
            y[rows] = F.linear(x[rows].to(dtype), weight[e].to(dtype))
        ctx.save_for_backward(x, weight)
        ctx.counts, ctx.dtype = counts, dtype
        return y

    @staticmethod
    def backward(ctx, g: Tensor):
        x, weight = ctx.saved_tensors
        g_x, g_weight = torch.empty_like(x), torch.zeros_like(weight)
        for e, rows in stretches(ctx.counts):
            wide = g[rows].to(ctx.dtype)
            g_x[rows] = wide @ weight[e].to(ctx.dtype)
            torch.mm(wide.mT, x[rows].to(ctx.dtype), out=g_weight[e]) if ctx.dtype == weight.dtype else \
                g_weight[e].copy_(wide.mT @ x[rows].to(ctx.dtype))
        return g_x, g_weight, None, None, None


def stretches(counts: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) for every expert that has any."""
    found, start = [], 0
    for e, n in enumerate(counts):
        if n:
            found.append((e, slice(start, start + n)))
        start += n
    return found


class Dispatch(torch.autograd.Function):
    """x (N, D) -> (N k, D): row i is x[token[i]]; `place` (N k,) says where the visits of each token were put."""

    @staticmethod
    def forward(ctx, x: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.visits = len(token) // len(x)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx, g: Tensor):
        place, = ctx.saved_tensors
        return g.index_select(0, place).unflatten(0, (-1, ctx.visits)).sum(1), None, None


class Combine(torch.autograd.Function):
    """Sorted answers h (N k, D) and weights (N, k) -> (N, D): the weighed sum of every token's answers."""

    @staticmethod
    def forward(ctx, h: Tensor, weights: Tensor, token: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(h, weights, token, order, place)
        answers = h.index_select(0, place).unflatten(0, weights.shape)            # (N, k, D)
        return (answers * weights[..., None].to(h.dtype)).sum(1)

    @staticmethod
    def backward(ctx, g: Tensor):
        h, weights, token, order, place = ctx.saved_tensors
        sorted_g = g.index_select(0, token)                                       # (N k, D)
        g_weights = (sorted_g * h).sum(-1, dtype=weights.dtype).index_select(0, place).view_as(weights)
        g_h = sorted_g * weights.flatten().index_select(0, order)[:, None].to(h.dtype)
        return g_h, g_weights, None, None, None
