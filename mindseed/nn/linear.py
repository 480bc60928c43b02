"""A Linear that says what it is in the block, so that sharding and adapters can find it by role, not by name.

`column` layers spread their output over devices (q, k, v, gate, up), `row` layers spread their input (o, down), and
`replicated` layers stay whole. Nothing distributed is imported here: `parallel/` reads the roles.
"""
from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindseed.base.hardware import fast_bfloat16

Role = Literal["column", "row", "replicated"]


class Linear(nn.Linear):
    """y = x W^T, without a bias: (..., in_dim) -> (..., out_dim).

    An `adapter`, if there is one, answers instead, by adapter(linear, x); and `adapter.dense(linear)` is the matrix
    that both amount to. The names of the weights beneath stay what they are. Rows of a batch may have adapters of their
    own (adapters.py); then there is no one matrix, which `one_matrix` tells.
    """

    def __init__(self, in_dim: int, out_dim: int, *, role: Role) -> None:
        super().__init__(in_dim, out_dim, bias=False)
        self.role: Role = role
        self.adapter: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x) if self.adapter is None else self.adapter(self, x)

    def product(self, x: Tensor) -> Tensor:
        """Without the adapter."""
        return project(x, self.weight)

    def matrix(self) -> Tensor:
        """(out_dim, in_dim): what `product` multiplies with."""
        return self.weight

    def dense(self) -> Tensor:
        """(out_dim, in_dim): the matrix that `forward` multiplies with, for those who take it apart."""
        return self.matrix() if self.adapter is None else self.adapter.dense(self)

    @property
    def one_matrix(self) -> bool:
        """Whether `dense` speaks for all rows of the batch at hand."""
        return self.adapter is None or self.adapter.one_matrix


def is_plain(linear: nn.Module) -> bool:
    """Whether nothing but the product with its weight happens here: no adapter, no quantisation."""
    return type(linear) is Linear and linear.adapter is None


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
    """x W^T with x kept in autocast's dtype for the backward pass, and all three products in the dtype of W.

    The wide copies of what goes in and what comes out live in two or three buffers that every product uses again:
    made anew each time, between activations that stay, they leave the heap full of holes.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.to(dtype)
        ctx.save_for_backward(x, weight)
        y = wide_mm(widen("in", x, weight.dtype), weight.mT)
        return y.to(dtype, copy=True).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, g: Tensor):
        x, weight = ctx.saved_tensors
        wide = widen("in", g, weight.dtype)
        g_weight = wide.mT @ widen("saved", x, weight.dtype) if ctx.needs_input_grad[1] else None
        return wide_mm(wide, weight).to(g.dtype, copy=True).view(*g.shape[:-1], -1), g_weight, None


BUFFERS = threading.local()                       # one set for every thread: what is in them is in use


def scratch(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A buffer on the CPU whose contents last until it is asked for again; it grows as needed."""
    held, size = BUFFERS.__dict__, math.prod(shape)
    if (name, dtype) not in held or held[name, dtype].numel() < size:
        with torch.inference_mode(False):         # whoever asks first may only infer, the next one trains
            held[name, dtype] = torch.empty(size, dtype=dtype)
    return held[name, dtype][:size].view(shape)


def widen(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (..., n) as rows (m, n) in `dtype`, in a buffer unless compiled code manages its own."""
    x = x.flatten(0, -2)
    return x.to(dtype) if torch.compiler.is_compiling() else scratch(name, x.shape, dtype).copy_(x)


def wide_mm(a: Tensor, b: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return a @ b
    return torch.mm(a, b, out=scratch("out", (a.shape[0], b.shape[1]), a.dtype))


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, (..., in_dim) -> (..., out_dim), the fast way round."""
    if wants_transposed(x):
        return transposed_product(x.flatten(0, -2), weight).contiguous().view(*x.shape[:-1], -1)
    if torch.is_autocast_enabled(x.device.type) and product_dtype(x) == weight.dtype:
        with torch.autocast(x.device.type, enabled=False):
            return WideProduct.apply(x, weight, torch.get_autocast_dtype(x.device.type))
    return F.linear(x, weight)


def wants_transposed(x: Tensor) -> bool:
    """Whether x has so few rows, as in decoding, that the CPU's matrix library is faster the other way round.

    (W x^T)^T takes three quarters of the time of x W^T with one row, and two thirds with 16; from 2 to 8 rows and
    above 64 it takes more.
    """
    rows = x.numel() // x.shape[-1]
    return not torch.is_grad_enabled() and x.device.type == "cpu" and (rows == 1 or 8 < rows < 64)


def transposed_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T for x (rows, in_dim), computed as (W x^T)^T, so that columns are contiguous in the result."""
    return torch.mm(weight, x.t()).t()                                            # (rows, out_dim)
