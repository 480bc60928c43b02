"""How far a model sees, measured: its loss by position, and a needle to be found in a haystack.

A context that a config claims may be one that the model cannot use. Loss by position tells where it gets lost: in a
text that goes on, later tokens should be no harder than earlier ones. The needle tells whether it can reach back: a
sentence with a digit stands somewhere in a long text, and at the end the model is asked for it. The right digit must
be the likeliest of the ten, so chance is one in ten.
"""
from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Sequence

import torch

from mindseed.base.errors import UserError
from mindseed.core import Tokenizer
from mindseed.models.lm import LM

NEEDLES = (("The secret digit of {} is ", "{}.\n"), ("{}的密码是", "{}。\n"))      # before the digit, and after it
LETTERS = "BCDFGHKLMNPRSTVWXZ"
WEIGHT = 16                # of an answer among tokens of text when a model is trained on them: they are few


@dataclass(frozen=True, kw_only=True)
class Needle:
    """`ids` ends where the digit must follow; `digits` are the ids of 0 to 9."""

    ids: list[int]
    digits: list[int]
    answer: int
    depth: float                     # where the needle stands: 0 at the beginning, 1 at the end


def streams(documents: Sequence[Sequence[int]], length: int, count: int) -> list[list[int]]:
    """`count` texts of `length` ids, each the documents from a place of its own on, one after the other."""
    total = sum(map(len, documents))
    if total < length:
        raise UserError(f"the held-out documents have {total:,} tokens together, fewer than one text of {length:,}; "
                        "hold more of them out (--heldout)")
    whole = [id for document in documents for id in document]
    starts = [round(i * (total - length) / max(1, count - 1)) for i in range(count)]
    return [whole[start:start + length] for start in dict.fromkeys(starts)]


@torch.inference_mode()
def loss_by_position(model: LM, texts: Sequence[Sequence[int]], edges: Sequence[int]) -> list[float]:
    """Bits per token between each two neighbouring `edges` (positions), the mean over texts longer than the last."""
    device, sums = model.embed.weight.device, torch.zeros(edges[-1], dtype=torch.float64)
    for text in texts:
        ids = torch.tensor([text[:edges[-1] + 1]], device=device)
        at = torch.arange(edges[-1], device=device)[None]
        sums -= model(ids[:, :-1], at).logps(ids[:, 1:])[0].double().cpu()
    bits = sums / len(texts) / torch.log(torch.tensor(2.0, dtype=torch.float64))
    return [bits[a:b].mean().item() for a, b in zip(edges, edges[1:])]


@dataclass(frozen=True)
class Sentence:
    """A sentence that gives a name's digit: `question`, then the digit, then `end`; `digits` are the ids of 0 to 9."""

    question: list[int]
    digits: list[int]
    end: list[int]
    answer: int

    @property
    def ids(self) -> list[int]:
        return [*self.question, self.digits[self.answer], *self.end]


def sentence(tokenizer: Tokenizer, rng: random.Random) -> Sentence:
    """One of a name nobody has heard of. UserError if the tokenizer has no token for a digit."""
    before, after = NEEDLES[rng.randrange(len(NEEDLES))]
    name, answer = "".join(rng.choices(LETTERS, k=4)), rng.randrange(10)
    question = tokenizer.encode("\n" + before.format(name))
    digits = [digit[-1] for d in range(10) if len(digit := tokenizer.encode("\n" + before.format(name) + str(d)))
              == len(question) + 1 and digit[:-1] == question]
    if len(digits) < 10:
        raise UserError("this tokenizer joins digits with what stands before them, so no needle can be asked for")
    return Sentence(question, digits, tokenizer.encode(after.format("")), answer)


def hide(tokenizer: Tokenizer, hay: Sequence[int], *, length: int, depth: float, seed: int) -> Needle:
    """A needle in `length` tokens of `hay`, question included. UserError if the tokenizer has no token for a digit."""
    some = sentence(tokenizer, random.Random(seed))
    room = length - len(some.ids) - len(some.question)
    if room < 0 or len(hay) < room:
        raise UserError(f"a haystack of {length} tokens needs {max(room, 0)} tokens of text; there are {len(hay)}")
    cut = round(depth * room)
    return Needle(ids=[*hay[:cut], *some.ids, *hay[cut:room], *some.question], digits=some.digits, answer=some.answer,
                  depth=depth)


def quiz(tokenizer: Tokenizer, hay: Sequence[int], *, length: int, seed: int) -> tuple[list[int], list[int]]:
    """(ids, weights) of a text to learn reaching back from: up to four names in `length` tokens of `hay`, each asked
    for again and again. Only digits that can be known weigh anything; the last token is one of them.

    A needle asked for once is one token in a whole text, which no short training notices; here half of the text may be
    sentences. UserError if `length` has no room for a sentence and its question.
    """
    rng = random.Random(seed)
    names = [sentence(tokenizer, rng) for _ in range(rng.randint(1, max(1, min(4, length // 64))))]
    said = [rng.choice(names)]
    while sum(len(some.ids) for some in said) + len((some := rng.choice(names)).ids) <= length // 2:
        said.append(some)
    last = rng.choice(said)
    room = length - sum(len(some.ids) for some in said) - len(last.question) - 1
    if room < 0:
        raise UserError(f"a quiz of {length} tokens has no room for a sentence and its question; make it longer")
    if len(hay) < room:
        raise UserError(f"a quiz of {length} tokens needs {room} tokens of text; there are {len(hay)}")
    ids, weights, known, at = [], [], set(), 0
    for cut, some in zip(sorted(rng.randint(0, room) for _ in said), said):
        ids += [*hay[at:cut], *some.ids]
        weights += [0] * (len(ids) - len(weights))
        if id(some) in known:
            weights[-1 - len(some.end)] = WEIGHT
        known.add(id(some))
        at = cut
    ids += [*hay[at:room], *last.question, last.digits[last.answer]]
    return ids, [*weights, *[0] * (len(ids) - len(weights) - 1), WEIGHT]


@torch.inference_mode()
def recall(model: LM, needles: Sequence[Needle]) -> float:
    """The share of needles whose digit is the likeliest of the ten."""
    device, found = model.embed.weight.device, 0
    for needle in needles:
        ids = torch.tensor([needle.ids], device=device)
        output = model(ids, torch.arange(ids.shape[1], device=device)[None])
        logits = output.hidden[0, -1] @ output.head[needle.digits].T
        found += int(logits.argmax()) == needle.answer
    return found / len(needles)
