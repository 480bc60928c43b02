"""Which optimiser gets which parameter, and with how much decay: decided here, by what a parameter is, and printed.

Matrices inside the blocks go to Muon (or to AdamW with decay); embeddings and the head to AdamW with decay 0, since a
row that is rarely seen would otherwise melt away; vectors (norms) to AdamW without decay.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from mindseed.base.config import option
from mindseed.optim.muon import Muon


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    kind: Literal["adamw", "muon"] = option("muon", help="optimiser of the matrices inside blocks; the rest is AdamW's")
    lr: float | None = option(None,
                              help="peak learning rate of both optimisers [derived: from the arithmetic of the run]",
                              elsewhere=("learning_rate",))
    weight_decay: float = option(0.1, help="decoupled weight decay of the matrices inside blocks")
    beta1: float = option(0.9, help="AdamW: decay of the first moment")
    beta2: float = option(0.95, help="AdamW: decay of the second moment")
    eps: float = option(1e-8, help="AdamW: added to the root of the second moment")
    momentum: float = option(0.95, help="Muon: Nesterov momentum")
    embedding_lr: float = option(1.0, help="learning rate of embeddings and head, as a multiple of optim.lr")
    max_norm: float = option(1.0, help="clip gradients to this norm; 0: no clipping",
                             elsewhere=("grad_clip", "max_grad_norm"))

    def __post_init__(self) -> None:
        if (self.lr is not None and self.lr <= 0) or self.embedding_lr <= 0 or self.eps <= 0:
            raise ValueError(f"lr={self.lr}, embedding_lr={self.embedding_lr} and eps={self.eps} must be positive")
        if self.weight_decay < 0 or self.max_norm < 0:
            raise ValueError(f"weight_decay={self.weight_decay} and max_norm={self.max_norm} must not be negative")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and 0 <= self.momentum < 1):
            raise ValueError(f"beta1={self.beta1}, beta2={self.beta2}, momentum={self.momentum} must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Group:
    """A row of the table: what is in it, who updates it, and how."""

    name: str
    optimizer: str
    params: list[nn.Parameter]
    names: list[str]
    weight_decay: float
    lr_scale: float

    @property
    def count(self) -> int:
        return sum(p.numel() for p in self.params)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[Group]:
    """Every trainable parameter in exactly one group; tied parameters count once."""
    kinds: dict[int, str] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            inside = hasattr(module, "role") and "." in name                      # a Linear of a block, not the head
            kinds.setdefault(id(p), "matrices" if inside else "embeddings" if p.ndim == 2 else "vectors")
    rules = {"matrices": (config.kind, config.weight_decay, 1.0),
             "embeddings": ("adamw", 0.0, config.embedding_lr),
             "vectors": ("adamw", 0.0, 1.0)}
    groups = []
    for kind, (optimizer, decay, scale) in rules.items():
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and kinds[id(p)] == kind]
        if named:
            groups.append(Group(name=kind, optimizer=optimizer, params=[p for _, p in named],
                                names=[n for n, _ in named], weight_decay=decay, lr_scale=scale))
    return groups


def build_optimizers(groups: list[Group], config: OptimConfig) -> list[torch.optim.Optimizer]:
    """torch's fused AdamW and, when asked for, Muon; each keeps `lr_scale` in its groups for the backend to read."""
    lr = config.lr or 0.0                         # every step sets its own
    optimizers: list[torch.optim.Optimizer] = []

    def options(kind: str) -> list[dict]:
        return [{"params": g.params, "weight_decay": g.weight_decay, "lr_scale": g.lr_scale}
                for g in groups if g.optimizer == kind]

    if adamw := options("adamw"):
        optimizers.append(torch.optim.AdamW(adamw, lr=lr, betas=(config.beta1, config.beta2), eps=config.eps,
                                            fused=True))
    if muon := options("muon"):
        optimizers.append(Muon(muon, lr=lr, momentum=config.momentum))
    return optimizers


def group_table(groups: list[Group]) -> list[tuple[str, ...]]:
    """Rows for printing: group, optimiser, tensors, parameters, decay, learning rate factor."""
    return [(g.name, g.optimizer, str(len(g.params)), f"{g.count:,}", f"{g.weight_decay:g}", f"{g.lr_scale:g}")
            for g in groups]
