"""A model together with what it is judged by, as one forward call: the unit that DDP and FSDP wrap."""
from __future__ import annotations

from torch import Tensor, nn

from mindseed.core import Batch, Objective


class Scored(nn.Module):
    """batch -> (summed loss, summed metrics). No objective can run the model behind a wrapper's back."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective.loss(self.model(batch.ids, batch.positions), batch)
