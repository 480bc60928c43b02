"""What a thread does of a decoding step: all layers of a model of grouped queries and SwiGLU, phase by phase.

The cache is paged: keys and values of a layer are (slots, G, K), and token number i of a row lies in slot
table[i // block_size] * block_size + i % block_size, where `table` is the row's list of blocks. Shapes and addresses
come in two tables of integers, so that one compiled function runs every model; fused.py fills them in.
"""
from __future__ import annotations

from enum import IntEnum, auto

import numpy as np

from mindseed.infer.attention import attend, join, rotate
from mindseed.infer.jit import entry, kernel
from mindseed.infer.kernels import (F32, add_to, close, draw, enter, finish, gate_with, gather, groups_of, norm_row,
                                    normalise, piece_rows, pieces, product, scatter, spread, wait, widen, width_of)


class Plan(IntEnum):
    """What a step is about, one integer each; sizes of memory are in float32 numbers. W and groups: see
    kernels.py."""

    ROWS = 0                         # B
    DIM = auto()
    VOCAB = auto()
    LAYERS = auto()
    BLOCK = auto()                   # tokens to a block of the cache
    SPAN = auto()                    # keys to a piece of attention
    PARTS = auto()                   # pieces of the longest row, as `begin` finds it
    LENGTH = auto()                  # positions that the rotary tables know
    IDS = auto()                     # (B,) int64; 0: begin with the hidden vectors, past all layers
    POSITIONS = auto()               # (B,) int64
    EMBED = auto()                   # (V, D)
    NORM = auto()                    # (D,)
    HEAD = auto()                    # (V, D)
    HIDDEN = auto()                  # (B, D), written at the end or read at the start
    LOGITS = auto()                  # (B, V); 0: not wanted
    STATE = auto()                   # which step this is, and how many helpers are inside
    COUNTERS = auto()
    ARRIVED = auto()                 # (B, MOST_KV) int64, finished parts of an attention
    X = auto()                       # (groups, D, W), the residual stream
    QKV = auto()                     # (groups, rows of q, k and v, W)
    MIXED = auto()                   # (B, H K), what attention found
    WIDE = auto()                    # (groups, F, W)
    PARTIAL = auto()                 # (B, MOST_KV, PARTS, PIECE), what `attend` leaves
    PIECE = auto()
    MOST_KV = auto()                 # most key heads of a layer
    PRIVATE = auto()                 # memory of each thread: an input, an output, the rest
    PRIVATE_SIZE = auto()
    INPUT_SIZE = auto()
    OUTPUT_SIZE = auto()


class Layer(IntEnum):
    """A layer in integers: shapes, then addresses."""

    HEADS = 0
    KV_HEADS = auto()
    HEAD_DIM = auto()
    FFN_DIM = auto()
    WINDOW = auto()                  # 0: none
    INTERLEAVED = auto()
    MIXER_NORM = auto()
    Q = auto()
    K = auto()
    V = auto()
    Q_NORM = auto()                  # 0: none
    K_NORM = auto()
    O = auto()                       # noqa: E741
    FFN_NORM = auto()
    GATE = auto()
    UP = auto()
    DOWN = auto()
    COS = auto()                     # (positions, K / 2); 0: queries (B, H, K) are ready, their keys in the cache
    SIN = auto()
    KEYS = auto()                    # (slots, G, K)
    VALUES = auto()
    BLOCKS = auto()                  # how many blocks there are in memory
    TABLE = auto()                   # (B, n) int64
    TABLE_WIDTH = auto()


class Scale(IntEnum):
    """The real numbers of a layer; one more row holds the last norm's."""

    MIXER_EPS = 0
    FFN_EPS = auto()
    Q_EPS = auto()
    K_EPS = auto()
    SCORES = auto()


# ------------------------------------------------------------------------------------------------- what a thread does

@entry
def begin(plan, layers, unit):
    """Check that no address will lie outside of its memory, divide attention, and write the embeddings. Returns 0, or
    what is wrong: 1 an id, 2 a position, 3 a table, 4 the rotary tables are too short."""
    rows, longest = plan[Plan.ROWS], 0
    if not plan[Plan.IDS]:
        gather(plan[Plan.HIDDEN], plan[Plan.DIM], rows, plan[Plan.X])
        return 0
    for b in range(rows):
        id = integer(plan[Plan.IDS] + 8 * b)
        if id < 0 or id >= plan[Plan.VOCAB]:
            return 1
    wrong = misplaced(plan, layers)
    if wrong:
        return wrong
    for b in range(rows):
        longest = max(longest, integer(plan[Plan.POSITIONS] + 8 * b) + 1)
    if longest > plan[Plan.LENGTH]:
        return 4
    embed(plan, unit)
    plan[Plan.PARTS] = pieces(longest, plan[Plan.SPAN])
    return 0


@entry
def begin_attention(plan, layers):
    """The same for attention alone."""
    wrong, longest = misplaced(plan, layers), 0
    for b in range(plan[Plan.ROWS]):
        longest = max(longest, integer(plan[Plan.POSITIONS] + 8 * b) + 1)
    plan[Plan.PARTS] = pieces(longest, plan[Plan.SPAN])
    return wrong


@kernel
def first_key(layer, position):
    window = layer[Layer.WINDOW]
    return max(position + 1 - window, 0) if window else 0


@kernel
def misplaced(plan, layers):
    """0, or what is wrong: 2 a position, 3 a table."""
    block = plan[Plan.BLOCK]
    for index in range(plan[Plan.LAYERS]):
        layer = layers[index]
        width = layer[Layer.TABLE_WIDTH]
        for b in range(plan[Plan.ROWS]):
            position = integer(plan[Plan.POSITIONS] + 8 * b)
            if position < 0 or position // block >= width:
                return 2
            for j in range(first_key(layer, position) // block, position // block + 1):
                at = integer(layer[Layer.TABLE] + 8 * (width * b + j))
                if at < 0 or at >= layer[Layer.BLOCKS]:
                    return 3
    return 0


@kernel
def embed(plan, unit):
    rows, dim = plan[Plan.ROWS], plan[Plan.DIM]
    for b in range(groups_of(rows) * width_of(rows)):
        id = integer(plan[Plan.IDS] + 8 * b) if b < rows else 0
        spread(plan[Plan.EMBED] + size_of(unit) * dim * id, b, dim, rows, plan[Plan.X], unit)


@entry
def decode(plan, layers, scales, generation, thread, unit, kv_unit):
    """What one of the threads does of a step; thread 0 is the caller, who returns when all is done."""
    if thread and not enter(plan[Plan.STATE], generation):
        return
    memory = plan[Plan.PRIVATE] + 4 * plan[Plan.PRIVATE_SIZE] * thread
    out = memory + 4 * plan[Plan.INPUT_SIZE]
    spare = out + 4 * plan[Plan.OUTPUT_SIZE]
    rows, dim, count = plan[Plan.ROWS], plan[Plan.DIM], plan[Plan.LAYERS]
    for index in range(count):
        layer, scale = layers[index], scales[index]
        queries_keys_values(plan, layer, scale, 5 * index, memory, out, spare, unit)
        attention(plan, layer, scale, 5 * index + 1, spare, kv_unit, unit)
        project(plan, layer[Layer.O], plan[Plan.MIXED], layer[Layer.HEADS] * layer[Layer.HEAD_DIM], 5 * index + 2,
                memory, out, spare, unit)
        gated(plan, layer, scale, 5 * index + 3, memory, out, spare, unit)
        project(plan, layer[Layer.DOWN], plan[Plan.WIDE], layer[Layer.FFN_DIM], 5 * index + 4, memory, out, spare, unit)
    if plan[Plan.LOGITS]:
        logits(plan, scales[count], 5 * count, memory, out, spare, unit)
    if thread:
        fetch_add(plan[Plan.STATE], -1)
        return
    if plan[Plan.IDS]:
        normalise(plan[Plan.X], plan[Plan.NORM], scales[count, Scale.MIXER_EPS], dim, rows, memory, unit)
        scatter(memory, rows, dim, plan[Plan.HIDDEN], dim)
    close(plan[Plan.STATE])


@entry
def attend_rows(plan, layers, scales, generation, thread, unit, kv_unit):
    """The same for attention alone."""
    if thread and not enter(plan[Plan.STATE], generation):
        return
    memory = plan[Plan.PRIVATE] + 4 * plan[Plan.PRIVATE_SIZE] * thread
    attention(plan, layers[0], scales[0], 0, memory, kv_unit, unit)
    if thread:
        fetch_add(plan[Plan.STATE], -1)
    else:
        close(plan[Plan.STATE])


@entry
def settle(plan):
    """After an interruption of thread 0: let no more threads in, and wait for those inside."""
    close(plan[Plan.STATE])


@kernel
def queries_keys_values(plan, layer, scale, phase, x, out, spare, unit):
    rows, dim, counters = plan[Plan.ROWS], plan[Plan.DIM], plan[Plan.COUNTERS]
    width = width_of(rows)
    of_q, of_k = layer[Layer.HEADS] * layer[Layer.HEAD_DIM], layer[Layer.KV_HEADS] * layer[Layer.HEAD_DIM]
    step = piece_rows(dim, unit)
    in_q, in_k = pieces(of_q, step), pieces(of_k, step)
    todo = in_q + 2 * in_k
    ready = False
    piece = draw(counters, phase)
    while piece < todo:
        if not ready:
            normalise(plan[Plan.X], layer[Layer.MIXER_NORM], scale[Scale.MIXER_EPS], dim, rows, x, unit)
            ready = True
        if piece < in_q:
            weight, at, before, count = layer[Layer.Q], piece, 0, of_q
        elif piece < in_q + in_k:
            weight, at, before, count = layer[Layer.K], piece - in_q, of_q, of_k
        else:
            weight, at, before, count = layer[Layer.V], piece - in_q - in_k, of_q + of_k, of_k
        first, last = step * at, min(count, step * at + step)
        product(weight, first, last, x, dim, rows, out, spare, unit)
        n = width * (last - first)
        for group in range(groups_of(rows)):
            target = plan[Plan.QKV] + 4 * width * ((of_q + 2 * of_k) * group + before + first)
            widen(out + 4 * n * group, n, target, F32)
        finish(counters, phase)
        piece = draw(counters, phase)
    wait(counters, phase, todo)


@kernel
def attention(plan, layer, scale, phase, memory, kv_unit, unit):
    """A piece is one row, one key head with its queries, and one span of keys; whoever finishes the last span of a head
    joins them."""
    counters, most, parts = plan[Plan.COUNTERS], plan[Plan.MOST_KV], plan[Plan.PARTS]
    G, K = layer[Layer.KV_HEADS], layer[Layer.HEAD_DIM]
    heads = layer[Layer.HEADS] // G
    todo = plan[Plan.ROWS] * G * parts
    piece = draw(counters, phase)
    while piece < todo:
        b, g, part = piece // (G * parts), piece // parts % G, piece % parts
        partial = plan[Plan.PARTIAL] + 4 * plan[Plan.PIECE] * parts * (most * b + g)
        position = integer(plan[Plan.POSITIONS] + 8 * b)
        first = max(first_key(layer, position), plan[Plan.SPAN] * part)
        last = min(position + 1, plan[Plan.SPAN] * (part + 1))
        own = partial + 4 * plan[Plan.PIECE] * part
        if first < last:
            load_queries(plan, layer, scale, b, g, position, memory, unit)
            if last == position + 1 and layer[Layer.COS]:
                append(plan, layer, scale, b, g, position, memory + 4 * heads * K, kv_unit, unit)
            attend(memory, heads, K, layer[Layer.KEYS] + size_of(kv_unit) * K * g,
                   layer[Layer.VALUES] + size_of(kv_unit) * K * g, G * K,
                   layer[Layer.TABLE] + 8 * layer[Layer.TABLE_WIDTH] * b, plan[Plan.BLOCK], first, last,
                   scale[Scale.SCORES], memory + 4 * heads * K, own, kv_unit)
        else:
            for h in range(heads):
                put(own + 4 * (heads * K + 2 * h), -np.inf, F32)
                put(own + 4 * (heads * K + 2 * h + 1), 0.0, F32)
        arrived = plan[Plan.ARRIVED] + 8 * (most * b + g)
        if fetch_add(arrived, 1) == parts - 1:
            fetch_add(arrived, -parts)
            join(partial, parts, plan[Plan.PIECE], heads, K, plan[Plan.MIXED] + 4 * heads * K * (G * b + g))
        finish(counters, phase)
        piece = draw(counters, phase)
    wait(counters, phase, todo)


@kernel
def load_queries(plan, layer, scale, b, g, position, out, unit):
    """The queries of a key head (heads, K), normalised and rotated."""
    K = layer[Layer.HEAD_DIM]
    heads = layer[Layer.HEADS] // layer[Layer.KV_HEADS]
    if not layer[Layer.COS]:
        widen(plan[Plan.QKV] + 4 * K * (layer[Layer.HEADS] * b + heads * g), heads * K, out, F32)
        return
    for h in range(heads):
        fetch(plan, layer, b, K * (heads * g + h), out + 4 * K * h)
        if layer[Layer.Q_NORM]:
            norm_row(out + 4 * K * h, layer[Layer.Q_NORM], scale[Scale.Q_EPS], K, out + 4 * K * h, unit)
        turn(layer, position, out + 4 * K * h)


@kernel
def append(plan, layer, scale, b, g, position, spare, kv_unit, unit):
    """Write the new key and value of a row into the cache."""
    G, K, block = layer[Layer.KV_HEADS], layer[Layer.HEAD_DIM], plan[Plan.BLOCK]
    table = layer[Layer.TABLE] + 8 * layer[Layer.TABLE_WIDTH] * b
    slot = integer(table + 8 * (position // block)) * block + position % block
    at = size_of(kv_unit) * K * (G * slot + g)
    fetch(plan, layer, b, K * (layer[Layer.HEADS] + g), spare)
    if layer[Layer.K_NORM]:
        norm_row(spare, layer[Layer.K_NORM], scale[Scale.K_EPS], K, spare, unit)
    turn(layer, position, spare)
    for j in range(K):
        put(layer[Layer.KEYS] + at + size_of(kv_unit) * j, get(spare + 4 * j, F32), kv_unit)
    fetch(plan, layer, b, K * (layer[Layer.HEADS] + G + g), spare)
    for j in range(K):
        put(layer[Layer.VALUES] + at + size_of(kv_unit) * j, get(spare + 4 * j, F32), kv_unit)


@kernel
def fetch(plan, layer, b, first, out):
    """K of the numbers of q, k and v of one row."""
    width = width_of(plan[Plan.ROWS])
    total_rows = (layer[Layer.HEADS] + 2 * layer[Layer.KV_HEADS]) * layer[Layer.HEAD_DIM]
    source = plan[Plan.QKV] + 4 * (width * (total_rows * (b // width) + first) + b % width)
    for j in range(layer[Layer.HEAD_DIM]):
        put(out + 4 * j, get(source + 4 * width * j, F32), F32)


@kernel
def turn(layer, position, x):
    half = layer[Layer.HEAD_DIM] // 2
    rotate(x, layer[Layer.COS] + 4 * half * position, layer[Layer.SIN] + 4 * half * position, 2 * half,
           layer[Layer.INTERLEAVED])


@kernel
def project(plan, weight, source, n, phase, x, out, spare, unit):
    """The residual stream += weight (D, n) times the source, MIXED or WIDE."""
    rows, dim, counters = plan[Plan.ROWS], plan[Plan.DIM], plan[Plan.COUNTERS]
    width = width_of(rows)
    step = piece_rows(n, unit)
    todo = pieces(dim, step)
    ready = width == 1 or source != plan[Plan.MIXED]                              # (B, n) is (groups, n, 1) if W = 1
    if ready:
        x = source
    piece = draw(counters, phase)
    while piece < todo:
        if not ready:
            gather(source, n, rows, x)
            ready = True
        first, last = step * piece, min(dim, step * piece + step)
        product(weight, first, last, x, n, rows, out, spare, unit)
        size = width * (last - first)
        for group in range(groups_of(rows)):
            add_to(plan[Plan.X] + 4 * width * (dim * group + first), out + 4 * size * group, size)
        finish(counters, phase)
        piece = draw(counters, phase)
    wait(counters, phase, todo)


@kernel
def gated(plan, layer, scale, phase, x, out, spare, unit):
    """silu(gate) * up, in groups."""
    rows, dim, counters, count = plan[Plan.ROWS], plan[Plan.DIM], plan[Plan.COUNTERS], layer[Layer.FFN_DIM]
    width = width_of(rows)
    step = piece_rows(dim, unit)
    todo = pieces(count, step)
    ready = False
    piece = draw(counters, phase)
    while piece < todo:
        if not ready:
            normalise(plan[Plan.X], layer[Layer.FFN_NORM], scale[Scale.FFN_EPS], dim, rows, x, unit)
            ready = True
        first, last = step * piece, min(count, step * piece + step)
        groups, size = groups_of(rows), width * (last - first)
        product(layer[Layer.GATE], first, last, x, dim, rows, out, spare, unit)
        product(layer[Layer.UP], first, last, x, dim, rows, out + 4 * size * groups, spare, unit)
        for group in range(groups):
            gate_with(out + 4 * size * group, out + 4 * size * (groups + group), size,
                      plan[Plan.WIDE] + 4 * width * (count * group + first))
        finish(counters, phase)
        piece = draw(counters, phase)
    wait(counters, phase, todo)


@kernel
def logits(plan, scale, phase, x, out, spare, unit):
    rows, dim, counters, vocab = plan[Plan.ROWS], plan[Plan.DIM], plan[Plan.COUNTERS], plan[Plan.VOCAB]
    step = piece_rows(dim, unit)
    todo = pieces(vocab, step)
    ready = not plan[Plan.IDS]
    if ready:                                                                     # given hidden vectors are normalised
        x = plan[Plan.X]
    piece = draw(counters, phase)
    while piece < todo:
        if not ready:
            normalise(plan[Plan.X], plan[Plan.NORM], scale[Scale.MIXER_EPS], dim, rows, x, unit)
            ready = True
        first, last = step * piece, min(vocab, step * piece + step)
        product(plan[Plan.HEAD], first, last, x, dim, rows, out, spare, unit)
        scatter(out, rows, last - first, plan[Plan.LOGITS] + 4 * first, vocab)
        finish(counters, phase)
        piece = draw(counters, phase)
    wait(counters, phase, todo)
