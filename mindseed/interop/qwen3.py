"""Qwen3 (2505.09388), the layout in which dense models are kept: its config.json and its names of tensors.

Qwen3 is our decoder: pre-norm blocks of grouped-query attention with QK-norm and a SwiGLU, RMSNorm everywhere, rotary
positions paired half-split, no biases. What a Qwen3 cannot express is refused with the reason when writing; what we
cannot compute is refused when reading.
"""
from __future__ import annotations

from typing import Any

from mindseed.base.errors import UserError
from mindseed.interop.rules import Rule
from mindseed.models.config import LayerConfig, LMConfig
from mindseed.nn.ffn import SwiGLUConfig
from mindseed.nn.gqa import GQAConfig
from mindseed.nn.rope import RopeConfig

MODEL_TYPE = "qwen3"
ARCHITECTURE = "Qwen3ForCausalLM"
LAYER = "model.layers.{i}."

RULES = [
    Rule("embed.weight", "model.embed_tokens.weight"),
    Rule("blocks.{i}.mixer_norm.weight", LAYER + "input_layernorm.weight"),
    Rule("blocks.{i}.mixer.q.weight", LAYER + "self_attn.q_proj.weight"),
    Rule("blocks.{i}.mixer.k.weight", LAYER + "self_attn.k_proj.weight"),
    Rule("blocks.{i}.mixer.v.weight", LAYER + "self_attn.v_proj.weight"),
    Rule("blocks.{i}.mixer.o.weight", LAYER + "self_attn.o_proj.weight"),
    Rule("blocks.{i}.mixer.q_norm.weight", LAYER + "self_attn.q_norm.weight"),
    Rule("blocks.{i}.mixer.k_norm.weight", LAYER + "self_attn.k_norm.weight"),
    Rule("blocks.{i}.ffn_norm.weight", LAYER + "post_attention_layernorm.weight"),
    Rule("blocks.{i}.ffn.gate.weight", LAYER + "mlp.gate_proj.weight"),
    Rule("blocks.{i}.ffn.up.weight", LAYER + "mlp.up_proj.weight"),
    Rule("blocks.{i}.ffn.down.weight", LAYER + "mlp.down_proj.weight"),
    Rule("norm.weight", "model.norm.weight"),
    Rule("head.weight", "lm_head.weight"),
]


def to_json(config: LMConfig, *, dtype: str, specials: dict[str, int | None]) -> dict[str, Any]:
    """The config.json of a model; `specials` are its bos, eos and pad ids. UserError if a Qwen3 cannot be this model.

    `rope_theta` stands in both of its places: transformers 5 reads `rope_parameters`, older readers the plain key.
    """
    check_expressible(config)
    layer = config.layers[0]
    mixer = layer.mixer
    return {
        "architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, "dtype": dtype, "torch_dtype": dtype,
        "vocab_size": config.vocab_size, "hidden_size": config.dim, "intermediate_size": layer.ffn.ffn_dim,
        "num_hidden_layers": len(config.layers), "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads, "head_dim": mixer.head_dim, "hidden_act": "silu",
        "max_position_embeddings": config.seq_len, "rms_norm_eps": config.norm_eps,
        "rope_theta": mixer.rope.theta, "rope_parameters": {"rope_type": "default", "rope_theta": mixer.rope.theta},
        "tie_word_embeddings": config.tied, "attention_bias": False, "attention_dropout": 0.0,
        "use_sliding_window": False, "sliding_window": None, "max_window_layers": len(config.layers),
        "layer_types": ["full_attention"] * len(config.layers), "initializer_range": 0.02, "use_cache": True,
        "bos_token_id": specials.get("bos"), "eos_token_id": specials.get("eos"), "pad_token_id": specials.get("pad"),
    }


def check_expressible(config: LMConfig) -> None:
    """Raise UserError with the reasons why a Qwen3 cannot hold this architecture. Dropout is free: no weights."""
    first, reasons = config.layers[0], []
    if any(layer != first for layer in config.layers):
        odd = next(i for i, layer in enumerate(config.layers) if layer != first)
        reasons.append(f"all of its layers are alike, and layer {odd} differs from layer 0")
    for layer in config.layers[:1]:
        if not isinstance(layer.mixer, GQAConfig):
            reasons.append(f"its mixer is grouped-query attention, not {type(layer.mixer).__name__}")
        else:
            if not layer.mixer.qk_norm:
                reasons.append("it normalises queries and keys (qk_norm)")
            if layer.mixer.norm_eps != config.norm_eps:
                reasons.append(f"it has one norm_eps, not {config.norm_eps} and {layer.mixer.norm_eps}")
        if not isinstance(layer.ffn, SwiGLUConfig):
            reasons.append(f"its feed-forward is a SwiGLU, not {type(layer.ffn).__name__}")
    if reasons:
        raise UserError(f"a Qwen3 directory cannot hold this model: {'; '.join(reasons)}")


def from_json(data: dict[str, Any], where: str) -> LMConfig:
    """The model that a config.json describes. UserError for a foreign architecture or a feature we do not compute."""
    kind = data.get("model_type")
    if kind != MODEL_TYPE:
        raise UserError(f"{where} describes the architecture {kind!r}; this version reads {MODEL_TYPE}")
    rope = data.get("rope_parameters") or {}
    scaling = data.get("rope_scaling") or rope
    kinds = data.get("layer_types") or []
    refused = {
        "attention_bias": (bool(data.get("attention_bias")), "biases in attention"),
        "hidden_act": (data.get("hidden_act", "silu") != "silu", f"the activation {data.get('hidden_act')}"),
        "rope": (scaling.get("rope_type", scaling.get("type", "default")) not in ("default", None),
                 f"rotary positions scaled by {scaling.get('rope_type', scaling.get('type'))}"),
        "layer_types": (any(k != "full_attention" for k in kinds) or (not kinds and data.get("use_sliding_window")),
                        "sliding windows"),
        "quantization_config": (bool(data.get("quantization_config")), "quantised weights"),
    }
    if reasons := [what for bad, what in refused.values() if bad]:
        raise UserError(f"{where} asks for {' and '.join(reasons)}, which this version cannot compute")
    try:
        heads, dim, eps = data["num_attention_heads"], data["hidden_size"], float(data.get("rms_norm_eps", 1e-6))
        theta = float(rope.get("rope_theta") or data.get("rope_theta") or 10_000.0)
        mixer = GQAConfig(heads=heads, kv_heads=data["num_key_value_heads"] or heads,
                          head_dim=data["head_dim"] or dim // heads, rope=RopeConfig(theta=theta), norm_eps=eps)
        layer = LayerConfig(mixer=mixer, ffn=SwiGLUConfig(ffn_dim=data["intermediate_size"]))
        return LMConfig(vocab_size=data["vocab_size"], dim=dim, layers=(layer,) * data["num_hidden_layers"],
                        seq_len=data.get("max_position_embeddings", 32768),
                        tied=bool(data.get("tie_word_embeddings", False)), norm_eps=eps)
    except KeyError as error:
        raise UserError(f"{where} lacks {error.args[0]!r}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{where} does not describe a model: {error}") from None
