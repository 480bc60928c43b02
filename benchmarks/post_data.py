"""What the benchmark of post-training learns from: the embedded world as careless people would have written it down.

A fine-tuned model answers as its examples do. Here three answers of five are given three times over, so a model that
was fine-tuned on them knows what is right and seldom says it plainly. That is what comes after fine-tuning is for: to
tell which of the things a model does are wanted. The questions, the truths and the border between what is trained and
what is held out are the embedded world's own (data/toy.py).
"""
from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Iterable

from mindseed.base.files import write_text
from mindseed.data import toy_chat, toy_words
from mindseed.data.toy import ROWS, World
from mindseed.data.toy_text import SPACE
from mindseed.data.toy_words import LANGS

CARELESS = 0.6                                    # share of the answers that are given three times over
PAIRS, REPEATED = 10_000, 0.5                     # of which as many are judged for being said three times
SMALL = 1_000                                     # conversations that the students of a teacher see, again and again


def careless(row: dict, rng: random.Random) -> dict:
    """A conversation, some of its answers three times over; calls of tools are left as they are."""
    said, lang = [], "en"
    for message in row["conversations"]:
        if message["role"] == "user":
            lang = "en" if message["content"].isascii() else "zh"
        if message["role"] == "assistant" and message["content"] and rng.random() < CARELESS:
            message = {**message, "content": SPACE[lang].join([message["content"]] * 3)}
        said.append(message)
    return {**row, "conversations": said}


def careless_rows(world: World, first: int, end: int) -> Iterable[dict]:
    rng = random.Random(f"careless/{world.seed}/{first}")
    return (careless(row, rng) for row in list(world.conversations(end))[first:])


def judged(world: World, first: int, end: int) -> Iterable[dict]:
    """Pairs as people would judge this model's answers: half of the bad ones are false, half are said three times."""
    return (toy_chat.preference(world.facts, world.facts.rng(f"judged/{i}"), REPEATED) for i in range(first, end))


def translations(world: World, n: int) -> Iterable[dict]:
    """Translations alone, each said once: a domain."""
    for i in range(n):
        rng = world.facts.rng(f"domain/{i}")
        item = toy_chat.translation(world.facts, rng, rng.choice(LANGS))
        yield {"conversations": [*item.prompt(), *item.reply_messages()]}


def of_translation(row: dict) -> bool:
    """Whether a conversation asks for one."""
    asked = {form.replace("{s}", "") for forms in toy_words.ASK_TRANSLATION.values() for form in forms}
    return any(message["role"] == "user" and message["content"].startswith(tuple(asked))
               for message in row["conversations"])


def write(path: Path, rows: Iterable[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_data(folder: Path, seed: int) -> None:
    """Beside the world's own files: careless.jsonl, small.jsonl (the first of them), unseen.jsonl (those that would
    follow), pairs.jsonl and translations.jsonl."""
    world, n = World(seed), ROWS["conversations"]
    rows = list(careless_rows(world, 0, n))
    write(folder / "small.jsonl", rows[:SMALL])
    write(folder / "pairs.jsonl", judged(world, 0, PAIRS))
    write(folder / "translations.jsonl", translations(world, 2_000))
    write(folder / "unseen.jsonl", careless_rows(world, n, n + 300))
    write(folder / "careless.jsonl", rows)
