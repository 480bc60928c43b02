"""What models think of trajectories: log-probabilities and values of every id, without gradients.

Needed of the policy before its first update (the denominator of the ratio), of the reference (for the divergence), and
of the critic. Trajectories of like length go through the model together; the head is applied to the policy's own words
alone, chunk by chunk.
"""
from __future__ import annotations

from typing import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mindseed.core import Batch, Output
from mindseed.objectives.grpo import logps_at
from mindseed.objectives.reward import wide_values
from mindseed.rl.trajectory import Trajectory, pack, unpack

Forward = Callable[[Tensor, Tensor], Output]      # (ids, positions) -> Output
Read = Callable[[Output, Batch], Tensor]          # -> (B, T)
SLOTS = 8192                                      # of one forward pass


@torch.no_grad()
def score(forward: Forward, trajectories: Sequence[Trajectory], read: Read, *, device: torch.device | str = "cpu",
          slots: int = SLOTS) -> list[np.ndarray]:
    """`read` of every trajectory, aligned with its ids."""
    order = sorted(range(len(trajectories)), key=lambda i: len(trajectories[i].ids))
    found: list[np.ndarray] = [np.zeros(0, np.float32)] * len(trajectories)
    while order:
        some, width = [], 0
        while order and (len(some) + 1) * max(width, len(trajectories[order[-1]].ids)) <= max(slots, width):
            width = max(width, len(trajectories[order[-1]].ids))
            some.append(order.pop())
        some = some or [order.pop()]
        batch = pack([trajectories[i] for i in some]).to(device)
        values = read(forward(batch.ids, batch.positions), batch)
        for i, one in zip(some, unpack(values, [trajectories[i] for i in some])):
            found[i] = one
    return found


def logps_read(temperature: float) -> Read:
    """log p of the ids that the policy chose, under the distribution at this temperature."""
    def read(output: Output, batch: Batch) -> Tensor:
        counted = batch.weights != 0
        logps = logps_at(output, batch.targets, counted, temperature)
        return torch.zeros(batch.ids.shape, dtype=logps.dtype, device=logps.device).masked_scatter(counted, logps)

    return read


def values_read(output: Output, batch: Batch) -> Tensor:
    """What is still to come, before every id that the policy chose."""
    return wide_values(output)
