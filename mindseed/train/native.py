"""The native backend: autograd, autocast, loss scaling, gradients summed over ranks, clipping, optimisers.

Several processes without a mesh are DDP's. With a mesh (parallel/mesh.py) the model has been shared out before it comes
here; what is left to do is to sum what FSDP does not, and to take norms over slices.
"""
from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mindseed.base import dist
from mindseed.base.errors import UserError
from mindseed.core import Batch, Objective
from mindseed.models.config import untrainable
from mindseed.models.lm import LM
from mindseed.parallel import checkpoint as spread
from mindseed.parallel import clip, data, fsdp
from mindseed.parallel.context import Ring
from mindseed.parallel.gather import gathered
from mindseed.parallel.mesh import Mesh
from mindseed.train.loss_scale import LossScale
from mindseed.train.scored import Scored, supervised_nll

Precision = Literal["fp32", "bf16", "fp16", "fp8", "fp8-block"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16, "fp8-block": torch.bfloat16}
PATIENCE = 40                                     # halvings that take the first loss scale, 2^16, to nothing


def dealt_out(p: nn.Parameter, mesh: Mesh) -> bool:
    """Whether a parameter lies on the axis of experts."""
    return mesh.sizes.expert > 1 and hasattr(p, "device_mesh") and "expert" in (p.device_mesh.mesh_dim_names or ())


class NonFinite(FloatingPointError):
    """A loss or a gradient is infinite or not a number; the update was not applied."""


class NativeBackend:
    """Weights stay in float32 (the masters); bf16 and fp16 run the products through autocast.

    fp16 multiplies the loss by a growing scale; a step whose gradients overflow is skipped on all ranks alike, and
    counted; after PATIENCE of them in a row the fault is not the scale. There, and at once in fp32 and bf16,
    NonFinite is raised before anything is updated.
    """

    def __init__(self, model: nn.Module, objective: Objective, optimizers: list[torch.optim.Optimizer], *,
                 precision: Precision = "fp32", max_norm: float = 1.0, mesh: Mesh | None = None) -> None:
        if isinstance(model, LM) and (reason := untrainable(model.config)):
            raise UserError(f"this model runs but must not be trained: {reason}")
        self.model, self.optimizers, self.max_norm, self.precision = model, optimizers, max_norm, precision
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.counted = self.params                # of which the norm is taken, each parameter of the run on one rank
        self.mesh, self.stage = mesh, mesh.options.zero if mesh else 0
        self.device = self.params[0].device if not (mesh and mesh.options.offload) else torch.device(
            "cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self.ring = Ring(mesh) if mesh and mesh.sizes.context > 1 else None
        self.root = mesh.root[-1] if self.stage else None
        self.dealt = [p for p in self.params if mesh and dealt_out(p, mesh)]
        self.scored: nn.Module = Scored(model, objective)
        if dist.world_size() > 1 and mesh is None:
            self.scored = data.replicated(self.scored)
        self.scaler = LossScale(precision == "fp16")
        self.skipped = self.in_a_row = 0

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, AUTOCAST[self.precision])

    def forward_backward(self, batch: Batch, *, scale: Tensor, last: bool) -> dict[str, Tensor]:
        waiting = isinstance(self.scored, DistributedDataParallel) and not last
        if self.stage:
            fsdp.between_microbatches(self.root, self.stage, last=last)
        with self.scored.no_sync() if waiting else contextlib.nullcontext():
            with self.autocast():
                total, sums = self.root(self.scored, batch) if self.root else self.scored(batch)
            (total * (scale * self.scaler.scale)).backward()
        if last and self.mesh:
            self.reduce(self.mesh)
        return {"loss": total.detach(), **sums}

    def reduce(self, mesh: Mesh) -> None:
        """Sum the gradients that neither DDP nor FSDP has summed over the ranks that hold other tokens."""
        clip.settle(self.params)
        if not self.stage:
            dealt = {id(p) for p in self.dealt}
            data.average([p for p in self.params if id(p) not in dealt], mesh.group("parts"), mesh.sizes.parts)
        data.average(self.dealt, mesh.group("copies"), mesh.sizes.parts)

    def whole(self) -> contextlib.AbstractContextManager:
        """Inside, ranks may run the model without waiting for each other, as far as the mesh lets them."""
        return fsdp.whole(self.root, self.mesh) if self.stage else contextlib.nullcontext()

    @contextlib.contextmanager
    def to_save(self) -> Iterator[nn.Module | None]:
        """The model with all weights in one place, for whoever writes it: on rank 0, None elsewhere."""
        if self.mesh:
            yield gathered(self.model, self.mesh)
        else:
            yield self.model if dist.is_main() else None

    @torch.no_grad()
    def judged(self, batch: Batch) -> dict[str, Tensor]:
        """The summed loss and metrics, outside any wrapper and without gradients."""
        inner = self.scored.module if isinstance(self.scored, DistributedDataParallel) else self.scored
        with self.autocast():
            total, sums = self.root(inner, batch) if self.root else inner(batch)
        return {"loss": total, **sums}

    def nll(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As `supervised_nll`. Under ZeRO inside `whole`."""
        with self.autocast():
            return supervised_nll(self.model, batch)

    def cut(self, batch: Batch) -> Batch:
        """This rank's part of a batch that all ranks of its sequence have been given."""
        return self.ring.cut(batch) if self.ring else batch

    def score(self, batch: Batch) -> Tensor:
        """The summed loss alone; used to find out which row spoilt a batch."""
        return self.judged(batch)["loss"]

    def step(self, lr: float) -> float:
        if self.scaler.enabled:
            clip.scale_gradients(self.params, 1 / self.scaler.scale)
        norm = self.clip().item()
        finite = math.isfinite(norm)
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if self.in_a_row > (PATIENCE if self.precision == "fp16" else 0):
            self.clear()
            scaled = f", {self.in_a_row} steps in a row, at a loss scale of {self.scaler.scale:g}"
            raise NonFinite(f"gradient norm is {norm} at lr={lr:g}{scaled if self.in_a_row > 1 else ''}")
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            if finite:
                optimizer.step()
        self.scaler.update(finite)
        self.skipped += not finite
        self.clear()
        return norm

    def clip(self) -> Tensor:
        """The norm of the whole gradient, which is shortened to `max_norm`."""
        if self.mesh is None:
            return torch.nn.utils.clip_grad_norm_(self.params, self.max_norm or torch.inf)
        norm = clip.global_norm(self.counted, self.mesh.group("pipe"))
        clip.scale_gradients(self.params, (self.max_norm / (norm + 1e-6)).clamp(max=1.0) if self.max_norm else 1.0)
        return norm

    def clear(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def weights(self) -> dict[str, Tensor]:
        """Of the model, by name: what a checkpoint holds beside `state_dict`."""
        return self.model.state_dict()

    def load_weights(self, saved: dict[str, Tensor]) -> None:
        self.model.load_state_dict(saved)

    def load_spread(self, folder: Path, small: dict, average: dict[str, Tensor] | None) -> None:
        """Take over what several ranks have written in parts: weights, states, and the moving average."""
        spread.load(folder, self.model, self.optimizers, average)
        self.load_small(small)

    def state_dict(self) -> dict:
        return {"optimizers": [o.state_dict() for o in self.optimizers], "scaler": self.scaler.state_dict(),
                "skipped": self.skipped, "names": [spread.names_of(self.model, o) for o in self.optimizers]}

    def load_state_dict(self, state: dict) -> None:
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            asked = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, own in zip(optimizer.param_groups, asked, strict=True):
                group |= own                      # betas and decay are those asked for now, not those of the file
        self.load_small(state)

    def load_small(self, state: dict) -> None:
        """What is no tensor."""
        self.scaler.load_state_dict(state["scaler"])
        self.skipped, self.in_a_row = state["skipped"], 0
