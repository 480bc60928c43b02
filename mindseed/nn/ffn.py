"""The feed-forward half of a block. SwiGLU (2002.05202): a gate, through SiLU, scales what the other branch found."""
from __future__ import annotations

from dataclasses import dataclass

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
        gate, up = self.gate(x), self.up(x)
        return self.down(Gated.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up))


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


FFNS = {SwiGLUConfig: SwiGLU}
