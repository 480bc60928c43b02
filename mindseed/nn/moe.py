"""Mixture of experts: many feed-forwards, of which each token visits a few (2101.03961, 2401.06066, 2412.19437).

A router scores the experts for every token. The best `top_k` are visited, and their answers are summed, weighed by the
scores. Parameters grow with the number of experts, arithmetic only with top_k. *Shared* experts are visited by every
token and take up what all texts need, so that the others may specialise.

    scores    softmax(x R^T) or sigmoid(x R^T)
    chosen    top_k of scores + bias; with groups, only experts of the best groups compete
    weights   scores of the chosen, renormalised to sum to 1 if asked for, times `scaling`
    y         sum over the chosen of weight * expert(x), plus shared(x)

Nothing is dropped: tokens are sorted by expert, every expert multiplies its own stretch of them, and the results are
sorted back. What keeps the experts equally busy is told in balance.py.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindseed.nn.balance import Load, balance_per_token
from mindseed.nn.ffn import SwiGLU, SwiGLUConfig
from mindseed.nn.grouped import Combine, Dispatch, grouped_swiglu
from mindseed.nn.linear import Linear, Role


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    experts: int
    top_k: int
    expert_dim: int                  # width of one expert's feed-forward
    shared_dim: int = 0              # width of the feed-forward that every token visits; 0: none
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True         # the weights of the chosen experts sum to 1 (before scaling)
    scaling: float = 1.0             # of the weights
    groups: int = 1                  # the experts stand in this many groups ...
    top_groups: int = 1              # ... of which so many compete, by the sum of their two best scores
    bias: bool = False               # experts are chosen by score + bias; the bias is no parameter, balance.py moves it
    bias_rate: float = 1e-3          # how far it moves in one step
    balance_weight: float = 0.0      # of the auxiliary loss over the global batch
    sequence_weight: float = 0.0     # of the auxiliary loss within every row
    z_weight: float = 0.0            # of the squared log partition function of the router (2202.08906)

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k={self.top_k} must lie between 1 and experts={self.experts}")
        if self.expert_dim < 1 or self.shared_dim < 0:
            raise ValueError(f"expert_dim={self.expert_dim} must be at least 1 and shared_dim={self.shared_dim} not "
                             "negative")
        if self.score not in ("softmax", "sigmoid"):
            raise ValueError(f"score={self.score!r} must be softmax or sigmoid")
        if self.groups < 1 or self.experts % self.groups or not 1 <= self.top_groups <= self.groups:
            raise ValueError(f"groups={self.groups} must divide experts={self.experts} and top_groups="
                             f"{self.top_groups} lie between 1 and groups")
        if self.top_groups * (self.experts // self.groups) < self.top_k:
            raise ValueError(f"top_groups={self.top_groups} groups of {self.experts // self.groups} experts are fewer "
                             f"than top_k={self.top_k}")
        if self.groups > 1 and self.experts // self.groups < 2:
            raise ValueError(f"groups={self.groups} leaves one expert a group; groups are judged by their two best")
        if min(self.bias_rate, self.balance_weight, self.sequence_weight, self.z_weight) < 0:
            raise ValueError("bias_rate, balance_weight, sequence_weight and z_weight must not be negative")

    @property
    def untrainable(self) -> str | None:
        """Why the router of this model could not learn, or None."""
        if self.top_k == 1 and self.renormalise and self.experts > 1:
            return ("top_k=1 with renormalised weights: the weight of the one chosen expert is always 1, so no "
                    "gradient reaches the router; set renormalise to false, or top_k to 2")
        return None


class ExpertLinear(nn.Module):
    """The same Linear of every expert, stacked: weight (E, out, in). What multiplies with it is in grouped.py, and
    takes it by `dense()`, an adapter's share included."""

    def __init__(self, experts: int, in_dim: int, out_dim: int, *, role: Role) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, out_dim, in_dim))
        self.in_features, self.role = in_dim, role
        self.adapter: nn.Module | None = None

    def matrix(self) -> Tensor:
        return self.weight

    def dense(self) -> Tensor:
        return self.matrix() if self.adapter is None else self.adapter.dense(self)


class MoE(nn.Module):
    """(B, T, D) -> (B, T, D), and auxiliary losses per token {name: (B, T)}. E experts, k chosen, N = B T tokens."""

    def __init__(self, dim: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = c = config
        self.router = Linear(dim, c.experts, role="replicated")
        if c.bias:
            self.register_buffer("bias", torch.zeros(c.experts))
        self.gate = ExpertLinear(c.experts, dim, c.expert_dim, role="column")
        self.up = ExpertLinear(c.experts, dim, c.expert_dim, role="column")
        self.down = ExpertLinear(c.experts, c.expert_dim, dim, role="row")
        self.shared = SwiGLU(dim, SwiGLUConfig(ffn_dim=c.shared_dim)) if c.shared_dim else None
        self.load = Load(c.experts)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        B, T, D = x.shape
        logits = self.logits(x.flatten(0, 1))                                     # (N, E)
        weights, chosen, scores = self.route(logits)                              # (N, k), (N, k), (N, E)
        visits = chosen.flatten()
        counts = torch.zeros(self.config.experts, dtype=torch.long, device=x.device)
        counts.scatter_add_(0, visits, torch.ones_like(visits))                   # (E,)
        y = self.visit(x.flatten(0, 1), weights, chosen, counts).view(B, T, D)
        if self.shared is not None:
            y = y + self.shared(x)
        if not (self.training and torch.is_grad_enabled()):
            return y, {}
        shares = scores / scores.sum(-1, keepdim=True) if self.config.score == "sigmoid" else scores
        self.load.add(counts, shares)
        return y, self.auxiliary(logits.view(B, T, -1), shares.view(B, T, -1), chosen.view(B, T, -1), counts)

    def logits(self, x: Tensor) -> Tensor:
        """The router's, in at least float32 whatever autocast says: its choices are sensitive."""
        wide = torch.promote_types(self.router.weight.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.router.weight.to(wide))

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(weights (N, k), chosen experts (N, k), scores (N, E)) of the router's logits (N, E)."""
        c = self.config
        scores = logits.softmax(-1) if c.score == "softmax" else logits.sigmoid()
        rank = scores.detach() + self.bias if c.bias else scores.detach()
        if c.groups > 1:
            grouped = rank.unflatten(-1, (c.groups, -1))                          # (N, groups, E / groups)
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(c.top_groups, dim=-1).indices
            out = torch.ones(grouped.shape[:2], dtype=torch.bool, device=rank.device).scatter_(1, best, False)
            rank = grouped.masked_fill(out[..., None], -torch.inf).flatten(1)
        chosen = rank.topk(c.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if c.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * c.scaling, chosen, scores

    def visit(self, x: Tensor, weights: Tensor, chosen: Tensor, counts: Tensor) -> Tensor:
        """Every token at its experts: x (N, D) -> (N, D)."""
        order = chosen.flatten().argsort(stable=True)                             # (N k,): visits, sorted by expert
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)              # where each visit was put
        token = order.div(chosen.shape[1], rounding_mode="floor")
        h = Dispatch.apply(x, token, place)                                       # (N k, D)
        return Combine.apply(self.answers(h, counts), weights, token, order, place)

    def answers(self, h: Tensor, counts: Tensor) -> Tensor:
        """What the experts make of their visits h (N k, D), `counts` (E,) of them in turn."""
        return grouped_swiglu(h, self.gate.dense(), self.up.dense(), self.down.dense(), counts)

    def auxiliary(self, logits: Tensor, shares: Tensor, chosen: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """Losses per token, (B, T) each, already weighed."""
        c, aux = self.config, {}
        if c.balance_weight:
            busy = counts.new_tensor(1 / c.experts, dtype=shares.dtype).expand(c.experts) if self.load.last is None \
                else self.load.last
            aux["balance"] = c.balance_weight * balance_per_token(shares, busy)
        if c.sequence_weight:
            ones = torch.ones_like(chosen, dtype=shares.dtype).flatten(1)
            busy = torch.zeros_like(shares[:, 0]).scatter_add_(1, chosen.flatten(1), ones) / ones.shape[1]      # (B, E)
            aux["sequence"] = c.sequence_weight * balance_per_token(shares, busy[:, None])
        if c.z_weight:
            aux["router_z"] = c.z_weight * logits.logsumexp(-1).square()
        return aux
