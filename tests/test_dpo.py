"""Preference losses against their formulas written out, and against TRL's trainers on the same tensors."""
from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mindseed.core import Batch
from mindseed.objectives.dpo import DPO
from tests.tiny import VOCAB, tiny_model

KINDS = {"dpo": {}, "cdpo": {"label_smoothing": 0.2}, "ipo": {"kind": "ipo"}, "orpo": {"kind": "orpo"},
         "simpo": {"kind": "simpo", "beta": 2.0, "target_margin": 0.6}, "rpo": {"sft": 0.7},
         "simpo, smooth": {"kind": "simpo", "beta": 2.0, "label_smoothing": 0.1}}


def pairs(shapes: list[tuple[int, int, int]], seed: int = 0, length: int = 32) -> Batch:
    """Rows of (prompt, chosen, rejected) tokens, padded at the end, of which the answers count."""
    g = torch.Generator().manual_seed(seed)
    B = len(shapes)
    ids, targets, positions = (torch.zeros(B, length, dtype=torch.long) for _ in range(3))
    weights = torch.zeros(B, length)
    for row, (prompt, *answers) in enumerate(shapes):
        start, at = torch.randint(VOCAB, (prompt,), generator=g), 0
        for answer in answers:
            text = torch.cat([start, torch.randint(VOCAB, (answer,), generator=g)])
            here = slice(at, at + len(text) - 1)
            ids[row, here], targets[row, here] = text[:-1], text[1:]
            positions[row, here] = torch.arange(len(text) - 1)
            weights[row, at + prompt - 1:at + len(text) - 1] = 1
            at += len(text) - 1
    return Batch(ids=ids, targets=targets, weights=weights, positions=positions)


SHAPES = [(3, 4, 6), (2, 7, 1), (5, 2, 9), (1, 5, 5)]


def by_hand(model, batch: Batch) -> list[list[torch.Tensor]]:
    """Log-probabilities of the tokens of [row][side], each text run through the model alone."""
    found = []
    for row, (prompt, *answers) in enumerate(SHAPES):
        sides, at = [], 0
        for answer in answers:
            here = slice(at, at + prompt + answer - 1)
            ids, targets = batch.ids[row:row + 1, here], batch.targets[row:row + 1, here]
            logits = model(ids, torch.arange(ids.shape[1])[None]).logits()
            sides.append(logits.log_softmax(-1).gather(-1, targets[..., None])[0, prompt - 1:, 0])
            at += prompt + answer - 1
        found.append(sides)
    return found


def written_out(name: str, ours: list, reference: list) -> torch.Tensor:
    """The sum of the losses of all pairs, from the papers."""
    total = 0.0
    for (c, r), (ref_c, ref_r) in zip(ours, reference):
        h = (c.sum() - ref_c.sum()) - (r.sum() - ref_r.sum())
        if name == "dpo":
            loss = torch.log(1 + torch.exp(-0.1 * h))
        elif name == "cdpo":
            loss = 0.8 * torch.log(1 + torch.exp(-0.1 * h)) + 0.2 * torch.log(1 + torch.exp(0.1 * h))
        elif name == "rpo":
            loss = torch.log(1 + torch.exp(-0.1 * h)) - 0.7 * c.mean()
        elif name == "ipo":
            loss = ((c - ref_c).mean() - (r - ref_r).mean() - 1 / 0.2) ** 2
        elif name == "orpo":
            p, q = c.mean().exp(), r.mean().exp()
            loss = -c.mean() - 0.1 * torch.log(torch.sigmoid(torch.log(p / (1 - p)) - torch.log(q / (1 - q))))
        else:
            gamma, smooth = (0.6, 0.0) if name == "simpo" else (0.0, 0.1)
            m = 2.0 * (c.mean() - r.mean()) - gamma
            loss = (1 - smooth) * torch.log(1 + torch.exp(-m)) + smooth * torch.log(1 + torch.exp(m))
        total = total + loss
    return total


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", KINDS)
def test_losses_and_gradients_are_those_of_the_formulas(name):
    model, other = tiny_model(1).double(), tiny_model(2).double()
    batch = pairs(SHAPES)
    objective = DPO(reference=other, **KINDS[name])
    with torch.no_grad():
        batch = objective.prepare(batch)
        reference = by_hand(other, batch)
    loss, metrics = objective.loss(model(batch.ids, batch.positions), batch)
    loss.backward()
    ours = gradients(model)
    model.zero_grad()
    expected = written_out(name, by_hand(model, batch), reference)
    expected.backward()
    assert objective.count(batch) == len(SHAPES)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours, gradients(model), rtol=1e-7, atol=1e-9)
    assert 0 <= metrics["accuracy"] <= len(SHAPES) and torch.isfinite(torch.stack(list(metrics.values()))).all()


@pytest.mark.parametrize("name", KINDS)
def test_pairs_may_be_taken_in_any_parts_and_padding_is_none(name):
    model, objective = tiny_model(1).double(), DPO(reference=tiny_model(2).double(), **KINDS[name])

    def loss(batch):
        batch = objective.prepare(batch)
        return objective.loss(model(batch.ids, batch.positions), batch)[0]

    with torch.no_grad():
        batch = pairs(SHAPES)
        rows = [Batch(**{k: getattr(batch, k)[i:i + 1] for k in ("ids", "targets", "weights", "positions")})
                for i in range(len(SHAPES))]
        torch.testing.assert_close(sum(map(loss, rows)), loss(batch))
        none = replace(rows[0], weights=torch.zeros_like(rows[0].weights))
        assert objective.count(none) == 0 and loss(none) == 0


def test_at_the_reference_dpo_loses_log_2_and_moves_towards_the_chosen():
    model = tiny_model(1).double()
    batch, objective = pairs(SHAPES), DPO(reference=model)
    with torch.no_grad():
        batch = objective.prepare(batch)
    loss, metrics = objective.loss(model(batch.ids, batch.positions), batch)
    torch.testing.assert_close(loss, torch.tensor(len(SHAPES) * math.log(2), dtype=torch.float64))
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-3 * p.grad
        after = objective.loss(model(batch.ids, batch.positions), batch)[1]
    assert after["margin"] > metrics["margin"] and torch.isclose(metrics["margin"], torch.zeros(1).double())


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"label_smoothing": 0.5}, {"sft": -1.0}, {"target_margin": 0.1},
                                   {"kind": "ipo", "label_smoothing": 0.1}])
def test_settings_without_a_meaning_are_refused(wrong):
    with pytest.raises(ValueError):
        DPO(**wrong)


def test_a_reference_is_asked_for():
    with pytest.raises(ValueError, match="needs a reference"):
        DPO().prepare(pairs(SHAPES))


# ------------------------------------------------------------------------------------------------------ TRL's own code

TRL_NAMES = {"dpo": "sigmoid", "ipo": "ipo"}


def trls(name: str, sides: tuple, reference: tuple) -> torch.Tensor:
    """What TRL's trainer loses, averaged, for log-probabilities of tokens [chosen, rejected], lists of tensors."""
    (chosen, rejected), (ref_chosen, ref_rejected) = sides, reference
    if name in TRL_NAMES:
        from trl.trainer.dpo_trainer import DPOTrainer
        flat, lengths = [*chosen, *rejected], [len(x) for x in (*chosen, *rejected)]
        padded = torch.stack([F.pad(x, (0, max(lengths) - len(x))) for x in flat])
        mask = torch.tensor([[0] + [1] * n + [0] * (max(lengths) - n) for n in lengths])     # one token of prompt
        trainer = stub(loss_types=[TRL_NAMES[name]], loss_weights=[1.0], beta=0.1, ld_alpha=None,
                       precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False,
                       aux_loss_enabled=False, label_smoothing=0.0)
        return DPOTrainer._compute_loss(trainer, Answering(padded), {
            "input_ids": mask, "completion_mask": mask, "attention_mask": mask,
            "ref_chosen_logps": torch.stack([x.sum() for x in ref_chosen]),
            "ref_rejected_logps": torch.stack([x.sum() for x in ref_rejected])}, False)
    means = [torch.stack([x.mean() for x in side]) for side in (chosen, rejected)]
    if name == "orpo":
        from trl.experimental.orpo.orpo_trainer import ORPOTrainer
        return (-means[0] - ORPOTrainer.odds_ratio_loss(stub(beta=0.1), *means)[0]).mean()
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    settings = {"simpo": dict(beta=2.0, simpo_gamma=0.6, label_smoothing=0.0, loss_type="simpo"),
                "simpo, smooth": dict(beta=2.0, simpo_gamma=0.0, label_smoothing=0.1, loss_type="simpo"),
                "cdpo": dict(beta=0.1, label_smoothing=0.2, loss_type="sigmoid")}[name]
    if name == "cdpo":                            # TRL's DPO has no such smoothing any more; CPO's is of the same form
        means = [torch.stack([x.sum() - y.sum() for x, y in zip(*both)]) for both in zip(sides, reference)]
    return CPOTrainer.cpo_loss(stub(alpha=0.0, **settings), *means)[0].mean()


class Answering:
    """A model of TRL's that answers with given log-probabilities."""

    def __init__(self, log_probs: torch.Tensor) -> None:
        self.log_probs, self.training = log_probs, True

    def __call__(self, **_):
        return SimpleNamespace(log_probs=self.log_probs, entropy=torch.zeros_like(self.log_probs), aux_loss=None,
                               mean_logits=self.log_probs, log_sum_sq_probs=self.log_probs,
                               is_top1=self.log_probs > 0)


def stub(**settings) -> SimpleNamespace:
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x)
    return SimpleNamespace(accelerator=accelerator, model=SimpleNamespace(training=True),
                           _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1, **settings)


@pytest.mark.parity
@pytest.mark.parametrize("name", [name for name in KINDS if name != "rpo"])
def test_losses_are_trls(name):
    pytest.importorskip("trl", reason="trl is not installed")
    model, other = tiny_model(1).double(), tiny_model(2).double()
    batch, objective = pairs(SHAPES), DPO(reference=other, **KINDS[name])
    with torch.no_grad():
        batch = objective.prepare(batch)
        reference = [[x.float().double() for x in side] for side in zip(*by_hand(other, batch))]
    ours = objective.loss(model(batch.ids, batch.positions), batch)[0] / objective.count(batch)
    ours.backward()
    gradient = gradients(model)
    model.zero_grad()
    theirs = trls(name, tuple(zip(*by_hand(model, batch))), tuple(reference))
    theirs.backward()
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, gradients(model), rtol=1e-5, atol=1e-6)
