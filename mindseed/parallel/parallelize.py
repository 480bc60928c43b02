"""One model on many ranks: every axis of the mesh put on it, in the order in which they depend on each other.

Matrices are split first (tensor), experts dealt out (expert), attention joined over ranks (context), and what each rank
then has is sharded (ZeRO). A pipeline comes before all of these: it decides which blocks a rank has.
"""
from __future__ import annotations

from torch import nn

from mindseed.base.errors import UserError
from mindseed.models.lm import LM
from mindseed.models.splitting import splitting_problems
from mindseed.parallel import fsdp
from mindseed.parallel.context import Ring
from mindseed.parallel.gather import shell_of
from mindseed.parallel.mesh import Mesh


def parallelize(model: nn.Module, mesh: Mesh | None, *, bf16: bool = False) -> nn.Module:
    """The model with its weights on the ranks of the mesh, in place; under ZeRO alone one of several language models,
    as an actor and its critic. `bf16`: weights gathered by ZeRO travel in it.

    Raises UserError with everything about the model that the mesh cannot split.
    """
    if mesh is None:
        return model
    if isinstance(model, LM):
        check(model, mesh)
    from mindseed.parallel.expert import deal_out           # what these need of torch takes seconds to load
    from mindseed.parallel.pipeline import keep_own_blocks
    from mindseed.parallel.tensor import Splitter
    mesh.shell.append(shell_of(model))
    if mesh.sizes.pipe > 1:
        keep_own_blocks(model, mesh)
    if mesh.sizes.tensor > 1:
        Splitter(mesh).model(model)
    dealt = deal_out(model, mesh)
    if mesh.sizes.context > 1:
        ring = Ring(mesh)
        model.ring, model.ahead = ring.attention, ring.ahead
    if mesh.options.zero:
        mesh.root.append(fsdp.shard(model, mesh, bf16=bf16, ignored=dealt))
    return model


def check(model: nn.Module, mesh: Mesh) -> None:
    problems = splitting_problems(model.config, mesh.options)
    if problems:
        raise UserError("this model cannot be shared out so:\n" + "\n".join(f"  {line}" for line in problems))
