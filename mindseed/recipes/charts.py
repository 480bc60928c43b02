"""Charts for a web page in plain SVG: no library, no script, sharp at any width, in the page's own colours.

A chart has no size of its own. What must scale is given in percent of its box; curves live in a square of UNIT x UNIT
that is stretched over the box while strokes keep their width. So a chart fills whatever the page gives it, and its
text stays as large as the page's text, on a phone too. Colours are CSS classes (s0, s1, ...), so one chart serves a
light and a dark page. Resting the pointer on a chart shows the values there (<title>, which needs no script).
"""
from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import Iterable

from markupsafe import Markup, escape

from mindseed.base.log import si

Point = tuple[float, float]
UNIT = 2000                        # steps of the square in which curves are drawn; below a pixel on most screens


@dataclass(frozen=True, kw_only=True)
class Curve:
    """`faint` curves stand behind the others and out of the legend; few points get a mark each."""

    name: str
    points: list[Point]            # (x, y), x ascending
    style: str = "s0"
    faint: bool = False


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """One element. Children and attributes are escaped unless they are Markup; `_` in an attribute's name means `-`."""
    words = [f'{key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items()]
    head = " ".join([name, *words])
    return Markup(f"<{head}>{''.join(escape(c) for c in children)}</{name}>") if children else Markup(f"<{head}/>")


# ------------------------------------------------------------------------------------------------------------- figures

def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten) about `count` steps apart, from at or below low to at or above
    high."""
    if high <= low:
        low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_text(value: float, step: float) -> str:
    """A tick's label, with the decimals that its distance to the next one asks for."""
    if abs(value) >= 1000:
        return re.sub(r"(\.\d*?)0+(?=\D|$)", r"\1", si(float(value))).replace(".k", "k").replace(".M", "M")
    return f"{value:.{min(max(-math.floor(math.log10(step) + 1e-9), 0), 9)}f}"


def value_text(value: float) -> str:
    return si(float(value)) if abs(value) >= 1000 else f"{value:.4g}"


def smooth(points: list[Point], span: int) -> list[Point]:
    """Mean over about `span` points around each; fewer towards the ends, always as many before as behind, so that a
    falling curve is neither delayed nor lifted."""
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    reach = [min(span // 2, i, len(points) - 1 - i) for i in range(len(points))]
    return [(x, (sums[i + r + 1] - sums[i - r]) / (2 * r + 1)) for i, ((x, _), r) in enumerate(zip(points, reach))]


def thin(points: list[Point], limit: int = 500) -> list[Point]:
    """At most about `limit` points: of each stretch its lowest and its highest, so that no spike gets lost."""
    if len(points) <= limit:
        return points
    size = math.ceil(2 * len(points) / limit)
    parts = [points[i:i + size] for i in range(0, len(points), size)]
    kept = {p for part in parts for p in (min(part, key=lambda q: q[1]), max(part, key=lambda q: q[1]))}
    return sorted(kept | {points[0], points[-1]})


# -------------------------------------------------------------------------------------------------------------- charts

def line_chart(curves: list[Curve], *, label: str, unit: str = "", x_label: str = "step", from_zero: bool = False,
               powers: bool = False) -> Markup:
    """Curves over a common x with axes, units and values under the pointer. `curves` must hold at least one point.
    With `powers` every power of two of x (above 0) is one step further to the right."""
    xs = [x for c in curves for x, _ in c.points]
    ys = [y for c in curves for _, y in c.points]
    rows = ticks(min([0.0, *ys] if from_zero else ys), max(ys))
    low, high = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, max(xs) + 1)
    columns = [t for t in ticks(low, high, 6) if low <= t <= high]
    at_x = lambda x: (x - low) / (high - low)                                           # noqa: E731
    if powers:
        columns = [2.0**i for i in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
        at_x = lambda x: math.log2(x / low) / math.log2(high / low)                     # noqa: E731
    at_y = lambda y: (rows[-1] - y) / (rows[-1] - rows[0])                              # noqa: E731
    step_x = columns[1] - columns[0] if len(columns) > 1 else 1.0

    parts = [tag("line", x1="0%", x2="100%", y1=percent(at_y(t)), y2=percent(at_y(t)), class_="grid") for t in rows]
    parts += [tag("text", tick_text(t, rows[1] - rows[0]), x=0, dx=-8, y=percent(at_y(t)), dy="0.32em", class_="tick y")
              for t in rows]
    parts += [tag("text", tick_text(t, step_x), x=percent(at_x(t)), y="100%", dy="1.5em", class_="tick x")
              for t in columns]
    parts += [tag("text", unit, x=0, y=0, dx=-8, dy="-0.9em", class_="unit"),
              tag("text", x_label, x="100%", y="100%", dy="2.9em", class_="unit end")]
    parts.append(tag("svg", *(path(c, at_x, at_y) for c in sorted(curves, key=lambda c: not c.faint)),
                     width="100%", height="100%", viewBox=f"0 0 {UNIT} {UNIT}", preserveAspectRatio="none"))
    parts += [tag("circle", cx=percent(at_x(x)), cy=percent(at_y(y)), r=3.2, class_=f"dot {c.style}")
              for c in curves if len(c.points) <= 24 and not c.faint for x, y in c.points]
    parts += bands(curves, at_x, x_label, unit)
    return tag("svg", *parts, class_="chart", role="img", aria_label=label)


def path(curve: Curve, at_x, at_y) -> Markup:
    points = " ".join(f"{at_x(x) * UNIT:.0f},{at_y(y) * UNIT:.0f}" for x, y in thin(curve.points))
    return tag("polyline", points=points, class_=f"curve {curve.style}{' faint' * curve.faint}")


def bands(curves: list[Curve], at_x, x_label: str, unit: str, most: int = 80) -> Iterable[Markup]:
    """Invisible upright stripes that say what the curves are worth there."""
    tables = [(c.name, dict(c.points)) for c in curves]
    xs = sorted({x for _, t in tables for x in t})
    size = math.ceil(len(xs) / most)
    groups = [xs[i:i + size] for i in range(0, len(xs), size)]
    edges = [0.0, *(at_x((a[-1] + b[0]) / 2) for a, b in itertools.pairwise(groups)), 1.0]
    for group, left, right in zip(groups, edges, edges[1:]):
        x = group[len(group) // 2]
        values = [f"{name}: {value_text(t[x])} {unit}".strip() for name, t in tables if x in t]
        title = tag("title", "\n".join([f"{x_label} {value_text(x)}", *values]))
        yield tag("rect", title, x=percent(left), width=percent(right - left), y="0%", height="100%", class_="band")


def bars(values: list[tuple[str, str, float | None]], *, most: float, unit: str = "%", grid: int = 4, text=None
         ) -> Markup:
    """A bar per (tooltip, style, value) under each other, on a scale from 0 to `most`; None says that there is none.

    `grid` is the number of parts that upright lines divide the scale into (0: no lines); `text` writes a value.
    """
    thick, gap = 15, 4
    height = len(values) * (thick + gap) - gap
    parts = [tag("line", x1=f"{100 * i / grid:g}%", x2=f"{100 * i / grid:g}%", y1=-5, y2=height + 5, class_="grid")
             for i in range(grid + 1) if grid]
    for i, (tip, style, value) in enumerate(values):
        y, share = i * (thick + gap), max(0.0, min((value or 0.0) / most, 1.0)) if most else 0.0
        shown = "–" if value is None else text(value) if text else f"{value:.0f}{unit}"
        parts.append(tag("g", tag("title", f"{tip}: {shown if text or value is None else f'{value:.1f}{unit}'}"),
                         tag("rect", x=0, y=y, width="100%", height=thick, class_="band"),
                         tag("rect", x=0, y=y, width=percent(share), height=thick, rx=2, class_=f"bar {style}"),
                         tag("text", shown, x=percent(share), dx=6, y=y + thick / 2, dy="0.35em", class_="value")))
    return tag("svg", *parts, class_="bars", height=height, role="img",
               aria_label="; ".join(f"{tip} {'–' if v is None else f'{v:.1f}'}" for tip, _, v in values))


def percent(share: float) -> str:
    return f"{100 * share:.2f}%"
