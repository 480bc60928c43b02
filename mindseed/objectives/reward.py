"""Reward models: a number for an answer, learnt from pairs of which one was preferred; or for every step of it.

Outcome. Bradley and Terry (1952): that the chosen answer is preferred has the probability sigmoid(r_chosen -
r_rejected), and its logarithm is maximised (2203.02155). Only differences matter, so rewards may drift; `centre` holds
their sums near zero (2312.09244). A `margin` per pair, in `extra["margin"]` (B,), asks for more where one is much
better (2307.09288).

Process. An answer is a chain of steps, and each is right or wrong by itself (2305.20050): `extra["steps"]` (B, T) is 1
or 0 at the last token of a step, and -1 elsewhere; the reward there is the logit of its being right.

Rewards are `Output.values`, a number per token. An answer's is that of its document's last slot, which alone has read
all of it. Rows of pairs are those of dpo.py: the chosen conversation, then the rejected one.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mindseed.core import Batch, Output


@dataclass(frozen=True, kw_only=True)
class Reward:
    centre: float = 0.0
    splittable = True

    def __post_init__(self) -> None:
        if self.centre < 0:
            raise ValueError(f"centre={self.centre} must not be negative")

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def count(self, batch: Batch) -> Tensor:
        """Pairs."""
        return (batch.weights != 0).any(-1).sum()

    def loss(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        learned = (batch.weights != 0).sum(-1)                                    # (B,) tokens; 0: the row is padding
        rewards = last_values(output, batch, 2)                                   # (B, 2)
        difference = rewards[:, 0] - rewards[:, 1]
        losses = -F.logsigmoid(difference - batch.extra.get("margin", 0.0))
        if self.centre:
            losses = losses + self.centre * rewards.sum(-1).square()
        metrics = {"accuracy": (difference > 0).to(losses.dtype), "margin": difference,
                   "reward_chosen": rewards[:, 0], "reward_rejected": rewards[:, 1]}
        for name, value in output.aux.items():
            metrics[name] = (value * batch.weights).sum(-1) / learned.clamp_min(1)
            losses = losses + metrics[name]
        real = learned > 0
        return (losses * real).sum(), {name: (x * real).sum().detach() for name, x in metrics.items()}


@dataclass(frozen=True, kw_only=True)
class ProcessReward:
    splittable = True

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def count(self, batch: Batch) -> Tensor:
        """Steps."""
        return (batch.extra["steps"] >= 0).sum()

    def loss(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        known = batch.extra["steps"] >= 0
        values, right = wide_values(output)[known], batch.extra["steps"][known]
        total = F.binary_cross_entropy_with_logits(values, right.to(values.dtype), reduction="sum")
        metrics = {"accuracy": ((values > 0) == (right > 0)).sum().to(values.dtype),
                   "right": right.sum().to(values.dtype)}                         # what guessing would get, or 1 - that
        for name, value in output.aux.items():
            metrics[name] = value[known].sum().detach()
            total = total + value[known].sum()
        return total, metrics


def wide_values(output: Output) -> Tensor:
    """The values (B, T), in at least float32."""
    if output.values is None:
        raise ValueError("this model has no value head; build it with one (models/heads.py)")
    return output.values.to(torch.promote_types(output.values.dtype, torch.float32))


def last_values(output: Output, batch: Batch, documents: int) -> Tensor:
    """The value of each document's last slot, (B, documents): of rows that hold so many, padded or not."""
    number = (batch.positions == 0).cumsum(-1) - 1                                # (B, T); pads are further documents
    slots = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    last = torch.stack([(slots * (number == i)).amax(-1) for i in range(documents)], -1)
    return wide_values(output).gather(-1, last)
