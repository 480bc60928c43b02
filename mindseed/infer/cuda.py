"""A decoding step on a GPU: the flattened step of step.py, recorded once as a CUDA graph and replayed.

A GPU decodes a small model faster than Python can ask it to, so the asking is recorded: a graph holds every launch of a
step, and one call replays them all. Everything in it must then be the same every time but for what lies in memory:

    - ids, positions and block tables are copied into tensors that stay where they are, as wide as the context
    - there is a graph for some numbers of rows; a batch takes the next larger one, its spare rows writing to block 0
    - nothing asks the GPU for a number: slots, angles and masks are looked up by tensors

Attention reads the blocks where they lie, by a kernel of our own in Triton (paged_attention.py); where there is no
Triton (a CPU, in tests) the blocks are gathered instead, by the same arithmetic.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mindseed.infer.paged import PagedCache, Window
from mindseed.infer.paged_attention import attend_paged
from mindseed.infer.step import FlatStep, full_width
from mindseed.models.lm import LM
from mindseed.nn.rope import rope_tables

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
WARM_UPS = 3                                      # runs before a recording: kernels are chosen and compiled in them


class GraphStep:
    """ids (B,), positions (B,) and block tables (B, n) by window -> hidden vectors (B, D). Without `record` every step
    runs as it is written, which a CPU can do."""

    def __init__(self, model: LM, cache: PagedCache, *, record: bool = True) -> None:
        self.model, self.cache, self.record = model, cache, record
        self.device, self.width = cache.device, -(-model.config.seq_len // cache.block_size)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, dict[Window, Tensor], Tensor]] = {}
        self.refresh()

    def refresh(self) -> None:
        """The weights have changed: fused copies are made anew in place, so that graphs stay valid."""
        flat = FlatStep(self.model)
        if hasattr(self, "flat"):
            for mine, theirs in zip(self.flat.layers, flat.layers):
                for x, y in zip(mine, theirs):
                    keep(x, y)
        else:
            self.flat = flat
            everywhere = torch.arange(self.model.config.seq_len, device=self.device)[:, None]      # a row per position
            wide = torch.promote_types(self.cache.dtype, torch.float32)
            self.rotary = {(layer[0].rope, layer[0].head_dim): full_width(*rope_tables(
                layer[0].rope, layer[0].head_dim, everywhere, wide)) for layer in flat.layers}      # (S, 1, K) each

    def __call__(self, ids: Tensor, positions: Tensor, tables: dict[Window, Tensor]) -> Tensor:
        rows = len(ids)
        if not self.record:
            return self.compute(ids, positions, tables)
        bucket = next((b for b in BUCKETS if b >= rows), rows)
        if bucket not in self.graphs:
            self.graphs[bucket] = self.recorded(bucket)
        graph, its_ids, its_positions, its_tables, hidden = self.graphs[bucket]
        its_ids[:rows], its_positions[:rows] = ids, positions
        its_positions[rows:] = 0
        for window, table in tables.items():
            its_tables[window].zero_()
            its_tables[window][:rows, :table.shape[1]] = table
        graph.replay()
        return hidden[:rows].clone()

    def recorded(self, rows: int) -> tuple:
        """A graph for so many rows, with the tensors it reads and writes."""
        ids, positions = (torch.zeros(rows, dtype=torch.long, device=self.device) for _ in range(2))
        tables = {window: ids.new_zeros(rows, self.width) for window in self.cache.windows}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.compute(ids, positions, tables)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden = self.compute(ids, positions, tables)
        return graph, ids, positions, tables, hidden

    def compute(self, ids: Tensor, positions: Tensor, tables: dict[Window, Tensor]) -> Tensor:
        """The step itself; H query heads, G key heads of width K."""
        size, B = self.cache.block_size, len(ids)
        x = F.embedding(ids, self.model.embed.weight)                             # (B, D)
        slots = {window: table.gather(1, positions[:, None] // size)[:, 0] * size + positions % size
                 for window, table in tables.items()}
        angles = {key: (cos[positions], sin[positions]) for key, (cos, sin) in self.rotary.items()}     # (B, 1, K)
        for i, (c, mixer_norm, qkv_weight, qk_norm, o, ffn_norm, gate, up, down) in enumerate(self.flat.layers):
            H, G, K = c.heads, c.kv_heads, c.head_dim
            keys, values = (self.cache.pools[i][name].blocks.flatten(0, 1) for name in ("k", "v"))      # (slots, G, K)
            qkv = F.linear(mixer_norm(x).to(x.dtype), qkv_weight).view(B, H + 2 * G, K)
            qk = qkv[:, :H + G]
            if qk_norm is not None:
                qk = qk_norm(qk)
            cos, sin = angles[c.rope, K]
            qk = torch.addcmul(qk * cos, qk.roll(K // 2, -1), sin).to(x.dtype)    # (B, H + G, K)
            keys.index_copy_(0, slots[c.window], qk[:, H:].to(keys.dtype))
            values.index_copy_(0, slots[c.window], qkv[:, H + G:].to(values.dtype))
            y = attend_paged(qk[:, :H], keys, values, tables[c.window], positions + 1, size, window=c.window)
            x = x + F.linear(y.reshape(B, H * K), o)
            h = ffn_norm(x).to(x.dtype)
            x = x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)
        return self.flat.last_norm(x).to(x.dtype)

    def head(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, (self.model.head or self.model.embed).weight)


def keep(old: object, new: object) -> None:
    """Copy the tensors of a flattened layer over those that a graph was recorded with."""
    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
        old.copy_(new)
    elif hasattr(old, "weight"):
        keep(old.weight, new.weight)
