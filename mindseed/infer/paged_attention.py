"""Attention of one new token per row over keys and values that lie in blocks (2309.06180), for a GPU.

A row alone would keep only a few of a GPU's many processors busy, so its keys are cut into parts that are attended to
separately and joined afterwards by the size of their softmax (flash-decoding): a part leaves its weighted mean, and the
logarithm of the sum it was divided by. All query heads that share a key head are computed by the program that reads it.

`attend_paged` launches the kernel in Triton; on a CPU it gathers the blocks and attends to them, which is also what the
kernel is tested against.
"""
from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

TILE = 64                                         # keys read at a time
PARTS = 8                                         # of a row's keys


def attend_paged(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, block_size: int, *,
                 window: int | None = None, scale: float | None = None) -> Tensor:
    """q (B, H, K) over keys and values (slots, G, K) -> (B, H, K). Token i of row b lies in slot
    tables[b, i // block_size] * block_size + i % block_size; the last of its `lengths[b]` tokens is the query's own."""
    scale = scale or 1 / math.sqrt(q.shape[-1])
    attend = launched if q.is_cuda else gathered
    return attend(q, keys, values, tables, lengths, block_size, window, scale)


def gathered(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, block_size: int,
             window: int | None, scale: float) -> Tensor:
    B, H, K = q.shape
    G, S = keys.shape[1], tables.shape[1] * block_size
    slots = (tables[:, :, None] * block_size + torch.arange(block_size, device=q.device)).view(B, S)
    at = torch.arange(S, device=q.device)
    seen = at < lengths[:, None]                                                  # (B, S)
    if window is not None:
        seen &= at >= lengths[:, None] - window
    k, v = keys[slots].to(q.dtype), values[slots].to(q.dtype)                     # (B, S, G, K)
    scores = torch.einsum("bghk,bsgk->bghs", q.view(B, G, H // G, K), k) * scale
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("bghs,bsgk->bghk", weights, v).reshape(B, H, K)


def launched(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, block_size: int,
             window: int | None, scale: float) -> Tensor:
    B, H, K = q.shape
    G, heads = keys.shape[1], H // keys.shape[1]
    rows, width = max(16, power_of_two(heads)), max(16, power_of_two(K))          # a tensor core takes no less
    found = torch.empty(B, G, PARTS, heads, K, dtype=torch.float32, device=q.device)
    sums = torch.empty(B, G, PARTS, heads, dtype=torch.float32, device=q.device)
    q = q.contiguous()
    kernel()[B, G, PARTS](q, keys, values, tables, lengths, found, sums, scale, tables.stride(0), keys.stride(0),
                          keys.stride(1), values.stride(0), values.stride(1), window or 0, G, heads, K, block_size,
                          PARTS=PARTS, ROWS=rows, WIDTH=width, TILE=TILE)
    weights = sums.softmax(2)[..., None]                                          # (B, G, PARTS, heads, 1)
    return (found * weights).sum(2).view(B, H, K).to(q.dtype)


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.cache
def kernel():
    """The kernel, compiled by Triton, which comes with torch for CUDA."""
    import triton
    import triton.language as tl

    @triton.jit
    def attend(q, keys, values, tables, lengths, found, sums, scale, table_stride, key_stride, key_head, value_stride,
               value_head, window, G, heads, K, block_size, PARTS: tl.constexpr, ROWS: tl.constexpr,
               WIDTH: tl.constexpr, TILE: tl.constexpr):
        b, g, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        length = tl.load(lengths + b)
        first = tl.where(window > 0, tl.maximum(length - window, 0), 0)
        share = tl.cdiv(tl.cdiv(length - first, PARTS), TILE) * TILE
        start = first + part * share
        stop = tl.minimum(start + share, length)
        h, d = tl.arange(0, ROWS), tl.arange(0, WIDTH)
        inside = (h < heads)[:, None] & (d < K)[None, :]
        query = tl.load(q + (b * G * heads + g * heads + h)[:, None] * K + d[None, :], mask=inside, other=0.0)
        best = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        mean = tl.zeros((ROWS, WIDTH), tl.float32)
        for at in range(start, stop, TILE):
            token = at + tl.arange(0, TILE)
            real = token < stop
            block = tl.load(tables + b * table_stride + token // block_size, mask=real, other=0)
            slot = block * block_size + token % block_size
            here = real[:, None] & (d < K)[None, :]
            k = tl.load(keys + slot[:, None] * key_stride + g * key_head + d[None, :], mask=here, other=0.0)
            scores = tl.dot(query, tl.trans(k.to(query.dtype)), input_precision="ieee") * scale
            scores = tl.where(real[None, :], scores, float("-inf"))               # (ROWS, TILE)
            new = tl.maximum(best, tl.max(scores, 1))
            weights = tl.exp(scores - new[:, None])
            fade = tl.exp(best - new)
            v = tl.load(values + slot[:, None] * value_stride + g * value_head + d[None, :], mask=here, other=0.0)
            mean = mean * fade[:, None] + tl.dot(weights.to(query.dtype), v.to(query.dtype), input_precision="ieee")
            total = total * fade + tl.sum(weights, 1)
            best = new
        mean = mean / tl.where(total > 0, total, 1.0)[:, None]
        out = ((b * G + g) * PARTS + part) * heads + h
        tl.store(found + out[:, None] * K + d[None, :], mean, mask=inside)
        tl.store(sums + out, tl.where(total > 0, best + tl.log(total), float("-inf")), mask=h < heads)

    return attend
