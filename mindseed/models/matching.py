"""What a student's layers and a teacher's have in common although their widths differ: for distillation within.

The last layer of a teacher is not all that can be imitated. Two things are compared before it:

    states      what the residual stream holds after so many blocks, a narrower student's seen through a matrix that
                is learnt along (TinyBERT, 1909.10351). Block i of the student's S follows block i L / S of the
                teacher's L.
    relations   which tokens a layer's queries take to be alike, and so its keys and values: a map T x T for each, whose
                shape depends on no width, so nothing need be learnt for it (MiniLM, 2002.10957 and 2012.15828). Fused
                attention keeps its secrets, so queries, keys and values of one layer are computed a second time.

`attach` hangs a `Matching` into both models, which adds both to their outputs; objectives/matching.py compares them.
The matrices are the student's parameters while it learns, so optimisers, DDP and checkpoints treat them as all others;
a model directory holds none of them, and `detach` takes them off.
"""
from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from mindseed.base.errors import UserError
from mindseed.core import Output
from mindseed.models.lm import LM
from mindseed.models.probe import gqa_parts, mla_parts
from mindseed.nn.attend import Layout
from mindseed.nn.gqa import GQA, GQAConfig
from mindseed.nn.linear import Linear
from mindseed.nn.mla import MLAConfig


class Matching(nn.Module):
    """Of an output that carries the states at `model.collect`: those at `depths`, in the `dim` of the teacher, and as
    `parts` the "queries", "keys" and "values" of the layer `related`, (B, T, R, width / R) each for R heads."""

    def __init__(self, own_dim: int, dim: int, depths: tuple[int, ...], related: int | None, heads: int, *,
                 seed: int = 0) -> None:
        super().__init__()
        self.depths, self.related, self.heads = depths, related, heads
        self.projections = nn.ModuleList(
            nn.Identity() if own_dim == dim else Linear(own_dim, dim, role="replicated") for _ in depths)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.normal_(0, 1 / math.sqrt(own_dim), generator=generator)

    def forward(self, model: LM, output: Output, layout: Layout) -> Output:
        found = dict(zip(model.collect, output.states))
        states = tuple(project(found[depth]) for depth, project in zip(self.depths, self.projections))
        parts = {} if self.related is None else self.parts(model, found[self.related], layout)
        return replace(output, states=states, parts=parts)

    def parts(self, model: LM, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        """What the attention of one layer makes of x (B, T, D), the stream before it."""
        block = model.blocks[self.related]
        heard = x if block.placement == "post" else block.mixer_norm(x)
        parts = gqa_parts if isinstance(block.mixer, GQA) else mla_parts
        return {name: y.flatten(2).unflatten(2, (self.heads, -1))                 # (B, T, H, K) -> (B, T, R, H K / R)
                for name, y in zip(("queries", "keys", "values"), parts(block.mixer, heard, layout))}


def attach(student: LM, teacher: LM, *, depths: tuple[int, ...] | None = None, related: tuple[int, int] | None = None,
           seed: int = 0) -> None:
    """Have both models tell their states after `depths` blocks of the student ((): of none; None: of all), and their
    parts in the layers `related`, (of the student, of the teacher), counted from 0. UserError for layers that are not
    there or have no attention."""
    mine, theirs = student.config, teacher.config
    if depths is None:
        depths = tuple(range(1, len(mine.layers) + 1))
    depths = tuple(sorted(set(depths)))
    if bad := [depth for depth in depths if not 0 <= depth <= len(mine.layers)]:
        raise UserError(f"the student has {len(mine.layers)} layers, so a state after {bad[0]} of them cannot be "
                        "matched")
    followed = tuple(round(depth * len(theirs.layers) / len(mine.layers)) for depth in depths)
    heads, layers = 1, related or (None, None)
    if related is not None:
        counts = [count for config, layer, whose in ((mine, related[0], "student"), (theirs, related[1], "teacher"))
                  for count in head_counts(config.layers, layer, whose)]
        heads = math.gcd(*counts)
    for model, at, layer, own in ((student, depths, layers[0], mine.dim), (teacher, followed, layers[1], theirs.dim)):
        like = model.embed.weight
        model.collect = tuple(sorted({*at, *([] if layer is None else [layer])}))
        model.matching = Matching(own, theirs.dim, at, layer, heads, seed=seed).to(like.device, like.dtype)


def detach(model: LM) -> None:
    """As if nothing had been attached."""
    model.collect, model.matching = (), None


def head_counts(layers: tuple, layer: int, whose: str) -> tuple[int, int]:
    """Of queries and of keys, in one layer's attention."""
    if not 0 <= layer < len(layers):
        raise UserError(f"the {whose} has {len(layers)} layers, counted from 0: there is no layer {layer} to be "
                        "matched")
    mixer = layers[layer].mixer
    if isinstance(mixer, GQAConfig):
        return mixer.heads, mixer.kv_heads
    if isinstance(mixer, MLAConfig):
        return mixer.heads, mixer.heads
    raise UserError(f"layer {layer} of the {whose} is linear attention, which relates no tokens; match another layer")
