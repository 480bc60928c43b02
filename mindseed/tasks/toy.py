"""Grading the embedded world: exact match, family by family.

An answer counts when the text after any <think> block equals the reference, once runs of whitespace are one space and
a final full stop ("." or "。") is dropped; a tool call counts when its name and arguments equal the reference, however
its JSON is spelt. Nothing else is forgiven: letter case, extra words and half answers are wrong.
"""
from __future__ import annotations

import json
from typing import Iterable, Iterator

from mindseed.data.toy import HELDOUT, World
from mindseed.tokenizers.chat import normalise, parse_answer

FAMILIES = tuple(HELDOUT)


class ToyTask:
    """The held-out items of a world (or any rows of `World.problems`), as a core.Task."""

    name = "toy"

    def __init__(self, items: World | Iterable[dict]) -> None:
        self.items = items.heldout() if isinstance(items, World) else list(items)

    def examples(self) -> Iterator[dict]:
        return iter(self.items)

    def prompt(self, example: dict) -> list[dict]:
        """The conversation up to the assistant's turn; tools on offer stand in its system message, as in the rows."""
        return example["messages"]

    def tools(self, example: dict) -> list[dict] | None:
        """The tools on offer, parsed, for renderers that take them apart from the messages."""
        return normalise({"messages": example["messages"]})[1]

    def grade(self, example: dict, answer: str) -> dict[str, float]:
        """{"score": 1 if right, "format": 1 if the turn is well formed}; `answer` is the raw assistant turn.

        Well formed: one parseable call and no more for `tools`; otherwise an answer that is not empty, no stray tag,
        and for `steps` a <think> block before it.
        """
        turn = parse_answer(answer)
        content, calls = plain(turn["content"]), turn["tool_calls"]
        tagged = "think>" in content or "tool_call>" in content
        if example["family"] == "tools":
            score = not content and [call(c) for c in calls] == [call(json.loads(example["answer"]))]
            shaped = not content and len(calls) == 1 and call(calls[0]) is not None
        else:
            score = not calls and content == plain(example["answer"])
            shaped = bool(content) and not tagged and not calls
            if example["family"] == "steps":
                shaped = shaped and bool(turn["reasoning_content"])
        return {"score": float(score), "format": float(shaped)}


def plain(text: str) -> str:
    """Runs of whitespace become one space; one final full stop is dropped."""
    text = " ".join(text.split())
    return text[:-1].rstrip() if text.endswith((".", "。")) else text


def call(value: dict) -> tuple[str, dict] | None:
    """(name, arguments) of a parsed call, or None when it has not that shape. Arguments may be JSON text."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            return None
    return (value["name"], arguments) if isinstance(arguments, dict) else None


def score_table(results: Iterable[tuple[dict, dict]]) -> dict:
    """Percent right: {"overall", "families": {family: percent}, "format", "counts": {family: items}}.

    `results` are (example, grade) pairs. Overall is the mean over items, not over families.
    """
    scores: dict[str, list[float]] = {}
    shaped: list[float] = []
    for example, grade in results:
        scores.setdefault(example["family"], []).append(grade["score"])
        shaped.append(grade["format"])
    if not shaped:
        raise ValueError("score_table needs at least one graded answer")
    families = [f for f in FAMILIES if f in scores] + sorted(set(scores) - set(FAMILIES))
    return {"overall": percent([s for f in families for s in scores[f]]),
            "families": {f: percent(scores[f]) for f in families},
            "format": percent(shaped), "counts": {f: len(scores[f]) for f in families}}


def percent(values: list[float]) -> float:
    return round(100 * sum(values) / len(values), 1)
