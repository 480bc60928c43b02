"""One layer of a decoder: a mixer, in which tokens look at each other, and a feed-forward, in which each thinks alone.

Where it normalises (`placement`):

    pre         x + f(norm(x))               the residual stream is never touched (2002.04745): trains without care
    post        norm(x + f(x))               the first Transformer's way (1706.03762)
    sandwich    x + norm(f(norm(x)))         what is added is bounded as well (2105.13290)
"""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mindseed.core import LayerState
from mindseed.models.config import LayerConfig, LMConfig
from mindseed.nn.attend import Layout
from mindseed.nn.ffn import MLP, MLPConfig, SwiGLU, SwiGLUConfig
from mindseed.nn.gqa import GQA, GQAConfig
from mindseed.nn.linear_attention import DeltaConfig, DeltaNet
from mindseed.nn.mla import MLA, MLAConfig
from mindseed.nn.moe import MoE, MoEConfig
from mindseed.nn.norm import NORMS

MIXERS = {GQAConfig: GQA, MLAConfig: MLA, DeltaConfig: DeltaNet}
FFNS = {SwiGLUConfig: SwiGLU, MLPConfig: MLP, MoEConfig: MoE}

Aux = dict[str, Tensor]                           # auxiliary losses per token, (B, T) each


class Block(nn.Module):
    """(B, T, D) -> (B, T, D), and the auxiliary losses of a mixture of experts."""

    def __init__(self, config: LMConfig, layer: LayerConfig) -> None:
        super().__init__()
        norm = NORMS[config.norm]
        self.placement, self.dropout = config.placement, config.dropout
        self.mixer_norm = norm(config.dim, config.norm_eps)
        self.mixer = MIXERS[type(layer.mixer)](config.dim, layer.mixer)
        self.ffn_norm = norm(config.dim, config.norm_eps)
        self.ffn = FFNS[type(layer.ffn)](config.dim, layer.ffn)
        if config.placement == "sandwich":
            self.mixer_out_norm = norm(config.dim, config.norm_eps)
            self.ffn_out_norm = norm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, layout: Layout, state: LayerState | None = None) -> tuple[Tensor, Aux]:
        if self.placement == "post":
            x = self.mixer_norm(x + self.drop(self.mixer(x, layout, state)))
            y, aux = self.think(x)
            return self.ffn_norm(x + self.drop(y)), aux
        y = self.mixer(self.mixer_norm(x), layout, state)
        x = x + self.drop(self.mixer_out_norm(y) if self.placement == "sandwich" else y)
        y, aux = self.think(self.ffn_norm(x))
        return x + self.drop(self.ffn_out_norm(y) if self.placement == "sandwich" else y), aux

    def think(self, x: Tensor) -> tuple[Tensor, Aux]:
        y = self.ffn(x)
        return y if isinstance(y, tuple) else (y, {})

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x
