"""Architectures side by side: the same real text, tokens, optimiser and active parameters, several seeds.

Every variant is the toy preset with one thing changed, and a dense feed-forward as wide as it takes to give it the
active parameters of the dense model (mixtures: two experts of half that width). A run of each seed is one line of a
file, so that what was begun is finished by the same command; the losses of the table in docs/RESULTS.md are made from
the lines, its speeds from steps of all variants in turn, once all runs are there.
"""
from __future__ import annotations

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.corpora import prepared
from mindseed.base.files import make_folder
from mindseed.base.log import si
from mindseed.data.loader import Evaluation, PackedRows, RowSource
from mindseed.models.lm import build
from mindseed.models.presets import TOY, LatentShape, Shape
from mindseed.nn.moe import MoEConfig
from mindseed.objectives.sft import SFT
from mindseed.optim.groups import OptimConfig, build_optimizers, parameter_groups
from mindseed.optim.schedule import ScheduleConfig, learning_rate
from mindseed.plan.memory import cache_bytes_per_token
from mindseed.plan.params import count_params
from mindseed.recipes.machine import choose_precision
from mindseed.train.balance import Balance
from mindseed.train.native import NativeBackend
from mindseed.train.step import Run, train_step
from mindseed.train.validate import evaluate

NAME = "architectures"
FOLDER = Path("runs/architectures")
VOCAB, LENGTH, ROWS, STEPS, SEEDS, RATE = 6400, 512, 8, 400, 3, 0.01
SOFTMAX = MoEConfig(experts=8, top_k=2, expert_dim=TOY.ffn_dim // 2, balance_weight=0.01)
SIGMOID = replace(SOFTMAX, score="sigmoid", balance_weight=0.0, bias=True)


def matched(shape: Shape) -> Shape:
    """`shape` with the feed-forward that brings it closest to the dense model's active parameters."""
    def active(ffn_dim: int) -> int:
        return count_params(replace(shape, ffn_dim=ffn_dim).lm_config(vocab_size=VOCAB, seq_len=LENGTH)).active

    want = count_params(TOY.lm_config(vocab_size=VOCAB, seq_len=LENGTH)).active
    return replace(shape, ffn_dim=min(range(64, 1024, 8), key=lambda width: abs(active(width) - want)))


VARIANTS = {
    "dense": TOY,
    "mixture, softmax and auxiliary loss": replace(TOY, moe=SOFTMAX),
    "mixture, sigmoid and moving biases": replace(TOY, moe=SIGMOID),
    "MLA": matched(replace(TOY, kv_heads=TOY.heads, qk_norm=False, latent=LatentShape(kv_rank=64, rope_dim=16))),
    "sliding window of 128, SSSL": replace(TOY, pattern="SSSL", window=128),
    "hybrid linear, DDDL": matched(replace(TOY, pattern="DDDL")),
    "dense, one further token predicted": replace(TOY, mtp=1),
    "mixture (sigmoid), one further token": replace(TOY, moe=SIGMOID, mtp=1),
}


def begin(shape: Shape, seed: int, data, precision: str) -> Run:
    """A run before its first step."""
    config, optim = shape.lm_config(vocab_size=VOCAB, seq_len=LENGTH), OptimConfig(kind="muon", lr=RATE)
    model = build(config, seed=seed).train()
    backend = NativeBackend(model, SFT(), build_optimizers(parameter_groups(model, optim), optim), precision=precision)
    source = RowSource(PackedRows(data.split("train"), seq_len=LENGTH, seed=seed), batch_size=ROWS)
    return Run(source, SFT(), backend, schedule=learning_rate(ScheduleConfig(), peak=RATE, steps=STEPS),
               balance=Balance(model))


def train(run: Run, data) -> float:
    """The whole run; bits per byte on the held-out documents."""
    while run.step < STEPS:
        train_step(run)
    run.backend.model.eval()
    heldout = Evaluation(data.split("heldout"), seq_len=LENGTH, batch_size=ROWS, limit=300)
    return evaluate(run.backend, heldout, raw_bytes=heldout.bytes)["bits_per_byte"]


def speeds(data, precision: str) -> dict[str, list[float]]:
    """tokens/s of some steps of every variant, in turn."""
    runs = {name: begin(shape, 0, data, precision) for name, shape in VARIANTS.items()}
    for run in (*runs.values(), *runs.values()):
        train_step(run)
    return common.in_turn({name: lambda run=run: ROWS * LENGTH / common.seconds(lambda: train_step(run))
                           for name, run in runs.items()}, 2 * common.ROUNDS)


def table(lines: list[dict], speed: dict[str, list[float]], precision: str, source: str) -> None:
    """Of the variants whose seeds have all run; the difference from dense is seed by seed."""
    def of(name: str, key: str) -> list[float]:
        return [line[key] for line in sorted(lines, key=lambda line: line["seed"]) if line["variant"] == name]

    rows, base = [], of("dense", "bits_per_byte")
    for name, shape in VARIANTS.items():
        bits = of(name, "bits_per_byte")
        if len(bits) < SEEDS or len(base) < SEEDS:
            continue
        config = shape.lm_config(vocab_size=VOCAB, seq_len=LENGTH)
        count, gain = count_params(config), [b - a for a, b in zip(base, bits)]
        rows.append([name, f"{si(count.total)}-A{si(count.active)}", common.spread(bits, 4),
                     f"{statistics.median(gain):+.3f} ({min(gain):+.3f} to {max(gain):+.3f})",
                     common.spread(speed[name]), f"{common.ratio(speed[name], speed['dense']):.2f}x",
                     str(cache_bytes_per_token(config))])
    common.report(NAME, "Architectures at equal active parameters",
                  ["variant", "parameters", "bits per byte", "less dense", "tokens/s", "of dense",
                   "cache, bytes a token"], rows,
                  command="python -m benchmarks.architectures", page=common.PAGE.with_name("RESULTS.md"),
                  notes=f"Median (min to max) of {SEEDS} seeds. {STEPS} steps of {ROWS} x {LENGTH} tokens of {source}, "
                        f"Muon at {RATE}, {precision}; 300 held-out documents. A module that predicts a further token "
                        "is not counted: it is not used afterwards. tokens/s of training, in turn. Caches in bf16, of "
                        "layers whose cache grows.")


def main() -> None:
    make_folder(FOLDER)
    data, _, source = prepared("text", FOLDER)
    precision = choose_precision("auto", torch.device("cpu"))
    log = FOLDER / "runs.jsonl"
    done = [json.loads(line) for line in open(log, encoding="utf-8")] if log.exists() else []
    for seed in range(SEEDS):
        for name in sys.argv[1:] or VARIANTS:
            if any((line["variant"], line["seed"]) == (name, seed) for line in done):
                continue
            bits = train(begin(VARIANTS[name], seed, data, precision), data)
            line = {"variant": name, "seed": seed, "bits_per_byte": bits}
            print(json.dumps(line), flush=True)
            done.append(line)
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    table(done, speeds(data, precision), precision, source)


if __name__ == "__main__":
    main()
