"""Next-token cross entropy. Pretraining is the case where every weight is 1; fine-tuning weighs answers only.

Two options: label smoothing (1512.00567) mixes the target with the uniform distribution, and z-loss (2204.02311)
pulls the log partition function towards 0, which keeps logits from drifting in low precision. What layers ask for
(auxiliary losses of a mixture of experts) and what looks further ahead (multi-token prediction) is added here, weighed
like the tokens it stands at, so that prompts and padding count for nothing.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mindseed.core import Batch, Output


@dataclass(frozen=True, kw_only=True)
class SFT:
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    tags: tuple[tuple[int, ...], ...] = ()        # runs of ids that count `tag_weight` times: what opens a thought, say
    tag_weight: float = 1.0
    splittable = True

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} must lie in [0, 1)")
        if self.tag_weight <= 0:
            raise ValueError(f"tag_weight={self.tag_weight} must be above 0")
        if self.z_loss < 0:
            raise ValueError(f"z_loss={self.z_loss} must not be negative")

    def prepare(self, batch: Batch) -> Batch:
        """With the tags' weights raised."""
        if not self.tags or self.tag_weight == 1:
            return batch
        tagged = torch.zeros_like(batch.targets, dtype=torch.bool)
        for tag in self.tags:
            ends = batch.targets.shape[1] - len(tag) + 1                          # where it could begin
            if ends < 1:
                continue
            here = torch.stack([batch.targets[:, i:ends + i] == id for i, id in enumerate(tag)]).all(0)
            for i in range(len(tag)):
                tagged[:, i:ends + i] |= here
        return replace(batch, weights=torch.where(tagged, batch.weights * self.tag_weight, batch.weights))

    def count(self, batch: Batch) -> Tensor:
        """Supervised tokens, by weight."""
        return batch.weights.sum()

    def loss(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        nll, total = self.of_tokens(output, batch.targets, batch.weights)
        total, metrics = self.beside(total, output, batch)
        if total is not nll:
            metrics["nll"] = nll
        return total, {name: value.detach() for name, value in metrics.items()}

    def beside(self, total: Tensor, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`total` and what layers and modules that look further ahead ask for, which stands beside any loss."""
        metrics = {}
        for name, value in output.aux.items():
            metrics[name] = (value * batch.weights).sum()
            total = total + metrics[name]
        for distance, hidden in enumerate(output.further, start=2):
            targets, weights = further_ahead(output, batch, distance - 1)
            ahead = self.of_tokens(replace(output, hidden=hidden, aux={}, further=()), targets, weights)[0]
            total = total + output.further_weight / len(output.further) * ahead
            metrics[f"nll_{distance}_ahead"] = ahead
        return total, metrics

    def of_tokens(self, output: Output, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(negative log-likelihood, the same with smoothing and z-loss), summed by weight."""
        counted = weights != 0                    # of a conversation often a fifth: the head is spared the rest
        index = counted.flatten().nonzero()[:, 0]             # the one thing here that a GPU is waited for
        output = output.at(index)
        logps, lse = output.logps_and_lse(targets.flatten()[index][None])         # (1, n) each
        weights = weights.flatten()[index].to(logps.dtype)
        nll = -(logps * weights).sum()
        total = nll
        if self.label_smoothing:
            # the mean over the vocabulary of -log p is lse minus the mean logit, which is hidden . mean row of the head
            mean_logit = output.hidden.to(lse.dtype) @ output.head.to(lse.dtype).mean(0)          # (1, n)
            total = (1 - self.label_smoothing) * nll + self.label_smoothing * ((lse - mean_logit) * weights).sum()
        if self.z_loss:
            total = total + self.z_loss * (lse.square() * weights).sum()
        return nll, total


def further_ahead(output: Output, batch: Batch, distance: int) -> tuple[Tensor, Tensor]:
    """(targets, weights) for predicting `distance` tokens beyond the next one, (B, T) each: 0 where the document ends
    before that."""
    positions, targets, weights = (output.ahead(x, distance) for x in (batch.positions, batch.targets, batch.weights))
    return targets, weights * (positions == batch.positions + distance)
