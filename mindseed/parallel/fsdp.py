"""ZeRO (1910.02054) through FSDP2: data-parallel ranks share out what each would otherwise keep whole.

    stage 1    optimiser states. Weights are gathered once a step; gradients add up whole over the micro-batches of a
               step and are reduced, each rank its slice, by the last one.
    stage 2    gradients too: they are reduced after every micro-batch, and only slices are kept.
    stage 3    weights too: a block is gathered when it runs and let go right after, forward and backward.

Each block is a unit of its own, so that while one computes, the next is gathered. `replicas` > 1 is hybrid sharding:
slices within a group, copies between groups. Weights may travel in bf16, which halves the traffic; masters, gradients
and sums stay in float32.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mindseed.models.lm import LM
from mindseed.parallel.mesh import Mesh

if TYPE_CHECKING:                                 # whoever trains on one process need not load it
    from torch.distributed.fsdp import FSDPModule


class Root(nn.Module):
    """The outermost unit. What it runs is the model and its loss in one, for the loss reads the head, which must be
    whole until then, and what comes out must be results alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[..., Any], *inputs: Any) -> Any:
        return work(*inputs)


def shard(model: nn.Module, mesh: Mesh, *, bf16: bool, ignored: set[nn.Parameter]) -> Root:
    """Spread the weights of every block, and those around the blocks, over the shards of the mesh, in place; returns
    through what the model is to be run. `ignored` parameters stay as they are."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
    wide = None if not bf16 else torch.float32
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if mesh.options.offload else OffloadPolicy()
    how = {"mesh": mesh.shards, "offload_policy": offload, "ignored_params": ignored,
           "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=wide,
                                             cast_forward_inputs=False)}
    for block in [b for lm in model.modules() if isinstance(lm, LM) for b in (*lm.blocks, *lm.mtp)]:
        if any(True for _ in block.parameters()):                                 # not a gap of a pipeline
            fully_shard(block, reshard_after_forward=lets_go(mesh), **how)
    root = Root(model)
    fully_shard(root, reshard_after_forward=False, **how)
    return root


def lets_go(mesh: Mesh) -> bool:
    """Whether a block lets its weights go after the forward pass. Not in a pipeline: they would be gathered for every
    piece, and a schedule that splits the backward pass looks for what gets gradients when that begins, where slices
    would get none."""
    return mesh.options.zero == 3 and mesh.sizes.pipe == 1


def between_microbatches(root: FSDPModule, stage: int, *, last: bool) -> None:
    """What a stage does not do before the last micro-batch of a step."""
    root.set_is_last_backward(last)
    root.set_requires_gradient_sync(last or stage > 1)
    root.set_reshard_after_backward(last or stage == 3)


def hold_back(root: FSDPModule) -> None:
    """Until `let_go`, gradients add up whole and weights stay gathered: for pipelines, whose schedules run backward
    passes of many pieces, and in two halves."""
    root.set_is_last_backward(False)
    root.set_requires_gradient_sync(False)
    root.set_reshard_after_backward(False)


def let_go(root: FSDPModule) -> None:
    """Reduce what was held back, as the end of a backward pass does."""
    root.set_is_last_backward(True)
    root.set_requires_gradient_sync(True)
    root.set_reshard_after_backward(True)
    state = root._get_fsdp_state()
    for each in state._state_ctx.all_states:
        for group in each._fsdp_param_groups:
            group.post_backward()
    state._root_post_backward_final_callback()


@contextlib.contextmanager
def whole(root: nn.Module, mesh: Mesh) -> Iterator[None]:
    """Inside, every rank has all weights and no forward pass speaks with other ranks: for evaluation and generation,
    where ranks may do different work."""
    from torch.distributed.fsdp import FSDPModule
    root._get_fsdp_state()._lazy_init()           # or the block that is run first would take itself for the outermost
    units = [module for module in root.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(lets_go(mesh) and unit is not root, recurse=False)
            unit.reshard()
            for group in unit._get_fsdp_state()._fsdp_param_groups:
                group._post_forward_indices.clear()
        root._get_fsdp_state()._comm_ctx.post_forward_order.clear()               # no order to gather backwards in
