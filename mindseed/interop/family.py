"""What every family of published architectures has: its names of tensors, and its config.json in both directions.

A family says no with reasons: `reasons` lists why it cannot hold a model of ours, and reading raises for a feature that
we do not compute. What all config.json files share is written and read here.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable

from mindseed.base.errors import UserError
from mindseed.base.files import misfit
from mindseed.interop.rope_json import rope_from_json, rope_to_json
from mindseed.interop.rules import Layout, Rule
from mindseed.models.config import LARGEST, LayerConfig, LMConfig
from mindseed.nn.ffn import MLPConfig, SwiGLUConfig
from mindseed.nn.gqa import GQAConfig
from mindseed.nn.linear_attention import DeltaConfig
from mindseed.nn.mla import MLAConfig
from mindseed.nn.moe import MoEConfig
from mindseed.nn.rope import DynamicScaling

SPELT = {GQAConfig: "grouped-query attention", MLAConfig: "latent attention", DeltaConfig: "a gated delta rule",
         SwiGLUConfig: "SwiGLU", MLPConfig: "an MLP without gate", MoEConfig: "a mixture of experts"}
TOP = [
    Rule("embed.weight", "model.embed_tokens.weight"),
    Rule("norm.weight", "model.norm.weight"),
    Rule("head.weight", "lm_head.weight"),
]
BLOCK = [
    Rule("mixer_norm.weight", "input_layernorm.weight"),
    Rule("ffn_norm.weight", "post_attention_layernorm.weight"),
]
ATTENTION = [Rule(f"{name}.weight", f"self_attn.{name}_proj.weight") for name in "qkvo"]
QK_NORM = [Rule(f"{name}_norm.weight", f"self_attn.{name}_norm.weight") for name in "qk"]
SWIGLU = [Rule(f"{name}.weight", f"mlp.{name}_proj.weight") for name in ("gate", "up", "down")]
EXPERTS = [Rule("router.weight", "mlp.gate.weight"),
           *(Rule(f"{name}.weight", f"mlp.experts.{{e}}.{name}_proj.weight") for name in ("gate", "up", "down"))]
DEEPEST = 10_000                                  # layers; more is a slip, and takes minutes to find out otherwise
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
         "intermediate_size", "moe_intermediate_size", "max_position_embeddings", "sliding_window", "max_window_layers",
         "num_experts", "num_local_experts", "num_experts_per_tok", "decoder_sparse_step", "q_lora_rank",
         "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts", "n_shared_experts",
         "n_group", "topk_group", "first_k_dense_replace", "num_nextn_predict_layers")
KEYS = {f"{key}?": int | None for key in SIZES} | {
    "rms_norm_eps?": float, "rope_theta?": float | None}


@dataclass(frozen=True, kw_only=True)
class Family:
    name: str                                     # as a user types it, and config.json's model_type
    architecture: str                             # transformers' class
    layout: Layout
    reasons: Callable[[LMConfig], list[str]]      # why it cannot hold this model; [] if it can
    write: Callable[[LMConfig], dict[str, Any]]   # the keys of config.json beyond the common ones
    read: Callable[[dict[str, Any], str], LMConfig]           # of config.json, and where it lies

    def to_json(self, config: LMConfig, *, dtype: str, specials: dict[str, int | None]) -> dict[str, Any]:
        """The config.json of a model; `specials` are its bos, eos and pad ids. UserError if it cannot be this one."""
        if reasons := self.reasons(config):
            raise UserError(f"a {self.name} directory cannot hold this model: {'; '.join(reasons)}")
        return {
            "architectures": [self.architecture], "model_type": self.name, "dtype": dtype, "torch_dtype": dtype,
            "vocab_size": config.vocab_size, "hidden_size": config.dim, "num_hidden_layers": len(config.layers),
            "hidden_act": "silu", "max_position_embeddings": config.seq_len, "rms_norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tied, "attention_bias": False, "attention_dropout": 0.0,
            "initializer_range": 0.02, "use_cache": True, "bos_token_id": specials.get("bos"),
            "eos_token_id": specials.get("eos"), "pad_token_id": specials.get("pad"), **self.write(config)}

    def from_json(self, data: dict[str, Any], where: str) -> LMConfig:
        """The model that a config.json describes. UserError for a feature that we do not compute."""
        problem = misfit(data, KEYS)
        if large := [key for key in SIZES if not problem and not 0 <= (data.get(key) or 0) <= LARGEST]:
            problem = f"{large[0]}={data[large[0]]} must lie between 0 and {LARGEST}"
        elif not problem and (data.get("num_hidden_layers") or 0) > DEEPEST:
            problem = f"num_hidden_layers={data['num_hidden_layers']} is more than {DEEPEST}"
        elif not problem and not math.isfinite(data.get("rms_norm_eps") or 0):
            problem = f"rms_norm_eps={data['rms_norm_eps']} is no number"
        if problem:
            raise UserError(f"{where} does not describe a model: {problem}")
        refused = {
            "attention_bias": (bool(data.get("attention_bias")), "biases in attention"),
            "mlp_bias": (bool(data.get("mlp_bias")), "biases in the feed-forward"),
            "hidden_act": (data.get("hidden_act", "silu") != "silu", f"the activation {data.get('hidden_act')}"),
            "quantization_config": (bool(data.get("quantization_config")), "quantised weights"),
        }
        if reasons := [what for bad, what in refused.values() if bad]:
            raise UserError(f"{where} asks for {' and '.join(reasons)}, which this version cannot compute")
        try:
            return self.read(data, where)
        except KeyError as error:
            raise UserError(f"{where} lacks {error.args[0]!r}") from None
        except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
            raise UserError(f"{where} does not describe a model: {error}") from None


# ------------------------------------------------------------------------------------------- what families share

def common_reasons(config: LMConfig, what: str) -> list[str]:
    """Why none of the families here could hold it: they are pre-norm decoders with RMSNorm and rotary positions."""
    reasons = []
    if config.norm != "rms" or config.placement != "pre":
        reasons.append(f"{what} normalises with RMSNorm before each half of a block, not {config.norm}, "
                       f"{config.placement}")
    if config.learned_positions:
        reasons.append(f"{what} has no learned positions")
    for layer in config.layers:
        rope = getattr(layer.mixer, "rope", None)
        if rope is not None and isinstance(rope.scaling, DynamicScaling) and rope.scaling.original != config.seq_len:
            reasons.append(f"its dynamic rope scaling starts at seq_len={config.seq_len}, not {rope.scaling.original}")
            break
    return reasons


def attention_reasons(config: LMConfig, what: str, *, qk_norm: bool, windows: bool) -> list[str]:
    """Why a family of grouped-query attention could not: `windows` says whether its layers may have one."""
    mixers = [layer.mixer for layer in config.layers]
    if odd := [m for m in mixers if not isinstance(m, GQAConfig)]:
        return [f"the mixers of {what} are grouped-query attention, not {SPELT[type(odd[0])]}"]
    first, reasons = mixers[0], []
    alike = [(m.heads, m.kv_heads, m.head_dim, m.positions, m.qk_norm, m.norm_eps) for m in mixers]
    if differing := [i for i, m in enumerate(alike) if m != alike[0]]:
        reasons.append(f"all attention layers of {what} are alike, and layer {differing[0]} differs from layer 0")
    if first.rope is None or first.rope.interleaved:
        reasons.append(f"{what} rotates half-split pairs, and has no other positions")
    if first.qk_norm != qk_norm:
        reasons.append(f"{what} {'normalises' if qk_norm else 'does not normalise'} queries and keys (qk_norm)")
    if first.qk_norm and first.norm_eps != config.norm_eps:
        reasons.append(f"it has one norm_eps, not {config.norm_eps} and {first.norm_eps}")
    found = {m.window for m in mixers if m.window}
    if found and not windows:
        reasons.append(f"{what} has no sliding windows")
    elif len(found) > 1:
        reasons.append(f"{what} has one size of window, not {sorted(found)}")
    return reasons


def dense_reasons(config: LMConfig, what: str) -> list[str]:
    ffns = [layer.ffn for layer in config.layers]
    if odd := [f for f in ffns if not isinstance(f, SwiGLUConfig)]:
        return [f"the feed-forwards of {what} are SwiGLU, not {SPELT[type(odd[0])]}"]
    if differing := [i for i, f in enumerate(ffns) if f != ffns[0]]:
        return [f"all layers of {what} are alike, and the feed-forward of layer {differing[0]} differs from layer 0"]
    return []


def attention_to_json(config: LMConfig) -> dict[str, Any]:
    mixer = config.layers[0].mixer
    return {"num_attention_heads": mixer.heads, "num_key_value_heads": mixer.kv_heads, "head_dim": mixer.head_dim,
            **rope_to_json(mixer.rope)}


def attention_from_json(data: dict[str, Any], where: str, *, qk_norm: bool, window: int | None = None) -> GQAConfig:
    heads = data["num_attention_heads"]
    return GQAConfig(heads=heads, kv_heads=data.get("num_key_value_heads") or heads,
                     head_dim=data.get("head_dim") or data["hidden_size"] // heads, qk_norm=qk_norm, window=window,
                     positions=rope_from_json(data, where), norm_eps=float(data.get("rms_norm_eps", 1e-6)))


def common_from_json(data: dict[str, Any], layers: tuple[LayerConfig, ...], *, longest: int) -> LMConfig:
    return LMConfig(vocab_size=data["vocab_size"], dim=data["hidden_size"], layers=layers,
                    seq_len=data.get("max_position_embeddings", longest),
                    tied=bool(data.get("tie_word_embeddings", False)), norm_eps=float(data.get("rms_norm_eps", 1e-6)))


def no_windows(data: dict[str, Any], where: str) -> None:
    kinds = data.get("layer_types") or []
    if any(kind != "full_attention" for kind in kinds) or (not kinds and data.get("use_sliding_window")):
        raise UserError(f"{where} asks for sliding windows, which this family does not have here")


