"""The policy objective with every setting, against formulas written out answer by answer, and TRL's trainers."""
from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mindseed.core import Batch
from mindseed.objectives.grpo import GRPO, divergence
from tests.tiny import VOCAB, tiny_model

KINDS = {
    "grpo": {}, "grpo, kl": {"kl": 0.3}, "dapo": {"clip_high": 0.28, "average": "tokens"},
    "dr grpo": {"average": "constant", "length": 12}, "gspo": {"level": "mean", "clip_low": 0.02, "clip_high": 0.03},
    "cispo": {"weight_only": True, "clip_high": 0.15, "average": "tokens"}, "rloo": {"level": "product"},
    "warm": {"temperature": 0.7, "kl": 0.1, "kl_estimator": "k2"}, "corrected": {"correction": 1.1},
    "k1": {"kl": 0.2, "kl_estimator": "k1", "average": "tokens"}}
ROWS = [[(3, 4), (2, 7)], [(5, 2), (1, 5), (2, 3)], [(4, 9)]]         # (prompt, answer) tokens, packed three ways


def rollout(seed: int = 0, length: int = 32) -> Batch:
    g = torch.Generator().manual_seed(seed)
    B = len(ROWS)
    ids, targets, positions = (torch.zeros(B, length, dtype=torch.long) for _ in range(3))
    weights = torch.zeros(B, length)
    extra = {name: torch.zeros(B, length, dtype=torch.float64) for name in ("advantages", "old_logps", "reference",
                                                                             "sampled_logps")}
    for row, documents in enumerate(ROWS):
        at = 0
        for prompt, answer in documents:
            text = torch.randint(VOCAB, (prompt + answer,), generator=g)
            here, said = slice(at, at + len(text) - 1), slice(at + prompt - 1, at + len(text) - 1)
            ids[row, here], targets[row, here] = text[:-1], text[1:]
            positions[row, here] = torch.arange(len(text) - 1)
            weights[row, said] = 1
            extra["advantages"][row, said] = torch.randn(1, generator=g).double()
            at += len(text) - 1
    return Batch(ids=ids, targets=targets, weights=weights, positions=positions, extra=extra)


def with_policies(batch: Batch, temperature: float) -> Batch:
    """Log-probabilities of policies a little different from the one that is trained."""
    extra = dict(batch.extra)
    with torch.no_grad():
        for i, name in enumerate(("old_logps", "reference", "sampled_logps")):
            other = tiny_model(1).double()
            for p in other.parameters():
                p += (0.01 + 0.01 * i) * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).double()
            logits = other(batch.ids, batch.positions).logits() / (temperature if name != "reference" else temperature)
            extra[name] = logits.log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
    return replace(batch, extra=extra)


def answers(batch: Batch, logps: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Of every answer what its tokens have."""
    found = []
    for row, documents in enumerate(ROWS):
        at = 0
        for prompt, answer in documents:
            said = slice(at + prompt - 1, at + prompt + answer - 1)
            found.append({name: x[row, said] for name, x in (batch.extra | {"logps": logps}).items()})
            at += prompt + answer - 1
    return found


def written_out(name: str, parts: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The mean loss, from the papers."""
    settings, total, units = GRPO(**KINDS[name]), 0.0, 0.0
    for one in parts:
        n, change = len(one["logps"]), one["logps"] - one["old_logps"]
        change = {"token": change, "mean": change.mean().expand(n), "product": change.sum().expand(n)}[settings.level]
        ratio = change.exp()
        low, high, advantage = 1 - settings.clip_low, 1 + settings.clip_high, one["advantages"]
        if settings.weight_only:
            loss = -torch.clamp(ratio.detach(), max=high) * advantage * one["logps"]
        else:
            gain = torch.where(advantage > 0, torch.clamp(ratio, max=high), torch.clamp(ratio, min=low)) * advantage
            loss = -gain
        if settings.correction:
            loss = loss * torch.clamp((one["old_logps"] - one["sampled_logps"]).exp(), max=settings.correction)
        if settings.kl:
            r = (one["reference"] - one["logps"])
            loss = loss + settings.kl * {"k1": -r, "k2": r ** 2 / 2, "k3": r.exp() - 1 - r}[settings.kl_estimator]
        total = total + (loss.sum() if settings.average == "tokens" else loss.sum() / (settings.length or n))
        units += n if settings.average == "tokens" else 1
    return total / units


@pytest.mark.parametrize("name", KINDS)
def test_losses_and_gradients_are_those_of_the_formulas(name):
    model, objective = tiny_model(1).double(), GRPO(**KINDS[name])
    batch = with_policies(rollout(), objective.temperature)
    loss, metrics = objective.loss(model(batch.ids, batch.positions), batch)
    (loss / objective.count(batch)).backward()
    ours = gradients(model)
    model.zero_grad()
    logits = model(batch.ids, batch.positions).logits() / objective.temperature
    logps = logits.log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
    expected = written_out(name, answers(batch, logps))
    expected.backward()
    torch.testing.assert_close(loss / objective.count(batch), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ours, gradients(model), rtol=1e-7, atol=1e-10)
    means = {key: value / (batch.weights > 0).sum() for key, value in metrics.items()}
    counted = batch.weights > 0
    torch.testing.assert_close(means["entropy"], -logps[counted].mean())
    assert 0 <= means["clipped"] <= 1
    change = (logps - batch.extra["old_logps"])[counted]                  # the old policy's samples tell KL(old, new)
    torch.testing.assert_close(means["kl_old"], (change.exp() - 1 - change).mean())


@pytest.mark.parametrize("name", KINDS)
def test_trajectories_may_be_taken_in_any_parts(name):
    model, objective = tiny_model(1).double(), GRPO(**KINDS[name])
    batch = with_policies(rollout(), objective.temperature)
    with torch.no_grad():
        def loss(b):
            return objective.loss(model(b.ids, b.positions), b)[0]

        rows = [Batch(ids=batch.ids[i:i + 1], targets=batch.targets[i:i + 1], weights=batch.weights[i:i + 1],
                      positions=batch.positions[i:i + 1], extra={k: v[i:i + 1] for k, v in batch.extra.items()})
                for i in range(len(ROWS))]
        torch.testing.assert_close(sum(map(loss, rows)), loss(batch))
        metrics = [objective.loss(model(b.ids, b.positions), b)[1] for b in (batch, *rows)]
        for name in metrics[0]:
            torch.testing.assert_close(sum(some[name] for some in metrics[1:]), metrics[0][name])
        assert sum(objective.count(b) for b in rows) == objective.count(batch)
        none = replace(rows[0], weights=torch.zeros_like(rows[0].weights))
        assert objective.count(none) == 0 and loss(none) == 0


@pytest.mark.parametrize("name", KINDS)
def test_before_the_first_update_the_ratio_is_one_and_the_gradient_that_of_the_policy(name):
    model, objective = tiny_model(1).double(), GRPO(**KINDS[name] | {"kl": 0.0, "correction": 0.0})
    batch = rollout()
    with torch.no_grad():
        logits = model(batch.ids, batch.positions).logits() / objective.temperature
        batch.extra["old_logps"] = logits.log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
    metrics = objective.loss(model(batch.ids, batch.positions), batch)[1]
    count = (batch.weights > 0).sum()
    assert torch.isclose(metrics["ratio"] / count, torch.ones(1).double()) and metrics["clipped"] == 0


def test_estimators_of_a_divergence():
    """k1 and k3 are right on average, k3 and k2 never negative."""
    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(8, generator=g).double().mul(0.5).log_softmax(-1) for _ in range(2))
    ids = torch.multinomial(p.exp(), 400_000, replacement=True, generator=g)
    true = (p.exp() * (p - q)).sum()
    for name, bias in (("k1", 0.01), ("k2", 0.05), ("k3", 0.01)):
        each = divergence(p[ids], q[ids], name)
        assert abs(each.mean() - true) < bias * (1 + true) and (name == "k1" or each.min() >= 0), name


@pytest.mark.parametrize("wrong", [{"clip_low": 0.0}, {"clip_high": -0.1}, {"temperature": 0.0},
                                   {"average": "constant"}, {"length": 5}, {"kl": -1.0},
                                   {"weight_only": True, "level": "mean"}])
def test_settings_without_a_meaning_are_refused(wrong):
    with pytest.raises(ValueError):
        GRPO(**wrong)


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# ------------------------------------------------------------------------------------------------------ TRL's own code

THEIRS = {"grpo": dict(loss_type="grpo"), "grpo, kl": dict(loss_type="grpo", beta=0.3),
          "dapo": dict(loss_type="dapo", epsilon_high=0.28), "dr grpo": dict(loss_type="dr_grpo"),
          "gspo": dict(loss_type="grpo", importance_sampling_level="sequence", epsilon_low=0.02, epsilon_high=0.03),
          "cispo": dict(loss_type="cispo", epsilon_high=1.15), "rloo": {},
          "corrected": dict(loss_type="grpo", use_vllm=True)}


def stub(logps: torch.Tensor, **settings) -> SimpleNamespace:
    """What TRL's loss methods read of their trainers, with log-probabilities that are given."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1, sync_gradients=True,
                                  gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x)
    args = SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
    defaults = dict(top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token",
                    beta=0.0, epsilon_low=0.2, epsilon_high=0.2, use_vllm=False, max_completion_length=12,
                    vllm_importance_sampling_correction=True, aux_loss_enabled=False, _entropy_bonus_enabled=False,
                    current_gradient_accumulation_steps=1, loss_type="grpo")
    return SimpleNamespace(accelerator=accelerator, args=args, model=SimpleNamespace(training=True),
                           _metrics={"train": defaultdict(list)},
                           _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
                           **defaults | settings)


@pytest.mark.parity
@pytest.mark.parametrize("name", THEIRS)
def test_losses_are_trls(name):
    pytest.importorskip("trl", reason="trl is not installed")
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer
    model, objective = tiny_model(1).double(), GRPO(**KINDS[name])
    batch = with_policies(rollout(), objective.temperature)
    (objective.loss(model(batch.ids, batch.positions), batch)[0] / objective.count(batch)).backward()
    ours = gradients(model)
    loss = objective.loss(model(batch.ids, batch.positions), batch)[0] / objective.count(batch)
    model.zero_grad()
    logits = model(batch.ids, batch.positions).logits()
    parts = answers(batch, logits.log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0])
    longest = max(len(one["logps"]) for one in parts)
    table = {key: torch.stack([F.pad(one[key], (0, longest - len(one[key]))) for one in parts]) for key in parts[0]}
    mask = torch.tensor([[1] * len(one["logps"]) + [0] * (longest - len(one["logps"])) for one in parts])
    inputs = {"prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask, "completion_mask": mask,
              "advantages": table["advantages"][:, 0], "num_items_in_batch": mask.sum(),
              "old_per_token_logps": table["old_logps"], "ref_per_token_logps": table["reference"],
              "old_logps": (table["old_logps"] * mask).sum(1),
              "importance_sampling_ratio": (table["old_logps"] - table["sampled_logps"]).exp().clamp(max=1.1)}
    trainer = RLOOTrainer if name == "rloo" else GRPOTrainer
    theirs = trainer._compute_loss(stub(table["logps"], **THEIRS[name]), None, inputs)
    theirs.backward()
    torch.testing.assert_close(loss, theirs, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(ours, gradients(model), rtol=1e-6, atol=1e-9)
