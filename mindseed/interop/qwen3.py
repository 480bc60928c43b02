"""Qwen3 (2505.09388), the layout in which our dense models are kept: its config.json and its names of tensors.

Pre-norm blocks of grouped-query attention with QK-norm and a SwiGLU, RMSNorm everywhere, rotary positions paired
half-split, no biases; every layer may have the window or not.
"""
from __future__ import annotations

from typing import Any

from mindseed.interop.family import (ATTENTION, BLOCK, QK_NORM, SWIGLU, TOP, Family, attention_from_json,
                                     attention_reasons, attention_to_json, common_from_json, common_reasons,
                                     dense_reasons)
from mindseed.interop.rules import Layout
from mindseed.models.config import LayerConfig, LMConfig
from mindseed.nn.ffn import SwiGLUConfig
from mindseed.nn.gqa import GQAConfig

WHAT = "a Qwen3"


def reasons(config: LMConfig) -> list[str]:
    return (common_reasons(config, WHAT) + attention_reasons(config, WHAT, qk_norm=True, windows=True)
            + dense_reasons(config, WHAT))


def write(config: LMConfig) -> dict[str, Any]:
    windows = [layer.mixer.window for layer in config.layers]
    return attention_to_json(config) | {
        "intermediate_size": config.layers[0].ffn.ffn_dim, "use_sliding_window": any(windows),
        "sliding_window": max((w for w in windows if w), default=None), "max_window_layers": len(windows),
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windows]}


def read(data: dict[str, Any], where: str) -> LMConfig:
    count, ffn = data["num_hidden_layers"], SwiGLUConfig(ffn_dim=data["intermediate_size"])
    kinds = data.get("layer_types")
    if not kinds:                                 # as transformers fills it in: the last layers have the window
        full = data.get("max_window_layers", 28) if data.get("use_sliding_window") else count
        kinds = ["full_attention" if i < full else "sliding_attention" for i in range(count)]
    if len(kinds) != count or set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types names {len(kinds)} layers of {count}, of the kinds {sorted(set(kinds))}")
    if "sliding_attention" in kinds and not data.get("sliding_window"):
        raise ValueError("layer_types names sliding_attention, and sliding_window does not say how wide")
    window = {"full_attention": None, "sliding_attention": data.get("sliding_window")}
    layers = [LayerConfig(mixer=attention_from_json(data, where, qk_norm=True, window=window[kind]), ffn=ffn)
              for kind in kinds]
    return common_from_json(data, tuple(layers), longest=32768)


QWEN3 = Family(name="qwen3", architecture="Qwen3ForCausalLM", reasons=reasons, write=write, read=read,
               layout=Layout(top=TOP, block=BLOCK, mixers={GQAConfig: ATTENTION + QK_NORM},
                             ffns={SwiGLUConfig: SWIGLU}))
