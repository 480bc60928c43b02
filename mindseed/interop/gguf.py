"""GGUF, the single file that llama.cpp and Ollama run: weights, tokenizer and chat template, in F32, F16, BF16 or Q8_0.

Names and numbers follow llama.cpp's architectures `llama`, `qwen3`, `qwen3moe` and `deepseek2`. Three things differ
from our layout. Its `llama` and `deepseek2` turn interleaved pairs, so rows of half-split queries and keys are put in
that order. Its latent attention is the absorbed form, so the matrix from the latent up is kept as two, the keys' one
transposed. And llama3's scaling is a tensor of divisors of the frequencies.

Much of what llama.cpp computes stands in its code and not in the file (`reasons` lists where that is not what our
model does), so a model is refused, never bent. Q8_0 keeps 32 weights of a row as bytes with one scale; rows that are no
multiple of 32 stay F16, vectors and routers F32. The writing and the quantiser are those of the `gguf` library.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import torch
from torch import Tensor

from mindseed.base.errors import UserError
from mindseed.base.log import extra
from mindseed.interop.directory import Loaded
from mindseed.interop.families import FAMILIES
from mindseed.interop.gguf_vocab import add_vocabulary
from mindseed.interop.rules import Layout, Rule, translate
from mindseed.models.config import LMConfig, without_training
from mindseed.models.lm import LM
from mindseed.nn.ffn import SwiGLUConfig
from mindseed.nn.gqa import GQAConfig
from mindseed.nn.mla import MLAConfig
from mindseed.nn.moe import MoEConfig
from mindseed.nn.rope import (DynamicScaling, LinearScaling, Llama3Scaling, RopeConfig, YarnScaling, frequencies,
                              mscale, yarn_attention_factor)

ARCHITECTURES = {"qwen3": "qwen3", "llama": "llama", "qwen3_moe": "qwen3moe", "deepseek_v3": "deepseek2"}
INTERLEAVED = {"llama", "deepseek2"}              # llama.cpp's kind of rotation there
KINDS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
LARGEST = {"f16": 65504.0, "q8_0": 127 * 65504.0}             # weights; a scale of Q8_0 is an F16
LITE = {26: None, 27: None, 48: 128256}           # layers (and words) that make llama.cpp expect queries without a rank

DENSE = [Rule(f"{name}.weight", f"ffn_{name}.weight") for name in ("gate", "up", "down")]
LAYOUT = Layout(
    layer="blk.{i}.",
    top=[Rule("embed.weight", "token_embd.weight"), Rule("norm.weight", "output_norm.weight"),
         Rule("head.weight", "output.weight")],
    block=[Rule("mixer_norm.weight", "attn_norm.weight"), Rule("ffn_norm.weight", "ffn_norm.weight")],
    mixers={
        GQAConfig: [Rule(f"{ours}.weight", f"attn_{theirs}.weight") for ours, theirs in (
            ("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"), ("q_norm", "q_norm"), ("k_norm", "k_norm"))],
        MLAConfig: [Rule(f"{ours}.weight", f"attn_{theirs}.weight") for ours, theirs in (
            ("q", "q"), ("q_down", "q_a"), ("q_norm", "q_a_norm"), ("q_up", "q_b"), ("kv_down", "kv_a_mqa"),
            ("kv_norm", "kv_a_norm"), ("kv_up", "kv_b"), ("o", "output"))]},
    ffns={
        SwiGLUConfig: DENSE,
        MoEConfig: [Rule("router.weight", "ffn_gate_inp.weight"), Rule("bias", "exp_probs_b.bias"),
                    *(Rule(f"{name}.weight", f"ffn_{name}_exps.weight") for name in ("gate", "up", "down")),
                    *(Rule(f"shared.{name}.weight", f"ffn_{name}_shexp.weight") for name in ("gate", "up", "down"))]})


@dataclass(frozen=True, kw_only=True)
class Written:
    """A tensor in the file."""

    ours: str
    theirs: str
    shape: tuple[int, ...]
    kind: str


def write_gguf(loaded: Loaded, file: Path, *, kind: str, name: str, drop_mtp: bool = False) -> list[Written]:
    """Write the file, of a `kind` in KINDS. UserError if llama.cpp cannot run this model or its tokenizer."""
    model, architecture = loaded.model, architecture_of(loaded.model.config, drop_mtp=drop_mtp)
    if model.value_head is not None:
        raise UserError("this model gives rewards, not texts: a GGUF file has no place for its value head")
    with extra("gguf"):
        import gguf
    writer, written = gguf.GGUFWriter(file, architecture), []
    for key, value in metadata(model.config, architecture, gguf).items():
        add(writer, key.format(arch=architecture), value)
    writer.add_name(name)
    writer.add_file_type(int(getattr(gguf.LlamaFileType, "ALL_F32" if kind == "f32" else f"MOSTLY_{KINDS[kind]}")))
    if kind == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_vocabulary(writer, loaded, model.config.vocab_size)
    for ours, theirs, x in tensors(model, architecture):
        wanted = kind_for(theirs, x, kind)
        if x.abs().max() > LARGEST.get(wanted, torch.inf):
            raise UserError(f"{ours} has weights up to {x.abs().max():.3g}, beyond what {wanted} can hold; choose bf16 "
                            "or f32")
        target = getattr(gguf.GGMLQuantizationType, KINDS[wanted])
        writer.add_tensor(theirs, gguf.quants.quantize(np.ascontiguousarray(x.float().numpy()), target),
                          raw_dtype=target)
        written.append(Written(ours=ours, theirs=theirs, shape=tuple(x.shape), kind=wanted))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def kind_named(name: str) -> str:
    """The kind that a user asks for; torch's names of the same are understood."""
    known = {"fp32": "f32", "fp16": "f16"}.get(name.lower(), name.lower())
    if known not in KINDS:
        raise UserError(f"dtype={name!r} is no kind of GGUF that is written here; choose one of {', '.join(KINDS)} "
                        "(K-quants are made by llama.cpp's llama-quantize from an f16 file)")
    return known


def kind_for(name: str, x: Tensor, kind: str) -> str:
    """What a tensor is stored as in a file of this kind."""
    if x.ndim == 1 or name.endswith(("ffn_gate_inp.weight", "exp_probs_b.bias", "rope_freqs.weight")):
        return "f32"
    return "f16" if kind == "q8_0" and x.shape[-1] % 32 else kind


# -------------------------------------------------------------------------------------------- what llama.cpp can run

def architecture_of(config: LMConfig, *, drop_mtp: bool = False) -> str:
    """llama.cpp's name for it. UserError, with the reasons of the closest, for a model that it cannot run."""
    found = {name: FAMILIES[name].reasons(config) + reasons(config, architecture, drop_mtp)
             for name, architecture in ARCHITECTURES.items()}
    name = min(found, key=lambda name: (bool(FAMILIES[name].reasons(config)), len(found[name])))
    if found[name]:
        raise UserError(f"llama.cpp cannot run this model as {ARCHITECTURES[name]}: {'; '.join(found[name])}")
    return ARCHITECTURES[name]


def reasons(config: LMConfig, architecture: str, drop_mtp: bool) -> list[str]:
    """Why llama.cpp would compute something else, for a model that the family of this architecture can hold."""
    layers, found = without_training(config).layers, []
    mixer, ffns = layers[0].mixer, [layer.ffn for layer in layers]
    moe = next((f for f in ffns if isinstance(f, MoEConfig)), None)
    rope = getattr(mixer, "rope", None)
    scaling = rope.scaling if rope is not None else None
    latent = isinstance(mixer, MLAConfig)
    for bad, why in (
            (any(getattr(layer.mixer, "window", None) for layer in layers), "it has no sliding windows there"),
            (config.mtp and not drop_mtp, "modules that predict further tokens are not written; leave them out with "
             "--drop-mtp, which changes no logits"),
            (isinstance(scaling, DynamicScaling), "it has no dynamic rope scaling; extend the model with yarn instead"),
            (isinstance(scaling, Llama3Scaling) and architecture != "llama", "it has llama3's rope scaling for Llamas "
             "alone"),
            (isinstance(scaling, YarnScaling) and not as_there(rope, mixer.rope_dim if latent else mixer.head_dim),
             "its yarn always has beta_fast 32 and beta_slow 1, and rounds borders to whole pairs"),
            (latent and isinstance(scaling, YarnScaling) and abs(yarn_attention_factor(scaling) - 1) > 1e-6,
             "its yarn for latent attention scales the scores alone: mscale and mscale_all_dim must be equal"),
            (architecture == "qwen3moe" and any(f != moe for f in ffns), "all its layers are mixtures, none dense"),
            (architecture == "qwen3moe" and moe is not None and not moe.renormalise,
             "it always renormalises the weights of the chosen experts"),
            (latent and mixer.norm_eps != config.norm_eps, "it has one norm_eps, not "
             f"{config.norm_eps} and {getattr(mixer, 'norm_eps', None)}"),
            (latent and mixer.q_rank and LITE.get(len(layers), 0) in (None, config.vocab_size),
             f"it takes {len(layers)} layers for the small DeepSeek-V2, whose queries have no rank")):
        found += [why] if bad else []
    return found


def as_there(rope: RopeConfig, width: int) -> bool:
    """Whether yarn gives the frequencies that it has with llama.cpp's constants."""
    plain = YarnScaling(factor=rope.scaling.factor, original=rope.scaling.original)
    return torch.equal(frequencies(rope, width)[0], frequencies(replace(rope, scaling=plain), width)[0])


# --------------------------------------------------------------------------------------------------------- tensors

def tensors(model: LM, architecture: str) -> Iterator[tuple[str, str, Tensor]]:
    """(our name, theirs, the tensor as llama.cpp wants it). Modules of multi-token prediction are left out."""
    config = model.config
    state = {name: x.detach().cpu() for name, x in model.state_dict().items() if not name.startswith("mtp.")}
    for ours, (theirs,) in translate(LAYOUT, config, {name: x.shape for name, x in state.items()}).items():
        x = state[ours]
        part = ours.split(".")
        mixer = config.layers[int(part[1])].mixer if part[0] == "blocks" else None
        if mixer is not None and part[2] == "mixer":
            x = turned(x, part[3], mixer, architecture)
        if isinstance(mixer, MLAConfig) and part[2:4] == ["mixer", "kv_up"]:
            key_up, value_up = x.view(mixer.heads, -1, mixer.kv_rank).split([mixer.plain_dim, mixer.value_dim], dim=1)
            yield ours, theirs.replace("attn_kv_b", "attn_k_b"), key_up.mT                    # (H, C, P)
            yield ours, theirs.replace("attn_kv_b", "attn_v_b"), value_up                     # (H, V, C)
        else:
            yield ours, theirs, x
    rope = config.layers[0].mixer.rope
    if isinstance(rope.scaling, Llama3Scaling):
        width = config.layers[0].mixer.head_dim
        plain = frequencies(RopeConfig(theta=rope.theta), width)[0]
        yield "rope", "rope_freqs.weight", (plain / frequencies(rope, width)[0]).float()


def turned(x: Tensor, part: str, mixer: GQAConfig | MLAConfig, architecture: str) -> Tensor:
    """Rows of rotated queries and keys, in the order of pairs that llama.cpp turns."""
    if architecture not in INTERLEAVED or mixer.rope.interleaved:
        return x
    if isinstance(mixer, GQAConfig) and part in ("q", "k"):
        return interleave(x.unflatten(0, (-1, mixer.head_dim)), 0).flatten(0, 1)
    if isinstance(mixer, MLAConfig) and part in ("q", "q_up"):
        return interleave(x.unflatten(0, (mixer.heads, -1)), mixer.plain_dim).flatten(0, 1)
    if isinstance(mixer, MLAConfig) and part == "kv_down":
        return interleave(x[None], mixer.kv_rank)[0]
    return x


def interleave(x: Tensor, start: int) -> Tensor:
    """x (heads, rows, D): rows from `start` on from halves (a1 a2 .. b1 b2 ..) to pairs (a1 b1 a2 b2 ..)."""
    pairs = x[:, start:].unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat([x[:, :start], pairs], dim=1)


# -------------------------------------------------------------------------------------------------------- metadata

def metadata(config: LMConfig, architecture: str, gguf: Any) -> dict[str, Any]:
    """Keys and values; Python's int, float, bool and str become uint32, float32, bool and string."""
    mixer, ffns = config.layers[0].mixer, [layer.ffn for layer in config.layers]
    dense = [f.ffn_dim for f in ffns if isinstance(f, SwiGLUConfig)]
    moe = next((f for f in ffns if isinstance(f, MoEConfig)), None)
    a = "{arch}.attention."
    out = {"{arch}.vocab_size": config.vocab_size, "{arch}.context_length": config.seq_len,
           "{arch}.embedding_length": config.dim, "{arch}.block_count": len(config.layers),
           "{arch}.feed_forward_length": dense[0] if dense else moe.expert_dim,
           a + "head_count": mixer.heads, a + "layer_norm_rms_epsilon": float(config.norm_eps)}
    if isinstance(mixer, MLAConfig):
        out |= {a + "head_count_kv": 1, a + "key_length": mixer.kv_rank + mixer.rope_dim,
                a + "value_length": mixer.kv_rank, a + "key_length_mla": mixer.key_dim,
                a + "value_length_mla": mixer.value_dim, a + "kv_lora_rank": mixer.kv_rank,
                a + "q_lora_rank": mixer.q_rank or 0, "{arch}.rope.dimension_count": mixer.rope_dim}
    else:
        out |= {a + "head_count_kv": mixer.kv_heads, a + "key_length": mixer.head_dim,
                a + "value_length": mixer.head_dim, "{arch}.rope.dimension_count": mixer.head_dim}
    if moe is not None:
        e = "{arch}.expert_"
        out |= {e + "count": moe.experts, e + "used_count": moe.top_k, e + "feed_forward_length": moe.expert_dim}
        if architecture == "deepseek2":
            out |= {"{arch}.leading_dense_block_count": len(dense),
                    e + "shared_count": moe.shared_dim // moe.expert_dim, e + "weights_scale": float(moe.scaling),
                    e + "weights_norm": moe.renormalise,
                    e + "gating_func": int(getattr(gguf.ExpertGatingFuncType, moe.score.upper()))}
            if moe.top_groups < moe.groups:       # else all compete, as without groups
                out |= {e + "group_count": moe.groups, e + "group_used_count": moe.top_groups}
    return out | rope_metadata(mixer)


def rope_metadata(mixer: GQAConfig | MLAConfig) -> dict[str, Any]:
    s, r = mixer.rope.scaling, "{arch}.rope.scaling."
    out: dict[str, Any] = {"{arch}.rope.freq_base": float(mixer.rope.theta)}
    if isinstance(s, LinearScaling):
        out |= {r + "type": "linear", r + "factor": float(s.factor)}
    elif isinstance(s, YarnScaling):
        out |= {r + "type": "yarn", r + "factor": float(s.factor), r + "original_context_length": s.original}
        if isinstance(mixer, MLAConfig) and s.mscale_all_dim:
            out[r + "yarn_log_multiplier"] = 0.1 * s.mscale_all_dim
        else:                                     # llama.cpp multiplies its own factor by this one
            out[r + "attn_factor"] = yarn_attention_factor(s) / mscale(s.factor)
    return out


def add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds[type(value)](key, value)
