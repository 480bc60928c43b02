"""What all benchmarks share: measure things side by side, in turn, and keep the table in docs/BENCHMARKS.md.

Machines are noisy and drift, so a figure is a ratio of two things measured in one run, A B A B ..., and the median of
the ratios pair by pair. Every benchmark module has `NAME`, `main()`, and calls `report` with its rows.
"""
from __future__ import annotations

import gc
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable

from mindseed.base.files import write_text
from mindseed.base.hardware import describe_machine

PAGE = Path(__file__).parents[1] / "docs" / "BENCHMARKS.md"
ROUNDS = 5


def reference(benchmark: str):
    """The module transformers, against which we are measured; where it is missing, one line and exit code 2."""
    try:
        import transformers
    except ImportError:
        print(f"error: this compares with transformers, which is not installed; make bench ARGS={benchmark} installs "
              "what it needs first", file=sys.stderr)
        raise SystemExit(2) from None
    return transformers


def in_turn(parts: dict[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Call every part once per round, in order; what they return (seconds, or any figure), by name."""
    figures: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, part in parts.items():
            gc.collect()
            figures[name].append(part())
    return figures


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratio(a: list[float], b: list[float]) -> float:
    """The median of a/b, pair by pair."""
    return statistics.median(x / y for x, y in zip(a, b))


def spread(values: list[float], digits: int = 3) -> str:
    """median (min to max)"""
    return f"{statistics.median(values):.{digits}g} ({min(values):.{digits}g} to {max(values):.{digits}g})"


def in_process(module: str, *arguments: str) -> dict:
    """Run `python -m module arguments` and parse the JSON object on its last line: for peak memory, which is per
    process, and for settings that must not leak."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(name: str, title: str, header: list[str], rows: list[list[str]], *, command: str, notes: str = "",
           page: Path | None = None) -> None:
    """Print the table and put it in the section `name` of docs/BENCHMARKS.md (or another page), with date, machine and
    command."""
    path = page or PAGE
    machine = describe_machine()
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    text = "\n".join(lines)
    print(f"\n{title}\n\n{text}\n{notes}")
    facts = ", ".join(f"{key} {value}" for key, value in machine.items())
    section = (f"<!-- {name} -->\n## {title}\n\n{text}\n\n{notes + chr(10) + chr(10) if notes else ''}"
               f"`{command}`, {time.strftime('%Y-%m-%d')}, on: {facts}.\n<!-- end {name} -->")
    text = path.read_text(encoding="utf-8") if path.exists() else "# Benchmarks\n"
    pattern = re.compile(rf"<!-- {re.escape(name)} -->.*?<!-- end {re.escape(name)} -->", re.S)
    write_text(path, pattern.sub(lambda _: section, text) if pattern.search(text)
               else f"{text.rstrip()}\n\n{section}\n")
