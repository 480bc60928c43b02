"""Upcycling (2212.05055): a trained dense model becomes a mixture of experts that computes the same at first.

Every expert is a copy of the feed-forward it replaces; the router is new. As long as the weights of the chosen experts
sum to 1, their weighed sum is what the one feed-forward gave, so training goes on from the dense model's loss. Experts
then drift apart, since each is taught by the tokens it is sent.
"""
from __future__ import annotations

from dataclasses import replace

import torch

from mindseed.base.errors import UserError
from mindseed.models.config import LMConfig
from mindseed.models.lm import LM, build
from mindseed.nn.ffn import SwiGLUConfig
from mindseed.nn.moe import MoEConfig

STACKED = ("gate", "up", "down")


def upcycled_config(config: LMConfig, moe: MoEConfig) -> LMConfig:
    """UserError if the mixture would not compute what the dense model computes."""
    if any(not isinstance(layer.ffn, SwiGLUConfig) for layer in config.layers):
        raise UserError("only dense SwiGLU feed-forwards can be upcycled; this model has others already")
    if moe.shared_dim:
        raise UserError(f"moe.shared_dim={moe.shared_dim}: a shared expert beside copies of the feed-forward would "
                        "count it twice; upcycle without one")
    if not moe.renormalise or moe.scaling != 1 or moe.top_k < 2:
        raise UserError("upcycling keeps the model's answers only if the weights of at least two chosen experts sum to "
                        "1: moe.renormalise true, moe.scaling 1, moe.top_k 2 or more")
    return replace(config, layers=tuple(
        replace(layer, ffn=replace(moe, expert_dim=layer.ffn.ffn_dim)) for layer in config.layers))


@torch.no_grad()
def upcycle(model: LM, moe: MoEConfig, *, seed: int = 0) -> LM:
    """A mixture with the dense model's weights; `expert_dim` of `moe` is replaced by the width there is."""
    mixture = build(upcycled_config(model.config, moe), seed=seed, device=model.embed.weight.device)
    mixture.value_head = model.value_head
    state, old = mixture.state_dict(), model.state_dict()
    for name, x in state.items():
        part = name.split(".")[-2]
        if name in old:
            x.copy_(old[name])                    # experts: one matrix to all E of the stack
        else:
            assert part in ("router", "ffn"), name
    return mixture.train(model.training)
