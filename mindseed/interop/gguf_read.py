"""A GGUF file back into a model, from nothing but what stands in the file; and the proof that the two compute the same.

Everything is read as llama.cpp reads it: numbers from the file's metadata, pairs interleaved for `llama` and
`deepseek2`, softmax and renormalised weights for `qwen3moe`, yarn's borders at 32 turns and 1, whatever anyone wrote.
So the proof is of the file, not of the writer's intentions: what was written wrongly computes something else here, and
a tensor too many or too few is an error.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from mindseed.base.errors import UserError
from mindseed.base.log import extra
from mindseed.core import State
from mindseed.interop.gguf import INTERLEAVED, LAYOUT, Written, kind_for
from mindseed.interop.rules import read_names, translate
from mindseed.models.config import LayerConfig, LMConfig
from mindseed.models.lm import LM
from mindseed.nn.attend import Layout
from mindseed.nn.ffn import SwiGLUConfig
from mindseed.nn.gqa import GQAConfig
from mindseed.nn.mla import MLAConfig
from mindseed.nn.moe import MoEConfig
from mindseed.nn.rope import LinearScaling, RopeConfig, YarnScaling, mscale

GATES = {1: "softmax", 2: "sigmoid"}              # llama.cpp's numbers
HALVES = ("attn_k_b", "attn_v_b")                 # of what is one matrix in our layout, attn_kv_b
TOLERANCE = 1e-5                                  # of logits against the source rounded alike, of the largest one
ROUNDING = {"f32": 1e-5, "f16": 0.05, "bf16": 0.25, "q8_0": 0.25}          # what rounding may cost, see `prove`


class Divided(LM):
    """A model whose angles are divided pair by pair, by `rope_freqs.weight` (K/2,)."""

    divisors: Tensor

    def layout(self, positions: Tensor, state: State | None) -> Layout:
        layout = super().layout(positions, state)
        for (rope, width), (cos, _) in layout.rotary.items():
            plain = rope.theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
            angle = positions[..., None, None] * (plain / self.divisors)                      # (B, T, 1, K/2)
            layout.rotary[rope, width] = angle.cos().to(cos.dtype), angle.sin().to(cos.dtype)
        return layout


class Metadata:
    """The keys of a file, `{arch}` standing for its architecture."""

    def __init__(self, reader: Any, where: str) -> None:
        self.reader, self.where = reader, where
        self.architecture = str(self("general.architecture"))

    def __call__(self, key: str, *default: Any) -> Any:
        field = self.reader.get_field(key.format(arch=getattr(self, "architecture", "")))
        if field is None and not default:
            raise UserError(f"{self.where} has no {key}, so it is no model that can be read")
        return default[0] if field is None else field.contents()


def read_gguf(file: Path) -> LM:
    """The model in a file, in float32 and eval mode. UserError for one that is not of the four architectures."""
    with extra("gguf"):
        import gguf
    reader = gguf.GGUFReader(file)
    held = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    meta = Metadata(reader, str(file))
    config = read_config(meta, held)
    divisors = held.pop("rope_freqs.weight", None)
    with torch.device("meta"):
        model = LM(config) if divisors is None else Divided(config)
    if divisors is not None:
        model.divisors = divisors.double()
    expected = {name: x.shape for name, x in model.state_dict().items()}
    names = translate(LAYOUT, config, expected)
    join_halves(held, config)
    read_names(names, expected, {name: x.shape for name, x in held.items()}, str(file))
    model.load_state_dict({ours: held[theirs].float() for ours, (theirs,) in names.items()}, assign=True)
    return model.eval()


def join_halves(held: dict[str, Tensor], config: LMConfig) -> None:
    """What the absorbed form keeps as two, keys (H, C, P) and values (H, V, C), as one (H (P + V), C)."""
    for i, layer in enumerate(config.layers):
        if isinstance(layer.mixer, MLAConfig):
            keys, values = (held.pop(f"blk.{i}.{half}.weight") for half in HALVES)
            held[f"blk.{i}.attn_kv_b.weight"] = torch.cat([keys.mT, values], dim=1).flatten(0, 1)


def read_config(meta: Metadata, held: dict[str, Tensor]) -> LMConfig:
    if meta.architecture not in ("llama", "qwen3", "qwen3moe", "deepseek2"):
        raise UserError(f"{meta.where} is of the architecture {meta.architecture!r}, which is not read here")
    eps, a = meta("{arch}.attention.layer_norm_rms_epsilon"), "{arch}.attention."
    if meta.architecture == "deepseek2":
        width = meta("{arch}.rope.dimension_count")
        mixer = MLAConfig(heads=meta(a + "head_count"), kv_rank=meta(a + "kv_lora_rank"),
                          q_rank=meta(a + "q_lora_rank") or None, plain_dim=meta(a + "key_length_mla") - width,
                          rope_dim=width, value_dim=meta(a + "value_length_mla"), rope=read_rope(meta), norm_eps=eps)
    else:
        mixer = GQAConfig(heads=meta(a + "head_count"), kv_heads=meta(a + "head_count_kv"),
                          head_dim=meta(a + "key_length"), positions=read_rope(meta), norm_eps=eps,
                          qk_norm=meta.architecture != "llama")
    dense = SwiGLUConfig(ffn_dim=meta("{arch}.feed_forward_length"))
    moe = read_moe(meta, held) if meta("{arch}.expert_count", 0) else None
    layers = meta("{arch}.block_count")
    lead = meta("{arch}.leading_dense_block_count", 0) if moe else layers
    return LMConfig(vocab_size=len(meta("tokenizer.ggml.tokens")), dim=meta("{arch}.embedding_length"),
                    layers=tuple(LayerConfig(mixer=mixer, ffn=dense if i < lead else moe) for i in range(layers)),
                    seq_len=meta("{arch}.context_length"), tied="output.weight" not in held, norm_eps=eps)


def read_moe(meta: Metadata, held: dict[str, Tensor]) -> MoEConfig:
    e = "{arch}.expert_"
    count, width = meta(e + "count"), meta(e + "feed_forward_length")
    if meta.architecture == "qwen3moe":
        return MoEConfig(experts=count, top_k=meta(e + "used_count"), expert_dim=width)
    return MoEConfig(experts=count, top_k=meta(e + "used_count"), expert_dim=width,
                     shared_dim=meta(e + "shared_count") * width, score=GATES[meta(e + "gating_func")],
                     renormalise=meta(e + "weights_norm"), scaling=meta(e + "weights_scale"),
                     groups=meta(e + "group_count", 1), top_groups=meta(e + "group_used_count", 1),
                     bias=any(name.endswith("exp_probs_b.bias") for name in held))


def read_rope(meta: Metadata) -> RopeConfig:
    r = "{arch}.rope.scaling."
    kind, factor = meta(r + "type", "linear"), meta(r + "factor", 1.0)
    scaling = LinearScaling(factor=factor) if factor != 1 else None
    if kind == "yarn":
        sharpen = meta(r + "yarn_log_multiplier", 0.0) / 0.1
        tables = meta(r + "attn_factor", 1.0) * (1.0 if sharpen else mscale(factor))
        if meta.architecture == "deepseek2" and abs(tables - 1) > 1e-6:
            raise UserError(f"{meta.where}: yarn's factor {tables:.4f} would act on scores of latent attention twice")
        scaling = YarnScaling(factor=factor, original=meta(r + "original_context_length"), attention_factor=tables,
                              mscale_all_dim=sharpen or None)
    return RopeConfig(theta=meta("{arch}.rope.freq_base"), scaling=scaling,
                      interleaved=meta.architecture in INTERLEAVED)


# ----------------------------------------------------------------------------------------------------------- the proof

@torch.inference_mode()
def prove(source: LM, file: Path, written: list[Written], kind: str) -> tuple[float, float]:
    """(file against the source rounded alike, that against the source): differences of logits on random ids.

    The first is the largest difference, as a share of the largest logit: only the order of summation may differ, so
    it is held to TOLERANCE whatever the kind. The second is what rounding costs, the root of the mean square as a share
    of that of the logits. Computed in float64: otherwise a near tie between experts could fall either way.
    """
    rounded, copy = round_alike(source, written, kind), read_gguf(file)
    T = min(64, source.config.seq_len)
    ids = torch.randint(0, source.config.vocab_size, (2, T), generator=torch.Generator().manual_seed(0))
    exact, alike, read = (logits(model, ids) for model in (source, rounded, copy))
    scale = alike.abs().max()
    return ((read - alike).abs().max() / scale).item(), ((alike - exact).norm() / exact.norm()).item()


def logits(model: LM, ids: Tensor) -> Tensor:
    """In float64, whatever the model's own dtype, and without dropout."""
    wide = {name: x.double() for name, x in model.state_dict().items()}
    training = model.training
    try:
        return functional_call(model.eval(), wide, (ids, torch.arange(ids.shape[1]).expand_as(ids))).logits()
    finally:
        model.train(training)


def round_alike(source: LM, written: list[Written], kind: str) -> LM:
    """The source with its weights rounded as the file keeps them, by our own arithmetic and in our own layout."""
    state = {name: x.clone() if kind != "f32" else x for name, x in source.state_dict().items()}
    for w in written if kind != "f32" else ():
        x = state.get(w.ours)
        if x is None:                             # the divisors of frequencies
            continue
        if any(half in w.theirs for half in HALVES):
            mixer = source.config.layers[int(w.ours.split(".")[1])].mixer
            keys, values = x.view(mixer.heads, -1, mixer.kv_rank).split([mixer.plain_dim, mixer.value_dim], dim=1)
            x = keys.mT if HALVES[0] in w.theirs else values
        x.copy_(nearest(x, kind_for(w.theirs, x, kind)))
    with torch.device("meta"):
        model = LM(source.config)
    model.load_state_dict(state, assign=True)
    return model.eval()


def nearest(x: Tensor, kind: str) -> Tensor:
    """x rounded to a kind of number. Q8_0: blocks of 32 share a scale, their largest / 127, itself kept in 16 bits, so
    a weight moves by at most half a step, 1/254 of the largest beside it, and by what the scale is rounded."""
    if kind in ("f16", "bf16"):
        return x.to(torch.float16 if kind == "f16" else torch.bfloat16).to(x.dtype)
    if kind != "q8_0":
        return x
    blocks = x.float().unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    steps = torch.where(scale == 0, 0, blocks * (1 / scale))
    steps = steps.sign() * (steps.abs() + 0.5).floor()
    return (steps * scale.half().float()).flatten(-2).to(x.dtype)
