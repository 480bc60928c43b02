"""The head and its loss on a GPU: the products are cuBLAS', everything between them is one pass over the logits.

Of a token's V logits z the loss wants two numbers, lse = log sum exp(z) and logp = z[target] - lse, and gives back

    dz = (g_lse - g_logp) softmax(z) + g_logp [at the target]

The kernel of the forward pass reads a row once and keeps both numbers; that of the backward pass reads it once and
writes dz over it, in the logits' own dtype. No copy of the logits in float32 ever exists (Liger's idea, 2410.10989).

With N tokens and width D a product takes 2 N D V operations, and there are four of them: logits, logits again, and the
gradients of hidden vectors and head. The second goes if the logits wait for the backward pass. No byte more is moved
for that, as they are written once anyway; they only take up N V elements until the backward pass, which begins with
them. So they wait where they fit into KEEP_BYTES, and otherwise pass by in chunks of CHUNK_BYTES, large enough that a
GPU is busy and that the head's gradient, read and written in float32 for every chunk, does not count.
"""
from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor

from mindseed.core import ChunkedHead

CHUNK_BYTES = 512 << 20                           # logits of one product, where they do not wait
KEEP_BYTES = 2 << 30                              # logits that wait for the backward pass, at most
BLOCK = 4096                                      # logits of a row that a program reads at a time


def apply_head(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int,
               dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(logps (N,), lse (N,)) of hidden (N, D), head (V, D) and targets (N,): the best there is for the device."""
    kernel = FusedHead if hidden.is_cuda and have_triton() else ChunkedHead
    return kernel.apply(hidden, head, targets, chunk, dtype)


class FusedHead(torch.autograd.Function):
    """What core.ChunkedHead computes, with kernels in Triton. At least `chunk` tokens pass at a time.

    Products run in `dtype`, reductions and the sum of the head's gradient over chunks in at least float32. A target
    that is no row of the head makes its logp NaN.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, chunk: int,
                dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        h, w, targets = hidden.to(dtype), head.to(dtype), targets.contiguous()
        N, V = len(h), len(w)
        logps, lse = h.new_empty(2, N, dtype=torch.promote_types(dtype, torch.float32))
        keep = ctx.needs_input_grad[0] and N * V * dtype.itemsize <= KEEP_BYTES         # not where nothing learns
        rows = max(1, N) if keep else max(chunk, CHUNK_BYTES // (V * dtype.itemsize))
        logits = h.new_empty(min(rows, N), V)
        for at, some in pieces(N, logits):
            torch.mm(h[at], w.T, out=some)
            look(some, targets[at], logps[at], lse[at])
        ctx.save_for_backward(h, w, targets, lse)
        ctx.logits, ctx.rows, ctx.dtypes = logits if keep else None, rows, (hidden.dtype, head.dtype)
        return logps, lse

    @staticmethod
    def backward(ctx, g_logps: Tensor, g_lse: Tensor):
        h, w, targets, lse = ctx.saved_tensors
        g_logps, g_lse = g_logps.contiguous(), g_lse.contiguous()
        kept, ctx.logits = ctx.logits, None                                       # they become the gradient: only once
        logits = h.new_empty(min(ctx.rows, len(h)), len(w)) if kept is None else kept
        g_hidden, g_head = torch.empty_like(h), None
        learns = ctx.needs_input_grad[1]                                          # not under an adapter
        for at, some in pieces(len(h), logits):
            if kept is None:
                torch.mm(h[at], w.T, out=some)
            turn(some, targets[at], lse[at], g_logps[at], g_lse[at])
            torch.mm(some, w, out=g_hidden[at])
            if learns:
                g_head = add_product(g_head, some.T, h[at], lse.dtype)
        if learns and g_head is None:                                             # there were no tokens
            g_head = torch.zeros_like(w)
        of_hidden, of_head = ctx.dtypes
        return g_hidden.to(of_hidden), g_head.to(of_head) if learns else None, None, None, None


def pieces(N: int, logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Which of N tokens, and the rows of the buffer `logits` that they use."""
    for i in range(0, N, max(1, len(logits))):
        yield slice(i, i + len(logits)), logits[:N - i]


def add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a b, summed in `dtype`, which may be wider than a and b; in place where there is a total."""
    if a.dtype == dtype:
        return a @ b if total is None else total.addmm_(a, b)
    if not a.is_cuda:
        return (a.to(dtype) @ b.to(dtype)).add_(0 if total is None else total)
    if total is None:
        return torch.mm(a, b, out_dtype=dtype)
    if torch.__version__ < (2, 10):
        return total.add_(torch.mm(a, b, out_dtype=dtype))
    return torch.addmm(total, a, b, out_dtype=dtype, out=total)


def look(logits: Tensor, targets: Tensor, logps: Tensor, lse: Tensor) -> None:
    """Fill in logps and lse (n,) of logits (n, V)."""
    launch(0, logits, targets, logps, lse)


def turn(logits: Tensor, targets: Tensor, lse: Tensor, g_logps: Tensor, g_lse: Tensor) -> None:
    """Turn logits (n, V) into their gradient, in place."""
    launch(1, logits, targets, lse, g_logps, g_lse)


def launch(which: int, logits: Tensor, *more: Tensor) -> None:
    """A program for every row. Everything is contiguous."""
    n, V = logits.shape
    if n:
        block = min(BLOCK, 1 << (V - 1).bit_length())
        with torch.cuda.device_of(logits):
            kernels()[which][(n,)](logits, *more, V, BLOCK=block, num_warps=max(1, min(8, block // 256)))


@functools.cache
def have_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def kernels():
    """Both kernels, compiled by Triton, which comes with torch for CUDA. The log partition function and the gradients
    handed in are of the wide dtype, in which the arithmetic runs."""
    import triton
    import triton.language as tl

    @triton.jit
    def look_kernel(logits, targets, logps, lse, V, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(targets + row)
        wide = lse.dtype.element_ty
        best, total = tl.full((), -1e30, wide), tl.zeros((), wide)                # total: of exp(logit - best)
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(logits + row * V + at, mask=at < V, other=float("-inf")).to(wide)
            new = tl.maximum(best, tl.max(x, 0))
            total = total * tl.exp(best - new) + tl.sum(tl.exp(x - new), 0)
            best = new
        found = best + tl.log(total)
        inside = (target >= 0) & (target < V)
        picked = tl.load(logits + row * V + target, mask=inside, other=float("nan")).to(wide)
        tl.store(lse + row, found)
        tl.store(logps + row, picked - found)

    @triton.jit
    def turn_kernel(logits, targets, lse, g_logps, g_lse, V, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(targets + row)
        partition = tl.load(lse + row)
        of_target = tl.load(g_logps + row)
        of_all = tl.load(g_lse + row) - of_target
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(logits + row * V + at, mask=at < V, other=0.0).to(partition.dtype)
            g = tl.exp(x - partition) * of_all
            g = tl.where(at == target, g + of_target, g)
            tl.store(logits + row * V + at, g.to(logits.dtype.element_ty), mask=at < V)

    return look_kernel, turn_kernel
