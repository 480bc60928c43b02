"""Write a model anew: another family's directory, another dtype, a directory from a bare state dict.

  mindseed convert runs/demo/fine-tune/model runs/half --dtype bf16               the same in half the bytes
  mindseed convert runs/demo/fine-tune/model runs/seed --to gguf --dtype q8_0     for llama.cpp and Ollama
  mindseed convert some/Llama runs/llama                      what the source is, it finds out by itself
  mindseed convert out/full_sft_768.pth runs/minimind         MiniMind's weights; no flags, shapes tell

Prints which tensors went where and ends by comparing the logits of both; if they differ, the exit code is 1. What the
target's format cannot express is refused with the reason. A GGUF file is read back as llama.cpp would read it and kept
only if it computes the same; beside runs/seed/seed.gguf lies a Modelfile: `ollama create seed -f runs/seed/Modelfile`.
"""
from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace

from mindseed.base.config import option
from mindseed.base.errors import UserError
from mindseed.base.log import say, table, warn
from mindseed.interop.convert import GGUF, TOLERANCE, convert, convert_gguf
from mindseed.interop.families import FAMILIES
from mindseed.interop.gguf import KINDS
from mindseed.interop.gguf_read import ROUNDING, TOLERANCE as GGUF_TOLERANCE


@dataclass(frozen=True, kw_only=True)
class Options:
    source: str = option("", help="the model directory or state dict to read", positional=True)
    target: str = option("", help="the model directory or GGUF file to write", positional=True)
    to: str | None = option(None, help=f"family of the target: {', '.join(FAMILIES)} [the first that can hold it]; or "
                                       "gguf")
    dtype: str | None = option(None, help=f"fp32, bf16 or fp16; for gguf {', '.join(KINDS)} [as in the source]")
    tokenizer: str | None = option(None, help="folder of tokenizer.json, for a bare state dict [beside it]")
    overwrite: bool = option(False, help="replace the target if it exists")
    drop_mtp: bool = option(False, help="for gguf: leave out the modules that predict further tokens")


def main(options: Options) -> int:
    if not options.source or not options.target:
        raise UserError("from where to where? mindseed convert SOURCE TARGET [--to llama] [--dtype bf16]")
    if options.to is None and options.target.endswith(".gguf"):
        options = replace(options, to="gguf")
    if options.to == "gguf":
        done = convert_gguf(options.source, options.target, dtype=options.dtype, tokenizer=options.tokenizer,
                            overwrite=options.overwrite, drop_mtp=options.drop_mtp)
        return report_gguf(done)
    if options.drop_mtp:
        raise UserError("drop_mtp has no effect without --to gguf: model directories keep these modules")
    done = convert(options.source, options.target, to=options.to, dtype=options.dtype, tokenizer=options.tokenizer,
                   overwrite=options.overwrite)
    table("tensors", ["here", "there", "shape", "number"], summary([(m.ours, m.theirs, m.shape) for m in done.mapped]))
    names = [str(dtype).removeprefix("torch.") for dtype in (done.before, done.after)]
    say(f"{done.source} -> {done.target}: {len(done.mapped)} tensors, {' -> '.join(dict.fromkeys(names))}, written to "
        f"{options.target}")
    if done.rounding:
        say(f"rounding moves logits by at most {done.rounding:.1e}")
    verdict = "equal" if done.good else "DIFFERENT: do not use the copy"
    say(f"logits of the copy: {verdict} (largest difference {done.difference:.1e}, allowed {TOLERANCE:.0e})")
    return 0 if done.good else 1


def report_gguf(done: GGUF) -> int:
    rows = summary([(w.ours.removesuffix(".weight"), w.theirs.removesuffix(".weight"), w.shape, w.kind)
                    for w in done.written])
    table("tensors (without .weight)", ["here", "there", "shape", "kind", "n"],
          [[here, there, shape.replace(" ", ""), *rest] for here, there, shape, *rest in rows])
    if done.rounding:
        say(f"rounding to {done.kind} moves logits by {done.rounding:.1%} of their size, root of the mean square "
            f"(allowed {ROUNDING[done.kind]:.0%})")
    verdict = "equal" if done.good else "DIFFERENT: the file is not kept, nothing was written"
    say(f"logits of the file, read back, against the weights rounded alike: {verdict} (largest difference "
        f"{done.difference:.1e} of the largest logit, allowed {GGUF_TOLERANCE:.0e})")
    if done.nfc:
        warn("this tokenizer composes characters first (NFC) and llama.cpp does not: text that is not composed yet "
             "gets other ids there")
    if done.good and "TEMPLATE" not in done.path.with_name("Modelfile").read_text(encoding="utf-8"):
        warn("the Modelfile has no TEMPLATE, since Ollama has a template language of its own: it goes by the chat "
             "template in the file if it knows that one, else write the TEMPLATE yourself; llama.cpp reads the file's")
    if done.good:
        say(f"{done.source} -> gguf: {len(done.written)} tensors, {done.kind}, written to {done.path}; for Ollama: "
            f"ollama create {shlex.quote(done.path.stem)} -f {shlex.quote(str(done.path.with_name('Modelfile')))}")
    return 0 if done.good else 1


def summary(mapped: list[tuple]) -> list[list[str]]:
    """One row per kind of tensor, layers counted; of (our name, theirs, shape, ...)."""
    rows: dict[tuple[str, ...], int] = {}
    for ours, theirs, shape, *more in mapped:
        here, there = (re.sub(r"\.\d+\.", ".{i}.", name) for name in (ours, theirs))
        there = re.sub(r"experts\.\{i\}\.|experts\.\d+\.", "experts.{e}.", there)
        key = (here, there, " x ".join(map(str, shape)), *more)
        rows[key] = rows.get(key, 0) + 1
    return [[*key, str(count)] for key, count in rows.items()]
