"""Bits per byte on held-out documents: the loss of a model in a unit that does not depend on its tokenizer."""
from __future__ import annotations

import math
from typing import Iterable

import torch

from mindseed.base import dist
from mindseed.core import Batch
from mindseed.train.native import NativeBackend


@torch.no_grad()
def evaluate(backend: NativeBackend, batches: Iterable[Batch], *, raw_bytes: int) -> dict[str, float]:
    """Negative log-likelihood over all supervised tokens of `batches`, which together spell `raw_bytes` bytes of UTF-8.

    A token counts once, whatever it weighs in training: the result is a property of the text.

    Every rank is given all batches and takes its share; the result is the same on all. The model's mode is left alone.
    """
    device = backend.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)                     # nats, tokens
    for i, batch in enumerate(batches):
        if i % dist.row_ranks() != dist.row_rank():
            continue
        batch = batch.to(device)
        sums += torch.stack(backend.nll(backend.cut(batch))).double()
    nats, tokens = dist.sum_over_ranks(sums).tolist()
    return {"bits_per_byte": nats / math.log(2) / max(raw_bytes, 1), "nll": nats / max(tokens, 1)}
