"""Kahneman-Tversky optimisation (2402.01306): learning from answers that were judged one by one, good or bad.

Feedback of users comes as thumbs up or down, seldom as pairs. The gain of an answer is how much likelier the policy
makes it than the reference does, as in dpo.py; KTO values it like people value money, by its distance from a point of
reference z, and flattening on both sides:

    desirable      w_d (1 - sigmoid(beta (gain - z)))
    undesirable    w_u (1 - sigmoid(beta (z - gain)))        z = max(0, mean gain of answers to other prompts)

z estimates the divergence of the policy from the reference. It is a number that the whole batch shares, without a
gradient: a policy that makes every answer likelier gains nothing.

A row is two documents (data/preference.py): the conversation, and its prompt with the answer to another one, which is
there for z alone. `prepare` reads z from the latter and cuts them off, so that only the former are trained on. It is
called with a whole batch of all ranks; a batch in parts would have several z, so it is not `splittable`.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Callable

import torch
from torch import Tensor

from mindseed.core import Batch, Output
from mindseed.objectives.dpo import Reference, side_logps

MULTIPLE = 8                                      # to which the width of what is left is rounded up


def of_one_rank(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, kw_only=True)
class KTO:
    """`policy` is the model that is trained, asked here without gradients; without a `reference`, its log-probabilities
    of both documents must come with the batch, as `extra["reference"]` (B, 2). `over_ranks` sums a tensor over all
    ranks. Where there are n_d desirable and n_u undesirable answers, `desirable` n_d / (`undesirable` n_u) should lie
    between 1 and 4/3, say the authors."""

    policy: Reference
    reference: Reference | None = None
    beta: float = 0.1
    desirable: float = 1.0
    undesirable: float = 1.0
    over_ranks: Callable[[Tensor], Tensor] = of_one_rank
    splittable = False

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta={self.beta} must be above 0")
        if self.desirable < 0 or self.undesirable < 0 or not self.desirable + self.undesirable:
            raise ValueError(f"desirable={self.desirable} and undesirable={self.undesirable} must not be negative, nor "
                             "both 0")

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Batch:
        """The conversations alone, with `extra`, (B,) each: "reference", the log-probability of the answer; "baseline",
        z; and "share", that of the desirable among all answers."""
        if "reference" in batch.extra:
            reference = batch.extra["reference"]
        elif self.reference is None:
            raise ValueError("KTO needs a reference, or its log-probabilities in the batch")
        else:
            reference = side_logps(self.reference(batch.ids, batch.positions), batch)[0]
        others, kept = document(batch, 1), document(batch, 0)
        logps, length = answer_logps(self.policy(others.ids, others.positions), others)
        known = (length > 0).to(logps.dtype)      # of a long prompt, no answer may be left
        real = (kept.weights != 0).any(-1).to(logps.dtype)
        gain, answers, good, rows = self.over_ranks(torch.stack([
            ((logps - reference[:, 1]) * known).sum(), known.sum(), (real * batch.extra["label"]).sum(), real.sum()]))
        baseline, share = gain.clamp_min(0) / answers.clamp_min(1), good / rows.clamp_min(1)
        return replace(kept, extra=kept.extra | {"reference": reference[:, 0], "baseline": baseline.expand_as(real),
                                                 "share": share.expand_as(real)})

    def count(self, batch: Batch) -> Tensor:
        """Answers."""
        return (batch.weights != 0).any(-1).sum()

    def loss(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logps, length = answer_logps(output, batch)                               # (B,) each
        real, good = length > 0, batch.extra["label"].to(logps.dtype)
        gains, z, share = logps - batch.extra["reference"], batch.extra["baseline"], batch.extra["share"]
        weights = good * self.desirable + (1 - good) * self.undesirable
        losses = weights * torch.sigmoid(self.beta * (2 * good - 1) * (z - gains))
        metrics = {"kl": z}
        for name, value in output.aux.items():
            metrics[name] = (value * batch.weights).sum(-1) / length.clamp_min(1)
            losses = losses + metrics[name]
        # Means over answers of one kind: the loop divides all sums by the number of both.
        metrics |= {"reward_desirable": self.beta * gains * good / share.clamp_min(TINY),
                    "reward_undesirable": self.beta * gains * (1 - good) / (1 - share).clamp_min(TINY)}
        return (losses * real).sum(), {name: (x * real).sum().detach() for name, x in metrics.items()}


TINY = 1e-9                                       # of a share that is 0, whose sum is 0 as well


def answer_logps(output: Output, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of every row's answer the log-probability and the number of tokens, both (B,). The head is applied to the answers
    alone."""
    counted = batch.weights != 0
    row, _ = counted.nonzero(as_tuple=True)
    logps = output.at(counted).logps(batch.targets[counted][None])[0]             # (n,)
    zeros = logps.new_zeros(len(batch.ids))
    sums = zeros.index_add(0, row, logps * batch.weights[counted].to(logps.dtype))
    return sums, zeros.index_add(0, row, torch.ones_like(logps))


def document(batch: Batch, number: int) -> Batch:
    """Document `number` of every row, moved to its beginning; as wide as the longest. `extra` is kept as it is."""
    mine = (batch.positions == 0).cumsum(-1) - 1 == number                        # (B, T)
    slots, first = mine.sum(-1), mine.int().argmax(-1)
    width = min(-(-int(slots.max()) // MULTIPLE) * MULTIPLE, mine.shape[1])
    at = torch.arange(width, device=mine.device)
    inside = at < slots[:, None]                                                  # (B, width)
    place = (first[:, None] + at).clamp_max(mine.shape[1] - 1)

    def moved(x: Tensor) -> Tensor:
        return x.gather(1, place) * inside

    return replace(batch, ids=moved(batch.ids), targets=moved(batch.targets), weights=moved(batch.weights),
                   positions=moved(batch.positions))
