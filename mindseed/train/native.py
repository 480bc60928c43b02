"""The native backend: autograd, autocast, loss scaling, DDP when there are several processes, clipping, optimisers."""
from __future__ import annotations

import contextlib
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mindseed.base import dist
from mindseed.base.errors import UserError
from mindseed.core import Batch, Objective
from mindseed.models.config import untrainable
from mindseed.models.lm import LM
from mindseed.train.scored import Scored

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
PATIENCE = 40                                     # halvings that take the first loss scale, 2^16, to nothing


class NonFinite(FloatingPointError):
    """A loss or a gradient is infinite or not a number; the update was not applied."""


class NativeBackend:
    """Weights stay in float32 (the masters); bf16 and fp16 run the products through autocast.

    fp16 multiplies the loss by a growing scale; a step whose gradients overflow is skipped on all ranks alike, and
    counted; after PATIENCE of them in a row the fault is not the scale. There, and at once in fp32 and bf16,
    NonFinite is raised before anything is updated.
    """

    def __init__(self, model: nn.Module, objective: Objective, optimizers: list[torch.optim.Optimizer], *,
                 precision: Precision = "fp32", max_norm: float = 1.0) -> None:
        if isinstance(model, LM) and (reason := untrainable(model.config)):
            raise UserError(f"this model runs but must not be trained: {reason}")
        self.model, self.optimizers, self.max_norm, self.precision = model, optimizers, max_norm, precision
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.device = self.params[0].device
        self.scored: nn.Module = Scored(model, objective)
        if dist.world_size() > 1:
            self.scored = DistributedDataParallel(self.scored, gradient_as_bucket_view=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.skipped = self.in_a_row = 0

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, AUTOCAST[self.precision])

    def forward_backward(self, batch: Batch, *, scale: Tensor, last: bool) -> dict[str, Tensor]:
        waiting = isinstance(self.scored, DistributedDataParallel) and not last
        with self.scored.no_sync() if waiting else contextlib.nullcontext():
            with self.autocast():
                total, sums = self.scored(batch)
            self.scaler.scale(total * scale).backward()
        return {"loss": total.detach(), **sums}

    @torch.no_grad()
    def judged(self, batch: Batch) -> dict[str, Tensor]:
        """The summed loss and metrics, outside any wrapper and without gradients."""
        inner = self.scored.module if isinstance(self.scored, DistributedDataParallel) else self.scored
        with self.autocast():
            total, sums = inner(batch)
        return {"loss": total, **sums}

    def score(self, batch: Batch) -> Tensor:
        """The summed loss alone; used to find out which row spoilt a batch."""
        return self.judged(batch)["loss"]

    def step(self, lr: float) -> float:
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.max_norm or torch.inf)
        finite = bool(torch.isfinite(norm))
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if self.in_a_row > (PATIENCE if self.precision == "fp16" else 0):
            self.clear()
            scaled = f", {self.in_a_row} steps in a row, at a loss scale of {self.scaler.get_scale():g}"
            raise NonFinite(f"gradient norm is {norm.item()} at lr={lr:g}{scaled if self.in_a_row > 1 else ''}")
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            if finite:
                self.scaler.step(optimizer)
        self.scaler.update()
        self.skipped += not finite
        self.clear()
        return norm.item()

    def clear(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        return {"optimizers": [o.state_dict() for o in self.optimizers], "scaler": self.scaler.state_dict(),
                "skipped": self.skipped}

    def load_state_dict(self, state: dict) -> None:
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            asked = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, own in zip(optimizer.param_groups, asked, strict=True):
                group |= own                      # betas and decay are those asked for now, not those of the file
        self.scaler.load_state_dict(state["scaler"])
        self.skipped, self.in_a_row = state["skipped"], 0
