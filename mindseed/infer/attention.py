"""Attention of one new token over a paged cache, as kernels (jit.py): one row and the queries that share a key head.

Keys and values are read where they lie, a block at a time, and softmax is taken tile by tile: what was summed under an
earlier maximum is scaled down when a greater one turns up (online softmax, 1805.02867). A row may be cut into parts,
which are joined at the end by the same rule.
"""
from __future__ import annotations

import numpy as np

from mindseed.infer.jit import kernel
from mindseed.infer.kernels import F32, inner, pieces, power
from mindseed.infer.simd import LANES, WIDTH

TILE = 256                                        # keys whose scores are held at once


@kernel
def rotate(x, cos, sin, n, interleaved):
    """Turn the pairs of x (n,) by the tables (n / 2,) of its position, in place."""
    half, j = n // 2, 0
    while not interleaved and j + LANES <= half:
        p, q = x + 4 * j, x + 4 * (j + half)
        a, b, c, s = load(p, F32), load(q, F32), load(cos + 4 * j, F32), load(sin + 4 * j, F32)
        store(p, fma(a, c, multiply(multiply(b, s), splat(-1.0))))
        store(q, fma(b, c, multiply(a, s)))
        j += LANES
    while j < half:
        p, q = x + 4 * j, x + 4 * (j + half)
        if interleaved:
            p, q = x + 8 * j, x + 8 * j + 4
        a, b, c, s = get(p, F32), get(q, F32), get(cos + 4 * j, F32), get(sin + 4 * j, F32)
        put(p, a * c - b * s, F32)
        put(q, b * c + a * s, F32)
        j += 1


@kernel
def attend(q, heads, n, keys, values, stride, table, block, first, last, scale, scores, out, unit):
    """Softmax attention of a row's queries (heads, n), which share a key head, over its keys number `first` to `last`.

    Keys lie `stride` numbers apart within a block, `table` says where the blocks lie. Leaves in `out` the sums of
    values (heads, n), not yet divided, and (heads, 2) the maximum of the scores and the sum of their powers.
    `scores` has room for (heads, TILE) numbers.
    """
    step, stats = size_of(unit) * stride, out + 4 * heads * n
    for j in range(heads * n):
        put(out + 4 * j, 0.0, F32)
    for h in range(heads):
        put(stats + 8 * h, -np.inf, F32)
        put(stats + 8 * h + 4, 0.0, F32)
    for start in range(first, last, TILE):
        count = min(TILE, last - start)
        entry, inside, done = table + 8 * (start // block), start % block, 0
        while done < count:                                                       # a block at a time
            at, run = step * (integer(entry) * block + inside), min(block - inside, count - done)
            touch(values + at, run, step, n * size_of(unit))
            if done + run < count:
                touch(keys + step * integer(entry + 8) * block, min(block, count - done - run), step, n * size_of(unit))
            for h in range(heads):
                score(q + 4 * n * h, keys + at, run, step, n, scale, scores + 4 * (TILE * h + done), unit)
            entry, inside, done = entry + 8, 0, done + run
        for h in range(heads):
            rescale(scores + 4 * TILE * h, count, out + 4 * n * h, n, stats + 8 * h)
        entry, inside, done = table + 8 * (start // block), start % block, 0
        while done < count:
            at, run = step * (integer(entry) * block + inside), min(block - inside, count - done)
            for h in range(heads):
                mix(scores + 4 * (TILE * h + done), values + at, run, step, out + 4 * n * h, n, unit)
            entry, inside, done = entry + 8, 0, done + run


@kernel
def touch(address, count, step, length):
    """Have `count` vectors of `length` bytes fetched that will be needed soon."""
    for r in range(count):
        for line in range(0, length, 64):
            prefetch(address + step * r + line)


@kernel
def score(q, keys, count, step, n, scale, out, unit):
    """Products of a query with `count` keys, `step` bytes apart, times the scale: four at a time."""
    size, r, whole = size_of(unit), 0, n // LANES * LANES
    while r + 4 <= count:
        p = keys + step * r
        a = splat(0.0)
        b, c, d = a, a, a
        for j in range(0, whole, LANES):
            v, at = load(q + 4 * j, F32), p + size * j
            a = fma(load(at, unit), v, a)
            b = fma(load(at + step, unit), v, b)
            c = fma(load(at + 2 * step, unit), v, c)
            d = fma(load(at + 3 * step, unit), v, d)
        put_totals(out + 4 * r, a, b, c, d, scale)
        if whole < n:
            for i in range(r, r + 4):
                rest = inner(keys + step * i + size * whole, q + 4 * whole, n - whole, unit)
                put(out + 4 * i, get(out + 4 * i, F32) + rest * scale, F32)
        r += 4
    while r < count:
        put(out + 4 * r, inner(keys + step * r, q, n, unit) * scale, F32)
        r += 1


@kernel
def rescale(scores, count, out, n, stats):
    """Scores to powers relative to the greatest score so far, and what was summed before along with it."""
    filled = pieces(count, LANES) * LANES
    for i in range(count, filled):
        put(scores + 4 * i, -np.inf, F32)
    before, a = get(stats, F32), splat(get(stats, F32))
    for i in range(0, filled, LANES):
        a = greater(a, load(scores + 4 * i, F32))
    top = peak(a)
    share, a, j = power(before - top), splat(0.0), 0
    for i in range(0, filled, LANES):
        v = exp(add(load(scores + 4 * i, F32), splat(-top)))
        store(scores + 4 * i, v)
        a = add(a, v)
    put(stats, top, F32)
    put(stats + 4, get(stats + 4, F32) * share + total(a), F32)
    while j + LANES <= n:
        store(out + 4 * j, multiply(load(out + 4 * j, F32), splat(share)))
        j += LANES
    while j < n:
        put(out + 4 * j, get(out + 4 * j, F32) * share, F32)
        j += 1


@kernel
def mix(shares, values, count, step, out, n, unit):
    """out (n,) += the sum of `count` values, `step` bytes apart, each times its share."""
    size, j = size_of(unit), 0
    while j + 4 * LANES <= n:                                                     # four registers at a time
        o = out + 4 * j
        a, b, c, d = load(o, F32), load(o + WIDTH, F32), load(o + 2 * WIDTH, F32), load(o + 3 * WIDTH, F32)
        for r in range(count):
            v, p = splat(get(shares + 4 * r, F32)), values + step * r + size * j
            a = fma(v, load(p, unit), a)
            b = fma(v, load(p + size * LANES, unit), b)
            c = fma(v, load(p + 2 * size * LANES, unit), c)
            d = fma(v, load(p + 3 * size * LANES, unit), d)
        store(o, a)
        store(o + WIDTH, b)
        store(o + 2 * WIDTH, c)
        store(o + 3 * WIDTH, d)
        j += 4 * LANES
    while j + LANES <= n:
        a = load(out + 4 * j, F32)
        for r in range(count):
            a = fma(splat(get(shares + 4 * r, F32)), load(values + step * r + size * j, unit), a)
        store(out + 4 * j, a)
        j += LANES
    while j < n:
        s = get(out + 4 * j, F32)
        for r in range(count):
            s += get(shares + 4 * r, F32) * get(values + step * r + size * j, unit)
        put(out + 4 * j, s, F32)
        j += 1


@kernel
def join(partial, parts, piece, heads, n, out):
    """The attention over all keys (heads, n) from that over `parts` of them, each as `attend` leaves it and `piece`
    numbers apart."""
    for h in range(heads):
        top = np.float32(-np.inf)
        for part in range(parts):
            top = max(top, get(partial + 4 * (piece * part + heads * n + 2 * h), F32))
        weight = np.float32(0)
        for j in range(n):
            put(out + 4 * (n * h + j), 0.0, F32)
        for part in range(parts):
            sums = partial + 4 * (piece * part + n * h)
            stats = partial + 4 * (piece * part + heads * n + 2 * h)
            if get(stats + 4, F32) > 0:
                share = power(get(stats, F32) - top)
                weight += share * get(stats + 4, F32)
                for j in range(n):
                    put(out + 4 * (n * h + j), get(out + 4 * (n * h + j), F32) + share * get(sums + 4 * j, F32), F32)
        for j in range(n):
            put(out + 4 * (n * h + j), get(out + 4 * (n * h + j), F32) / weight, F32)
