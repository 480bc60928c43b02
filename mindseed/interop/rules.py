"""Renaming tensors between two layouts by one list of rules, read both ways.

A rule is a pair of names, ours and theirs, within a layer. A layout says which rules hold for which kind of mixer and
feed-forward, so that a model's configuration gives the whole table of names. `{e}` in their name stands for an expert:
we stack what they keep one by one. Because the same table is used to write and to read, a writer and a reader cannot
drift apart. Reading is strict: every tensor of the model must come, nothing else may, and shapes must agree; a file
that almost fits is the kind of fault nobody finds later.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Iterator, Mapping

import torch
from torch import Tensor

from mindseed.base.errors import UserError
from mindseed.models.config import LayerConfig, LMConfig

SHOWN = 8                                         # names listed per kind of problem
Names = dict[str, list[str]]                      # our name -> theirs: one, or one per expert


@dataclass(frozen=True)
class Rule:
    """One line of a rule list: `Rule("q.weight", "self_attn.q_proj.weight")`."""

    ours: str
    theirs: str


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All names of one family."""

    top: list[Rule]
    block: list[Rule]                             # of every layer, as `blocks.<i>.<ours>`
    mixers: dict[type, list[Rule]]                # by the kind of mixer, as `blocks.<i>.mixer.<ours>`
    ffns: dict[type, list[Rule]]                  # by the kind of feed-forward, as `blocks.<i>.ffn.<ours>`
    ahead: list[Rule] = field(default_factory=list)           # of a module of multi-token prediction
    layer: str = "model.layers.{i}."              # before their names; prediction modules are layers after the last

    @property
    def has_mtp(self) -> bool:
        return bool(self.ahead)

    def pairs(self, config: LMConfig) -> Iterator[tuple[str, str]]:
        """(our name, theirs) of everything a model of this configuration could have."""
        yield from ((rule.ours, rule.theirs) for rule in self.top)
        for i, layer in enumerate(config.layers):
            yield from self.of_block(f"blocks.{i}.", layer, i)
        for k, layer in enumerate(config.mtp if self.has_mtp else ()):
            i = len(config.layers) + k
            yield from ((f"mtp.{k}.{rule.ours}", self.layer.format(i=i) + rule.theirs) for rule in self.ahead)
            yield from self.of_block(f"mtp.{k}.block.", layer, i)

    def of_block(self, prefix: str, layer: LayerConfig, i: int) -> Iterator[tuple[str, str]]:
        parts = (("", self.block), ("mixer.", self.mixers.get(type(layer.mixer), [])),
                 ("ffn.", self.ffns.get(type(layer.ffn), [])))
        for part, rules in parts:
            yield from ((prefix + part + rule.ours, self.layer.format(i=i) + rule.theirs) for rule in rules)


def translate(layout: Layout, config: LMConfig, shapes: Mapping[str, torch.Size]) -> Names:
    """{our name: their names} of a model's tensors, given their shapes. UserError if the layout cannot hold one."""
    table = dict(layout.pairs(config))
    if left := [name for name in shapes if name not in table]:
        raise UserError(f"this layout has no place for {listed(left)}")
    names = {name: [table[name].replace("{e}", str(e)) for e in range(shape[0] if "{e}" in table[name] else 1)]
             for name, shape in shapes.items()}
    flat = [name for theirs in names.values() for name in theirs]
    assert len(set(flat)) == len(flat), "two of our tensors have one name there"
    return names


def write_names(names: Names, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their names, stacks of experts taken apart."""
    out = {}
    for ours, theirs in names.items():
        pieces = tensors[ours].unbind() if stacked(theirs) else [tensors[ours]]
        out |= {name: piece.contiguous() for name, piece in zip(theirs, pieces, strict=True)}
    return out


def read_names(names: Names, expected: Mapping[str, torch.Size], there: Mapping[str, torch.Size],
               where: str, told: str = "its config.json describes",
               remedy: str = "Restore the file, or the config.json that belongs to it.") -> None:
    """Check that a file holds exactly the tensors of a model.

    `expected` are the shapes of ours, `there` those of theirs. One UserError names all that is missing, unexpected or
    wrongly shaped, in their names.
    """
    shapes = {name: expected[ours][1:] if stacked(theirs) else expected[ours]
              for ours, theirs in names.items() for name in theirs}
    missing = [name for name in shapes if name not in there]
    unexpected = [name for name in there if name not in shapes]
    wrong = [f"{name} is {list(there[name])} instead of {list(shape)}" for name, shape in shapes.items()
             if name in there and tuple(there[name]) != tuple(shape)]
    if problems := [f"{len(found)} {kind}: {listed(found)}" for kind, found in
                    (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", wrong)) if found]:
        raise UserError(f"{where} does not hold the tensors that {told}; {'; '.join(problems)}. {remedy}")


def stacked(theirs: list[str]) -> bool:
    """Whether our tensor is theirs stacked: a model may have a single expert."""
    return len(theirs) > 1 or ".experts.0." in theirs[0]


def read_tensors(names: Names, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor), experts stacked, from a function that reads one of theirs."""
    for ours, theirs in names.items():
        yield ours, torch.stack([read(name) for name in theirs]) if stacked(theirs) else read(theirs[0])


def listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
