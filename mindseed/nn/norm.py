"""Normalisation of the vectors that layers read. RMSNorm (1910.07467) divides by the root mean square, no mean, no
bias; LayerNorm (1607.06450), the older one, takes the mean off first and adds a bias.

RMSNorm is written as one autograd function: the plain expression makes five passes over memory forward and ten
backward, and a small model on a CPU spends more time in such passes than in its matrix products. Forward keeps x and
one number per vector; backward is the closed form

    dx = r * (w g - x * mean(w g x) * r^2),   dw = sum(g x r),   r = 1 / rms(x)
"""
from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """(..., dim) -> (..., dim). Statistics in at least float32; under autocast the result has autocast's dtype."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return rms_norm(x, self.weight, self.eps).to(compute_dtype(x))
        return RMSNormFunction.apply(x, self.weight, self.eps, compute_dtype(x))


class LayerNorm(nn.LayerNorm):
    """(..., dim) -> (..., dim), with weight and bias; under autocast the result has autocast's dtype."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(compute_dtype(x))


NORMS = {"rms": RMSNorm, "layer": LayerNorm}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The forward pass alone, in the fewest kernels (a decoding step is mostly kernel launches), not yet rounded."""
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)        # (..., 1)
    return (x * length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()).mul_(weight)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products run here: autocast's when it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        r = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))           # (..., 1)
        ctx.save_for_backward(x, weight, r)
        return (wide * r).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx, g: Tensor):
        x, weight, r = ctx.saved_tensors
        wide, g = x.to(r.dtype), g.to(r.dtype)
        normed = wide * r
        g_weight = (g * normed).flatten(0, -2).sum(0)
        g = g * weight
        inner = (g * normed).mean(-1, keepdim=True)
        return g.sub_(normed.mul_(inner)).mul_(r).to(x.dtype), g_weight.to(weight.dtype), None, None
