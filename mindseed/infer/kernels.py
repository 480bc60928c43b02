"""Decoding on a CPU in kernels of our own: everything between token ids and logits, written as plain Python loops over
memory and compiled by numba.

One new token per row reads every weight once, so a step takes as long as memory needs to give them, if nothing else
gets in the way. Here nothing does: one call runs all layers. Its threads draw pieces of work (some rows of a matrix,
one row's heads) from a counter per phase, and nobody goes on to the next phase before all pieces of this one are done.
Any number of threads may take part, come late or not at all: who is there does what there is, so no thread waits for
one that has not started. There is no thread pool of numba's in it, which would compete with torch's for the cores.

Vectors lie in groups of W rows, (groups, dim, W). Few rows are groups of their own (W = 1): products are inner products
along a row of the weights. More rows lie side by side, as many to a group as a register has lanes: every weight is then
multiplied into all of them at once, straight from where it lies in memory.

Memory is given by its address: the caller checks bounds and keeps the arrays alive.
"""
from __future__ import annotations

import numpy as np

from mindseed.infer.jit import kernel
from mindseed.infer.simd import LANES, WIDTH

F32 = np.float32(0)                               # the unit of what is not weights or cache
CHUNK = 32768                                     # bytes of weights to a piece of work
AHEAD = 4096                                      # bytes that a row of weights is fetched ahead of its use
FEW = 6                                           # rows that are groups of their own
TWO = LANES == 16                                 # whether there are registers for two groups at once
LINE = 128                                        # bytes between counters: each has cache lines of its own
PATIENCE = 2000                                   # looks at a counter before the core is offered to others


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
def look_again(looks):
    """Between two looks at a counter that another thread will change."""
    if looks < PATIENCE:
        pause(0)
    else:
        step_aside(0)


@kernel
def close(state):
    """Let no more threads in, and wait for those inside."""
    fetch_add(state, 1 << 16)
    looks = 0
    while read(state) & 0xFFFF:
        look_again(looks)
        looks += 1


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
        look_again(looks)
        looks += 1


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
        for line in range(size * LANES // 16):
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
def two_dots(w, x, y, n, unit):
    """One row of weights times two vectors."""
    size = size_of(unit)
    a = splat(0.0)
    b, c, d = a, a, a
    j = 0
    while j + 2 * LANES <= n:
        p = w + size * j
        for line in range(size * LANES // 32):
            prefetch(p + AHEAD + 64 * line)
        u, v = load(p, unit), load(p + size * LANES, unit)
        a = fma(u, load(x + 4 * j, F32), a)
        b = fma(u, load(y + 4 * j, F32), b)
        c = fma(v, load(x + 4 * j + WIDTH, F32), c)
        d = fma(v, load(y + 4 * j + WIDTH, F32), d)
        j += 2 * LANES
    s, t = total(add(a, c)), total(add(b, d))
    while j < n:
        v = get(w + size * j, unit)
        s += v * get(x + 4 * j, F32)
        t += v * get(y + 4 * j, F32)
        j += 1
    return s, t


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
    """Rows `first` to `last` of the weights (.., n) times x (groups, n, W): out (groups, last - first, W). Where rows
    lie side by side, narrow weights are widened into `spare` first."""
    size, count, groups = size_of(unit), last - first, groups_of(rows)
    w += size * n * first
    if width_of(rows) == 1:
        for r in range(count):
            source, group = w + size * n * r, 0
            while group + 2 <= groups:
                s, t = two_dots(source, x + 4 * n * group, x + 4 * n * (group + 1), n, unit)
                put(out + 4 * (count * group + r), s, F32)
                put(out + 4 * (count * group + count + r), t, F32)
                group += 2
            if group < groups:
                put(out + 4 * (count * group + r), dot(source, x + 4 * n * group, n, unit), F32)
        return
    if size != 4:
        widen(w, count * n, spare, unit)
        w = spare
    group, whole, gap, out_gap = 0, count // 8 * 8, WIDTH * n, WIDTH * count
    while group < groups:
        source, target = x + gap * group, out + out_gap * group
        both = TWO and group + 2 <= groups
        for r in range(0, whole, 8):
            if both:
                tile_of_eight_for_two(w + 4 * n * r, 4 * n, source, n, gap, target + WIDTH * r, out_gap)
            else:
                tile_of_eight(w + 4 * n * r, 4 * n, source, n, gap, target + WIDTH * r, out_gap)
        for r in range(whole, count):
            tile_of_one(w + 4 * n * r, 4 * n, source, n, gap, target + WIDTH * r, out_gap)
            if both:
                tile_of_one(w + 4 * n * r, 4 * n, source + gap, n, gap, target + out_gap + WIDTH * r, out_gap)
        group += 2 if both else 1


@kernel
def piece_rows(n, unit):
    """How many rows of n weights make a piece of work."""
    return max(8, CHUNK // (n * size_of(unit)) // 8 * 8)


@kernel
def pieces(rows, size):
    return (rows + size - 1) // size


# --------------------------------------------------------------------------------------------------- vectors in groups

@kernel
def width_of(rows):
    return 1 if rows <= FEW else LANES


@kernel
def groups_of(rows):
    return rows if rows <= FEW else pieces(rows, LANES)


@kernel
def normalise(x, weight, eps, n, rows, out, unit):
    """RMSNorm of x (groups, n, W)."""
    size, width = size_of(unit), width_of(rows)
    for group in range(groups_of(rows)):
        p, q = x + 4 * width * n * group, out + 4 * width * n * group
        if width == 1:
            norm_row(p, weight, eps, n, q, unit)
            continue
        a = splat(0.0)
        for j in range(n):
            v = load(p + WIDTH * j, F32)
            a = fma(v, v, a)
        r = divide(splat(1.0), root(fma(a, splat(np.float32(1 / n)), splat(eps))))
        for j in range(n):
            store(q + WIDTH * j, multiply(multiply(load(p + WIDTH * j, F32), r), splat(get(weight + size * j, unit))))


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
def spread(x, b, n, rows, out, unit):
    """Put a vector x (n,) into groups (groups, n, W) as row b, or zeros if b is a row that only fills a group up."""
    size, width = size_of(unit), width_of(rows)
    out += 4 * (width * n * (b // width) + b % width)
    if width == 1:
        widen(x, n, out, unit)
        return
    for j in range(n):
        put(out + WIDTH * j, get(x + size * j, unit) if b < rows else F32, F32)


@kernel
def gather(x, n, rows, out):
    """Vectors x (rows, n) into groups."""
    for b in range(groups_of(rows) * width_of(rows)):
        spread(x + 4 * n * b, b, n, rows, out, F32)


@kernel
def scatter(x, rows, n, out, stride):
    """Groups (groups, n, W) as vectors out (rows, n), `stride` numbers apart."""
    width = width_of(rows)
    for b in range(rows):
        p, q = x + 4 * (width * n * (b // width) + b % width), out + 4 * stride * b
        if width == 1:
            widen(p, n, q, F32)
            continue
        for j in range(n):
            put(q + 4 * j, get(p + WIDTH * j, F32), F32)
