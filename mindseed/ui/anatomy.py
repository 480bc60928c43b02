"""A model's architecture in the words of whoever is looking; models/describe.py says the same in English, for runs."""
from __future__ import annotations

import streamlit as st

from mindseed.models.config import FFNConfig, LMConfig, MixerConfig
from mindseed.models.describe import describe, ffn_words, mixer_words, ranges, rope_words
from mindseed.nn.alibi import AlibiConfig
from mindseed.nn.ffn import MLPConfig, SwiGLUConfig
from mindseed.nn.linear_attention import DeltaConfig
from mindseed.nn.mla import MLAConfig
from mindseed.nn.moe import MoEConfig
from mindseed.ui.words import gettext as _


def shape_words(config: LMConfig) -> str:
    """The whole model in one line."""
    if st.session_state.get("language") != "zh":
        return describe(config)
    kinds: dict[str, list[int]] = {}
    for i, layer in enumerate(config.layers):
        kinds.setdefault(f"{mixing_words(layer.mixer)}，{feeding_words(layer.ffn)}", []).append(i)
    body = [words if len(kinds) == 1 else _("layers {layers}: {words}", layers=ranges(at), words=words)
            for words, at in kinds.items()]
    more = [_("{norm} norm", norm=config.norm), _("{place}-norm", place=config.placement)] if (
        config.norm, config.placement) != ("rms", "pre") else []
    more += [_("learned positions")] if config.learned_positions else []
    more += [_("predicts {n} further tokens", n=len(config.mtp))] if config.mtp else []
    return "，".join([_("{n} layers", n=len(config.layers)), _("dim {n}", n=config.dim), "；".join(body), *more,
                     _("vocabulary {n}", n=config.vocab_size), _("context {n}", n=config.seq_len)])


def mixing_words(c: MixerConfig) -> str:
    if st.session_state.get("language") != "zh":
        return mixer_words(c)
    if isinstance(c, MLAConfig):
        return _("latent attention, {n} heads of {width}, latent {rank}", n=c.heads,
                 width=f"{c.plain_dim}+{c.rope_dim}", rank=c.kv_rank) + turning_words(c.rope)
    if isinstance(c, DeltaConfig):
        rule = _("gated delta rule") if c.delta else _("gated linear attention")
        return f"{rule}，" + _("{n} heads of {width}", n=c.heads, width=f"{c.key_dim}x{c.value_dim}")
    words = _("{n} heads of {width} ({kv} kv)", n=c.heads, width=c.head_dim, kv=c.kv_heads)
    words += "，" + _("window {n}", n=c.window) if c.window else ""
    return words + ("，ALiBi" if isinstance(c.positions, AlibiConfig) else turning_words(c.rope))


def turning_words(c: object) -> str:
    return "，" + _("no rotation") if c is None else rope_words(c).replace(", ", "，")


def feeding_words(c: FFNConfig) -> str:
    if isinstance(c, MoEConfig):
        words = _("{k} of {e} experts of {width}", k=c.top_k, e=c.experts, width=c.expert_dim)
        return words + (_(" + shared {n}", n=c.shared_dim) if c.shared_dim else "") + f"（{c.score}）"
    if not isinstance(c, (SwiGLUConfig, MLPConfig)):
        return ffn_words(c)
    return _("feed-forward {n}", n=c.ffn_dim) + (f"（{c.activation}）" if isinstance(c, MLPConfig) else "")
