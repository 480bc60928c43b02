"""The norm of a gradient that is spread over ranks, and clipping by it (1211.5063).

What a rank holds is a slice along some axes of a mesh and a copy along others: squares are summed over the first and
taken once over the second. Under a pipeline every rank adds what its own stages hold.
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as torch_dist
from torch import Tensor

from mindseed.base.dist import local


def settle(params: Iterable[Tensor]) -> None:
    """Sum gradients that are still spread over ranks as parts of a sum, in place."""
    for p in params:
        if any(at.is_partial() for at in getattr(p.grad, "placements", ())):
            p.grad = p.grad.redistribute(placements=p.placements)


@torch.no_grad()
def global_norm(params: Iterable[Tensor], pipe: torch_dist.ProcessGroup | None = None) -> Tensor:
    """The Euclidean norm of all gradients together, the same on every rank."""
    kinds: dict[object, list[Tensor]] = defaultdict(list)
    for p in params:
        if p.grad is not None:
            spread = hasattr(p.grad, "placements")
            kinds[(p.grad.device_mesh, p.grad.placements) if spread else None].append(p.grad)
    device = next((g.device for grads in kinds.values() for g in grads), torch.device("cpu"))
    total = torch.zeros((), device=device)
    for kind, grads in kinds.items():
        norms = torch.stack(torch._foreach_norm([local(g) for g in grads]))
        square = norms.to(torch.promote_types(norms.dtype, torch.float32)).square().sum()
        if kind is not None:
            for axis, placement in enumerate(kind[1]):
                if not placement.is_replicate():                                  # under ZeRO with tensor: strided
                    square = square.to(kind[0].device_type)                       # offloaded ones wait on the CPU
                    torch_dist.all_reduce(square, group=kind[0].get_group(axis))
        total = total + square.to(device)
    if pipe is not None:
        torch_dist.all_reduce(total, group=pipe)
    return total.sqrt()


@torch.no_grad()
def scale_gradients(params: Iterable[Tensor], factor: Tensor | float) -> None:
    grads = [local(p.grad) for p in params if p.grad is not None]
    if grads:
        torch._foreach_mul_(grads, factor)
