"""A model together with what it is judged by, as one forward call: the unit that DDP and FSDP wrap."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from mindseed.core import Batch, Objective


@torch.no_grad()
def supervised_nll(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(negative log-likelihood, number) of all supervised tokens, whatever they weigh."""
    logps, supervised = model(batch.ids, batch.positions).logps(batch.targets), batch.weights > 0
    return -logps[supervised].double().sum(), supervised.sum()


class Scored(nn.Module):
    """batch -> (summed loss, summed metrics). No objective can run the model behind a wrapper's back."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective.loss(self.model(batch.ids, batch.positions), batch)
