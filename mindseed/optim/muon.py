"""Muon: momentum, orthogonalised (Jordan et al. 2024; 2502.16982).

For a weight matrix the update is replaced by the nearest matrix whose singular values are all one, so that rare
directions learn as fast as frequent ones. A few Newton-Schulz iterations of an odd quintic polynomial reach it to
within a factor, using nothing but matrix products. The update is scaled by 0.2 sqrt(max(rows, columns)), which gives
it the size of a typical AdamW update, so that one learning rate and one weight decay serve both optimisers.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from mindseed.base import dist
from mindseed.base.dist import local
from mindseed.base.hardware import fast_bfloat16

AT_ONCE = 1 << 26                                 # entries that a rank orthogonalises together, or one matrix
COEFFICIENTS = (3.4445, -4.7750, 2.0315)          # steep at 0, stays near 1: singular values land in about [0.7, 1.2]


class Muon(torch.optim.Optimizer):
    """For matrices, and stacks of matrices (the experts of a mixture), each of which is orthogonalised by itself. Those
    of one shape go through one batch of products.

    `params` may be tensors or groups; `momentum` is Nesterov's; weight decay is decoupled.
    """

    def __init__(self, params, lr: float = 0.02, *, momentum: float = 0.95, weight_decay: float = 0.0,
                 iterations: int = 5) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay,
                                  "iterations": iterations})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim not in (2, 3):
                    raise ValueError(f"Muon takes matrices, got a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault((*p.shape, p.device, getattr(p, "placements", ())), []).append(p)
            for params in by_shape.values():
                ranks, some = ranks_of(params[0]), max(1, AT_ONCE // params[0].numel())
                some = ranks * some if hasattr(params[0], "placements") else max(ranks, some)  # of slices, or of all
                for start in range(0, len(params), some):
                    self.update(params[start:start + some], group)

    def update(self, params: list[Tensor], group: dict) -> None:
        """One step for matrices of one shape."""
        momenta = []
        for p in params:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            momenta.append(state["momentum"])
        grads, momenta, own = ([local(x) for x in some] for some in ([p.grad for p in params], momenta, params))
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        ahead = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"]))            # Nesterov: one step on
        updates = of_whole(ahead, params[0], functools.partial(orthogonalise, iterations=group["iterations"]))
        scale = 0.2 * max(params[0].shape[-2:]) ** 0.5
        torch._foreach_mul_(own, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(own, list(updates.to(own[0].dtype)), alpha=-group["lr"] * scale)


def ranks_of(p: Tensor) -> int:
    """Over how many ranks the matrices of a parameter are dealt out: those among which they are cut, or, of whole
    ones, those that have copies."""
    if not hasattr(p, "placements"):
        return dist.parts()
    return math.prod(n for n, at in zip(p.device_mesh.shape, p.placements) if not at.is_replicate())


def of_whole(slices: Tensor, like: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` of whole matrices, of which this rank has slices (matrices, *slice of `like`); its slices of the
    results. Singular values of slices say nothing of those of the whole.

    Ranks exchange slices, so that each has some of the matrices whole, and exchange results back: what is worked, kept
    and sent is a rank's share. Experts of a mixture that lie on several ranks are whole where they are.
    """
    if not hasattr(like, "placements"):
        return of_copies(slices.flatten(0, -3), function).view(slices.shape)
    from torch.distributed.tensor import DTensor, Replicate, Shard
    there = [Shard(at.dim + 1) if type(at) is Shard else at for at in like.placements]
    if any(type(at) not in (Shard, Replicate) for at in there):                   # two axes cut one dimension
        return of_gathered(slices, like, function)
    dealt = [Shard(0) if type(at) is Shard and at.dim > like.ndim - 2 else at for at in there]
    where = {"shape": torch.Size([len(slices), *like.shape]), "stride": (like.numel(), *like.stride())}
    whole = DTensor.from_local(slices, like.device_mesh, there, **where).redistribute(placements=dealt)
    done = DTensor.from_local(function(whole.to_local()), like.device_mesh, dealt, **where)
    return done.redistribute(placements=there).to_local()


def of_copies(matrices: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The same where every rank has all of them (n, rows, columns): each works on some, and tells the others."""
    n, ranks = len(matrices), dist.parts()
    if min(n, ranks) == 1:
        return function(matrices)
    each, place = -(-n // ranks), dist.place_among_parts()
    own = matrices[place * each:(place + 1) * each]
    found = function(own)
    return dist.joined(torch.cat([found, found.new_zeros(each - len(own), *matrices.shape[1:])]))[:n]


def of_gathered(slices: Tensor, like: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The same with every matrix whole on every rank."""
    from torch.distributed.tensor import DTensor, distribute_tensor
    where = {"shape": like.shape, "stride": like.stride()}
    whole = torch.stack([DTensor.from_local(x, like.device_mesh, like.placements, **where).full_tensor()
                         for x in slices])
    return torch.stack([distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None).to_local()
                        for x in function(whole)])


def orthogonalise(g: Tensor, iterations: int = 5) -> Tensor:
    """U V^T of the singular value decomposition of every matrix in g (..., rows, columns), roughly.

    Products run on the smaller side: for rows > columns the transpose is iterated. In bfloat16, which is all the
    precision it takes, except on a CPU where float32 is the faster one; float64 stays float64.
    """
    a, b, c = COEFFICIENTS
    keep = g.dtype == torch.float64 or g.device.type == "cpu" and not fast_bfloat16()
    x = g if keep else g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)                    # singular values now at most 1
    for _ in range(iterations):
        s = x @ x.mT                                                              # (..., rows, rows)
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x
