"""A model whose weights lie on several ranks, put together again on one of them: for the directory that others read."""
from __future__ import annotations

import copy

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from mindseed.base import dist
from mindseed.parallel.mesh import Mesh


def shell_of(model: nn.Module) -> nn.Module:
    """The same module without weights: what a whole model is poured into."""
    weightless = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    weightless |= {id(x): x.to("meta") for x in model.buffers()}
    return copy.deepcopy(model, weightless)


@torch.no_grad()
def gathered(model: nn.Module, mesh: Mesh) -> nn.Module | None:
    """The whole model in the CPU's memory of rank 0, None elsewhere; a collective call. One tensor at a time is whole
    on the other ranks."""
    own: dict[str, Tensor] = {}
    first = mesh.place("replica") == mesh.place("sharded") == mesh.place("tensor") == 0       # one rank of every stage
    for name, x in model.state_dict().items():
        x = x.full_tensor() if hasattr(x, "full_tensor") else x
        if first:
            own[name] = x.cpu()
    if not first:
        return None
    parts: list[dict[str, Tensor] | None] = [None] * mesh.sizes.pipe
    torch_dist.gather_object(own, parts if dist.is_main() else None, group=mesh.group("pipe"), group_dst=0)
    if not dist.is_main():
        return None
    whole = copy.deepcopy(mesh.shell[-1]).to_empty(device="cpu")
    whole.load_state_dict({name: x for part in parts for name, x in part.items()})
    return whole.eval()
