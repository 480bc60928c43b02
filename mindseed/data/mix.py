"""A weighted mixture of streams that is still a function of the index.

Drawing each row's source at random would need a history to know how far each source has come. Here the stream is cut
into blocks of BLOCK rows, and every block takes the same number of rows from each source, in a shuffled order. How
many rows of source s came before index i then follows from i alone, the proportions hold exactly over any block, and
each source goes through its own epochs undisturbed.
"""
from __future__ import annotations

import copy
from typing import Any, Callable, Sequence

import numpy as np

from mindseed.base.errors import UserError
from mindseed.data.loader import Arrays, Rows
from mindseed.data.shuffle import key_of, shuffled

BLOCK = 1000                       # weights are rounded to thousandths


class Mixture:
    """`Rows` that take from several others in proportion to their weights (of rows, which are all equally long).

    Give it to a `RowSource`. Raises UserError for weights that are negative or round to nothing, rows of unequal
    length, or of several kinds, since one objective has to read them all.
    """

    def __init__(self, parts: Sequence[tuple[Rows, float]], *, seed: int = 0, names: Sequence[str] = ()) -> None:
        self.parts, self.seed = [rows for rows, _ in parts], seed
        self.names = list(names) or [f"part {i}" for i in range(len(parts))]
        weights = np.array([weight for _, weight in parts], float)
        if not len(parts) or not np.isfinite(weights).all() or (weights <= 0).any():
            raise UserError(f"a mixture needs positive weights, got {weights.tolist()}; leave out what has weight 0")
        lengths = {rows.seq_len for rows in self.parts}
        if len(lengths) > 1:
            raise UserError(f"the parts of a mixture must have rows of one length, got seq_len {sorted(lengths)}")
        self.seq_len = lengths.pop()
        kinds = [(type(rows).__name__, *rows.extras) for rows in self.parts]
        if len(set(kinds)) > 1:
            raise UserError("the parts of a mixture must be of one kind, got "
                            + ", ".join(f"{name}: {' + '.join(kind)}" for name, kind in zip(self.names, kinds)))
        self.extras = self.parts[0].extras
        self.counts = largest_remainder(weights, BLOCK)
        if not self.counts.all():
            name = self.names[int(np.argmin(self.counts))]
            raise UserError(f"the weight of {name} is under 1/{BLOCK} of the mixture; raise it or leave it out")
        self.before = np.cumsum(self.counts) - self.counts

    def __len__(self) -> int:
        """Rows until the part that lasts longest has been gone through once."""
        return int(max(-(-len(rows) * BLOCK // int(count)) for rows, count in zip(self.parts, self.counts)))

    def _locate(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Which part the rows at `indices` come from, and their indices there."""
        indices = np.asarray(indices, np.int64)
        blocks, places = indices // BLOCK, indices % BLOCK
        for block in np.unique(blocks):
            now = blocks == block
            places[now] = shuffled(places[now], BLOCK, key_of(self.seed, 4, int(block)))
        parts = np.searchsorted(self.before, places, side="right") - 1
        return parts, blocks * self.counts[parts] + places - self.before[parts]

    def width(self, indices: Sequence[int]) -> int:
        parts, inner = self._locate(indices)
        return max(self.parts[part].width(inner[parts == part]) for part in np.unique(parts))

    def write(self, indices: Sequence[int], out: Arrays, at: Sequence[int]) -> None:
        parts, inner = self._locate(indices)
        for part in np.unique(parts):
            mine = np.flatnonzero(parts == part)
            self.parts[part].write(inner[mine], out, [at[b] for b in mine])

    def describe(self, index: int) -> list[str]:
        parts, inner = self._locate([index])
        return self.parts[parts[0]].describe(int(inner[0]))

    def identity(self) -> dict[str, Any]:
        return {"mixture": [[int(n), rows.identity()] for n, rows in zip(self.counts, self.parts)], "seed": self.seed}

    def mapped(self, change: Callable[[Rows], Rows]) -> Mixture:
        """The same mixture of changed parts, which bring more along."""
        mixture = copy.copy(self)
        mixture.parts = [change(part) for part in self.parts]
        mixture.extras = mixture.parts[0].extras
        return mixture

    def epochs(self, rows_seen: int) -> dict[str, float]:
        """How often each part has been gone through after `rows_seen` rows."""
        return {name: rows_seen * int(count) / BLOCK / len(rows)
                for name, rows, count in zip(self.names, self.parts, self.counts)}


def largest_remainder(weights: np.ndarray, total: int) -> np.ndarray:
    """Integers in proportion to `weights` that add up to `total`: the largest fractions are rounded up."""
    exact = weights / weights.sum() * total
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[:total - counts.sum()]] += 1
    return counts
