"""The few machine instructions that plain Python has no words for, so that kernels.py can be plain Python.

numba compiles Python's numbers and loops. Kernels that read weights as fast as memory gives them, on several threads
at once, need three things more, each a line or two of LLVM:

    lanes      float32 side by side, sixteen in a register of AVX-512, else eight: load, store, splat, fma, total
    addresses  memory by its number, so that one table of integers names every weight of a model
    atomics    a counter that threads draw their work from, and a way to step aside while another one finishes

Weights and caches are float32 or bfloat16: where `unit` is asked for, a float32 or uint16 number of any value says
which, by its type, so that every kernel is compiled for what it reads.
"""
from __future__ import annotations

import math
import os
import platform
from functools import cache

from mindseed.base.hardware import cpu_info

LANES = 16 if "avx512f" in cpu_info().get("flags", "").split() else 8
WIDTH = 4 * LANES                                 # bytes


@cache
def primitives() -> dict[str, object]:
    """The functions by name, to be called from compiled code only. Imports numba."""
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic, models, register_model

    class Lanes(types.Type):
        """LANES float32 in registers."""

        def __init__(self) -> None:
            super().__init__(name="Lanes")

    @register_model(Lanes)
    class LanesModel(models.PrimitiveModel):
        def __init__(self, manager, kind) -> None:
            super().__init__(manager, kind, vector)

    f32, i64, lanes = types.float32, types.int64, Lanes()
    single, bits, word, half = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.IntType(16)
    vector, vector_bits = ir.VectorType(single, LANES), ir.VectorType(bits, LANES)
    found: dict[str, object] = {}

    def define(result, *kinds, unit: bool = False):
        """Make an intrinsic of the decorated emit(builder, *values): arguments are converted to `kinds`, and with
        `unit` the type of a last argument is passed on instead of its value."""
        def wrap(emit):
            def typed(*given):
                def generate(context, builder, signature, values):
                    values = [value if kind is lanes else context.cast(builder, value, source, kind)
                              for value, source, kind in zip(values, given, kinds)]
                    return emit(builder, *values, *given[len(kinds):])
                return result(*given), generate

            arity = len(kinds) + unit
            spelled = {1: lambda context, a: typed(a), 2: lambda context, a, b: typed(a, b),
                       3: lambda context, a, b, c: typed(a, b, c),
                       6: lambda context, a, b, c, d, e, f: typed(a, b, c, d, e, f),
                       7: lambda context, a, b, c, d, e, f, g: typed(a, b, c, d, e, f, g)}[arity]
            spelled.__name__ = emit.__name__
            found[emit.__name__] = intrinsic(spelled)
        return wrap

    def pointer(builder, address, kind):
        return builder.inttoptr(address, kind.as_pointer())

    def call(builder, name: str, result, *values):
        kind = ir.FunctionType(result, [value.type for value in values])
        return builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), values)

    def repeat(number, kind=vector):
        return kind([number] * LANES)

    def widen(builder, address, kinds):
        """bfloat16 is the upper half of a float32."""
        narrow, wide, result, shift = kinds
        loaded = builder.load(pointer(builder, address, narrow), align=2)
        return builder.bitcast(builder.shl(builder.zext(loaded, wide), shift), result)

    # --------------------------------------------------------------------------------------------------------- lanes

    @define(lanes, i64, unit=True)
    def load(builder, address, unit):
        if unit == types.uint16:
            return widen(builder, address, (ir.VectorType(half, LANES), vector_bits, vector, repeat(16, vector_bits)))
        return builder.load(pointer(builder, address, vector), align=4)

    @define(types.void, i64, lanes)
    def store(builder, address, value):
        builder.store(value, pointer(builder, address, vector), align=4)

    def spread(builder, number):
        one = builder.insert_element(vector(ir.Undefined), number, bits(0))
        return builder.shuffle_vector(one, vector(ir.Undefined), repeat(0, vector_bits))

    @define(lanes, f32)
    def splat(builder, number):
        return spread(builder, number)

    @define(lanes, lanes, lanes)
    def add(builder, a, b):
        return builder.fadd(a, b)

    @define(lanes, lanes, lanes)
    def multiply(builder, a, b):
        return builder.fmul(a, b)

    @define(lanes, lanes, lanes)
    def divide(builder, a, b):
        return builder.fdiv(a, b)

    @define(lanes, lanes, lanes, lanes)
    def fma(builder, a, b, c):
        """a * b + c"""
        return call(builder, f"llvm.fma.v{LANES}f32", vector, a, b, c)

    @define(lanes, lanes)
    def root(builder, a):
        return call(builder, f"llvm.sqrt.v{LANES}f32", vector, a)

    @define(lanes, lanes)
    def exp(builder, a):
        """2^n e^f with n whole, which goes into the exponent, and |f| <= log(2) / 2, where a series is short."""
        for beyond, border in (("<", -87.0), (">", 88.0)):                        # a NaN is neither, and stays
            a = builder.select(builder.fcmp_ordered(beyond, a, repeat(border)), repeat(border), a)
        whole = call(builder, f"llvm.rint.v{LANES}f32", vector, builder.fmul(a, repeat(1 / math.log(2))))
        rest, high = a, 0.693359375               # log(2) to nine bits, and what is left
        for part in (high, math.log(2) - high):
            rest = call(builder, f"llvm.fma.v{LANES}f32", vector, whole, repeat(-part), rest)
        series = repeat(1 / math.factorial(7))
        for k in range(6, -1, -1):
            series = call(builder, f"llvm.fma.v{LANES}f32", vector, series, rest, repeat(1 / math.factorial(k)))
        shift = builder.shl(builder.fptosi(whole, vector_bits), repeat(23, vector_bits))
        return builder.bitcast(builder.add(builder.bitcast(series, vector_bits), shift), vector)

    @define(lanes, lanes, lanes)
    def greater(builder, a, b):
        return call(builder, f"llvm.maxnum.v{LANES}f32", vector, a, b)

    def choose(builder, a, b, lanes):
        """The lanes of a, followed by b's, that are asked for."""
        return builder.shuffle_vector(a, b, ir.VectorType(bits, len(lanes))(list(lanes)))

    def fold(builder, value, combine, size=1):
        """Halves upon halves, until `size` lanes are left."""
        width = LANES
        while width > size:
            width //= 2
            value = combine(*(choose(builder, value, value, range(at, at + width)) for at in (0, width)))
        return value

    @define(f32, lanes)
    def total(builder, value):
        return builder.extract_element(fold(builder, value, builder.fadd), bits(0))

    @define(f32, lanes)
    def peak(builder, value):
        """The greatest of the lanes."""
        def combine(a, b):
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)
        return builder.extract_element(fold(builder, value, combine), bits(0))

    @define(types.void, i64, lanes, lanes, lanes, lanes, f32)
    def put_totals(builder, address, a, b, c, d, scale):
        """The sums of four, times `scale`, side by side: quarters are added, then turned so that four of them meet."""
        rows = [fold(builder, value, builder.fadd, 4) for value in (a, b, c, d)]
        for _ in range(2):                        # neighbours are added: 4 rows of 4 lanes, 2 of 4, 1 of 4
            rows = [builder.fadd(choose(builder, x, y, (0, 2, 4, 6)), choose(builder, x, y, (1, 3, 5, 7)))
                    for x, y in zip(rows[::2], rows[1::2])]
        four = ir.VectorType(single, 4)
        times = builder.insert_element(four(ir.Undefined), scale, bits(0))
        sums = builder.fmul(rows[0], choose(builder, times, times, (0, 0, 0, 0)))
        builder.store(sums, pointer(builder, address, four), align=4)

    # ----------------------------------------------------------------------------------------------------- addresses

    @define(f32, i64, unit=True)
    def get(builder, address, unit):
        if unit == types.uint16:
            return widen(builder, address, (half, bits, single, bits(16)))
        return builder.load(pointer(builder, address, single), align=4)

    @define(types.void, i64, f32, unit=True)
    def put(builder, address, number, unit):
        if unit == types.uint16:                                                  # round to nearest, ties to even
            raw = builder.bitcast(number, bits)
            odd = builder.and_(builder.lshr(raw, bits(16)), bits(1))
            raw = builder.lshr(builder.add(raw, builder.add(odd, bits(0x7FFF))), bits(16))
            builder.store(builder.trunc(raw, half), pointer(builder, address, half), align=2)
        else:
            builder.store(number, pointer(builder, address, single), align=4)

    @define(i64, unit=True)
    def size_of(builder, unit):
        return word(unit.bitwidth // 8)

    @define(i64, i64)
    def integer(builder, address):
        return builder.load(pointer(builder, address, word), align=8)

    def touch(builder, address):
        call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer(builder, address, ir.IntType(8)), bits(0), bits(3),
             bits(1))

    @define(types.void, i64)
    def prefetch(builder, address):
        """Have the cache line at this address fetched; it may lie outside of any memory we own."""
        touch(builder, address)

    # --------------------------------------------------------------------------------------------------------- tiles

    def tile(builder, rows, groups, columns, weights, step, x, n, gap, out, out_gap):
        """`rows` rows of float32 weights, `step` bytes apart, times `groups` groups of vectors (n, W), `gap` bytes
        apart, with all sums in registers: out (rows, W) for every group, `out_gap` bytes apart.

        A number of the weights is looked up once and multiplied into all groups. `columns` columns are written out at a
        time, and meanwhile part of the next rows is fetched: 16 columns are a cache line, so every fourth row.
        """
        def times(value, number):
            return builder.mul(value, word(number))

        def loop(first, columns, sums):
            """Add columns from `first` on, as long as there are so many; (where it ended, sums)."""
            before, head = builder.block, builder.append_basic_block("columns")
            body, end = builder.append_basic_block("add"), builder.append_basic_block("added")
            builder.branch(head)
            builder.position_at_end(head)
            j, kept = builder.phi(word), [builder.phi(vector) for _ in sums]
            builder.cbranch(builder.icmp_signed("<=", builder.add(j, word(columns)), n), body, end)
            builder.position_at_end(body)
            at, new = builder.add(weights, times(j, 4)), list(kept)
            vectors = [[builder.load(pointer(builder, builder.add(builder.add(x, times(builder.add(j, word(u)), WIDTH)),
                                                                  times(gap, g)), vector), align=4)
                        for g in range(groups)] for u in range(columns)]
            if rows >= 8 and columns == 4:
                turn = builder.and_(builder.lshr(j, word(2)), word(3))
                for row in range(rows, 2 * rows, 4):
                    touch(builder, builder.add(at, builder.mul(step, builder.add(turn, word(row)))))
            for r in range(rows):
                for u in range(columns):
                    number = builder.load(pointer(builder, builder.add(at, word(4 * u)), single), align=4)
                    for g in range(groups):
                        i = r * groups + g
                        new[i] = call(builder, f"llvm.fma.v{LANES}f32", vector, spread(builder, number), vectors[u][g],
                                      new[i])
                at = builder.add(at, step)
            for phi, start, value in ((j, first, builder.add(j, word(columns))), *zip(kept, sums, new)):
                phi.add_incoming(start, before)
                phi.add_incoming(value, body)
            builder.branch(head)
            builder.position_at_end(end)
            return j, kept

        j, sums = loop(word(0), columns, [repeat(0.0)] * (rows * groups))
        if columns > 1:
            j, sums = loop(j, 1, sums)
        for i, value in enumerate(sums):
            target = builder.add(out, builder.add(word(WIDTH * (i // groups)), times(out_gap, i % groups)))
            builder.store(value, pointer(builder, target, vector), align=4)

    @define(types.void, *[i64] * 7)
    def tile_of_eight(builder, *given):
        tile(builder, 8, 1, 4, *given)

    @define(types.void, *[i64] * 7)
    def tile_of_eight_for_two(builder, *given):
        tile(builder, 8, 2, 4, *given)

    @define(types.void, *[i64] * 7)
    def tile_of_one(builder, *given):
        tile(builder, 1, 1, 1, *given)

    # ------------------------------------------------------------------------------------------------------- atomics

    @define(i64, i64, i64)
    def fetch_add(builder, address, number):
        """Add to a counter; what it said before."""
        return builder.atomic_rmw("add", pointer(builder, address, word), number, "seq_cst")

    @define(i64, i64)
    def read(builder, address):
        """What a counter says; whatever was written before it was set is visible from here on."""
        return builder.load_atomic(pointer(builder, address, word), "acquire", 8)

    @define(types.boolean, i64, i64, i64)
    def compare_swap(builder, address, old, new):
        """Write `new` if `old` is still there; whether it was."""
        pair = builder.cmpxchg(pointer(builder, address, word), old, new, "seq_cst", "seq_cst")
        return builder.extract_value(pair, 1)

    @define(types.void, i64)
    def pause(builder, _):
        """Tell the core that this thread waits in a loop, so that its other thread runs faster."""
        if platform.machine().lower() in ("x86_64", "amd64"):
            call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        elif platform.machine().lower() in ("aarch64", "arm64"):
            call(builder, "llvm.aarch64.hint", ir.VoidType(), bits(1))

    @define(types.void, i64)
    def step_aside(builder, _):
        """Let another thread have this core, if one waits for it."""
        call(builder, "sched_yield" if os.name == "posix" else "SwitchToThread", bits)

    return found
