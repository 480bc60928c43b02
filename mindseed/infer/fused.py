"""A decoding step and attention over a paged cache, in kernels of our own on the CPU (kernels.py, onepass.py).

This half is Python: it knows which models the kernels compute, keeps the memory they work in, fills in their tables of
shapes and addresses, and hands the work to threads. The weights are the model's own, so what is written into them is
seen at once. Needs numba (`pip install 'mindseed[fast]'`), see `available`.
"""
from __future__ import annotations

import math
import os
import queue
import threading
from typing import Callable

import numpy as np
import torch
from torch import Tensor

from mindseed.infer.kernels import CHUNK, F32, LANES, LINE, TILE, available, compiled
from mindseed.infer.onepass import Layer, Plan, Scale
from mindseed.models.lm import LM, Block
from mindseed.nn.ffn import SwiGLU
from mindseed.nn.gqa import GQA
from mindseed.nn.linear import Linear
from mindseed.nn.norm import RMSNorm
from mindseed.nn.rope import RopeConfig, rope_tables

__all__ = ["FusedStep", "available", "fits", "paged_attention"]

SPAN = 256                                        # keys to a piece of attention where rows are few
UNITS = {torch.float32: np.float32(0), torch.bfloat16: np.uint16(0)}
WRONG = {1: "an id is not in the vocabulary", 2: "a position is not in its table", 3: "a table names no block"}
Window = int | None


def fits(model: LM) -> bool:
    """Whether `FusedStep` computes what this model does: every block exactly grouped queries, SwiGLU and RMSNorm before
    each, no hooks, no adapters, on the CPU, in float32 or bfloat16."""
    weights = {p.dtype for p in model.parameters()}, {p.device.type for p in model.parameters()}
    return (available() and len(weights[0]) == 1 and weights[0] <= set(UNITS) and weights[1] == {"cpu"}
            and type(model) is LM and model.place is None and type(model.norm) is RMSNorm
            and not torch.is_autocast_enabled("cpu") and all(known(block) for block in model.blocks)
            and all(p.is_contiguous() for p in model.parameters()))


def known(block: Block) -> bool:
    parts = {block.mixer: GQA, block.ffn: SwiGLU, block.mixer_norm: RMSNorm, block.ffn_norm: RMSNorm}
    if type(block) is not Block or block.placement != "pre" or any(
            type(part) is not kind for part, kind in parts.items()):
        return False
    rope, mixer, ffn = block.mixer.config.rope, block.mixer, block.ffn
    linears = (mixer.q, mixer.k, mixer.v, mixer.o, ffn.gate, ffn.up, ffn.down)
    return rope is not None and not rope.depends_on_length and all(type(linear) is Linear for linear in linears) and (
        not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules()))


class Crew:
    """Threads that help with a piece of work, one fewer than torch uses. They sleep between two calls; the caller does
    not wait for one that has not woken up."""

    def __init__(self) -> None:
        self.jobs: list[queue.SimpleQueue] = []
        self.lock = threading.Lock()

    def call(self, function: Callable, *arguments, units: tuple, state: np.ndarray, threads: int) -> None:
        """function(*arguments, generation, thread, *units) in all threads, in this one as thread 0."""
        generation = int(state[0]) >> 16
        if len(self.jobs) < threads - 1:
            self.hire(threads - 1)
        for thread in range(1, threads):
            self.jobs[thread - 1].put((function, (*arguments, generation, thread, *units), state))
        function(*arguments, generation, 0, *units)

    def hire(self, count: int) -> None:
        with self.lock:
            while len(self.jobs) < count:
                jobs = queue.SimpleQueue()
                threading.Thread(target=work, args=(jobs,), name=f"mindseed-{len(self.jobs) + 1}", daemon=True).start()
                self.jobs.append(jobs)


def work(jobs: queue.SimpleQueue) -> None:
    while True:
        function, arguments, state = jobs.get()   # whose address the arguments hold: all that a late one looks at
        function(*arguments)
        del function, arguments, state


CREW = Crew()
if hasattr(os, "register_at_fork"):               # threads do not survive it
    os.register_at_fork(after_in_child=CREW.__init__)


class Memory:
    """What threads work in: counters and room for numbers, asked for by name, grown as needed."""

    def __init__(self) -> None:
        self.held: dict[str, np.ndarray] = {}

    def floats(self, name: str, count: int) -> int:
        """The address of room for `count` float32 numbers."""
        if name not in self.held or len(self.held[name]) < count:
            self.held[name] = np.zeros(count + LANES, np.float32)
        return self.held[name].ctypes.data

    def counters(self, name: str, count: int) -> np.ndarray:
        if name not in self.held or len(self.held[name]) < count:
            self.held[name] = np.zeros(count, np.int64)
        return self.held[name]


class FusedStep:
    """Decoding steps of a model for B rows, over the pools (k, v), (slots, G, K) each, of its layers.

    `step(ids, positions, tables)` writes the new tokens' keys and values into the pools. Tables are (B, n) by window,
    int64; entries that no query can see are not read. One call at a time.
    """

    def __init__(self, model: LM, pools: list[tuple[Tensor, Tensor]], block_size: int) -> None:
        if not fits(model):
            raise ValueError("FusedStep does not know this model; ask fits(model) before")
        self.model, self.pools, self.block_size, self.memory = model, pools, block_size, Memory()
        self.configs = [block.mixer.config for block in model.blocks]
        self.plan = np.zeros(len(Plan), np.int64)
        self.layers = np.zeros((len(model.blocks), len(Layer)), np.int64)
        self.scales = np.zeros((len(model.blocks) + 1, len(Scale)), np.float32)
        self.state = np.zeros(LINE // 8, np.int64)
        self.rope: dict[tuple[RopeConfig, int], tuple[Tensor, Tensor]] = {}
        self.units = UNITS[model.embed.weight.dtype], UNITS[pools[0][0].dtype]
        self.rows, self.length, self.kept = 0, 0, []
        self.entries = compiled()
        self.describe()

    def describe(self) -> None:
        """Fill in what stays: shapes and the addresses of weights and pools."""
        m, plan = self.model, self.plan
        head = (m.head or m.embed).weight
        plan[Plan.DIM], plan[Plan.VOCAB], plan[Plan.BLOCK] = m.config.dim, m.config.vocab_size, self.block_size
        plan[Plan.EMBED], plan[Plan.NORM], plan[Plan.HEAD] = map(self.address, (m.embed.weight, m.norm.weight, head))
        plan[Plan.STATE] = self.state.ctypes.data
        plan[Plan.MOST_KV] = max(c.kv_heads for c in self.configs)
        plan[Plan.PIECE] = max(c.heads // c.kv_heads * (c.head_dim + 2) for c in self.configs)
        self.scales[-1, Scale.MIXER_EPS] = m.norm.eps
        for block, c, (k, v), row, scale in zip(m.blocks, self.configs, self.pools, self.layers, self.scales):
            mixer, ffn = block.mixer, block.ffn
            shape = (c.kv_heads, c.head_dim)
            if k.shape[1:] != shape or v.shape != k.shape or not (k.is_contiguous() and v.is_contiguous()):
                raise ValueError(f"pools of shapes {tuple(k.shape)}, {tuple(v.shape)}: a layer needs (slots, *{shape})")
            row[:Layer.MIXER_NORM] = (c.heads, *shape, ffn.gate.weight.shape[0], c.window or 0, c.rope.interleaved)
            row[Layer.MIXER_NORM:Layer.COS] = [self.address(w) for w in (
                block.mixer_norm.weight, mixer.q.weight, mixer.k.weight, mixer.v.weight,
                mixer.q_norm.weight if c.qk_norm else None, mixer.k_norm.weight if c.qk_norm else None, mixer.o.weight,
                block.ffn_norm.weight, ffn.gate.weight, ffn.up.weight, ffn.down.weight)]
            row[Layer.KEYS], row[Layer.VALUES] = self.address(k), self.address(v)
            row[Layer.BLOCKS] = len(k) // self.block_size
            eps = mixer.q_norm.eps if c.qk_norm else 0
            scale[:] = block.mixer_norm.eps, block.ffn_norm.eps, eps, eps, 1 / math.sqrt(c.head_dim)

    def address(self, weight: Tensor | None) -> int:
        if weight is None:
            return 0
        self.kept.append(weight.detach())         # as long as we know its address
        return weight.data_ptr()

    def room(self, rows: int, threads: int) -> None:
        """Memory for this many rows."""
        plan, room, m, configs = self.plan, self.memory, self.model, self.configs
        width, dim = 1 if rows == 1 else LANES, m.config.dim
        group = width * -(-rows // width)         # rows, filled up
        wide = max(int(n) for n in self.layers[:, Layer.FFN_DIM])
        mixed = max(c.heads * c.head_dim for c in configs)
        piece = max(8, CHUNK // (2 * min(dim, mixed, wide)))                      # most rows of weights
        plan[Plan.ROWS], plan[Plan.INPUT_SIZE] = rows, group * max(dim, mixed) + LANES
        plan[Plan.OUTPUT_SIZE] = 2 * group * piece + LANES
        heads = max(c.heads // c.kv_heads * (c.head_dim + TILE) for c in configs) + max(c.head_dim for c in configs)
        rest = max(heads, 8 * max(dim, mixed, wide)) + LANES
        plan[Plan.PRIVATE_SIZE] = plan[Plan.INPUT_SIZE] + plan[Plan.OUTPUT_SIZE] + rest
        plan[Plan.PRIVATE] = room.floats("private", threads * int(plan[Plan.PRIVATE_SIZE]))
        plan[Plan.X] = room.floats("x", group * dim)
        plan[Plan.QKV] = room.floats("qkv", group * max((c.heads + 2 * c.kv_heads) * c.head_dim for c in configs))
        plan[Plan.MIXED], plan[Plan.WIDE] = room.floats("mixed", rows * mixed), room.floats("wide", group * wide)
        plan[Plan.ARRIVED] = room.counters("arrived", rows * int(plan[Plan.MOST_KV])).ctypes.data
        self.rows = (rows, threads)

    def __call__(self, ids: Tensor, positions: Tensor, tables: dict[Window, Tensor]) -> Tensor:
        """Hidden vectors (B, D) of tokens `ids` (B,) at `positions` (B,), which are their numbers in the row."""
        return self.run(ids, positions, tables, False)[0]

    def logits(self, ids: Tensor, positions: Tensor, tables: dict[Window, Tensor]) -> tuple[Tensor, Tensor]:
        """The hidden vectors, and the logits (B, V) of the token that follows, in one go."""
        return self.run(ids, positions, tables, True)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (B, V) float32 of hidden vectors (B, D)."""
        hidden = hidden.to(torch.float32).contiguous()
        plan, logits = self.plan, torch.empty(len(hidden), self.model.config.vocab_size)
        threads = torch.get_num_threads()
        if self.rows != (len(hidden), threads):
            self.room(len(hidden), threads)
        plan[Plan.LAYERS] = plan[Plan.IDS] = 0
        plan[Plan.HIDDEN], plan[Plan.LOGITS] = hidden.data_ptr(), logits.data_ptr()
        self.go(threads)
        return logits

    def run(self, ids: Tensor, positions: Tensor, tables: dict[Window, Tensor], head: bool) -> tuple[Tensor, Tensor]:
        plan, layers, rows, threads = self.plan, self.layers, len(ids), torch.get_num_threads()
        if self.rows != (rows, threads):
            self.room(rows, threads)
        ids, positions = ids.contiguous(), positions.contiguous()
        length = int(positions.max()) + 1
        self.turn(length)
        kept = []
        for index, c in enumerate(self.configs):
            table = tables[c.window]
            if not table.is_contiguous():
                table = table.contiguous()
                kept.append(table)
            layers[index, Layer.TABLE], layers[index, Layer.TABLE_WIDTH] = table.data_ptr(), table.shape[1]
        divide(plan, self.memory, length, rows, min(c.kv_heads for c in self.configs), threads)
        hidden = torch.empty(rows, self.model.config.dim)
        logits = torch.empty(rows if head else 0, self.model.config.vocab_size)
        plan[Plan.LAYERS], plan[Plan.IDS], plan[Plan.POSITIONS] = len(layers), ids.data_ptr(), positions.data_ptr()
        plan[Plan.HIDDEN], plan[Plan.LOGITS] = hidden.data_ptr(), logits.data_ptr() if head else 0
        self.go(threads)
        return hidden.to(self.model.embed.weight.dtype), logits

    def turn(self, length: int) -> None:
        """Rotary tables for texts of up to `length` tokens."""
        if length <= self.length:
            return
        self.length = max(length, 2 * self.length, 256)
        for c, row in zip(self.configs, self.layers):
            key = c.rope, c.head_dim
            if key not in self.rope or self.rope[key][0].shape[1] < self.length:
                at = torch.arange(self.length)[None]
                self.rope[key] = tuple(x.contiguous() for x in rope_tables(*key, at, torch.float32))
            row[Layer.COS], row[Layer.SIN] = (x.data_ptr() for x in self.rope[key])

    def go(self, threads: int) -> None:
        counters = self.memory.counters("counters", LINE // 4 * (5 * len(self.layers) + 1))
        counters[:] = 0
        self.plan[Plan.COUNTERS] = counters.ctypes.data
        wrong = self.entries["begin"](self.plan, self.layers, self.units[0])
        if wrong:
            raise ValueError(WRONG[wrong])
        CREW.call(self.entries["decode"], self.plan, self.layers, self.scales, units=self.units, state=self.state,
                  threads=threads)


def divide(plan: np.ndarray, memory: Memory, length: int, rows: int, kv_heads: int, threads: int) -> None:
    """Attention in pieces, by spans of keys too where rows and heads are few, and memory for their results."""
    few = rows * kv_heads < 4 * threads
    plan[Plan.SPAN] = SPAN if few else 1 << 40
    parts = plan[Plan.PARTS] = -(-length // SPAN) if few else 1
    plan[Plan.PARTIAL] = memory.floats("partial", rows * int(plan[Plan.MOST_KV] * parts * plan[Plan.PIECE]))


LOCAL = threading.local()                         # memory of a thread's calls of paged_attention


@torch.no_grad()
def paged_attention(q: Tensor, k_pool: Tensor, v_pool: Tensor, tables: Tensor, lengths: Tensor, block_size: int, *,
                    scale: float | None = None, window: Window = None) -> Tensor:
    """Attention of one new token per row, q (B, H, K), over the `lengths` (B,) keys of its row, its own among them.

    Keys and values are read from their blocks, where they lie: pools (slots, G, K), tables (B, n) int64. With a window,
    blocks wholly before it are not looked at. Sums in float32; returns (B, H, K) in the dtype of q.
    """
    (B, H, K), G, memory = q.shape, k_pool.shape[1], LOCAL.__dict__.setdefault("memory", Memory())
    kept = [q.to(torch.float32).contiguous(), (lengths - 1).contiguous(), tables.contiguous()]
    queries, positions, tables = kept
    if H % G or k_pool.shape[2] != K or v_pool.shape != k_pool.shape or tables.dtype != torch.int64 or not (
            k_pool.is_contiguous() and v_pool.is_contiguous()):
        raise ValueError(f"paged_attention: q {tuple(q.shape)} does not go with pools {tuple(k_pool.shape)}, "
                         f"{tuple(v_pool.shape)}")
    out, threads = torch.empty_like(queries), torch.get_num_threads()
    plan, layers, scales = np.zeros(len(Plan), np.int64), np.zeros((1, len(Layer)), np.int64), np.zeros((1, 5), "f4")
    layers[0, :Layer.INTERLEAVED] = H, G, K, 0, window or 0
    layers[0, [Layer.KEYS, Layer.VALUES, Layer.TABLE]] = k_pool.data_ptr(), v_pool.data_ptr(), tables.data_ptr()
    layers[0, [Layer.BLOCKS, Layer.TABLE_WIDTH]] = len(k_pool) // block_size, tables.shape[1]
    scales[0, Scale.SCORES] = scale or 1 / math.sqrt(K)
    counters, state = memory.counters("counters", LINE // 4), memory.counters("state", LINE // 8)
    counters[:] = 0
    plan[[Plan.ROWS, Plan.LAYERS, Plan.BLOCK, Plan.MOST_KV, Plan.PIECE]] = B, 1, block_size, G, H // G * (K + 2)
    plan[[Plan.POSITIONS, Plan.QKV, Plan.MIXED]] = positions.data_ptr(), queries.data_ptr(), out.data_ptr()
    plan[[Plan.COUNTERS, Plan.STATE]] = counters.ctypes.data, state.ctypes.data
    plan[Plan.ARRIVED] = memory.counters("arrived", B * G).ctypes.data
    plan[Plan.PRIVATE_SIZE] = H // G * (K + TILE) + K + LANES
    plan[Plan.PRIVATE] = memory.floats("private", threads * int(plan[Plan.PRIVATE_SIZE]))
    divide(plan, memory, int(lengths.max()), B, G, threads)
    if wrong := compiled()["misplaced"](plan, layers):
        raise ValueError(WRONG[wrong])
    units = F32, UNITS[k_pool.dtype]
    CREW.call(compiled()["attend_rows"], plan, layers, scales, units=units, state=state, threads=threads)
    return out.to(q.dtype)
