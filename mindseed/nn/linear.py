"""A Linear that says what it is in the block, so that sharding and adapters can find it by role, not by name.

`column` layers spread their output over devices (q, k, v, gate, up), `row` layers spread their input (o, down), and
`replicated` layers stay whole. Nothing distributed is imported here: `parallel/` reads the roles.
"""
from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindseed.base.hardware import fast_bfloat16

Role = Literal["column", "row", "replicated"]


class Linear(nn.Linear):
    """y = x W^T, without a bias: (..., in_dim) -> (..., out_dim)."""

    def __init__(self, in_dim: int, out_dim: int, *, role: Role) -> None:
        super().__init__(in_dim, out_dim, bias=False)
        self.role: Role = role

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products of x run: that of x, or of autocast, or float32 where bfloat16 is slower.

    Not every CPU that knows bfloat16 multiplies it faster than float32; some need twice the time. There, autocast to
    bfloat16 keeps what it is for, activations of half the size, while the products run in float32.
    """
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x.dtype
    dtype = torch.get_autocast_dtype(kind)
    return torch.float32 if kind == "cpu" and dtype == torch.bfloat16 and not fast_bfloat16() else dtype


class WideProduct(torch.autograd.Function):
    """x W^T with x kept in autocast's dtype for the backward pass, and all three products in the dtype of W."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.to(dtype)
        ctx.save_for_backward(x, weight)
        return F.linear(x.to(weight.dtype), weight).to(dtype)

    @staticmethod
    def backward(ctx, g: Tensor):
        x, weight = ctx.saved_tensors
        wide = g.to(weight.dtype)
        g_weight = wide.flatten(0, -2).mT @ x.flatten(0, -2).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return (wide @ weight).to(g.dtype), g_weight, None


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, (..., in_dim) -> (..., out_dim), the fast way round."""
    if wants_transposed(x):
        return transposed_product(x.flatten(0, -2), weight).contiguous().view(*x.shape[:-1], -1)
    if torch.is_autocast_enabled(x.device.type) and product_dtype(x) == weight.dtype:
        with torch.autocast(x.device.type, enabled=False):
            return WideProduct.apply(x, weight, torch.get_autocast_dtype(x.device.type))
    return F.linear(x, weight)


def wants_transposed(x: Tensor) -> bool:
    """Whether x has a handful of rows, as in decoding a batch: there the CPU's matrix library has a slow spot.

    With 16 rows in float32, (W x^T)^T takes half the time of x W^T (bfloat16: nine tenths); below 8 and above 64 rows
    it takes more.
    """
    return not torch.is_grad_enabled() and x.device.type == "cpu" and 8 < x.numel() // x.shape[-1] < 64


def transposed_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T for x (rows, in_dim), computed as (W x^T)^T, so that columns are contiguous in the result."""
    return torch.mm(weight, x.t()).t()                                            # (rows, out_dim)
