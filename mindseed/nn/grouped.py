"""The feed-forwards of all experts at once, each for its own stretch of rows, and the sorting of rows around them.

Where torch has a grouped product that suits (bfloat16 on a GPU), it is used; elsewhere a loop over the experts, which
loses little as long as each has some dozens of rows. The backward passes are written out because autograd's own would
sum one full gradient per expert, scatter where it could gather, and keep every width between two products.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mindseed.nn.ffn import gated
from mindseed.nn.linear import product_dtype, scratch


def grouped_swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)) of expert e for its stretch of `counts` (E,) rows of x (M, D) -> (M, D).

    The matrices are stacked: gate and up (E, F, D), down (E, D, F).
    """
    kind = x.device.type
    keep = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if kind == "cuda" and keep == torch.bfloat16 and gate.shape[1] % 8 == gate.shape[2] % 8 == 0:
        ends, x = counts.cumsum(0).to(torch.int32), x.to(keep)
        product = lambda x, w: F.grouped_mm(x, w.to(keep).mT, offs=ends)                       # noqa: E731
        return product(gated(product(x, gate), product(x, up)), down)
    dtype = product_dtype(x)                      # asked before autocast is off
    with torch.autocast(kind, enabled=False):
        return GroupedSwiGLU.apply(x, gate, up, down, counts.tolist(), keep, dtype, torch.is_grad_enabled())


class GroupedSwiGLU(torch.autograd.Function):
    """The loop. What stays for the backward pass is x, gate(x) and up(x), in `keep`; within an expert everything is in
    `dtype`, the one in which products are fast (nn/linear.py says why they may differ), and in buffers that the next
    expert uses again."""

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: list[int], keep: torch.dtype,
                dtype: torch.dtype, learn: bool) -> Tensor:
        x = x.to(keep)
        y, kept = torch.empty_like(x), x.new_empty(2, len(x) if learn else 0, gate.shape[1])
        for e, rows in stretches(counts):
            wide = load("x", x[rows], dtype)
            a = product("a", wide, gate[e].to(dtype).mT)
            b = product("b", wide, up[e].to(dtype).mT)
            if learn:
                kept[0, rows], kept[1, rows] = a, b
            y[rows] = product("x", F.silu(a, inplace=True).mul_(b), down[e].to(dtype).mT)
        ctx.save_for_backward(x, kept, gate, up, down)
        ctx.counts, ctx.dtype = counts, dtype
        return y

    @staticmethod
    def backward(ctx, g: Tensor):
        x, kept, gate, up, down = ctx.saved_tensors
        g_x, dtype = torch.empty_like(x), ctx.dtype
        learn = any(ctx.needs_input_grad[1:4])    # not where experts are frozen beneath adapters of other matrices
        g_gate, g_up, g_down = (torch.empty_like(w) if learn else None for w in (gate, up, down))
        for idle in (e for e, n in enumerate(ctx.counts) if learn and not n):
            for gradient in (g_gate, g_up, g_down):
                gradient[idle] = 0
        for e, rows in stretches(ctx.counts):
            wide, a, b = load("x", g[rows], dtype), load("a", kept[0, rows], dtype), load("b", kept[1, rows], dtype)
            g_h = product("h", wide, down[e].to(dtype))
            silu = torch.ops.aten.silu.out(a, out=room("s", a.shape, a))
            if learn:
                write(g_down[e], wide.mT, torch.mul(silu, b, out=room("t", a.shape, a)))
            g_a = torch.ops.aten.silu_backward.grad_input(b.mul_(g_h), a, grad_input=b)
            g_b = silu.mul_(g_h)
            if learn:
                wide = load("x", x[rows], dtype)
                write(g_gate[e], g_a.mT, wide)
                write(g_up[e], g_b.mT, wide)
            total = product("x", g_a, gate[e].to(dtype))
            g_x[rows] = torch.addmm(total, g_b, up[e].to(dtype), out=total)
        return g_x, g_gate, g_up, g_down, None, None, None, None


def room(name: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """An empty tensor; on the CPU a buffer, valid until its name is asked for again."""
    if like.device.type != "cpu" or torch.compiler.is_compiling():               # compiled code manages its own
        return like.new_empty(shape)
    return scratch(f"expert {name}", shape, like.dtype)


def load(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, in a buffer."""
    return room(name, x.shape, x.new_empty(0, dtype=dtype)).copy_(x)


def product(name: str, a: Tensor, b: Tensor) -> Tensor:
    """a b, in a buffer."""
    return torch.mm(a, b, out=room(name, (a.shape[0], b.shape[1]), a))


def write(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b."""
    torch.mm(a, b, out=out) if out.dtype == a.dtype else out.copy_(a @ b)


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
