"""Packing: which documents share a row, decided once, so that few slots of a batch are padding.

A document of n tokens fills n - 1 slots (each token but the last predicts the next). A *segment* is a piece of one
document that lies in one row; a *plan* is the list of rows, each a few segments. Attention never crosses a segment,
since positions restart at each, so any documents may be neighbours.

Three strategies:
    best-fit    Best-fit decreasing (2404.10830): the longest document first, each into the row where it leaves least
                room. Text is cut only where a document is longer than a row; nearly nothing is padding.
    sequential  Documents in shuffled order, a new row when the next one does not fit.
    pad         One segment a row, what most simple trainers do: the baseline to measure against.

The paper walks over documents with a segment tree. We walk over *lengths*: all documents of one length behave alike,
and all open rows with one remaining space do too, so one step places many documents, and a million take about a
second in numpy. Documents come in windows of WINDOW, shuffled, so that memory does not grow with the corpus.
"""
from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Literal, get_args

import numpy as np

from mindseed.base.errors import UserError
from mindseed.base.files import atomic, locked, read_json, recover, write_json
from mindseed.data.shards import Documents, Mapped, write_arrays
from mindseed.data.shuffle import key_of, shuffled

Strategy = Literal["best-fit", "sequential", "pad"]
WINDOW = 1 << 18                   # documents that are packed together
VERSION = 1                        # of the algorithm: an old plan on disk is not reused after a change


@dataclass(frozen=True)
class Plan:
    """Row r holds segments[rows[r]:rows[r + 1]]; a segment is (document, first slot, slots), int32."""

    segments: np.ndarray           # (segments, 3) int32
    rows: np.ndarray               # (rows + 1,) int64
    stats: Stats
    mapped: Mapped | None = None   # the file behind them, whose pages are to be given back now and then

    def __len__(self) -> int:
        return len(self.rows) - 1


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What a plan does to its documents."""

    rows: int
    segments: int
    slots: int                     # used ones, of rows * seq_len
    fill: float                    # the share of slots that hold a token, 0..1
    pieces: int                    # texts longer than a row, continued in further segments
    cut: int                       # conversations longer than a row, of which the end is left out
    dropped: int                   # of these and of very short documents: nothing learned is left, so not used

    def __str__(self) -> str:
        text = f"{self.rows:,} rows, {100 * self.fill:.2f}% filled"
        for number, what in ((self.pieces, "long texts in pieces"), (self.cut, "long conversations cut"),
                             (self.dropped, "dropped (nothing to learn in them)")):
            text += f", {number:,} {what}" if number else ""
        return text


STATS = {**dict.fromkeys(("rows", "segments", "slots", "pieces", "cut", "dropped"), int), "fill": float}


def plan(documents: Documents, seq_len: int, *, strategy: Strategy = "best-fit", seed: int = 0,
         pieces: bool = False) -> Plan:
    """The packing of `documents` into rows of `seq_len` slots: a function of its arguments alone.

    Kept in `plans/` beside the shards and mapped from there the next time. `pieces` continues long conversations in
    further segments too, as evaluation wants it. Raises UserError if nothing is left to train on.
    """
    if strategy not in get_args(Strategy):
        raise UserError(f"packing {strategy!r} is not one of {', '.join(get_args(Strategy))}")
    if seq_len < 1:
        raise UserError(f"seq_len = {seq_len} must be at least 1")
    if not len(documents):
        raise UserError("there are no documents to pack: is the split empty? A larger --heldout gives it some")
    folder = documents.folder
    if folder is None or not os.access(folder, os.W_OK):
        return _in_memory(documents, seq_len, strategy, seed, pieces)
    about = f"{VERSION} {documents.fingerprint} {seq_len} {strategy} {seed} {pieces}"
    name = f"{strategy}-{seq_len}-{hashlib.sha256(about.encode()).hexdigest()[:12]}"
    folder = folder / "plans" / name
    with contextlib.suppress(UserError):           # it is there and whole
        return _from_disk(folder)
    try:
        with locked(folder.parent / ".lock"):      # of several ranks or runs, the first plans for all
            with contextlib.suppress(UserError):
                return _from_disk(recover(folder))
            _to_disk(folder, documents, seq_len, strategy, seed, pieces)
            return _from_disk(folder)
    except PermissionError:                        # another user's folder
        return _in_memory(documents, seq_len, strategy, seed, pieces)


def _from_disk(folder: Path) -> Plan:
    """The plan kept in `folder`; UserError if it is missing or damaged."""
    stats, mapped = Stats(**read_json(folder / "stats.json", STATS)), Mapped(folder / "plan.safetensors")
    if not {"segments", "rows"} <= mapped.arrays.keys():
        raise UserError(f"{folder} is damaged")
    segments, rows = mapped.arrays["segments"], mapped.arrays["rows"]
    if len(rows) != stats.rows + 1 or rows[-1] != len(segments) or segments[:, 2].sum(dtype=np.int64) != stats.slots:
        raise UserError(f"{folder} is damaged")
    mapped.release()
    return Plan(segments, rows, stats, mapped)


def _in_memory(documents: Documents, *settings) -> Plan:
    windows, counts = _Windows(documents, *settings), []
    segments = [counts.append(count) or window for window, count in windows]
    rows = np.concatenate([[0], *counts]).cumsum()
    return Plan(np.concatenate(segments), rows, windows.stats())


def _to_disk(folder: Path, documents: Documents, *settings) -> None:
    windows = _Windows(documents, *settings)
    with atomic(folder) as temp:
        temp.mkdir(parents=True)
        segments, counts = [], []
        for number, (window, count) in enumerate(windows):            # spilled, so that memory stays constant
            np.save(temp / f"{number}.npy", window)
            segments.append(np.load(temp / f"{number}.npy", mmap_mode="r"))
            counts.append(count)
        rows = np.concatenate([[0], *counts]).cumsum()
        write_arrays(temp / "plan.safetensors", {"rows": [rows], "segments": segments})
        write_json(temp / "stats.json", windows.stats().__dict__)
        for number in range(len(segments)):
            (temp / f"{number}.npy").unlink()


class _Windows:
    """Iterates over (segments ordered by row, number of segments per row), window by window, and counts."""

    def __init__(self, documents: Documents, seq_len: int, strategy: Strategy, seed: int, pieces: bool) -> None:
        self.documents, self.seq_len, self.strategy, self.seed, self.pieces = documents, seq_len, strategy, seed, pieces
        self.seen = dict.fromkeys(("rows", "segments", "slots", "pieces", "cut", "dropped"), 0)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        n, rows_of = len(self.documents), {"best-fit": best_fit, "sequential": next_fit, "pad": one_each}[self.strategy]
        for start in range(0, n, WINDOW):
            order = shuffled(np.arange(start, min(start + WINDOW, n)), n, key_of(self.seed, 1))
            segments = self._segments(order)
            if not len(segments):
                continue
            row = rows_of(segments[:, 2], self.seq_len)
            segments = segments[np.argsort(row, kind="stable")]
            counts = np.bincount(row)
            for name, value in (("rows", len(counts)), ("segments", len(row)), ("slots", segments[:, 2].sum())):
                self.seen[name] += int(value)
            yield segments, counts
        if not self.seen["rows"]:
            raise UserError(f"no document has anything to learn within its first {self.seq_len} tokens; raise "
                            "data.seq_len")

    def _segments(self, order: np.ndarray) -> np.ndarray:
        """The segments of some documents, (n, 3): text in as many as it needs, a conversation cut to one."""
        slots = self.documents.lengths[order] - 1
        cut = (self.documents.chat[order] > 0) & (slots > self.seq_len) & (not self.pieces)
        keep = slots > 0
        for at in np.flatnonzero(cut):
            trainable = self.documents.slice(int(order[at]), 1, self.seq_len + 1)[1]
            keep[at] = trainable.any()
        self.seen["cut"] += int((cut & keep).sum())
        self.seen["dropped"] += int((~keep).sum())
        slots = np.where(cut, self.seq_len, slots)[keep]
        order = order[keep]
        times = -(-slots // self.seq_len)                                            # segments per document
        self.seen["pieces"] += int((times > 1).sum())
        document, whole = np.repeat(order, times), np.repeat(slots, times)
        first = (np.arange(len(document)) - np.repeat(np.cumsum(times) - times, times)) * self.seq_len
        return np.stack([document, first, np.minimum(whole - first, self.seq_len)], 1).astype(np.int32)

    def stats(self) -> Stats:
        return Stats(**self.seen, fill=self.seen["slots"] / (self.seen["rows"] * self.seq_len))


# ---------------------------------------------------------- strategies: (lengths, capacity) -> row of each segment

def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing. Row numbers have no gaps; equal lengths keep their order. Lengths lie in 1..capacity."""
    order = np.argsort(-lengths, kind="stable")
    falling = lengths[order]
    starts = np.flatnonzero(np.diff(falling, prepend=capacity + 1))
    row = np.empty(len(lengths), np.int64)
    open_rows: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]      # by remaining space
    spaces = 0                                                                 # bit s is set: open_rows[s] has rows
    rows = 0
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(lengths)]):
        length = int(falling[start])
        while start < stop:
            fitting = spaces >> length
            if fitting:
                space = length + (fitting & -fitting).bit_length() - 1         # the least room that is enough
                here = open_rows[space].pop()
                if not open_rows[space]:
                    spaces ^= 1 << space
            else:
                space = capacity
                here = np.arange(rows, rows + -(-(stop - start) // (capacity // length)))
                rows += len(here)
            each = space // length                                             # after the first, the row fits best
            full, rest = divmod(stop - start, each)
            used = here[:full]
            row[order[start:start + len(used) * each]] = np.repeat(used, each)
            start += len(used) * each
            touched = [(used, space - each * length)]
            if len(here) > full and rest:
                row[order[start:stop]] = here[full]
                start = stop
                touched.append((here[full:full + 1], space - rest * length))
                full += 1
            for some, left in [*touched, (here[full:], space)]:
                if len(some) and left:
                    open_rows[left].append(some)
                    spaces |= 1 << left
    return row


def next_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """In the order given; a row is closed by the first segment that does not fit."""
    ends = np.cumsum(lengths)
    following = np.searchsorted(ends, ends - lengths + capacity, side="right").tolist()   # first that does not fit
    row, at, rows = np.empty(len(lengths), np.int64), 0, 0
    while at < len(lengths):
        row[at:following[at]] = rows
        at, rows = following[at], rows + 1
    return row


def one_each(lengths: np.ndarray, capacity: int) -> np.ndarray:
    return np.arange(len(lengths))
