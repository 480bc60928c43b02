"""DeepSeek-V3 (2412.19437): latent attention, fine experts behind a sigmoid router whose bias balances them, a shared
expert, some dense layers at the start, and modules that predict further tokens as layers after the last.
"""
from __future__ import annotations

from typing import Any

from mindseed.interop.family import BLOCK, EXPERTS, SWIGLU, TOP, Family, common_from_json, common_reasons
from mindseed.interop.rope_json import rope_from_json, rope_to_json
from mindseed.interop.rules import Layout, Rule
from mindseed.models.config import LayerConfig, LMConfig, without_training
from mindseed.nn.ffn import SwiGLUConfig
from mindseed.nn.mla import MLAConfig
from mindseed.nn.moe import MoEConfig
from mindseed.nn.rope import YarnScaling

WHAT = "a DeepSeek-V3"
LATENT = [Rule(f"{ours}.weight", f"self_attn.{theirs}.weight") for ours, theirs in (
    ("q", "q_proj"), ("q_down", "q_a_proj"), ("q_norm", "q_a_layernorm"), ("q_up", "q_b_proj"),
    ("kv_down", "kv_a_proj_with_mqa"), ("kv_norm", "kv_a_layernorm"), ("kv_up", "kv_b_proj"), ("o", "o_proj"))]
MIXTURE = [*EXPERTS, Rule("bias", "mlp.gate.e_score_correction_bias"),
           *(Rule(f"shared.{name}.weight", f"mlp.shared_experts.{name}_proj.weight")
             for name in ("gate", "up", "down"))]
AHEAD = [Rule("embed_norm.weight", "enorm.weight"), Rule("hidden_norm.weight", "hnorm.weight"),
         Rule("join.weight", "eh_proj.weight"), Rule("norm.weight", "shared_head.norm.weight")]
INNER_EPS = 1e-6                                  # of the norms inside attention, whatever rms_norm_eps is


def reasons(config: LMConfig) -> list[str]:
    found = common_reasons(config, WHAT)
    layers = without_training(config).layers
    mixers, ffns = [layer.mixer for layer in layers], [layer.ffn for layer in layers]
    if any(not isinstance(m, MLAConfig) or m != mixers[0] for m in mixers):
        found.append(f"all mixers of {WHAT} are latent attention of one kind")
    elif mixers[0].norm_eps != INNER_EPS:
        found.append(f"the norms inside its attention have eps {INNER_EPS}, not {mixers[0].norm_eps}")
    dense = next((i for i, f in enumerate(ffns) if isinstance(f, MoEConfig)), len(ffns))
    if dense == len(ffns):
        return [*found, f"{WHAT} has a mixture of experts"]
    if any(not isinstance(f, SwiGLUConfig) or f != ffns[0] for f in ffns[:dense]) or any(
            f != ffns[dense] for f in ffns[dense:]):
        found.append(f"{WHAT} has SwiGLUs of one kind up to some layer, and mixtures of one kind from there on")
        return found
    moe = ffns[dense]
    for bad, why in ((moe.score != "sigmoid" or not moe.bias, "its router scores by sigmoid and has a bias"),
                     (not moe.shared_dim or moe.shared_dim % moe.expert_dim,
                      "its shared expert is a whole number of experts wide")):
        found += [why] if bad else []
    if any(layer != layers[-1] for layer in without_training(config).mtp):
        found.append("its modules for further tokens are like its last layer")
    return found


def write(config: LMConfig) -> dict[str, Any]:
    mixer, moe = config.layers[-1].mixer, config.layers[-1].ffn
    dense = sum(not isinstance(layer.ffn, MoEConfig) for layer in config.layers)
    return {
        "num_attention_heads": mixer.heads, "num_key_value_heads": mixer.heads, "q_lora_rank": mixer.q_rank,
        "kv_lora_rank": mixer.kv_rank, "qk_nope_head_dim": mixer.plain_dim, "qk_rope_head_dim": mixer.rope_dim,
        "v_head_dim": mixer.value_dim, "rope_interleave": mixer.rope.interleaved, **rope_to_json(mixer.rope),
        "intermediate_size": config.layers[0].ffn.ffn_dim if dense else moe.expert_dim, "first_k_dense_replace": dense,
        "moe_intermediate_size": moe.expert_dim, "n_routed_experts": moe.experts, "num_experts_per_tok": moe.top_k,
        "n_shared_experts": moe.shared_dim // moe.expert_dim, "n_group": moe.groups, "topk_group": moe.top_groups,
        "norm_topk_prob": moe.renormalise, "routed_scaling_factor": moe.scaling, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "moe_layer_freq": 1, "num_nextn_predict_layers": len(config.mtp)}


def read(data: dict[str, Any], where: str) -> LMConfig:
    if data.get("scoring_func", "sigmoid") != "sigmoid" or data.get("topk_method", "noaux_tc") != "noaux_tc":
        raise ValueError("its router is not DeepSeek-V3's (sigmoid scores, noaux_tc)")
    if data.get("moe_layer_freq", 1) != 1:
        raise ValueError("moe_layer_freq other than 1 is not supported")
    rope = rope_from_json(data, where, interleaved=data.get("rope_interleave", True))
    told = (data.get("rope_scaling") or {}) | (data.get("rope_parameters") or {})
    if rope.scaling is not None and not isinstance(rope.scaling, YarnScaling) and told.get("mscale_all_dim"):
        raise ValueError("mscale_all_dim sharpens attention with YaRN only here")
    mixer = MLAConfig(heads=data["num_attention_heads"], kv_rank=data["kv_lora_rank"], q_rank=data.get("q_lora_rank"),
                      plain_dim=data["qk_nope_head_dim"], rope_dim=data["qk_rope_head_dim"],
                      value_dim=data["v_head_dim"], rope=rope, norm_eps=INNER_EPS)
    moe = MoEConfig(experts=data["n_routed_experts"], top_k=data["num_experts_per_tok"],
                    expert_dim=data["moe_intermediate_size"],
                    shared_dim=data["moe_intermediate_size"] * data["n_shared_experts"], score="sigmoid", bias=True,
                    renormalise=data.get("norm_topk_prob", True), scaling=float(data["routed_scaling_factor"]),
                    groups=data.get("n_group", 8) or 1, top_groups=data.get("topk_group", 4) or 1)     # as by default
    dense = SwiGLUConfig(ffn_dim=data["intermediate_size"])
    count, first = data["num_hidden_layers"], data.get("first_k_dense_replace", 3)
    layers = [LayerConfig(mixer=mixer, ffn=dense if i < first else moe)
              for i in range(count + data.get("num_nextn_predict_layers", 0))]
    config = common_from_json(data, tuple(layers[:count]), longest=4096)
    return LMConfig(**{**vars(config), "mtp": tuple(layers[count:])})


DEEPSEEK_V3 = Family(name="deepseek_v3", architecture="DeepseekV3ForCausalLM", reasons=reasons, write=write, read=read,
                     layout=Layout(top=TOP, block=BLOCK, mixers={MLAConfig: LATENT},
                                   ffns={SwiGLUConfig: SWIGLU, MoEConfig: MIXTURE}, ahead=AHEAD))
