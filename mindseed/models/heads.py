"""The value head: one number per token, beside the logits. A reward model and a critic are this and nothing else.

What the number means is for the objective to say: how good the answer is (objectives/reward.py, read at a document's
last token), whether a step is right (at its end), or how much reward is still to come (PPO's critic). The head is a
linear map with a bias, so that a critic need not learn the mean of its returns through the whole model, and begins near
0. It stays in float32, or above, in a model of any dtype: rewards are compared by small differences, and it costs
nothing.

In the model directory it lies in a file of its own (interop/directory.py), so that to all others it is the language
model that it was before.
"""
from __future__ import annotations

from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindseed.base.errors import UserError
from mindseed.models.lm import LM

BATCH_TOKENS = 8192                               # of one forward pass, padding included


class ValueHead(nn.Linear):
    """hidden (B, T, D) -> values (B, T)."""

    def __init__(self, dim: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        super().__init__(dim, 1, dtype=torch.promote_types(dtype, torch.float32), device=device)

    def forward(self, hidden: Tensor) -> Tensor:
        wide = torch.promote_types(torch.promote_types(self.weight.dtype, hidden.dtype), torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(wide), self.weight.to(wide), self.bias.to(wide))[..., 0]

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Values of hidden vectors of size 1 begin with a deviation of 0.1."""
        self.weight.normal_(0, 0.1 / self.in_features ** 0.5, generator=generator)
        self.bias.zero_()


def add_value_head(model: LM, seed: int = 0) -> LM:
    """Give the model a new value head, of weights that depend on `seed` alone; returns the model."""
    head = ValueHead(model.config.dim, dtype=model.embed.weight.dtype)
    head.reset_parameters(torch.Generator().manual_seed(seed))
    model.value_head = head.to(model.embed.weight.device)
    return model


@torch.no_grad()
def values_of(model: LM, documents: Sequence[Sequence[int]], batch_tokens: int = BATCH_TOKENS) -> list[Tensor]:
    """The values of every document of n ids, (n - 1,) each, on the CPU: those that training sees, where the last id is
    only a target.

    Documents of like length go through the model together, at most `batch_tokens` slots at a time unless one alone has
    more. The model computes as in use (eval) and is left in the mode it had; autocast is the caller's to enter.
    """
    if model.value_head is None:
        raise UserError("this model gives no rewards: it has no value head. Train one on preference pairs first")
    if any(len(ids) < 2 for ids in documents):
        raise ValueError("a document of fewer than two ids has no value")
    device, training = model.embed.weight.device, model.training
    found: list[Tensor] = [torch.empty(0)] * len(documents)
    model.eval()
    try:
        for some in alike([len(ids) - 1 for ids in documents], batch_tokens):
            width = len(documents[some[0]]) - 1
            ids, positions = torch.zeros(2, len(some), width, dtype=torch.long)
            for row, i in enumerate(some):
                slots = len(documents[i]) - 1
                ids[row, :slots] = torch.as_tensor(documents[i][:-1])
                positions[row, :slots] = torch.arange(slots)
            values = model(ids.to(device), positions.to(device)).values.cpu()
            for row, i in enumerate(some):
                found[i] = values[row, :len(documents[i]) - 1]
    finally:
        model.train(training)
    return found


def score(model: LM, documents: Sequence[Sequence[int]], batch_tokens: int = BATCH_TOKENS) -> list[float]:
    """The reward of each document: its last value (see `values_of`). A document is a whole conversation as the chat
    renderer makes it, so the value that counts is that of the token that ends the answer."""
    return [values[-1].item() for values in values_of(model, documents, batch_tokens)]


def alike(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Numbers of documents of so many slots in batches, longest first in each, of at most `batch_tokens` when padded to
    the longest (or of one document)."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
