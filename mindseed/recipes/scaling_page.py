"""What a sweep found, as a picture and as a section in Markdown: both made from scaling.json alone.

The picture has loss against arithmetic, C = 6 N D, both on logarithmic axes: a colour for each size, dots for its runs
and a curve for the law at that size over all budgets; the law's lower envelope, which is reached by the best size for
each C; and the larger run, as it was predicted (a bar for the interval) and as it came out.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mindseed.base.extras import install
from mindseed.base.log import si, units, warn
from mindseed.plan.scaling import PER, Law

GROWN = {"run", "flops", "bits_per_byte"}         # what runs of our own sweeps say, beside the three columns
FORMULAS = {"sum": "E + A / N^alpha + B / D^beta",
            "joined": "E + ((A / N^alpha)^(1/beta) + (B / D^beta)^(1/beta))^beta"}
SHADES = (0.02, 0.85)                             # of the colour map, from the smallest size to the largest


def law_of(facts: dict[str, Any]) -> Law:
    return Law(**{key: facts["laws"][facts["law"]][key][0] for key in ("E", "A", "B", "alpha", "beta")},
               joined=facts["form"] == "joined")


def draw(facts: dict[str, Any], path: Path) -> Path | None:
    """Write the picture; None, with a warning, where matplotlib is missing."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
    except ImportError:
        warn(f"no picture without matplotlib: {install('[plots]')}")
        return None
    law, runs, guesses = law_of(facts), facts["runs"], facts["predictions"]
    figure = Figure(figsize=(8, 5.4), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="arithmetic, FLOPs = 6 N D",
                              ylabel="held-out loss, nats per token")
    budgets = np.geomspace(min(r["tokens"] for r in runs) / 1.5, 1.5 * max(r["tokens"] for r in runs + guesses), 200)
    sizes = sorted({run["n"] for run in runs})
    for i, size in enumerate(sizes):
        colour = colormaps["viridis"](np.interp(i, (0, max(len(sizes) - 1, 1)), SHADES))
        mine = [run for run in runs if run["n"] == size]
        axes.plot(PER * size * budgets, law.loss(size, budgets), color=colour, linewidth=1, alpha=0.7)
        axes.plot([PER * size * run["tokens"] for run in mine], [run["loss"] for run in mine], "o", color=colour,
                  markersize=5, label=f"N = {si(float(size))}" if len(sizes) <= 12 else None)
    spent = np.geomspace(PER * sizes[0] * budgets[0], PER * max([sizes[-1], *(g["params"] for g in guesses)])
                         * budgets[-1], 200)
    axes.plot(spent, law.loss(*law.optimal(spent)), "--", color="black", linewidth=1.2, label="best size for each C")
    for i, guess in enumerate(guesses):
        at = PER * guess["params"] * guess["tokens"]
        if None not in (guess["low"], guess["high"]):
            axes.errorbar(at, (guess["low"] + guess["high"]) / 2, (guess["high"] - guess["low"]) / 2, fmt="none",
                          color="firebrick", capsize=4)
        axes.plot(at, guess["loss"], "D", color="firebrick", markerfacecolor="white", markersize=6,
                  label=f"predicted, N = {si(float(guess['params']))}" if i < 3 else None)
        if "measured" in guess:
            axes.plot(at, guess["measured"], "*", color="firebrick", markersize=11, label="measured afterwards")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    return path


def page(facts: dict[str, Any], picture: str | None) -> str:
    """The section: the law, the prediction and what came of it, all runs, and what follows."""
    level, law, count = f"{facts['level']:.0%}", facts["laws"][facts["law"]], facts["count"]
    runs, grown = facts["runs"], all(GROWN <= set(run) for run in facts["runs"])
    spent = f", {units(sum(run['flops'] for run in runs), 'FLOP')}" if grown else ""
    lines = [f"{len(runs)} runs of {len({run['n'] for run in runs})} sizes{spent}. The law that fits them best, N "
             f"counting {words(count)} ({level} intervals by bootstrap over runs; all of them have five numbers):", ""]
    lines += [f"    L(N, D) = {FORMULAS[facts['form']]}", ""]
    lines += rows(["N counts, the terms are", "E", "A", "B", "alpha", "beta", "a of N* ~ C^a", "error of a run"], [
        [name, *(span(one[key]) for key in ("E", "A", "B", "alpha", "beta", "a")), f"{one['error']:.2%}"]
        for name, one in facts["laws"].items()])
    if done := [guess for guess in facts["predictions"] if "measured" in guess]:
        lines += ["", "Predicted before it was trained, then trained:", ""]
        lines += rows(["run", "N", "tokens", "predicted loss", "measured", "off", "bits per byte"], [
            [g["name"], si(g["params"]), si(g["tokens"]), span([g["loss"], g["low"], g["high"]]),
             f"{g['measured']:.4f}", f"{g['error']:+.2%}", f"{g['bits_per_byte']:.3f}"] for g in done])
    lines += ["", f"![Loss against arithmetic]({picture})"] * bool(picture)
    slope = facts["isoflop"]["a"]
    lines += ["", "The best size for an amount of arithmetic, C = 6 N D, by the law"
              + (f" (IsoFLOP parabolas, which assume no law, say a = {slope:.3g} against {law['a'][0]:.3g}):"
                 if slope is not None else ":"), ""]
    lines += rows(["FLOPs", "N*", "D*", "D* / N*", "loss"], [
        [f"{best['flops']:.2e}", span(best["params"], si), span(best["tokens"], si),
         f"{best['tokens'][0] / best['params'][0]:.3g}", span(best["loss"])] for best in facts["optimal"]])
    if facts["repeats"]:
        one = facts["repeats"][0]
        lines += ["", f"What reading the same {si(one['tokens'])} tokens again is worth, by 2305.16264 (their R* = "
                  f"15.39, our law at N = {si(one['params'])}):", ""]
        lines += rows(["passes", *(str(r["passes"]) for r in facts["repeats"])], [
            ["worth, in passes of new text", *(f"{r['worth']:.2f}" for r in facts["repeats"])],
            ["loss by the law", *(f"{r['loss']:.3f}" for r in facts["repeats"])]])
    if grown:
        lines += ["", "All runs of the sweep, loss in nats per token on the same held-out documents:", ""]
        lines += rows(["run", "N", "tokens", "loss", "by the law", "off", "bits per byte"], [
            [run["run"], si(run["n"]), si(run["tokens"]), f"{run['loss']:.4f}", f"{run['fitted']:.4f}",
             f"{run['fitted'] / run['loss'] - 1:+.2%}", f"{run['bits_per_byte']:.3f}"] for run in runs])
    return "\n".join(lines) + "\n"


def words(count: str) -> str:
    return {"total": "all parameters, the tied embedding once", "non-embedding": "those outside the embedding"}[count]


def span(values: list[float], text: Any = lambda x: f"{x:.4g}") -> str:
    value, *ends = values
    if value is None or not np.isfinite(value):
        return "not determined"
    if None in ends or not np.isfinite(ends).all():
        return f"{text(float(value))} (not determined)"
    return "{} ({} to {})".format(*map(text, map(float, values)))


def rows(header: list[str], body: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *body)]
