"""The decoder-only language model: embed, pass through blocks, normalise; the head is applied by whoever needs it.

A block is pre-norm (2002.04745): x + mixer(norm(x)), then x + ffn(norm(x)). What the mixer and the feed-forward are
is looked up by the type of their configs.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mindseed.base.hardware import fast_bfloat16
from mindseed.core import LayerState, Output, State, StateSpec
from mindseed.models.config import LayerConfig, LMConfig
from mindseed.nn.attend import Kernel, Layout
from mindseed.nn.blocked import BlockedAttention
from mindseed.nn.ffn import FFNS
from mindseed.nn.gqa import MIXERS
from mindseed.nn.linear import Linear, product_dtype
from mindseed.nn.norm import RMSNorm


class Block(nn.Module):
    def __init__(self, config: LMConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.dim, config.norm_eps)
        self.mixer = MIXERS[type(layer.mixer)](config.dim, layer.mixer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = FFNS[type(layer.ffn)](config.dim, layer.ffn)
        self.dropout = config.dropout

    def forward(self, x: Tensor, layout: Layout, state: LayerState | None = None) -> Tensor:
        x = x + self.drop(self.mixer(self.mixer_norm(x), layout, state))
        return x + self.drop(self.ffn(self.ffn_norm(x)))

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class LM(nn.Module):
    """ids (B, T), positions (B, T) -> Output. With `state`, keys of earlier calls are seen and new ones are kept.

    `recompute` trades time for memory: blocks keep only their input and run again in the backward pass.
    """

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in config.layers)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tied else Linear(config.dim, config.vocab_size, role="column")
        self.recompute = False
        self.attention: Kernel = BlockedAttention.apply
        self.reset_parameters()

    def forward(self, ids: Tensor, positions: Tensor, state: State | None = None) -> Output:
        layout = self.layout(positions, state)
        x = self.embed(ids)                                                       # (B, T, D)
        if self.training and self.config.dropout:
            x = F.dropout(x, self.config.dropout)
        for i, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, layout, use_reentrant=False)
            else:
                x = block(x, layout, None if state is None else state.layer(i))
        return Output(hidden=self.norm(x), head=(self.head or self.embed).weight, dtype=product_dtype(x))

    def layout(self, positions: Tensor, state: State | None) -> Layout:
        """Masks and rotary tables for this batch, made once for all layers."""
        if state is None:
            layout = Layout.training(positions, self.attention)
        else:
            layout = Layout.decoding(positions, state.begin(positions))
        dtype = torch.promote_types(self.embed.weight.dtype, torch.float32)
        for layer in self.config.layers:
            layout.add_rotary(layer.mixer.rope, layer.mixer.head_dim, dtype)
        return layout

    def compile_blocks(self) -> None:
        """torch.compile for every block. Attention in blocks of queries stays outside: its loops follow the packing,
        which is another one in every batch and would be compiled anew each time."""
        fast_bfloat16()                           # measured now, so that compiled code finds the answer
        self.attention = torch.compiler.disable(BlockedAttention.apply)
        for block in self.blocks:
            block.compile()

    def state_specs(self) -> list[StateSpec]:
        """What every layer remembers while decoding."""
        return [block.mixer.state_spec() for block in self.blocks]

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random weights: matrices with variance 1 / fan_in, those that write into the residual stream smaller by
        sqrt(2 * layers) so that its size does not grow with depth (GPT-2), embeddings with deviation 0.02."""
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0, 0.02, generator=generator)
            elif isinstance(module, Linear):
                scale = 1 / math.sqrt(2 * len(self.blocks)) if module.role == "row" else 1.0
                module.weight.normal_(0, scale / math.sqrt(module.in_features), generator=generator)
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1)


def build(config: LMConfig, *, seed: int = 0, device: torch.device | str = "cpu") -> LM:
    """A model with random weights that depend on `seed` alone; made on the CPU, then moved."""
    with torch.device("meta"):
        model = LM(config)
    model = model.to_empty(device="cpu")
    model.reset_parameters(torch.Generator().manual_seed(seed))
    return model.to(device)
