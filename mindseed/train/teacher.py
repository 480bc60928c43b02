"""A teacher beside the model that is trained: do they speak of the same tokens, and what is compared.

Distributions can be compared only where an id means the same to both. So the vocabularies must agree, token by token
and special by special; how a text is cut into tokens is the student's affair, and widths, depths and families may
differ. Embeddings are often padded beyond the vocabulary, each model's to another size: what lies there is left out.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mindseed.base.errors import UserError
from mindseed.core import Output, Tokenizer
from mindseed.interop.directory import Loaded
from mindseed.models.lm import LM
from mindseed.models.matching import attach
from mindseed.objectives.distill import Distill


def check_teacher(teacher: Loaded, tokenizer: Tokenizer, *, seq_len: int | None = None,
                  name: str = "the teacher") -> int:
    """The number of ids that mean the same to both. UserError, saying what differs, if they mean different things, or
    if rows of `seq_len` tokens are longer than the teacher's context."""
    theirs = teacher.tokenizer
    if theirs.hash() != tokenizer.hash() and (problem := difference(theirs, tokenizer)):
        raise UserError(f"{name} has another vocabulary than the student: {problem}. Their distributions cannot be "
                        "compared; learn from its answers instead, which mindseed synthesize writes")
    context = teacher.model.config.seq_len
    if seq_len is not None and context < seq_len:
        raise UserError(f"{name} reads {context} tokens, and rows are of {seq_len}; set data.seq_len to {context}, or "
                        "lengthen the teacher's context with mindseed extend")
    return tokenizer.vocab_size


def difference(theirs: Any, ours: Any) -> str:
    """The first thing in which two vocabularies differ, in words; "" if ids mean the same."""
    if theirs.vocab_size != ours.vocab_size:
        return f"{theirs.vocab_size} tokens there, {ours.vocab_size} here"
    (a, b), kinds = ((meanings(theirs), meanings(ours)), ("ordinary", "special"))
    for id in sorted(a.keys() | b.keys()):
        if a.get(id) != b.get(id):
            there, here = (f"the {kinds[one[1]]} token {one[0]!r}" if one else "no token"
                           for one in (a.get(id), b.get(id)))
            return f"id {id} is {there} there and {here} here"
    return ""


def meanings(tokenizer: Any) -> dict[int, tuple[bytes | str, bool]]:
    """id -> (what it spells, whether it is special)."""
    return {id: (token, False) for id, token in tokenizer.tokens.items()} | {
        id: (spelling, True) for spelling, id in tokenizer.specials.items()}


def distillation(student: LM, teacher: Loaded, tokenizer: Tokenizer, *, seq_len: int | None = None,
                 depths: tuple[int, ...] | None = None, related: tuple[int, int] | None = None, seed: int = 0,
                 **settings: Any) -> Distill:
    """The objective for a student and a teacher; `settings` are those of Distill. If it matches states or relations,
    both models are told to tell them (models/matching.attach): before optimisers are made, as the student gets new
    parameters. `related` is by default the last layer of both."""
    vocab_size = check_teacher(teacher, tokenizer, seq_len=seq_len)
    model = teacher.model.eval().requires_grad_(False)
    states, relations = settings.get("states", 0.0), settings.get("relations", 0.0)
    if states or relations:
        last = len(student.config.layers) - 1, len(model.config.layers) - 1
        attach(student, model, depths=depths if states else (), related=(related or last) if relations else None,
               seed=seed)

    def told(ids: Tensor, positions: Tensor) -> Output:
        with torch.no_grad():
            return model(ids, positions)

    head = model.embed.weight if model.head is None else model.head.dense()
    return Distill(teacher=told, teacher_head=head, vocab_size=vocab_size, **settings)
