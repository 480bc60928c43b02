"""Next-token cross entropy. Pretraining is the case where every weight is 1; fine-tuning weighs answers only.

Two options: label smoothing (1512.00567) mixes the target with the uniform distribution, and z-loss (2204.02311)
pulls the log partition function towards 0, which keeps logits from drifting in low precision.
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mindseed.core import Batch, Output


@dataclass(frozen=True, kw_only=True)
class SFT:
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    splittable = True

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} must lie in [0, 1)")
        if self.z_loss < 0:
            raise ValueError(f"z_loss={self.z_loss} must not be negative")

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def count(self, batch: Batch) -> Tensor:
        """Supervised tokens, by weight."""
        return batch.weights.sum()

    def loss(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        counted = batch.weights != 0              # of a conversation often a fifth: the head is spared the rest
        output = output.at(counted)
        logps, lse = output.logps_and_lse(batch.targets[counted][None])           # (1, n) each
        weights = batch.weights[counted].to(logps.dtype)
        nll = -(logps * weights).sum()
        total = nll
        if self.label_smoothing:
            # the mean over the vocabulary of -log p is lse minus the mean logit, which is hidden . mean row of the head
            mean_logit = output.hidden.to(lse.dtype) @ output.head.to(lse.dtype).mean(0)          # (1, n)
            total = (1 - self.label_smoothing) * nll + self.label_smoothing * ((lse - mean_logit) * weights).sum()
        if self.z_loss:
            total = total + self.z_loss * (lse.square() * weights).sum()
        return total, {"nll": nll.detach()} if total is not nll else {}
