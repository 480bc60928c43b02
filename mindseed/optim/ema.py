"""An exponential moving average of the weights: often a better model than the last step's, at no cost in training."""
from __future__ import annotations

import contextlib
from typing import Iterator

import torch
from torch import nn

from mindseed.base.dist import local


class EMA:
    """average <- decay * average + (1 - decay) * weight, after each step, of the weights that learn.

    Early averages would remember the random start, so the decay in use is min(decay, (1 + n) / (10 + n)).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema={decay} must lie in (0, 1)")
        self.model, self.decay = model, decay
        self.restart()

    def restart(self) -> None:
        """Begin anew from the weights as they are."""
        self.updates, self.average = 0, {name: p.detach().clone() for name, p in self.model.named_parameters()
                                         if p.requires_grad}

    def weights(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if name in self.average}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages, weights = ([local(x) for x in some.values()] for some in (self.average, self.weights()))
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model has the averaged weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        for name, p in self.weights().items():
            kept = p.detach().clone()
            p.copy_(self.average[name])
            self.average[name] = kept

    def state_dict(self) -> dict[str, object]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for name, x in state["average"].items():
            self.average[name].copy_(x)


