"""(e) Time to a fixed validation loss: Muon against AdamW on the same model, data, batch and schedule.

Each optimiser first gets its best learning rate from a small grid. Then both train from five seeds, in turn; the
target is the loss that AdamW has at the end of its run (the worst of its seeds, so that every run reaches it), and
the time to it is the number of steps until a run's validation loss is below, times its own seconds per step.
"""
from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import ROUNDS, ratio, report, spread
from benchmarks.corpora import prepared
from mindseed.data.loader import Evaluation, PackedRows, RowSource
from mindseed.models.lm import build
from mindseed.models.presets import PRESETS
from mindseed.objectives.sft import SFT
from mindseed.optim.groups import OptimConfig, build_optimizers, parameter_groups
from mindseed.optim.schedule import ScheduleConfig, learning_rate
from mindseed.recipes.machine import choose_precision
from mindseed.train.native import NativeBackend
from mindseed.train.step import Run, train_step
from mindseed.train.validate import evaluate

NAME = "optimizers"
LENGTH, ROWS, STEPS, EVERY = 256, 16, 100, 10
GRID = {"adamw": (2e-3, 4e-3, 8e-3), "muon": (4e-3, 8e-3, 1.6e-2)}


@dataclass
class Trace:
    losses: list[float]                           # validation loss after every EVERY steps
    step_s: float                                 # median seconds of a step, update included

    def seconds_to(self, target: float) -> float:
        """Until the validation loss is below `target`, between two validations by a straight line."""
        for i, loss in enumerate(self.losses):
            if loss <= target:
                before = self.losses[i - 1] if i else loss
                share = (before - target) / (before - loss) if before > loss else 1.0
                return (i + share) * EVERY * self.step_s
        return float("inf")


def train(kind: str, lr: float, seed: int, data, vocab_size: int, precision: str) -> Trace:
    config = PRESETS["toy"].lm_config(vocab_size=vocab_size, seq_len=LENGTH)
    model, optim = build(config, seed=seed).train(), OptimConfig(kind=kind, lr=lr)
    backend = NativeBackend(model, SFT(), build_optimizers(parameter_groups(model, optim), optim), precision=precision)
    source = RowSource(PackedRows(data.split("train"), seq_len=LENGTH, seed=seed), batch_size=ROWS)
    run = Run(source, SFT(), backend, schedule=learning_rate(ScheduleConfig(warmup_steps=10), peak=lr, steps=STEPS))
    heldout = Evaluation(data.split("heldout"), seq_len=LENGTH, batch_size=ROWS, limit=24)
    losses, times = [], []
    for step in range(STEPS):
        start = time.perf_counter()
        train_step(run)
        times.append(time.perf_counter() - start)
        if (step + 1) % EVERY == 0:
            losses.append(evaluate(backend, heldout, raw_bytes=heldout.bytes)["nll"])
    return Trace(losses, statistics.median(times))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data, tokenizer, source = prepared("text", Path(folder))
        precision = choose_precision("auto", torch.device("cpu"))

        def go(kind: str, lr: float, seed: int) -> Trace:
            trace = train(kind, lr, seed, data, tokenizer.vocab_size, precision)
            print(f"{kind} lr {lr:g} seed {seed}: {trace.losses[-1]:.4f}, {trace.step_s:.3f} s a step", flush=True)
            return trace

        best = {kind: min(rates, key=lambda lr: go(kind, lr, 100).losses[-1]) for kind, rates in GRID.items()}
        traces: dict[str, list[Trace]] = {kind: [] for kind in GRID}
        for seed in range(ROUNDS):
            for kind in GRID:
                traces[kind].append(go(kind, best[kind], seed))
    target = max(t.losses[-1] for t in traces["adamw"])
    seconds = {kind: [t.seconds_to(target) for t in some] for kind, some in traces.items()}
    rows = [[kind, f"{best[kind]:g}", spread([t.losses[-1] for t in some], 4), f"{spread([t.step_s for t in some])} s",
             f"{spread(seconds[kind])} s"] for kind, some in traces.items()]
    slower = ratio(*([t.step_s for t in traces[kind]] for kind in GRID))
    rows.append(["AdamW / Muon", "", "", f"{slower:.2f}x",
                 f"{ratio(seconds['adamw'], seconds['muon']):.2f}x"])
    report(NAME, "Time to a fixed validation loss: Muon against AdamW",
           ["optimiser", "best rate", "final loss", "step", f"to a loss of {target:.3f}"], rows,
           command="python -m benchmarks.optimizers",
           notes=f"Target: 1.3x. The toy preset, {STEPS} steps of {ROWS} x {LENGTH} tokens of {source}, {precision}, "
                 f"{ROUNDS} seeds in turn, rates from {GRID}. Validation is not part of the time.")


if __name__ == "__main__":
    main()
