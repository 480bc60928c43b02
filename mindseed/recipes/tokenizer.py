"""Train a tokenizer on your text and report how well it compresses Chinese and English.

  mindseed tokenizer corpus.jsonl --out runs/tokenizer --vocab_size 6400
  mindseed train --data.train corpus.jsonl --data.tokenizer runs/tokenizer       as does `mindseed plan`
  mindseed prepare corpus.jsonl --out runs/data --tokenizer runs/tokenizer       as does `mindseed convert`

The text is a sample of the corpus, drawn document by document, in one pass that holds no more than `max_bytes`. A
fiftieth of it is set aside and only measured. The folder that is written is one for transformers' AutoTokenizer too.
"""
from __future__ import annotations

import heapq
import os
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Literal

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mindseed.base.config import option
from mindseed.base.errors import UserError
from mindseed.base.log import bytes_text, notes, say, table, warn
from mindseed.data.readers import read_rows, row_texts
from mindseed.tokenizers.base import ByteLevel, require_unicode
from mindseed.tokenizers.bpe_train import train
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.chat import JINJA
from mindseed.tokenizers.hf_json import save_tokenizer

MEASURED = 0.02                                   # share of the sample that is set aside to measure compression
HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
LATIN = re.compile(r"[A-Za-z]")


@dataclass(frozen=True, kw_only=True)
class Options:
    data: tuple[str, ...] = option((), help="files, folders or globs to learn from", positional=True)
    out: str = option("", help="the folder to write tokenizer.json into")
    vocab_size: int = option(6400, help="tokens in all: 36 special ones, 256 bytes and what is learnt (bpe)")
    kind: Literal["bpe", "byte"] = option("bpe", help="bpe: learnt from the data; byte: one token per byte")
    max_bytes: int = option(20_000_000, help="bytes of text to learn from; 20 MB take about 0.8 GB of memory")
    workers: int | None = option(None, help="processes that cut the text into words; none: one per core")
    seed: int = option(0, help="which documents are drawn when there are more than max_bytes")
    overwrite: bool = option(False, help="replace the tokenizer that is there")

    def __post_init__(self) -> None:
        for name in ("max_bytes", "workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


def main(options: Options) -> None:
    if not options.data or not options.out:
        raise UserError("name the text and a folder: mindseed tokenizer FILES --out FOLDER")
    if Path(options.out).is_file():
        raise UserError(f"--out {options.out} is a file; name a folder")
    if (Path(options.out) / "tokenizer.json").exists() and not options.overwrite:
        raise UserError(f"{options.out} has a tokenizer already, and a model may need it; choose another folder or add "
                        "--overwrite")
    start = time.perf_counter()
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), TimeElapsedColumn()
    with Progress(*columns, console=notes, transient=True) as bar:
        task = bar.add_task("", total=None)

        def progress(stage: str, done: int, total: int) -> None:
            amount = f"{done}/{total}" if total else f"{done / 1e6:.1f} million"
            bar.update(task, description=f"{stage} {amount}", completed=done, total=total or None)

        learn, measure = draw(read_texts(options.data), options.max_bytes, options.seed, progress)
        if options.kind == "byte":
            tokenizer: ByteLevel = Byte()
        else:
            workers = options.workers or os.cpu_count() or 1
            tokenizer = train(learn, vocab_size=options.vocab_size, workers=workers, progress=progress)
    save_tokenizer(tokenizer, options.out, chat_template=JINJA)
    say(f"{options.out}: {options.kind}, {tokenizer.vocab_size} tokens, {len(tokenizer.specials)} of them special, from"
        " "
        f"{len(learn):,} texts ({bytes_text(size(learn))}), {time.perf_counter() - start:.1f} s")
    if options.kind == "bpe" and tokenizer.vocab_size < options.vocab_size:
        warn(f"the text has too few repetitions for {options.vocab_size} tokens; give it more text, or a smaller "
             "vocab_size")
    report(tokenizer, measure or learn, "set aside" if measure else "it was trained on")


def read_texts(data: tuple[str, ...]) -> Iterable[str]:
    """Every text of the files. A bad row is skipped and named, the first few of them with their reasons. UserError
    where all rows are bad."""
    skipped, any_good, first = 0, False, ""

    def bad(file: str, line: int, reason: str) -> None:
        nonlocal skipped, first
        skipped += 1
        first = first or f"{file}:{line}: {reason}"
        if skipped <= 5:
            warn(f"skipped {file}:{line}: {reason}")

    for row in read_rows(data, bad=bad):
        for text in row_texts(row.row):
            try:
                require_unicode(text)
            except UserError as error:
                bad(row.file, row.line, str(error))
            else:
                any_good = True
                yield text
    if skipped and not any_good:
        raise UserError(f"no row holds text to learn from; {skipped:,} skipped, the first {first}")
    if skipped > 5:
        warn(f"and {skipped - 5:,} more bad rows were skipped")


def draw(texts: Iterable[str], max_bytes: int, seed: int,
         progress: Callable[[str, int, int], None]) -> tuple[list[str], list[str]]:
    """A uniform sample of whole texts of at most `max_bytes`, as (to learn from, to measure), in one pass.

    Every text gets a random key, and those with the smallest keys are kept: a heap lets the largest go.
    """
    rng = random.Random(seed)
    heap: list[tuple[float, int, bool, str]] = []                         # (-key, position, to measure, text)
    kept = read = 0
    for position, text in enumerate(texts):
        length = len(text.encode())
        heapq.heappush(heap, (-rng.random(), position, rng.random() < MEASURED, text))
        kept, read = kept + length, read + length
        while kept > max_bytes and len(heap) > 1:
            kept -= len(heapq.heappop(heap)[3].encode())
        if position % 1000 == 0:
            progress("reading bytes", read, 0)
    heap.sort(key=lambda item: item[1])
    return [text for _, _, measured, text in heap if not measured], [text for *_, measured, text in heap if measured]


def report(tokenizer: ByteLevel, texts: list[str], which: str) -> None:
    """Print the compression of Chinese, English and other text apart: they differ, and an average would hide it."""
    rows = []
    for language in ("Chinese", "English", "other"):
        if mine := [text for text in texts if language_of(text) == language]:
            tokens = sum(map(len, tokenizer.encode_batch(mine)))
            rows.append([language, bytes_text(size(mine)), f"{size(mine) / tokens:.2f}",
                         f"{sum(map(len, mine)) / tokens:.2f}"])
    table(f"compression on text {which}", ["language", "text", "bytes per token", "characters per token"], rows)


def language_of(text: str) -> str:
    """By the letters: "Chinese" if a third of them are Han characters, else "English" if half of the characters are
    Latin letters, else "other" (tables, formulas, other scripts)."""
    han, latin, visible = len(HAN.findall(text)), len(LATIN.findall(text)), len("".join(text.split()))
    if 3 * han >= han + latin and han:
        return "Chinese"
    return "English" if 2 * latin >= visible else "other"


def size(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)
