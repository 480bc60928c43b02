"""A model's whole architecture as data: a width, a vocabulary, and one mixer and one feed-forward config per layer."""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mindseed.base.errors import UserError
from mindseed.nn.ffn import SwiGLUConfig
from mindseed.nn.gqa import GQAConfig
from mindseed.nn.rope import RopeConfig

MixerConfig = GQAConfig
FFNConfig = SwiGLUConfig


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
    norm_eps: float = 1e-6
    dropout: float = 0.0                  # on the embedding and on what every mixer and feed-forward adds

    def __post_init__(self) -> None:
        if min(self.vocab_size, self.dim, self.seq_len) < 1 or not self.layers:
            raise ValueError(f"vocab_size={self.vocab_size}, dim={self.dim}, seq_len={self.seq_len} and the number of "
                             f"layers ({len(self.layers)}) must all be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")


KINDS = {kind.__name__: kind for kind in (LMConfig, LayerConfig, GQAConfig, SwiGLUConfig, RopeConfig)}


def config_to_dict(config: Any) -> Any:
    """Nested dataclasses to JSON: every object names its kind, so that a tuple of mixed layers comes back exactly."""
    if dataclasses.is_dataclass(config):
        values = {f.name: config_to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"kind": type(config).__name__, **values}
    if isinstance(config, tuple):
        return [config_to_dict(c) for c in config]
    return config


def config_from_dict(data: Any) -> Any:
    """The inverse of `config_to_dict`. An unknown kind or field is a UserError: it was written by another version."""
    if isinstance(data, list):
        return tuple(config_from_dict(d) for d in data)
    if not isinstance(data, dict):
        return data
    kind = KINDS.get(data.get("kind", ""))
    if kind is None:
        raise UserError(f"unknown kind of configuration {data.get('kind')!r}; this version knows {', '.join(KINDS)}")
    try:
        return kind(**{key: config_from_dict(value) for key, value in data.items() if key != "kind"})
    except (TypeError, ValueError) as error:
        raise UserError(f"cannot read the configuration of {data['kind']}: {error}") from None
