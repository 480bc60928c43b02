"""The paged cache: what every layer remembers, in blocks that sequences share (PagedAttention, 2309.06180).

A layer's pool is one tensor per name of its StateSpec, (blocks, block_size, ...); a sequence's tokens lie in the blocks
of its table, token i in block table[i // block_size]. Layers that look equally far back share one numbering of blocks,
so a table serves them all; layers with a window give back the blocks that no query can see any more. What a layer keeps
of fixed size has a row per running sequence instead.

`Pages` is the memory of one forward pass, a State as mixers know it: it writes new tokens to their slots and gathers
the blocks of each row. With `int8` a token's vector is kept in 8 bits with one scale per head (absolute maximum), for a
quarter of the memory of float32.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mindseed.core import StateSpec
from mindseed.nn.attend import NOWHERE

Window = int | None


def windows_of(specs: list[StateSpec]) -> list[Window]:
    """The kinds of layers that keep tokens, by how far they look back; the order of `tables` everywhere."""
    return list(dict.fromkeys(spec.window for spec in specs if spec.per_token))


class Pool:
    """Vectors of one name in one layer: (blocks, block_size, *shape)."""

    def __init__(self, blocks: int, block_size: int, shape: tuple[int, ...], dtype: torch.dtype,
                 device: torch.device | str, int8: bool) -> None:
        self.dtype, self.shape = dtype, shape
        kept = torch.int8 if int8 else dtype
        self.blocks = torch.zeros(blocks, block_size, *shape, dtype=kept, device=device)     # nothing may be a NaN
        self.scales = torch.zeros(blocks, block_size, *shape[:-1], 1, dtype=torch.float32, device=device
                                  ) if int8 else None

    def write(self, slots: Tensor, new: Tensor) -> None:
        """New vectors (B, T, *shape) into slots (B * T,)."""
        flat = new.flatten(0, 1)
        if self.scales is not None:
            scale = flat.abs().amax(-1, keepdim=True).to(torch.float32).div_(127).clamp_min_(1e-12)
            self.scales.flatten(0, 1).index_copy_(0, slots, scale)
            flat = (flat / scale).round_()
        self.blocks.flatten(0, 1).index_copy_(0, slots, flat.to(self.blocks.dtype))

    def read(self, blocks: Tensor, rows: int) -> Tensor:
        """The blocks (B * n,) of `rows` rows as (B, n * block_size, *shape)."""
        found = self.blocks.index_select(0, blocks)
        if self.scales is not None:
            found = (found * self.scales.index_select(0, blocks)).to(self.dtype)
        return found.view(rows, -1, *self.shape)

    def copy(self, source: Tensor, target: Tensor) -> None:
        for x in (self.blocks, self.scales):
            if x is not None:
                x.index_copy_(0, target, x.index_select(0, source))


class PagedCache:
    """The pools of all layers. `counts` says how many blocks there are for every window; `slots` how many states of
    fixed size, row 0 being nobody's."""

    def __init__(self, specs: list[StateSpec], counts: dict[Window, int], block_size: int, *, slots: int = 0,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", int8: bool = False) -> None:
        self.specs, self.block_size, self.device = specs, block_size, torch.device(device)
        self.windows = list(counts)
        self.pools: list[dict[str, Pool]] = [
            {name: Pool(counts[spec.window], block_size, shape, dtype, device, int8)
             for name, shape in spec.per_token.items()} for spec in specs]
        self.slots, self.dtype, self.int8 = slots, dtype, int8
        self.sequences: list[dict[str, Tensor]] = [{} for _ in specs]            # made when their dtype is known

    @property
    def bytes(self) -> int:
        tensors = [x for layer in self.pools for pool in layer.values() for x in (pool.blocks, pool.scales)]
        return sum(x.numel() * x.element_size() for x in tensors if x is not None)

    def copy_blocks(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Carry out copies (kind, from, to), in their order."""
        for kind, window in enumerate(self.windows):
            pairs = [(source, target) for k, source, target in copies if k == kind]
            if not pairs:
                continue
            source, target = torch.tensor(pairs, device=self.device).T
            for spec, layer in zip(self.specs, self.pools):
                if spec.window == window:
                    for pool in layer.values():
                        pool.copy(source, target)

    def clear_blocks(self, kind: int, numbers: list[int]) -> None:
        """Forget what lies in blocks: a NaN does harm where it is hidden, too, since zero times NaN is NaN."""
        index = torch.tensor(numbers, device=self.device)
        for spec, layer in zip(self.specs, self.pools):
            if spec.window == self.windows[kind]:
                for pool in layer.values():
                    for x in (pool.blocks, pool.scales):
                        if x is not None:
                            x[index] = 0

    def copy_slot(self, source: int, target: int) -> None:
        for layer in self.sequences:
            for x in layer.values():
                x[target] = x[source]

    def clear_slots(self, slots: list[int]) -> None:
        for layer in self.sequences:
            for x in layer.values():
                x[slots] = 0


class Pages:
    """A State over the cache for one forward pass of B rows. `tables` are (B, n) block numbers by window, 0 where a
    block is out of sight or beyond the row's end; `slots` (B,) are the rows' states of fixed size."""

    def __init__(self, cache: PagedCache, tables: dict[Window, Tensor], slots: Tensor | None = None) -> None:
        self.cache, self.tables, self.slots = cache, tables, slots
        self.write: dict[Window, Tensor] = {}
        self.read: dict[Window, Tensor] = {}
        self.direct = False

    def begin(self, positions: Tensor) -> dict[Window, Tensor]:
        size, (B, T) = self.cache.block_size, positions.shape
        real = positions.clamp_min(0)
        last = positions.amax(1, keepdim=True)                                    # (B, 1)
        first = int(positions[:, 0].min())
        self.direct = T > 1 and int(positions[:, 0].max()) == 0 and not self.cache.int8      # nothing lies before
        keys = {}
        for window, table in self.tables.items():
            block = table.gather(1, real // size).masked_fill(positions < 0, 0)   # (B, T): pads go to block 0
            self.write[window] = (block * size + real % size * (positions >= 0)).flatten()
            if self.direct:
                keys[window] = positions.masked_fill(positions < 0, NOWHERE)
                continue
            start = 0 if window is None else max(first - window + 1, 0) // size
            end = int(last.max()) // size + 1
            blocks = table[:, start:end]                                          # (B, n)
            own = blocks.amax(1, keepdim=True)                                    # nobody reads what pads have written
            self.read[window] = torch.where(blocks == 0, own, blocks).flatten()
            at = torch.arange(start * size, end * size, device=table.device).expand(B, -1)   # (B, S)
            hidden = (at > last) | (blocks == 0).repeat_interleave(size, dim=1)
            keys[window] = at.masked_fill(hidden, NOWHERE)
        return keys

    def layer(self, index: int) -> LayerPages:
        return LayerPages(self, index)


class LayerPages:
    """One layer's memory of the rows of a pass."""

    def __init__(self, pages: Pages, index: int) -> None:
        self.pages, self.pools = pages, pages.cache.pools[index]
        self.window = pages.cache.specs[index].window
        self.sequences = pages.cache.sequences[index]

    def append(self, **new: Tensor) -> tuple[Tensor, ...]:
        pages, seen = self.pages, []
        for name, x in new.items():
            pool = self.pools[name]
            pool.write(pages.write[self.window], x)
            seen.append(x if pages.direct else pool.read(pages.read[self.window], len(x)).to(x.dtype))
        return tuple(seen)

    def get(self, name: str) -> Tensor | None:
        kept = self.sequences.get(name)
        return None if kept is None else kept[self.pages.slots]

    def put(self, name: str, value: Tensor) -> None:
        if name not in self.sequences:
            self.sequences[name] = value.new_zeros(self.pages.cache.slots, *value.shape[1:])
        self.sequences[name][self.pages.slots] = value
