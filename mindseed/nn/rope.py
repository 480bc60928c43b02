"""Rotary position embedding: turn every pair of key and query components by an angle that grows with the position,
so that their product depends on the distance alone (RoFormer, 2104.09864).

Components are paired half-split, (0, K/2), (1, K/2 + 1), ..., as in the published Llama and Qwen weights.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    theta: float = 10_000.0          # base of the geometric series of wavelengths

    def __post_init__(self) -> None:
        if self.theta <= 1:
            raise ValueError(f"rope theta={self.theta} must be above 1")


def rope_tables(config: RopeConfig, head_dim: int, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each (B, T, 1, K/2), for positions (B, T); angles are taken in float64 before they are rounded."""
    half = head_dim // 2
    wavelength = torch.arange(half, device=positions.device, dtype=torch.float64) / half
    angle = positions[..., None, None] * config.theta ** -wavelength              # (B, T, 1, K/2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (B, T, H, K) by the tables of its positions; computed in the wider of both dtypes, returned as x's."""
    return Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else turn(x, cos, sin)


class Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back, so nothing but the tables is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx, g: Tensor):
        cos, sin = ctx.saved_tensors
        return turn(g, cos, -sin), None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)                                                     # (B, T, H, K/2) each
    return torch.cat([(a * cos).sub_(b * sin).to(x.dtype), (b * cos).add_(a * sin).to(x.dtype)], dim=-1)
