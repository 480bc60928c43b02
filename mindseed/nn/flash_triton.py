"""FlashAttention as kernels in Triton, for a GPU; flash.py tells the idea and computes wherever Triton does not.

A program of `forward` holds a tile of queries and walks over the tiles of keys in their span; `backward_queries` does
the same for the gradient of q; `backward_keys` holds a tile of keys and walks over the queries that see them, in all
query heads that share these keys. So no two programs write to the same place: nothing is added up in an order that
changes from run to run, at the price of making the probabilities twice. In the middle of its walk every pair of a tile
meets, and nothing is compared; only the tiles at both ends are masked. (The middle comes first: the other way round,
ptxas 12.8 makes every product of backward_keys wait for the one before, and says so as C7515.)

Exponentials are powers of 2, whose logarithm is multiplied into the scale, because that is what the hardware computes.

The operators are opaque to torch.compile, so a compiled block stays one graph. They take the torch version where
there is no GPU, for float64, and for heads wider than 256.
"""
from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mindseed.nn import flash
from mindseed.nn.flash import Spans

LOG2E = math.log2(math.e)
EVEN = 16                                         # widths that are no multiple end in wrong addresses on a GPU


@dataclass(frozen=True)
class Tiles:
    """How a kernel is cut: queries and keys of a tile, warps of a program, tiles loaded ahead."""

    queries: int
    keys: int
    warps: int
    stages: int


# Candidates by kernel and by the width of a head, rounded up; the first is used. Which is fastest depends on the GPU,
# so it is measured (python -m benchmarks.attention) and written down here, not searched for in every run: other tiles
# round differently, and a run that goes on tomorrow must compute what it would have computed today.
HOPPER = {
    ("forward", 64): (Tiles(64, 64, 4, 3), Tiles(128, 64, 4, 3), Tiles(128, 64, 8, 3), Tiles(128, 128, 8, 3)),
    ("forward", 128): (Tiles(64, 64, 4, 3), Tiles(128, 64, 8, 3), Tiles(128, 128, 8, 3), Tiles(128, 128, 8, 2)),
    ("forward", 256): (Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)),
    ("backward_queries", 64): (Tiles(64, 64, 4, 3), Tiles(128, 64, 4, 3), Tiles(128, 64, 8, 3), Tiles(128, 128, 8, 2)),
    ("backward_queries", 128): (Tiles(64, 64, 4, 2), Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(128, 128, 8, 2)),
    ("backward_queries", 256): (Tiles(64, 64, 8, 2), Tiles(64, 32, 4, 2)),
    ("backward_keys", 64): (Tiles(64, 64, 4, 3), Tiles(64, 128, 8, 3), Tiles(32, 128, 4, 3), Tiles(64, 128, 8, 2)),
    ("backward_keys", 128): (Tiles(64, 128, 8, 3), Tiles(64, 64, 4, 2), Tiles(32, 128, 8, 3), Tiles(64, 128, 8, 2)),
    ("backward_keys", 256): (Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2)),
}
SMALL = {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 32, 4, 2), 256: Tiles(32, 32, 4, 1)}   # where a chip has less memory
WIDE = {64: Tiles(32, 32, 4, 2), 128: Tiles(32, 32, 4, 2), 256: Tiles(32, 16, 4, 1)}    # for float32


def flash_forward(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float,
                  slopes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As flash.flash_forward: (out (B, T, H, V), lse (B, H, T)). Differentiable; lse counts as a constant."""
    return forward_op(q, k, v, spans.lo, spans.hi, spans.since, spans.until, slopes, scale)


def flash_backward(g_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans, scale: float,
                   slopes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """As flash.flash_backward: (gq, gk, gv)."""
    return backward_op(g_out, q, k, v, out, lse, spans.lo, spans.hi, spans.since, spans.until, slopes, scale)


def flash_attend(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, slopes: Tensor | None = None) -> Tensor:
    """Attention of q (B, T, H, K) to k (B, S, G, K) and v (B, S, G, V): (B, T, H, V)."""
    return flash_forward(q, k, v, spans, scale, slopes)[0]


@torch.library.custom_op("mindseed::flash_forward", mutates_args=(), schema=(
    "(Tensor q, Tensor k, Tensor v, Tensor? lo, Tensor? hi, Tensor? since, Tensor? until, Tensor? slopes, float scale) "
    "-> (Tensor, Tensor)"))
def forward_op(q: Tensor, k: Tensor, v: Tensor, lo: Tensor | None, hi: Tensor | None, since: Tensor | None,
               until: Tensor | None, slopes: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    forward = launch_forward if by_triton(q, v) else flash.flash_forward
    out, lse = forward(q, k, v, Spans(lo, hi, since, until), scale, slopes)
    return out.contiguous(), lse.contiguous()


@torch.library.custom_op("mindseed::flash_backward", mutates_args=(), schema=(
    "(Tensor g_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? lo, Tensor? hi, Tensor? since, "
    "Tensor? until, Tensor? slopes, float scale) -> (Tensor, Tensor, Tensor)"))
def backward_op(g_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lo: Tensor | None,
                hi: Tensor | None, since: Tensor | None, until: Tensor | None, slopes: Tensor | None,
                scale: float) -> tuple[Tensor, Tensor, Tensor]:
    backward = launch_backward if by_triton(q, v) else flash.flash_backward
    gq, gk, gv = backward(g_out, q, k, v, out, lse, Spans(lo, hi, since, until), scale, slopes)
    return gq.contiguous(), gk.contiguous(), gv.contiguous()


@forward_op.register_fake
def _(q, k, v, lo, hi, since, until, slopes, scale):
    B, T, H, _ = q.shape
    return q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B, H, T, dtype=torch.promote_types(q.dtype, torch.float32))


@backward_op.register_fake
def _(g_out, q, k, v, out, lse, lo, hi, since, until, slopes, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def keep(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)


def differentiate(ctx, g_out: Tensor, g_lse: Tensor):
    out, lse, q, k, v, *rest = ctx.saved_tensors
    return *backward_op(g_out, q, k, v, out, lse, *rest, ctx.scale), *[None] * 6


forward_op.register_autograd(differentiate, setup_context=keep)


def by_triton(q: Tensor, v: Tensor) -> bool:
    return (q.is_cuda and q.dtype in (torch.bfloat16, torch.float16, torch.float32) and installed()
            and max(q.shape[-1], v.shape[-1]) <= 256 and torch.cuda.get_device_capability(q.device) >= (8, 0))


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def launch_forward(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float,
                   slopes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    (B, T, H, K), V = q.shape, v.shape[-1]
    if K % EVEN or V % EVEN:
        out, lse = launch_forward(*map(widened, (q, k, v)), spans, scale, slopes)
        return out[..., :V].contiguous(), lse
    out, lse = q.new_empty(B, T, H, V), q.new_empty(B, H, T, dtype=torch.float32)
    launch("forward", q, k, v, scale, slopes, out=out, lse=lse, lo=spans.lo, hi=spans.hi)
    return out, lse


def launch_backward(g_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans,
                    scale: float, slopes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, H, K), V = q.shape, v.shape[-1]
    if K % EVEN or V % EVEN:
        gq, gk, gv = launch_backward(*map(widened, (g_out, q, k, v, out)), lse, spans, scale, slopes)
        return gq[..., :K].contiguous(), gk[..., :K].contiguous(), gv[..., :V].contiguous()
    g_out, spans = packed(g_out), spans.by_key(k.shape[1])
    gq, gk, gv = (x.new_empty(x.shape) for x in (q, k, v))
    delta, log = q.new_empty(2, B, H, T, dtype=torch.float32)
    with on(q):
        kernels()["prepare"][H, -(-T // 64), B](
            out.contiguous(), g_out, lse.contiguous(), delta, log, *g_out.stride()[:3], T, V=V, VW=padded(V), M=64)
    more = dict(g_out=g_out, log=log, delta=delta, **strides(g=g_out))
    launch("backward_keys", q, k, v, scale, slopes, gk=gk, gv=gv, lo=spans.since, hi=spans.until, **more)
    launch("backward_queries", q, k, v, scale, slopes, gq=gq, lo=spans.lo, hi=spans.hi, **more)
    return gq, gk, gv


def launch(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, slopes: Tensor | None, lo: Tensor | None,
           hi: Tensor | None, **more) -> None:
    """Start a kernel with what all three of them need, and with what this one needs beside it."""
    q, k, v = packed(q), packed(k), packed(v)
    (B, T, H, K), (S, G, V) = q.shape, v.shape[1:]
    cut = tiles(name, q, V)
    across, rows, step = (G, S, cut.keys) if name == "backward_keys" else (H, T, cut.queries)
    assert all(ends is None or ends.shape == (B, rows) for ends in (lo, hi))
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"     # of float32
    with on(q):
        kernels()[name][across, -(-rows // step), B](
            q=q, k=k, v=v, slopes=None if slopes is None else slopes.to(q.device, torch.float32) / scale,
            lo=None if lo is None else lo.contiguous(), hi=None if hi is None else hi.contiguous(),
            scale=scale * LOG2E, T=T, S=S, R=H // G, K=K, V=V, KW=padded(K), VW=padded(V), M=cut.queries, N=cut.keys,
            PRECISION=precision, num_warps=cut.warps, num_stages=cut.stages,
            enable_fp_fusion=True, **strides(q=q, k=k, v=v), **more)


def tiles(name: str, q: Tensor, value_dim: int) -> Tiles:
    """How to cut a kernel for queries q (B, T, H, K) and values of that width, on their device."""
    width = max(64, padded(q.shape[-1]), padded(value_dim))
    if q.dtype == torch.float32:
        return WIDE[width]
    large = torch.cuda.get_device_capability(q.device)[0] in (9, 10)              # the data centre's, from Hopper on
    return HOPPER[name, width][0] if large else SMALL[width]


def widened(x: Tensor) -> Tensor:
    """With zeros up to the next width that the kernels take on a GPU: they change no score and no sum."""
    return F.pad(x, (0, -x.shape[-1] % EVEN))


def padded(width: int) -> int:
    """The width of a tile: a power of 2, and a tensor core takes no less than 16."""
    return max(16, 1 << (width - 1).bit_length())


def packed(x: Tensor) -> Tensor:
    """With the numbers of a head side by side, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(**tensors: Tensor) -> dict[str, int]:
    return {f"{name}_{dim}": x.stride(i) for name, x in tensors.items() for i, dim in enumerate("bth")}


def on(x: Tensor):
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def kernels() -> dict:
    """The kernels, compiled by Triton, which comes with torch for CUDA."""
    import triton
    import triton.language as tl

    @triton.jit
    def load(x, at, length, stride, N: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, CUT: tl.constexpr):
        """Rows at .. at + N of x (length, D) as (N, WIDE), zeros where there is nothing; CUT: some rows may not be."""
        row, column = tl.arange(0, N)[:, None], tl.arange(0, WIDE)[None, :]
        place = x + at.to(tl.int64) * stride + row * stride + column
        if CUT:
            return tl.load(place, mask=(row < length - at) & (column < D), other=0.0)
        elif D < WIDE:
            return tl.load(place, mask=column < D, other=0.0)
        else:
            return tl.load(place)

    @triton.jit
    def store(x, tile, at, length, stride, N: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr):
        row, column = tl.arange(0, N)[:, None], tl.arange(0, WIDE)[None, :]
        place = x + at.to(tl.int64) * stride + row * stride + column
        tl.store(place, tile.to(x.dtype.element_ty), mask=(row < length - at) & (column < D))

    @triton.jit
    def at_each(x, i, length, CUT: tl.constexpr):
        if CUT:
            return tl.load(x + i, mask=i < length, other=0.0)
        else:
            return tl.load(x + i)

    @triton.jit
    def end(ends, place, otherwise):
        """One end of a span, or those of many."""
        if ends is None:
            return otherwise
        else:
            return tl.load(ends + place)

    @triton.jit
    def walk(lo, hi, b, at, length, others, M: tl.constexpr, N: tl.constexpr, KEYS: tl.constexpr):
        """The ends of M spans; and the tiles of N which they meet: `count` from `begin` on, of which those before
        `left` and those from `right` on need a mask."""
        i, final = at + tl.arange(0, M), tl.minimum(at + M, length) - 1
        each, one, two = b * length + tl.minimum(i, final), b * length + at, b * length + final
        if KEYS:                                                                 # from the key itself to the end
            first, last = end(lo, each, i), end(hi, each, i)
            begin, whole = end(lo, one, at), end(lo, two, final)
            whole_to, stop = end(hi, one, others - 1), end(hi, two, others - 1)
        else:                                                                    # from the start to the query itself
            first, last = end(lo, each, i), tl.minimum(end(hi, each, i), others - 1)
            begin, whole = end(lo, one, 0), end(lo, two, 0)
            whole_to, stop = end(hi, one, at), end(hi, two, final)
        begin, whole = tl.maximum(begin, 0), tl.maximum(whole, 0)
        whole_to, stop = tl.minimum(whole_to, others - 1), tl.minimum(stop, others - 1)
        count = tl.maximum(tl.cdiv(stop + 1 - begin, N), 0)
        left = tl.minimum(tl.cdiv(whole - begin, N), count)
        right = tl.maximum((whole_to + 1 - begin) // N, left)
        return first, last, begin, left, right, count

    @triton.jit
    def sees(x, first, last, lo, hi):
        """Which of x (N,) lie within the spans of M rows: (M, N). What is None needs no asking."""
        if lo is None:
            return x[None, :] <= last[:, None]
        elif hi is None:
            return x[None, :] >= first[:, None]
        else:
            return (x[None, :] >= first[:, None]) & (x[None, :] <= last[:, None])

    @triton.jit
    def meet(mean, total, best, q, k, v, at, S, k_t, v_t, i, first, last, lo, slope, scale, N: tl.constexpr,
             K: tl.constexpr, V: tl.constexpr, KW: tl.constexpr, VW: tl.constexpr, CUT: tl.constexpr,
             PRECISION: tl.constexpr):
        """What queries have gathered, after one more tile of keys."""
        scores = tl.dot(q, tl.trans(load(k, at, S, k_t, N, K, KW, CUT)), input_precision=PRECISION)     # (M, N)
        j = at + tl.arange(0, N)
        if slope is not None:
            scores += slope * (j[None, :] - i[:, None])
        if CUT:
            scores = tl.where(sees(j, first, last, lo, last), scores, float("-inf"))
        new = tl.maximum(best, tl.max(scores, 1) * scale)
        base = tl.where(new == float("-inf"), 0.0, new) if CUT else new          # nothing seen yet: weights are 0
        weights, fade = tl.exp2(scores * scale - base[:, None]), tl.exp2(best - base)
        values = load(v, at, S, v_t, N, V, VW, CUT)
        mean = tl.dot(weights.to(values.dtype), values, mean * fade[:, None], input_precision=PRECISION)
        return mean, total * fade + tl.sum(weights, 1), new

    @triton.jit
    def forward(q, k, v, out, lse, lo, hi, slopes, scale, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, T, S,
                R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KW: tl.constexpr, VW: tl.constexpr, M: tl.constexpr,
                N: tl.constexpr, PRECISION: tl.constexpr):
        h, b, H = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(0)
        at = (tl.num_programs(1) - 1 - tl.program_id(1)) * M                     # the longest walks first
        k += b * k_b + h // R * k_h
        v += b * v_b + h // R * v_h
        i = at + tl.arange(0, M)
        first, last, begin, left, right, count = walk(lo, hi, b, at, T, S, M, N, False)
        slope = None if slopes is None else tl.load(slopes + h)
        queries = load(q + b * q_b + h * q_h, at, T, q_t, M, K, KW, True)
        best = tl.full((M,), float("-inf"), tl.float32)
        total, mean = tl.zeros((M,), tl.float32), tl.zeros((M, VW), tl.float32)
        for n in range(left, right):
            mean, total, best = meet(mean, total, best, queries, k, v, begin + n * N, S, k_t, v_t, i, first, last,
                                     lo, slope, scale, N, K, V, KW, VW, False, PRECISION)
        for n in range(left + count - right):
            j = begin + (n + tl.where(n < left, 0, right - left)) * N
            mean, total, best = meet(mean, total, best, queries, k, v, j, S, k_t, v_t, i, first, last, lo, slope, scale,
                                     N, K, V, KW, VW, True, PRECISION)
        mean = mean / tl.where(total > 0, total, 1.0)[:, None]
        store(out + (b * T * H + h) * V, mean, at, T, H * V, M, V, VW)
        tl.store(lse + (b * H + h) * T + i, (best + tl.log2(total)) * 0.6931471805599453, mask=i < T)

    @triton.jit
    def prepare(out, g_out, lse, delta, log, g_b, g_t, g_h, T, V: tl.constexpr, VW: tl.constexpr,
                M: tl.constexpr):
        """delta: sum(g out) of each query. log: its lse to the base 2."""
        h, b, H = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(0)
        at = tl.program_id(1) * M
        i = at + tl.arange(0, M)
        o = load(out + (b * T * H + h) * V, at, T, H * V, M, V, VW, True).to(tl.float32)
        g = load(g_out + b * g_b + h * g_h, at, T, g_t, M, V, VW, True).to(tl.float32)
        place = (b * H + h) * T + i
        tl.store(delta + place, tl.sum(o * g, 1), mask=i < T)
        tl.store(log + place, tl.load(lse + place, mask=i < T, other=0.0) * 1.4426950408889634, mask=i < T)

    @triton.jit
    def push(gk, gv, keys, values, q, g, log, delta, at, T, q_t, g_t, j, first, last, hi, slope, scale, M: tl.constexpr,
             K: tl.constexpr, V: tl.constexpr, KW: tl.constexpr, VW: tl.constexpr, CUT: tl.constexpr,
             PRECISION: tl.constexpr):
        """Gradients of keys and values, after one more tile of queries. Scores are (N, M): keys by queries."""
        queries, i = load(q, at, T, q_t, M, K, KW, CUT), at + tl.arange(0, M)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
        if slope is not None:
            scores += slope * (j[:, None] - i[None, :])
        lse, sums = at_each(log, i, T, CUT), at_each(delta, i, T, CUT)
        p = tl.exp2(scores * scale - lse[None, :])
        if CUT:
            p = tl.where(sees(i, first, last, first, hi), p, 0.0)
        grads = load(g, at, T, g_t, M, V, VW, CUT)
        gv = tl.dot(p.to(grads.dtype), grads, gv, input_precision=PRECISION)
        g_p = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
        g_s = p * (g_p - sums[None, :])
        return tl.dot(g_s.to(queries.dtype), queries, gk, input_precision=PRECISION), gv

    @triton.jit
    def backward_keys(q, k, v, g_out, log, delta, gk, gv, lo, hi, slopes, scale, q_b, q_t, q_h, k_b, k_t, k_h,
                      v_b, v_t, v_h, g_b, g_t, g_h, T, S, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                      KW: tl.constexpr, VW: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
        group, b, G = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(0)
        at = tl.program_id(1) * N
        j = at + tl.arange(0, N)
        first, last, begin, left, right, count = walk(lo, hi, b, at, S, T, N, M, True)
        keys = load(k + b * k_b + group * k_h, at, S, k_t, N, K, KW, True)
        values = load(v + b * v_b + group * v_h, at, S, v_t, N, V, VW, True)
        query, g, own = q + b * q_b + group * R * q_h, g_out + b * g_b + group * R * g_h, (b * G + group) * R * T
        grad_k, grad_v = tl.zeros((N, KW), tl.float32), tl.zeros((N, VW), tl.float32)
        for n in range(left * R, right * R):                                     # a tile of queries in each of R heads
            r, i = n % R, begin + n // R * M
            slope = None if slopes is None else tl.load(slopes + group * R + r)
            grad_k, grad_v = push(grad_k, grad_v, keys, values, query + r * q_h, g + r * g_h, log + own + r * T,
                                  delta + own + r * T, i, T, q_t, g_t, j, first, last, hi, slope, scale,
                                  M, K, V, KW, VW, False, PRECISION)
        for n in range((left + count - right) * R):
            r, i = n % R, begin + (n // R + tl.where(n // R < left, 0, right - left)) * M
            slope = None if slopes is None else tl.load(slopes + group * R + r)
            grad_k, grad_v = push(grad_k, grad_v, keys, values, query + r * q_h, g + r * g_h, log + own + r * T,
                                  delta + own + r * T, i, T, q_t, g_t, j, first, last, hi, slope, scale,
                                  M, K, V, KW, VW, True, PRECISION)
        store(gk + (b * S * G + group) * K, grad_k * (scale * 0.6931471805599453), at, S, G * K, N, K, KW)
        store(gv + (b * S * G + group) * V, grad_v, at, S, G * V, N, V, VW)

    @triton.jit
    def pull(gq, queries, grads, log, delta, k, v, at, S, k_t, v_t, i, first, last, lo, slope, scale, N: tl.constexpr,
             K: tl.constexpr, V: tl.constexpr, KW: tl.constexpr, VW: tl.constexpr, CUT: tl.constexpr,
             PRECISION: tl.constexpr):
        """The gradient of queries, after one more tile of keys."""
        keys, values = load(k, at, S, k_t, N, K, KW, CUT), load(v, at, S, v_t, N, V, VW, CUT)
        j = at + tl.arange(0, N)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)      # (M, N)
        if slope is not None:
            scores += slope * (j[None, :] - i[:, None])
        p = tl.exp2(scores * scale - log[:, None])
        if CUT:
            p = tl.where(sees(j, first, last, lo, last), p, 0.0)
        g_s = p * (tl.dot(grads, tl.trans(values), input_precision=PRECISION) - delta[:, None])
        return tl.dot(g_s.to(keys.dtype), keys, gq, input_precision=PRECISION)

    @triton.jit
    def backward_queries(q, k, v, g_out, log, delta, gq, lo, hi, slopes, scale, q_b, q_t, q_h, k_b, k_t, k_h,
                         v_b, v_t, v_h, g_b, g_t, g_h, T, S, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                         KW: tl.constexpr, VW: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
        h, b, H = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(0)
        at = (tl.num_programs(1) - 1 - tl.program_id(1)) * M
        k += b * k_b + h // R * k_h
        v += b * v_b + h // R * v_h
        i = at + tl.arange(0, M)
        first, last, begin, left, right, count = walk(lo, hi, b, at, T, S, M, N, False)
        slope = None if slopes is None else tl.load(slopes + h)
        queries = load(q + b * q_b + h * q_h, at, T, q_t, M, K, KW, True)
        grads = load(g_out + b * g_b + h * g_h, at, T, g_t, M, V, VW, True)
        own = (b * H + h) * T
        lse, sums = at_each(log + own, i, T, True), at_each(delta + own, i, T, True)
        grad = tl.zeros((M, KW), tl.float32)
        for n in range(left, right):
            grad = pull(grad, queries, grads, lse, sums, k, v, begin + n * N, S, k_t, v_t, i, first, last, lo,
                        slope, scale, N, K, V, KW, VW, False, PRECISION)
        for n in range(left + count - right):
            j = begin + (n + tl.where(n < left, 0, right - left)) * N
            grad = pull(grad, queries, grads, lse, sums, k, v, j, S, k_t, v_t, i, first, last, lo, slope, scale,
                        N, K, V, KW, VW, True, PRECISION)
        store(gq + (b * T * H + h) * K, grad * (scale * 0.6931471805599453), at, T, H * K, M, K, KW)

    helpers = load, store, at_each, end, walk, sees, meet, push, pull
    globals().update({helper.fn.__name__: helper for helper in helpers})          # where Triton's interpreter looks
    return {kernel.fn.__name__: kernel for kernel in (forward, prepare, backward_keys, backward_queries)}
