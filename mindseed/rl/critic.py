"""A critic of its own: the policy's twin with a value head, which learns beside it.

Its estimates do not pull at the policy's weights, as those of a head on the policy do, at twice the memory. Both are
one module, so that whatever wraps a model (DDP) wraps them together.
"""
from __future__ import annotations

import copy
from dataclasses import replace

from torch import Tensor, nn

from mindseed.core import Output
from mindseed.models.heads import add_value_head
from mindseed.models.lm import LM


class ActorCritic(nn.Module):
    """ids (B, T), positions (B, T) -> the policy's Output with the critic's values."""

    def __init__(self, policy: LM, critic: LM) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic

    def forward(self, ids: Tensor, positions: Tensor) -> Output:
        return replace(self.policy(ids, positions), values=self.critic(ids, positions).values)


def critic_of(policy: LM, *, seed: int) -> LM:
    """A copy of the policy with a value head."""
    critic = copy.deepcopy(policy)
    add_value_head(critic, seed=seed)
    return critic
