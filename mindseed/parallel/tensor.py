"""Tensor parallel (1909.08053): every matrix of a block is split over the ranks of one machine.

A Linear says what it is. `column` matrices are split by what comes out (heads, features), `row` matrices by what goes
in, so between the two nothing needs to be exchanged: a mixer or feed-forward is a *region* in which each rank works on
its own heads or features, and what the ranks have is summed where it ends. In the backward pass it is the other way
round: gradients are summed where the region begins.

    enter    forward: as it is          backward: sum over ranks
    leave    forward: sum over ranks    backward: as it is

With sequence parallel (2205.05198) each rank keeps, outside the regions, a part of the sequence only: norms and
residuals take a part of the memory, and the sums become gather and reduce-scatter, which together move the same bytes.

    enter    forward: gather            backward: reduce-scatter
    leave    forward: reduce-scatter    backward: gather

Embedding and head are split over the vocabulary; the logits of a token lie on all ranks and so does its partition
function, of which each computes its words' share. Inside a region the gradient of a weight that every rank has whole (a
norm, a projection to latents, a router that experts follow) is a part of a sum; it is marked so, and summed at the end.
"""
from __future__ import annotations

import functools

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from mindseed.models.block import Block
from mindseed.models.lm import LM
from mindseed.models.mtp import MTPModule
from mindseed.nn.linear import Linear
from mindseed.nn.moe import MoE
from mindseed.nn.norm import LayerNorm, RMSNorm
from mindseed.parallel.mesh import Mesh

SCATTER = getattr(torch_dist, "reduce_scatter_single", None) or torch_dist.reduce_scatter_tensor    # its older name
TIME = 1                                          # the dim of (B, T, D) that sequence parallel cuts


# ---------------------------------------------------------------------------------------------- what crosses the ranks

class Sum(torch.autograd.Function):
    """Sum over the group forward; the gradient passes as it is."""

    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        x = x.clone()
        torch_dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, g: Tensor):
        return g, None


class SumGradient(torch.autograd.Function):
    """As it is forward; the gradient is summed over the group."""

    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g: Tensor):
        g = g.clone(memory_format=torch.contiguous_format)
        torch_dist.all_reduce(g, group=ctx.group)
        return g, None


class Gather(torch.autograd.Function):
    """(B, T / n, ...) -> (B, T, ...). The gradient is summed over the ranks and cut again (`summed`), or, where all
    ranks have the whole one, only cut."""

    @staticmethod
    def forward(ctx, x: Tensor, group, summed: bool) -> Tensor:
        ctx.group, ctx.summed = group, summed
        return gather(x, group)

    @staticmethod
    def backward(ctx, g: Tensor):
        return (reduce_scatter if ctx.summed else cut)(g, ctx.group), None, None


class Scatter(torch.autograd.Function):
    """(B, T, ...) -> (B, T / n, ...): the ranks' tensors are summed first (`summed`), or, where all are the same, only
    cut. The gradient is gathered."""

    @staticmethod
    def forward(ctx, x: Tensor, group, summed: bool) -> Tensor:
        ctx.group = group
        return (reduce_scatter if summed else cut)(x, group)

    @staticmethod
    def backward(ctx, g: Tensor):
        return gather(g, ctx.group), None, None


def gather(x: Tensor, group) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    torch_dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, TIME)


def reduce_scatter(x: Tensor, group) -> Tensor:
    parts = x.chunk(group.size(), TIME)
    out = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
    SCATTER(out, torch.cat(parts), group=group)                                   # (n B, T / n, ...)
    return out


def cut(x: Tensor, group) -> Tensor:
    return x.chunk(group.size(), TIME)[group.rank()].contiguous()


# -------------------------------------------------------------------------------------------------------- the weights

def at_hand(p: Tensor) -> Tensor:
    """This rank's part of a weight, as a plain tensor; the gradient of a copy is a part of a sum. While ZeRO has it
    sharded as well, it is not at hand, and stays what it is."""
    if not isinstance(p, DTensor) or "sharded" in (p.device_mesh.mesh_dim_names or ()):
        return p
    return p.to_local(grad_placements=[Partial() if at.is_replicate() else at for at in p.placements])


def spread(module: nn.Module, mesh: DeviceMesh, *placements: Shard | Replicate) -> None:
    """Turn the module's own parameters into slices or copies on the axes of `mesh`. What reads `module.weight` sees the
    slice, a plain tensor; optimisers and checkpoints see a DTensor that knows the whole."""
    for name, p in list(module.named_parameters(recurse=False)):
        slices = distribute_tensor(p.detach(), mesh, placements, src_data_rank=None)
        module._parameters[name] = nn.Parameter(slices, requires_grad=p.requires_grad)
    names = [name for name in module._parameters if module._parameters[name] is not None]
    views = {name: property(lambda self, name=name: at_hand(self._parameters[name])) for name in names}
    module.__class__ = type(type(module).__name__, (type(module),), views)


PLACES = {"column": Shard(0), "row": Shard(1), "replicated": Replicate()}


class Splitter:
    """Puts the pieces of a model in their places on the tensor axis."""

    def __init__(self, mesh: Mesh) -> None:
        self.axis, self.group = mesh.weights["tensor"], mesh.group("tensor")
        self.sequence = mesh.options.sequence

    def model(self, model: LM) -> None:
        if isinstance(model.embed, nn.Embedding):                                 # else another stage has it
            spread(model.embed, self.axis, Shard(0))
            model.embed.__class__ = type("SplitEmbedding", (SplitEmbedding, type(model.embed)), {})
            model.embed.group = self.group
            self.ends(model.embed)
        if isinstance(model.head, Linear):
            spread(model.head, self.axis, Shard(0))
        if self.sequence and isinstance(model.norm, (RMSNorm, LayerNorm)):
            spread(model.norm, self.axis, Replicate())
            model.norm.register_forward_hook(lambda _, args, y: Gather.apply(y, self.group, False))
        if self.sequence and model.place is not None:
            model.place.register_forward_hook(lambda _, args, y: Scatter.apply(y, self.group, False))
        for module in model.mtp:
            self.ahead(module)
        for block in [*model.blocks, *(module.block for module in model.mtp)]:
            if isinstance(block, Block):
                self.block(block)
        model.apply_head = functools.partial(VocabularyHead.apply, self.group)

    def ahead(self, module: MTPModule) -> None:
        """A module of multi-token prediction is given whole rows, as the head is, and gives whole ones to the head."""
        if not self.sequence:
            return
        for own in (module.embed_norm, module.hidden_norm, module.join, module.norm):
            spread(own, self.axis, Replicate())
        module.register_forward_pre_hook(lambda _, args: (Scatter.apply(args[0], self.group, False), *args[1:]))
        module.norm.register_forward_hook(lambda _, args, y: Gather.apply(y, self.group, False))

    def block(self, block: Block) -> None:
        if self.sequence:
            for norm in (m for m in block.children() if isinstance(m, (RMSNorm, LayerNorm))):
                spread(norm, self.axis, Replicate())
        self.region(block.mixer, self.sequence)
        if not isinstance(block.ffn, MoE):
            return self.region(block.ffn, self.sequence)
        if self.sequence:                         # a router needs whole rows; its gradients are the same on all ranks
            block.ffn.register_forward_pre_hook(
                lambda _, args: (Gather.apply(args[0], self.group, False), *args[1:]))
            block.ffn.register_forward_hook(
                lambda _, args, result: (Scatter.apply(result[0], self.group, False), result[1]))
        if block.ffn.shared is not None:
            self.region(block.ffn.shared, False)

    def region(self, module: nn.Module, sequence: bool) -> None:
        """A mixer or feed-forward in which each rank has its own heads or features."""
        def enter(_: nn.Module, args: tuple) -> tuple:
            x = Gather.apply(args[0], self.group, True) if sequence else SumGradient.apply(args[0], self.group)
            return x, *args[1:]

        module.register_forward_pre_hook(enter)
        for child in list(module.modules()):
            if isinstance(child, Linear):
                spread(child, self.axis, PLACES[child.role])
                if child.role == "row":
                    self.ends(child, sequence)
            elif isinstance(child, (RMSNorm, LayerNorm)):
                spread(child, self.axis, Replicate())

    def ends(self, module: nn.Module, sequence: bool | None = None) -> None:
        """Sum what the ranks' copies of `module` give."""
        sequence = self.sequence if sequence is None else sequence
        module.register_forward_hook(
            lambda _, args, y: Scatter.apply(y, self.group, True) if sequence else Sum.apply(y, self.group))


class SplitEmbedding(nn.Embedding):
    """Rows of the words that this rank has, zeros for all others."""

    def forward(self, ids: Tensor) -> Tensor:
        weight = self.weight                                                      # (V / n, D)
        own = ids - self.group.rank() * len(weight)
        here = (own >= 0) & (own < len(weight))
        return F.embedding(own.masked_fill(~here, 0), weight) * here[..., None]


# ----------------------------------------------------------------------------------------------------------- the loss

class VocabularyHead(torch.autograd.Function):
    """As core.ChunkedHead, with each rank's words: hidden (N, D), head (V / n, D), targets (N,) -> (logps, lse) (N,).
    Ranks tell each other two numbers per token: the logits stay where they are."""

    @staticmethod
    def forward(ctx, group, hidden: Tensor, head: Tensor, targets: Tensor, chunk: int,
                dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        w, wide = head.to(dtype), torch.promote_types(dtype, torch.float32)
        own = targets - group.rank() * len(w)
        here = (own >= 0) & (own < len(w))
        own = own.masked_fill(~here, 0)
        picked, lse = hidden.new_zeros(2, len(hidden), dtype=wide)
        with torch.autocast(hidden.device.type, enabled=False):
            for i in range(0, len(hidden), chunk):
                logits = F.linear(hidden[i:i + chunk].to(dtype), w).to(wide)      # (chunk, V / n)
                lse[i:i + chunk] = logits.logsumexp(-1)
                picked[i:i + chunk] = logits.gather(-1, own[i:i + chunk, None])[:, 0] * here[i:i + chunk]
        every = [torch.empty_like(lse) for _ in range(group.size())]
        torch_dist.all_gather(every, lse, group=group)
        torch_dist.all_reduce(picked, group=group)
        lse = torch.stack(every).logsumexp(0)
        ctx.save_for_backward(hidden, w, own, here, lse)
        ctx.group, ctx.chunk, ctx.head_dtype = group, chunk, head.dtype
        return picked - lse, lse

    @staticmethod
    def backward(ctx, g_logps: Tensor, g_lse: Tensor):
        hidden, w, own, here, lse = ctx.saved_tensors
        g_hidden, learns = torch.empty_like(hidden), ctx.needs_input_grad[2]
        g_head = torch.zeros(w.shape, dtype=lse.dtype, device=w.device) if learns else None
        for i in range(0, len(hidden), ctx.chunk):
            at = slice(i, i + ctx.chunk)
            rows = hidden[at].to(w.dtype)
            grad = F.linear(rows, w).to(lse.dtype).sub_(lse[at, None]).exp_()     # this rank's part of the softmax
            grad.mul_((g_lse[at] - g_logps[at])[:, None])
            grad.scatter_add_(-1, own[at, None], (g_logps[at] * here[at])[:, None])
            grad = grad.to(w.dtype)
            g_hidden[at] = grad @ w
            if learns:
                g_head += grad.T @ rows
        torch_dist.all_reduce(g_hidden, group=ctx.group)
        return None, g_hidden, g_head.to(ctx.head_dtype) if learns else None, None, None, None
