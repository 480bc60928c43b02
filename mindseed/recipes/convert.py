"""Write a model directory anew: a foreign Qwen3 directory becomes ours, or the weights change their dtype.

Prints which tensors went where and ends by comparing logits of both directories; if they differ, the exit code is 1.
"""
from __future__ import annotations

import re
from dataclasses import dataclass

from mindseed.base.config import option
from mindseed.base.errors import UserError
from mindseed.base.log import say, table
from mindseed.interop.convert import TOLERANCE, Mapped, convert


@dataclass(frozen=True, kw_only=True)
class Options:
    source: str = option("", help="the model directory to read", positional=True)
    target: str = option("", help="the model directory to write", positional=True)
    dtype: str | None = option(None, help="fp32, bf16 or fp16 [as in the source]")
    overwrite: bool = option(False, help="replace the target if it exists")


def main(options: Options) -> int:
    if not options.source or not options.target:
        raise UserError("from where to where? mindseed convert SOURCE TARGET [--dtype bf16]")
    done = convert(options.source, options.target, dtype=options.dtype, overwrite=options.overwrite)
    table("tensors", ["here", "there", "shape", "layers"], summary(done.mapped))
    names = [str(dtype).removeprefix("torch.") for dtype in (done.before, done.after)]
    say(f"{len(done.mapped)} tensors, {' -> '.join(dict.fromkeys(names))}, written to {options.target}")
    if done.rounding:
        say(f"rounding moves logits by at most {done.rounding:.1e}")
    verdict = "equal" if done.good else "DIFFERENT: do not use the copy"
    say(f"logits of the copy: {verdict} (largest difference {done.difference:.1e}, allowed {TOLERANCE:.0e})")
    return 0 if done.good else 1


def summary(mapped: list[Mapped]) -> list[list[str]]:
    """One row per kind of tensor, layers counted."""
    rows: dict[tuple[str, ...], int] = {}
    for m in mapped:
        here, there = (re.sub(r"\.\d+\.", ".{i}.", name) for name in (m.ours, m.theirs))
        key = (here, there, " x ".join(map(str, m.shape)))
        rows[key] = rows.get(key, 0) + 1
    return [[*key, str(count)] for key, count in rows.items()]
