"""The pipelined backend: the native one, with the layers on several ranks and a schedule in place of a forward pass."""
from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from mindseed.core import Batch, Objective
from mindseed.objectives.sft import SFT
from mindseed.parallel import fsdp
from mindseed.parallel.mesh import Mesh
from mindseed.parallel.pipeline import Absent, Pipeline
from mindseed.train.native import NativeBackend, Precision


class PipelinedBackend(NativeBackend):
    """As NativeBackend; every rank of the pipeline is given the same batch. Under ZeRO gradients add up whole, as in
    its first stage, for weights are not let go of while pieces are on their way."""

    def __init__(self, model: nn.Module, objective: Objective, optimizers: list[torch.optim.Optimizer], *,
                 mesh: Mesh, precision: Precision = "fp32", max_norm: float = 1.0) -> None:
        super().__init__(model, objective, optimizers, precision=precision, max_norm=max_norm, mesh=mesh)
        self.pipeline = Pipeline(model, objective, mesh, self.device)
        if not isinstance(model.norm, Absent):    # the last stage; a copy of the embedding counts on the first
            self.counted = [p for p in self.params if p is not self.pipeline.embed]

    def forward_backward(self, batch: Batch, *, scale: Tensor, last: bool) -> dict[str, Tensor]:
        if self.root:
            fsdp.hold_back(self.root)
        with self.autocast():
            sums = self.pipeline.forward_backward(batch, scale * self.scaler.scale)
        if last and self.root:
            fsdp.let_go(self.root)
        if last:
            self.reduce(self.mesh)
            self.pipeline.join_copies()
        return sums

    def nll(self, batch: Batch) -> tuple[Tensor, Tensor]:
        plain = replace(batch, weights=(batch.weights > 0).to(batch.weights.dtype))
        with self.autocast():
            return self.pipeline.forward(plain, SFT())["loss"], plain.weights.sum()

    def judged(self, batch: Batch) -> dict[str, Tensor]:
        with self.autocast():
            return self.pipeline.forward(batch)
