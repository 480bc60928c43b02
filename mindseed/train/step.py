"""One optimiser step, for every algorithm and every backend."""
from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Callable

import torch
from torch import Tensor

from mindseed.base import dist
from mindseed.base.errors import UserError
from mindseed.core import Backend, Batch, Objective, Source
from mindseed.train.balance import Balance
from mindseed.train.native import NonFinite


@dataclass
class Run:
    """Everything a step needs, and how far it has come. `step` counts optimiser steps."""

    source: Source
    objective: Objective
    backend: Backend
    schedule: Callable[[int], float]              # optimiser step -> learning rate
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    accumulate: int = 1                           # micro-batches per step, on each rank
    step: int = 0
    tokens: int = 0                               # supervised tokens so far, over all ranks
    tokens_per_step: int = 0                      # slots of the last step over all ranks, padding included
    balance: Balance | None = None                # of a mixture of experts
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext     # what asks the model for rows
    after_step: list[Callable[[], dict[str, float] | None]] = field(default_factory=list)   # may return metrics

    def __post_init__(self) -> None:
        if self.accumulate > 1 and not self.objective.splittable:
            raise UserError(f"{type(self.objective).__name__} compares all samples of a batch with each other, so a "
                            "batch cannot be cut into micro-batches: loop.micro_batch must be loop.batch divided by "
                            f"the number of ranks, {self.accumulate} times what it is")


def train_step(run: Run) -> dict[str, float]:
    """Read `accumulate` micro-batches, update once, return metrics averaged over the counted units of all ranks.

    Raises NonFinite, before anything is updated, when the loss or the gradient is not a finite number.
    """
    batches = next_batches(run)

    # Divide by what was counted everywhere, so that accumulation and data parallelism change nothing.
    counts = [torch.stack([run.objective.count(b), (b.weights != 0).sum()]) for b in batches]
    count, tokens = dist.sum_over_ranks(torch.stack(counts).sum(0))
    scale = dist.parts() / count.clamp_min(1e-30)             # DDP and FSDP average gradients over ranks

    sums: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        part = run.backend.forward_backward(batch, scale=scale, last=i == len(batches) - 1)
        sums = {key: sums.get(key, 0) + value for key, value in part.items()}

    units = tokens if getattr(run.objective, "of_tokens", False) else count       # of metrics beside the loss
    told = [dist.sum_over_ranks(value) / (count if key == "loss" else units) for key, value in sums.items()]
    supervised, *told = torch.stack([tokens.double(), *(value.double() for value in told)]).tolist()
    means = dict(zip(sums, told))                 # all that the host reads comes over at once: it waits for a GPU's end
    if not supervised:
        raise UserError(f"step {run.step}: no token of the whole batch is supervised; check the data with show-batch")
    check_finite(run, batches, means["loss"])
    lr = run.schedule(run.step)
    try:
        grad_norm = run.backend.step(lr)
    except NonFinite as error:
        raise NonFinite(f"{error}; {name_samples(run.source, batches)}") from None
    for call in ([run.balance] if run.balance else []) + run.after_step:
        means |= call() or {}
    run.step += 1
    run.tokens += int(supervised)
    run.tokens_per_step = sum(b.ids.numel() for b in batches) * dist.parts()
    return means | {"lr": lr, "grad_norm": grad_norm, "supervised": int(supervised)}


@torch.no_grad()
def next_batches(run: Run) -> list[Batch]:
    """The micro-batches of a step; objectives see whole rows, and then each rank takes its part of them."""
    with run.around():
        return [run.backend.cut(run.objective.prepare(next(run.source).to(run.device))) for _ in range(run.accumulate)]


def check_finite(run: Run, batches: list[Batch], loss: float) -> None:
    """fp16 may overflow now and then, and its scaler skips such a step; elsewhere it is the end of the run."""
    if loss - loss == 0 or getattr(run.backend, "precision", "") == "fp16":
        return
    guilty = []
    with torch.no_grad():
        for batch in batches:
            for row in range(len(batch.ids)):
                if not torch.isfinite(run.backend.score(one_row(batch, row))):
                    guilty.append(one_row(batch, row))
    found = any(dist.gather(bool(guilty)))        # by whichever rank has read it
    raise NonFinite(f"the loss is {loss}; {name_samples(run.source, guilty if found else batches)}")


def one_row(batch: Batch, row: int) -> Batch:
    at = slice(row, row + 1)
    return Batch(ids=batch.ids[at], targets=batch.targets[at], weights=batch.weights[at],
                 positions=batch.positions[at], extra={k: v[at] for k, v in batch.extra.items()})


def name_samples(source: Source, batches: list[Batch]) -> str:
    """Where the rows of all ranks came from, as far as the source can tell; a collective call."""
    rows = [int(r) for b in batches if "row" in b.extra for r in b.extra["row"]]
    describe = getattr(source, "describe", None)
    told = dist.gather(describe(rows) if rows and describe else [])
    names = [*dict.fromkeys(name for names in told for name in names)]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"samples: {shown}" if names else "the source does not name its samples"
