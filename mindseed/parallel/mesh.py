"""The mesh of a run as torch sees it: which ranks speak with which, made once and handed to everything that is shared
out.

The same ranks are looked at in two ways, for the experts of a mixture are dealt out over ranks that otherwise hold
different tokens:

    weights    pipe x replica x sharded x tensor          sharded = shard x context
    experts    pipe x copies  x expert  x tensor          copies x expert = replica x sharded
"""
from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
import torch.distributed as torch_dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mindseed.base import dist
from mindseed.base.errors import UserError
from mindseed.base.mesh import ParallelOptions, Sizes


@dataclass(frozen=True)
class Mesh:
    """The two views, and this process's place on them. `axes` holds every axis by its name; `parts` are the ranks with
    different tokens, over which gradients of whole weights are summed."""

    options: ParallelOptions
    sizes: Sizes
    weights: DeviceMesh
    experts: DeviceMesh
    axes: dict[str, DeviceMesh]
    saving: torch_dist.ProcessGroup               # all ranks, for what is said in the background
    shell: list[nn.Module] = field(default_factory=list)    # the model without weights, as it was
    root: list[nn.Module] = field(default_factory=list)     # through what ZeRO wants the model run, once there is one

    def group(self, axis: str) -> torch_dist.ProcessGroup:
        return self.axes[axis].get_group()

    def place(self, axis: str) -> int:
        """This rank's number on an axis."""
        return self.axes[axis].get_local_rank()

    @property
    def pipeline(self) -> torch_dist.ProcessGroup | None:
        """The ranks that have the other stages, if there are any."""
        return self.group("pipe") if self.sizes.pipe > 1 else None

    @property
    def shards(self) -> DeviceMesh:
        """Where FSDP shards: one axis, or (copies, shards) under hybrid sharding."""
        return self.weights["replica", "sharded"] if self.sizes.replica > 1 else self.axes["sharded"]

    @property
    def sharded_alone(self) -> bool:
        """Whether ZeRO is all there is: then every rank can have the whole model for a while."""
        s = self.sizes
        return s.pipe == s.tensor == s.expert == s.context == 1

    @property
    def seed(self) -> int:
        """A number that differs where dropout must: by tokens, not by what part of a matrix a rank multiplies with."""
        s, parted = self.sizes, self.options.sequence and self.sizes.tensor > 1
        row = self.place("replica") * s.shard + self.place("shard")
        return (row * s.context + self.place("context")) * s.tensor + (self.place("tensor") if parted else 0)


def make_mesh(options: ParallelOptions, device: torch.device) -> Mesh | None:
    """Lay the ranks of the running process group out, and tell base/dist.py which share is this one's. None where there
    is nothing to lay out: one process, or the data parallelism that DDP does alone."""
    world = dist.world_size()
    try:
        sizes = options.sizes(world)
    except ValueError as error:
        raise UserError(str(error)) from None
    if options.plain or options.backend == "deepspeed":
        return None
    if not torch_dist.is_initialized():           # ZeRO and offload work on one process too
        torch_dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1,
                                      store=torch_dist.HashStore())
    for name in ("_redistribute", "_collective_utils"):                           # how it gathers is no news
        logging.getLogger(f"torch.distributed.tensor.{name}").setLevel(logging.ERROR)
    names, shards = ("pipe", "replica", "sharded", "tensor"), sizes.shard * sizes.context
    weights = init_device_mesh(device.type, (sizes.pipe, sizes.replica, shards, sizes.tensor), mesh_dim_names=names)
    copies = sizes.parts // sizes.expert
    experts = init_device_mesh(device.type, (sizes.pipe, copies, sizes.expert, sizes.tensor),
                               mesh_dim_names=("pipe", "copies", "expert", "tensor"))
    inner = weights["sharded"]._unflatten(0, (sizes.shard, sizes.context), ("shard", "context"))
    axes = {name: weights[name] for name in names} | {name: inner[name] for name in ("shard", "context")}
    axes |= {name: experts[name] for name in ("copies", "expert")}
    axes["parts"] = weights["replica", "sharded"]._flatten("parts")
    mesh = Mesh(options, sizes, weights, experts, axes, torch_dist.new_group(backend="gloo"))
    row = mesh.place("replica") * sizes.shard + mesh.place("shard")
    dist.share(dist.Share(row_rank=row, row_ranks=sizes.data, parts=sizes.parts, group=mesh.group("parts")))
    return mesh
