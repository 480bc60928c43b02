"""One forward pass over the rows of a plan.

Rows that decode have one token each and go through the model together. Rows that read have chunks of many lengths;
those of about the same length go together, padded at the end with tokens that nobody sees. On a CPU a layer's weights
are read once for each such group, which costs less than padding the short to the long.
"""
from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mindseed.infer.cuda import GraphStep
from mindseed.infer.fused import FusedStep, fits
from mindseed.infer.paged import PagedCache, Pages
from mindseed.infer.scheduler import Sequence, Work
from mindseed.infer.step import decoding_step, flat
from mindseed.models.lm import LM
from mindseed.nn.adapters import Switch
from mindseed.nn.linear import transposed_product, wants_transposed

PADDING = 1.25                                    # a group is at most this much larger than its tokens


@dataclass(frozen=True)
class Passed:
    """Hidden vectors of all tokens of a pass, (N, D); those of work i begin at `offsets[i]`. The logits (N, V) of the
    tokens that follow are there if it was cheapest to compute them at once."""

    hidden: Tensor
    offsets: list[int]
    logits: Tensor | None = None


class Runner:
    """`fused` is a faster way for rows that decode, if there is one: (ids, positions, tables) -> hidden vectors. `gaps`
    are ids below `vocab` that are no tokens: they have no probability. `adapters` let every row have its own."""

    def __init__(self, model: LM, cache: PagedCache, vocab: int, fused: FusedStep | GraphStep | None = None,
                 gaps: Collection[int] = (), adapters: Switch | None = None) -> None:
        self.model, self.cache, self.vocab, self.fused, self.adapters = model, cache, vocab, fused, adapters
        self.device = model.embed.weight.device
        self.gaps = torch.tensor(sorted(gaps), device=self.device) if gaps else None
        self.step = None if fused else decoding_step(model)

    def refresh(self, adapters: Switch | None) -> None:
        """The weights have changed, in place; what copied them does so again. The model may have got adapters."""
        self.adapters = adapters
        if adapters is not None:
            adapters.version += 1
            self.fused = None
        if isinstance(self.fused, GraphStep):
            self.fused.refresh()
        elif self.fused is None:
            self.step = decoding_step(self.model)

    def run(self, work: list[Work]) -> Passed:
        """Compute what the works say, guesses included, and keep it in the cache."""
        sizes = [w.count + len(w.drafts) for w in work]
        if isinstance(self.fused, FusedStep) and max(sizes) == 1:
            hidden, logits = self.fused.logits(*self.inputs(work))
            return Passed(hidden, list(range(len(work))), self.without_gaps(logits[:, :self.vocab]))
        order: list[int] = []
        parts: list[Tensor] = []
        decoding = [i for i, size in enumerate(sizes) if size == 1]
        if decoding:
            parts.append(self.decode([work[i] for i in decoding]))
            order += decoding
        for group in alike([i for i, size in enumerate(sizes) if size > 1], sizes):
            parts += self.read([work[i] for i in group], [sizes[i] for i in group])
            order += group
        offsets, at = [0] * len(work), 0
        for i in order:
            offsets[i], at = at, at + sizes[i]
        return Passed(torch.cat(parts) if len(parts) > 1 else parts[0], offsets)

    def decode(self, work: list[Work]) -> Tensor:
        """One token of every row: (B, D)."""
        ids, positions, tables = self.inputs(work)
        if self.fused is not None:
            return self.fused(ids, positions, tables)
        rows = [w.sequence for w in work]
        with self.using([s.adapter for s in rows]):
            return self.step(ids, positions[:, None], self.pages(rows, tables))

    def using(self, names: list[str | None]) -> contextlib.AbstractContextManager:
        """Within it every row is computed with its adapter."""
        return self.adapters.rows_use(names, self.device) if self.adapters and any(names) else contextlib.nullcontext()

    def inputs(self, work: list[Work]) -> tuple[Tensor, Tensor, dict[int | None, Tensor]]:
        """Ids (B,), positions (B,) and tables of rows with one token each."""
        rows = [w.sequence for w in work]
        ids = torch.tensor([s.ids[w.start] if w.count else w.drafts[0] for s, w in zip(rows, work)],
                           device=self.device)
        return ids, torch.tensor([w.start for w in work], device=self.device), self.tables(rows)

    def read(self, work: list[Work], sizes: list[int]) -> list[Tensor]:
        """Several tokens of every row: (size, D) for each."""
        rows, width = [w.sequence for w in work], max(sizes)
        ids = [(s.ids[w.start:w.start + w.count] + w.drafts) for s, w in zip(rows, work)]
        positions = torch.tensor([[*range(w.start, w.start + n), *[-1] * (width - n)] for w, n in zip(work, sizes)],
                                 device=self.device)
        ids = torch.tensor([x + [0] * (width - len(x)) for x in ids], device=self.device)
        with self.using([s.adapter for s in rows]):
            hidden = self.model(ids, positions, self.pages(rows)).hidden          # (B, width, D)
        return [h[:n] for h, n in zip(hidden, sizes)]

    def tables(self, rows: list[Sequence]) -> dict[int | None, Tensor]:
        """Block numbers (B, n) by window."""
        found = {}
        for kind, window in enumerate(self.cache.windows):
            tables = [s.tables[kind] for s in rows]
            width = max(map(len, tables))
            found[window] = torch.tensor([t + [0] * (width - len(t)) for t in tables], device=self.device)
        return found

    def pages(self, rows: list[Sequence], tables: dict[int | None, Tensor] | None = None) -> Pages:
        slots = torch.tensor([s.slot for s in rows], device=self.device) if self.cache.slots else None
        return Pages(self.cache, self.tables(rows) if tables is None else tables, slots)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (R, V) of hidden vectors (R, D)."""
        if self.fused is not None:
            return self.without_gaps(self.fused.head(hidden)[:, :self.vocab])
        weight = (self.model.head or self.model.embed).weight[:self.vocab]
        return self.without_gaps((transposed_product if wants_transposed(hidden) else F.linear)(hidden, weight))

    def without_gaps(self, logits: Tensor) -> Tensor:
        return logits if self.gaps is None else logits.index_fill(1, self.gaps, -torch.inf)


def alike(members: list[int], sizes: list[int]) -> list[list[int]]:
    """Groups of members whose sizes differ so little that padding costs less than `PADDING`."""
    groups: list[list[int]] = []
    tokens = 0
    for i in sorted(members, key=lambda i: -sizes[i]):
        if groups and sizes[groups[-1][0]] * (len(groups[-1]) + 1) <= PADDING * (tokens + sizes[i]):
            groups[-1].append(i)
            tokens += sizes[i]
        else:
            groups.append([i])
            tokens = sizes[i]
    return groups


def fused_step(model: LM, cache: PagedCache) -> FusedStep | GraphStep | None:
    """A faster decoding step for the models that one is known for: kernels of our own on a CPU, a recorded graph on a
    GPU; None for all others."""
    if cache.int8:
        return None
    if cache.device.type == "cpu" and fits(model):
        pools = [(layer["k"].blocks.flatten(0, 1), layer["v"].blocks.flatten(0, 1)) for layer in cache.pools]
        return FusedStep(model, pools[:len(model.blocks)], cache.block_size)
    if cache.device.type == "cuda" and flat(model):
        return GraphStep(model, cache)
    return None
