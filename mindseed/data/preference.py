"""Preferences as rows: two documents side by side, in batches no wider than what they hold.

A pair is the chosen conversation and the rejected one, packed like any two documents, whose positions begin at 0. So no
micro-batch and no rank can cut it apart, and neither is padded to the length of the other. Pairs are of very different
lengths, and one is all that a row holds, hence a batch is only as wide as its longest row (`Rows.width`).

Answers that were judged one by one, good or bad (KTO), are rows of two documents as well: the conversation, and the
same prompt with the answer to another one, by which KTO finds out how far the policy has gone from its reference.

A frozen reference thinks the same of a pair in every epoch. `reference_logps` asks it once and keeps what it said, so
that it need not be in memory during training.
"""
from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mindseed.base import dist
from mindseed.base.errors import UserError
from mindseed.base.files import atomic
from mindseed.base.log import StepBar
from mindseed.core import Output
from mindseed.data.loader import Arrays, in_epochs
from mindseed.data.shards import Documents
from mindseed.data.shuffle import key_of, shuffled
from mindseed.objectives.dpo import side_logps

MULTIPLE = 8                       # widths of batches are rounded up to one, so that they do not all differ
SHOWN = 5                          # dropped rows that a summary names
Side = tuple[np.ndarray, np.ndarray]              # ids, which of them are learned


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What the limit of length leaves of the data."""

    what: str                      # of which there are so many
    rows: int
    cut: int                       # of these, whose end is left out
    dropped: tuple[str, ...]       # file:line of others, of which nothing would be left that tells good from bad
    kinds: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{self.rows:,} {self.what}"
        text += f" ({', '.join(f'{n:,} {kind}' for kind, n in self.kinds.items())})" if self.kinds else ""
        text += f", {self.cut:,} cut at their end" if self.cut else ""
        if self.dropped:
            more = f" and {len(self.dropped) - SHOWN:,} more" if len(self.dropped) > SHOWN else ""
            text += (f", {len(self.dropped):,} dropped (the limit leaves nothing of an answer, or no difference): "
                     f"{', '.join(self.dropped[:SHOWN])}{more}")
        return text


class TwoDocuments(ABC):
    """Rows of two documents each, in an order of their own each epoch.

    `seq_len` limits each document, in slots: of a longer one the end is cut off, as of long conversations in general.
    Rows of which no answer would be left, or no difference between two, are dropped, counted and named in `stats`.
    `reference` are the log-probabilities that `reference_logps` found, (rows before dropping, 2).
    """

    what: str                      # a row is one of these
    judged: int                    # of the two documents, those whose answers are compared or judged

    def __init__(self, documents: Documents, *, seq_len: int, seed: int = 0, shuffle: bool = True) -> None:
        if seq_len < 1:
            raise UserError(f"seq_len = {seq_len} must be at least 1")
        if not len(documents):
            raise UserError(f"there are no {self.what}: is the split empty? A larger --heldout gives it some")
        self.documents, self.seq_len, self.seed, self.shuffle = documents, seq_len, seed, shuffle
        self.reference: np.ndarray | None = None
        long = np.flatnonzero(documents.lengths.reshape(-1, self.judged).max(1) > seq_len + 1)
        lost = [number for number in long.tolist() if not self.teaches(number)]
        self.count = len(documents) // self.judged
        self.numbers = np.setdiff1d(np.arange(self.count), lost)
        self.stats = Kept(what=self.what, rows=len(self.numbers), cut=len(long) - len(lost), kinds=self.kinds(),
                          dropped=tuple(self.name(number) for number in lost))
        if not len(self.numbers):
            raise UserError(f"nothing is left of any of {self.count:,} {self.what} within {seq_len} tokens; raise "
                            "data.seq_len")

    @abstractmethod
    def sides(self, number: int) -> tuple[Side, Side]:
        """The two documents of a row."""

    def slots(self, numbers: Sequence[int]) -> np.ndarray:
        """How many each row takes up."""
        return np.array([sum(len(ids) - 1 for ids, _ in self.sides(number)) for number in numbers])

    def kinds(self) -> dict[str, int]:
        return {}

    def teaches(self, number: int) -> bool:
        """Whether an answer is left of every document that is judged, and any difference between two."""
        sides = self.sides(number)[:self.judged]
        same = self.judged == 2 and np.array_equal(sides[0][0], sides[1][0])
        return not same and all(learned[1:].any() for _, learned in sides)

    def name(self, number: int) -> str:
        return self.documents.name(number * self.judged)

    # ---------------------------------------------------------------------------------------------------- as Rows

    @property
    def extras(self) -> tuple[str, ...]:
        return () if self.reference is None else ("reference",)

    def __len__(self) -> int:
        return len(self.numbers)

    def at(self, indices: Sequence[int]) -> list[int]:
        """The numbers of the rows that the stream has there."""
        return self.numbers[in_epochs(indices, len(self), seed=self.seed, shuffle=self.shuffle)].tolist()

    def width(self, indices: Sequence[int]) -> int:
        return widened(self.slots(self.at(indices)))

    def write(self, indices: Sequence[int], out: Arrays, at: Sequence[int]) -> None:
        self.fill(self.at(indices), out, at)

    def fill(self, numbers: Sequence[int], out: Arrays, at: Sequence[int]) -> None:
        """Write rows by their numbers."""
        for b, number in zip(at, numbers):
            t = 0
            for ids, learned in self.sides(number):
                t = out.put(b, t, ids, learned)
        if self.reference is not None:
            room = out.extra.setdefault("reference", np.zeros((len(out.ids), 2), np.float32))
            room[list(at)] = self.reference[numbers]

    def describe(self, index: int) -> list[str]:
        return [self.name(self.at([index])[0])]

    def content(self) -> dict[str, Any]:
        """What the rows hold, in whatever order they come."""
        return {"data": self.documents.fingerprint, "rows": self.what, "seq_len": self.seq_len}

    def identity(self) -> dict[str, Any]:
        return self.content() | {"seed": self.seed, "shuffle": self.shuffle, "reference": self.reference is not None}

    def with_reference(self, logps: np.ndarray) -> TwoDocuments:
        """The same rows, which bring these log-probabilities along as `extra["reference"]`."""
        if logps.shape != (self.count, 2):
            raise ValueError(f"log-probabilities of {self.count} {self.what} have the shape {(self.count, 2)}, not "
                             f"{logps.shape}")
        rows = copy.copy(self)
        rows.reference = logps
        return rows


class PairRows(TwoDocuments):
    """Pairs of a prepared folder of kind "preference": documents 2k and 2k + 1, chosen and rejected."""

    what, judged = "pairs", 2

    def __init__(self, documents: Documents, *, seq_len: int, seed: int = 0, shuffle: bool = True) -> None:
        if len(documents) % 2 or not documents.chat.all() or documents.labels is not None:
            raise UserError("these documents are no pairs of a chosen and a rejected conversation; prepare rows of "
                            "{chosen, rejected} into a folder of their own")
        super().__init__(documents, seq_len=seq_len, seed=seed, shuffle=shuffle)

    def sides(self, number: int) -> tuple[Side, Side]:
        chosen, rejected = (self.documents.slice(2 * number + i, 0, self.seq_len + 1) for i in (0, 1))
        return chosen, rejected

    def slots(self, numbers: Sequence[int]) -> np.ndarray:
        lengths = self.documents.lengths.reshape(-1, 2)[numbers]
        return np.minimum(lengths - 1, self.seq_len).sum(1)


class UnpairedRows(TwoDocuments):
    """Judged answers, one to a row, with `extra["label"]` (B,): 1 desirable, 0 not. Of a folder of kind "unpaired", or
    of pairs, whose chosen answers count as desirable and the others as undesirable.

    The second document of a row is its prompt with the answer to another prompt: that of the next one in an order that
    is drawn once, so that a reference can be asked in advance about these as well.
    """

    what, judged = "judged answers", 1

    def __init__(self, documents: Documents, *, seq_len: int, seed: int = 0, shuffle: bool = True) -> None:
        if not documents.chat.all() or documents.labels is None and len(documents) % 2:
            raise UserError("these documents are no judged answers; prepare rows of {prompt, completion, label}, or of "
                            "{chosen, rejected}, into a folder of their own")
        self.paired = documents.labels is None
        self.labels = 1 - np.arange(len(documents)) % 2 if self.paired else documents.labels
        prompts = len(documents) // (1 + self.paired)
        if len(documents) and prompts < 2:
            raise UserError("answers are judged beside answers to other prompts, of which there must be two at least")
        order = shuffled(np.arange(prompts), prompts, key_of(seed, 5))
        self.following = np.empty(prompts, np.int64)
        self.following[order] = np.roll(order, -1)
        super().__init__(documents, seq_len=seq_len, seed=seed, shuffle=shuffle)

    def partner(self, number: int) -> int:
        """The document whose answer is put to this one's prompt."""
        if self.paired:
            return 2 * int(self.following[number // 2]) + number % 2
        return int(self.following[number])

    def sides(self, number: int) -> tuple[Side, Side]:
        ids, learned = self.documents.slice(number, 0, self.seq_len + 1)
        others, theirs = self.documents.get(self.partner(number))
        prompt, start = int(learned.argmax()), int(theirs.argmax())
        mixed = np.concatenate([ids[:prompt], others[start:]])[:self.seq_len + 1]
        return (ids, learned), (mixed, np.concatenate([learned[:prompt], theirs[start:]])[:self.seq_len + 1])

    def kinds(self) -> dict[str, int]:
        good = int(self.labels[self.numbers].sum())
        return {"desirable": good, "undesirable": len(self.numbers) - good}

    @property
    def extras(self) -> tuple[str, ...]:
        return ("label", *super().extras)

    def fill(self, numbers: Sequence[int], out: Arrays, at: Sequence[int]) -> None:
        super().fill(numbers, out, at)
        out.extra.setdefault("label", np.zeros(len(out.ids), np.int64))[list(at)] = self.labels[numbers]

    def content(self) -> dict[str, Any]:
        return super().content() | {"partners": self.seed}


def widened(slots: np.ndarray) -> int:
    return -(-int(slots.max()) // MULTIPLE) * MULTIPLE


# ----------------------------------------------------------------------------------- what a reference thinks of them

@torch.no_grad()
def reference_logps(rows: TwoDocuments, model: nn.Module | Callable[[Tensor, Tensor], Output], batch_size: int, *,
                    folder: Path | None = None, key: str | None = None, autocast: torch.dtype | None = None,
                    device: torch.device | str | None = None) -> np.ndarray:
    """Log-probabilities of the answers in both documents of every row under a reference, (rows.count, 2) float32; NaN
    for rows that are dropped. Give them to `rows.with_reference`.

    Computed once, with a bar of progress, by all ranks together, and found again in `folder` under the rows' content,
    `autocast` and `key`, which says which model it is [its `fingerprint`; needed if `model` is a function of ids and
    positions]. A module computes in eval mode and is left in the mode it had.
    """
    module = model if isinstance(model, nn.Module) else None
    if folder is not None and key is None and module is None:
        raise ValueError("what a function says can only be kept under a key")
    path = None
    if folder is not None:
        about = json.dumps([rows.content(), key or fingerprint(module), str(autocast)], sort_keys=True)
        path = Path(folder) / f"reference-{hashlib.sha256(about.encode()).hexdigest()[:16]}.npy"
        found = read_logps(path, rows.count)
        if all(dist.gather(found is not None)):
            return found
    device = device or (next(module.parameters()).device if module else "cpu")
    order = rows.numbers[np.argsort(-rows.slots(rows.numbers), kind="stable")]
    batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    mine = batches[dist.rank()::dist.world_size()]
    training = module is not None and module.training
    logps = np.full((rows.count, 2), np.nan, np.float32)
    try:
        if module:
            module.eval()
        with StepBar(len(mine), enabled=dist.is_main(), unit="batch asked of the reference") as bar:
            for i, numbers in enumerate(mine):
                logps[numbers] = of_rows(rows, numbers, model, torch.device(device), autocast)
                bar.update(i + 1, {})
    finally:
        if module:
            module.train(training)
    for theirs in dist.gather([(numbers, logps[numbers]) for numbers in mine]):
        for numbers, values in theirs:
            logps[numbers] = values
    if len(wrong := rows.numbers[~np.isfinite(logps[rows.numbers]).all(1)]):
        raise UserError(f"the reference gives {len(wrong)} of {len(rows)} {rows.what} no finite log-probability, the "
                        f"first of them in {rows.name(int(wrong[0]))}")
    if path is not None and dist.is_main():
        with atomic(path) as temp, open(temp, "wb") as file:
            np.save(file, logps, allow_pickle=False)
    dist.barrier()
    return logps


def of_rows(rows: TwoDocuments, numbers: np.ndarray, model: Callable, device: torch.device,
            autocast: torch.dtype | None) -> np.ndarray:
    out = Arrays.zeros(len(numbers), widened(rows.slots(numbers)))
    rows.fill(numbers, out, range(len(numbers)))
    batch = out.batch(numbers.tolist()).to(device)
    with torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext():
        return side_logps(model(batch.ids, batch.positions), batch)[0].to("cpu", torch.float32).numpy()


def read_logps(path: Path, count: int) -> np.ndarray | None:
    """What was kept; None if there is nothing, or nothing whole."""
    try:
        logps = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return logps if logps.shape == (count, 2) and logps.dtype == np.float32 else None


def fingerprint(module: nn.Module) -> str:
    """sha256 of all weights and buffers with their names."""
    digest = hashlib.sha256()
    for name, x in module.state_dict().items():
        digest.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
