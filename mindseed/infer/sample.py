"""From logits to the next token.

Filters cut the unlikely tail, in the order of Hugging Face's processors: repetition penalty, temperature, top-k,
top-p, min-p. What remains is drawn by inverting its cumulative distribution with one uniform number per token, from a
generator of the row's own: a request with a seed gets the same answer whatever else shares its batch.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mindseed.base.errors import UserError

LEAST = 1e-6                          # temperature and penalty: beyond it, or its inverse, float32 would overflow


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose the next token. The defaults draw from the model's own distribution; temperature 0 is greedy."""

    temperature: float = 1.0          # 0: always the most likely token
    top_k: int = 0                    # keep the k most likely tokens; 0: all
    top_p: float = 1.0                # keep the smallest set with at least this much probability (1904.09751); 1: all
    min_p: float = 0.0                # keep tokens at least this likely relative to the likeliest (2407.01082); 0: all
    repetition_penalty: float = 1.0   # divide the odds of tokens that already occurred (1909.05858); 1: none
    seed: int = 0

    def __post_init__(self) -> None:
        def need(name: str, good: bool, rule: str) -> None:
            if not good:
                raise UserError(f"{name}={getattr(self, name)} is out of range: {rule}")

        need("temperature", self.temperature == 0 or LEAST <= self.temperature <= 1 / LEAST,
             f"0 (always the likeliest token), or from {LEAST:g} to {1 / LEAST:g}")
        need("top_k", self.top_k >= 0, "at least 1, or 0 to keep all tokens")
        need("top_p", 0 < self.top_p <= 1, "above 0, and 1 to keep all tokens; for the likeliest token, temperature 0")
        need("min_p", 0 <= self.min_p < 1, "from 0 (keep all tokens) to below 1")
        need("repetition_penalty", LEAST <= self.repetition_penalty <= 1 / LEAST,
             f"from {LEAST:g} to {1 / LEAST:g}, and 1 for none")
        need("seed", 0 <= self.seed < 1 << 63, "a whole number from 0 to 2^63 - 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def filtered(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The candidates that temperature, top-k, top-p and min-p leave of logits (B, V).

    Returns probabilities (B, C), summing to 1 with 0 for what was cut, and the ids (B, C) they belong to. With top_k or
    top_p, candidates are in falling order, and ties are cut by that order.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / sampling.temperature
    V = logits.shape[-1]
    if sampling.top_k or sampling.top_p < 1:
        logits, ids = logits.topk(min(sampling.top_k or V, V), dim=-1)
    else:
        ids = torch.arange(V, device=logits.device).expand_as(logits)
    probs = logits.softmax(-1)
    if sampling.top_p < 1:
        before = probs.cumsum(-1) - probs                                         # the mass of all likelier tokens
        probs = renormalise(probs.masked_fill(before >= sampling.top_p, 0))
    if sampling.min_p:
        probs = renormalise(probs.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), 0))
    return probs, ids


def renormalise(probs: Tensor) -> Tensor:
    return probs / probs.sum(-1, keepdim=True)


class Sampler:
    """Chooses tokens for a batch in which every row has its own seed, and remembers which tokens each row has seen."""

    def __init__(self, sampling: Sampling, prompts: list[list[int]], seeds: list[int], vocab_size: int,
                 device: torch.device | str = "cpu") -> None:
        self.sampling = sampling
        self.generators = [] if sampling.greedy else [torch.Generator().manual_seed(seed) for seed in seeds]
        self.seen: Tensor | None = None                                           # (B, V): has it occurred?
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
            for row, prompt in enumerate(prompts):
                self.seen[row, torch.tensor(prompt, device=device)] = True

    def __call__(self, logits: Tensor) -> Tensor:
        """The next ids (B,) for logits (B, V)."""
        if self.seen is not None:
            logits = penalised(logits, self.seen, self.sampling.repetition_penalty)
        ids = logits.max(-1).indices if self.sampling.greedy else self.draw(logits)
        if self.seen is not None:
            self.seen.scatter_(1, ids[:, None], True)
        return ids

    def draw(self, logits: Tensor) -> Tensor:
        probs, ids = filtered(logits, self.sampling)
        sums = probs.to(torch.float64).cumsum(-1)                                 # (B, C)
        total = sums[:, -1:]
        if not torch.isfinite(total).all():
            raise UserError("the model's logits are not finite: its weights are damaged, or too large for this dtype")
        u = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in self.generators]).to(logits.device)
        point = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        return ids.gather(1, torch.searchsorted(sums, point, right=True))[:, 0]   # the first whose sum is above it

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        if self.generators:
            self.generators = [self.generators[row] for row in rows]
        if self.seen is not None:
            self.seen = self.seen[rows]


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) with those of seen tokens divided by the penalty, or multiplied where they are negative."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
