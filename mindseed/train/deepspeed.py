"""DeepSpeed as a backend: ZeRO (1910.02054) and its offloading (2101.06840) by another project's engine.

    stage 1    every rank keeps a part of the optimiser's states
    stage 2    and of the gradients
    stage 3    and of the weights; a module's are gathered when it runs

Our own engine does the same through torch (parallel/fsdp.py). This one is for whoever has settings of DeepSpeed's,
or wants what torch has not: a JSON file is laid over what follows from our options (deepspeed_json.py).

Everything around the engine stays ours: the loss, its division by what was counted everywhere, the schedule, AdamW. A
step here is a step of the native backend, up to the order of sums. DeepSpeed takes norms and clips, since it alone has
all slices, and leaves out a step whose gradients are not finite; of that we make what the native backend makes of it.
Its checkpoints are not used: states are gathered and written in the native backend's form. Either goes on from what the
other has written, on any number of ranks.
"""
from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from mindseed.base import dist
from mindseed.base.errors import UserError
from mindseed.base.extras import install
from mindseed.core import Batch, Objective
from mindseed.models.config import untrainable
from mindseed.models.lm import LM
from mindseed.nn.moe import MoE
from mindseed.parallel import checkpoint as spread
from mindseed.train.deepspeed_json import deepspeed_config
from mindseed.train.loss_scale import LossScale
from mindseed.train.native import AUTOCAST, PATIENCE, NonFinite, Precision
from mindseed.train.scored import Scored, supervised_nll

MOMENTS = ("exp_avg", "exp_avg_sq")               # AdamW's, in torch's words


def deepspeed_backend(model: nn.Module, objective: Objective, optimizers: list[torch.optim.Optimizer], *, zero: int,
                      offload: bool = False, precision: Precision = "fp32", gather: Literal["fp32", "bf16"] = "fp32",
                      max_norm: float = 1.0, micro_batch: int = 1, accumulate: int = 1,
                      json: Path | str | None = None) -> DeepSpeedBackend:
    """A backend for our options, and for a JSON file of DeepSpeed's laid over them."""
    if isinstance(model, LM) and (reason := untrainable(model.config)):
        raise UserError(f"this model runs but must not be trained: {reason}")
    if precision not in ("fp32", "bf16", "fp16"):
        raise UserError(f"the deepspeed backend trains in fp32, bf16 or fp16; loop.precision={precision} is the native "
                        "backend's")
    if [type(optimizer) for optimizer in optimizers] != [torch.optim.AdamW]:
        names = " and ".join(type(optimizer).__name__ for optimizer in optimizers)
        raise UserError("the deepspeed backend updates with AdamW alone, which does not mind how weights are cut (Muon "
                        f"needs whole matrices), and this run has {names}: give --optim.kind adamw and --optim.states "
                        "fp32, or --parallel.backend native")
    device = next(model.parameters()).device
    library = started(device)
    config = deepspeed_config(zero=zero, offload=offload, precision=precision, gather=gather, max_norm=max_norm,
                              micro_batch=micro_batch, accumulate=accumulate, pin=device.type == "cuda", json=json,
                              params=sum(p.numel() for p in model.parameters()))
    try:
        library.DeepSpeedConfig(config)
    except (ValueError, AssertionError, library.runtime.config.DeepSpeedConfigError) as error:
        raise UserError(f"DeepSpeed refuses {json or 'its settings'}: {error}") from None
    return DeepSpeedBackend(library, model, objective, optimizers[0], config, precision=precision, max_norm=max_norm)


class DeepSpeedBackend:
    """Weights are in float32 and products run through autocast, as in the native backend; where the JSON enables bf16,
    weights are in bfloat16 and DeepSpeed keeps masters. fp16 moves its loss scale as torch's GradScaler does.

    AdamW stays torch's fused one where states are offloaded, too: it is fast on a CPU, and nothing has to be compiled.
    """

    def __init__(self, library: ModuleType, model: nn.Module, objective: Objective, adamw: torch.optim.AdamW,
                 config: dict[str, Any], *, precision: Precision, max_norm: float) -> None:
        self.library, self.model, self.adamw, self.precision = library, model, adamw, precision
        self.max_norm, self.stage = max_norm, config["zero_optimization"]["stage"]
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.device, self.mesh, self.ring = self.params[0].device, None, None
        self.order = [p for group in adamw.param_groups for p in group["params"]]
        self.sizes = [len(group["params"]) for group in adamw.param_groups]
        scored = Autocast(model, objective, self.autocast)
        self.engine, *_ = library.initialize(model=scored, optimizer=adamw, config=config)
        self.begin_states()
        self.scaler = LossScale(precision == "fp16")
        self.skipped = self.in_a_row = 0
        self.gathered = False

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, AUTOCAST[self.precision])

    def forward_backward(self, batch: Batch, *, scale: Tensor, last: bool) -> dict[str, Tensor]:
        if self.scaler.enabled and self.stage:
            self.engine.optimizer.override_loss_scale(self.scaler.scale)
        elif self.scaler.enabled:
            scale = scale * self.scaler.scale
        self.engine.set_gradient_accumulation_boundary(last)
        total, sums = self.engine(batch)
        self.engine.backward(total * scale, scale_wrt_gas=False)                  # `scale` has divided already
        return {"loss": total.detach(), **sums}

    @torch.no_grad()
    def judged(self, batch: Batch) -> dict[str, Tensor]:
        """The summed loss and metrics without gradients. In stage 3 all ranks must take part, unless inside `whole`."""
        total, sums = self.engine.module.forward(batch) if self.gathered else self.engine.module(batch)
        return {"loss": total, **sums}

    def nll(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As `supervised_nll`. In stage 3 inside `whole`."""
        with self.autocast():
            return supervised_nll(self.model, batch)

    def cut(self, batch: Batch) -> Batch:
        """This rank's part of a batch: all of it, as no rows are shared."""
        return batch

    def score(self, batch: Batch) -> Tensor:
        """The summed loss alone; used to find out which row spoilt a batch."""
        return self.judged(batch)["loss"]

    def step(self, lr: float) -> float:
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["lr_scale"]
        norm = self.zero_step() if self.stage else self.plain_step()
        finite, scale = math.isfinite(norm), self.scaler.scale
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if self.in_a_row > (PATIENCE if self.precision == "fp16" else 0):
            scaled = f", {self.in_a_row} steps in a row, at a loss scale of {scale:g}"
            raise NonFinite(f"gradient norm is {norm} at lr={lr:g}{scaled if self.in_a_row > 1 else ''}")
        self.scaler.update(finite)
        self.skipped += not finite
        return norm

    def zero_step(self) -> float:
        """DeepSpeed clips and updates, or leaves the step out; the norm before clipping."""
        self.engine.step()
        return math.inf if self.engine.optimizer.overflow else float(self.engine.get_global_grad_norm())

    def plain_step(self) -> float:
        """Without ZeRO every rank has all gradients, averaged over the ranks, and DeepSpeed calls AdamW."""
        torch._foreach_div_([p.grad for p in self.params if p.grad is not None], self.scaler.scale)
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.max_norm or torch.inf)
        if torch.isfinite(norm):
            self.engine.step()
        self.engine.zero_grad()
        return norm.item()

    # ------------------------------------------------------------------------------------------------- weights, whole

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, every rank has all weights, and no forward pass speaks with other ranks: for evaluation and
        generation, where ranks may do different work, and for whatever calls the model itself."""
        if self.stage < 3 or self.gathered:
            yield
            return
        hooks = self.engine.optimizer.parameter_offload
        with self.held(self.model.parameters()):
            for hook in (*hooks.forward_hooks, *hooks.backward_hooks):
                hook.remove()
            hooks.forward_hooks, hooks.backward_hooks, self.gathered = [], [], True
            try:
                yield
            finally:
                self.gathered = False
                for p in self.model.parameters():
                    p.ds_active_sub_modules.clear()
                hooks._register_deepspeed_module(hooks.module)

    @contextlib.contextmanager
    def to_save(self) -> Iterator[nn.Module | None]:
        """The model with all weights in one place, for whoever writes it: on rank 0, None elsewhere."""
        with self.whole():
            yield self.model if dist.is_main() else None

    def held(self, params: Iterable[Tensor], *, changed: bool = False) -> contextlib.AbstractContextManager:
        """Inside, these parameters are whole on every rank; with `changed` what rank 0 has written stays."""
        if self.stage < 3 or self.gathered:
            return contextlib.nullcontext()
        return self.library.zero.GatheredParameters(list(params), modifier_rank=0 if changed else None)

    def weights(self) -> dict[str, Tensor]:
        """The model's state_dict as one process would have it, masters where there are some, on the CPU of rank 0; the
        other ranks get nothing, and take part."""
        found = {}
        for name, x in self.model.state_dict(keep_vars=True).items():
            with self.held([x] if isinstance(x, nn.Parameter) else []):
                full = self.library.utils.safe_get_full_fp32_param(x) if self.stage and x.requires_grad else x
                if dist.is_main():
                    found[name] = full.detach().to("cpu", copy=True)
        return found

    @torch.no_grad()
    def load_weights(self, saved: dict[str, Tensor]) -> None:
        """Take over a whole state_dict of the model, that of rank 0."""
        for name, x in self.model.state_dict(keep_vars=True).items():
            full = self.from_main(saved.get(name), whole_shape(x))
            with self.held([x] if isinstance(x, nn.Parameter) else [], changed=True):
                x.copy_(full)
            if self.stage and x.requires_grad:
                self.library.utils.safe_set_full_fp32_param(x, full)

    def from_main(self, value: Tensor | None, shape: torch.Size) -> Tensor:
        """A tensor that rank 0 has, on every rank, in float32."""
        there = dist.is_main() and value is not None
        full = value.to(self.device, torch.float32).contiguous() if there else torch.zeros(shape, device=self.device)
        torch_dist.broadcast(full, src=0)
        return full

    # -------------------------------------------------------------------------------------------------- states, whole

    def state_dict(self) -> dict:
        """As the native backend's. States are whole, on the CPU of rank 0; the other ranks take part."""
        groups, at = [], 0
        for group, size in zip(self.adamw.param_groups, self.sizes, strict=True):
            groups.append({k: v for k, v in group.items() if k != "params"} | {"params": [*range(at, at + size)]})
            at += size
        step, states = max(int(state["step"]) for state in self.adamw.state.values()), {}
        for i, p in enumerate(self.order if step else []):
            moments = {name: self.moment(p, name) for name in MOMENTS}
            if dist.is_main():
                states[i] = {name: x.to("cpu", copy=True) for name, x in moments.items()}
                states[i]["step"] = torch.tensor(float(step))
        return {"optimizers": [{"state": states, "param_groups": groups}], "names": [self.names()],
                "scaler": self.scaler.state_dict(), "skipped": self.skipped}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Take over whole states, those of rank 0, of this backend or of the native one."""
        saved = state["optimizers"][0]["state"]
        told = [max((float(s["step"]) for s in saved.values()), default=0.0), state["scaler"], state["skipped"]]
        torch_dist.broadcast_object_list(told, src=0)
        step, scaler, self.skipped = told
        self.scaler.load_state_dict(scaler)
        self.in_a_row = 0
        for remembered in self.adamw.state.values():
            remembered["step"].fill_(step)
        for i, p in enumerate(self.order):
            for name in MOMENTS:
                full = self.from_main(saved.get(i, {}).get(name), whole_shape(p))
                if self.stage:
                    self.library.utils.safe_set_full_optimizer_state(p, full, name)
                else:
                    self.adamw.state[p][name].copy_(full)

    def load_spread(self, folder: Path, small: dict, average: dict[str, Tensor] | None) -> None:
        """Take over what the ranks of a mesh have written in parts (parallel/checkpoint.py), and of their backend's
        state what is `small`. Rank 0 puts it together and hands it out."""
        import torch.distributed.checkpoint as dcp
        here = {f"ema/{name}": x for name, x in (average or {}).items()}
        here |= {f"load/{name}": torch.empty(module.config.experts) for name, module in self.model.named_modules()
                 if isinstance(module, MoE)}
        model, states = {}, {}
        if dist.is_main():
            model = {name: torch.empty(whole_shape(x)) for name, x in self.model.state_dict(keep_vars=True).items()}
            states = {i: {"step": torch.empty(())} | {name: torch.empty(whole_shape(p)) for name in MOMENTS}
                      for i, p in enumerate(self.order)}
        parts = {f"model/{name}": x for name, x in model.items()}
        parts |= {f"optimizer/{name}/{key}": x for i, name in enumerate(self.names()) if i in states
                  for key, x in states[i].items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")       # of torch's own making, as in parallel/checkpoint.py
            dcp.load(here | parts, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
        spread.set_loads(self.model, here)
        self.load_weights(model)
        self.load_state_dict(small | {"optimizers": [{"state": states}]})

    def begin_states(self) -> None:
        """Moments of zeros before the first update, as AdamW makes them at the first. DeepSpeed learns then where the
        moments of a parameter lie; left to itself it looks when only those of the first group are there."""
        under_zero = self.engine.optimizer if self.stage else None
        flat = under_zero.fp32_partitioned_groups_flat if self.stage == 3 else [
            p for group in self.adamw.param_groups for p in group["params"]]      # this rank's slices, end to end
        for p in flat:
            self.adamw.state[p] = {"step": torch.zeros((), device=p.device),
                                   **{name: torch.zeros_like(p) for name in MOMENTS}}
        if self.stage in (1, 2):
            under_zero._lazy_init_hp_params_optimizer_state()

    def moment(self, p: Tensor, name: str) -> Tensor:
        if self.stage:
            return self.library.utils.safe_get_full_optimizer_state(p, name)
        return self.adamw.state[p][name]

    def names(self) -> list[str]:
        """Of the parameters, in AdamW's order."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return [names[id(p)] for p in self.order]


def whole_shape(x: Tensor) -> torch.Size:
    """Of a tensor that stage 3 may have taken apart."""
    return getattr(x, "ds_shape", x.shape)


class Autocast(Scored):
    """The unit that DeepSpeed wraps, with autocast inside: around it, DeepSpeed would switch it off."""

    def __init__(self, model: nn.Module, objective: Objective,
                 autocast: Callable[[], contextlib.AbstractContextManager]) -> None:
        super().__init__(model, objective)
        self.autocast = autocast

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with self.autocast():
            return super().forward(batch)


def started(device: torch.device) -> ModuleType:
    """DeepSpeed, told where it runs; a process that was started alone becomes a group of one. UserError where DeepSpeed
    is missing."""
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))                   # it insists
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")                            # or it takes a GPU that is there
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))      # or it runs numactl, often
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError:
        raise UserError(f"parallel.backend=deepspeed needs DeepSpeed: {install('[deepspeed]')}") from None
    if not torch_dist.is_initialized():
        torch_dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1,
                                      store=torch_dist.HashStore())
    if device.type == "cpu":                      # or it compiles, for a minute, what only serving reads
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    logging.getLogger("DeepSpeed").addFilter(news)
    deepspeed.init_distributed(verbose=False)     # takes over the group that is there
    return deepspeed


def news(record: logging.LogRecord) -> bool:
    """False for a warning of what is as it should be: an `Output` is no tensor, and DeepSpeed finds the head in it."""
    return "unknown inputs or outputs type" not in record.getMessage()
