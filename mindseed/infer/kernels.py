"""Decoding on a CPU in kernels of our own: everything between token ids and logits, written as plain Python loops over
memory and compiled by numba.

One new token per row reads every weight once, so a step takes as long as memory needs to give them, if nothing else
gets in the way. Here nothing does: one call runs all layers. Its threads draw pieces of work (some rows of a matrix,
one row's heads) from a counter per phase, and nobody goes on to the next phase before all pieces of this one are done.
Any number of threads may take part, come late or not at all: who is there does what there is, so no thread waits for
one that has not started. There is no thread pool of numba's in it, which would compete with torch's for the cores.

Vectors lie in groups of rows. A single row is its own group (width 1): products are inner products along a row of the
weights. More rows lie side by side, sixteen to a group, (dim, 16): every weight is then multiplied into sixteen rows
at once, straight from where it lies in memory.

Functions marked `kernel` are compiled when the first of them is needed, see `compiled`; until then they are ordinary
functions that cannot run. Memory is given by its address: the caller checks bounds and keeps the arrays alive.
"""
from __future__ import annotations

import importlib.util
from functools import cache
from typing import Callable

import numpy as np

from mindseed.infer.simd import LANES, primitives

FLAGS = {"reassoc", "contract", "nsz", "arcp"}    # what LLVM may do with sums; infinities and NaN stay what they are
F32 = np.float32(0)                               # the unit of what is not weights or cache
CHUNK = 32768                                     # bytes of weights to a piece of work
TILE = 256                                        # keys whose scores are held at once
AHEAD = 2048                                      # bytes that weights are fetched ahead of their use
LINE = 128                                        # bytes between counters: each has cache lines of its own
PATIENCE = 2000                                   # looks at a counter before the core is offered to others
HELPER: list[Callable] = []                       # what entries call
ENTRY: list[Callable] = []


def kernel(function: Callable) -> Callable:
    HELPER.append(function)
    return function


def entry(function: Callable) -> Callable:
    ENTRY.append(function)
    return function


def available() -> bool:
    """Whether numba is installed (`pip install 'mindseed[fast]'`)."""
    return importlib.util.find_spec("numba") is not None


@cache
def compiled() -> dict[str, Callable]:
    """The entries by name, each compiled when first called and kept on disk by numba, beside its file or, where that
    cannot be written, in the user's cache folder."""
    import numba

    space = primitives()
    for function in HELPER:
        space[function.__name__] = numba.njit(function, fastmath=FLAGS, error_model="numpy", no_cpython_wrapper=True,
                                               no_cfunc_wrapper=True)
    entries = {}
    for function in ENTRY:
        entries[function.__name__] = numba.njit(function, fastmath=FLAGS, error_model="numpy", nogil=True, cache=True)
    for function in (*HELPER, *ENTRY):            # what they call by name is the compiled function from now on
        function.__globals__.update(space)
    return entries


# ------------------------------------------------------------------------------------------------------ work in pieces

@kernel
def enter(state, generation):
    """Count this thread in, unless the work it was called for is over."""
    while True:
        now = read(state)
        if now >> 16 != generation:
            return False
        if compare_swap(state, now, now + 1):
            return True


@kernel
def close(state):
    """Let no more threads in, and wait for those inside."""
    fetch_add(state, 1 << 16)
    looks = 0
    while read(state) & 0xFFFF:
        looks += 1
        if looks > PATIENCE:
            step_aside(0)


@kernel
def draw(counters, phase):
    """The number of the next piece of a phase."""
    return fetch_add(counters + LINE * 2 * phase, 1)


@kernel
def finish(counters, phase):
    fetch_add(counters + LINE * (2 * phase + 1), 1)


@kernel
def wait(counters, phase, pieces):
    """Until all pieces of a phase are done."""
    looks = 0
    while read(counters + LINE * (2 * phase + 1)) < pieces:
        looks += 1
        if looks > PATIENCE:
            step_aside(0)


# ----------------------------------------------------------------------------------------------------- matrix products

@kernel
def dot(w, x, n, unit):
    """One row of weights times one vector."""
    size = size_of(unit)
    a = splat(0.0)
    b, c, d = a, a, a
    j = 0
    while j + 4 * LANES <= n:
        p, q = w + size * j, x + 4 * j
        for line in range(size):
            prefetch(p + AHEAD + 64 * line)
        a = fma(load(p, unit), load(q, F32), a)
        b = fma(load(p + size * LANES, unit), load(q + 4 * LANES, F32), b)
        c = fma(load(p + 2 * size * LANES, unit), load(q + 8 * LANES, F32), c)
        d = fma(load(p + 3 * size * LANES, unit), load(q + 12 * LANES, F32), d)
        j += 4 * LANES
    while j + LANES <= n:
        a = fma(load(w + size * j, unit), load(x + 4 * j, F32), a)
        j += LANES
    s = total(add(add(a, b), add(c, d)))
    while j < n:
        s += get(w + size * j, unit) * get(x + 4 * j, F32)
        j += 1
    return s


@kernel
def tile(w, x, n, out):
    """Eight rows of float32 weights times sixteen vectors (n, 16): out (8, 16)."""
    a = splat(0.0)
    b, c, d, e, f, g, h = a, a, a, a, a, a, a
    s = 4 * n
    for j in range(n):
        v, p = load(x + 64 * j, F32), w + 4 * j
        if j % 16 == 0:
            for row in range(8):
                prefetch(p + row * s + AHEAD // 4)
        a = fma(splat(get(p, F32)), v, a)
        b = fma(splat(get(p + s, F32)), v, b)
        c = fma(splat(get(p + 2 * s, F32)), v, c)
        d = fma(splat(get(p + 3 * s, F32)), v, d)
        e = fma(splat(get(p + 4 * s, F32)), v, e)
        f = fma(splat(get(p + 5 * s, F32)), v, f)
        g = fma(splat(get(p + 6 * s, F32)), v, g)
        h = fma(splat(get(p + 7 * s, F32)), v, h)
    store(out, a)
    store(out + 64, b)
    store(out + 128, c)
    store(out + 192, d)
    store(out + 256, e)
    store(out + 320, f)
    store(out + 384, g)
    store(out + 448, h)


@kernel
def strip(w, x, n, out, unit):
    """One row of weights times sixteen vectors: out (16,)."""
    a, size = splat(0.0), size_of(unit)
    for j in range(n):
        a = fma(splat(get(w + size * j, unit)), load(x + 64 * j, F32), a)
    store(out, a)


@kernel
def inner(x, y, n, unit):
    """x (of `unit`) times y, for short vectors."""
    size, j = size_of(unit), 0
    a = splat(0.0)
    while j + LANES <= n:
        a = fma(load(x + size * j, unit), load(y + 4 * j, F32), a)
        j += LANES
    s = total(a)
    while j < n:
        s += get(x + size * j, unit) * get(y + 4 * j, F32)
        j += 1
    return s


@kernel
def widen(source, n, target, unit):
    """n numbers to float32."""
    size, j = size_of(unit), 0
    while j + LANES <= n:
        store(target + 4 * j, load(source + size * j, unit))
        j += LANES
    while j < n:
        put(target + 4 * j, get(source + size * j, unit), F32)
        j += 1


@kernel
def product(w, first, last, x, n, rows, out, spare, unit):
    """Rows `first` to `last` of the weights (.., n) times x (groups, n, W): out (groups, last - first, W). Narrow
    weights are widened, eight rows at a time, into `spare`."""
    size, count = size_of(unit), last - first
    if rows == 1:
        for r in range(count):
            put(out + 4 * r, dot(w + size * n * (first + r), x, n, unit), F32)
        return
    groups = (rows + LANES - 1) // LANES
    r = 0
    while r + 8 <= count:
        source = w + size * n * (first + r)
        if size != 4:
            widen(source, 8 * n, spare, unit)
            source = spare
        for group in range(groups):
            tile(source, x + 64 * n * group, n, out + 64 * (count * group + r))
        r += 8
    while r < count:
        for group in range(groups):
            strip(w + size * n * (first + r), x + 64 * n * group, n, out + 64 * (count * group + r), unit)
        r += 1


@kernel
def piece_rows(n, unit):
    """How many rows of n weights make a piece of work."""
    return max(8, CHUNK // (n * size_of(unit)) // 8 * 8)


@kernel
def pieces(rows, size):
    return (rows + size - 1) // size


# --------------------------------------------------------------------------------------------------- vectors in groups

@kernel
def normalise(x, weight, eps, n, rows, out, unit):
    """RMSNorm of x (groups, n, W)."""
    size, share = size_of(unit), np.float32(1 / n)
    if rows == 1:
        norm_row(x, weight, eps, n, out, unit)
        return
    for group in range((rows + LANES - 1) // LANES):
        p, q = x + 64 * n * group, out + 64 * n * group
        a = splat(0.0)
        for j in range(n):
            v = load(p + 64 * j, F32)
            a = fma(v, v, a)
        r = divide(splat(1.0), root(fma(a, splat(share), splat(eps))))
        for j in range(n):
            v = multiply(load(p + 64 * j, F32), r)
            store(q + 64 * j, multiply(v, splat(get(weight + size * j, unit))))


@kernel
def norm_row(x, weight, eps, n, out, unit):
    """RMSNorm of one vector, in place if `out` is x."""
    size, j = size_of(unit), 0
    a = splat(0.0)
    while j + LANES <= n:
        v = load(x + 4 * j, F32)
        a = fma(v, v, a)
        j += LANES
    s = total(a)
    while j < n:
        v = get(x + 4 * j, F32)
        s += v * v
        j += 1
    r = np.float32(1) / np.sqrt(s / np.float32(n) + np.float32(eps))
    j = 0
    while j + LANES <= n:
        store(out + 4 * j, multiply(multiply(load(x + 4 * j, F32), splat(r)), load(weight + size * j, unit)))
        j += LANES
    while j < n:
        put(out + 4 * j, get(x + 4 * j, F32) * r * get(weight + size * j, unit), F32)
        j += 1


@kernel
def add_to(x, y, n):
    """x += y, n numbers."""
    j = 0
    while j + LANES <= n:
        store(x + 4 * j, add(load(x + 4 * j, F32), load(y + 4 * j, F32)))
        j += LANES
    while j < n:
        put(x + 4 * j, get(x + 4 * j, F32) + get(y + 4 * j, F32), F32)
        j += 1


@kernel
def gate_with(gate, up, n, out):
    """silu(gate) * up, n numbers."""
    j, one = 0, splat(1.0)
    while j + LANES <= n:
        g = load(gate + 4 * j, F32)
        half = divide(g, add(one, exp(multiply(g, splat(-1.0)))))
        store(out + 4 * j, multiply(half, load(up + 4 * j, F32)))
        j += LANES
    while j < n:
        g = get(gate + 4 * j, F32)
        half = g / (np.float32(1) + power(-g))
        put(out + 4 * j, half * get(up + 4 * j, F32), F32)
        j += 1


@kernel
def power(number):
    """e^number, by the lanes' exp."""
    return total(exp(splat(number))) / np.float32(LANES)


@kernel
def gather(x, stride, rows, n, out, unit):
    """Vectors x (rows, n), `stride` numbers apart, into groups (groups, n, W); rows that fill a group up are zero."""
    size = size_of(unit)
    if rows == 1:
        widen(x, n, out, unit)
        return
    for b in range((rows + LANES - 1) // LANES * LANES):
        p, q = x + size * stride * b, out + 64 * n * (b // LANES) + 4 * (b % LANES)
        for j in range(n):
            if b < rows:
                put(q + 64 * j, get(p + size * j, unit), F32)
            else:
                put(q + 64 * j, 0.0, F32)


@kernel
def scatter(x, rows, n, out, stride):
    """Groups (groups, n, W) as vectors out (rows, n), `stride` numbers apart."""
    if rows == 1:
        widen(x, n, out, F32)
        return
    for b in range(rows):
        p, q = x + 64 * n * (b // LANES) + 4 * (b % LANES), out + 4 * stride * b
        for j in range(n):
            put(q + 4 * j, get(p + 64 * j, F32), F32)


# ------------------------------------------------------------------------------------------------------------ attention

@kernel
def rotate(x, cos, sin, n, interleaved):
    """Turn the pairs of x (n,) by the tables (n / 2,) of its position, in place."""
    half = n // 2
    for j in range(half):
        p, q = x + 4 * j, x + 4 * (j + half)
        if interleaved:
            p, q = x + 8 * j, x + 8 * j + 4
        a, b, c, s = get(p, F32), get(q, F32), get(cos + 4 * j, F32), get(sin + 4 * j, F32)
        put(p, a * c - b * s, F32)
        put(q, b * c + a * s, F32)


@kernel
def attend(q, heads, n, keys, values, stride, table, block, first, last, scale, scores, out, unit):
    """Softmax attention of one row's queries (heads, n), which share a key head, over its keys number `first` to `last`.

    Keys lie `stride` numbers apart within a block, `table` says where the blocks lie. Leaves in `out` the sums of
    values (heads, n), not yet divided, and (heads, 2) the maximum of the scores and the sum of their powers.
    `scores` has room for (heads, TILE) numbers.
    """
    size, stats = size_of(unit), out + 4 * heads * n
    for j in range(heads * n):
        put(out + 4 * j, 0.0, F32)
    for h in range(heads):
        put(stats + 8 * h, -np.inf, F32)
        put(stats + 8 * h + 4, 0.0, F32)
    for start in range(first, last, TILE):
        count = min(TILE, last - start)
        done = 0
        while done < count:                                                       # a block at a time
            at = start + done
            slot = integer(table + 8 * (at // block)) * block + at % block
            run = min(block - at % block, count - done)
            for r in range(run):
                key = keys + size * stride * (slot + r)
                for h in range(heads):
                    put(scores + 4 * (TILE * h + done + r), inner(key, q + 4 * n * h, n, unit) * scale, F32)
            done += run
        for h in range(heads):
            rescale(scores + 4 * TILE * h, count, out + 4 * n * h, n, stats + 8 * h)
        done = 0
        while done < count:
            at = start + done
            slot = integer(table + 8 * (at // block)) * block + at % block
            run = min(block - at % block, count - done)
            for h in range(heads):
                mix(scores + 4 * (TILE * h + done), values + size * stride * slot, run, stride, out + 4 * n * h, n,
                    unit)
            done += run


@kernel
def rescale(scores, count, out, n, stats):
    """Scores to powers relative to the greatest score so far, and what was summed before along with it."""
    before, weight = get(stats, F32), get(stats + 4, F32)
    top = before
    for i in range(count):
        top = max(top, get(scores + 4 * i, F32))
    for i in range(count, (count + LANES - 1) // LANES * LANES):
        put(scores + 4 * i, -np.inf, F32)
    share = power(before - top)
    for j in range(n):
        put(out + 4 * j, get(out + 4 * j, F32) * share, F32)
    a = splat(0.0)
    for i in range(0, count, LANES):
        v = exp(add(load(scores + 4 * i, F32), splat(-top)))
        store(scores + 4 * i, v)
        a = add(a, v)
    put(stats, top, F32)
    put(stats + 4, weight * share + total(a), F32)


@kernel
def mix(shares, values, count, stride, out, n, unit):
    """out (n,) += the sum of `count` values, each times its share."""
    size, j = size_of(unit), 0
    while j + LANES <= n:
        a = load(out + 4 * j, F32)
        for r in range(count):
            a = fma(splat(get(shares + 4 * r, F32)), load(values + size * (stride * r + j), unit), a)
        store(out + 4 * j, a)
        j += LANES
    while j < n:
        s = get(out + 4 * j, F32)
        for r in range(count):
            s += get(shares + 4 * r, F32) * get(values + size * (stride * r + j), unit)
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
