"""Expert parallel (2006.16668, 2101.03961): the experts of a mixture are dealt out over ranks, and tokens travel to
them.

Visits are sorted by expert already, so what a rank has for each other rank is one stretch of rows. Two all-to-all
exchanges carry them there and back:

    rows of this rank, by expert  ->  rows of all ranks for this rank's experts  ->  the answers, home again

Ranks first tell each other how many rows to expect. Nothing is dropped and nothing padded, so a busy expert makes its
rank wait for no one but itself; the load is what balance.py keeps even. An expert sees the tokens of all these ranks,
so its gradient needs no further sum over them.
"""
from __future__ import annotations

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard

from mindseed.nn.moe import ExpertLinear, MoE
from mindseed.parallel.mesh import Mesh
from mindseed.parallel.tensor import Sum, SumGradient, spread

FEATURES = {"column": Shard(1), "row": Shard(2)}  # the dim of (E, out, in) that the tensor axis splits


class Exchange(torch.autograd.Function):
    """Rows (N, D), `sent[r]` of them for rank r in turn -> what all ranks sent here, `received[r]` rows from rank r."""

    @staticmethod
    def forward(ctx, x: Tensor, received: list[int], sent: list[int], group) -> Tensor:
        ctx.sizes, ctx.group = (sent, received), group
        return exchange(x, received, sent, group)

    @staticmethod
    def backward(ctx, g: Tensor):
        return exchange(g, *ctx.sizes, ctx.group), None, None, None


def exchange(x: Tensor, received: list[int], sent: list[int], group) -> Tensor:
    out = x.new_empty(sum(received), x.shape[1])
    torch_dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


class SpreadMoE(MoE):
    """A mixture whose experts lie on several ranks, or whose matrices do, or both."""

    expert_group: torch_dist.ProcessGroup | None
    tensor_group: torch_dist.ProcessGroup | None

    def visit(self, x: Tensor, weights: Tensor, chosen: Tensor, counts: Tensor) -> Tensor:
        if self.tensor_group is None:
            return super().visit(x, weights, chosen, counts)
        x, weights = (SumGradient.apply(t, self.tensor_group) for t in (x, weights))
        return Sum.apply(super().visit(x, weights, chosen, counts), self.tensor_group)

    def answers(self, h: Tensor, counts: Tensor) -> Tensor:
        if self.expert_group is None:
            return super().answers(h, counts)
        ranks, theirs = self.expert_group.size(), torch.empty_like(counts)
        torch_dist.all_to_all_single(theirs, counts, group=self.expert_group)
        theirs = theirs.view(ranks, -1)                                           # (ranks, E / ranks): rows from each
        sent, received = counts.view(ranks, -1).sum(1).tolist(), theirs.sum(1).tolist()
        h = Exchange.apply(h, received, sent, self.expert_group)                  # sorted by rank, then by expert
        own = torch.arange(theirs.shape[1], device=h.device).repeat(ranks).repeat_interleave(theirs.flatten())
        order = own.argsort(stable=True)
        h = super().answers(h[order], theirs.sum(0))[order.argsort()]
        return Exchange.apply(h, sent, received, self.expert_group)


def deal_out(model: nn.Module, mesh: Mesh) -> set[nn.Parameter]:
    """Give every mixture's experts their ranks, in place; returns the parameters that no other axis may touch."""
    dealt: set[nn.Parameter] = set()
    experts, tensor = mesh.sizes.expert > 1, mesh.sizes.tensor > 1
    for module in model.modules():
        if not isinstance(module, MoE) or not (experts or tensor):
            continue
        module.__class__ = SpreadMoE
        module.expert_group = mesh.group("expert") if experts else None
        module.tensor_group = mesh.group("tensor") if tensor else None
        for matrix in (child for child in module.children() if isinstance(child, ExpertLinear)):
            features = [FEATURES[matrix.role]] if tensor else []
            if experts:
                axes = mesh.experts["expert", "tensor"] if tensor else mesh.experts["expert"]
                spread(matrix, axes, Shard(0), *features)
                dealt |= set(matrix.parameters())
            else:
                spread(matrix, mesh.weights["tensor"], *features)
    return dealt
