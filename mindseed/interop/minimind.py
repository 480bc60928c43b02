"""MiniMind's bare `.pth` files: a state dict and nothing else, so that its own loader needs the matching flags.

Here everything is inferred from the shapes: the width of a head stands in the QK-norms, the heads in the projections,
the experts in the router. What shapes cannot tell is what that project's scripts always use: theta 1e6, eps 1e-6,
contexts up to 32768, and for mixtures one expert per token with renormalised weights (such a router runs but cannot
learn; see nn/moe.py). Names and arithmetic are those of Qwen3 and Qwen3-MoE.
"""
from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from mindseed.base.errors import UserError
from mindseed.interop.family import DEEPEST, Family
from mindseed.interop.qwen3 import QWEN3
from mindseed.interop.qwen3_moe import QWEN3_MOE
from mindseed.interop.rules import read_names, read_tensors, translate
from mindseed.interop.weights import read_pickle, require_dtype
from mindseed.models.config import LayerConfig, LMConfig
from mindseed.models.lm import LM
from mindseed.nn.ffn import SwiGLUConfig
from mindseed.nn.gqa import GQAConfig
from mindseed.nn.moe import MoEConfig
from mindseed.nn.rope import RopeConfig

THETA, EPS, SEQ_LEN, TOP_K = 1e6, 1e-6, 32768, 1
FIRST = "model.layers.0."
NOT_WEIGHTS = ("freqs_cos", "freqs_sin", "pos_cis")          # rotary tables that older versions kept


def load_state_dict(file: Path) -> tuple[LM, Family, torch.dtype]:
    """(the model in float32 and eval mode, the family it belongs to, the dtype that was stored)."""
    state = {name.removeprefix("_orig_mod.").removeprefix("module."): x for name, x in read_pickle(file).items()}
    state = {name: x for name, x in state.items() if not name.endswith(NOT_WEIGHTS)}
    if odd := [name for name, x in state.items() if x.layout != torch.strided or x.is_meta or x.is_nested]:
        raise UserError(f"{file} is not a state dict of MiniMind's current layout: {odd[0]} is not a plain tensor")
    try:
        config = infer_config(state, str(file))
    except ValueError as error:
        raise UserError(f"{file} is not a state dict of MiniMind's current layout: {error}") from None
    if config.tied:
        state.pop("lm_head.weight", None)
    family = QWEN3_MOE if isinstance(config.layers[0].ffn, MoEConfig) else QWEN3
    with torch.device("meta"):
        model = LM(config)
    expected = {name: x.shape for name, x in model.state_dict().items()}
    names = translate(family.layout, config, expected)
    read_names(names, expected, {name: x.shape for name, x in state.items()}, str(file),
               told="its first layer promises", remedy="Copy the file again.")
    for name, x in state.items():
        require_dtype(f"{file}: {name}", x)
    stored = state["model.embed_tokens.weight"].dtype
    model.load_state_dict({name: x.float() for name, x in read_tensors(names, state.__getitem__)}, assign=True)
    return model.requires_grad_(True).eval(), family, stored


def infer_config(state: dict[str, Tensor], where: str) -> LMConfig:
    """The architecture behind the shapes. UserError for a state dict of another kind, ValueError for odd shapes."""
    def shape(name: str, dims: int = 2) -> torch.Size:
        if name not in state:
            raise UserError(f"{where} is not a state dict of MiniMind's current layout: it has no {name}"
                            + (" (versions of 2025 have no QK-norm; their number of heads cannot be inferred)"
                               if name.endswith("q_norm.weight") else ""))
        if state[name].ndim != dims or not state[name].numel():
            raise ValueError(f"{name} has the shape {list(state[name].shape)}")
        return state[name].shape

    vocab_size, dim = shape("model.embed_tokens.weight")
    head_dim, = shape(FIRST + "self_attn.q_norm.weight", 1)
    heads, kv_heads = (shape(f"{FIRST}self_attn.{x}_proj.weight")[0] // head_dim for x in "qk")
    layers = 1 + max(int(number) for name in state for number in re.findall(r"^model\.layers\.(\d+)\.", name))
    if layers > DEEPEST:
        raise ValueError(f"it names a layer {layers - 1}")
    if FIRST + "mlp.gate.weight" in state:
        ffn = MoEConfig(experts=shape(FIRST + "mlp.gate.weight")[0], top_k=TOP_K,
                        expert_dim=shape(FIRST + "mlp.experts.0.gate_proj.weight")[0])
    else:
        ffn = SwiGLUConfig(ffn_dim=shape(FIRST + "mlp.gate_proj.weight")[0])
    mixer = GQAConfig(heads=heads, kv_heads=kv_heads, head_dim=head_dim, positions=RopeConfig(theta=THETA),
                      norm_eps=EPS)
    head = state.get("lm_head.weight")
    return LMConfig(vocab_size=vocab_size, dim=dim, layers=(LayerConfig(mixer=mixer, ffn=ffn),) * layers,
                    seq_len=SEQ_LEN, norm_eps=EPS,
                    tied=head is None or torch.equal(head, state["model.embed_tokens.weight"]))
