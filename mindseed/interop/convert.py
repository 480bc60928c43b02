"""From one model directory to another, and the proof that the copy computes the same.

The proof runs both directories as they lie on disk: the same ids must give the same logits. A change of dtype rounds
the weights, so the copy is held against the source rounded alike, and the rounding's own effect is reported.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mindseed.base.errors import UserError
from mindseed.interop.directory import DTYPES, SAMPLING, Loaded, load_directory, save_directory
from mindseed.interop.qwen3 import RULES
from mindseed.interop.rules import to_theirs

TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Mapped:
    """One tensor: its names here and there, its shape and dtypes."""

    ours: str
    theirs: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    mapped: list[Mapped]
    before: torch.dtype
    after: torch.dtype
    difference: float                 # largest difference of logits, copy against source rounded alike
    rounding: float                   # largest difference of logits, source rounded against source

    @property
    def good(self) -> bool:
        return self.difference <= TOLERANCE           # NaN is not good


def convert(source: Path | str, target: Path | str, *, dtype: str | None = None, overwrite: bool = False) -> Conversion:
    """Write `source` anew as `target` and compare the two. UserError if `target` exists, unless `overwrite`."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not known; choose one of {', '.join(DTYPES)}")
    if Path(target).resolve() == Path(source).resolve():
        raise UserError(f"{target} is the source itself; choose another place")
    if Path(target).exists() and not overwrite:
        raise UserError(f"{target} exists already; choose another place or add --overwrite")
    loaded = load_directory(source)
    after = DTYPES[dtype] if dtype else loaded.dtype
    save_directory(loaded.model, loaded.tokenizer, target, info={"parent": str(source)} | loaded.info, dtype=after,
                   chat_template=loaded.chat_template, sampling=loaded.sampling or SAMPLING)
    mapped = [Mapped(ours=ours, theirs=theirs, shape=tuple(loaded.model.state_dict()[ours].shape))
              for ours, theirs in to_theirs(RULES, loaded.model.state_dict()).items()]
    difference, rounding = compare(loaded, load_directory(target), after)
    return Conversion(mapped=mapped, before=loaded.dtype, after=after, difference=difference, rounding=rounding)


@torch.inference_mode()
def compare(source: Loaded, copy: Loaded, dtype: torch.dtype) -> tuple[float, float]:
    """(copy against source rounded to `dtype`, that against source): largest differences of logits, in float32."""
    T = min(64, source.model.config.seq_len)
    ids = torch.randint(0, source.model.config.vocab_size, (2, T), generator=torch.Generator().manual_seed(0))
    exact = logits(source, ids)
    for p in source.model.parameters():
        p.copy_(p.to(dtype))
    rounded = logits(source, ids)
    return (logits(copy, ids) - rounded).abs().max().item(), (rounded - exact).abs().max().item()


def logits(loaded: Loaded, ids: Tensor) -> Tensor:
    return loaded.model(ids, torch.arange(ids.shape[1]).expand_as(ids)).logits()
