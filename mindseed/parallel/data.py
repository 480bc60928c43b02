"""Data parallel: whole copies of the weights, each learning from other tokens, with gradients averaged between them.

DDP (2006.15704) does it while the backward pass still runs: gradients are collected in buckets, and a bucket is reduced
as soon as its last one is there. Within accumulation nothing is sent; only the last micro-batch reduces. Where weights
are split along other axes as well, DDP cannot look into them, and `average` does the same in one go after the backward
pass, bucket by bucket.
"""
from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn.parallel import DistributedDataParallel

from mindseed.base.dist import local

BUCKET_BYTES = 25 << 20


def replicated(module: nn.Module) -> DistributedDataParallel:
    """The module under DDP; gradients are views into its buckets."""
    return DistributedDataParallel(module, gradient_as_bucket_view=True)


@torch.no_grad()
def average(params: Iterable[Tensor], group: torch_dist.ProcessGroup, over: int) -> None:
    """Replace gradients by their sum over `group`, divided by `over`; a parameter that got none on this rank has
    zero."""
    grads = []
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        grads.append(local(p.grad))
    if group.size() == over == 1:
        return
    for bucket in buckets(grads):
        flat = _flatten_dense_tensors(bucket)
        torch_dist.all_reduce(flat, group=group)
        flat /= over
        for grad, summed in zip(bucket, _unflatten_dense_tensors(flat, bucket)):
            grad.copy_(summed)


def buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Tensors of one dtype and device, BUCKET_BYTES or a little more of them together."""
    found: list[list[Tensor]] = []
    for x in tensors:
        last = found[-1] if found else None
        if last is None or (last[0].dtype, last[0].device) != (x.dtype, x.device) \
                or sum(y.nbytes for y in last) >= BUCKET_BYTES:
            found.append([])
        found[-1].append(x)
    return found
