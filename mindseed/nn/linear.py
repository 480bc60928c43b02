"""A Linear that says what it is in the block, so that sharding and adapters can find it by role, not by name.

`column` layers spread their output over devices (q, k, v, gate, up), `row` layers spread their input (o, down), and
`replicated` layers stay whole. Nothing distributed is imported here: `parallel/` reads the roles.
"""
from __future__ import annotations

from typing import Literal

from torch import nn

Role = Literal["column", "row", "replicated"]


class Linear(nn.Linear):
    """y = x W^T, without a bias: (..., in_dim) -> (..., out_dim)."""

    def __init__(self, in_dim: int, out_dim: int, *, role: Role) -> None:
        super().__init__(in_dim, out_dim, bias=False)
        self.role: Role = role
