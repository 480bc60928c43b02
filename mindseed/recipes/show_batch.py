"""Print what a batch trains on: green is learned, grey is only read, dots are padding, a bar begins a document.

Where there are no colours, in a pipe or a file, what is learned stands in ⟦brackets⟧.
The rows are those that training would see with the same seed, length and packing. Whoever wonders why a model answers
with its user's words looks here first.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from rich.text import Text

from mindseed.base.config import load_toml, option
from mindseed.base.errors import UserError
from mindseed.base.log import console, say
from mindseed.core import Batch, Tokenizer
from mindseed.data.loader import PackedSource
from mindseed.data.pack import Strategy
from mindseed.data.shards import Prepared
from mindseed.recipes.options import LONGEST, ROW, TrainOptions

BRACKETS = "⟦⟧"
STYLES = {"learned": "green", "read": "bright_black", "border": "bold cyan", "padding": "bright_black"}


@dataclass(frozen=True, kw_only=True)
class Options:
    data: str = option("", help="a folder that `mindseed prepare` made, or that of a run", positional=True)
    entry: int = option(0, help="of a run: which entry of its data.train, counted from 0")
    split: str = option("train", help="train or heldout")
    seq_len: int | None = option(None, help="slots in a row [the run's, else 512]")
    rows: int = option(4, help="rows to print")
    first: int = option(0, help="where in the stream to begin, in rows")
    packing: Strategy | None = option(None, help="how documents share rows [the run's, else best-fit]")
    seed: int | None = option(None, help="seed of the stream [the run's, else 0]")


def main(options: Options) -> None:
    if not options.data:
        raise UserError("--data is required: mindseed show-batch FOLDER")
    options = settled(options)
    for name, least, most in (("rows", 1, 1000), ("first", 0, 1 << 62), ("seq_len", 1, LONGEST)):
        if not least <= getattr(options, name) <= most:
            raise UserError(f"{name}={getattr(options, name)} must lie between {least} and {most}")
    prepared = Prepared(options.data)
    source = PackedSource(prepared.split(options.split), seq_len=options.seq_len, batch_size=options.rows,
                          seed=options.seed, strategy=options.packing)
    source.load_state_dict({**source.state_dict(), "rows_seen": options.first})
    batch, tokenizer = next(source), prepared.tokenizer()
    brackets = BRACKETS if console.no_color or console.color_system is None else ""
    say(f"{options.data}, {options.split}: {source.rows.stats}")
    console.print(legend(brackets), soft_wrap=True)
    for b, row in enumerate(batch.extra["row"].tolist()):
        names = source.describe([row])
        learned, used = int(batch.weights[b].sum()), padding_start(batch, b)
        console.print(f"\nrow {row}: {len(names)} document{'s' * (len(names) != 1)}, {used} of {options.seq_len} slots "
                      f"used, {learned} learned", style="bold")
        console.print(paint(batch, b, tokenizer, names, brackets), soft_wrap=True)


def settled(options: Options) -> Options:
    """`options` with a prepared folder for that of a run, and the run's settings where none are given."""
    folder, own = Path(options.data), TrainOptions()
    if (folder / "config.toml").exists() and not (folder / "manifest.json").exists():
        own = load_toml(TrainOptions, folder / "config.toml")
        if not 0 <= options.entry < len(own.data.train):
            raise UserError(f"entry={options.entry}: {folder} was trained on {len(own.data.train)} entries, the first "
                            "of which is 0")
        entry = Path(own.data.train[options.entry])
        made = sorted((folder / "data").glob(f"{options.entry}-*"))
        folder = entry if (entry / "manifest.json").exists() or not made else made[0]
    elif options.entry:
        raise UserError(f"entry={options.entry} has no effect: {folder} is not the folder of a run")
    length = (own.data.seq_len or ROW) if options.seq_len is None else options.seq_len
    return replace(options, data=str(folder), seq_len=length,
                   packing=options.packing or own.data.packing,
                   seed=own.seed if options.seed is None else options.seed)


def padding_start(batch: Batch, b: int) -> int:
    """The number of slots that row b uses: what follows is position 0 and weight 0 to the end."""
    used = torch.nonzero((batch.positions[b] > 0) | (batch.weights[b] > 0) | (batch.targets[b] > 0))
    return int(used.max()) + 1 if len(used) else 0


def legend(brackets: str) -> Text:
    return Text("   ").join([Text(f"{brackets[:1]}learned{brackets[1:]}", STYLES["learned"]),
                             Text("only read", STYLES["read"]), Text("▌ a document begins", STYLES["border"]),
                             Text("··· padding", STYLES["padding"])])


def paint(batch: Batch, b: int, tokenizer: Tokenizer, names: list[str], brackets: str = "") -> Text:
    """Row b in colours, what is learned in `brackets` as well. The first token of a document predicts, but is predicted
    by nothing, so it is never learned."""
    text, used = Text(), padding_start(batch, b)
    ids, targets, weights, positions = (x[b, :used].tolist() for x in
                                        (batch.ids, batch.targets, batch.weights, batch.positions))
    tokens: list[tuple[int, str, int]] = []                       # (document, style, id)
    document = -1
    for id, target, weight, position in zip(ids, targets, weights, positions):
        if position == 0:
            document += 1
            tokens.append((document, "read", id))
        tokens.append((document, "learned" if weight else "read", target))
    for document, inside in groupby(tokens, key=lambda token: token[0]):
        text.append(f"▌{names[document]} ", STYLES["border"])
        for style, run in groupby(inside, key=lambda token: token[1]):
            words = tokenizer.decode([id for _, _, id in run])
            text.append(f"{brackets[:1]}{words}{brackets[1:]}" if style == "learned" else words, STYLES[style])
        text.append("\n")
    padding = batch.ids.shape[1] - used
    return text.append(f"{'·' * min(padding, 80)} {padding} slots of padding" if padding else "", STYLES["padding"])
