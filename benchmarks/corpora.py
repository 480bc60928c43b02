"""Real text for benchmarks: the files beside the checkout if they are there, else rows of the embedded world."""
from __future__ import annotations

import json
import tempfile
from pathlib import Path

from mindseed.data.prepare import prepare
from mindseed.data.shards import Prepared
from mindseed.data.toy import World
from mindseed.recipes import tokenizer as tokenizer_recipe
from mindseed.tokenizers.base import ByteLevel
from mindseed.tokenizers.hf_json import load_tokenizer

REAL = Path(__file__).parents[2] / "shared" / "data"


def files(kind: str) -> tuple[list[Path], str]:
    """Files of `text` or `chat`, and where they are from, in words."""
    names = {"text": ["pretrain/zh_classics.jsonl.gz"], "chat": ["sft/zh_alpaca.jsonl.gz"]}[kind]
    if all((REAL / name).exists() for name in names):
        return [REAL / name for name in names], ", ".join(Path(name).name for name in names)
    out = Path(tempfile.mkdtemp()) / f"{kind}.jsonl"
    world = World(0)
    rows = world.pretrain(40_000) if kind == "text" else world.conversations(10_000)
    out.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return [out], "the embedded world"


def prepared(kind: str, folder: Path) -> tuple[Prepared, ByteLevel, str]:
    """A tokenizer of 6400 trained on the files, and the files tokenised, in `folder`."""
    paths, source = files(kind)
    if not (folder / "tokenizer").exists():
        tokenizer_recipe.main(tokenizer_recipe.Options(data=tuple(map(str, paths)), out=str(folder / "tokenizer"),
                                                       max_bytes=5_000_000))
    tokenizer = load_tokenizer(folder / "tokenizer")
    return prepare(paths, folder / kind, tokenizer), tokenizer, source
