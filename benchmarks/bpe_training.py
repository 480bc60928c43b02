"""(d) Learning 6400 tokens by byte-pair encoding: our pure Python against the trainer of the Rust `tokenizers`.

Both start from the same texts in memory, cut them by the same pattern on all cores and must end with the same merges,
which is checked. Several corpus sizes show how either grows.
"""
from __future__ import annotations

import json
import os
from itertools import zip_longest

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from benchmarks.common import ROUNDS, in_turn, ratio, report, seconds, spread
from benchmarks.corpora import REAL
from mindseed.data.readers import read_rows, row_texts
from mindseed.data.toy import World
from mindseed.tokenizers.base import SPECIALS
from mindseed.tokenizers.bpe import spell_bytes
from mindseed.tokenizers.bpe_train import train
from mindseed.tokenizers.split import Splitter

NAME = "bpe-training"
VOCAB = 6400
MEGABYTES = (5, 10, 20)


def texts_of(megabytes: int) -> tuple[list[str], str]:
    """Texts of that size, Chinese and English in turn, and where they are from."""
    names = ("zh_classics.jsonl.gz", "en_mix.jsonl.gz")
    if all((REAL / "pretrain" / name).exists() for name in names):
        streams = [(t for row in read_rows([REAL / "pretrain" / name]) for t in row_texts(row.row)) for name in names]
        texts, source = (t for pair in zip_longest(*streams) for t in pair if t), " and ".join(names)
    else:
        texts, source = (t for row in World(0).pretrain(400_000) for t in row_texts(row)), "the embedded world"
    taken, size = [], 0
    for text in texts:
        taken.append(text)
        size += len(text.encode())
        if size >= megabytes * 1e6:
            break
    return taken, source


def ours(texts: list[str]) -> list[list[str]]:
    """The merges, spelt as in tokenizer.json."""
    bpe = train(texts, vocab_size=VOCAB, workers=os.cpu_count() or 1)
    return [[spell_bytes(bpe.tokens[id]) for id in pair] for pair in bpe.merges]


def theirs(texts: list[str]) -> list[list[str]]:
    rust = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.pre_tokenizer = pre_tokenizers.Sequence([Splitter().rust, byte_level])
    rust.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCAB, min_frequency=2, special_tokens=list(SPECIALS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return json.loads(rust.to_str())["model"]["merges"]


def main() -> None:
    rows = []
    for megabytes in MEGABYTES:
        texts, source = texts_of(megabytes)
        merges: dict[str, list[list[str]]] = {}
        times = in_turn({f.__name__: lambda f=f: seconds(lambda: merges.__setitem__(f.__name__, f(texts)))
                         for f in (ours, theirs)}, ROUNDS)
        if merges["ours"] != merges["theirs"]:
            raise SystemExit("the two trainers learnt different merges, so their times cannot be compared")
        rows.append([f"{megabytes} MB", spread(times["ours"]), spread(times["theirs"]),
                     f"{ratio(times['ours'], times['theirs']):.2f}x"])
    report(NAME, f"BPE training: {VOCAB} tokens, pure Python against the Rust `tokenizers`",
           ["text", "ours, s", "Rust, s", "ours / Rust"], rows, command="python -m benchmarks.bpe_training",
           notes=f"Text from {source}. Both learnt the same {len(merges['ours'])} merges in the same order.")


if __name__ == "__main__":
    main()
