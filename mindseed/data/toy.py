"""The embedded world: a small closed world in English and Chinese that fills every stage of training with rows.

Twenty-four people and eight cities, with a job, a home, a pet, a favourite food, a country and a product; a grammar of
sentences in both languages; sums up to 20; invented strangers to read about; four tools. `World(seed)` yields
pretraining text, conversations, preference pairs and verifiable problems without end, and a held-out set in seven
families that ask different things of a model. Row i of a kind is a function of (seed, kind, i): the same seed gives
the same bytes, and asking for more rows only appends.

It is the demo's data, the tests' data and the yardstick for algorithms. The words are in toy_words, the truths and the
border between training and held-out in toy_facts, the text in toy_text, the questions in toy_chat.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Callable, Iterator

from mindseed.base.errors import UserError
from mindseed.base.files import atomic
from mindseed.data import toy_chat as chat
from mindseed.data.toy_facts import Facts
from mindseed.data.toy_text import document
from mindseed.data.toy_words import LANGS

# Items per family, half of them in each language. The overall score is the mean over all items; the two hard
# families hold a fifth of them.
HELDOUT = {"facts": 60, "translation": 60, "arithmetic": 60, "reading": 60, "told": 40, "steps": 40, "tools": 60}
ROWS = {"pretrain": 30_000, "conversations": 20_000, "preferences": 2_000, "problems": 2_000,
        "sums": 1_000}                                                            # at scale 1
HELD_SUMS = 60


class World:
    """All rows of the world of one seed. Every method may be called again and gives the same rows."""

    def __init__(self, seed: int = 0) -> None:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise UserError(f"the seed of the embedded world is a whole number, not {seed!r}")
        self.seed = seed
        self.facts = Facts(seed)

    def pretrain(self, n: int) -> Iterator[dict]:
        """{"text"}: facts in many wordings, stories, sums, sentence pairs."""
        return self._rows("pretrain", n, lambda facts, rng: {"text": document(facts, rng)})

    def conversations(self, n: int) -> Iterator[dict]:
        """{"conversations"}: one or two questions, follow-ups, greetings, refusals, <think> traces, tool dialogues."""
        return self._rows("conversations", n, chat.conversation)

    def preferences(self, n: int) -> Iterator[dict]:
        """{"chosen", "rejected"}: two lists of messages that differ in the last one."""
        return self._rows("preferences", n, chat.preference)

    def problems(self, n: int) -> Iterator[dict]:
        """{"family", "lang", "question", "messages", "answer"}: gradable, from the training side of the border."""
        return self._rows("problems", n, chat.problem)

    def sums(self, n: int, *, held: bool = False) -> Iterator[dict]:
        """{"prompt", "answer"}: "7+5=" and "12", as the pretraining texts write it, for a model that knows no more than
        them; `held`: of those pairs of numbers that no row holds."""
        kind = "sums/held" if held else "sums"
        return self._rows(kind, n, lambda facts, rng: chat.equation(facts, rng, held))

    def held_sums(self) -> list[dict]:
        """Of those, each once."""
        return list({row["prompt"]: row for row in self.sums(20 * HELD_SUMS, held=True)}.values())[:HELD_SUMS]

    def heldout(self) -> list[dict]:
        """The graded items, like `problems`, none of which is in any training row; `HELDOUT` says how many."""
        makers = {"facts": chat.known, "translation": chat.translation, "arithmetic": chat.arithmetic,
                  "reading": chat.reading, "steps": chat.steps, "tools": chat.tool}
        rows: list[dict] = []
        for family, count in HELDOUT.items():
            rng, seen = self.facts.rng(f"heldout/{family}"), set()
            secrets = [(fact, lang) for fact in self.facts.told_only for lang in LANGS]
            while len(seen) < count:
                if family == "told":
                    fact, lang = secrets[len(seen)]
                    item = chat.ask(fact, rng, lang, family="told")
                else:
                    item = makers[family](self.facts, rng, LANGS[len(seen) % 2], held=True)
                if item.question not in seen:
                    seen.add(item.question)
                    rows.append(item.problem())
        return rows

    def _rows(self, kind: str, n: int, make: Callable) -> Iterator[dict]:
        return (make(self.facts, self.facts.rng(f"{kind}/{i}")) for i in range(n))


def write_world(folder: Path | str, seed: int = 0, scale: float = 1.0) -> dict[str, Path]:
    """Write pretrain, conversations, preferences, problems, sums and what is held out as .jsonl; return their paths.

    `scale` multiplies `ROWS`; the held-out sets are always whole. Raises UserError for a scale that leaves no rows.
    """
    world, folder = World(seed), Path(folder)
    if not scale > 0 or min(ROWS.values()) * scale < 1 or scale == float("inf"):
        raise UserError(f"scale {scale} of the embedded world leaves a file without rows; "
                        f"use a number of at least {1 / min(ROWS.values())}")
    rows = {kind: getattr(world, kind)(round(n * scale)) for kind, n in ROWS.items()} | {
        "heldout": world.heldout(), "sums-heldout": world.held_sums()}
    paths = {}
    for kind, stream in rows.items():
        paths[kind] = folder / f"{kind}.jsonl"
        with atomic(paths[kind]) as temp, open(temp, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in stream)
    return paths
