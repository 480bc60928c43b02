"""Print what a batch trains on: green is learned, grey is only read, dots are padding, a bar begins a document.

Where there are no colours, in a pipe or a file, what is learned stands in ⟦brackets⟧.
The rows are those that training would see with the same seed, length and packing. Whoever wonders why a model answers
with its user's words looks here first.
"""
from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from rich.text import Text

from mindseed.base.config import option
from mindseed.base.errors import UserError
from mindseed.base.log import console, say
from mindseed.core import Batch, Tokenizer
from mindseed.data.loader import PackedSource
from mindseed.data.pack import Strategy
from mindseed.data.shards import Prepared
from mindseed.recipes.options import LONGEST

BRACKETS = "⟦⟧"
STYLES = {"learned": "green", "read": "bright_black", "border": "bold cyan", "padding": "bright_black"}


@dataclass(frozen=True, kw_only=True)
class Options:
    data: str = option("", help="a folder that `mindseed prepare` made", positional=True)
    split: str = option("train", help="train or heldout")
    seq_len: int = option(512, help="slots in a row")
    rows: int = option(4, help="rows to print")
    first: int = option(0, help="where in the stream to begin, in rows")
    packing: Strategy = option("best-fit", help="how documents share rows")
    seed: int = option(0, help="seed of the stream")


def main(options: Options) -> None:
    if not options.data:
        raise UserError("--data is required: mindseed show-batch FOLDER")
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
