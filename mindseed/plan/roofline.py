"""How long kernels take: arithmetic or memory, whichever is slower (the roofline model, Williams et al., 2009).

Products. A GPU cuts the result into tiles and gives every unit one at a time. What does not fill a tile, and units that
are idle in the last round, are lost; so is the beginning and end of every tile's sum, which short sums feel:

    rate = peak x attained x (tiles that count / tiles that run) x k / (k + RAMP)

where the best of a few tile shapes is taken. No product is faster than its operands can be read and its result written.
A machine that was measured has a table of rates instead, between whose entries the logarithm of the rate is linear in
the logarithms of m, k and n.

Everything else in a step (norms, rotations, activations, residual sums) reads and writes memory and computes next to
nothing; it takes its bytes through the bandwidth, once if fused, `EAGER` times if written as plain expressions.
"""
from __future__ import annotations

import functools
import math
from bisect import bisect_right

from mindseed.plan.machines import COMPILED, EAGER, IN_FP8, MEMORY, Machine

TILES = ((256, 128, 1.0), (128, 128, 0.95), (128, 64, 0.8), (64, 64, 0.6))       # rows, columns, rate against the first
RAMP = 128                                        # length of a sum at which half the rate is reached
CONVERSION = 5                                    # bytes: an operand is read for its largest entry, and to be converted
SIZES = {"fp8": 1, "bf16": 2, "fp16": 2, "fp32": 4, "tf32": 4}


@functools.lru_cache(maxsize=1 << 16)
def product_s(board: Machine, precision: str, m: float, k: int, n: int, count: int = 1) -> float:
    """Seconds for `count` products (m, k) x (k, n)."""
    if min(m, k, n, count) <= 0:
        return 0.0
    flops = 2.0 * m * k * n
    if board.rates:
        return count * flops / measured_rate(board, precision, m, k, n)
    rate = board.peaks[precision] * board.attained * tile_share(board.units, m, n, count) * k / (k + RAMP)
    through, narrow = board.bandwidth * MEMORY, precision == "fp8"
    moved, scaled = SIZES[precision] * (m * k + k * n + m * n), CONVERSION * (m * k + k * n) * narrow
    return count * (max(flops / (rate * (IN_FP8 if narrow else 1)), moved / through) + scaled / through)


def tile_share(units: int, m: float, n: int, count: int = 1) -> float:
    """The part of the units' time that is spent on entries of the result."""
    if not units:
        return 1.0
    best = 0.0
    for rows, columns, speed in TILES:
        tiles = math.ceil(m / rows) * math.ceil(n / columns) * count
        rounds = math.ceil(tiles / units)
        best = max(best, speed * m * n * count / (rounds * units * rows * columns))
    return best


def measured_rate(board: Machine, precision: str, m: float, k: int, n: int) -> float:
    """Between the sizes that were timed; beyond them as at the nearest."""
    table = board.rates.get(precision) or next(iter(board.rates.values()))
    axes, known = grid(table)
    rate = 0.0
    spans = [between(axis, math.log2(max(size, 1))) for axis, size in zip(axes, (m, k, n))]
    for a, wa in spans[0]:
        for b, wb in spans[1]:
            for c, wc in spans[2]:
                rate += wa * wb * wc * known[a, b, c]
    return 2.0 ** rate


@functools.lru_cache(maxsize=64)
def grid(table: tuple[tuple[int, int, int, float], ...]) -> tuple[list[list[float]], dict]:
    axes = [sorted({math.log2(row[i]) for row in table}) for i in range(3)]
    return axes, {tuple(math.log2(x) for x in row[:3]): math.log2(row[3]) for row in table}


def between(axis: list[float], x: float) -> list[tuple[float, float]]:
    """The neighbours of x and their weights."""
    x = min(max(x, axis[0]), axis[-1])
    at = min(bisect_right(axis, x), len(axis) - 1)
    low, high = axis[max(at - 1, 0)], axis[at]
    share = (x - low) / (high - low) if high > low else 0.0
    return [(low, 1 - share), (high, share)] if share else [(low, 1.0)]


def moved_s(board: Machine, moved: float, *, compiled: bool) -> float:
    """Seconds for operations that would move so many bytes if they were fused."""
    passes = COMPILED if compiled else EAGER if board.passes is None else board.passes
    return passes * moved / (board.bandwidth * MEMORY)


def attention_s(board: Machine, precision: str, tokens: int, forward: float, backward: float) -> tuple[float, float]:
    """Seconds for so many FLOPs of attention over rows of `tokens`, forward and backward."""
    if board.attention_rates:
        axis = [math.log2(row[0]) for row in board.attention_rates]
        spans = between(axis, math.log2(max(tokens, 1)))
        rates = [2.0 ** sum(w * math.log2(board.attention_rates[axis.index(at)][i]) for at, w in spans) for i in (1, 2)]
        return forward / rates[0], backward / rates[1]
    top = board.peaks["bf16" if precision == "fp8" else precision]
    return forward / (top * board.attention[0]), backward / (top * board.attention[1])
