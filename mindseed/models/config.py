"""A model's whole architecture as data: a width, a vocabulary, and one mixer and one feed-forward config per layer."""
from __future__ import annotations

import dataclasses
import functools
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from mindseed.base.config import describe, is_of, spell
from mindseed.base.errors import UserError
from mindseed.nn.alibi import AlibiConfig
from mindseed.nn.ffn import MLPConfig, SwiGLUConfig
from mindseed.nn.gqa import GQAConfig
from mindseed.nn.linear_attention import DeltaConfig
from mindseed.nn.mla import MLAConfig
from mindseed.nn.moe import MoEConfig
from mindseed.nn.rope import DynamicScaling, LinearScaling, Llama3Scaling, RopeConfig, YarnScaling

MixerConfig = GQAConfig | MLAConfig | DeltaConfig
FFNConfig = SwiGLUConfig | MLPConfig | MoEConfig


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    mixer: MixerConfig
    ffn: FFNConfig


@dataclass(frozen=True, kw_only=True)
class LMConfig:
    """A decoder-only language model. `seq_len` is the longest context it was trained on, in tokens."""

    vocab_size: int
    dim: int
    layers: tuple[LayerConfig, ...]
    seq_len: int = 512
    tied: bool = True                     # the head shares the embedding's matrix (1608.05859)
    norm: Literal["rms", "layer"] = "rms"
    placement: Literal["pre", "post", "sandwich"] = "pre"     # where a block normalises, see lm.py
    learned_positions: bool = False       # a vector per position up to seq_len, added to the embedding (1706.03762)
    norm_eps: float = 1e-6
    dropout: float = 0.0                  # on the embedding and on what every mixer and feed-forward adds
    mtp: tuple[LayerConfig, ...] = field(default=())          # one block per further token predicted, see mtp.py
    mtp_weight: float = 0.3               # of their mean loss

    def __post_init__(self) -> None:
        if min(self.vocab_size, self.dim, self.seq_len) < 1 or not self.layers:
            raise ValueError(f"vocab_size={self.vocab_size}, dim={self.dim}, seq_len={self.seq_len} and the number of "
                             f"layers ({len(self.layers)}) must all be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        if self.mtp_weight < 0:
            raise ValueError(f"mtp_weight={self.mtp_weight} must not be negative")
        if any(isinstance(layer.mixer, DeltaConfig) for layer in self.mtp):
            raise ValueError("mtp: a module that drafts a token must be able to forget it; linear attention cannot")

    @property
    def depends_on_length(self) -> bool:
        """Whether some layer turns all keys by angles that follow from the text's length (dynamic scaling)."""
        ropes = [getattr(layer.mixer, "rope", None) for layer in self.layers]
        return any(rope is not None and rope.depends_on_length for rope in ropes)


KINDS = {kind.__name__: kind for kind in (
    LMConfig, LayerConfig, GQAConfig, MLAConfig, DeltaConfig, SwiGLUConfig, MLPConfig, MoEConfig, RopeConfig,
    AlibiConfig, LinearScaling, DynamicScaling, YarnScaling, Llama3Scaling)}


def without_training(config: LMConfig) -> LMConfig:
    """The same model with everything at its default that matters in training alone: what a foreign format, which
    has no place for it, gives back."""
    def plain(layer: LayerConfig) -> LayerConfig:
        if not isinstance(layer.ffn, MoEConfig):
            return layer
        knobs = {"bias_rate", "balance_weight", "sequence_weight", "z_weight"}
        defaults = {f.name: f.default for f in dataclasses.fields(MoEConfig) if f.name in knobs}
        return dataclasses.replace(layer, ffn=dataclasses.replace(layer.ffn, **defaults))

    return dataclasses.replace(config, dropout=0.0, mtp_weight=LMConfig.mtp_weight,
                               layers=tuple(map(plain, config.layers)), mtp=tuple(map(plain, config.mtp)))


def untrainable(config: LMConfig) -> str | None:
    """Why this model runs but must not be trained, or None."""
    for i, layer in enumerate((*config.layers, *config.mtp)):
        if isinstance(layer.ffn, MoEConfig) and layer.ffn.untrainable:
            return f"layer {i}: {layer.ffn.untrainable}"
    return None


def config_to_dict(config: Any) -> Any:
    """Nested dataclasses to JSON: every object names its kind, so that a tuple of mixed layers comes back exactly."""
    if dataclasses.is_dataclass(config):
        values = {f.name: config_to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"kind": type(config).__name__, **values}
    if isinstance(config, tuple):
        return [config_to_dict(c) for c in config]
    return config


LARGEST = 1 << 24                         # no whole number in a configuration is larger
hints_of = functools.cache(typing.get_type_hints)


def config_from_dict(data: Any) -> Any:
    """The inverse of `config_to_dict`. An unknown kind or field is a UserError: it was written by another version."""
    if isinstance(data, list):
        return tuple(config_from_dict(d) for d in data)
    if not isinstance(data, dict):
        return data
    kind = KINDS.get(data["kind"]) if isinstance(data.get("kind"), str) else None
    if kind is None:
        raise UserError(f"unknown kind of configuration {data.get('kind')!r}; this version knows {', '.join(KINDS)}")
    values = {key: config_from_dict(value) for key, value in data.items() if key != "kind"}
    if unknown := sorted(values.keys() - hints_of(kind).keys()):
        raise UserError(f"{data['kind']} has no {', '.join(map(repr, unknown))} in this version, so another version "
                        "wrote it")
    for key, hint in hints_of(kind).items():
        if key in values and not is_of(values[key], hint):
            raise UserError(f"{key} of {data['kind']} must be {spell(hint)}, not {describe(data[key])}")
        if type(values.get(key)) is int and abs(values[key]) > LARGEST:
            raise UserError(f"{key}={values[key]} of {data['kind']} is too large")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"cannot read the configuration of {data['kind']}: {error}") from None
