"""Batches of packed rows: a stream that is a function of (seed, index), whose state is one integer.

Two things are kept apart. `Rows` are what one data set (or a mixture, mix.py) offers: row number `index` of an endless
stream, written into arrays. A `PackedSource` deals such rows out: batch after batch, to `world` ranks in turn. It
counts the rows of ALL ranks, so a run that resumes on another number of ranks goes through the same rows.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Iterator, Protocol, Sequence

import numpy as np
import torch

from mindseed.base.errors import UserError
from mindseed.core import Batch
from mindseed.data.pack import Plan, Strategy, plan
from mindseed.data.shards import Documents
from mindseed.data.shuffle import key_of, shuffled


@dataclass(frozen=True)
class Arrays:
    """A batch while it is being filled, (B, T) each, zero at first: a padded slot is a token 0 at position 0 of
    weight 0, and, since its position is 0, a document of its own."""

    ids: np.ndarray                # int64
    targets: np.ndarray            # int64
    weights: np.ndarray            # float32
    positions: np.ndarray          # int64
    extra: dict[str, np.ndarray] = field(default_factory=dict)       # (B, ...) each: what the rows bring beside these

    @classmethod
    def zeros(cls, batch_size: int, width: int) -> Arrays:
        shape = batch_size, width
        return cls(np.zeros(shape, np.int64), np.zeros(shape, np.int64),
                   np.zeros(shape, np.float32), np.zeros(shape, np.int64))

    def put(self, b: int, t: int, ids: np.ndarray, trainable: np.ndarray | None, position: int = 0) -> int:
        """Write a document, or a piece of one, into row b from slot t on; returns the slot after it. Its n tokens take
        n - 1 slots, since the last one is only a target."""
        here = slice(t, t + len(ids) - 1)
        self.ids[b, here] = ids[:-1]
        self.targets[b, here] = ids[1:]
        self.weights[b, here] = 1.0 if trainable is None else trainable[1:]
        self.positions[b, here] = np.arange(position, position + len(ids) - 1)
        return here.stop

    def batch(self, rows: Sequence[int]) -> Batch:
        """As tensors; `rows` are the rows' numbers in the stream, by which `describe` names their documents."""
        return Batch(ids=torch.from_numpy(self.ids), targets=torch.from_numpy(self.targets),
                     weights=torch.from_numpy(self.weights), positions=torch.from_numpy(self.positions),
                     extra={"row": torch.tensor(rows, dtype=torch.long),
                            **{name: torch.from_numpy(x) for name, x in self.extra.items()}})


class Rows(Protocol):
    """An endless stream of rows, each a pure function of its index. `seq_len` is the width of packed rows; where every
    row is as wide as what it holds (preference.py), the limit of a document."""

    seq_len: int
    extras: tuple[str, ...]                                               # what it brings beside ids and weights

    def __len__(self) -> int: ...                                         # rows in one epoch
    def width(self, indices: Sequence[int]) -> int: ...                   # slots that a batch of these rows needs
    def write(self, indices: Sequence[int], out: Arrays, at: Sequence[int]) -> None: ...
    def describe(self, index: int) -> list[str]: ...                      # file:line of its documents
    def identity(self) -> dict[str, Any]: ...                             # what the stream is a function of


def in_epochs(indices: Sequence[int], n: int, *, seed: int, shuffle: bool) -> np.ndarray:
    """Which of n things an endless stream has at `indices`: all of them in every epoch, each time in another order."""
    epochs, numbers = np.divmod(np.asarray(indices, np.int64), n)
    for epoch in np.unique(epochs if shuffle else []):
        now = epochs == epoch
        numbers[now] = shuffled(numbers[now], n, key_of(seed, 2, int(epoch)))
    return numbers


class PackedRows:
    """The packed rows of one split, in an order of their own each epoch (`shuffle=False`: as planned, for a look).

    `cross_documents` lets positions run on through a row, so that its documents see those before them, as DeepSeek-V3
    packs (2412.19437): simpler kernels, at the price of attention to what has nothing to do with the text.
    """

    extras = ()

    def __init__(self, documents: Documents, *, seq_len: int, seed: int = 0, strategy: Strategy = "best-fit",
                 shuffle: bool = True, packed: Plan | None = None, cross_documents: bool = False) -> None:
        self.documents, self.seq_len, self.cross_documents = documents, seq_len, cross_documents
        self.seed, self.strategy, self.shuffle = seed, strategy, shuffle
        self.plan = packed or plan(documents, seq_len, strategy=strategy, seed=seed)
        self._read = 0             # rows looked up: the plan's pages are given back after every 256

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def stats(self):
        return self.plan.stats

    def width(self, indices: Sequence[int]) -> int:
        return self.seq_len

    def _planned(self, indices: Sequence[int]) -> list[int]:
        """Rows of the plan that the stream has at `indices`."""
        return in_epochs(indices, len(self.plan), seed=self.seed, shuffle=self.shuffle).tolist()

    def _segments(self, row: int) -> list[list[int]]:
        self._read += 1
        if self._read % 256 == 0 and self.plan.mapped:
            self.plan.mapped.release()
        first, stop = self.plan.rows[row:row + 2].tolist()
        return self.plan.segments[first:stop].tolist()

    def write(self, indices: Sequence[int], out: Arrays, at: Sequence[int]) -> None:
        """Write the rows at `indices` of the stream into rows `at` of `out`."""
        for b, row in zip(at, self._planned(indices)):
            t = 0
            for document, first, slots in self._segments(row):
                ids, trainable = self.documents.slice(document, first, first + slots + 1)
                t = out.put(b, t, ids, trainable, t if self.cross_documents else 0)

    def describe(self, index: int) -> list[str]:
        return [self.documents.name(document) for document, _, _ in self._segments(self._planned([index])[0])]

    def identity(self) -> dict[str, Any]:
        return {"data": self.documents.fingerprint, "seq_len": self.seq_len, "packing": self.strategy,
                "seed": self.seed, "shuffle": self.shuffle, "cross_documents": self.cross_documents}


class RowSource:
    """A Source over any `Rows`. Its state is `rows_seen`, over all ranks; the rest of the state dict is there to
    tell, by a UserError, that a run is resumed on other data."""

    def __init__(self, rows: Rows, *, batch_size: int, rank: int = 0, world: int = 1) -> None:
        if batch_size < 1 or not 0 <= rank < world:
            raise UserError(f"batch_size = {batch_size} must be at least 1, rank = {rank} below world = {world}")
        self.rows, self.batch_size, self.rank, self.world, self.rows_seen = rows, batch_size, rank, world, 0

    @property
    def seq_len(self) -> int:
        return self.rows.seq_len

    @property
    def epoch(self) -> float:
        """How often the data have been gone through."""
        return self.rows_seen / len(self.rows)

    def __iter__(self) -> RowSource:
        return self

    def __next__(self) -> Batch:
        first = self.rows_seen + self.rank * self.batch_size
        indices = range(first, first + self.batch_size)
        out = Arrays.zeros(self.batch_size, self.rows.width(indices))
        self.rows.write(indices, out, range(self.batch_size))
        self.rows_seen += self.batch_size * self.world
        return out.batch(indices)

    def describe(self, rows: Any) -> list[str]:
        """Where the documents in some rows came from, as file:line; `rows` is a batch's `extra["row"]`."""
        return [name for index in torch.as_tensor(rows).tolist() for name in self.rows.describe(index)]

    def state_dict(self) -> dict[str, Any]:
        return {"rows_seen": self.rows_seen, "stream": self.rows.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        here = self.rows.identity()
        if state["stream"] != here:
            was = state["stream"]
            keys = [key for key in {**was, **here} if was.get(key) != here.get(key)]
            raise UserError("the checkpoint was made on another stream of data: "
                            + "; ".join(f"{key} was {was.get(key)}, is {here.get(key)}" for key in keys)
                            + ". Resume with the same data, or start a new run from the checkpoint's model")
        self.rows_seen = state["rows_seen"]


class PackedSource(RowSource):
    """A Source over the packed documents of one split: the usual case, in one call."""

    def __init__(self, documents: Documents, *, seq_len: int, batch_size: int, seed: int = 0, rank: int = 0,
                 world: int = 1, strategy: Strategy = "best-fit", shuffle: bool = True) -> None:
        rows = PackedRows(documents, seq_len=seq_len, seed=seed, strategy=strategy, shuffle=shuffle)
        super().__init__(rows, batch_size=batch_size, rank=rank, world=world)


class Evaluation:
    """A finite pass over documents: all of them, or `limit`, each whole (long ones in pieces).

    Since every token after a document's first is a target exactly once, the sum of -log2 p over all batches divided
    by `bytes` is the exact number of bits per byte. All batches have the same shape, so the last one may hold empty
    rows. Iterating again starts from the beginning.
    """

    def __init__(self, documents: Documents, *, seq_len: int, batch_size: int, limit: int | None = None) -> None:
        if not len(documents):
            raise UserError("the held-out split is empty; prepare with a larger --heldout, or more data")
        chosen = np.arange(len(documents))
        if limit is not None and limit < len(documents):
            chosen = np.sort(shuffled(np.arange(limit), len(documents), key_of(0, 3)))
        some = _Chosen(documents, chosen)
        self.rows = PackedRows(some, seq_len=seq_len, shuffle=False, packed=plan(some, seq_len, pieces=True))
        self.batch_size, self.documents = batch_size, len(chosen)
        self.bytes = int(documents.bytes[chosen].sum())

    def __len__(self) -> int:
        """Batches."""
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, len(self.rows), self.batch_size):
            real = range(first, min(first + self.batch_size, len(self.rows)))
            out = Arrays.zeros(self.batch_size, self.rows.seq_len)
            self.rows.write(real, out, range(len(real)))
            yield out.batch(range(first, first + self.batch_size))


class Once:
    """A finite pass over the first epoch of any rows, or `limit` of them: held-out pairs, say. The last batch may have
    fewer rows. Iterating again starts from the beginning."""

    def __init__(self, rows: Rows, *, batch_size: int, limit: int | None = None) -> None:
        self.rows, self.batch_size = rows, batch_size
        self.count = len(rows) if limit is None else min(limit, len(rows))

    def __len__(self) -> int:
        """Batches."""
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, self.count, self.batch_size):
            indices = range(first, min(first + self.batch_size, self.count))
            out = Arrays.zeros(len(indices), self.rows.width(indices))
            self.rows.write(indices, out, range(len(indices)))
            yield out.batch(indices)


class _Chosen:
    """Some of the documents, renumbered."""

    folder = None

    def __init__(self, documents: Documents, chosen: np.ndarray) -> None:
        self.documents, self.chosen, self.fingerprint = documents, chosen, documents.fingerprint
        self.lengths, self.bytes, self.chat = documents.lengths[chosen], documents.bytes[chosen], documents.chat[chosen]
        self.labels = None if documents.labels is None else documents.labels[chosen]

    def __len__(self) -> int:
        return len(self.chosen)

    def slice(self, i: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        return self.documents.slice(int(self.chosen[i]), start, stop)

    def get(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        return self.documents.get(int(self.chosen[i]))

    def name(self, i: int) -> str:
        return self.documents.name(int(self.chosen[i]))
