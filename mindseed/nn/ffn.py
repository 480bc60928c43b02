"""The feed-forward half of a block: widen, bend, narrow. SwiGLU (2002.05202) bends with a gate: one branch, through
SiLU, scales what the other found. The plain form has one branch and an activation: GELU (1606.08415), ReLU, or ReLU
squared (2109.08668), which leaves more of its units at exactly zero.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindseed.nn.linear import Linear


@dataclass(frozen=True, kw_only=True)
class SwiGLUConfig:
    ffn_dim: int

    def __post_init__(self) -> None:
        if self.ffn_dim < 1:
            raise ValueError(f"ffn_dim={self.ffn_dim} must be at least 1")


class SwiGLU(nn.Module):
    """(B, T, D) -> (B, T, D): down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, config: SwiGLUConfig) -> None:
        super().__init__()
        self.gate = Linear(dim, config.ffn_dim, role="column")
        self.up = Linear(dim, config.ffn_dim, role="column")
        self.down = Linear(config.ffn_dim, dim, role="row")

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gated(self.gate(x), self.up(x)))


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return Gated.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up)


class Gated(torch.autograd.Function):
    """silu(gate) * up, keeping only its two inputs; autograd would keep silu(gate) as well."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, g: Tensor):
        gate, up = ctx.saved_tensors
        silu = F.silu(gate)
        g_gate = torch.ops.aten.silu_backward(g * up, gate)
        return g_gate, silu.mul_(g)


Activation = Literal["gelu", "gelu_tanh", "relu", "relu2"]
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    ffn_dim: int
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        if self.ffn_dim < 1:
            raise ValueError(f"ffn_dim={self.ffn_dim} must be at least 1")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is not one of {', '.join(ACTIVATIONS)}")


class MLP(nn.Module):
    """(B, T, D) -> (B, T, D): down(activation(up(x)))."""

    def __init__(self, dim: int, config: MLPConfig) -> None:
        super().__init__()
        self.up = Linear(dim, config.ffn_dim, role="column")
        self.down = Linear(config.ffn_dim, dim, role="row")
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))
