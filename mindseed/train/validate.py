"""Bits per byte on held-out documents: the loss of a model in a unit that does not depend on its tokenizer."""
from __future__ import annotations

import math
from typing import Iterable, Iterator

import torch

from mindseed.base import dist
from mindseed.core import Batch
from mindseed.train.native import NativeBackend


def dealt(backend: NativeBackend, batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """This rank's share of batches that all ranks are given, and whether it counts: ranks that share experts run the
    model together, so who has none left does the last one again for the others' sake."""
    ranks, mine, number, batch = dist.row_ranks(), dist.row_rank(), 0, None
    for batch in batches:
        if number % ranks == mine:
            yield batch, True
        number += 1
    together = backend.mesh is not None and backend.mesh.sizes.expert > 1
    if together and batch is not None and mine >= (number % ranks or ranks):
        yield batch, False


@torch.no_grad()
def evaluate(backend: NativeBackend, batches: Iterable[Batch], *, raw_bytes: int) -> dict[str, float]:
    """Negative log-likelihood over all supervised tokens of `batches`, which together spell `raw_bytes` bytes of UTF-8.

    A token counts once, whatever it weighs in training: the result is a property of the text.

    Every rank is given all batches and takes its share; the result is the same on all. The model's mode is left alone.
    """
    device = backend.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)                     # nats, tokens
    for batch, counts in dealt(backend, batches):
        found = torch.stack(backend.nll(backend.cut(batch.to(device)))).double()
        sums += found if counts else 0
    nats, tokens = dist.sum_over_ranks(sums).tolist()
    return {"bits_per_byte": nats / math.log(2) / max(raw_bytes, 1), "nll": nats / max(tokens, 1)}
