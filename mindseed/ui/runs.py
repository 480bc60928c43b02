"""Runs as their folders tell them (recipes/run_folder.py): figures of every step, samples, options.

A `Log` follows a log.jsonl that may be growing: it reads only what is new since it last looked, and begins again
where the file has become shorter, as it does when a run is taken up from a checkpoint. Curves are smoothed and thinned
before they are drawn; thinning keeps the lowest and the highest point of every stretch, so no spike gets lost.
"""
from __future__ import annotations

import json
import math
import threading
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindseed.base.config import flatten
from mindseed.base.files import folders_with

FRESH_S = 90.0                                    # a log that was written this lately belongs to a run at work
LOCK = threading.Lock()                           # logs are shared by all pages that are open


@dataclass(frozen=True, kw_only=True)
class Status:
    word: str                                     # "running", "done", "stopped", or "damaged": nothing can be read
    step: int
    steps: int | None                             # None: config.toml does not say
    left_s: float | None                          # None unless it is running and there is a speed


class Log:
    """The rows of one log.jsonl. Damaged lines are left out and counted."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "log.jsonl"
        self.rows: list[dict[str, Any]] = []
        self.damaged, self.offset = 0, 0

    def update(self) -> Log:
        with LOCK:
            try:
                with open(self.path, "rb") as file:
                    if file.seek(0, 2) < self.offset:
                        self.rows, self.damaged, self.offset = [], 0, 0
                    file.seek(self.offset)
                    new = file.read()
            except OSError:
                return self
            whole = new[:new.rfind(b"\n") + 1]                        # the last line may still be being written
            self.offset += len(whole)
            rows = list(self.rows)
            for line in filter(None, whole.split(b"\n")):
                try:
                    row = json.loads(line)
                    rows.append(row | {"step": int(row["step"])})
                except (ValueError, TypeError, KeyError, RecursionError):
                    self.damaged += 1
            self.rows = rows                                          # readers hold the old list or the new one
        return self

    def names(self) -> set[str]:
        return {name for row in self.rows for name in row}

    def series(self, name: str, over: str = "step") -> tuple[np.ndarray, np.ndarray]:
        """(x, y) where the value was logged and is finite; x is the step, the minutes or the tokens so far."""
        along = self.along(over)
        points = [(x, y) for x, y in zip(along, (number(row.get(name)) for row in self.rows)) if y is not None]
        xs, ys = zip(*points) if points else ((), ())
        return np.array(xs, float), np.array(ys, float)

    def along(self, over: str) -> list[float]:
        """Where every row stands. Minutes and tokens go on where a run was taken up again."""
        if over == "step":
            return [row["step"] for row in self.rows]
        out, total, last = [], 0.0, 0.0
        for row in self.rows:
            if over == "tokens":
                total += number(row.get("supervised")) or 0.0
            else:
                now = number(row.get("elapsed_s"))
                if now is not None:
                    total += (now - last if now >= last else now) / 60
                    last = now
            out.append(total)
        return out

    def last(self, name: str) -> float | None:
        return next((y for row in reversed(self.rows) if (y := number(row.get(name))) is not None), None)

    def samples(self) -> list[tuple[int, list[str]]]:
        """(step, the continuations that were printed then)."""
        found = [(row["step"], [v for k, v in row.items() if k.startswith("sample ") and isinstance(v, str)])
                 for row in self.rows]
        return [(step, texts) for step, texts in found if texts]

    def loads(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Of every mixture: (steps (n,), each expert's share of the visits (n, E))."""
        layers: dict[int, int] = {}
        for name in self.names():
            kind, _, place = name.partition("/")
            layer, _, expert = place.partition("/")
            if kind == "load" and layer.isdigit() and expert.isdigit():
                layers[int(layer)] = max(layers.get(int(layer), 0), int(expert) + 1)
        out = {}
        for layer, experts in sorted(layers.items()):
            keys = [f"load/{layer}/{e}" for e in range(experts)]
            rows = [(row["step"], [number(row.get(k)) for k in keys]) for row in self.rows]
            rows = [(step, shares) for step, shares in rows if None not in shares]
            out[layer] = (np.array([step for step, _ in rows]), np.array([shares for _, shares in rows]))
        return out

    def config(self) -> dict[str, Any]:
        """The run's options under dotted names; empty if config.toml is missing or broken."""
        try:
            return flatten(tomllib.loads((self.folder / "config.toml").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def about(self) -> dict[str, Any]:
        """run.json: command, commit, machine."""
        try:
            value = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def status(self, now: float | None = None) -> Status:
        steps = self.config().get("loop.steps")
        steps = steps if type(steps) is int else None
        step = self.rows[-1]["step"] if self.rows else 0
        if self.damaged and not self.rows:
            return Status(word="damaged", step=step, steps=steps, left_s=None)
        if steps is not None and step >= steps:
            return Status(word="done", step=step, steps=steps, left_s=None)
        try:
            fresh = (time.time() if now is None else now) - self.path.stat().st_mtime < FRESH_S
        except OSError:
            fresh = False
        if not fresh:
            return Status(word="stopped", step=step, steps=steps, left_s=None)
        minutes = self.along("minutes")
        recent = [(row["step"], at) for row, at in zip(self.rows, minutes)][-50:]
        done = recent[-1][0] - recent[0][0] if recent else 0
        left = (steps - step) * 60 * (recent[-1][1] - recent[0][1]) / done if steps and done else None
        return Status(word="running", step=step, steps=steps, left_s=left)


def number(value: Any) -> float | None:
    """A finite number, or None: what is no number in JSON (NaN) was logged as a string."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def find_runs(places: tuple[str, ...] | list[str]) -> list[Path]:
    """Folders that hold a log, in these places and up to three levels below; the one written last first."""
    found: dict[Path, float] = {}
    for place in map(Path, places):
        for folder in [place, *folders_with("log.jsonl", place)]:
            if (folder / "log.jsonl").is_file():
                found[folder] = (folder / "log.jsonl").stat().st_mtime
    return sorted(found, key=found.__getitem__, reverse=True)


def smooth(y: np.ndarray, weight: float) -> np.ndarray:
    """A running mean in which a value `n` steps old counts weight^n; without the pull to zero at the beginning."""
    out, total, mass = np.empty_like(y, float), 0.0, 0.0
    for i, value in enumerate(y):
        total, mass = total * weight + value, mass * weight + 1
        out[i] = total / mass
    return out


def thin(x: np.ndarray, y: np.ndarray, limit: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """At most about `limit` points: of each stretch its lowest and its highest, and both ends."""
    if len(x) <= limit:
        return x, y
    size = math.ceil(2 * len(x) / limit)
    kept = {0, len(x) - 1}
    for start in range(0, len(x), size):
        part = y[start:start + size]
        kept |= {start + int(part.argmin()), start + int(part.argmax())}
    at = sorted(kept)
    return x[at], y[at]


def differences(configs: dict[str, dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    """The options in which runs differ: (dotted name, the value in each run). Where they lie does not count."""
    names = list(dict.fromkeys(name for config in configs.values() for name in config))
    rows = [(name, [config.get(name) for config in configs.values()]) for name in names
            if name not in ("out", "resume")]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]
