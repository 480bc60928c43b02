"""ALiBi (2108.12409): no position embedding at all; every head takes slope x distance from its scores, so that near
keys count more. Heads have slopes from a geometric series: some look only at their neighbours, some see far. Since
nothing depends on absolute positions, a model reads texts longer than it was trained on without a jump.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AlibiConfig:
    """Has no settings: the slopes follow from the number of heads."""


def alibi_slopes(heads: int) -> Tensor:
    """(H,) float32: 2^(-8/H), 2^(-16/H), ...; where H is no power of two, the series of the power below, followed by
    every second slope of the power above, as the authors' code has it."""
    below = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / below) for i in range(below)]
    between = [2 ** (-8 * (i + 1) / (2 * below)) for i in range(0, 2 * below, 2)]
    return torch.tensor(slopes + between[:heads - below], dtype=torch.float32)
