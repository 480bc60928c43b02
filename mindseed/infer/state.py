"""The plain cache: one tensor per layer and name, (B, capacity, ...), filled from the left.

All sequences of a batch share the slot a new token is written to, so that writing is one copy. Prompts of unequal
length are padded on the right; a pad is given position -1, which hides its slot from every query. A layer with a
window keeps a ring of that many slots, the oldest of which is written over. The paged cache of the engine keeps the
same promises with blocks instead.
"""
from __future__ import annotations

import torch
from torch import Tensor

from mindseed.core import StateSpec
from mindseed.nn.attend import NOWHERE


class Cache:
    """State of a batch of B sequences for a model with the given layer specs; grows by doubling."""

    def __init__(self, specs: list[StateSpec], batch: int, *, capacity: int = 256) -> None:
        self.specs, self.batch, self.capacity = specs, batch, capacity
        windows = dict.fromkeys(spec.window for spec in specs if spec.per_token)
        self.slots: dict[int | None, Slots | Ring] = {
            w: Slots(batch, capacity) if w is None else Ring(w) for w in windows}
        self.layers = [CacheLayer(self.slots.get(spec.window)) for spec in specs]

    def begin(self, positions: Tensor) -> dict[int | None, Tensor]:
        shown = positions.masked_fill(positions < 0, NOWHERE)
        return {window: slots.begin(shown) for window, slots in self.slots.items()}

    def layer(self, index: int) -> CacheLayer:
        return self.layers[index]

    def keep(self, rows: Tensor) -> None:
        """Drop the sequences that are not in `rows` (1-D, indices), in place."""
        self.batch = len(rows)
        for slots in self.slots.values():
            slots.keep(rows)
        for layer in self.layers:
            layer.tokens = {name: x[rows] for name, x in layer.tokens.items()}
            layer.sequence = {name: x[rows] for name, x in layer.sequence.items()}


class CacheLayer:
    def __init__(self, slots: Slots | Ring | None) -> None:
        self.slots = slots
        self.tokens: dict[str, Tensor] = {}
        self.sequence: dict[str, Tensor] = {}

    def append(self, **new: Tensor) -> tuple[Tensor, ...]:
        seen = []
        for name, x in new.items():
            self.tokens[name], whole = self.slots.write(self.tokens.get(name), x)
            seen.append(whole)
        return tuple(seen)

    def get(self, name: str) -> Tensor | None:
        return self.sequence.get(name)

    def put(self, name: str, value: Tensor) -> None:
        self.sequence[name] = value


class Slots:
    """Where layers that see the whole past keep it: token number i of the longest sequence in slot i."""

    def __init__(self, batch: int, capacity: int) -> None:
        self.batch, self.capacity, self.length = batch, capacity, 0
        self.positions = torch.empty(0)                                           # (B, capacity)

    def begin(self, positions: Tensor) -> Tensor:
        """Make room for tokens at positions (B, T), NOWHERE for pads; return those of all slots in use (B, S)."""
        if not self.length:
            self.positions = positions.new_empty(self.batch, self.capacity)
        self.start, self.length = self.length, self.length + positions.shape[1]
        if self.length > self.capacity:
            self.capacity = max(self.length, 2 * self.capacity)
            self.positions = self.longer(self.positions)
        self.positions[:, self.start:self.length] = positions
        return self.positions[:, :self.length]

    def write(self, kept: Tensor | None, new: Tensor) -> tuple[Tensor, Tensor]:
        """(what is kept from now on, what layers see (B, S, ...)) after new tokens (B, T, ...)."""
        if kept is None:
            kept = new.new_empty(self.batch, self.capacity, *new.shape[2:])
        elif kept.shape[1] < self.capacity:
            kept = self.longer(kept)
        kept[:, self.start:self.length] = new
        return kept, kept[:, :self.length]

    def longer(self, x: Tensor) -> Tensor:
        y = x.new_empty(x.shape[0], self.capacity, *x.shape[2:])
        y[:, :self.start] = x[:, :self.start]
        return y

    def keep(self, rows: Tensor) -> None:
        self.batch, self.positions = len(rows), self.positions[rows]


class Ring:
    """Where layers with a window keep its tokens: `window` slots, never more.

    A single new token of every sequence is written over the oldest. Several at once (a prompt), or a pad among single
    ones, are seen together with what was kept, and then the last `window` real tokens of every sequence are kept,
    oldest first.
    """

    def __init__(self, window: int) -> None:
        self.window, self.oldest = window, 0
        self.positions: Tensor | None = None                                      # (B, window)
        self.chosen: Tensor | None = None                                         # which of all are kept; None: one new

    def begin(self, positions: Tensor) -> Tensor:
        if self.positions is not None and positions.shape[1] == 1 and not bool((positions == NOWHERE).any()):
            self.slot, self.oldest, self.chosen = self.oldest, (self.oldest + 1) % self.window, None
            self.positions[:, self.slot] = positions[:, 0]
            return self.positions
        kept = positions[:, :0] if self.positions is None else self.positions
        seen = torch.cat([kept, positions], dim=1)                                # (B, S)
        missing = max(self.window - seen.shape[1], 0)                             # empty slots come first
        padded = torch.cat([seen.new_full((len(seen), missing), NOWHERE), seen], dim=1)
        age = padded.masked_fill(padded == NOWHERE, -1)
        self.chosen = age.argsort(dim=1, stable=True)[:, -self.window:]
        self.positions, self.oldest, self.missing = padded.gather(1, self.chosen), 0, missing
        return seen

    def write(self, kept: Tensor | None, new: Tensor) -> tuple[Tensor, Tensor]:
        if self.chosen is None:
            kept[:, self.slot] = new[:, 0]
            return kept, kept
        seen = new if kept is None else torch.cat([kept, new], dim=1)
        padded = torch.cat([seen.new_zeros(len(seen), self.missing, *seen.shape[2:]), seen], dim=1)
        index = self.chosen.view(*self.chosen.shape, *[1] * (seen.dim() - 2)).expand(-1, -1, *seen.shape[2:])
        return padded.gather(1, index), seen

    def keep(self, rows: Tensor) -> None:
        self.positions = self.positions[rows]
