"""Train many small models, fit the law by which their loss falls, and predict a larger one before training it.

  mindseed scaling-law --data.train corpus.jsonl                               20 runs, a law, and a larger run foretold
  mindseed scaling-law configs/scaling-cpu.toml                                the one of docs/RESULTS.md
  mindseed scaling-law --data.train corpus.jsonl --sizes 2 3 4 5 6 --tokens 5e6 1e7 2e7 --target 8 --target_tokens 5e7
  mindseed scaling-law --fit table.jsonl --predict 1e9x20e9                    somebody else's runs, without training

The law is Chinchilla's (2203.15556), L = E + A / N^alpha + B / D^beta, or has both terms joined as Kaplan's has them
(2001.08361), where a small model gains less from more tokens; the one that fits the runs better is taken. It answers:
how large a model for my compute, how much better with ten times of it, and is this larger run worth its price? Before
the largest run (`--target`) its loss is written down with an interval; then it is trained and compared. With the same
command a broken sweep goes on. The folder holds runs.jsonl (a line each, which --fit reads), scaling.json (law,
intervals, predictions), scaling.md and, with matplotlib, scaling.png.

Runs of one size share a trunk at the full learning rate and branch off to decay (`--no-trunk`: each for itself, with a
rate of its own). N counts all parameters, or those outside the embedding as Kaplan counted, whichever the
table fits better: among tiny models, which are half embedding, that decides the exponents (2406.12907).
"""
from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mindseed.base import dist
from mindseed.base.config import diff, option
from mindseed.base.errors import UserError
from mindseed.base.files import make_folder, parse_json, read_text, write_json, write_text
from mindseed.base.log import duration, say, si, table, warn
from mindseed.optim.groups import OptimConfig
from mindseed.optim.schedule import ScheduleConfig
from mindseed.plan.scaling import CHINCHILLA, PER, REPLICATED, Fit, Runs, fit, growth, isoflop, worth
from mindseed.recipes.machine import choose_device, choose_precision
from mindseed.recipes.options import DataOptions, LoopOptions, PrecisionChoice, TrainOptions, idle_optim
from mindseed.recipes.scaling_page import draw, page, span
from mindseed.recipes.sweep import Planned, Sweep, plan_line, problems, same_sweep, shape_of
from mindseed.recipes.training_data import open_data
from mindseed.train.loop import Interrupted

FORMS = {"sum": False, "joined": True}            # of a law, and whether its terms are joined
COUNTS = {"total": "params", "non-embedding": "non_embedding"}           # ways to count N, and their columns
PASSES = (1, 2, 4, 8, 16, 40)
FITTING = ("fit", "out", "count", "form", "predict", "compute", "unique", "draws", "level", "seed")
PUBLISHED = (CHINCHILLA, REPLICATED)
STRAY = 0.03                                      # of the loss: runs further from their law follow none
MANY = 40                                         # runs shown in a table


@dataclass(frozen=True, kw_only=True)
class Options:
    fit: str | None = option(None, help="fit this table of finished runs and train nothing: JSON lines with params, "
                                        "tokens and loss (nats a token), and non_embedding if it is known")
    out: str | None = option(None, help="folder of the sweep, which goes on where it stopped [derived: runs/scaling; "
                                        "with --fit nothing is written]")
    sizes: tuple[str, ...] = option(("2x32", "2x64", "2x96", "3x96", "3x128"),
                                    help="models: LAYERSxWIDTH, the width a multiple of 32, or a depth of the dial; "
                                         "five or more")
    tokens: tuple[float, ...] = option((5e5, 1e6, 2e6, 4e6), help="budgets of each size; three or more")
    target: str | None = option("4x160", help="the larger model that is predicted, then trained; none: only the sweep")
    target_tokens: float = option(6e6, help="its budget")
    trunk: bool = option(True, help="budgets of a size share a run and branch off to decay: the same as apart, at one "
                                    "rate, in two thirds of the time")
    count: Literal["auto", "total", "non-embedding"] = option("auto", help="what N counts; auto: what fits better")
    form: Literal["auto", "sum", "joined"] = option("auto", help="sum: Chinchilla's law; joined: Kaplan's, with "
                                                                 "a constant; auto: what fits better")
    predict: tuple[str, ...] = option((), help="further runs to predict, PARAMSxTOKENS: 1e9x20e9")
    compute: tuple[float, ...] = option((), help="FLOPs for which to tell the best size [derived: 1, 10 and 100 times "
                                                 "the largest run's]")
    unique: float | None = option(None, help="different tokens there are, to tell what repeating them is worth "
                                             "[derived: those of data.train]")
    draws: int = option(1000, help="tables drawn from the runs, for the intervals")
    level: float = option(0.95, help="share of the draws inside an interval")
    batch: int = option(2, help="rows of a step, for all sizes: few, since a large batch wastes the tokens of a "
                                       "short run, and the law takes that for its nature")
    micro_batch: int | None = option(None, help="rows of a forward pass, of which a batch is a multiple [derived: up "
                                                "to 4096 tokens]")
    validate_documents: int = option(200, help="held-out documents on which every run is measured")
    save_minutes: float = option(5.0, help="minutes between checkpoints: what a kill can lose")
    seed: int = option(0, help="seed of weights, data and draws")
    device: str = option("auto", help="cpu, cuda, cuda:1, mps; auto: the GPU if there is one")
    precision: PrecisionChoice = option("auto", help="auto: bf16 where it is the faster one, else fp32")
    data: DataOptions = field(default_factory=lambda: DataOptions(vocab_size=2048, seq_len=256))
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        found = [f"predict={text} is not PARAMSxTOKENS, such as 1e9x20e9" for text in self.predict
                 if not re.fullmatch(r"[0-9.eE+]+x[0-9.eE+]+", text)]
        for name in ("tokens", "compute", "target_tokens", "unique", "draws", "save_minutes", "validate_documents"):
            value = getattr(self, name)
            if any(x <= 0 for x in (value if isinstance(value, tuple) else [value]) if x is not None):
                found.append(f"{name} must be above 0")
        if not 0 < self.level < 1:
            found.append(f"level={self.level} must lie in (0, 1)")
        if self.trunk and self.schedule.kind not in ("wsd", "constant"):
            found.append(f"schedule.kind={self.schedule.kind} falls from the start, so nothing can be shared; add "
                         "--no-trunk")
        if self.fit is None and self.target is not None and min(len(set(self.sizes)), len(set(self.tokens))) < 3:
            found.append(f"{len(set(self.sizes))} sizes and {len(set(self.tokens))} budgets are too few to foretell "
                         "the target: a power and a constant need three of each, five sizes are advised; give more, or "
                         "--target none")
        if found:
            raise ValueError("; ".join(found))


def main(options: Options) -> int:
    for line in idle(options):
        warn(line)
    if options.fit:
        fit_table(options)
        return 0
    try:
        grow(options)
    except Interrupted as stop:
        say(f"{stop}. Give the same command again to go on")
        return 130
    return 0


def idle(options: Options) -> list[str]:
    """A line for every option that was given and changes nothing."""
    changed = diff(Options(), options)
    if options.fit:
        return [f"{name} has no effect: with --fit nothing is trained" for name in changed if name not in FITTING]
    causes = idle_optim(options) | {
        "target_tokens": None if options.target else "there is no target",
        "data.remember": "these models begin from nothing", "data.vocab_size": "data.tokenizer is given"
        if options.data.tokenizer else None}
    return [f"{name} has no effect: {cause}" for name, cause in causes.items() if cause and name in changed]


# ----------------------------------------------------------------------------------------------------- a table as given

def read_table(path: str) -> list[dict[str, Any]]:
    """The runs of a file of JSON lines. UserError with all that is wrong with it."""
    rows, found = [], []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            found.append(f"line {number} is not JSON: {error}")
            continue
        row = row if isinstance(row, dict) else {}
        missing = [name for name in ("params", "tokens", "loss") if name not in row]
        wrong = [f"{name}={row[name]!r}" for name in ("params", "tokens", "loss", "non_embedding") if name in row
                 and (type(row[name]) not in (int, float) or not 0 < row[name] < float("inf"))]
        if missing or wrong:
            found.append(f"line {number}" + f" has no {', '.join(missing)}" * bool(missing) + " and" * bool(
                missing and wrong) + f" has {', '.join(wrong)}, which must be above 0" * bool(wrong))
        else:
            rows.append(row)
    if problems := found[:10] + [f"and {len(found) - 10} more lines"] * (len(found) > 10) + runs_of(rows).problems():
        raise UserError(f"{path}: no law can be fitted:\n" + "\n".join(f"  {line}" for line in problems))
    return rows


def runs_of(rows: list[dict[str, Any]], column: str = "params") -> Runs:
    return Runs.of(*([row[name] for row in rows] for name in (column, "tokens", "loss")))


def fit_table(options: Options) -> None:
    rows = read_table(options.fit)
    name, fits = fitted(rows, options)
    facts = summary(rows, name, fits, options, unique=options.unique)
    tell(facts)
    if options.out:
        write(facts, make_folder(options.out))


def fitted(rows: list[dict[str, Any]], options: Options) -> tuple[str, dict[str, Fit]]:
    """(the law that fits best, of those asked for; all laws, by the way to count N and the form)."""
    known = [name for name, column in COUNTS.items() if all(column in row for row in rows)]
    if options.count not in ("auto", *known):
        raise UserError(f"--count {options.count} needs the column {COUNTS[options.count]} in every line")
    fits = {f"{name}, {form}": fit(runs_of(rows, COUNTS[name]), joined=joined, draws=options.draws, seed=options.seed)
            for name in known for form, joined in FORMS.items()}
    asked = [f"{name}, {form}" for name in known for form in FORMS
             if options.count in ("auto", name) and options.form in ("auto", form)]
    return min(asked, key=lambda name: fits[name].objective), fits


# ------------------------------------------------------------------------------------------------------------ the sweep

def grow(options: Options) -> None:
    """Sweep, law, prediction, and the run that was predicted."""
    if dist.launched():
        raise UserError("the runs of a sweep are small: it runs on one process, without torchrun")
    device, out = choose_device(options.device), make_folder(options.out or "runs/scaling")
    for size in (*options.sizes, *([options.target] if options.target else [])):
        shape_of(size)
    precision = choose_precision(options.precision, device)
    decides = {"data": replace(options.data, workers=None), "optim": options.optim, "schedule": options.schedule,
               "seed": options.seed, "precision": precision, "documents": options.validate_documents}
    same_sweep(out, decides)
    told = TrainOptions(out=str(out), seed=options.seed, device=options.device, data=options.data, optim=options.optim,
                        schedule=options.schedule, loop=LoopOptions(
                            batch=options.batch, micro_batch=options.micro_batch,
                            validate_documents=options.validate_documents))
    data = open_data(told, out)
    same_sweep(out, decides, data)
    if not data.heldout:
        raise UserError("there is no held-out text to measure the runs on; give more text, or a larger data.heldout")
    groups = [[size, options.tokens] for size in options.sizes] if options.trunk else [
        [size, [tokens]] for size in options.sizes for tokens in options.tokens]
    lines = [plan_line(size, tokens, told, vocab_size=data.tokenizer.vocab_size) for size, tokens in groups]
    last = [plan_line(options.target, [options.target_tokens], told, vocab_size=data.tokenizer.vocab_size)
            ] if options.target else []
    if found := problems([*lines, *last], options.schedule):
        raise UserError("the sweep cannot be run:\n" + "\n".join(f"  {line}" for line in found))

    sweep = Sweep(out=out, data=data, device=device, precision=precision, seed=options.seed, optim=options.optim,
                  schedule=options.schedule, save_s=60 * options.save_minutes)
    total = sweep.left([*lines, *last])
    sweep.read([p for line in [*lines, *last] for p in line])
    sweep.done_flops = total - sweep.left([*lines, *last])
    announce(lines, last, sweep, total)
    sweep.train(lines, total)
    rows = [sweep.rows[p.name] for line in lines for p in line]
    if too_few := runs_of(rows).problems():
        warn(f"no law is fitted to them, but {sweep.table} can grow, with more --sizes and --tokens: {too_few[0]}")
        return
    facts = conclude(rows, last, sweep, options)
    if last and last[0][0].name not in sweep.rows:
        guess = facts["predictions"][0]
        say(f"\nPredicted before it is trained: {guess['name']} will reach {guess['loss']:.4f} nats a token "
            f"({guess['low']:.4f} to {guess['high']:.4f}); written to {out / 'scaling.json'}\n")
        sweep.train(last, total)
        facts = conclude(rows, last, sweep, options)
    tell(facts)
    say(f"\nscaling.json, scaling.md and runs.jsonl are in {out}")


def announce(lines: list[list[Planned]], last: list[list[Planned]], sweep: Sweep, total: float) -> None:
    """What will be trained, before the first step."""
    rows = [[line[0].size, si(line[0].count.total), si(line[0].non_embedding), ", ".join(si(p.budget) for p in line),
             f"{line[0].batch} x {line[0].config.seq_len}", f"{line[0].lr:g}",
             ", ".join(f"{p.tokens / p.count.total:.3g}" for p in line)] for line in [*lines, *last]]
    table("sweep" + " (the last line is predicted first)" * bool(last),
          ["size", "parameters", "without embedding", "tokens", "batch", "rate", "tokens per parameter"], rows)
    done = sum(p.name in sweep.rows for line in [*lines, *last] for p in line)
    say(f"{sum(map(len, lines)) + len(last)} runs, {si(total)} FLOPs" + f"; {done} of them are finished" * bool(done))
    passes = max(p.steps * p.batch for line in [*lines, *last] for p in line) / len(sweep.data.rows)
    if passes > 1:
        warn(f"the longest run goes {passes:.1f} times over the text, and the law takes every token for a new one; "
             "more text, or smaller budgets, keep it honest")


def conclude(rows: list[dict[str, Any]], last: list[list[Planned]], sweep: Sweep, options: Options) -> dict[str, Any]:
    """Fit what there is and write it down, with the run to be predicted and, if it is finished, its measured loss."""
    name, fits = fitted(rows, options)
    unique = options.unique or float(sum(int(entry.split("train").lengths.sum()) for entry in sweep.data.entries))
    target = None
    if last:
        p = last[0][0]
        target = {"name": p.name, "params": p.count.total, "non_embedding": p.non_embedding, "tokens": p.tokens}
        target |= {"measured": sweep.rows[p.name]} if p.name in sweep.rows else {}
    facts = summary(rows, name, fits, options, unique=unique, target=target)
    write(facts, sweep.out)
    return facts


# -------------------------------------------------------------------------------------------------------- what it found

def summary(rows: list[dict[str, Any]], name: str, fits: dict[str, Fit], options: Options, *, unique: float | None,
            target: dict[str, Any] | None = None) -> dict[str, Any]:
    """All figures, as they are written to scaling.json."""
    count, form = name.split(", ")
    best, column = fits[name], COUNTS[count]
    law, level = best.law, options.level

    def with_interval(one: Fit, figure: Any) -> list[float | None]:
        return [known(float(x)) for x in (figure(one.law), *one.interval(figure, level))]

    laws = {key: {field: with_interval(one, lambda law, field=field: getattr(law, field))
                  for field in ("E", "A", "B", "alpha", "beta")}
            | {"a": with_interval(one, lambda law: law.exponents[0]), "error": one.error, "objective": one.objective}
            for key, one in fits.items()}
    largest = PER * max(row[column] * row["tokens"] for row in rows)
    optimal = [{"flops": flops, "params": with_interval(best, lambda law: law.optimal(flops)[0]),
                "tokens": with_interval(best, lambda law: law.optimal(flops)[1]),
                "loss": with_interval(best, lambda law: law.loss(*law.optimal(flops)))}
               for flops in options.compute or [largest * k for k in (1, 10, 100)]]
    asked = [(text, *map(float, text.split("x"))) for text in options.predict]
    guesses = [guess(best, target["name"], target[column], target["tokens"], level, target.get("measured"))
               ] if target else []
    guesses += [guess(best, text, params, tokens, level) for text, params, tokens in asked]
    slices = isoflop(runs_of(rows, column))
    size = guesses[0]["params"] if guesses else max(row[column] for row in rows)
    return {
        "law": name, "count": count, "form": form, "level": level, "draws": options.draws, "laws": laws,
        "runs": [row | {"fitted": float(law.loss(row[column], row["tokens"])), "n": row[column]} for row in rows],
        "optimal": optimal, "predictions": guesses,
        "isoflop": {"a": growth(slices), "slices": [vars(s) | {"by_law": float(law.optimal(s.flops)[0])}
                                                    for s in slices]},
        "repeats": [{"passes": n, "worth": float(worth(n * unique, unique) / unique), "tokens": n * unique,
                     "params": size, "loss": float(law.limited(size, n * unique, unique))}
                    for n in PASSES] if unique else [],
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def known(x: float) -> float | None:
    """None where the runs do not determine a figure."""
    return x if math.isfinite(x) else None


def guess(best: Fit, name: str, params: float, tokens: float, level: float,
          measured: dict[str, Any] | None = None) -> dict[str, Any]:
    """A prediction, beside what was measured if it was."""
    tokens = measured["tokens"] if measured else tokens
    said = best.predict(params, tokens, level=level)
    return {"name": name, "params": params, "tokens": tokens} | {k: known(v) for k, v in vars(said).items()} | (
        {"measured": measured["loss"], "bits_per_byte": measured["bits_per_byte"], "error":
         said.loss / measured["loss"] - 1, "row": measured} if measured else {})


def write(facts: dict[str, Any], out: Path) -> None:
    write_json(out / "scaling.json", facts)
    picture = draw(facts, out / "scaling.png")
    write_text(out / "scaling.md", page(facts, "scaling.png" if picture else None))


def tell(facts: dict[str, Any]) -> None:
    """The tables on the terminal."""
    level, laws = f"{facts['level']:.0%}", facts["laws"]
    if (error := laws[facts["law"]]["error"]) > STRAY:
        warn(f"the runs follow no power law ({error:.0%} off it): they are too short, or too much alike, for one to "
             "show; take larger budgets, and sizes further apart, before anything is foretold from it")
    shown = enumerate(facts["runs"], 1)
    if many := len(facts["runs"]) > MANY:
        shown = sorted(shown, key=lambda one: abs(one[1]["fitted"] / one[1]["loss"] - 1), reverse=True)[:MANY]
    table(f"the {MANY} of {len(facts['runs'])} runs that stray most" if many else "runs",
          ["run", "N", "tokens", "tokens per N", "loss", "by the law", "off"], [
        [str(row.get("run", i)), si(row["n"]), si(row["tokens"]), f"{row['tokens'] / row['n']:.3g}",
         f"{row['loss']:.4f}", f"{row['fitted']:.4f}", f"{row['fitted'] / row['loss'] - 1:+.2%}"] for i, row in shown])
    table(f"laws of five numbers, with {level} intervals; by how N is counted, and whether its term and that of D are "
          "summed (E + A / N^alpha + B / D^beta) or joined",
          ["", *(name + " (chosen)" * (name == facts["law"]) for name in laws),
           "Chinchilla printed", "fitted anew"],
          [[key, *(span(one[key]) for one in laws.values()), *(f"{getattr(law, key):.4g}" for law in PUBLISHED)]
           for key in ("E", "A", "B", "alpha", "beta")]
          + [["a of N* ~ C^a", *(span(one["a"]) for one in laws.values()), *(f"{law.exponents[0]:.3g}"
                                                                             for law in PUBLISHED)],
             ["error of a run", *(f"{one['error']:.2%}" for one in laws.values()), "", ""]])
    if facts["isoflop"]["a"] is not None:
        say(f"IsoFLOP parabolas, which assume no law: N* grows as C^{facts['isoflop']['a']:.3g}")
    table("the best size for an amount of arithmetic, C = 6 N D", ["FLOPs", "N*", "D*", "D* / N*", "loss"], [
        [f"{best['flops']:.2e}", span(best["params"], si), span(best["tokens"], si),
         f"{best['tokens'][0] / best['params'][0]:.3g}", span(best["loss"])] for best in facts["optimal"]])
    if facts["predictions"]:
        table(f"predictions, with {level} intervals", ["run", "N", "tokens", "loss", "measured", "off"], [
            [p["name"], si(p["params"]), si(p["tokens"]), span([p["loss"], p["low"], p["high"]]),
             f"{p['measured']:.4f}" if "measured" in p else "", f"{p['error']:+.2%}" if "measured" in p else ""]
            for p in facts["predictions"]])
    if facts["repeats"]:
        one = facts["repeats"][0]
        table(f"what repeating {si(one['tokens'])} tokens is worth to {si(one['params'])} parameters (2305.16264)",
              ["passes", "worth, in passes of new text", "loss"],
              [[str(r["passes"]), f"{r['worth']:.2f}", f"{r['loss']:.4f}"] for r in facts["repeats"]])
    if seconds := sum(row.get("seconds", 0) for row in facts["runs"]):
        say(f"the runs of the sweep took {duration(seconds)}")
