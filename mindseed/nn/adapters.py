"""Which adapters of a model answer: one switch that all of them read, held by each and by nobody else.

An adapter changes what a Linear computes (see linear.py); several of them, by name, may wait at every Linear. The
switch says which are added and how much (`active`), or, while an engine serves many requests over one base, which one
each row of the batch has for itself (`rows_use`). There is no global state: two models have two switches.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from mindseed.base.errors import UserError


class Switch:
    """`names` are all adapters of the model, `active` the weights of those that are added everywhere. `version` counts
    what makes copies stale."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.active: dict[str, float] = {}
        self.routed: set[str] = set()             # adapters of stacked experts, which rows cannot choose between
        self.frozen: list[nn.Parameter] = []      # what of the base learnt before there were adapters
        self.rows: Tensor | None = None           # (B,): 0 for the base, else 1 + the index in `names`
        self.only: int | None = None              # the number that all rows have, if it is the same
        self.version = 0

    @property
    def by_row(self) -> bool:
        return self.rows is not None

    def require(self, name: str) -> None:
        """UserError unless rows may use this adapter."""
        if name not in self.names:
            raise UserError(f"there is no adapter {name!r}; {spelt(self.names)}")
        if name in self.routed:
            raise UserError(f"the adapter {name!r} changes routed experts, between whose versions the rows of a batch "
                            "cannot choose; merge it into a model of its own")
        if self.active:
            raise UserError(f"{spelt(self.active)} and active for all rows; set_active(model, {{}}) before a row "
                            "chooses its own")

    @contextlib.contextmanager
    def rows_use(self, names: Sequence[str | None], device: torch.device | str = "cpu") -> Iterator[None]:
        """Within the block row b of every batch is answered with the adapter names[b], or by the base (None)."""
        for name in filter(None, set(names)):
            self.require(name)
        numbers = [0 if name is None else 1 + self.names.index(name) for name in names]
        before = self.rows, self.only
        self.rows = torch.tensor(numbers, device=device)
        self.only = numbers[0] if len(set(numbers)) == 1 else None
        try:
            yield
        finally:
            self.rows, self.only = before

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Within the block the base answers alone."""
        before = self.active, self.rows, self.only
        self.active, self.rows, self.only = {}, None, None
        try:
            yield
        finally:
            self.active, self.rows, self.only = before


def switch_of(model: nn.Module) -> Switch | None:
    """The switch of a model's adapters; None if it has none."""
    return next((found for module in model.modules() if isinstance(found := getattr(module, "switch", None), Switch)),
                None)


def spelt(names: Sequence[str] | dict[str, float]) -> str:
    return f"{', '.join(names)} {'are' if len(names) > 1 else 'is'} there" if names else "the model has none"
