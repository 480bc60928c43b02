"""Direct preference optimisation and its relatives: losses of a margin between two answers to one prompt.

A reward model and reinforcement learning against it have a best policy in closed form, so the policy itself says what
its reward is: beta times how much likelier it makes an answer than a frozen reference does. DPO (2305.18290) asks that
this reward be higher for the chosen answer than for the rejected one, as Bradley and Terry would; the relatives differ
in what the margin is made of and in what is asked of it:

    dpo      beta (gain of chosen - gain of rejected), gain = log p - log p of the reference
    cDPO     the same with `label_smoothing`: that share of the labels is taken to be wrong
    ipo      gains per token; the margin should be 1 / (2 beta) and not grow for ever (2310.12036)
    simpo    log p per token without a reference, ahead by `target_margin` (2405.14734)
    orpo     log odds per token, beside fine-tuning on the chosen answer, without a reference (2403.07691)

A row of a batch is a pair: the chosen conversation and then the rejected one, packed like any two documents, whose
positions begin at 0. So a pair is never cut apart, whatever the micro-batches, and nothing is padded to the length of
the other.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Callable, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mindseed.core import Batch, Output

Margin = Literal["dpo", "ipo", "simpo", "orpo"]
NEEDS_REFERENCE = ("dpo", "ipo")
Reference = Callable[[Tensor, Tensor], Output]    # (ids, positions) -> Output, without gradients


@dataclass(frozen=True, kw_only=True)
class DPO:
    """`sft` adds that much of the chosen answer's negative log-likelihood per token, against answers that lose
    probability on both sides (2404.19733). Without a `reference`, its log-probabilities must come with the batch, as
    `extra["reference"]` (B, 2)."""

    reference: Reference | None = None
    kind: Margin = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    target_margin: float = 0.0
    sft: float = 0.0
    splittable = True

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta={self.beta} must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing} must lie in [0, 0.5): it is the share of labels "
                             "that are wrong")
        if self.sft < 0:
            raise ValueError(f"sft={self.sft} must not be negative")
        if self.label_smoothing and self.kind not in ("dpo", "simpo"):
            raise ValueError(f"label_smoothing has no meaning for {self.kind}")
        if self.target_margin and self.kind != "simpo":
            raise ValueError(f"target_margin is simpo's; {self.kind} has none")

    def prepare(self, batch: Batch) -> Batch:
        """With the reference's log-probabilities of both sides, (B, 2)."""
        if self.kind not in NEEDS_REFERENCE or "reference" in batch.extra:
            return batch
        if self.reference is None:
            raise ValueError(f"{self.kind} needs a reference, or its log-probabilities in the batch")
        sums, _ = side_logps(self.reference(batch.ids, batch.positions), batch)
        return replace(batch, extra=batch.extra | {"reference": sums})

    def count(self, batch: Batch) -> Tensor:
        """Pairs."""
        return (batch.weights != 0).any(-1).sum()

    def loss(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logps, lengths = side_logps(output, batch)                                # (B, 2) each
        real = lengths[:, 0] > 0                                                  # rows that are no padding
        lengths = lengths.clamp_min(1)
        per_token = logps / lengths
        if self.kind == "dpo":
            gains = logps - batch.extra["reference"]
        elif self.kind == "ipo":
            gains = (logps - batch.extra["reference"]) / lengths
        else:
            gains = per_token if self.kind == "simpo" else log_odds(per_token)
        losses = self.of_margin(gains[:, 0] - gains[:, 1])                        # (B,)
        nll = -per_token[:, 0]
        losses = losses + (self.sft + (self.kind == "orpo")) * nll
        rewards = self.beta * gains
        metrics = {"accuracy": (rewards[:, 0] > rewards[:, 1]).to(logps.dtype), "margin": rewards[:, 0] - rewards[:, 1],
                   "reward_chosen": rewards[:, 0], "reward_rejected": rewards[:, 1], "nll_chosen": nll}
        for name, value in output.aux.items():
            share = (value * batch.weights).sum(-1) / lengths.sum(-1)
            losses, metrics[name] = losses + share, share
        return (losses * real).sum(), {name: (x * real).sum().detach() for name, x in metrics.items()}

    def of_margin(self, margin: Tensor) -> Tensor:
        """What is lost at a difference of gains (B,)."""
        if self.kind == "ipo":
            return (margin - 1 / (2 * self.beta)).square()
        if self.kind == "orpo":
            return -self.beta * F.logsigmoid(margin)
        wanted = self.beta * margin - self.target_margin
        smooth = self.label_smoothing
        return -(1 - smooth) * F.logsigmoid(wanted) - smooth * F.logsigmoid(-wanted)


def side_logps(output: Output, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of every pair's two answers the log-probability and the number of tokens, both (B, 2). The head is applied to
    the answers alone."""
    counted = batch.weights != 0
    row, _ = counted.nonzero(as_tuple=True)
    logps = output.at(counted).logps(batch.targets[counted][None])[0]             # (n,)
    side = (batch.positions == 0).cumsum(-1)[counted] - 1                         # of two documents; pads do not count
    place = 2 * row + side
    zeros = logps.new_zeros(2 * len(batch.ids))
    sums = zeros.index_add(0, place, logps * batch.weights[counted].to(logps.dtype))
    return sums.view(-1, 2), zeros.index_add(0, place, torch.ones_like(logps)).view(-1, 2)


def log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p, which is below 0."""
    return logps - torch.log1p(-logps.exp().clamp_max(1 - torch.finfo(logps.dtype).eps))
