"""KTO against its formula written out, against TRL's trainer on the same tensors, and over ranks."""
from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mindseed.base import dist
from mindseed.base.errors import UserError
from mindseed.core import Batch
from mindseed.data.loader import Once, RowSource
from mindseed.data.preference import UnpairedRows, reference_logps
from mindseed.data.shards import MemoryDocuments
from mindseed.objectives.kto import KTO, document
from mindseed.train.step import Run, train_step
from tests import spawn
from tests.test_dpo import gradients, stub
from tests.test_preference import random_documents
from tests.test_train import make_run
from tests.tiny import VOCAB, Fixed, flat, random_batch, tiny_model

LABELS = [1, 0, 0, 1, 1, 0, 1, 0]


def rows(labels: list[int] = LABELS) -> UnpairedRows:
    return UnpairedRows(random_documents(len(labels), labels=labels), seq_len=14, shuffle=False)


def whole(labels: list[int] = LABELS) -> Batch:
    return next(iter(Once(rows(labels), batch_size=len(labels))))


def logp(model, ids, learned) -> torch.Tensor:
    """The log-probability of one document's answer, the model reading it alone."""
    ids = torch.tensor(np.asarray(ids[:15], np.int64))[None]
    logits = model(ids[:, :-1], torch.arange(ids.shape[1] - 1)[None]).logits().log_softmax(-1)
    return logits.gather(-1, ids[:, 1:, None])[0, :, 0][torch.tensor(np.asarray(learned[1:15])) > 0].sum()


def written_out(model, other, settings: KTO) -> tuple[torch.Tensor, torch.Tensor]:
    """(the sum of the losses of all answers, z), from the paper."""
    some = rows()
    gains = [[logp(model, *side) - logp(other, *side) for side in some.sides(d)] for d in range(len(some))]
    z = torch.stack([mixed for _, mixed in gains]).mean().clamp(min=0).detach()
    total = 0.0
    for (gain, _), good in zip(gains, LABELS):
        value = torch.sigmoid(settings.beta * (gain - z)) if good else torch.sigmoid(settings.beta * (z - gain))
        total = total + (settings.desirable if good else settings.undesirable) * (1 - value)
    return total, z


SETTINGS = {"plain": {}, "weighed": {"beta": 0.4, "desirable": 1.5, "undesirable": 0.7}}


def at_odds(swap: bool) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A policy and a reference between which z is above 0, or would be below."""
    one, two = tiny_model(1).double(), tiny_model(2).double()
    return (two, one) if swap else (one, two)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_losses_and_gradients_are_those_of_the_formula(name, swap):
    model, other = at_odds(swap)
    objective = KTO(policy=model, reference=other, **SETTINGS[name])
    batch = objective.prepare(whole())
    loss, metrics = objective.loss(model(batch.ids, batch.positions), batch)
    loss.backward()
    ours = gradients(model)
    model.zero_grad()
    expected, z = written_out(model, other, objective)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours, gradients(model), rtol=1e-7, atol=1e-9)
    assert objective.count(batch) == len(LABELS) and torch.isclose(metrics["kl"], z * len(LABELS))
    assert batch.weights.sum() == sum(int(rows().sides(d)[0][1].sum()) for d in range(len(LABELS)))


def test_both_sides_of_the_clamp_are_tested():
    found = [written_out(*at_odds(swap), KTO(policy=None))[1] for swap in (False, True)]
    assert min(found) == 0 and max(found) > 0


def test_rewards_are_means_over_answers_of_one_kind():
    model, other = at_odds(False)
    objective = KTO(policy=model, reference=other)
    for labels in (LABELS[:3], [1, 1], [0, 0, 0]):
        some = rows(labels)
        batch = objective.prepare(whole(labels))
        metrics = objective.loss(model(batch.ids, batch.positions), batch)[1]
        gains = [0.1 * (logp(model, *some.sides(d)[0]) - logp(other, *some.sides(d)[0])) for d in range(len(labels))]
        for name, kind in (("reward_desirable", 1), ("reward_undesirable", 0)):
            mine = [gain for gain, label in zip(gains, labels) if label == kind]
            expected = torch.stack(mine).mean() if mine else torch.zeros((), dtype=torch.float64)
            torch.testing.assert_close(metrics[name] / len(labels), expected.detach())


def test_what_stands_beside_an_answer_and_padding_change_nothing():
    model, other = at_odds(False)
    objective = KTO(policy=model, reference=other)
    with torch.no_grad():
        batch = objective.prepare(whole())
        loss = objective.loss(model(batch.ids, batch.positions), batch)[0]
        parts = [Batch(**{k: getattr(batch, k)[i:i + 1] for k in ("ids", "targets", "weights", "positions")},
                       extra={k: v[i:i + 1] for k, v in batch.extra.items()}) for i in range(len(LABELS))]
        torch.testing.assert_close(sum(objective.loss(model(b.ids, b.positions), b)[0] for b in parts), loss)
        raw = whole()
        padded = Batch(**{k: F.pad(getattr(raw, k), (0, 9, 0, 3)) for k in ("ids", "targets", "weights", "positions")},
                       extra={k: F.pad(v, (0, 3)) for k, v in raw.extra.items()})
        padded = objective.prepare(padded)
        torch.testing.assert_close(objective.loss(model(padded.ids, padded.positions), padded)[0], loss)
        assert objective.count(padded) == len(LABELS)


def test_documents_are_taken_out_whole():
    batch = whole()
    for number in (0, 1):
        some = document(batch, number)
        for b, sides in enumerate(map(rows().sides, range(len(LABELS)))):
            ids, learned = sides[number]
            ids, n = ids.astype(np.int64).tolist(), len(ids) - 1
            assert some.ids[b].tolist() == ids[:-1] + [0] * (some.ids.shape[1] - n)
            assert some.targets[b, :n].tolist() == ids[1:] and some.positions[b, :n].tolist() == list(range(n))
            assert some.weights[b, :n].tolist() == [float(x) for x in learned[1:]] and not some.weights[b, n:].any()


def test_a_reference_asked_in_advance_says_the_same():
    model, other = tiny_model(1), tiny_model(2)
    known = rows().with_reference(reference_logps(rows(), other, 3))
    batches = [KTO(policy=model, reference=other).prepare(whole()),
               KTO(policy=model).prepare(next(iter(Once(known, batch_size=len(LABELS)))))]
    for name in ("reference", "baseline", "share"):
        torch.testing.assert_close(*(batch.extra[name] for batch in batches), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="needs a reference"):
        KTO(policy=model).prepare(whole())


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"desirable": -1.0}, {"desirable": 0.0, "undesirable": 0.0}])
def test_settings_without_a_meaning_are_refused(wrong):
    with pytest.raises(ValueError):
        KTO(policy=tiny_model(), **wrong)


def test_accumulation_is_refused():
    run = make_run(tiny_model(), Fixed([random_batch(2, 8)]))
    with pytest.raises(UserError, match="KTO compares all samples of a batch"):
        Run(run.source, KTO(policy=tiny_model()), run.backend, schedule=run.schedule, accumulate=2)


# ---------------------------------------------------------------------------------------------- the same over ranks

def train(rank: int, world: int, steps: int = 3) -> tuple[list, torch.Tensor]:
    torch.set_num_threads(1)
    model, other = at_odds(True)
    objective = KTO(policy=model, reference=other, beta=0.3, over_ranks=dist.sum_over_ranks)
    made = random_documents(40, labels=[d % 3 == 0 for d in range(40)])
    source = RowSource(UnpairedRows(made, seq_len=14), batch_size=8 // world, rank=rank, world=world)
    run = make_run(model, source, objective=objective)
    names = ("loss", "grad_norm", "kl", "reward_desirable", "reward_undesirable")
    return [[metrics[name] for name in names] for metrics in (train_step(run) for _ in range(steps))], flat(model)


def on_rank(rank: int, world: int) -> tuple:
    values, weights = train(rank, world)
    return values, weights.tolist()


def test_two_ranks_equal_one_on_the_union():
    found = spawn.on_ranks(on_rank)
    values, weights = train(0, 1)
    assert values[0][2] > 0                                           # z plays a part
    for rank in (0, 1):
        torch.testing.assert_close(torch.tensor(found[rank][0]), torch.tensor(values), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(torch.tensor(found[rank][1], dtype=torch.float64), weights, rtol=1e-8, atol=1e-9)


# --------------------------------------------------------------------------------------------------------- learning

def test_a_tiny_model_learns_what_is_desirable():
    model, some = tiny_model(1), rows()
    some = some.with_reference(reference_logps(some, model, 8))
    run = make_run(model, RowSource(some, batch_size=8), objective=KTO(policy=model), lr=3e-3)
    values = [train_step(run) for _ in range(40)]
    assert values[0]["loss"] == pytest.approx(0.5, abs=1e-3) and values[0]["kl"] < 1e-3
    last = values[-1]
    assert last["reward_desirable"] > 0.3 and last["reward_undesirable"] < -0.3 and last["loss"] < 0.45


def test_pairs_one_by_one_teach_as_well():
    model = tiny_model(1)
    made = MemoryDocuments([([p, 1, 2, a], [0, 0, 0, 1]) for p in range(20, 28) for a in (50, 51)])
    some = UnpairedRows(made, seq_len=8)
    some = some.with_reference(reference_logps(some, model, 8))
    run = make_run(model, RowSource(some, batch_size=16), objective=KTO(policy=model, beta=0.5), lr=3e-3)
    for _ in range(40):
        train_step(run)
    with torch.no_grad():
        logps = [[logp(model, *made.get(2 * k + side)) for k in range(8)] for side in (0, 1)]
    assert all(good > bad + 1 for good, bad in zip(*logps)) and made.ids[0].max() < VOCAB


# ------------------------------------------------------------------------------------------------------ TRL's own code

class Theirs:
    """A model of ours behind the call that TRL's trainer makes."""

    def __init__(self, model) -> None:
        self.model = model

    def __call__(self, *, input_ids, attention_mask, labels, use_cache, fused_lm_head):
        positions = (attention_mask.cumsum(-1) - 1) * attention_mask
        logps = self.model(input_ids[:, :-1], positions[:, :-1]).logps(input_ids[:, 1:]) * (labels[:, 1:] != -100)
        return SimpleNamespace(log_probs=logps, entropy=torch.zeros_like(logps), mean_logits=logps.detach())


@pytest.mark.parity
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_losses_are_trls(name, swap):
    pytest.importorskip("trl", reason="trl is not installed")
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer
    model, other = at_odds(swap)
    objective = KTO(policy=model, reference=other, **SETTINGS[name])
    batch = objective.prepare(whole())
    loss, metrics = objective.loss(model(batch.ids, batch.positions), batch)
    (loss / objective.count(batch)).backward()
    ours = gradients(model)
    model.zero_grad()
    examples = []
    for d, label in enumerate(LABELS):
        (ids, learned), (mixed, _) = rows().sides(d)
        prompt = int(learned.argmax())
        examples.append({"prompt_ids": ids[:prompt].tolist(), "completion_ids": ids[prompt:].tolist(),
                         "KL_completion_ids": mixed[prompt:].tolist(), "label": bool(label)})
    trainer = stub(calculate_KL=True, precompute_ref_logps=False, aux_loss_enabled=False, loss_type="kto",
                   beta=objective.beta, desirable_weight=objective.desirable, undesirable_weight=objective.undesirable,
                   ref_model=Theirs(other), args=SimpleNamespace(gradient_checkpointing_kwargs=None))
    trainer.model = torch.nn.Identity()                               # only asked about
    trainer.model.is_gradient_checkpointing = False
    trainer._compute_kl_logps = functools.partial(KTOTrainer._compute_kl_logps, trainer)
    inputs = DataCollatorForUnpairedPreference(pad_token_id=0)(examples)
    theirs = KTOTrainer._compute_loss(trainer, Theirs(model), inputs, False)
    theirs.backward()
    torch.testing.assert_close(loss / len(LABELS), theirs, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ours, gradients(model), rtol=1e-7, atol=1e-10)
    for mine, name in (("kl", "kl"), ("reward_desirable", "rewards/chosen"),
                       ("reward_undesirable", "rewards/rejected")):
        assert trainer._metrics["train"][name][0] == pytest.approx(metrics[mine].item() / len(LABELS), abs=1e-9)
