"""Checkpoints of weights that are spread over ranks, through torch.distributed.checkpoint.

Every rank writes what it has, as safetensors whose headers say which part of which tensor that is; reading asks for
what the reader's own ranks need, whatever the writer's mesh was: four ranks of ZeRO, two by two of ZeRO and tensor
parallel, or one process alone. What makes that possible is that everything has one name, that of the parameter it
belongs to:

    model/<name>    optimizer/<name>/<state>    ema/<name>    load/<mixture>

In the background: tensors are copied to the CPU's memory, the run goes on, and a thread writes the copies. No pickle is
written or read here.
"""
from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from mindseed.base.files import unwritten
from mindseed.nn.moe import MoE, MoEConfig

UNKNOWN = -1.0                                    # where a mixture has not counted yet


def names_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of an optimiser's parameters, in its own order."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def states_by_name(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> Iterator[tuple[str, dict[str, Any]]]:
    for optimizer in optimizers:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        yield from ((name, optimizer.state[p]) for name, p in zip(names_of(model, optimizer), params, strict=True))


def everything(model: nn.Module, optimizers: list[torch.optim.Optimizer],
               average: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """All tensors of a run by name, sharing memory with it."""
    found = {f"model/{name}": x for name, x in model.state_dict().items()}
    found |= {f"optimizer/{name}/{key}": x for name, state in states_by_name(model, optimizers)
              for key, x in state.items()}
    found |= {f"ema/{name}": x for name, x in (average or {}).items()}
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            last = module.load.last
            found[f"load/{name}"] = torch.full((module.config.experts,), UNKNOWN) if last is None else last
    return found


def made_ready(optimizers: list[torch.optim.Optimizer]) -> None:
    """Give every parameter the states that its optimiser makes with the first step, without a step's effect."""
    for optimizer in optimizers:
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate


def save(folder: Path, tensors: dict[str, Tensor], *, background: bool,
         group: torch_dist.ProcessGroup | None = None) -> Future | None:
    """Write `tensors` of all ranks into `folder`; a collective call. In the background: what to wait for. `group` are
    all ranks once more, with a line of their own for what the background has to say."""
    import torch.distributed.checkpoint as dcp
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")           # of torch's own making: typed storages, names to come
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        if background and torch_dist.is_initialized():
            return dcp.async_save(tensors, storage_writer=writer, process_group=group)
        with told_as_one(folder):
            dcp.save(tensors, storage_writer=writer, no_dist=not torch_dist.is_initialized())
    return None


@contextlib.contextmanager
def told_as_one(folder: Path) -> Iterator[None]:
    """A place that cannot be written fails on several ranks, and torch tells of all at once: made one UserError."""
    from torch.distributed.checkpoint import CheckpointException
    try:
        yield
    except CheckpointException as error:
        for rank, (failure, _) in sorted(error.failures.items()):
            if isinstance(failure, OSError) or "IoError" in str(failure):         # safetensors has errors of its own
                raise unwritten(folder, getattr(failure, "errno", None), f"rank {rank}: "
                                f"{getattr(failure, 'strerror', None) or failure}") from None
        raise


def load(folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer],
         average: dict[str, Tensor] | None) -> None:
    """Read what a run needs from `folder` into it; a collective call where there are several ranks."""
    import torch.distributed.checkpoint as dcp
    made_ready(optimizers)
    tensors = everything(model, optimizers, average)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)),
                 no_dist=not torch_dist.is_initialized())
    set_loads(model, tensors)


def set_loads(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            last = tensors[f"load/{name}"]
            module.load.last = None if bool((last == UNKNOWN).all()) else last.to(module.router.weight.device)


def take_apart(saved: dict[str, Any], model: nn.Module, optimizers: list[torch.optim.Optimizer],
               average: dict[str, Tensor] | None) -> None:
    """Give every rank its part of what one process, or DDP, has saved whole."""
    made_ready(optimizers)
    whole = {f"model/{name}": x for name, x in saved["model"].items()}
    for names, optimizer in zip(saved["backend"]["names"], saved["backend"]["optimizers"], strict=True):
        whole |= {f"optimizer/{names[i]}/{key}": x for i, state in optimizer["state"].items()
                  for key, x in state.items()}
    whole |= {f"ema/{name}": x for name, x in ((saved["ema"] or {}).get("average") or {}).items()}
    mixtures = [name for name, _ in config_mixtures(model)]
    for name, last in zip(mixtures, (saved["balance"] or {}).get("last", [])):
        whole[f"load/{name}"] = torch.full((1,), UNKNOWN) if last is None else last
    tensors = everything(model, optimizers, average)
    for name, target in tensors.items():
        if not name.startswith("load/"):
            place(target, whole[name])
    set_loads(model, whole)


def config_mixtures(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, its config) of every mixture of the whole model, whichever of them are here."""
    config = model.config
    found = [(f"blocks.{i}.ffn", layer.ffn) for i, layer in enumerate(config.layers)]
    found += [(f"mtp.{i}.block.ffn", layer.ffn) for i, layer in enumerate(config.mtp)]
    return [(name, ffn) for name, ffn in found if isinstance(ffn, MoEConfig)]


@torch.no_grad()
def place(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into one that may be spread over ranks."""
    if hasattr(target, "placements"):
        from torch.distributed.tensor import distribute_tensor
        whole = distribute_tensor(whole.to(target.device, target.dtype), target.device_mesh, target.placements,
                                  src_data_rank=None).to_local()
        target = target.to_local()
    target.copy_(whole)
