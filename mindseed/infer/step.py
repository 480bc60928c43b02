"""One more token for every sequence: the model's forward pass, flattened for decoding.

A decoding step of a small model is hundreds of kernels on vectors, so most of its time goes into launching them. This
is the arithmetic of nn/ for T = 1 with fewer launches: no module calls, one product for queries, keys and values, one
normalisation and one rotation for queries and keys together, full-width rotary tables. It is an optimisation and
nothing else: a model whose layers it does not know runs through its own forward pass, and tests hold the two together.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mindseed.core import State
from mindseed.models.lm import LM, Block
from mindseed.nn.attend import Layout
from mindseed.nn.ffn import SwiGLU
from mindseed.nn.gqa import GQA
from mindseed.nn.linear import is_plain, transposed_product, wants_transposed
from mindseed.nn.norm import RMSNorm

Step = Callable[[Tensor, Tensor, State], Tensor]


def decoding_step(model: LM) -> Step:
    """A function of ids (B,), positions (B, 1) and a state, to which it appends; it returns the hidden vectors (B, D).

    May keep copies of weights as they are now: make a new one after training on.
    """
    if flat(model):
        return FlatStep(model)
    return lambda ids, positions, state: model(ids[:, None], positions, state).hidden[:, 0]


def flat(model: LM) -> bool:
    """Whether a flattened step computes what this model does."""
    plain = not torch.is_autocast_enabled(model.embed.weight.device.type) and model.place is None
    return plain and type(model.norm) is RMSNorm and all(known(block) for block in model.blocks)


def known(block: Block) -> bool:
    """Whether `FlatStep` computes what this block does: exactly these classes, with no hooks and no adapters."""
    parts = {block.mixer: GQA, block.ffn: SwiGLU, block.mixer_norm: RMSNorm, block.ffn_norm: RMSNorm}
    mixer, ffn = block.mixer, block.ffn
    if type(block) is not Block or block.placement != "pre" or any(
            type(part) is not kind for part, kind in parts.items()):
        return False
    rope = mixer.config.rope
    if rope is None or rope.interleaved or rope.depends_on_length:
        return False
    linears = (mixer.q, mixer.k, mixer.v, mixer.o, ffn.gate, ffn.up, ffn.down)
    return all(map(is_plain, linears)) and not any(
        module._forward_hooks or module._forward_pre_hooks for module in block.modules())


class FlatStep:
    """See the head of this file. B sequences, width D, H query heads, G key/value heads of width K."""

    def __init__(self, model: LM) -> None:
        self.model = model
        self.last_norm = Norm.of(model.norm)
        self.layers = [self.flatten(block) for block in model.blocks]

    def flatten(self, block: Block) -> tuple:
        """A block as its config and weights, in the order of their use."""
        mixer, ffn, c = block.mixer, block.ffn, block.mixer.config
        qkv = torch.cat([mixer.q.weight, mixer.k.weight, mixer.v.weight])         # ((H + 2G) K, D)
        qk_norm = None
        if c.qk_norm:
            qk_norm = torch.cat([mixer.q_norm.weight.expand(c.heads, -1), mixer.k_norm.weight.expand(c.kv_heads, -1)])
            qk_norm = Norm(qk_norm, c.norm_eps)
        return (c, Norm.of(block.mixer_norm), qkv, qk_norm, mixer.o.weight,
                Norm.of(block.ffn_norm), ffn.gate.weight, ffn.up.weight, ffn.down.weight)

    def __call__(self, ids: Tensor, positions: Tensor, state: State) -> Tensor:
        layout = self.model.layout(positions, state)
        tables = {key: full_width(*halves) for key, halves in layout.rotary.items()}
        x = F.embedding(ids, self.model.embed.weight)                             # (B, D)
        B, dtype = len(x), x.dtype
        product = transposed_product if wants_transposed(x) else F.linear
        for i, (c, mixer_norm, qkv_weight, qk_norm, o, ffn_norm, gate, up, down) in enumerate(self.layers):
            H, G, K = c.heads, c.kv_heads, c.head_dim
            qkv = product(mixer_norm(x).to(dtype), qkv_weight).contiguous().view(B, H + 2 * G, K)
            qk = qkv[:, :H + G]
            if qk_norm is not None:
                qk = qk_norm(qk)
            cos, sin = tables[c.rope, K]
            qk = torch.addcmul(qk * cos, qk.roll(K // 2, -1), sin).to(dtype)      # (B, H + G, K)
            k, v = state.layer(i).append(k=qk[:, None, H:], v=qkv[:, None, H + G:])       # (B, S, G, K)
            y = F.scaled_dot_product_attention(qk[:, :H].view(B, G, H // G, K), k.transpose(1, 2), v.transpose(1, 2),
                                               attn_mask=layout.views[c.window].mask)    # (B, G, H / G, K)
            x.add_(product(y.reshape(B, H * K), o))
            h = ffn_norm(x).to(dtype)
            x.add_(product(F.silu(product(h, gate)).mul_(product(h, up)), down))
        return self.last_norm(x).to(dtype)


class Norm:
    """RMSNorm in five launches: numbers that Python would convert in every step are tensors made once."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.wide = weight, torch.promote_types(weight.dtype, torch.float32)
        self.eps, self.share = torch.tensor(eps, dtype=self.wide, device=weight.device), 1 / weight.shape[-1]

    @staticmethod
    def of(module: RMSNorm) -> Norm:
        return Norm(module.weight, module.eps)

    def __call__(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.wide)
        return (x * torch.addcmul(self.eps, length, length, value=self.share).rsqrt_()).mul_(self.weight)


def full_width(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables (B, 1, 1, K/2) as (B, 1, K), signed so that rotating x is x cos + (halves of x swapped) sin."""
    return torch.cat([cos, cos], -1)[:, 0], torch.cat([-sin, sin], -1)[:, 0]
