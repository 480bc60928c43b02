"""Llama (2302.13971, 2407.21783): grouped-query attention without QK-norm, and a SwiGLU; its config.json and names."""
from __future__ import annotations

from typing import Any

from mindseed.interop.family import (ATTENTION, BLOCK, SWIGLU, TOP, Family, attention_from_json, attention_reasons,
                                     attention_to_json, common_from_json, common_reasons, dense_reasons)
from mindseed.interop.rules import Layout
from mindseed.models.config import LayerConfig, LMConfig
from mindseed.nn.ffn import SwiGLUConfig
from mindseed.nn.gqa import GQAConfig

WHAT = "a Llama"


def reasons(config: LMConfig) -> list[str]:
    return (common_reasons(config, WHAT) + attention_reasons(config, WHAT, qk_norm=False, windows=False)
            + dense_reasons(config, WHAT))


def write(config: LMConfig) -> dict[str, Any]:
    return attention_to_json(config) | {"intermediate_size": config.layers[0].ffn.ffn_dim, "mlp_bias": False,
                                        "pretraining_tp": 1}


def read(data: dict[str, Any], where: str) -> LMConfig:
    layer = LayerConfig(mixer=attention_from_json(data, where, qk_norm=False),
                        ffn=SwiGLUConfig(ffn_dim=data["intermediate_size"]))
    return common_from_json(data, (layer,) * data["num_hidden_layers"], longest=2048)


LLAMA = Family(name="llama", architecture="LlamaForCausalLM", reasons=reasons, write=write, read=read,
               layout=Layout(top=TOP, block=BLOCK, mixers={GQAConfig: ATTENTION}, ffns={SwiGLUConfig: SWIGLU}))
