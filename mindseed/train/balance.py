"""After every step: count the visits of all experts over all ranks, move biases, and tell how the load is spread.

Why, and what the remedies are: nn/balance.py. Nothing should ever be `dropped` here; the figures to watch are
`load_max`, the visits of the busiest expert as a multiple of the mean (1 is a perfect balance), and `router_entropy`,
from 0 (each token sure of one expert) to 1 (all the same to it). `load/<layer>/<expert>` in the log
is every expert's share of the visits.
"""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from mindseed.base import dist
from mindseed.nn.balance import move_bias
from mindseed.nn.moe import MoE


class Balance:
    """A callable of `Run.after_step`; its state (the loads of the last step) belongs into a checkpoint."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, MoE)]

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        if not self.layers:
            return {}
        taken = dist.sum_over_ranks(torch.cat([layer.load.take() for layer in self.layers]))
        parts = taken.split([layer.config.experts + 2 for layer in self.layers])
        values: dict[str, float] = {"load_max": 0.0, "router_entropy": 0.0, "dropped": 0.0}
        for i, (layer, part) in enumerate(zip(self.layers, parts)):
            visits, (entropy, tokens) = part[:-2], part[-2:].tolist()
            layer.load.last = visits / visits.sum()
            if layer.config.bias:
                move_bias(layer.bias, visits, layer.config.bias_rate)
            shares = layer.load.last.tolist()
            values["dropped"] += tokens * layer.config.top_k - visits.sum().item()
            values["load_max"] = max(values["load_max"], max(shares) * len(shares))
            values["router_entropy"] += entropy / tokens / max(math.log(len(shares)), 1e-9) / len(self.layers)
            values |= {f"load/{i}/{e}": share for e, share in enumerate(shares)}
        return values

    def forget(self) -> None:
        """Drop what was counted since the last step: it was only a rehearsal."""
        for layer in self.layers:
            layer.load.visits = None

    def state_dict(self) -> dict[str, Any]:
        return {"last": [layer.load.last for layer in self.layers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for layer, last in zip(self.layers, state["last"], strict=True):
            layer.load.last = None if last is None else last.to(layer.router.weight.device)
