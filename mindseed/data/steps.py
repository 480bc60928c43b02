"""Answers in steps, each judged right or wrong: what process rewards are learnt from (2305.20050).

A row of a file says what was asked, the steps of an answer, and of each whether it is right, or null if nobody knows:

    {"prompt": "What is 2+3+4?", "steps": ["2+3=5", "5+4=8"], "labels": [true, false]}

`messages` may stand for the prompt, and `completions` for the steps, as TRL has it. In the conversation each step is a
line of the assistant's turn, tokenised by itself, so it is known which token ends it; whoever asks for the rewards of a
new answer must cut it into steps in the same way, by `encode_steps`. The whole lies in memory.
"""
from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Sequence

import numpy as np

from mindseed.base.errors import UserError
from mindseed.data.encode import SPLITS, Encoder, require_marks
from mindseed.data.formats import BadRow
from mindseed.data.loader import Arrays, in_epochs
from mindseed.data.preference import Kept, widened
from mindseed.data.prepare import check_budget
from mindseed.data.readers import Row, kind_of, read_rows
from mindseed.tokenizers.chat import EOS, Message, Span, encode_spans, normalise, render
from mindseed.tokenizers.template import Template

CHUNK_ROWS = 512                                  # that are tokenised together


@dataclass(frozen=True, eq=False)
class Chain:
    """An answer in steps: `ids` of the conversation, and `right` of each id: 1 or 0 where a step ends, else -1."""

    ids: np.ndarray                               # (n,) uint32
    right: np.ndarray                             # (n,) int8
    name: str                                     # file:line


class StepRows:
    """Chains, one to a row, in an order of their own each epoch, with `extra["steps"]` (B, T). Of one that takes more
    than `seq_len` slots the end is cut off; where no judged step is left, it is dropped and named in `stats`."""

    extras = ("steps",)

    def __init__(self, chains: Sequence[Chain], *, seq_len: int, seed: int = 0, shuffle: bool = True) -> None:
        if not chains:
            raise UserError("there are no answers in steps: is the split empty? A larger --heldout gives it some")
        self.seq_len, self.seed, self.shuffle = seq_len, seed, shuffle
        self.chains = [chain for chain in chains if (chain.right[:seq_len] >= 0).any()]
        if not self.chains:
            raise UserError(f"no step ends within {seq_len} tokens; raise data.seq_len")
        self.stats = Kept(what="answers in steps", rows=len(self.chains),
                          cut=sum(len(chain.ids) > seq_len + 1 for chain in self.chains),
                          dropped=tuple(chain.name for chain in chains if not (chain.right[:seq_len] >= 0).any()))
        digest = hashlib.sha256()
        for chain in self.chains:
            digest.update(chain.ids.tobytes() + chain.right.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.chains)

    def at(self, indices: Sequence[int]) -> list[Chain]:
        numbers = in_epochs(indices, len(self), seed=self.seed, shuffle=self.shuffle)
        return [self.chains[number] for number in numbers]

    def width(self, indices: Sequence[int]) -> int:
        return widened(np.array([min(len(chain.ids) - 1, self.seq_len) for chain in self.at(indices)]))

    def write(self, indices: Sequence[int], out: Arrays, at: Sequence[int]) -> None:
        steps = out.extra.setdefault("steps", np.full(out.ids.shape, -1, np.int64))
        for b, chain in zip(at, self.at(indices)):
            slots = out.put(b, 0, chain.ids[:self.seq_len + 1], None)
            steps[b, :slots] = chain.right[:slots]
            out.weights[b, :slots] = chain.right[:slots] >= 0

    def describe(self, index: int) -> list[str]:
        return [self.at([index])[0].name]

    def identity(self) -> dict[str, Any]:
        return {"data": self.fingerprint, "rows": "answers in steps", "seq_len": self.seq_len, "seed": self.seed,
                "shuffle": self.shuffle}


# ------------------------------------------------------------------------------------------------------- from files

def read_chains(paths: Iterable[str | Path], tokenizer: Any, *, template: Template | None = None, heldout: float = 0.01,
                seed: int = 0, max_skipped: float = 0.01) -> dict[str, list[Chain]]:
    """The chains of files by split, "train" and "heldout", chosen by a hash of the row as `prepare` does. A bad row is
    skipped and counted; over the budget a UserError lists them."""
    encoder, skipped = Encoder(tokenizer, heldout, seed), []
    found: dict[str, list[Chain]] = {split: [] for split in SPLITS}
    count = itertools.count()

    def skip(file: str, line: int, reason: str) -> None:
        skipped.append([file, line, reason])
        check_budget(skipped, next(count) + 1, max_skipped)

    def parsed(row: Row) -> tuple[str, list[Message], Any, list[str], list[int], str] | None:
        try:
            asked, tools, steps, labels = chain_of(row.row)
            words = json.dumps([asked, tools, steps], ensure_ascii=False, sort_keys=True)
        except BadRow as reason:
            return skip(row.file, row.line, str(reason))
        next(count)
        return encoder.split_of(words), asked, tools, steps, labels, row.place

    rows = filter(None, map(parsed, read_rows(paths, bad=skip)))
    while some := list(itertools.islice(rows, CHUNK_ROWS)):
        encoded = encode_steps(tokenizer, [(asked, tools, steps) for _, asked, tools, steps, _, _ in some], template)
        for (split, *_, labels, name), (ids, ends) in zip(some, encoded):
            right = np.full(len(ids), -1, np.int8)
            right[ends] = labels
            found[split].append(Chain(np.array(ids, np.uint32), right, name))
    if not found["train"]:
        raise UserError(f"nothing to train on: {len(skipped)} rows cannot be used, {len(found['heldout'])} are held "
                        "out")
    return found


def chain_of(row: dict[str, Any]) -> tuple[list[Message], Any, list[str], list[int]]:
    """(messages before the answer, tools, steps, labels: 1, 0, or -1 for null). Raises BadRow."""
    if (kind := kind_of(row)) != "steps":
        raise BadRow(f"a row of kind {kind}; answers in steps have a prompt, steps and labels")
    steps = row["steps"] if row.get("steps") is not None else row["completions"]
    labels = row["labels"]
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps) or not isinstance(labels, list):
        raise BadRow('"steps" must be a list of texts, and "labels" one of true and false')
    if len(steps) != len(labels):
        raise BadRow(f"{len(steps)} steps have {len(labels)} labels")
    steps = [step.strip() for step in steps]
    if "" in steps:
        raise BadRow(f"step {steps.index('')} is empty")
    if wrong := [label for label in labels if label is not None and type(label) is not bool and label not in (0, 1)]:
        raise BadRow(f"labels must be true (right), false or null, not {wrong[0]!r}")
    if all(label is None for label in labels):
        raise BadRow("no step is judged")
    prompt = row.get("messages") if row.get("messages") is not None else row.get("prompt")
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        messages, tools = normalise({"messages": asked, "tools": row.get("tools")})
        normalise({"messages": [{"role": "assistant", "content": "\n".join(steps)}]})
    except (UserError, ValueError, TypeError, KeyError) as error:
        raise BadRow(f"not a conversation: {error}") from None
    if messages[-1]["role"] == "assistant":
        raise BadRow("the prompt ends with an answer; the answer is what the steps are for")
    return messages, tools, steps, [-1 if label is None else int(label) for label in labels]


def encode_steps(tokenizer: Any, answers: Sequence[tuple[list[Message], Any, list[str]]],
                 template: Template | None = None) -> list[tuple[list[int], list[int]]]:
    """Of every (messages, tools, steps) the ids of the conversation, and the place of the last id of each step."""
    if template is None:
        last, prompts = tokenizer.specials[EOS], [render(messages, tools=tools, generation_prompt=True)
                                                  for messages, tools, _ in answers]
    else:
        last = template.end(tokenizer)
        last = tokenizer.specials[require_marks(tokenizer)[1]] if last is None else last
        prompts = [template.spans(tokenizer, messages, tools=tools, generation_prompt=True)
                   for messages, tools, _ in answers]
    pieces = [piece for spans, (_, _, steps) in zip(prompts, answers)
              for piece in (spans, *([Span("\n" * (i > 0) + step)] for i, step in enumerate(steps)))]
    encoded = iter(encode_spans(tokenizer, pieces))
    found = []
    for _, _, steps in answers:
        ids, ends = list(next(encoded)[0]), []
        for _ in steps:
            ids += next(encoded)[0]
            ends.append(len(ids) - 1)
        found.append(([*ids, last], ends))
    return found
