"""Pipeline parallel: ranks share the layers, and pieces of a micro-batch follow each other through them.

A rank that waits for the one before it is idle, and so is one that has sent its last piece on: the bubble. With p ranks
and m pieces, every rank idles for p - 1 of m + p - 1 turns if all pieces go forward before the first goes back (GPipe,
1811.06965). 1F1B (2104.04473) has the same bubble and keeps fewer activations, for a piece goes back as soon as it has
come through. Two stages on every rank halve the bubble: `interleaved` deals them out in turn; the V-shaped schedules
give rank r the stages r and 2 p - 1 - r, so that the loss comes back to where it started, and fill what is left with
the weights' share of the backward pass, which nobody waits for (zero-bubble, 2401.10241; DualPipe-V, after 2412.19437).

The schedules are torch's. Here is which blocks a stage has, what it hands on, and how a batch is run.
"""
from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from mindseed.base.dist import local
from mindseed.base.mesh import STAGES, V_SHAPED
from mindseed.core import Batch, Objective
from mindseed.models.config import LMConfig
from mindseed.models.lm import LM
from mindseed.models.splitting import reads_words
from mindseed.nn.moe import MoEConfig
from mindseed.parallel.mesh import Mesh

SCHEDULES = {"gpipe": "ScheduleGPipe", "1f1b": "Schedule1F1B", "interleaved": "ScheduleInterleaved1F1B",
             "zero-bubble": "ScheduleZBVZeroBubble", "dualpipe-v": "ScheduleDualPipeV"}     # in torch's words


class Absent(nn.Module):
    """A part of the model that another rank has."""


def stages_of(rank: int, ranks: int, schedule: str) -> list[int]:
    """The stages of a rank, in the order in which a piece meets them."""
    if STAGES[schedule] == 1:
        return [rank]
    return [rank, 2 * ranks - 1 - rank] if schedule in V_SHAPED else [rank, rank + ranks]


def blocks_of(stage: int, stages: int, layers: int) -> range:
    """Which blocks a stage has: as many as all others, or one more."""
    return range(stage * layers // stages, (stage + 1) * layers // stages)


def aux_names(config: LMConfig) -> list[str]:
    """The auxiliary losses that some layer of this model has."""
    weights = {"balance": "balance_weight", "router_z": "z_weight", "sequence": "sequence_weight"}
    mixtures = [layer.ffn for layer in config.layers if isinstance(layer.ffn, MoEConfig)]
    return [name for name, weight in weights.items() if any(getattr(ffn, weight) for ffn in mixtures)]


def keep_own_blocks(model: LM, mesh: Mesh) -> None:
    """Let go of everything that this rank's stages do not need, in place. Names of what stays do not change."""
    ranks, layers = mesh.sizes.pipe, len(model.blocks)
    mine = stages_of(mesh.place("pipe"), ranks, mesh.options.schedule)
    count = ranks * STAGES[mesh.options.schedule]
    own = {block for stage in mine for block in blocks_of(stage, count, layers)}
    for i in range(layers):
        if i not in own:
            model.blocks[i] = Absent()
    first, last = 0 in mine, count - 1 in mine
    if not first:
        model.place = None
    if not last:
        model.norm, model.head, model.mtp = Absent(), Absent(), nn.ModuleList()
    if not first and not (last and reads_words(model.config)):
        model.embed = Absent()


class Apart(torch.autograd.Function):
    """An embedding looked up beside the graph of a stage, whose gradient is added as soon as that of the result is
    there. Schedules that split the backward pass look for the weights that a stage's input does not need, and take each
    to hang on one place of the graph; a table that is read in the middle of it would not."""

    @staticmethod
    def forward(ctx, near: Tensor, embed: nn.Module, ids: Tensor) -> Tensor:
        """embed(ids), as if it had been made of `near`."""
        with torch.enable_grad():
            ctx.words = embed(ids)
        return ctx.words.detach()

    @staticmethod
    def backward(ctx, g: Tensor):
        if ctx.words.requires_grad:
            torch.autograd.backward(ctx.words, g)
        return None, None, None


class Stage(nn.Module):
    """Consecutive blocks: (x, auxiliary losses so far) -> the same; the first reads ids, the last gives the loss.

    The last stage notes the sums of its metrics in `sums`, and leaves the loss of a piece as a tensor of one number.
    """

    def __init__(self, model: LM, objective: Objective, index: int, count: int, root: list[nn.Module]) -> None:
        super().__init__()
        self.model, self.objective, self.names, self.root = model, objective, aux_names(model.config), root
        self.first, self.last = index == 0, index == count - 1
        self.range = blocks_of(index, count, len(model.blocks))
        self.sums: dict[str, Tensor] = {}

    def forward(self, x: Tensor, *aux: Tensor, **rows: Tensor) -> Any:
        if self.root:                             # ZeRO gathers what does not belong to a block
            return self.root[-1](functools.partial(self.pass_through, x, *aux, **rows))
        return self.pass_through(x, *aux, **rows)

    def pass_through(self, x: Tensor, *aux: Tensor, positions: Tensor, **rows: Tensor) -> Any:
        layout = self.model.layout(positions, None)
        wide = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        aux = aux or [positions.new_zeros(positions.shape, dtype=wide) for _ in self.names]
        found = dict(zip(self.names, aux))
        x = self.model.begin(x, positions) if self.first else x
        for i in self.range:
            x = self.model.run(self.model.blocks[i], found, x, layout)
        x = x.to(wide)                            # as the next stage expects it, also where ZeRO gathers in bf16
        if not self.last:
            return (x, *(found[name] for name in self.names)) if self.names else x
        hidden = self.model.norm(x)
        look_up = functools.partial(Apart.apply, hidden, self.model.embed)
        further = self.model.look_ahead(hidden, rows["ids"], layout, found, look_up) if self.model.training else ()
        total, sums = self.objective.loss(self.model.output(hidden, found, further=further),
                                          Batch(positions=positions, **rows))
        for name, value in {"loss": total.detach(), **sums}.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        return torch.stack([total])               # no view: FSDP hooks into what it is given


class Pipeline:
    """This rank's stages, and how a batch is run through all of them."""

    def __init__(self, model: LM, objective: Objective, mesh: Mesh, device: torch.device) -> None:
        logging.getLogger("torch.distributed.pipelining").setLevel(logging.ERROR)
        schedule = mesh.options.schedule
        self.mesh, self.device, self.group = mesh, device, mesh.group("pipe")
        self.count = mesh.sizes.pipe * STAGES[schedule]
        self.pieces = mesh.options.pieces
        self.stages = {i: Stage(model, objective, i, self.count, mesh.root)
                       for i in stages_of(mesh.place("pipe"), mesh.sizes.pipe, schedule)}
        self.owner = {stage: rank for rank in range(mesh.sizes.pipe)
                      for stage in stages_of(rank, mesh.sizes.pipe, schedule)}
        ends = [self.owner[0], self.owner[self.count - 1]]
        there = reads_words(model.config) and ends[0] != ends[1] and mesh.place("pipe") in ends
        self.embed = next(model.embed.parameters()) if there else None            # of which another rank has a copy
        self.other = ends[mesh.place("pipe") == ends[0]] if there else None
        self.dtype, self.scale = next(model.parameters()).dtype, torch.ones(())
        self.shape: tuple[int, int] | None = None
        self.schedule: Any = None

    def prepare(self, rows: int, width: int) -> None:
        """Make the schedule for batches of this shape."""
        if self.shape == (rows, width):
            return
        from torch.distributed import pipelining  # which loads torch's compiler
        self.shape, args = (rows, width), self.passed(rows // self.pieces, width, "meta")
        one = torch.empty(1, device="meta", dtype=self.dtype)
        made = [pipelining.PipelineStage(
            stage, i, self.count, self.device, group=self.group,
            input_args=(torch.empty(rows // self.pieces, width, dtype=torch.long, device="meta"),) if stage.first
            else args, output_args=(one,) if stage.last else args) for i, stage in self.stages.items()]
        several = STAGES[self.mesh.options.schedule] > 1
        self.schedule = getattr(pipelining, SCHEDULES[self.mesh.options.schedule])(
            made if several else made[0], self.pieces, loss_fn=lambda out, target: out.sum() * self.scale,
            scale_grads=False)

    def passed(self, rows: int, width: int, device: torch.device | str) -> tuple[Tensor, ...]:
        """Room for what one stage hands to the next."""
        part = self.mesh.sizes.tensor if self.mesh.options.sequence else 1        # of the sequence, on each rank
        config = next(iter(self.stages.values())).model.config
        x = torch.empty(rows, width // part, config.dim, dtype=self.dtype, device=device)
        wide = torch.promote_types(self.dtype, torch.float32)
        aux = [torch.empty(rows, width, dtype=wide, device=device) for _ in aux_names(config)]
        return tuple(t.requires_grad_() for t in (x, *aux))

    def forward_backward(self, batch: Batch, scale: Tensor) -> dict[str, Tensor]:
        """Add the gradients of `scale` times the loss of a batch; its sums, on every rank."""
        self.prepare(*batch.ids.shape)
        self.scale = scale
        for stage in self.stages.values():
            stage.sums = {}
        args = (batch.ids,) if 0 in self.stages else ()
        target = torch.zeros(len(batch.ids), device=self.device) if self.count - 1 in self.stages else None
        self.schedule.step(*args, target=target, losses=None if target is None else [], return_outputs=False,
                           **self.rows(batch))
        return self.told()

    @torch.no_grad()
    def forward(self, batch: Batch, objective: Objective | None = None) -> dict[str, Tensor]:
        """The sums of a batch, without gradients: one stage after the other."""
        handed: tuple[Tensor, ...] = (batch.ids,)
        for i in range(self.count):
            mine = i in self.stages
            if mine and i and self.owner[i - 1] != self.owner[i]:
                handed = self.passed(*batch.ids.shape, self.device)
                for x in handed:
                    torch_dist.recv(x, group=self.group, group_src=self.owner[i - 1])
            if mine:
                stage = self.stages[i]
                usual, stage.objective, stage.sums = stage.objective, objective or stage.objective, {}
                out = stage(*handed, **self.rows(batch))
                stage.objective = usual
                handed = out if isinstance(out, tuple) else (out,)
                if i + 1 < self.count and self.owner[i + 1] != self.owner[i]:
                    for x in handed:
                        torch_dist.send(x.contiguous(), group=self.group, group_dst=self.owner[i + 1])
        return self.told()

    def rows(self, batch: Batch) -> dict[str, Tensor]:
        return {"ids": batch.ids, "positions": batch.positions, "targets": batch.targets, "weights": batch.weights}

    @torch.no_grad()
    def join_copies(self) -> None:
        """Sum the gradients of the embedding over the first and the last rank, where both have a copy."""
        if self.embed is None or self.embed.grad is None:
            return
        mine = local(self.embed.grad)
        theirs, ops = torch.empty_like(mine, memory_format=torch.contiguous_format), []
        for op, x in ((torch_dist.isend, mine.contiguous()), (torch_dist.irecv, theirs)):
            ops.append(torch_dist.P2POp(op, x, group=self.group, group_peer=self.other))
        for work in torch_dist.batch_isend_irecv(ops):
            work.wait()
        mine += theirs

    def told(self) -> dict[str, Tensor]:
        """What the last stage has summed, as every rank knows it."""
        last, own = self.owner[self.count - 1], self.stages.get(self.count - 1)
        names = [sorted(own.sums) if own else None]
        source = torch_dist.get_global_rank(self.group, last)
        torch_dist.broadcast_object_list(names, source, group=self.group)
        values = torch.stack([own.sums[name].to(torch.float64) for name in names[0]]) if own else torch.empty(
            len(names[0]), dtype=torch.float64, device=self.device)
        torch_dist.broadcast(values, source, group=self.group)
        return dict(zip(names[0], values))
