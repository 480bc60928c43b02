"""A decoding step and attention over a paged cache, in kernels of our own on the CPU (onepass.py).

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

from mindseed.infer.attention import TILE
from mindseed.infer.jit import available, compiled
from mindseed.infer.kernels import CHUNK, F32, FEW, LINE
from mindseed.infer.onepass import Layer, Plan, Scale
from mindseed.infer.simd import LANES
from mindseed.models.lm import LM, Block
from mindseed.nn.ffn import SwiGLU
from mindseed.nn.gqa import GQA
from mindseed.nn.linear import is_plain
from mindseed.nn.norm import RMSNorm
from mindseed.nn.rope import rope_tables

__all__ = ["FusedStep", "available", "fits", "paged_attention"]

SPAN = 256                                        # keys to a piece of attention where rows are few
WORTH = 1 << 19                                   # bytes of weights for which it is worth waking one more thread
UNITS = {torch.float32: np.float32(0), torch.bfloat16: np.uint16(0)}
WRONG = {1: "an id is not in the vocabulary", 2: "a position is not in its table", 3: "a table names no block"}
Window = int | None


def fits(model: LM) -> bool:
    """Whether `FusedStep` computes what this model does: every block exactly grouped queries, SwiGLU and RMSNorm before
    each, no hooks, no adapters, on the CPU, in float32 or bfloat16."""
    used = used_weights(model)
    weights = {p.dtype for p in used}, {p.device.type for p in used}
    return (available() and len(weights[0]) == 1 and weights[0] <= set(UNITS) and weights[1] == {"cpu"}
            and type(model) is LM and model.place is None and type(model.norm) is RMSNorm
            and not torch.is_autocast_enabled("cpu") and all(known(block) for block in model.blocks)
            and all(p.is_contiguous() for p in used))


def used_weights(model: LM) -> list[Tensor]:
    """A value head is in another dtype, perhaps, and no token asks for it."""
    return [p for name, p in model.named_parameters() if not name.startswith("value_head.")]


def known(block: Block) -> bool:
    parts = {block.mixer: GQA, block.ffn: SwiGLU, block.mixer_norm: RMSNorm, block.ffn_norm: RMSNorm}
    if type(block) is not Block or block.placement != "pre" or any(
            type(part) is not kind for part, kind in parts.items()):
        return False
    rope, mixer, ffn = block.mixer.config.rope, block.mixer, block.ffn
    linears = (mixer.q, mixer.k, mixer.v, mixer.o, ffn.gate, ffn.up, ffn.down)
    return rope is not None and not rope.depends_on_length and all(map(is_plain, linears)) and (
        not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules()))


class Crew:
    """Threads that help with a piece of work, one fewer than torch uses. They sleep between two calls; the caller does
    not wait for one that has not woken up."""

    def __init__(self) -> None:
        self.jobs: list[queue.SimpleQueue] = []
        self.lock = threading.Lock()

    def call(self, name: str, plan: np.ndarray, *tables: np.ndarray, units: tuple, state: np.ndarray,
             threads: int) -> None:
        """The entry of this name in all threads, in this one as thread 0."""
        function, generation = compiled()[name], int(state[0]) >> 16
        if len(self.jobs) < threads - 1:
            self.hire(threads - 1)
        try:
            for thread in range(1, threads):
                self.jobs[thread - 1].put((function, (plan, *tables, generation, thread, *units), state))
            function(plan, *tables, generation, 0, *units)
        except BaseException:                     # Ctrl-C, say, and somebody may be at work already
            compiled()["settle"](plan)
            raise

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
    """What threads work in: room for numbers, asked for by name, grown as needed."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[np.ndarray, int]] = {}                         # and the address

    def floats(self, name: str, count: int) -> int:
        """The address of room for `count` float32 numbers, at the start of a cache line."""
        if name not in self.held or len(self.held[name][0]) < count + LINE // 4:
            room = np.zeros(count + LINE // 4, np.float32)
            self.held[name] = room, -(-room.ctypes.data // LINE) * LINE
        return self.held[name][1]

    def counters(self, name: str, count: int) -> tuple[np.ndarray, int]:
        """At least `count` integers, zero at first, and their address."""
        if name not in self.held or len(self.held[name][0]) < count:
            room = np.zeros(count, np.int64)
            self.held[name] = room, room.ctypes.data
        return self.held[name]


def lines(floats: int) -> int:
    """Filled up to whole cache lines, so that what follows begins with one: loads across two are slow."""
    return -(-floats // (LINE // 4)) * (LINE // 4)


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
        self.dtype, self.shape, self.kept = model.embed.weight.dtype, (0, 0), []
        self.units = UNITS[self.dtype], UNITS[pools[0][0].dtype]
        self.bytes = sum(p.numel() * p.element_size() for p in used_weights(model))
        self.fewest = min(c.kv_heads for c in self.configs)
        self.windows = {c.window: [i for i, other in enumerate(self.configs) if other.window == c.window]
                        for c in self.configs}
        self.describe()
        self.turn(min(model.config.seq_len, 4096))

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

    def room(self, rows: int) -> int:
        """Make memory for this many rows; how many threads to use."""
        threads = min(torch.get_num_threads(), 1 + self.bytes // WORTH)
        if self.shape == (rows, threads):
            return threads
        self.shape = rows, threads
        plan, room, m, configs = self.plan, self.memory, self.model, self.configs
        dim, group = m.config.dim, rows if rows <= FEW else -(-rows // LANES) * LANES
        wide = max(int(n) for n in self.layers[:, Layer.FFN_DIM])
        mixed = max(c.heads * c.head_dim for c in configs)
        width = 2 if self.dtype == torch.bfloat16 else 4                          # bytes
        piece = max(8, CHUNK // (width * min(dim, mixed, wide)))                  # most rows of weights
        heads = max(c.heads // c.kv_heads * (c.head_dim + TILE) for c in configs) + max(c.head_dim for c in configs)
        plan[Plan.ROWS], plan[Plan.INPUT_SIZE] = rows, lines(group * max(dim, mixed))
        plan[Plan.OUTPUT_SIZE] = lines(2 * group * piece)
        rest = lines(max(heads, CHUNK // 2, 8 * max(dim, mixed, wide)))           # attention's, or widened weights
        plan[Plan.PRIVATE_SIZE] = plan[Plan.INPUT_SIZE] + plan[Plan.OUTPUT_SIZE] + rest
        plan[Plan.PRIVATE] = room.floats("private", threads * int(plan[Plan.PRIVATE_SIZE]))
        plan[Plan.X] = room.floats("x", group * dim)
        plan[Plan.QKV] = room.floats("qkv", group * max((c.heads + 2 * c.kv_heads) * c.head_dim for c in configs))
        plan[Plan.MIXED], plan[Plan.WIDE] = room.floats("mixed", rows * mixed), room.floats("wide", group * wide)
        plan[Plan.ARRIVED] = room.counters("arrived", rows * int(plan[Plan.MOST_KV]))[1]
        return threads

    def __call__(self, ids: Tensor, positions: Tensor, tables: dict[Window, Tensor]) -> Tensor:
        """Hidden vectors (B, D) of tokens `ids` (B,) at `positions` (B,), which are their numbers in the row."""
        return self.run(ids, positions, tables, False)[0]

    def logits(self, ids: Tensor, positions: Tensor, tables: dict[Window, Tensor]) -> tuple[Tensor, Tensor]:
        """The hidden vectors, and the logits (B, V) float32 of the token that follows, in one go."""
        return self.run(ids, positions, tables, True)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (B, V) float32 of hidden vectors (B, D)."""
        plan, hidden = self.plan, hidden.to(torch.float32).contiguous()
        logits = torch.empty(hidden.shape[0], self.model.config.vocab_size)
        threads = self.room(hidden.shape[0])
        plan[Plan.LAYERS] = plan[Plan.IDS] = 0
        plan[Plan.HIDDEN], plan[Plan.LOGITS] = hidden.data_ptr(), logits.data_ptr()
        self.go(threads)
        return logits

    def run(self, ids: Tensor, positions: Tensor, tables: dict[Window, Tensor], head: bool) -> tuple[Tensor, Tensor]:
        plan, layers, rows = self.plan, self.layers, ids.shape[0]
        ids, positions, threads = ids.contiguous(), positions.contiguous(), self.room(rows)
        tables = {window: tables[window].contiguous() for window in self.windows}
        for window, members in self.windows.items():
            layers[members, Layer.TABLE] = tables[window].data_ptr()
            layers[members, Layer.TABLE_WIDTH] = tables[window].shape[1]
        width = max(table.shape[1] for table in tables.values())
        divide(plan, self.memory, width * self.block_size, rows * self.fewest, threads)
        hidden = torch.empty(rows, self.model.config.dim)
        logits = torch.empty(rows if head else 0, self.model.config.vocab_size)
        plan[Plan.LAYERS], plan[Plan.IDS], plan[Plan.POSITIONS] = len(layers), ids.data_ptr(), positions.data_ptr()
        plan[Plan.HIDDEN], plan[Plan.LOGITS] = hidden.data_ptr(), logits.data_ptr() if head else 0
        self.go(threads)
        return hidden if self.dtype == torch.float32 else hidden.to(self.dtype), logits

    def go(self, threads: int) -> None:
        counters, self.plan[Plan.COUNTERS] = self.memory.counters("counters", LINE // 4 * (5 * len(self.layers) + 1))
        counters[:] = 0
        wrong = compiled()["begin"](self.plan, self.layers, self.units[0])
        if wrong == 4:
            self.turn(2 * int(self.plan[Plan.LENGTH]))
            return self.go(threads)
        if wrong:
            raise ValueError(WRONG[wrong])
        CREW.call("decode", self.plan, self.layers, self.scales, units=self.units, state=self.state, threads=threads)

    def turn(self, length: int) -> None:
        """Rotary tables for texts of up to `length` tokens."""
        self.plan[Plan.LENGTH], at = length, torch.arange(length)[None]
        kinds = {(c.rope, c.head_dim) for c in self.configs}
        self.rope = {kind: [x.contiguous() for x in rope_tables(*kind, at, torch.float32)] for kind in kinds}
        for c, row in zip(self.configs, self.layers):
            row[Layer.COS], row[Layer.SIN] = (x.data_ptr() for x in self.rope[c.rope, c.head_dim])


def divide(plan: np.ndarray, memory: Memory, length: int, heads: int, threads: int) -> None:
    """Attention over up to `length` keys in pieces: by row and key head, of which there are `heads`, and by spans of
    keys too if those are few. Makes room for the results."""
    span = plan[Plan.SPAN] = SPAN if heads < 4 * threads else 1 << 40
    count = int(plan[Plan.ROWS] * plan[Plan.MOST_KV] * plan[Plan.PIECE])
    plan[Plan.PARTIAL] = memory.floats("partial", count * -(-length // span))


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
    out, threads = torch.empty_like(queries), min(torch.get_num_threads(), B * G)
    plan, layers, scales = np.zeros(len(Plan), np.int64), np.zeros((1, len(Layer)), np.int64), np.zeros((1, 5), "f4")
    layer = layers[0]
    layer[:Layer.INTERLEAVED] = H, G, K, 0, window or 0
    layer[Layer.KEYS], layer[Layer.VALUES], layer[Layer.TABLE] = (x.data_ptr() for x in (k_pool, v_pool, tables))
    layer[Layer.BLOCKS], layer[Layer.TABLE_WIDTH] = len(k_pool) // block_size, tables.shape[1]
    scales[0, Scale.SCORES] = scale or 1 / math.sqrt(K)
    plan[Plan.ROWS], plan[Plan.LAYERS], plan[Plan.BLOCK] = B, 1, block_size
    plan[Plan.MOST_KV], plan[Plan.PIECE] = G, H // G * (K + 2)
    plan[Plan.POSITIONS], plan[Plan.QKV], plan[Plan.MIXED] = (x.data_ptr() for x in (positions, queries, out))
    counters, plan[Plan.COUNTERS] = memory.counters("counters", LINE // 4)
    state, plan[Plan.STATE] = memory.counters("state", LINE // 8)
    plan[Plan.ARRIVED] = memory.counters("arrived", B * G)[1]
    plan[Plan.PRIVATE_SIZE] = lines(H // G * (K + TILE) + K)
    plan[Plan.PRIVATE] = memory.floats("private", threads * int(plan[Plan.PRIVATE_SIZE]))
    divide(plan, memory, tables.shape[1] * block_size, B * G, threads)
    counters[:] = 0
    if wrong := compiled()["begin_attention"](plan, layers):
        raise ValueError(WRONG[wrong])
    CREW.call("attend_rows", plan, layers, scales, units=(F32, UNITS[k_pool.dtype]), state=state, threads=threads)
    return out.to(q.dtype)
