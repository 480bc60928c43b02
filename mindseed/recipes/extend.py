"""Extend a trained model's context in phases, and measure how far it sees before and after each.

  mindseed extend runs/base/model --data corpus.jsonl --lengths 2048 8192 --out runs/long

Each phase stretches the rotary positions by YaRN (2309.00071) and trains on at that length, on your texts, one after
the other in every row, mixed with texts in which a name's digit must be found again (tasks/context.py): a model that
has never had to reach back does not learn to from more room alone. The first length may be the model's own: it then
learns to reach back before it is stretched. Loss by position and needle recall are measured on texts held out, at 1, 2,
4 ... times the model's length. The model directory records the length it was trained on; the figures are in
context.json and context.html of the run's folder.
"""
from __future__ import annotations

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
from mindseed.data.prepare import write_prepared
from mindseed.data.shards import Documents, Prepared
from mindseed.interop.directory import Loaded, load_directory
from mindseed.models.extend import extended
from mindseed.models.lm import LM
from mindseed.optim.groups import OptimConfig
from mindseed.optim.schedule import ScheduleConfig
from mindseed.plan.params import count_params
from mindseed.recipes import prepare, train
from mindseed.recipes.charts import Curve, line_chart
from mindseed.recipes.machine import choose_device
from mindseed.recipes.model_options import ModelOptions
from mindseed.recipes.options import DataOptions, LoopOptions, TrainOptions, peak_rate
from mindseed.recipes.report import template
from mindseed.train.loop import Interrupted
from mindseed.tasks.context import hide, loss_by_position, quiz, recall, streams

COLOURS = 8                                       # of context.html.j2
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FIGURES = {"first": int, "model?": str, "phases?": {str: {str: Any}},
           "measured": {str: {"edges": [int], "bits_per_token": [float], "recall": {str: float}, "needles?": int}}}


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str = option("", help="model directory to start from", positional=True)
    data: tuple[str, ...] = option((), help="texts to train on and to measure with: files, folders or globs")
    lengths: tuple[int, ...] = option((2048, 8192), help="context of each phase, in tokens, rising")
    steps: int = option(400, help="optimiser steps of each phase")
    batch_tokens: int = option(4096, help="tokens of an optimiser step (at least one row)")
    lr: float | None = option(None, help="peak learning rate [derived: half of what training from nothing takes, as "
                                         "small models need it to learn to reach back]")
    needle_share: float = option(0.5, help="share of the rows in which digits must be found again")
    needles: int = option(50, help="needles per length in the test")
    heldout: float = option(0.05, help="share of the texts to measure with, chosen by their hash")
    out: str = option("runs/long", help="folder of the phases, the figures and, as `model`, the last phase's model; "
                                        "goes on where it stopped")
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


def main(options: Options) -> int:
    if not options.model or not options.data:
        raise UserError("name a model and texts: mindseed extend MODEL --data FILES")
    try:
        extend(options)
    except Interrupted as stop:
        say(f"{stop}. Give the same command again to go on")
        return 130
    return 0


def extend(options: Options) -> None:
    """All phases, and the figures before and after each. Raises Interrupted when it was asked to stop."""
    device, out = choose_device(options.device), make_folder(options.out)
    base = load_directory(options.model, device=device)
    first, tokenizer = base.model.config.seq_len, base.tokenizer
    if options.lengths != (first,):
        extended(base.model.config, next(n for n in options.lengths if n != first))   # says now what would fail later
    prepare.main(prepare.Options(paths=options.data, out=str(out / "data"), tokenizer=options.model,
                                 heldout=options.heldout, seed=options.seed))
    texts = Prepared(out / "data")
    longest = max(4 * first, options.lengths[-1])
    figures = (read_json(out / "context.json", FIGURES, remedy="remove it to measure again")
               if (out / "context.json").exists() else {"first": first, "lengths": [], "phases": {}, "measured": {}})
    whose = str(Path(options.model).resolve())
    if figures.setdefault("model", whose) != whose:                   # of another model, of which no phase was trained
        figures |= {"model": whose, "measured": {}}
    agree(figures.setdefault("phases", {}), options, out)
    figures["lengths"] = [n for n in (first * 2**i for i in range(20)) if n <= longest]
    start, stages = options.model, ["before", *map(str, options.lengths)]
    for stage in stages:
        if stage != "before":
            write_json(out / "context.json", figures)
            folder = out / stage / "model"
            start = str(folder if folder.exists() else
                        train.train(phase(options, start, int(stage), texts, base), device))
        there = figures["measured"].get(stage, {"recall": (), "needles": 0})
        if set(there["recall"]) != set(map(str, figures["lengths"])) or there.get("needles") != options.needles:
            model = base.model if stage == "before" else load_directory(start, device=device).model
            figures["measured"][stage] = measure(model, tokenizer, texts.split("heldout"), figures["lengths"], options)
            write_json(out / "context.json", figures)
    report(figures, stages, out, needles=options.needles)
    link = out / "model"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(stages[-1]) / "model")
    say(f"\nThe model is in {link}; it was trained on texts of {options.lengths[-1]} tokens.")


def agree(phases: dict[str, dict[str, Any]], options: Options, out: Path) -> None:
    """Note in `phases` how each phase asked for is trained. UserError if one that is there was trained otherwise."""
    start = str(Path(options.model).resolve())
    for stage in map(str, options.lengths):
        asked = {"start": start, "steps": options.steps, "batch_tokens": options.batch_tokens, "lr": options.lr,
                 "needle_share": options.needle_share}
        if not (out / stage).exists():
            phases[stage] = asked
        there = phases.setdefault(stage, asked)
        if differing := [f"{name}={there.get(name)}" for name in asked if there.get(name) != asked[name]]:
            raise UserError(f"{out / stage} was trained with {', '.join(differing)}; choose another --out, or remove "
                            f"{out / stage} to train it anew")
        start = str((out / stage / "model").resolve())


def phase(options: Options, start: str, length: int, texts: Prepared, base: Loaded) -> TrainOptions:
    """The training run of one length."""
    folder, batch = Path(options.out) / f"needles-{length}", max(1, options.batch_tokens // length)
    tokens = options.needle_share * options.steps * batch * length
    if not (folder / "manifest.json").exists():
        splits = {split: quizzes(base.tokenizer, texts.split(split), length, tokens=share * tokens, seed=options.seed)
                  for split, share in (("train", 1.0), ("heldout", 0.05))}
        write_prepared(folder, base.tokenizer, splits, f"needles in {length} tokens")
    lr = options.lr
    if lr is None:
        lr = peak_rate(count_params(base.model.config).active, options.steps * batch * length, share=0.5)
    return TrainOptions(
        out=str(Path(options.out) / str(length)), resume="auto", seed=options.seed, device=options.device,
        model=ModelOptions(start=start, extend=length > base.model.config.seq_len),
        data=DataOptions(train=(str(texts.folder), str(folder)), weights=(1 - options.needle_share,
                                                                          options.needle_share),
                         seq_len=length, cross_documents=True),
        optim=OptimConfig(lr=lr), schedule=ScheduleConfig(warmup_steps=10, decay=0.4),
        loop=LoopOptions(steps=options.steps, batch=batch, sample_every=0, validate_documents=20))


def quizzes(tokenizer: Tokenizer, documents: Documents, length: int, *, tokens: float,
            seed: int) -> list[tuple[list[int], list[int]]]:
    """About so many tokens of texts with questions (ids, weights). Short ones, from 96 tokens on, teach the trick and
    long ones the distance: their lengths are spread evenly over the powers of two up to `length`."""
    rng, made = random.Random(seed + length), []
    while tokens > 0:
        size = round(min(96, length) * (length / min(96, length))**rng.random())
        hay: list[int] = []
        while len(hay) < size:
            hay += documents.get(rng.randrange(len(documents)))[0].tolist()
        made.append(quiz(tokenizer, hay, length=size, seed=rng.randrange(1 << 40)))
        tokens -= size
    return made


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
    return {"edges": edges, "bits_per_token": loss, "recall": found, "needles": options.needles}


def report(figures: dict[str, Any], stages: list[str], out: Path, *, needles: int) -> None:
    """Two tables on the terminal and the curves as a page."""
    some = {stage if stage == "before" else f"after {stage}": figures["measured"][stage] for stage in stages}
    edges = figures["measured"]["before"]["edges"]
    table("loss by position, bits per token", ["tokens", *some],
          [[f"{a}-{b}", *(f"{m['bits_per_token'][i]:.3f}" for m in some.values())]
           for i, (a, b) in enumerate(zip(edges, edges[1:]))])
    table("needle recall (chance: 10%)", ["tokens", *some],
          [[str(n), *(f"{100 * m['recall'][str(n)]:.0f}%" for m in some.values())] for n in figures["lengths"]])
    middles = [(a + b) / 2 for a, b in zip(edges, edges[1:])]
    styles = {name: f"s{i % COLOURS}" for i, name in enumerate(some)}
    loss = line_chart([Curve(name=name, points=list(zip(middles, m["bits_per_token"])), style=styles[name])
                       for name, m in some.items()], label="loss by position", x_label="position, tokens", powers=True)
    found = line_chart([Curve(name=name, points=[(int(n), 100 * x) for n, x in m["recall"].items()],
                              style=styles[name]) for name, m in some.items()],
                       label="needle recall", unit="%", x_label="length, tokens", from_zero=True, powers=True)
    page = template("context.html.j2").render(loss=loss, recall=found, styles=styles, trained=stages[-1],
                                              first=figures["first"], needles=needles)
    write_text(out / "context.html", page)
