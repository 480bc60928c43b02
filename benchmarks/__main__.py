"""All benchmarks, one after the other, or those named: `python -m benchmarks train_step decode`."""
from __future__ import annotations

import importlib
import subprocess
import sys

ALL = ("train_step", "packing", "engine", "speculation", "serving", "bpe_training", "moe", "optimizers")


def main() -> int:
    names = sys.argv[1:] or ALL
    unknown = [n for n in names if n not in ALL]
    if unknown:
        print(f"error: {unknown[0]!r} is not a benchmark; choose from {', '.join(ALL)}", file=sys.stderr)
        return 2
    for name in names:                            # a process each: threads, caches and memory start afresh
        print("---", (importlib.import_module(f"benchmarks.{name}").__doc__ or name).splitlines()[0], flush=True)
        if code := subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
