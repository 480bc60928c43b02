"""Multi-token prediction (DeepSeek-V3, 2412.19437): beside the next token, the model learns to predict the ones after.

Module d (1, 2, ...) joins what the model knows at token t with the embedding of token t + d, which training knows, and
passes it through one block of its own; the shared head then predicts token t + d + 1:

    h_d[t] = block_d(join_d [norm(embed(ids[t + d])); norm(h_{d-1}[t])])        h_0 = the model's hidden vectors

The chain stays causal, since h_d[t] depends on tokens up to t + d and predicts the one behind. The modules make the
model plan ahead while it trains; afterwards they are thrown away, or kept as a draft that guesses tokens for the model
to confirm.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from mindseed.core import LayerState
from mindseed.models.block import Aux, Block
from mindseed.models.config import LayerConfig, LMConfig
from mindseed.nn.attend import Layout
from mindseed.nn.linear import Linear
from mindseed.nn.norm import NORMS


class MTPModule(nn.Module):
    """(hidden (B, T, D), embeddings of the tokens ahead (B, T, D)) -> hidden (B, T, D), ready for the head."""

    def __init__(self, config: LMConfig, layer: LayerConfig) -> None:
        super().__init__()
        norm = NORMS[config.norm]
        self.embed_norm = norm(config.dim, config.norm_eps)
        self.hidden_norm = norm(config.dim, config.norm_eps)
        self.join = Linear(2 * config.dim, config.dim, role="replicated")
        self.block = Block(config, layer)
        self.norm = norm(config.dim, config.norm_eps)

    def forward(self, hidden: Tensor, ahead: Tensor, layout: Layout,
                state: LayerState | None = None) -> tuple[Tensor, Aux]:
        x = self.join(torch.cat([self.embed_norm(ahead), self.hidden_norm(hidden)], dim=-1)).to(ahead.dtype)
        x, aux = self.block(x, layout, state)
        return self.norm(x), aux
