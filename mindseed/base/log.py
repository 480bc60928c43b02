"""What a run says: one line per step for people, one JSON object per step for programs, and trackers for both.

    step 120/2000  loss 3.412  41.2k tok/s  mfu 37.1%  grad 0.82  lr 3.0e-04  mem 11.3 GB

The order and the units never change, so that eyes and grep can rely on them. Trackers are sinks of the same values;
each is imported only when it is asked for, and none of them talks to a network unless its own settings say so.
"""
from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mindseed.base.errors import UserError
from mindseed.base.extras import install
from mindseed.base.files import misfit, parse_json

console = Console(highlight=False)                           # stdout: results
notes = Console(stderr=True, highlight=False)                # stderr: warnings, progress
YEAR_S = 365.25 * 24 * 3600


def say(text: str) -> None:
    """A line for the reader, on stdout."""
    console.print(text, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """A line that something is not as the user may think, on stderr."""
    notes.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)


def table(title: str, header: list[str], rows: list[list[str]], *, stream: Console | None = None) -> None:
    """Print a table; the first column is left-aligned, the rest right-aligned as figures want."""
    grid = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(header):
        grid.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    (stream or console).print(grid)


# ------------------------------------------------------------------------------------------------------------- figures

def si(value: float, digits: int = 3) -> str:
    """A count with a metric suffix and `digits` significant digits: 41234 -> 41.2k, 25_800_000 -> 25.8M."""
    for limit, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * (1 - 0.5 * 10.0**-digits):
            return f"{trim(value / limit, digits)}{suffix}"
    return trim(value, digits) if isinstance(value, float) and value != int(value) else str(int(value))


def trim(value: float, digits: int) -> str:
    whole = len(str(int(abs(value))))
    return f"{value:.{max(digits - whole, 0)}f}"


def units(value: float, unit: str) -> str:
    """A quantity with its unit: units(9.7e10, "FLOP/s") -> 97.0 GFLOP/s."""
    text = si(value)
    number = text.rstrip("kMGTP")
    return f"{number} {text[len(number):]}{unit}"


def bytes_text(count: float) -> str:
    """Bytes in decimal units: 11.3 GB."""
    return units(float(count), "B")


def duration(seconds: float) -> str:
    """0:42, 5:07, 2:03:09, 3d 04:05:06, 2.4 years, or 1,230,000 years."""
    if not math.isfinite(seconds):
        return "?"
    if (years := seconds / YEAR_S) >= 1:
        return f"{years:.1f} years" if years < 100 else f"{float(f'{years:.3g}'):,.0f} years"
    minutes, s = divmod(int(round(seconds)), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days}d {h:02}:{m:02}:{s:02}" if days else f"{h}:{m:02}:{s:02}" if h else f"{m}:{s:02}"


def step_line(step: int, steps: int, values: dict[str, float], unit: str = "step") -> str:
    """The line of one optimiser step, or of another unit of work. Known values come first in their fixed order; a value
    that is absent is left out.

    `values` may hold loss, tokens_per_s, mfu (a fraction), grad_norm, lr, memory_bytes; others follow by name, but
    for those of one part of many (load/3/7), which only programs want. Terms of a reward (reward/accuracy) are shown.
    """
    parts = [f"{unit} {step}/{steps}"]
    parts += [form(values[name]) for name, form in STEP_FIELDS.items() if values.get(name) is not None]
    parts += [f"{name} {plain(value)}" for name, value in values.items()
              if name not in STEP_FIELDS and ("/" not in name or name.startswith("reward/"))]
    return "  ".join(parts)


STEP_FIELDS: dict[str, Callable[[float], str]] = {
    "loss": lambda v: f"loss {v:.3f}",
    "tokens_per_s": lambda v: f"{si(v)} tok/s",
    "mfu": lambda v: f"mfu {100 * v:.1f}%",
    "grad_norm": lambda v: f"grad {v:.2f}",
    "lr": lambda v: f"lr {v:.1e}",
    "memory_bytes": lambda v: f"mem {bytes_text(v)}",
}


def plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --------------------------------------------------------------------------------------------------------------- sinks

class Sink(Protocol):
    """Where metrics go. `values` are plain numbers (or short strings, which a tracker may leave out)."""

    def write(self, step: int, values: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class JsonlSink:
    """One JSON object a line, appended and flushed at once: a killed run loses at most the line being written.

    A line that such a kill left unfinished is cut off on opening. Numbers that JSON lacks (NaN, infinities) are
    written as strings.
    """

    def __init__(self, path: Path | str) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a+b")
        self.cut_unfinished()

    def cut_unfinished(self) -> None:
        size = self.file.seek(0, os.SEEK_END)
        self.file.seek(max(size - 65536, 0))
        tail = self.file.read()
        if tail and not tail.endswith(b"\n"):
            self.file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        row = {"step": step, "time": round(time.time(), 3), **values}
        row = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        try:
            self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"could not write {self.file.name}: {error.strerror}; free some space") from None

    def close(self) -> None:
        self.file.close()


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """The rows a JsonlSink wrote; an unfinished last line is left out. UserError for any other damaged line."""
    rows = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        if line:
            try:
                row = parse_json(line)
                problem = misfit(row, {"step": int})
            except ValueError as error:
                problem = str(error)
            if problem:
                raise UserError(f"{path}:{number} is damaged ({problem}); delete that line")
            rows.append(row)
    return rows


class TensorboardSink:
    """Event files beside the run; look with `tensorboard --logdir runs`."""

    def __init__(self, folder: Path | str, config: dict[str, Any], name: str) -> None:
        with extra("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(Path(folder) / "tensorboard"))
        self.writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```")

    def write(self, step: int, values: dict[str, Any]) -> None:
        for key, value in numbers(values).items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class WandbSink:
    """Offline unless WANDB_MODE says otherwise; `wandb sync` uploads later."""

    def __init__(self, folder: Path | str, config: dict[str, Any], name: str) -> None:
        with extra("wandb"):
            import wandb
        mode = os.environ.get("WANDB_MODE", "offline")
        self.run = wandb.init(project="mindseed", name=name, dir=str(folder), config=config, mode=mode)

    def write(self, step: int, values: dict[str, Any]) -> None:
        self.run.log(numbers(values), step=step)

    def close(self) -> None:
        self.run.finish()


class SwanlabSink:
    """Local unless SWANLAB_MODE says otherwise."""

    def __init__(self, folder: Path | str, config: dict[str, Any], name: str) -> None:
        with extra("swanlab"):
            import swanlab
        self.swanlab = swanlab
        mode = os.environ.get("SWANLAB_MODE", "offline")
        swanlab.init(project="mindseed", experiment_name=name, logdir=str(Path(folder) / "swanlab"), config=config,
                     mode=mode)

    def write(self, step: int, values: dict[str, Any]) -> None:
        self.swanlab.log(numbers(values), step=step)

    def close(self) -> None:
        self.swanlab.finish()


class TrackioSink:
    """A local database that `trackio show` draws; TRACKIO_SPACE_ID would make it remote."""

    def __init__(self, folder: Path | str, config: dict[str, Any], name: str) -> None:
        os.environ.setdefault("TRACKIO_DIR", str((Path(folder) / "trackio").resolve()))
        with extra("trackio"):
            import trackio
        self.run = trackio.init(project="mindseed", name=name, config=config)

    def write(self, step: int, values: dict[str, Any]) -> None:
        self.run.log(numbers(values), step=step)

    def close(self) -> None:
        self.run.finish()


SINKS: dict[str, Callable[..., Sink]] = {
    "tensorboard": TensorboardSink, "wandb": WandbSink, "swanlab": SwanlabSink, "trackio": TrackioSink}


def check_sinks(names: tuple[str, ...]) -> None:
    """UserError for a tracker that is unknown or not installed, before any work is done."""
    for name in names:
        if name not in SINKS:
            raise UserError(f"tracker {name!r} is not known; choose from {', '.join(SINKS)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed: {install(name)}")


def open_sinks(names: tuple[str, ...], folder: Path | str, config: dict[str, Any], name: str) -> list[Sink]:
    """The JSONL file `<folder>/log.jsonl`, always, and the trackers asked for (see `check_sinks`)."""
    check_sinks(names)
    trackers = [SINKS[n](folder, config, name) for n in names]
    return [JsonlSink(Path(folder) / "log.jsonl"), *trackers]


class extra:
    """`with extra("wandb"): import wandb`: a missing package becomes a UserError that says how to install it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ImportError):
            raise UserError(f"{self.name} is not installed: {install(self.name)}") from error


def numbers(values: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


# ------------------------------------------------------------------------------------------------------------ progress

class StepBar:
    """The progress of a training run: a bar with the time left and the newest step line under it, or plain lines.

    Where stderr is not a terminal, a line is printed about every `every_s` seconds and for the last step. `enabled` is
    False on all ranks but the first; `unit` is what is counted. Use as a context manager; `say` prints above the bar.
    """

    def __init__(self, steps: int, *, start: int = 0, enabled: bool = True, every_s: float = 10.0,
                 unit: str = "step") -> None:
        self.steps, self.start, self.enabled, self.every_s, self.unit = steps, start, enabled, every_s, unit
        self.began, self.printed = time.monotonic(), -math.inf
        self.live: Live | None = None
        if enabled and notes.is_terminal:
            self.live = Live(self.draw(start, f"{unit} {start}/{steps}", ""), console=notes, refresh_per_second=4)

    def __enter__(self) -> StepBar:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def draw(self, step: int, line: str, left: str) -> Group:
        """The bar, and under it the line, wrapped if the terminal is narrow."""
        bar = Table.grid(padding=(0, 2))
        bar.add_row(ProgressBar(total=self.steps, completed=step, width=40), f"{step / max(self.steps, 1):.0%}  {left}")
        return Group(bar, Text(line))

    def update(self, step: int, values: dict[str, float]) -> None:
        """`step` optimiser steps are done; `values` as for `step_line`."""
        if not self.enabled:
            return
        now = time.monotonic()
        left = f"left {duration((now - self.began) / max(step - self.start, 1) * (self.steps - step))}"
        line = step_line(step, self.steps, values, self.unit)
        if self.live:
            self.live.update(self.draw(step, line, left))
        elif now - self.printed >= self.every_s or step == self.steps:
            self.printed = now
            print(f"{line}  {left}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A lasting line, above the bar if there is one."""
        if self.enabled:
            notes.print(text, markup=False, soft_wrap=True)
