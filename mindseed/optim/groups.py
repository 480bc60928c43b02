"""Which optimiser gets which parameter, and with how much decay: decided here, by what a parameter is, and printed.

Matrices inside the blocks go to Muon (or to AdamW with decay); embeddings and the head to AdamW with decay 0, since a
row that is rarely seen would otherwise melt away; vectors (norms) to AdamW without decay.

The A and B of adapters are matrices of another sort and go to AdamW without decay: Muon would give all r directions of
an update the same size at once, although B begins at zero and a rank is chosen larger than what will be needed.

Fine-tuning forgets less if lower layers, which hold what is most general, move less (1801.06146): with `layer_decay` a
block learns so many times as fast as the one above it, and the embedding, below all, slowest.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from mindseed.base.config import option
from mindseed.optim.eight_bit import eight_bit_adamw
from mindseed.optim.muon import Muon
from mindseed.optim.paged import Paged


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    kind: Literal["adamw", "muon"] = option("muon", help="optimiser of the matrices inside blocks; the rest is AdamW's")
    states: Literal["fp32", "8bit", "paged"] = option(
        "fp32", help="8bit: AdamW's states of matrices in a quarter of the memory (bitsandbytes); paged: all states in "
                     "the CPU's memory, on the GPU while they are used")
    lr: float | None = option(None,
                              help="peak learning rate of both optimisers [derived: from the arithmetic of the run]",
                              elsewhere=("learning_rate",))
    weight_decay: float = option(0.1, help="decoupled weight decay of the matrices inside blocks")
    beta1: float = option(0.9, help="AdamW: decay of the first moment")
    beta2: float = option(0.95, help="AdamW: decay of the second moment")
    eps: float = option(1e-8, help="AdamW: added to the root of the second moment")
    momentum: float = option(0.95, help="Muon: Nesterov momentum")
    embedding_lr: float = option(1.0, help="learning rate of embeddings and head, as a multiple of optim.lr")
    layer_decay: float = option(1.0, help="learning rate of a block as a multiple of that of the block above it: below "
                                          "1, lower layers forget less of what they know")
    lora_b_lr: float = option(1.0, help="learning rate of an adapter's B, as a multiple of A's (LoRA+ proposes 16)",
                              elsewhere=("loraplus_lr_ratio",))
    max_norm: float = option(1.0, help="clip gradients to this norm; 0: no clipping",
                             elsewhere=("grad_clip", "max_grad_norm"))

    def __post_init__(self) -> None:
        if (self.lr is not None and self.lr <= 0) or self.embedding_lr <= 0 or self.eps <= 0:
            raise ValueError(f"lr={self.lr}, embedding_lr={self.embedding_lr} and eps={self.eps} must be positive")
        if self.states == "8bit" and self.kind != "adamw":
            raise ValueError(f"states=8bit are AdamW's; set kind to adamw (it is {self.kind})")
        if not 0 < self.layer_decay <= 1 or self.lora_b_lr <= 0:
            raise ValueError(f"layer_decay={self.layer_decay} must lie in (0, 1] and lora_b_lr={self.lora_b_lr} be "
                             "positive")
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
        for own, p in module.named_parameters(recurse=False):
            inside = hasattr(module, "role") and "." in name                      # a Linear of a block, not the head
            kind = "matrices" if inside else "embeddings" if p.ndim == 2 else "vectors"
            if getattr(module, "adapts", False):                                  # adapt/lowrank.py
                kind = "adapters, B" if own == "B" else "adapters"
            kinds.setdefault(id(p), kind)
    small = "adamw8bit" if config.states == "8bit" else "adamw"
    rules = {"matrices": (config.kind if small == "adamw" else small, config.weight_decay, 1.0),
             "embeddings": ("adamw", 0.0, config.embedding_lr),
             "vectors": ("adamw", 0.0, 1.0),
             "adapters": (small, 0.0, 1.0),
             "adapters, B": (small, 0.0, config.lora_b_lr)}
    heights, groups = heights_of(model) if config.layer_decay < 1 else {}, []
    for kind, (optimizer, decay, scale) in rules.items():
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and kinds[id(p)] == kind]
        for height in dict.fromkeys(heights.get(id(p), ("", 0)) for _, p in named):
            here = [(n, p) for n, p in named if heights.get(id(p), ("", 0)) == height]
            groups.append(Group(name=kind + height[0], optimizer=optimizer, params=[p for _, p in here],
                                names=[n for n, _ in here], weight_decay=decay,
                                lr_scale=scale * config.layer_decay ** height[1]))
    return groups


def heights_of(model: nn.Module) -> dict[int, tuple[str, int]]:
    """Of every parameter in a stack of blocks, or below it, by its id: a name, and how far it is from the top."""
    found: dict[int, tuple[str, int]] = {}
    for module in model.modules():
        if isinstance(blocks := getattr(module, "blocks", None), nn.ModuleList):
            for i, block in enumerate(blocks):
                found |= {id(p): (f", layer {i}", len(blocks) - 1 - i) for p in block.parameters()}
            found |= {id(p): (", below", len(blocks)) for child in module.children() if isinstance(child, nn.Embedding)
                      for p in child.parameters()}
    return found


def build_optimizers(groups: list[Group], config: OptimConfig) -> list[torch.optim.Optimizer]:
    """torch's fused AdamW and, when asked for, Muon or AdamW in 8 bits; each keeps `lr_scale` in its groups for the
    backend to read. Pages are for GPUs."""
    lr = config.lr or 0.0                         # every step sets its own
    optimizers: list[torch.optim.Optimizer] = []

    def options(kind: str) -> list[dict]:
        return [{"params": params, "weight_decay": g.weight_decay, "lr_scale": g.lr_scale}
                for g in groups if g.optimizer == kind for params in by_mesh(g.params)]

    if adamw := options("adamw"):
        optimizers.append(torch.optim.AdamW(adamw, lr=lr, betas=(config.beta1, config.beta2), eps=config.eps,
                                            fused=True))
    if small := options("adamw8bit"):
        optimizers.append(eight_bit_adamw(small, lr=lr, betas=(config.beta1, config.beta2), eps=config.eps))
    if muon := options("muon"):
        optimizers.append(Muon(muon, lr=lr, momentum=config.momentum))
    if config.states == "paged" and all(p.is_cuda for g in groups for p in g.params):
        return [Paged(optimizer) for optimizer in optimizers]
    return optimizers


def by_mesh(params: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters that lie on the same mesh together: a fused update takes no others in one call."""
    found: dict[object, list[nn.Parameter]] = {}
    for p in params:
        found.setdefault((getattr(p, "device_mesh", None), len(getattr(p, "placements", ()))), []).append(p)
    return list(found.values())


def group_table(groups: list[Group]) -> list[tuple[str, ...]]:
    """Rows for printing: group, optimiser, tensors, parameters, decay, learning rate factor."""
    return [(g.name, g.optimizer, str(len(g.params)), f"{g.count:,}", f"{g.weight_decay:g}", f"{g.lr_scale:g}")
            for g in groups]
