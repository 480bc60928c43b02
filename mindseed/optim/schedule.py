"""Learning rate by optimiser step: a linear warm-up, then one of four shapes down to `final` times the peak."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, Literal

from mindseed.base.config import option


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """`wsd` is warm-up, stable, decay (2404.06395): the last `decay` share of the steps falls in a straight line."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = option("wsd", help="shape after the warm-up",
                                                                    elsewhere=("lr_scheduler_type",))
    warmup_steps: int = option(20, help="optimiser steps of linear warm-up (at most half of all steps)")
    decay: float = option(0.4, help="wsd: share of the steps that decay at the end")
    final: float = option(0.0, help="learning rate at the end, as a share of the peak")

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must not be negative")
        if not 0 <= self.decay <= 1 or not 0 <= self.final <= 1:
            raise ValueError(f"decay={self.decay} and final={self.final} must lie in [0, 1]")


def learning_rate(config: ScheduleConfig, *, peak: float, steps: int) -> Callable[[int], float]:
    """step (0-based) -> learning rate. Step 0 is not wasted on a rate of 0; the last step is close to `final`."""
    warmup = min(config.warmup_steps, steps // 2)

    def at(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        done = min((step - warmup) / max(steps - warmup, 1), 1.0)             # in [0, 1)
        if config.kind == "constant":
            share = 1.0
        elif config.kind == "linear":
            share = 1 - done
        elif config.kind == "cosine":
            share = 0.5 * (1 + math.cos(math.pi * done))
        else:
            share = min(1.0, (1 - done) / config.decay) if config.decay else 1.0
        return peak * (config.final + (1 - config.final) * share)

    return at
