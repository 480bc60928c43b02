"""What a policy said, token by token, and how trajectories become a batch.

A trajectory is never text that is tokenised again: it is the ids that the engine read and drew, which of them were the
policy's own words, and with what log-probability each of these was drawn. Everything that is learnt later (advantages,
log-probabilities under the trainer and under the reference, values) is laid beside them, one number per id.

A batch holds whole trajectories. Short ones share a row, the longest sets the width, so little of it is padding; and
since positions restart at each, none sees another.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Sequence

import numpy as np
import torch

from mindseed.core import Batch

MULTIPLE = 8                                      # widths of batches are rounded up, so that they do not all differ


@dataclass(kw_only=True)
class Trajectory:
    """`mine` are the ids that the policy chose itself (the others were read: a prompt, a tool's answer). Per-token
    figures are arrays as long as `ids`, 0 where they mean nothing: "sampled_logps" from the engine, later "old_logps",
    "reference", "values", "advantages", "returns"."""

    ids: list[int]
    mine: list[bool]
    figures: dict[str, np.ndarray] = field(default_factory=dict)      # name -> (len(ids),) float32
    prompt: int = 0                               # the number of its prompt: those of one group share it
    version: int = 0                              # of the weights that drew it
    finish: str = "stop"
    terms: dict[str, float] = field(default_factory=dict)             # rewards by name, before their weights
    reward: float = 0.0                           # their weighted sum

    @property
    def length(self) -> int:
        """Ids that the policy chose."""
        return sum(self.mine)

    def put(self, name: str, values: Sequence[float] | np.ndarray | float) -> None:
        """Figures of the ids that are mine, in order, or one for all of them."""
        array = np.zeros(len(self.ids), np.float32)
        array[np.array(self.mine, bool)] = values
        self.figures[name] = array

    def state(self) -> dict[str, Any]:
        """As plain values and tensors, for a checkpoint."""
        return vars(self) | {"figures": {k: torch.from_numpy(v) for k, v in self.figures.items()}}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Trajectory:
        return cls(**state | {"figures": {k: v.numpy() for k, v in state["figures"].items()}})


def arrange(lengths: Sequence[int]) -> tuple[int, int, list[tuple[int, slice]]]:
    """(rows, width, where each goes) for documents of so many slots: longest first, each into the first row with room.
    """
    width, space = -(-max(lengths) // MULTIPLE) * MULTIPLE, []
    place = [(0, slice(0, 0))] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, room in enumerate(space) if room >= lengths[i]), len(space))
        if row == len(space):
            space.append(width)
        first = width - space[row]
        place[i] = row, slice(first, first + lengths[i])
        space[row] -= lengths[i]
    return len(space), width, place


def pack(trajectories: Sequence[Trajectory], names: Sequence[str] = ()) -> Batch:
    """One batch of all of them. Figures travel in `extra`, aligned with the targets: what stands at slot t is about the
    id that follows it. Of no trajectories it is a row of padding, of which nothing counts; `names` are the figures that
    it has none the less."""
    rows, width, place = arrange([len(t.ids) - 1 for t in trajectories]) if trajectories else (1, MULTIPLE, [])
    ids, targets, positions = (np.zeros((rows, width), np.int64) for _ in range(3))
    weights = np.zeros((rows, width), np.float32)
    names = sorted({*names, *(name for t in trajectories for name in t.figures)})
    extra = {name: np.zeros((rows, width), np.float32) for name in names}
    for t, here in zip(trajectories, place):
        ids[here], targets[here], positions[here] = t.ids[:-1], t.ids[1:], np.arange(len(t.ids) - 1)
        weights[here] = t.mine[1:]
        for name, values in t.figures.items():
            extra[name][here] = values[1:]
    return Batch(ids=torch.from_numpy(ids), targets=torch.from_numpy(targets), weights=torch.from_numpy(weights),
                 positions=torch.from_numpy(positions), extra={k: torch.from_numpy(v) for k, v in extra.items()})


def unpack(values: torch.Tensor, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
    """The figures (B, T) of a batch that `pack` made of these trajectories, for each as `Trajectory.figures` keeps
    them: aligned with its ids, 0 where they are not its own."""
    values, found = values.detach().to("cpu", torch.float32).numpy(), []
    for t, here in zip(trajectories, arrange([len(t.ids) - 1 for t in trajectories])[2]):
        found.append(np.concatenate([np.zeros(1, np.float32), values[here]]) * np.array(t.mine, np.float32))
    return found
