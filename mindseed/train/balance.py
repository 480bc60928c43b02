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
import torch.distributed as torch_dist
from torch import nn

from mindseed.base import dist
from mindseed.nn.balance import move_bias
from mindseed.nn.moe import MoE
from mindseed.parallel.checkpoint import config_mixtures


class Balance:
    """A callable of `Run.after_step`; its state (the loads of the last step) belongs into a checkpoint. `pipe` are the
    ranks that have the other layers, if any do: all tell of all mixtures, by their number in the whole model."""

    def __init__(self, model: nn.Module, pipe: torch_dist.ProcessGroup | None = None, *,
                 device: torch.device | None = None) -> None:
        """`device`: where the model runs, which is not where its parameters lie if they are offloaded."""
        here = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
        every = config_mixtures(model) if pipe else [(name, module.config) for name, module in here.items()]
        self.every = [(here.get(name), config) for name, config in every]
        self.layers, self.pipe = list(here.values()), pipe
        self.device = device or next(model.parameters()).device

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        if not self.every:
            return {}
        sizes = [config.experts + 2 for _, config in self.every]
        taken = dist.sum_over_ranks(torch.cat([
            layer.load.take() if layer else torch.zeros(size, device=self.device)
            for (layer, _), size in zip(self.every, sizes)]))
        if self.pipe:
            torch_dist.all_reduce(taken, group=self.pipe)
        values: dict[str, float] = {"load_max": 0.0, "router_entropy": 0.0, "dropped": 0.0}
        for i, ((layer, config), part) in enumerate(zip(self.every, taken.split(sizes))):
            visits, (entropy, tokens) = part[:-2], part[-2:].tolist()
            last = visits / visits.sum()
            if layer:
                layer.load.last = last
            if layer and config.bias:
                move_bias(layer.bias, visits, config.bias_rate)
            shares = last.tolist()
            values["dropped"] += tokens * config.top_k - visits.sum().item()
            values["load_max"] = max(values["load_max"], max(shares) * len(shares))
            values["router_entropy"] += entropy / tokens / max(math.log(len(shares)), 1e-9) / len(self.every)
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
