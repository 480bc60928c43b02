"""Write a model anew: another family's directory, another dtype, a directory from a bare state dict.

  mindseed convert some/Llama runs/llama                           what the source is, it finds out by itself
  mindseed convert out/full_sft_768.pth runs/minimind              MiniMind's weights; no flags, shapes tell
  mindseed convert runs/demo/model exported --to llama --dtype bf16

Prints which tensors went where and ends by comparing the logits of both; if they differ, the exit code is 1. What the
target's format cannot express is refused with the reason.
"""
from __future__ import annotations

import re
from dataclasses import dataclass

from mindseed.base.config import option
from mindseed.base.errors import UserError
from mindseed.base.log import say, table
from mindseed.interop.convert import TOLERANCE, Mapped, convert
from mindseed.interop.families import FAMILIES


@dataclass(frozen=True, kw_only=True)
class Options:
    source: str = option("", help="the model directory or state dict to read", positional=True)
    target: str = option("", help="the model directory to write", positional=True)
    to: str | None = option(None, help=f"family of the target: {', '.join(FAMILIES)} [the first that can hold it]")
    dtype: str | None = option(None, help="fp32, bf16 or fp16 [as in the source]")
    tokenizer: str | None = option(None, help="folder of tokenizer.json, for a bare state dict [beside it]")
    overwrite: bool = option(False, help="replace the target if it exists")


def main(options: Options) -> int:
    if not options.source or not options.target:
        raise UserError("from where to where? mindseed convert SOURCE TARGET [--to llama] [--dtype bf16]")
    done = convert(options.source, options.target, to=options.to, dtype=options.dtype, tokenizer=options.tokenizer,
                   overwrite=options.overwrite)
    table("tensors", ["here", "there", "shape", "number"], summary(done.mapped))
    names = [str(dtype).removeprefix("torch.") for dtype in (done.before, done.after)]
    say(f"{done.source} -> {done.target}: {len(done.mapped)} tensors, {' -> '.join(dict.fromkeys(names))}, written to "
        f"{options.target}")
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
        there = re.sub(r"experts\.\{i\}\.|experts\.\d+\.", "experts.{e}.", there)
        key = (here, there, " x ".join(map(str, m.shape)))
        rows[key] = rows.get(key, 0) + 1
    return [[*key, str(count)] for key, count in rows.items()]
