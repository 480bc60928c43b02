"""Rotary positions as a config.json tells them: `rope_parameters` for transformers 5, and the older keys beside it."""
from __future__ import annotations

import math
from typing import Any

from mindseed.base.errors import UserError
from mindseed.nn.rope import DynamicScaling, LinearScaling, Llama3Scaling, RopeConfig, Scaling, YarnScaling


NUMBERS = ("rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor",
           "mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor")


def rope_to_json(rope: RopeConfig) -> dict[str, Any]:
    """The keys of config.json. DynamicScaling has no place for its length: it is max_position_embeddings."""
    s = rope.scaling
    if isinstance(s, LinearScaling):
        scaling = {"rope_type": "linear", "factor": s.factor}
    elif isinstance(s, DynamicScaling):
        scaling = {"rope_type": "dynamic", "factor": s.factor}
    elif isinstance(s, YarnScaling):
        scaling = {"rope_type": "yarn", "factor": s.factor, "original_max_position_embeddings": s.original,
                   "beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
        scaling |= {key: getattr(s, key) for key in ("attention_factor", "mscale", "mscale_all_dim")
                    if getattr(s, key) is not None}
    elif isinstance(s, Llama3Scaling):
        scaling = {"rope_type": "llama3", "factor": s.factor, "original_max_position_embeddings": s.original,
                   "low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
    else:
        return {"rope_theta": rope.theta, "rope_parameters": {"rope_type": "default", "rope_theta": rope.theta}}
    return {"rope_theta": rope.theta, "rope_scaling": scaling | {"type": scaling["rope_type"]},
            "rope_parameters": scaling | {"rope_theta": rope.theta}}


def rope_from_json(data: dict[str, Any], where: str, *, interleaved: bool = False) -> RopeConfig:
    """UserError for a kind of scaling that we do not compute, or one that lacks a number."""
    new, old = data.get("rope_parameters") or {}, data.get("rope_scaling") or {}
    told = {**old, **new}
    if unlike := [key for key in old if key in new and key not in ("type", "rope_type") and old[key] != new[key]]:
        raise UserError(f"{where}: rope_parameters and rope_scaling differ in {', '.join(unlike)}; delete one of them")
    if data.get("original_max_position_embeddings"):                  # counts before that of the scaling itself
        told["original_max_position_embeddings"] = data["original_max_position_embeddings"]
    theta = float(told.get("rope_theta") or data.get("rope_theta") or 10_000.0)
    kinds = [part.get("rope_type", part.get("type", "default")) or "default" for part in (new, old) if part]
    if len(set(kinds)) > 1:
        raise UserError(f"{where}: rope_parameters says {kinds[0]!r} and rope_scaling {kinds[1]!r}; delete the wrong "
                        "one")
    kind = kinds[0] if kinds else "default"
    if kind not in READERS:
        raise UserError(f"{where} asks for rotary positions scaled by {kind!r}, which this version cannot compute; it "
                        f"knows {', '.join(READERS)}")
    for key, value in {**told, "rope_theta": theta}.items():
        if key in NUMBERS and value is not None and not (type(value) in (int, float) and math.isfinite(value)):
            raise UserError(f"{where}: {key} of the rotary positions must be a number, not {value!r}")
    if type(told.get("truncate", True)) is not bool:
        raise UserError(f"{where}: truncate of the rotary positions must be true or false, not {told['truncate']!r}")
    try:
        scaling = READERS[kind](told, data.get("max_position_embeddings"))
    except KeyError as error:
        raise UserError(f"{where}: rope scaling {kind} lacks {error.args[0]!r}") from None
    return RopeConfig(theta=theta, scaling=scaling, interleaved=interleaved)


def original(told: dict[str, Any], longest: int | None) -> int:
    length = told.get("original_max_position_embeddings") or longest
    if length is None:
        raise KeyError("original_max_position_embeddings")
    return int(length)


def yarn(told: dict[str, Any], longest: int | None) -> Scaling:
    length = original(told, longest)
    factor = told.get("factor") or (longest / length if longest else None)
    if factor is None:
        raise KeyError("factor")
    return YarnScaling(factor=float(factor), original=length, beta_fast=float(told.get("beta_fast") or 32),
                       beta_slow=float(told.get("beta_slow") or 1), attention_factor=told.get("attention_factor"),
                       mscale=told.get("mscale"), mscale_all_dim=told.get("mscale_all_dim"),
                       truncate=told.get("truncate", True))


def llama3(told: dict[str, Any], longest: int | None) -> Scaling:
    return Llama3Scaling(factor=float(told["factor"]), original=original(told, None),
                         low_freq_factor=float(told["low_freq_factor"]),
                         high_freq_factor=float(told["high_freq_factor"]))


READERS = {
    "default": lambda told, longest: None,
    "linear": lambda told, longest: LinearScaling(factor=float(told["factor"])),
    "dynamic": lambda told, longest: DynamicScaling(factor=float(told["factor"]), original=original({}, longest)),
    "yarn": yarn,
    "llama3": llama3,
}
