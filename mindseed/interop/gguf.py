"""GGUF, the single file that llama.cpp and Ollama run: weights, tokenizer and chat template, in F32, F16, BF16 or Q8_0.

Names and numbers follow llama.cpp's architectures `llama`, `qwen3`, `qwen3moe` and `deepseek2`. Three things differ
from our layout. Its `llama` and `deepseek2` turn interleaved pairs, so rows of half-split queries and keys are put in
that order. Its latent attention is the absorbed form, so the matrix from the latent up is kept as two, the keys' one
transposed. And llama3's scaling is a tensor of divisors of the frequencies.

Q8_0 keeps 32 weights of a row as bytes with one scale; rows that are no multiple of 32 stay F16, vectors and routers
F32. The writing and the quantiser are those of the `gguf` library.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import torch
from torch import Tensor

from mindseed.base.errors import UserError
from mindseed.base.files import atomic, write_text
from mindseed.base.log import extra
from mindseed.core import Tokenizer
from mindseed.interop.families import family_of, why_native
from mindseed.interop.rules import Layout, Rule, translate
from mindseed.models.config import LMConfig
from mindseed.models.lm import LM
from mindseed.nn.ffn import SwiGLUConfig
from mindseed.nn.gqa import GQAConfig
from mindseed.nn.mla import MLAConfig
from mindseed.nn.moe import MoEConfig
from mindseed.nn.rope import (DynamicScaling, LinearScaling, Llama3Scaling, RopeConfig, YarnScaling, frequencies,
                              mscale, yarn_attention_factor)
from mindseed.tokenizers.base import BOS, EOS, PAD
from mindseed.tokenizers.bpe import spell_bytes
from mindseed.tokenizers.split import GPT2, QWEN, by_pattern

ARCHITECTURES = {"qwen3": "qwen3", "llama": "llama", "qwen3_moe": "qwen3moe", "deepseek_v3": "deepseek2"}
INTERLEAVED = {"llama", "deepseek2"}              # llama.cpp's kind of rotation there
KINDS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
PRE_TOKENIZERS = {QWEN: "qwen2", GPT2: "gpt-2"}   # regular expressions that llama.cpp knows by name
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5            # its types of tokens

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


def save_gguf(model: LM, tokenizer: Tokenizer, path: Path | str, *, kind: str = "f16", name: str = "mindseed",
              chat_template: str | None = None) -> list[Written]:
    """Write the file, and beside it an Ollama Modelfile. UserError if llama.cpp cannot run this model."""
    path, architecture = Path(path), architecture_of(model.config)
    if kind not in KINDS:
        raise UserError(f"{kind!r} is not a kind of GGUF that is written here; choose one of {', '.join(KINDS)} "
                        "(K-quants are made by llama.cpp's llama-quantize from an f16 file)")
    with extra("gguf"):
        import gguf
    pre = pre_tokenizer(tokenizer)
    written = []
    with atomic(path) as temp:
        writer = gguf.GGUFWriter(temp, architecture)
        for key, value in metadata(model.config, architecture, gguf).items():
            add(writer, key.format(arch=architecture), value)
        writer.add_name(name)
        writer.add_file_type(int(getattr(gguf.LlamaFileType, "ALL_F32" if kind == "f32" else f"MOSTLY_{KINDS[kind]}")))
        add_tokenizer(writer, tokenizer, model.config.vocab_size, pre, chat_template)
        for ours, theirs, x in tensors(model, architecture):
            wanted = kind_for(theirs, x, kind)
            target = getattr(gguf.GGMLQuantizationType, KINDS[wanted])
            data = gguf.quants.quantize(np.ascontiguousarray(x.float().numpy()), target)
            writer.add_tensor(theirs, data, raw_dtype=target)
            written.append(Written(ours=ours, theirs=theirs, shape=tuple(x.shape), kind=wanted))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    write_text(path.with_name("Modelfile"), modelfile(path.name, model.config))
    return written


def architecture_of(config: LMConfig) -> str:
    """llama.cpp's name for it. UserError, with the reasons, for a model that it cannot run."""
    family = family_of(config)
    if family is None:
        raise UserError(f"llama.cpp cannot run this model: {why_native(config)}")
    mixer = config.layers[0].mixer
    if any(getattr(layer.mixer, "window", None) for layer in config.layers):
        raise UserError(f"llama.cpp's {ARCHITECTURES[family.name]} has no sliding windows, which this model has")
    if isinstance(mixer.rope.scaling, DynamicScaling):
        raise UserError("llama.cpp has no dynamic rope scaling, which this model has; extend it with yarn instead")
    return ARCHITECTURES[family.name]


def kind_for(name: str, x: Tensor, kind: str) -> str:
    """What a tensor is stored as in a file of this kind."""
    if x.ndim == 1 or name.endswith(("ffn_gate_inp.weight", "exp_probs_b.bias", "rope_freqs.weight")):
        return "f32"
    return "f16" if kind == "q8_0" and x.shape[-1] % 32 else kind


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
           a + "head_count": mixer.heads, a + "layer_norm_rms_epsilon": config.norm_eps}
    if isinstance(mixer, MLAConfig):
        out |= {a + "head_count_kv": 1, a + "key_length": mixer.kv_rank + mixer.rope_dim,
                a + "value_length": mixer.kv_rank, a + "key_length_mla": mixer.key_dim,
                a + "value_length_mla": mixer.value_dim, a + "kv_lora_rank": mixer.kv_rank,
                "{arch}.rope.dimension_count": mixer.rope_dim}
        out |= {a + "q_lora_rank": mixer.q_rank} if mixer.q_rank else {}
    else:
        out |= {a + "head_count_kv": mixer.kv_heads, a + "key_length": mixer.head_dim,
                a + "value_length": mixer.head_dim, "{arch}.rope.dimension_count": mixer.head_dim}
    if moe is not None:
        e = "{arch}.expert_"
        out |= {e + "count": moe.experts, e + "used_count": moe.top_k, e + "feed_forward_length": moe.expert_dim,
                e + "weights_scale": float(moe.scaling), e + "weights_norm": moe.renormalise,
                e + "gating_func": int(getattr(gguf.ExpertGatingFuncType, moe.score.upper())),
                e + "shared_count": moe.shared_dim // moe.expert_dim}
        if architecture == "deepseek2":
            out |= {"{arch}.leading_dense_block_count": len(dense), e + "group_count": moe.groups,
                    e + "group_used_count": moe.top_groups}
    return out | rope_metadata(mixer.rope)


def rope_metadata(rope: RopeConfig) -> dict[str, Any]:
    s, r = rope.scaling, "{arch}.rope.scaling."
    out: dict[str, Any] = {"{arch}.rope.freq_base": float(rope.theta)}
    if isinstance(s, LinearScaling):
        out |= {r + "type": "linear", r + "factor": float(s.factor)}
    elif isinstance(s, YarnScaling):
        out |= {r + "type": "yarn", r + "factor": float(s.factor), r + "original_context_length": s.original,
                r + "yarn_beta_fast": float(s.beta_fast), r + "yarn_beta_slow": float(s.beta_slow)}
        if s.mscale_all_dim:
            out[r + "yarn_log_multiplier"] = 0.1 * s.mscale_all_dim
        elif s.attention_factor is not None:      # llama.cpp multiplies its own factor by this one
            out[r + "attn_factor"] = yarn_attention_factor(s) / mscale(s.factor)
    return out


def add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds[type(value)](key, value)


# ------------------------------------------------------------------------------------------- tokenizer and Modelfile

def pre_tokenizer(tokenizer: Tokenizer) -> str:
    """llama.cpp's name for the way the tokenizer cuts text. UserError for one that it does not know."""
    spec = tokenizer.spec()
    known = {str((by_pattern(pattern),)): name for pattern, name in PRE_TOKENIZERS.items()}
    if "merges" not in spec or str(tuple(spec["splits"])) not in known:
        raise UserError("llama.cpp does not know how this tokenizer cuts text before merging; it knows "
                        f"{' and '.join(PRE_TOKENIZERS.values())}")
    return known[str(tuple(spec["splits"]))]


def add_tokenizer(writer: Any, tokenizer: Tokenizer, rows: int, pre: str, chat_template: str | None) -> None:
    spec = tokenizer.spec()
    spelling = {id: spell_bytes(token) for id, token in tokenizer.tokens.items()}
    kinds = dict.fromkeys(spelling, NORMAL)
    for text, id in tokenizer.specials.items():
        spelling[id], kinds[id] = text, USER_DEFINED if text in tokenizer.visible else CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([spelling.get(id, f"<|unused_{id}|>") for id in range(rows)])
    writer.add_token_types([kinds.get(id, UNUSED) for id in range(rows)])
    writer.add_token_merges([f"{spelling[a]} {spelling[b]}" for a, b in spec["merges"]])
    for text, tell in ((BOS, writer.add_bos_token_id), (EOS, writer.add_eos_token_id), (PAD, writer.add_pad_token_id)):
        if text in tokenizer.specials:
            tell(tokenizer.specials[text])
    writer.add_add_bos_token(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def modelfile(file: str, config: LMConfig) -> str:
    """For `ollama create NAME -f Modelfile`. Ollama has a template language of its own."""
    return (f"FROM ./{file}\n"
            f"PARAMETER num_ctx {config.seq_len}\n"
            f'PARAMETER stop "{EOS}"\n'
            'TEMPLATE """{{- range .Messages }}' + BOS + "{{ .Role }}\n{{ .Content }}" + EOS + "\n{{ end }}"
            + BOS + 'assistant\n"""\n')
