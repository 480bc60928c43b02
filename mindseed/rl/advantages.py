"""From rewards to advantages: how much better something was than expected.

GRPO expects the mean of a group of answers to one prompt (2402.03300), RLOO the mean of the others in the group
(2402.14740), PPO what its critic says (GAE, 1506.02438). All are plain functions of tensors without gradients.
"""
from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "off"]


def group_advantages(rewards: Tensor, *, scale: Scale = "group", eps: float = 1e-4) -> Tensor:
    """Rewards (P, n) of n answers to each of P prompts, without the mean of their group, and divided by the standard
    deviation of the group, of the whole batch, or by nothing (Dr. GRPO, 2503.20783)."""
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "group":
        return centred / (rewards.std(1, keepdim=True) + eps)
    return centred / (rewards.std() + eps) if scale == "batch" else centred


def leave_one_out(rewards: Tensor) -> Tensor:
    """Rewards (P, n) without the mean of the others in the group."""
    n = rewards.shape[1]
    if n < 2:
        raise ValueError("leaving one out needs at least two answers to a prompt")
    return (rewards - rewards.mean(1, keepdim=True)) * (n / (n - 1))


def degenerate(rewards: Tensor) -> Tensor:
    """Which groups (P,) of (P, n) have equal rewards: nothing can be learnt from them."""
    return rewards.amax(1) - rewards.amin(1) < 1e-8


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0,
        lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of tokens (B, T), where `mask` says which belong to an episode; what lies between them (a
    tool's answer, a prompt) is passed over, and after the last one nothing is to come.

        delta_t = r_t + gamma V_next - V_t,    A_t = delta_t + gamma lam A_next,    return_t = A_t + V_t
    """
    advantages = torch.zeros_like(values)
    later, value = values.new_zeros(2, len(values))
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * value - values[:, t]
        now = delta + gamma * lam * later
        here = mask[:, t].bool()
        advantages[:, t] = torch.where(here, now, 0.0)
        later, value = torch.where(here, now, later), torch.where(here, values[:, t], value)
    return advantages, torch.where(mask.bool(), advantages + values, 0.0)


def whitened(x: Tensor, mask: Tensor, *, shift: bool = True, eps: float = 1e-8) -> Tensor:
    """x (B, T) scaled to a standard deviation of 1 over the mask, and `shift`ed to a mean of 0; 0 elsewhere."""
    mask = mask.to(x.dtype)
    count = mask.sum().clamp_min(1)
    mean = (x * mask).sum() / count
    variance = ((x - mean).square() * mask).sum() / (count - 1).clamp_min(1)
    return ((x - mean) * (variance + eps).rsqrt() + (0.0 if shift else mean)) * mask
