"""A longer context for a trained model: its rotary angles are scaled by YaRN (2309.00071), then training goes on.

Beyond the length it was trained on a model meets angles that it has never seen, and its loss jumps. YaRN squeezes the
slow angles back into the range it knows and leaves alone the fast ones, which tell neighbours apart; a short training
at the new length then suffices. Phases count from the very first length: 512 -> 2048 -> 8192 are factors of 4 and 16.
"""
from __future__ import annotations

from dataclasses import replace

from mindseed.base.errors import UserError
from mindseed.models.config import LayerConfig, LMConfig
from mindseed.nn.gqa import GQAConfig
from mindseed.nn.mla import MLAConfig
from mindseed.nn.rope import RopeConfig, YarnScaling


def extended(config: LMConfig, seq_len: int) -> LMConfig:
    """`config` for texts of `seq_len` tokens, with the same weights. UserError where positions cannot be stretched.

    Layers without rotary positions (linear attention, ALiBi, none) need no scaling and stay as they are.
    """
    if seq_len <= config.seq_len:
        raise UserError(f"the model reads {config.seq_len} tokens already; ask for a longer context than {seq_len}")
    if config.learned_positions:
        raise UserError("this model has a learned vector for each of its positions and none for further ones; only "
                        "rotary positions can be stretched")

    def layer(c: LayerConfig) -> LayerConfig:
        m = c.mixer
        if isinstance(m, GQAConfig) and m.rope is not None:
            return replace(c, mixer=replace(m, positions=stretched(m.rope, config.seq_len, seq_len)))
        if isinstance(m, MLAConfig):
            return replace(c, mixer=replace(m, rope=stretched(m.rope, config.seq_len, seq_len)))
        return c

    return replace(config, seq_len=seq_len, layers=tuple(map(layer, config.layers)), mtp=tuple(map(layer, config.mtp)))


def stretched(rope: RopeConfig, trained: int, seq_len: int) -> RopeConfig:
    """YaRN for `seq_len` tokens. A model that has been stretched before is stretched from where it began."""
    s = rope.scaling
    if s is None:
        return replace(rope, scaling=YarnScaling(factor=seq_len / trained, original=trained))
    if isinstance(s, YarnScaling):                # never less than it was trained with; the temperature goes with it
        factor = max(s.factor, seq_len / s.original)
        kept = s.attention_factor if factor == s.factor else None
        return replace(rope, scaling=replace(s, factor=factor, attention_factor=kept))
    raise UserError(f"this model's rotary positions are scaled by {type(s).__name__} already; only plain ones and "
                    "those of YaRN are stretched further")
