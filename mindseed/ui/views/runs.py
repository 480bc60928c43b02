"""Runs: curves of training while it goes on, several laid over each other, with samples and options."""
from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import streamlit as st

from mindseed.base.log import duration, si
from mindseed.ui import look, session
from mindseed.ui.runs import Log, differences, find_runs, smooth, thin
from mindseed.ui.studio import short_names
from mindseed.ui.words import gettext as _

MOST = 8                                          # runs at once, as many as there are colours
REFRESH_S = 2.0


def show() -> None:
    look.head(_("Runs"), _("training, while it goes on"))
    places = [*session.studio().runs, *(str(Path(m).parent) for m in session.studio().models)]
    runs = [str(folder) for folder in find_runs(places)]
    runs = list({str(Path(run).resolve()): run for run in runs}.values())
    if not runs:
        look.empty(_("No runs yet"), _("A run appears here with its first step. Start one:"),
                   "`mindseed demo`", "`mindseed train --data.train my-text.jsonl --depth 4 --out runs/base`",
                   _("Runs are looked for in {places}; `mindseed ui --runs DIR` names other folders.",
                     places=", ".join(f"`{place}`" for place in session.studio().runs)))
        return
    names = short_names(runs)
    sound = (run for run in runs if session.log_of(run).update().status().word != "damaged")
    chosen = st.multiselect(_("Runs"), runs, default=list(islice(sound, 2)) or runs[:1], format_func=names.__getitem__,
                            key="runs", max_selections=MOST, label_visibility="collapsed", persist_state="session",
                            placeholder=_("Choose runs"))
    with session.sidebar():
        axes = {"step": _("steps"), "minutes": _("minutes"), "tokens": _("tokens")}
        over = st.segmented_control(_("Along"), list(axes), default="step", key="over", required=True,
                                    format_func=axes.__getitem__)
        weight = st.slider(_("Smoothing"), 0.0, 0.99, 0.8, 0.01, key="smoothing",
                           help=_("How much a value counts that is one step older"))
        log_y = st.toggle(_("Logarithmic loss"), key="log_y")
        log_x = st.toggle(_("Logarithmic steps"), key="log_x")
        live = st.toggle(_("Refresh by itself"), True, key="live")
    if not chosen:
        look.empty(_("No run is chosen"), _("Choose one or several above."))
        return
    palette = look.colours()
    colours = {names[run]: palette[i % len(palette)] for i, run in enumerate(chosen)}
    logs = {names[run]: session.log_of(run) for run in chosen}
    running = any(log.update().status().word == "running" for log in logs.values())
    every = None if not live else REFRESH_S if running else 5 * REFRESH_S
    st.fragment(draw, run_every=every)(logs, colours, over, weight, log_x, log_y)
    details(logs)


def draw(logs: dict[str, Log], colours: dict[str, str], over: str, weight: float, log_x: bool, log_y: bool) -> None:
    """Everything that moves while a run goes on."""
    for log in logs.values():
        log.update()
    for name, log in logs.items():
        summary(name, log, colours[name])
    x_title = {"step": _("step"), "minutes": _("minutes"), "tokens": _("tokens")}[over]

    def curves(name: str, title: str, *, smoothed: bool = True, log_scale: bool = False, unit: str = "",
               points: bool = False, height: int = 210) -> bool:
        parts = {run: log.series(name, over) for run, log in logs.items()}
        parts = {run: xy for run, xy in parts.items() if len(xy[0])}
        if not parts:
            return False
        st.markdown(f"**{title}**" + (f" :gray[{unit}]" if unit else ""))
        picture = line_chart(parts, colours, weight if smoothed else 0.0, x_title, log_x=log_x and over != "minutes",
                             log_y=log_scale, points=points)
        look.chart(picture, height=height)
        return True

    def pair(i: int) -> list[Any]:
        with st.container(key=f"stack_curves_{i}"):
            return st.columns(2, gap="medium")

    curves("loss", _("Loss"), log_scale=log_y, unit=_("nats per token"), height=300)
    plan = [("bits_per_byte", _("Held-out text"), _("bits per byte"), False), ("lr", _("Learning rate"), "", False),
            ("grad_norm", _("Gradient norm"), "", True), ("tokens_per_s", _("Speed"), _("tokens/s"), True),
            ("load_max", _("Busiest expert"), _("multiple of the mean"), True),
            ("router_entropy", _("Router entropy"), _("0: sure, 1: all the same"), True)]
    known = set().union(*(log.names() for log in logs.values()))
    plan = [item for item in plan if item[0] in known]
    for i in range(0, len(plan), 2):
        for column, (name, title, unit, smoothed) in zip(pair(i), plan[i:i + 2]):
            with column:
                curves(name, title, smoothed=smoothed, unit=unit, points=name == "bits_per_byte")
    for name, log in logs.items():
        load(name, log, many=len(logs) > 1)


def summary(name: str, log: Log, colour: str) -> None:
    """One line of figures for a run."""
    status = log.status()
    word = {"running": _("running"), "done": _("done"), "stopped": _("stopped"), "damaged": _("damaged")}[status.word]
    of = f"{status.step:,} / {status.steps:,}" if status.steps else f"{status.step:,}"
    loss, bits, speed = log.last("loss"), log.last("bits_per_byte"), log.last("tokens_per_s")
    minutes = log.along("minutes")
    figures = [(_("step"), of), (_("loss"), f"{loss:.3f}" if loss is not None else "–"),
               (_("bits per byte"), f"{bits:.3f}" if bits is not None else "–"),
               (_("tokens/s"), si(speed) if speed else "–"),
               (_("left"), duration(status.left_s)) if status.left_s is not None
               else (_("time"), duration(60 * minutes[-1]) if minutes else "–")]
    with st.container(border=True, key=f"run_{name}"):
        with st.container(key=f"summary_{name}"):
            cells = st.columns([2.2, 1.5, 1, 1, 1, 1], vertical_alignment="center")
        tone = look.colours()[{"running": 2, "done": 7, "stopped": 1, "damaged": 4}[status.word]]
        cells[0].html(f'<div style="font-weight:640"><span class="seed-dot" style="background:{colour}"></span>'
                      f'{look.with_code(name)} <span class="seed-word" style="--c:{tone}">{word}</span></div>')
        for cell, (label, value) in zip(cells[1:], figures):
            cell.metric(label, value)
        if status.word == "running" and status.steps:
            st.progress(min(1.0, status.step / status.steps))
    if log.damaged:
        st.caption(_("{run}: lines of log.jsonl that are damaged and were left out: {n}", run=look.plain(name),
                     n=log.damaged))
    if not log.about() and (log.folder / "run.json").exists():
        st.caption(_("{run}: run.json is damaged, so its command and its machine are not known.", run=look.plain(name)))


def line_chart(parts: dict[str, tuple[np.ndarray, np.ndarray]], colours: dict[str, str], weight: float, x_title: str, *,
               log_x: bool, log_y: bool, points: bool) -> Any:
    """Curves, each faint as it was logged and strong as smoothed, with the values under the pointer."""
    strong, faint = [], []
    for run, (x, y) in parts.items():
        keep = (x > 0 if log_x else np.ones(len(x), bool)) & (y > 0 if log_y else True)
        x, y = x[keep], y[keep]
        if weight:
            faint.append(frame(run, *thin(x, y)))
        strong.append(frame(run, *thin(x, smooth(y, weight) if weight else y)))
    large = max(float(np.abs(y).max()) if len(y) else 0.0 for _x, y in parts.values()) >= 1000
    kind = lambda log: alt.Scale(type="log" if log else "linear", zero=False, nice=not log)         # noqa: E731
    base = dict(x=alt.X("x:Q", title=x_title, scale=kind(log_x), axis=alt.Axis(format="~s", grid=False, tickCount=7)),
                y=alt.Y("y:Q", title=None, scale=kind(log_y), axis=alt.Axis(
                    format="~s" if large else "~g", tickCount=5)),
                color=alt.Color("run:N", scale=alt.Scale(domain=list(colours), range=list(colours.values())),
                                legend=None))
    data = pd.concat(strong)
    line = alt.Chart(data).mark_line(strokeWidth=2, interpolate="linear", point={"size": 36} if points else False)
    near = alt.selection_point(nearest=True, on="pointerover", fields=["x"], empty=False)
    marks = alt.Chart(data).mark_point(size=55, filled=True).encode(
        **base, opacity=alt.condition(near, alt.value(1), alt.value(0)),
        tooltip=[alt.Tooltip("run:N", title=_("run")), alt.Tooltip("x:Q", title=x_title, format=",.6~g"),
                 alt.Tooltip("y:Q", title=_("value"), format=".5~g")]).add_params(near)
    layers = [alt.Chart(pd.concat(faint)).mark_line(strokeWidth=1, opacity=0.22).encode(**base)] if faint else []
    return alt.layer(*layers, line.encode(**base), marks)


def frame(run: str, x: np.ndarray, y: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"run": run, "x": x, "y": y})


def load(name: str, log: Log, *, many: bool) -> None:
    """The experts' shares of the visits over time, of one layer."""
    layers = log.loads()
    if not layers:
        return
    st.markdown(f"**{_('Load of the experts')}**" + (f" :gray[{name}]" if many else ""))
    layer = list(layers)[0]
    if len(layers) > 1:
        layer = st.segmented_control(_("Mixture"), list(layers), default=layer, key=f"mixture_{name}", required=True,
                                     format_func=lambda i: _("mixture {n}", n=i))
    steps, shares = layers[layer]
    experts = shares.shape[1]
    bins = np.array_split(np.arange(len(steps)), min(len(steps), 80))
    rows = [{"from": int(steps[at[0]]), "to": int(steps[at[-1]]) + 1, "expert": str(e),
             "load": float(shares[at, e].mean()) * experts} for at in bins for e in range(experts)]
    picture = alt.Chart(pd.DataFrame(rows)).mark_rect().encode(
        x=alt.X("from:Q", title=_("step"), scale=alt.Scale(nice=False), axis=alt.Axis(format="~s", grid=False)),
        x2="to:Q", y=alt.Y("expert:N", title=_("expert"), sort=[str(e) for e in range(experts)]),
        color=alt.Color("load:Q", title=_("× mean"), scale=look.heatmap_scale(0, 2)),
        tooltip=[alt.Tooltip("from:Q", title=_("step")), alt.Tooltip("expert:N", title=_("expert")),
                 alt.Tooltip("load:Q", title=_("× mean"), format=".2f")])
    look.chart(picture, height=max(90, min(26 * experts, 420)))


def details(logs: dict[str, Log]) -> None:
    """What does not move: samples, options."""
    samples, options = st.tabs([_("Samples"), _("Options")])
    with samples:
        for name, log in logs.items():
            found = log.samples()
            if len(logs) > 1:
                st.markdown(f"**{name}**")
            if not found:
                st.caption(_("This run has printed no samples (loop.sample_every)."))
                continue
            steps = [step for step, _texts in found]
            step = steps[-1]
            if len(steps) > 1:
                step = st.select_slider(_("Step"), steps, value=step, key=f"sample_{name}")
            for text in dict(found)[step]:
                st.code(text, language=None, wrap_lines=True)
    with options:
        if len(logs) > 1:
            rows = differences({name: log.config() for name, log in logs.items()})
            st.markdown(f"**{_('Where they differ')}**")
            st.dataframe(pd.DataFrame([[option, *map(str, values)] for option, values in rows],
                                      columns=[_("option"), *logs]), hide_index=True, width="stretch")
        for name, log in logs.items():
            about = log.about()
            with st.expander(name, expanded=len(logs) == 1, icon=":material/settings:"):
                if about.get("command"):
                    st.code(str(about["command"]), language="shell", wrap_lines=True)
                facts = [(_("started"), about.get("started")), (_("machine"), about.get("machine")),
                         (_("version"), about.get("version")), (_("commit"), about.get("commit"))]
                st.caption(" · ".join(f"{label}: {told(value)}" for label, value in facts if value))
                file = log.folder / "config.toml"
                st.code(file.read_text(encoding="utf-8") if file.exists() else _("config.toml is missing"),
                        language="toml", wrap_lines=True, height=420)


def told(value: Any) -> str:
    return ", ".join(f"{v}" for v in value.values()) if isinstance(value, dict) else str(value)


if __name__ == "__main__":
    show()
