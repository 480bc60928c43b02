"""The plain cache: one tensor per layer and name, (B, capacity, ...), filled from the left.

All sequences of a batch share the slot a new token is written to, so that writing is one copy. Prompts of unequal
length are padded on the right; a pad is given position -1, which hides its slot from every query. The paged cache
of the engine keeps the same promises with blocks instead.
"""
from __future__ import annotations

import torch
from torch import Tensor

from mindseed.core import StateSpec
from mindseed.nn.attend import NOWHERE


class Cache:
    """State of a batch of B sequences for a model with the given layer specs; grows by doubling."""

    def __init__(self, specs: list[StateSpec], batch: int, *, capacity: int = 256) -> None:
        self.specs, self.batch, self.capacity, self.length = specs, batch, capacity, 0
        self.key_positions = torch.empty(0)
        self.layers = [CacheLayer(self) for _ in specs]

    def begin(self, positions: Tensor) -> Tensor:
        T = positions.shape[1]
        if not self.length:
            self.key_positions = positions.new_empty(self.batch, self.capacity)
        self.start, self.length = self.length, self.length + T
        if self.length > self.capacity:
            self.grow(max(self.length, 2 * self.capacity))
        self.key_positions[:, self.start:self.length] = positions.masked_fill(positions < 0, NOWHERE)
        return self.key_positions[:, :self.length]

    def layer(self, index: int) -> CacheLayer:
        return self.layers[index]

    def grow(self, capacity: int) -> None:
        def longer(x: Tensor) -> Tensor:
            y = x.new_empty(x.shape[0], capacity, *x.shape[2:])
            y[:, :self.start] = x[:, :self.start]
            return y

        self.key_positions, self.capacity = longer(self.key_positions), capacity
        for layer in self.layers:
            layer.tokens = {name: longer(x) for name, x in layer.tokens.items()}

    def keep(self, rows: Tensor) -> None:
        """Drop the sequences that are not in `rows` (1-D, indices), in place."""
        self.batch, self.key_positions = len(rows), self.key_positions[rows]
        for layer in self.layers:
            layer.tokens = {name: x[rows] for name, x in layer.tokens.items()}
            layer.sequence = {name: x[rows] for name, x in layer.sequence.items()}


class CacheLayer:
    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.tokens: dict[str, Tensor] = {}
        self.sequence: dict[str, Tensor] = {}

    def append(self, **new: Tensor) -> tuple[Tensor, ...]:
        start, end = self.cache.start, self.cache.length
        for name, x in new.items():
            if name not in self.tokens:
                self.tokens[name] = x.new_empty(self.cache.batch, self.cache.capacity, *x.shape[2:])
            self.tokens[name][:, start:end] = x
        return tuple(self.tokens[name][:, :end] for name in new)

    def get(self, name: str) -> Tensor | None:
        return self.sequence.get(name)

    def put(self, name: str, value: Tensor) -> None:
        self.sequence[name] = value
