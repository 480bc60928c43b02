"""All benchmarks, one after the other, or those named: `python -m benchmarks train_step engine`."""
from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ALL = ("train_step", "packing", "engine", "speculation", "serving", "bpe_training", "moe", "optimizers",
       "qlora", "memory_plan", "plan_time", "ranks", "tradeoffs", "post_step", "attention")


def main() -> int:
    names = sys.argv[1:] or ALL
    if {"-h", "--help", "help"} & {*names}:
        print(f"{__doc__} They write their tables to docs/BENCHMARKS.md.\n")
        for name in ALL:
            print(f"  {name:14s} {title(name)}")
        return 0
    unknown = [n for n in names if n not in ALL]
    if unknown:
        print(f"error: {unknown[0]!r} is not a benchmark; choose from {', '.join(ALL)}", file=sys.stderr)
        return 2
    for name in names:                            # a process each: threads, caches and memory start afresh
        print("---", title(name), flush=True)
        if code := subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode:
            return code
    return 0


def title(name: str) -> str:
    """The first line of its docstring, without running anything."""
    source = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or name).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
