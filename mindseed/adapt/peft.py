"""Adapters to and from disk: PEFT's folders, so that both sides read each other's, and MiniMind's bare files."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mindseed.adapt.lora import (Coverage, adaptable, attach, coverage, learn, lm_of, parts_of, require_no_dropout,
                                 set_active, shape_of)
from mindseed.adapt.lowrank import LowRank
from mindseed.base.errors import UserError
from mindseed.interop.peft import Piece, read_adapter, write_adapter


def save_adapter(model: nn.Module, folder: Path | str, name: str = "default", *, base: str | None = None,
                 info: dict[str, Any] | None = None) -> Path:
    """Write one adapter alone. `base` is where the model beneath came from, as others may find it: a model directory,
    or a name on the hub. `info` is kept in mindseed.json."""
    lm = lm_of(model)
    if lm.value_head is not None:
        raise UserError("the model has a value head, for which an adapter's folder has no place; merge the adapter and "
                        "save the model")
    pieces = {place: Piece(part.A, part.B, part.magnitude, part.alpha, part.rs, part.dropout)
              for place, part in parts_of(model, name).items()}
    return write_adapter(Path(folder), lm, pieces, shapes_of(model), base=base, info=info)


def load_adapter(model: nn.Module, where: Path | str, name: str = "default", *, learning: bool = False) -> Coverage:
    """Add an adapter from disk, which becomes active alone; it learns on only if asked to. UserError if it belongs to
    another base, does not fit, or computes what is not computed here."""
    there, parts = adaptable(model), {}
    for place, piece in read_adapter(Path(where), lm_of(model), shapes_of(model)).items():
        matrix = there[place].matrix()
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        A, B, magnitude = (None if x is None else x.to(matrix.device, dtype) for x in piece[:3])
        parts[place] = LowRank(A, B, magnitude, alpha=piece.alpha, rs=piece.rs, dropout=piece.dropout)
    if learning:
        require_no_dropout(there, parts, max(part.dropout for part in parts.values()))
    attach(model, name, parts)
    set_active(model, {name: 1.0})
    learn(model, *([name] if learning else []))
    return coverage(model, name)


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    return {place: torch.Size(shape_of(linear)) for place, linear in adaptable(model).items()}
