"""Adapters on a whole model: added, chosen between, merged, taken off. What they compute is in lowrank.py.

An adapter has a few thousandths of a model's parameters, so it needs as little of the optimiser's memory and of a disk,
and many of them can serve over one base. Nothing is covered by guesswork: targets are named, a name that fits nothing
is an error, and what is covered comes back as a table.

    add_adapter(model, LoRAConfig(rank=16))        the base freezes, the adapter learns
    with without_adapters(model): ...              the base's answers: the reference of DPO
    set_active(model, {"a": 1.0, "b": 0.5})        several at once
    merged = merge(model); unmerge(merged)         into the weights, and out again to the last bit
"""
from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from mindseed.adapt.lowrank import Adapter, ExpertAdapter, LowRank, changed, fresh
from mindseed.base.errors import UserError
from mindseed.core import Output
from mindseed.models.lm import LM
from mindseed.nn.adapters import Switch, switch_of
from mindseed.nn.linear import Linear
from mindseed.nn.moe import ExpertLinear, MoE


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    rank: int = 8
    alpha: float = 16.0              # size of the update: it is multiplied by alpha / rank
    dropout: float = 0.0             # share of a matrix's inputs that its update does not see, in training
    targets: tuple[str, ...] = ()    # last names (q, gate), or patterns of whole ones (blocks.*.mixer.q) [all blocks]
    rs: bool = False                 # multiply by alpha / sqrt(rank) instead
    dora: bool = False               # learn the lengths of rows apart from their directions

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")
        if not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha} must be positive")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        if any(not target for target in self.targets):
            raise ValueError("targets has an empty name")


# ------------------------------------------------------------------------------------------------- what can be adapted

def lm_of(model: nn.Module) -> LM:
    """The language model itself, or the one inside a wrapper."""
    return next(module for module in model.modules() if isinstance(module, LM))


def adaptable(model: nn.Module) -> dict[str, Linear | ExpertLinear]:
    """Every matrix that can have an adapter, by name: those of the blocks, then those of modules for further tokens.
    Routers are none: who is sent where is balanced by other means."""
    lm, found = lm_of(model), {}
    routers = {id(module.router) for module in lm.modules() if isinstance(module, MoE)}
    for stack in ("blocks", "mtp"):
        for name, module in getattr(lm, stack).named_modules(prefix=stack):
            if isinstance(module, (Linear, ExpertLinear)) and id(module) not in routers:
                found[name] = module
    return found


def chosen(names: list[str], targets: tuple[str, ...]) -> list[str]:
    """The names that the targets mean. UserError for a target that means none."""
    if not targets:
        return [name for name in names if name.startswith("blocks.")]
    hits: set[str] = set()
    for target in targets:
        found = [name for name in names if fnmatchcase(name, target) or name.rpartition(".")[2] == target]
        if not found:
            last = dict.fromkeys(name.rpartition(".")[2] for name in names)
            raise UserError(f"the target {target!r} matches no matrix; there are {', '.join(last)}, in full "
                            f"{', '.join(dict.fromkeys(map(general, names)))}")
        hits.update(found)
    return [name for name in names if name in hits]


def general(name: str) -> str:
    """blocks.3.mixer.q -> blocks.*.mixer.q"""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


# -------------------------------------------------------------------------------------------------------------- adding

@dataclass(frozen=True)
class Coverage:
    """What an adapter covers. `rows` are for `base.log.table`, under `HEADER`."""

    rows: list[list[str]]
    matrices: int
    all_matrices: int
    parameters: int                               # that learn
    base: int                                     # parameters of the model beneath

    HEADER = ["matrices", "adapted", "shape", "rank", "parameters", "of the adapter"]

    def __str__(self) -> str:
        return (f"{self.matrices} of {self.all_matrices} matrices, {self.parameters:,} parameters beside "
                f"{self.base:,} ({100 * self.parameters / self.base:.2f}%)")


def add_adapter(model: nn.Module, config: LoRAConfig = LoRAConfig(), name: str = "default", *,
                seed: int = 0) -> Coverage:
    """Freeze the base, and add an adapter that changes nothing yet, is active alone and learns alone. The same seed
    gives the same adapter. UserError for a target that does not exist, or a name that does."""
    there = adaptable(model)
    covered = chosen(list(there), config.targets)
    require_no_dropout(there, covered, config.dropout)
    generator = torch.Generator().manual_seed(seed)
    attach(model, name, {n: fresh(there[n].matrix(), rank=config.rank, alpha=config.alpha, rs=config.rs,
                                  dora=config.dora, dropout=config.dropout, generator=generator) for n in covered})
    set_active(model, {name: 1.0})
    learn(model, name)
    return coverage(model, name)


def require_no_dropout(there: Mapping[str, nn.Module], covered: Iterable[str], dropout: float) -> None:
    """UserError for an adapter of experts that would learn with dropout."""
    experts = [name for name in covered if isinstance(there[name], ExpertLinear)]
    if dropout and experts:
        raise UserError(f"dropout={dropout} has no place in routed experts ({general(experts[0])}), whose updates are "
                        "added to the matrices; use dropout 0, or name targets without them")


def attach(model: nn.Module, name: str, parts: Mapping[str, LowRank]) -> None:
    """Hang the parts of an adapter on the matrices of these names and freeze the base; nothing becomes active. A value
    head, or what distillation has added, is no part of the base and goes on learning."""
    if not re.fullmatch(r"[^.\s]+", name) or hasattr(nn.ModuleDict, name):
        raise UserError(f"{name!r} cannot be an adapter's name: it must be one word without dots, and none that "
                        "modules have for themselves, such as keys or train")
    switch, there = switch_of(model) or Switch(), adaptable(model)
    if name in switch.names:
        raise UserError(f"there is an adapter {name!r} already; remove it first, or use another name")
    if not switch.names:
        switch.frozen = [p for p in base_parameters(model) if p.requires_grad]
        for p in switch.frozen:
            p.requires_grad_(False)
    for place, part in parts.items():
        linear = there[place]
        if linear.adapter is None:
            linear.adapter = (ExpertAdapter if isinstance(linear, ExpertLinear) else Adapter)(switch)
            linear.adapter.train(linear.training)
        linear.adapter.parts[name] = part.train(linear.training)
        if isinstance(linear, ExpertLinear):
            switch.routed.add(name)
    switch.names.append(name)
    switch.version += 1


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter off. With the last one the base is as before, and learns again what it learnt before."""
    switch = require(model, name)
    for linear in adaptable(model).values():
        if linear.adapter is not None and name in linear.adapter.parts:
            del linear.adapter.parts[name]
            if not linear.adapter.parts:
                detach(linear)
    switch.names.remove(name)
    switch.active.pop(name, None)
    switch.routed.discard(name)
    switch.version += 1
    if not switch.names:
        for p in switch.frozen:
            p.requires_grad_(True)


def detach(linear: Linear | ExpertLinear) -> Adapter:
    """The matrix without its adapter, as if it had never had one."""
    adapter = linear.adapter
    del linear.adapter
    linear.adapter = None
    return adapter


def require(model: nn.Module, *names: str) -> Switch:
    switch = switch_of(model)
    there = [] if switch is None else switch.names
    for name in names:
        if name not in there:
            raise UserError(f"the model has no adapter {name!r}; {'it has ' + ', '.join(there) if there else 'none'}")
    return switch or Switch()


def adapters_of(model: nn.Module) -> list[str]:
    switch = switch_of(model)
    return [] if switch is None else list(switch.names)


def parts_of(model: nn.Module, name: str) -> dict[str, LowRank]:
    """What an adapter holds, by the name of the matrix."""
    require(model, name)
    return {place: linear.adapter.parts[name] for place, linear in adaptable(model).items()
            if linear.adapter is not None and name in linear.adapter.parts}


def coverage(model: nn.Module, name: str) -> Coverage:
    """A row for every kind of matrix that is or could be adapted, and for what cannot be."""
    parts, there = parts_of(model, name), adaptable(model)
    kinds: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for place, linear in there.items():
        kinds.setdefault((general(place), shape_of(linear)), []).append(place)
    rows, beneath = [], 0
    for (kind, shape), places in kinds.items():
        *stack, out_dim, in_dim = shape
        found, size = [parts[place] for place in places if place in parts], len(places) * math.prod(shape)
        ranks = ", ".join(sorted({str(part.rank) for part in found})) or "-"
        rows.append([kind, f"{len(found)} of {len(places)}",
                     "".join(f"{n} x " for n in stack) + f"{in_dim} -> {out_dim}", ranks, f"{size:,}",
                     f"{sum(map(count, found)):,}"])
        beneath += size
    matrices = {id(p) for linear in there.values() for p in linear.parameters(recurse=False)}
    others = sum(p.numel() for p in base_parameters(model) if id(p) not in matrices)
    rows.append(["embeddings, norms, all others", "never", "", "-", f"{others:,}", "0"])
    return Coverage(rows=rows, matrices=len(parts), all_matrices=len(there),
                    parameters=sum(map(count, parts.values())), base=beneath + others)


def shape_of(linear: Linear | ExpertLinear) -> tuple[int, ...]:
    """(out, in), or (E, out, in)."""
    return (linear.out_features, linear.in_features) if isinstance(linear, Linear) else tuple(linear.weight.shape)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def base_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters of the language model that belong neither to an adapter nor to a head of another purpose; tied
    ones once."""
    lm = lm_of(model)
    others = [lm.value_head, lm.matching, *(module for module in lm.modules() if isinstance(module, LowRank))]
    apart = {id(p) for module in others if module is not None for p in module.parameters()}
    return [p for p in lm.parameters() if id(p) not in apart]


# ------------------------------------------------------------------------------------------------------------ choosing

def set_active(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Answer with these adapters, each added so many times; {}: as the base. An engine that has a cache must be told by
    `update_weights`."""
    switch = require(model, *weights)
    switch.active = {name: float(weight) for name, weight in weights.items()}


def learn(model: nn.Module, *names: str) -> None:
    """These adapters learn, and no others."""
    for name in require(model, *names).names:
        for part in parts_of(model, name).values():
            part.requires_grad_(name in names)


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Within the block the model answers as its base does."""
    switch = switch_of(model)
    with switch.off() if switch else contextlib.nullcontext():
        yield


def base_of(model: nn.Module) -> Callable[[Tensor, Tensor], Output]:
    """The base as a function of ids and positions, without gradients and without dropout: a reference that costs no
    second model."""
    @torch.no_grad()
    def base(ids: Tensor, positions: Tensor) -> Output:
        training = model.training
        with without_adapters(model):
            model.eval()
            try:
                return model(ids, positions)
            finally:
                model.train(training)

    return base


# ------------------------------------------------------------------------------------------------------------- merging

@dataclass
class Merged:
    """A model whose active adapters are in its weights. Keeps a copy of the weights that have changed: taking the
    update off again would leave rounding errors behind."""

    model: nn.Module
    places: list[tuple[Linear | ExpertLinear, Adapter, Tensor | None]]


@torch.no_grad()
def merge(model: nn.Module, *, keep: bool = True) -> Merged | None:
    """Add the active adapters to the weights, so that the model is a plain one. With `keep` all adapters can be had
    back by `unmerge`; without, they are gone, and the base learns again what it learnt before."""
    there, switch = adaptable(model), switch_of(model)
    if switch is None or not switch.active:
        raise UserError("no adapter is active, so there is nothing to merge")
    adapted = {name: linear for name, linear in there.items() if linear.adapter is not None}
    for name, linear in adapted.items():
        if not linear.weight.is_floating_point():
            raise UserError(f"{name} is quantised and cannot take up an update exactly; merge into the model in full "
                            "precision")
    places = []
    for linear in adapted.values():
        adapter = detach(linear)
        parts = adapter.active()
        places.append((linear, adapter, linear.weight.detach().clone() if parts and keep else None))
        if parts:
            linear.weight.copy_(changed(linear.weight, parts))
    if keep:
        return Merged(model, places)
    for p in switch.frozen:
        p.requires_grad_(True)
    return None


@torch.no_grad()
def unmerge(merged: Merged) -> None:
    """The weights as they were before, to the last bit, and all adapters beside them."""
    if switch_of(merged.model) is not None:
        raise UserError("the model has got other adapters since it was merged; remove them first")
    for linear, adapter, weight in merged.places:
        if weight is not None:
            linear.weight.copy_(weight)
        linear.adapter = adapter.train(linear.training)
    merged.places = []
