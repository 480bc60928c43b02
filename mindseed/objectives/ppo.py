"""Proximal policy optimisation with a critic (1707.06347): the clipped ratio of grpo.py, and a value for every token.

The critic says how much reward is still to come. What came beyond its expectation is the advantage (rl/advantages.py:
GAE), so every token gets its own and one answer to a prompt is enough. The critic learns by least squares; as PPO's
authors do, its step is clipped like the policy's: a value may move from what it was at the rollout by `value_clip`, and
the larger of both errors counts.

A value at slot t is of the state before target t is said. The rollout has put "returns" and "old_values" into `extra`,
(B, T), beside what grpo.py reads. With a value head on the policy (`Output.values`) both learn in one pass, by `PPO`;
a critic of its own learns by `Critic`.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mindseed.core import Batch, Output
from mindseed.objectives.grpo import GRPO, Average
from mindseed.objectives.reward import wide_values


@dataclass(frozen=True, kw_only=True)
class Critic:
    """Half the squared error of the values; `value_clip` 0: not clipped."""

    value_clip: float = 0.2
    splittable = True

    def __post_init__(self) -> None:
        if self.value_clip < 0:
            raise ValueError(f"value_clip={self.value_clip} must not be negative")

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def count(self, batch: Batch) -> Tensor:
        """Tokens."""
        return (batch.weights != 0).sum()

    def loss(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        counted = batch.weights != 0
        values = wide_values(output)[counted]                                     # (n,)
        returns, old = (batch.extra[name][counted].to(values.dtype) for name in ("returns", "old_values"))
        errors = (values - returns).square()
        if self.value_clip:
            held = torch.clamp(values, old - self.value_clip, old + self.value_clip)
            errors = torch.maximum(errors, (held - returns).square())
        metrics = {"value_error": (values - returns).square().detach().sum(), "value": values.detach().sum()}
        return 0.5 * (errors * batch.weights[counted]).sum(), metrics


@dataclass(frozen=True, kw_only=True)
class PPO(GRPO):
    """`value` weighs the critic's loss beside the policy's."""

    average: Average = "tokens"
    value: float = 0.1
    value_clip: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.average != "tokens":
            raise ValueError('PPO averages over tokens, its critic as well: average="tokens"')
        if self.value < 0 or self.value_clip < 0:
            raise ValueError(f"value={self.value} and value_clip={self.value_clip} must not be negative")

    def loss(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        policy, metrics = super().loss(output, batch)
        critic, more = Critic(value_clip=self.value_clip).loss(output, batch)
        return policy + self.value * critic, metrics | more
