"""Policy optimisation with a clipped ratio and given advantages: GRPO and its relatives as settings of one objective.

An answer was sampled from an older policy; how much likelier the policy makes it by now is the ratio. Its product with
the advantage is the gain to be maximised, and clipping the ratio takes away the reason to go further from the older
policy than a little (PPO, 1707.06347). GRPO (2402.03300) takes the advantage from a group of answers to the same
prompt, so that no critic is needed. The relatives change three things:

               ratio of        clipped to           averaged over                    what for
    GRPO       a token         1 - 0.2, 1 + 0.2     answers, each by its length
    DAPO       a token         1 - 0.2, 1 + 0.28    all tokens                       room to grow (2503.14476)
    Dr. GRPO   a token         1 - 0.2, 1 + 0.2     answers, by a constant length    no bias by length (2503.20783)
    GSPO       an answer       1 - 3e-4, 1 + 4e-4   answers, each by its length      what is rewarded is an answer; the
                                                                                     ratio is a mean (2507.18071)
    CISPO      a token         below 1 + 4, a weight that has no gradient; all tokens    (2506.13585)
    RLOO       an answer       1 - 0.2, 1 + 0.2     answers                          the ratio is a product (2402.14740)

Rows hold whole trajectories, one or several packed, whose positions begin at 0. The rollout has put into `extra`, all
(B, T): "advantages", and, as they are wanted, "old_logps" (under the trainer, before the first update; without them
this is the first), "reference" (log-probabilities of the reference) and "sampled_logps" (those that the engine reported
when it drew: how far the trainer is from them is logged as "engine_gap").
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mindseed.core import Batch, Output

Level = Literal["token", "mean", "product"]
Average = Literal["tokens", "answers", "constant"]
Estimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """`temperature` is that of sampling: ratios are between the distributions that are drawn from. `length` is the
    constant of average="constant". `correction` > 0 weighs tokens by how much likelier the trainer makes them than the
    engine did, at most so much (truncated importance sampling)."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    level: Level = "token"
    average: Average = "answers"
    weight_only: bool = False                     # CISPO: the clipped ratio is a weight of log p
    length: int = 0
    kl: float = 0.0
    kl_estimator: Estimator = "k3"
    temperature: float = 1.0
    correction: float = 0.0
    splittable = True
    of_tokens = True                              # metrics are sums over tokens, also where losses are of answers

    def __post_init__(self) -> None:
        if not 0 < self.clip_low <= 1 or self.clip_high <= 0:
            raise ValueError(f"clip_low={self.clip_low} must lie in (0, 1], clip_high={self.clip_high} above 0")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be above 0: greedy answers have no ratio")
        if (self.average == "constant") != (self.length > 0):
            raise ValueError('a length belongs to average="constant" and to nothing else')
        if self.kl < 0 or self.correction < 0:
            raise ValueError(f"kl={self.kl} and correction={self.correction} must not be negative")
        if self.weight_only and self.level != "token":
            raise ValueError("weight_only weighs tokens, so its ratio is that of a token")

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def count(self, batch: Batch) -> Tensor:
        """Tokens, or answers."""
        if self.average == "tokens":
            return (batch.weights != 0).sum()
        return (answers_of(batch)[2] > 0).sum()

    def loss(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        counted, answer, lengths = answers_of(batch)
        logps = logps_at(output, batch.targets, counted, self.temperature)        # (n,)
        advantages = batch.extra["advantages"][counted].to(logps.dtype)
        old = batch.extra["old_logps"][counted].to(logps.dtype) if "old_logps" in batch.extra else logps.detach()
        change = logps - old
        of_answer = logps.new_zeros(len(lengths)).index_add(0, answer, change)    # (A,)
        if self.level == "mean":
            of_answer = of_answer / lengths.clamp_min(1)
        ratio = (change if self.level == "token" else of_answer[answer]).exp()
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        if self.weight_only:
            losses = -ratio.clamp_max(1 + self.clip_high).detach() * advantages * logps
            cut = ratio > 1 + self.clip_high
        else:
            losses = -torch.minimum(ratio * advantages, clipped * advantages)
            cut = (ratio > 1 + self.clip_high) & (advantages > 0) | (ratio < 1 - self.clip_low) & (advantages < 0)
        metrics = {"ratio": ratio, "clipped": cut.to(ratio.dtype), "entropy": -logps, "kl_old": k3(change)}
        if "sampled_logps" in batch.extra:
            metrics["engine_gap"] = (old - batch.extra["sampled_logps"][counted]).abs()
        if self.correction:
            metrics["correction"] = (old - batch.extra["sampled_logps"][counted]).exp().clamp_max(self.correction)
            losses = losses * metrics["correction"]
        if self.kl:
            metrics["kl_reference"] = divergence(logps, batch.extra["reference"][counted], self.kl_estimator)
            losses = losses + self.kl * metrics["kl_reference"]
        for name, value in output.aux.items():
            metrics[name] = value[counted]
            losses = losses + metrics[name]
        share = self.shares(answer, lengths, batch.weights[counted].to(logps.dtype))
        return (losses * share).sum(), {name: x.detach().sum() for name, x in metrics.items()}

    def shares(self, answer: Tensor, lengths: Tensor, weights: Tensor) -> Tensor:
        """What every token counts, (n,), in units of what `count` counts."""
        if self.average == "tokens":
            return weights
        if self.average == "constant":
            return weights / self.length
        return weights / lengths[answer]


def answers_of(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(which slots are answers' (B, T), the number of the answer of each of them (n,), the lengths of all (A,))."""
    counted = batch.weights != 0
    document = (batch.positions == 0).flatten().cumsum(0).view_as(batch.ids) - 1  # whose first row begins at 0
    answer = document[counted].clamp_min(0)
    lengths = torch.bincount(answer, minlength=int(document[-1, -1]) + 1).to(torch.float32)
    return counted, answer, lengths


def logps_at(output: Output, targets: Tensor, counted: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(targets) where `counted`, (n,), of the distribution at this temperature."""
    some = output.at(counted)
    return replace(some, hidden=some.hidden / temperature).logps(targets[counted][None])[0]


def divergence(logps: Tensor, reference: Tensor, estimator: Estimator) -> Tensor:
    """Estimates from single samples of KL(policy || reference), as Schulman names them ("Approximating KL divergence",
    2020): k1 has no bias and much variance, k2 little of either near the reference, k3 no bias and is never negative.
    That is of their values. As a loss, k2 has the gradient of KL(policy || reference), k3 that of KL(reference ||
    policy), and k1 one whose mean is 0: it belongs in the reward.
    """
    difference = reference.to(logps.dtype) - logps
    return {"k1": lambda: -difference, "k2": lambda: difference.square() / 2, "k3": lambda: k3(difference)}[estimator]()


def k3(difference: Tensor) -> Tensor:
    return difference.expm1() - difference
