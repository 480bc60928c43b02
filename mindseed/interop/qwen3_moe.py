"""Qwen3-MoE (2505.09388): Qwen3 whose feed-forwards are mixtures with a softmax router and no shared expert.

Single layers may stay dense (`mlp_only_layers`).
"""
from __future__ import annotations

from typing import Any

from mindseed.interop.family import (ATTENTION, BLOCK, EXPERTS, QK_NORM, SWIGLU, TOP, Family, attention_from_json,
                                     attention_reasons, attention_to_json, common_from_json, common_reasons)
from mindseed.interop.rules import Layout
from mindseed.models.config import LayerConfig, LMConfig, without_training
from mindseed.nn.ffn import SwiGLUConfig
from mindseed.nn.gqa import GQAConfig
from mindseed.nn.moe import MoEConfig

WHAT = "a Qwen3-MoE"


def reasons(config: LMConfig) -> list[str]:
    windows = {getattr(layer.mixer, "window", None) for layer in config.layers}
    found = common_reasons(config, WHAT) + attention_reasons(config, WHAT, qk_norm=True, windows=len(windows) == 1)
    ffns = [layer.ffn for layer in without_training(config).layers]
    mixtures, dense = ([f for f in ffns if isinstance(f, kind)] for kind in (MoEConfig, SwiGLUConfig))
    if not mixtures:
        return [*found, f"{WHAT} has a mixture of experts; training makes one of a dense model: mindseed train --init "
                        "DIR --model.moe.experts 4"]
    if len(mixtures) + len(dense) < len(ffns) or len(set(dense)) > 1 or len(set(mixtures)) > 1:
        found.append(f"the feed-forwards of {WHAT} are mixtures of one kind, or SwiGLUs of one kind")
    first = mixtures[0]
    for bad, why in ((first.score != "softmax", "its router scores by softmax"),
                     (first.shared_dim, "it has no shared expert"),
                     (first.groups > 1, "its experts stand in one group"),
                     (first.bias, "its router has no bias"),
                     (first.scaling != 1, "its weights are not scaled")):
        found += [why] if bad else []
    return found


def write(config: LMConfig) -> dict[str, Any]:
    dense = [i for i, layer in enumerate(config.layers) if not isinstance(layer.ffn, MoEConfig)]
    moe = next(layer.ffn for layer in config.layers if isinstance(layer.ffn, MoEConfig))
    window = config.layers[0].mixer.window
    return attention_to_json(config) | {
        "intermediate_size": config.layers[dense[0]].ffn.ffn_dim if dense else moe.expert_dim,
        "moe_intermediate_size": moe.expert_dim, "num_experts": moe.experts, "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.renormalise, "decoder_sparse_step": 1, "mlp_only_layers": dense,
        "router_aux_loss_coef": moe.balance_weight, "output_router_logits": False,
        "use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": len(config.layers)}


def read(data: dict[str, Any], where: str) -> LMConfig:
    window = data.get("sliding_window") if data.get("use_sliding_window") else None
    mixer = attention_from_json(data, where, qk_norm=True, window=window)
    moe = MoEConfig(experts=data.get("num_experts") or data["num_local_experts"], top_k=data["num_experts_per_tok"],
                    expert_dim=data["moe_intermediate_size"], renormalise=bool(data.get("norm_topk_prob", False)))
    dense = SwiGLUConfig(ffn_dim=data["intermediate_size"])
    step, only = data.get("decoder_sparse_step", 1), set(data.get("mlp_only_layers") or [])
    layers = [LayerConfig(mixer=mixer, ffn=dense if i in only or (i + 1) % step else moe)
              for i in range(data["num_hidden_layers"])]
    return common_from_json(data, tuple(layers), longest=32768)


QWEN3_MOE = Family(name="qwen3_moe", architecture="Qwen3MoeForCausalLM", reasons=reasons, write=write, read=read,
                   layout=Layout(top=TOP, block=BLOCK, mixers={GQAConfig: ATTENTION + QK_NORM},
                                 ffns={SwiGLUConfig: SWIGLU, MoEConfig: EXPERTS}))
