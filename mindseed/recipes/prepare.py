"""Tokenise files once into a folder of memory-mapped shards, from which `train` and `show-batch` read.

Files are .jsonl, .jsonl.gz, .jsonl.zst, .parquet and .txt, or folders and globs of them. Rows are texts,
conversations (messages, conversations, Alpaca), preference pairs (chosen, rejected), answers judged one by one (prompt,
completion, label) or in steps (prompt, steps, labels). A killed run continues where it stopped when the same command is
given again; a finished one does nothing.
"""
from __future__ import annotations

import time
from dataclasses import dataclass

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mindseed.base.config import option
from mindseed.base.errors import UserError
from mindseed.base.log import bytes_text, notes, say, si, warn
from mindseed.data.prepare import SHARD_TOKENS, prepare
from mindseed.data.shards import Prepared
from mindseed.tokenizers.hf_json import load_tokenizer
from mindseed.tokenizers.template import foreign, read_template


@dataclass(frozen=True, kw_only=True)
class Options:
    paths: tuple[str, ...] = option((), help="files, folders or globs to read", positional=True)
    out: str = option("", help="the folder to make")
    tokenizer: str = option("", help="a tokenizer.json, or the directory (of a model, say) that holds one; "
                                   "conversations are told in the chat template beside it, if there is one")
    heldout: float = option(0.01, help="share of rows set apart for validation, chosen by a hash of their content")
    seed: int = option(0, help="which rows are set apart")
    workers: int | None = option(None, help="processes; none: one per core")
    shard_tokens: int = option(SHARD_TOKENS, help="tokens per shard, about; what a kill can lose")
    max_skipped: float = option(0.01, help="bad lines put up with: below 1 a share of the rows (10 always), else a "
                                           "number; 0: none")
    fim_rate: float = option(0.0, help="share of the texts to train on that are told with their middle last "
                                       "(fill in the middle; 0.1 is usual)")
    overwrite: bool = option(False, help="replace what other inputs left in the folder, or what is damaged")


def main(options: Options) -> None:
    for name in ("paths", "out", "tokenizer"):
        if not getattr(options, name):
            raise UserError(f"--{name} is required: mindseed prepare FILES --out FOLDER --tokenizer TOKENIZER")
    tokenizer, start = load_tokenizer(options.tokenizer), time.perf_counter()
    columns = SpinnerColumn(), TextColumn("{task.completed:,} rows  {task.fields[parts]} shards  "
                                          "{task.fields[skipped]} skipped"), TimeElapsedColumn()
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task("prepare", total=None, parts=0, skipped=0)
        prepared = prepare(
            options.paths, options.out, tokenizer, heldout=options.heldout, seed=options.seed, workers=options.workers,
            shard_tokens=options.shard_tokens, max_skipped=options.max_skipped, fim_rate=options.fim_rate,
            overwrite=options.overwrite, template=foreign(*read_template(options.tokenizer)),
            progress=lambda rows, parts, skipped: bar.update(task, completed=rows, parts=parts, skipped=skipped))
    report(prepared, time.perf_counter() - start)


def report(prepared: Prepared, seconds: float) -> None:
    """Say what is in the folder, and which lines are not."""
    manifest = prepared.manifest
    rows, sources = manifest["rows"], manifest["sources"]
    say(f"{prepared.folder}: {rows['total']:,} rows of kind {prepared.kind} from {len(sources)} "
        f"file{'s' * (len(sources) != 1)}, {seconds:.1f} s")
    for name, split in manifest["splits"].items():
        ratio = f", {split['bytes'] / split['supervised']:.2f} bytes per learned token" if split["supervised"] else ""
        say(f"  {name:8} {split['documents']:>10,} documents  {si(split['tokens']):>6} tokens  "
            f"{si(split['supervised']):>6} learned  {bytes_text(split['bytes'])}{ratio}")
    for line in manifest["skipped"][:10]:
        warn(f"skipped {line}")
    if more := len(manifest["skipped"]) - 10 if len(manifest["skipped"]) > 10 else 0:
        warn(f"and {more} more, listed in {prepared.folder / 'manifest.json'}")
    if not manifest["splits"]["heldout"]["documents"] and manifest["heldout"]:
        warn("no row fell into the held-out split, so there is nothing to validate on; give more rows, or a larger "
             "heldout")
