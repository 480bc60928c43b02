"""Extend a trained model's context in phases, and measure how far it sees before and after.

  mindseed extend runs/base/model --data corpus.jsonl --lengths 2048 8192 --out runs/long

Each phase stretches the rotary positions by YaRN (2309.00071) and trains on at that length, on your texts, one after
the other in every row, mixed with texts in which a sentence must be found again (tasks/context.py): a model that has
never had to reach back does not learn to from more room alone. Before the first phase and after the last, loss by
position and needle recall are measured at 1, 2, 4 ... times the first length, on texts held out. The model directory
records the length it was trained on; the figures are in context.json and context.html of the run's folder.
"""
from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mindseed.base.config import option
from mindseed.base.errors import UserError
from mindseed.base.files import make_folder, read_json, write_json, write_text
from mindseed.base.log import notes, say, table
from mindseed.core import Tokenizer
from mindseed.data.shards import Documents, Prepared
from mindseed.interop.directory import load_directory
from mindseed.models.extend import extended
from mindseed.models.lm import LM
from mindseed.optim.groups import OptimConfig
from mindseed.optim.schedule import ScheduleConfig
from mindseed.recipes import prepare, train
from mindseed.recipes.charts import Curve, line_chart
from mindseed.recipes.machine import choose_device
from mindseed.recipes.model_options import ModelOptions
from mindseed.recipes.options import DataOptions, LoopOptions, TrainOptions
from mindseed.recipes.report import template
from mindseed.tasks.context import hide, loss_by_position, recall, streams

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str = option("", help="model directory to start from", positional=True)
    data: tuple[str, ...] = option((), help="texts to train on and to measure with: files, folders or globs")
    lengths: tuple[int, ...] = option((2048, 8192), help="context of each phase, in tokens, rising")
    steps: int = option(200, help="optimiser steps of each phase")
    batch_tokens: int = option(16384, help="tokens of an optimiser step (at least one row)")
    lr: float | None = option(None, help="peak learning rate [derived: a fifth of what training from nothing takes]")
    needle_share: float = option(0.2, help="share of the rows in which a sentence must be found again")
    needles: int = option(50, help="needles per length in the test")
    heldout: float = option(0.05, help="share of the texts to measure with, chosen by their hash")
    out: str = option("runs/long", help="folder of the phases, the figures and the model; goes on where it stopped")
    seed: int = option(0, help="seed of the order of the data and of the needles")
    device: str = option("auto", help="cpu, cuda, cuda:1, mps; auto: the GPU if there is one")

    def __post_init__(self) -> None:
        if not self.lengths or sorted(set(self.lengths)) != list(self.lengths):
            raise ValueError(f"lengths={' '.join(map(str, self.lengths))} must rise from phase to phase")
        if not 0 < self.needle_share < 1 or not 0 < self.heldout < 1:
            raise ValueError(f"needle_share={self.needle_share} and heldout={self.heldout} must lie in (0, 1)")
        if min(self.steps, self.batch_tokens, self.needles) < 1:
            raise ValueError(f"steps={self.steps}, batch_tokens={self.batch_tokens} and needles={self.needles} must be "
                             "positive")


def main(options: Options) -> None:
    if not options.model or not options.data:
        raise UserError("name a model and texts: mindseed extend MODEL --data FILES")
    device, out = choose_device(options.device), make_folder(options.out)
    base = load_directory(options.model, device=device)
    first, tokenizer = base.model.config.seq_len, base.tokenizer
    extended(base.model.config, options.lengths[0])                   # says now what would fail in an hour
    prepare.main(prepare.Options(paths=options.data, out=str(out / "data"), tokenizer=options.model,
                                 heldout=options.heldout, seed=options.seed))
    texts = Prepared(out / "data")
    lengths = [n for n in (first * 2**i for i in range(20)) if n <= max(4 * first, options.lengths[-1])]
    figures = read_json(out / "context.json") if (out / "context.json").exists() else {}
    if "before" not in figures:
        figures["before"] = measure(base.model, tokenizer, texts.split("heldout"), lengths, options)
        write_json(out / "context.json", figures)
    start = options.model
    for length in options.lengths:
        folder = out / f"{length}"
        if not (folder / "model").exists():
            start = str(train.train(phase(options, start, length, texts, tokenizer, base.model.config.dim), device))
        start = str(folder / "model")
    after = load_directory(start, device=device)
    figures |= {"first": first, "needles": options.needles, "lengths": lengths, "trained": after.model.config.seq_len,
                "after": measure(after.model, tokenizer, texts.split("heldout"), lengths, options)}
    write_json(out / "context.json", figures)
    report(figures, out)
    say(f"\nThe model is in {start}; it was trained on texts of {after.model.config.seq_len} tokens.")


def phase(options: Options, start: str, length: int, texts: Prepared, tokenizer: Tokenizer, dim: int) -> TrainOptions:
    """The training run of one length."""
    file = Path(options.out) / f"needles-{length}.jsonl"
    if not file.exists():
        rows = needle_rows(tokenizer, texts.split("train"), length, count=max(20, options.steps), seed=options.seed)
        write_text(file, "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows))
    batch = max(1, options.batch_tokens // length)
    return TrainOptions(
        out=str(Path(options.out) / str(length)), resume="auto", seed=options.seed, device=options.device,
        model=ModelOptions(start=start, extend=True),
        data=DataOptions(train=(str(texts.folder), str(file)), weights=(1 - options.needle_share, options.needle_share),
                         seq_len=length, cross_documents=True, heldout=0.05),
        optim=OptimConfig(lr=options.lr or 0.004 / dim**0.5), schedule=ScheduleConfig(warmup_steps=10),
        loop=LoopOptions(steps=options.steps, batch=batch, sample_every=0, validate_documents=20))


def needle_rows(tokenizer: Tokenizer, documents: Documents, length: int, *, count: int, seed: int) -> list[str]:
    """Texts of about `length` tokens that end with the answer to a question about a sentence in them."""
    rng, rows = random.Random(seed + length), []
    for i in range(count):
        hay: list[int] = []
        while len(hay) < length:
            hay += documents.get(rng.randrange(len(documents)))[0].tolist()
        needle = hide(tokenizer, hay, length=length - 16, depth=rng.random(), seed=rng.randrange(1 << 40))
        rows.append(tokenizer.decode([*needle.ids, needle.digits[needle.answer]], skip_special=True) + ".")
    return rows


def measure(model: LM, tokenizer: Tokenizer, heldout: Documents, lengths: list[int],
            options: Options) -> dict[str, Any]:
    """Loss by position (bits per token, up to the longest length) and recall at every length."""
    model.eval()
    documents = [heldout.get(i)[0].tolist() for i in range(len(heldout))]
    edges = [0, *(round(lengths[0] * k / 4) for k in range(1, 4)), *lengths]
    texts = streams(documents, lengths[-1] + 1, 8)
    columns = TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn()
    found = {}
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task("loss by position", total=1 + len(lengths))
        loss = loss_by_position(model, texts, edges)
        for length in lengths:
            bar.update(task, advance=1, description=f"needles in {length} tokens")
            hay = streams(documents, length, options.needles)
            some = [hide(tokenizer, hay[i % len(hay)], length=length, depth=DEPTHS[i % len(DEPTHS)],
                         seed=options.seed * 1_000_003 + i) for i in range(options.needles)]
            found[str(length)] = recall(model, some)
    return {"edges": edges, "bits_per_token": loss, "recall": found}


def report(figures: dict[str, Any], out: Path) -> None:
    """Two tables on the terminal and the curves as a page."""
    before, after = figures["before"], figures["after"]
    spans = [f"{a}-{b}" for a, b in zip(before["edges"], before["edges"][1:])]
    table("loss by position, bits per token", ["tokens", "before", "after"],
          [[span, f"{x:.3f}", f"{y:.3f}"] for span, x, y in zip(spans, before["bits_per_token"],
                                                                after["bits_per_token"])])
    table("needle recall (chance: 10%)", ["tokens", "before", "after"],
          [[n, f"{100 * before['recall'][n]:.0f}%", f"{100 * after['recall'][n]:.0f}%"] for n in before["recall"]])
    log2 = lambda x: math.log2(max(1, x))                                          # noqa: E731
    styles = (("before", before, "s0"), ("after", after, "s1"))
    middles = [log2((a + b) / 2) for a, b in zip(before["edges"], before["edges"][1:])]
    loss = line_chart([Curve(name=name, points=list(zip(middles, some["bits_per_token"])), style=style)
                       for name, some, style in styles], label="loss by position", x_label="log2 of the position")
    found = line_chart([Curve(name=name, points=[(log2(int(n)), 100 * x) for n, x in some["recall"].items()],
                              style=style) for name, some, style in styles],
                       label="needle recall", unit="%", x_label="log2 of the length", from_zero=True)
    page = template("context.html.j2").render(loss=loss, recall=found,
                                              **{key: figures[key] for key in ("first", "trained", "needles")})
    write_text(out / "context.html", page)
