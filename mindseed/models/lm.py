"""The decoder-only language model: embed, pass through blocks, normalise; the head is applied by whoever needs it."""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindseed.core import Output, State, StateSpec, tokens_ahead
from mindseed.models.block import Aux, Block
from mindseed.models.config import LMConfig
from mindseed.models.mtp import MTPModule
from mindseed.nn.attend import Kernel, Layout
from mindseed.nn.blocked import BlockedAttention
from mindseed.nn.fused_head import apply_head
from mindseed.nn.linear import Linear, product_dtype
from mindseed.nn.linear_attention import DeltaNet
from mindseed.nn.moe import ExpertLinear
from mindseed.nn.recompute import Recompute, run_again
from mindseed.nn.norm import NORMS, LayerNorm, RMSNorm


class LM(nn.Module):
    """ids (B, T), positions (B, T) -> Output. With `state`, keys of earlier calls are seen and new ones are kept.

    `recompute` trades time for memory: blocks keep only their input and run again in the backward pass. `attention`
    is what training attends with: auto, sdpa, flex (it learns on a GPU only) or flash (nn/attend.py). `collect` are the
    depths whose states the output is to carry, rising: 0 is the embedding, d what d blocks have made of it. `matching`
    (matching.py) adds what distillation compares.
    """

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = empty_embedding(config.vocab_size, config.dim)
        self.place = empty_embedding(config.seq_len, config.dim) if config.learned_positions else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in config.layers)
        self.norm = NORMS[config.norm](config.dim, config.norm_eps)
        self.head = None if config.tied else Linear(config.dim, config.vocab_size, role="column")
        self.mtp = nn.ModuleList(MTPModule(config, layer) for layer in config.mtp)
        self.value_head: nn.Module | None = None                                  # see heads.py
        self.recompute: Recompute = False
        self.attention = "auto"
        self.blocked: Kernel = BlockedAttention.apply
        self.apply_head = apply_head                                              # as core.ChunkedHead does
        self.ring: Callable | None = None                                         # see parallel/context.py
        self.ahead: Callable[[Tensor, int], Tensor] = tokens_ahead
        self.collect: tuple[int, ...] = ()
        self.matching: nn.Module | None = None
        self.reset_parameters()

    def forward(self, ids: Tensor, positions: Tensor, state: State | None = None) -> Output:
        layout, aux = self.layout(positions, state), {}
        x = self.begin(ids, positions)                                            # (B, T, D)
        states = [x] if 0 in self.collect else []
        for i, block in enumerate(self.blocks):
            x = self.run(block, aux, x, layout, None if state is None else state.layer(i))
            if i + 1 in self.collect:
                states.append(x)
        hidden = self.norm(x)
        further = self.look_ahead(hidden, ids, layout, aux) if self.training else ()
        output = self.output(hidden, aux, further=further, states=tuple(states))
        return output if self.matching is None or state is not None else self.matching(self, output, layout)

    def begin(self, ids: Tensor, positions: Tensor) -> Tensor:
        """(B, T, D): what the first block reads."""
        x = self.embed(ids)
        if self.place is not None:
            x = x + self.place(positions.clamp_min(0))
        return F.dropout(x, self.config.dropout) if self.training and self.config.dropout else x

    def output(self, hidden: Tensor, aux: Aux, **more: tuple[Tensor, ...]) -> Output:
        """What objectives ask, of what the last norm gave."""
        values = None if self.value_head is None else self.value_head(hidden)
        return Output(hidden=hidden, head=(self.head or self.embed).weight, dtype=product_dtype(hidden), aux=aux,
                      values=values, further_weight=self.config.mtp_weight, kernel=self.apply_head,
                      ahead=self.ahead, **more)

    def run(self, block: nn.Module, aux: Aux, *inputs) -> Tensor:
        """A block, recomputed in the backward pass if asked for; its auxiliary losses are added to `aux`."""
        if self.recompute and torch.is_grad_enabled():
            x, found = run_again(block, self.recompute, *inputs)
        else:
            x, found = block(*inputs)
        for name, value in found.items():
            aux[name] = aux.get(name, 0) + value
        return x

    def look_ahead(self, hidden: Tensor, ids: Tensor, layout: Layout, aux: Aux,
                   embed: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, ...]:
        """Hidden vectors (B, T, D) that predict 2, 3, ... tokens ahead, one per module of multi-token prediction."""
        further = []
        for distance, module in enumerate(self.mtp, start=1):
            words = (embed or self.embed)(self.ahead(ids, distance))
            hidden = self.run(module, aux, hidden, words, layout)
            further.append(hidden)
        return tuple(further)

    def layout(self, positions: Tensor, state: State | None) -> Layout:
        """Masks and rotary tables for this batch, made once for all layers."""
        layout = Layout(positions, None if state is None else state.begin(positions), attention=self.attention,
                        blocked=self.blocked, ring=self.ring)
        dtype = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        for block in (*self.blocks, *(module.block for module in self.mtp if self.training)):
            if isinstance(block, Block):          # in a pipeline most blocks are elsewhere
                block.mixer.add_to(layout, dtype)
        return layout

    def compile_blocks(self) -> None:
        """torch.compile for every block. Attention in blocks of queries stays outside: its loops follow the packing,
        which is another one in every batch and would be compiled anew each time."""
        self.blocked = torch.compiler.disable(BlockedAttention.apply)
        for module in (*self.blocks, self.norm):
            module.compile()

    def state_specs(self) -> list[StateSpec]:
        """What every layer remembers while decoding."""
        return [block.mixer.state_spec() for block in self.blocks]

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random weights: matrices with variance 1 / fan_in, those that write into the residual stream smaller by
        sqrt(2 * layers) so that its size does not grow with depth (GPT-2), embeddings with deviation 0.02. Nothing
        is drawn on the meta device, where it would only load torch's compiler."""
        if self.embed.weight.is_meta:
            return
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0, 0.02, generator=generator)
            elif isinstance(module, (Linear, ExpertLinear)):
                scale = 1 / math.sqrt(2 * len(self.blocks)) if module.role == "row" else 1.0
                module.weight.normal_(0, scale / math.sqrt(module.in_features), generator=generator)
            elif isinstance(module, (RMSNorm, LayerNorm)):
                module.weight.fill_(1)
                if isinstance(module, LayerNorm):
                    module.bias.zero_()
            elif isinstance(module, DeltaNet):
                module.reset_parameters(generator)
            for buffer in module.buffers(recurse=False):                          # biases of routers
                buffer.zero_()


def empty_embedding(rows: int, dim: int) -> nn.Embedding:
    return nn.Embedding.from_pretrained(torch.empty(rows, dim), freeze=False)


def build(config: LMConfig, *, seed: int = 0, device: torch.device | str = "cpu") -> LM:
    """A model with random weights that depend on `seed` alone; made on the CPU, then moved."""
    with torch.device("meta"):
        model = LM(config)
    model = model.to_empty(device="cpu")
    model.reset_parameters(torch.Generator().manual_seed(seed))
    return model.to(device)
