"""Keeping experts equally busy. A router left alone soon sends everything to a few experts, which then learn fastest
and are chosen even more. Three remedies, which may be combined:

    over the global batch   add weight * E * sum_e busy_e * share_e to the loss (2101.03961): `busy` is the share of
                            visits an expert got, `share` its mean score, through which the gradient flows. Counted over
                            the global batch, experts may specialise by topic within it (2501.11873).
    within every row        the same, with visits counted in each row alone (2412.19437): no row may overload an expert.
    bias                    no loss at all: an expert that got fewer visits than the mean in a step has its bias
                            raised by a fixed amount, one that got more has it lowered (2408.15664). The bias takes
                            part in choosing, never in weighing, so it bends no gradient.

Visits of a global batch, over all ranks and micro-batches, are known when the step is done. So the first remedy uses
those of the step before: what a micro-batch contributes then does not depend on how the batch was cut. Padding counts
as visits, so that holds for packed rows; those of preference pairs are as wide as the widest of their micro-batch.
"""
from __future__ import annotations

import torch
from torch import Tensor


def balance_per_token(shares: Tensor, busy: Tensor) -> Tensor:
    """E sum_e busy_e share_e per token: (B, T) from shares (B, T, E) and busy (E,) or (B, 1, E), each summing to 1.

    Its mean over tokens is the auxiliary loss, 1 for a perfect balance.
    """
    return shares.shape[-1] * (shares * busy.to(shares.dtype)).sum(-1)


class Load:
    """How busy the experts of one layer were: visits since the last `take`, and their shares in the step before."""

    def __init__(self, experts: int) -> None:
        self.experts, self.last = experts, None
        self.visits = self.entropy = self.tokens = None

    @torch.no_grad()
    def add(self, counts: Tensor, shares: Tensor) -> None:
        """Visits (E,) and router shares (N, E) of one forward pass."""
        entropy = -(shares * shares.clamp_min(1e-20).log()).sum()
        if self.visits is None:
            self.visits, self.entropy = torch.zeros_like(counts, dtype=torch.float32), torch.zeros_like(entropy)
            self.tokens = 0
        self.visits += counts
        self.entropy += entropy
        self.tokens += len(shares)

    def take(self) -> Tensor:
        """Visits (E,), and after them the summed entropy and the tokens, as one vector (E + 2,); starts anew."""
        assert self.visits is not None, "no forward pass in training mode since the last step"
        tokens = torch.full_like(self.visits[:1], self.tokens)
        taken = torch.cat([self.visits, self.entropy.to(self.visits.dtype)[None], tokens])
        self.visits = None
        return taken


def move_bias(bias: Tensor, visits: Tensor, rate: float) -> None:
    """Raise the bias of experts with fewer visits than the mean by `rate`, lower that of the others, in place."""
    bias += rate * torch.sign(visits.mean() - visits).to(bias.dtype)
