"""All families of architectures: which one a config.json names, and in which one a model of ours is kept.

A model that no published family can hold is kept in a layout of our own, `mindseed`: the same files, our names of
tensors, the configuration in mindseed.json. Only we can read it, and `why_native` says why.
"""
from __future__ import annotations

from typing import Any

from mindseed.base.errors import UserError
from mindseed.interop.deepseek_v3 import DEEPSEEK_V3
from mindseed.interop.family import Family
from mindseed.interop.llama import LLAMA
from mindseed.interop.qwen3 import QWEN3
from mindseed.interop.qwen3_moe import QWEN3_MOE
from mindseed.models.config import LMConfig

NATIVE = "mindseed"
FAMILIES = {family.name: family for family in (QWEN3, LLAMA, QWEN3_MOE, DEEPSEEK_V3)}


def family_of(config: LMConfig) -> Family | None:
    """The first family that can hold the model, or None."""
    return next((family for family in FAMILIES.values() if not family.reasons(config)), None)


def why_native(config: LMConfig) -> str:
    """What the closest family lacks."""
    name, reasons = min(((f.name, f.reasons(config)) for f in FAMILIES.values()), key=lambda pair: len(pair[1]))
    return f"{name} comes closest, but {'; '.join(reasons)}"


def named(name: str) -> Family:
    """The family a user asks for."""
    known = name.replace("-", "_")
    if known not in FAMILIES:
        raise UserError(f"{name!r} is no family of models that can be written; choose one of {', '.join(FAMILIES)}, "
                        "or gguf")
    return FAMILIES[known]


def family_in(data: dict[str, Any], where: str) -> Family:
    """The family that a config.json names. UserError for one that we do not read."""
    kind = data.get("model_type")
    if kind == "minimind":                        # transformers' directories of that project
        kind = QWEN3_MOE.name if data.get("use_moe") else QWEN3.name
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{where} describes the architecture {kind!r}; this version reads "
                        f"{', '.join([*FAMILIES, 'minimind', NATIVE])}")
    return FAMILIES[kind]
