"""Renaming tensors between two layouts by one list of rules, read both ways.

A rule is a pair of name patterns, ours and theirs, in which `{i}` stands for a layer's number. Because the same list
renames in both directions, a writer and a reader cannot drift apart. Reading is strict: every tensor of the model
must come, nothing else may, and shapes must agree; a file that almost fits is the kind of fault nobody finds later.
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Iterable, Mapping

import torch
from torch import Tensor

from mindseed.base.errors import UserError

SHOWN = 8                                         # names listed per kind of problem


@dataclass(frozen=True)
class Rule:
    """One line of a rule list: `Rule("blocks.{i}.mixer.q.weight", "model.layers.{i}.self_attn.q_proj.weight")`."""

    ours: str
    theirs: str

    def __post_init__(self) -> None:
        assert self.ours.count("{i}") == self.theirs.count("{i}") <= 1, f"{self} cannot be read both ways"


def to_theirs(rules: Iterable[Rule], names: Iterable[str]) -> dict[str, str]:
    """{our name: their name}; names without a rule are left out."""
    return rename([(rule.ours, rule.theirs) for rule in rules], names)


def to_ours(rules: Iterable[Rule], names: Iterable[str]) -> dict[str, str]:
    """{their name: our name}; names without a rule are left out."""
    return rename([(rule.theirs, rule.ours) for rule in rules], names)


def rename(pairs: list[tuple[str, str]], names: Iterable[str]) -> dict[str, str]:
    """The patterns of `pairs` applied to whole names."""
    patterns = [(re.compile(re.escape(a).replace(r"\{i\}", r"(0|[1-9]\d*)")), b) for a, b in pairs]
    out = {}
    for name in names:
        hits = [(match, b) for pattern, b in patterns if (match := pattern.fullmatch(name))]
        assert len(hits) <= 1, f"{name} matches several rules"
        for match, b in hits:
            out[name] = b.replace("{i}", match[1]) if match.groups() else b
    return out


def write_names(rules: Iterable[Rule], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their names. Raises UserError if a tensor has no rule: the layout cannot hold it."""
    names = to_theirs(rules, tensors)
    if left := [name for name in tensors if name not in names]:
        raise UserError(f"this layout has no place for {listed(left)}")
    return {names[name]: tensor for name, tensor in tensors.items()}


def read_names(rules: Iterable[Rule], shapes: Mapping[str, torch.Size], expected: Mapping[str, torch.Size],
               where: str) -> dict[str, str]:
    """{our name: their name} for every tensor of the model.

    `shapes` are those of their tensors, `expected` those of ours. One UserError names all that is missing,
    unexpected or wrongly shaped, in their names.
    """
    ours, theirs = to_ours(rules, shapes), to_theirs(rules, expected)
    assert len(theirs) == len(expected), f"no rule for {sorted(set(expected) - set(theirs))}"
    missing = [theirs[name] for name in expected if theirs[name] not in shapes]
    unexpected = [name for name in shapes if ours.get(name) not in expected]
    wrong = [f"{theirs[name]} is {list(shapes[theirs[name]])} instead of {list(shape)}"
             for name, shape in expected.items()
             if theirs[name] in shapes and tuple(shapes[theirs[name]]) != tuple(shape)]
    if problems := [f"{len(names)} {kind}: {listed(names)}" for kind, names in
                    (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", wrong)) if names]:
        raise UserError(f"{where} does not hold the tensors that its config.json describes; {'; '.join(problems)}. "
                        "Restore the file, or the config.json that belongs to it.")
    return theirs


def listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
