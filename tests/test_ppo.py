"""PPO's two losses against the formulas written out token by token, with gradients; TRL has no PPO any more."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mindseed.models.heads import add_value_head
from mindseed.objectives.ppo import PPO, Critic
from tests.test_grpo import rollout, with_policies
from tests.tiny import randomise, tiny_model


def case(temperature: float = 1.0):
    model = add_value_head(tiny_model(1), seed=3).double()
    randomise(model, 5)
    batch = with_policies(rollout(), temperature)
    g = torch.Generator().manual_seed(7)
    names = ("returns", "old_values", "advantages")
    extra = {name: torch.randn(batch.ids.shape, generator=g).double() for name in names}
    return model, replace(batch, extra=batch.extra | extra)


def by_hand(model, batch, objective: PPO) -> torch.Tensor:
    """The sum over all tokens of what each loses."""
    output = model(batch.ids, batch.positions)
    logps = (output.logits() / objective.temperature).log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
    total = torch.zeros((), dtype=torch.float64)
    for b, t in batch.weights.nonzero().tolist():
        a, old = batch.extra["advantages"][b, t], batch.extra["old_logps"][b, t]
        ratio = (logps[b, t] - old).exp()
        total = total - min(ratio * a, ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high) * a)
        value, was, wanted = output.values[b, t], batch.extra["old_values"][b, t], batch.extra["returns"][b, t]
        held = was + (value - was).clamp(-objective.value_clip, objective.value_clip)
        error = max((value - wanted) ** 2, (held - wanted) ** 2) if objective.value_clip else (value - wanted) ** 2
        total = total + objective.value * 0.5 * error
    return total


@pytest.mark.parity
@pytest.mark.parametrize("settings", [{}, {"value_clip": 0.0}, {"clip_low": 0.02, "clip_high": 0.05, "value": 1.0},
                                      {"temperature": 0.7, "value_clip": 0.05}])
def test_losses_and_gradients(settings):
    model, batch = case(settings.get("temperature", 1.0))
    objective = PPO(**settings)
    found = []
    for total in (objective.loss(model(batch.ids, batch.positions), batch)[0], by_hand(model, batch, objective)):
        model.zero_grad()
        total.backward()
        found.append((total.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (a, grads_a), (b, grads_b) = found
    assert torch.isclose(a, b, rtol=1e-9) and len(grads_a) == len(grads_b) > 5
    for x, y in zip(grads_a, grads_b):
        assert torch.allclose(x, y, rtol=1e-7, atol=1e-9)


def test_the_critic_alone_is_the_critics_part():
    model, batch = case()
    output = model(batch.ids, batch.positions)
    both, policy = PPO(value=1.0).loss(output, batch)[0], PPO(value=0.0).loss(output, batch)[0]
    assert torch.isclose(both - policy, Critic().loss(output, batch)[0])


def test_a_value_that_moved_far_in_the_right_direction_counts_no_less():
    """The clipped loss is the larger of both errors, so it is never below the plain one."""
    model, batch = case()
    output = model(batch.ids, batch.positions)
    assert Critic(value_clip=0.01).loss(output, batch)[0] >= Critic(value_clip=0.0).loss(output, batch)[0]


@pytest.mark.parametrize("settings, says", [({"average": "answers"}, "averages over tokens"),
                                            ({"value": -1}, "negative"), ({"value_clip": -1}, "negative")])
def test_settings_that_mean_nothing(settings, says):
    with pytest.raises(ValueError, match=says):
        PPO(**settings)
    if "value_clip" in settings:
        with pytest.raises(ValueError, match=says):
            Critic(**settings)


def test_no_value_head_is_told():
    _, batch = case()
    with pytest.raises(ValueError, match="no value head"):
        PPO().loss(tiny_model(1).double()(batch.ids, batch.positions), batch)
