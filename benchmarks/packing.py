"""(b) Useful tokens per second of fine-tuning: conversations packed best-fit, against one per row padded to 512.

A useful token is one that is not padding. Both run the same model and the same step; only the packing differs.
"""
from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks.common import ROUNDS, in_turn, ratio, report, seconds, spread
from benchmarks.corpora import prepared
from mindseed.core import Batch
from mindseed.data.loader import PackedRows, RowSource
from mindseed.models.lm import build
from mindseed.models.presets import PRESETS
from mindseed.objectives.sft import SFT
from mindseed.optim.groups import OptimConfig, build_optimizers, parameter_groups
from mindseed.recipes.machine import choose_precision
from mindseed.train.native import NativeBackend

NAME = "packing"
ROWS, LENGTH = 8, 512


def useful(batch: Batch) -> int:
    """Slots that hold a token: a padded slot is a token 0 that follows a token 0 or begins a row, at position 0."""
    pad = (batch.positions == 0) & (batch.ids == 0) & (batch.weights == 0)
    return int((~pad).sum())


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data, tokenizer, source = prepared("chat", Path(folder))
        config = PRESETS["mini"].lm_config(vocab_size=tokenizer.vocab_size, seq_len=LENGTH)
        precision = choose_precision("auto", torch.device("cpu"))
        model, optim = build(config).train(), OptimConfig(lr=1e-4)
        backend = NativeBackend(model, SFT(), build_optimizers(parameter_groups(model, optim), optim),
                                precision=precision)
        streams = {how: RowSource(PackedRows(data.split("train"), seq_len=LENGTH, strategy=how), batch_size=ROWS)
                   for how in ("best-fit", "pad")}
        fill = {how: 100 * stream.rows.stats.fill for how, stream in streams.items()}

        def step(how: str) -> float:
            batch = next(streams[how])

            def work() -> None:
                backend.forward_backward(batch, scale=1 / batch.weights.sum(), last=True)
                backend.step(1e-4)

            return useful(batch) / seconds(work)

        for how in streams:
            step(how)
        speed = in_turn({how: lambda how=how: step(how) for how in streams}, 2 * ROUNDS)
    rows = [[how, f"{fill[how]:.1f}%", spread(speed[how])] for how in streams]
    rows.append(["ratio", "", f"{ratio(speed['best-fit'], speed['pad']):.2f}x"])
    report(NAME, "Fine-tuning: packed conversations against padding to 512",
           ["packing", "filled", "useful tok/s"], rows, command="python -m benchmarks.packing",
           notes=f"Target: 1.5x. The 26M preset, {ROWS} x {LENGTH}, {precision}, conversations of {source}, medians of "
                 f"{2 * ROUNDS} steps in turn.")


if __name__ == "__main__":
    main()
