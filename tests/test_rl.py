"""Reinforcement learning: rollouts are what the engine drew, every algorithm finds a bandit's best arm, two ranks
do what one does, and a run stopped in the middle goes on to the bit."""
from __future__ import annotations

import contextlib
import io
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from mindseed.base.errors import UserError
from mindseed.infer.engine import Engine, EngineConfig
from mindseed.models.heads import add_value_head
from mindseed.models.lm import build
from mindseed.objectives.grpo import GRPO
from mindseed.optim.groups import OptimConfig, build_optimizers, parameter_groups
from mindseed.recipes.rl_options import ALGORITHMS, RLOptions, SamplingOptions, advantage_of, derive, objective_of
from mindseed.rl.advantages import degenerate, gae, group_advantages, leave_one_out, whitened
from mindseed.rl.critic import ActorCritic, critic_of
from mindseed.rl.env import Play, SingleTurn
from mindseed.rl.prompts import Prompt
from mindseed.rl.reward import Judge, Term, each, function, repetition
from mindseed.rl.rollout import Advantage, Rollout, RolloutConfig
from mindseed.rl.scores import logps_read, score
from mindseed.rl.trajectory import Trajectory, pack, unpack
from mindseed.train.native import NativeBackend
from mindseed.train.step import Run, train_step
from tests.tiny import kit, randomise

ARMS = 8


@dataclass
class Fixed:
    """Prompts that are ids, without text: what `Prompts` is to a rollout."""

    ids: list[list[int]]
    thinking = None

    def at(self, number: int) -> tuple[Prompt, list[int]]:
        i = number % len(self.ids)
        return Prompt(messages=[{"role": "user", "content": str(i)}], row={"best": i}), self.ids[i]

    def __len__(self) -> int:
        return len(self.ids)

    def digest(self) -> str:
        return repr(self.ids)


def bandit(seed: int = 0):
    """Three prompts, two tokens each; the best arms are 3, 4, 5, then 5, 6, 7: each gives half of the reward."""
    model = build(kit("gqa", vocab_size=ARMS), seed=seed)
    prompts = Fixed([[1, 2], [2, 1, 1], [3]])

    def pay(sample) -> float:
        first, second = sample.trajectory.ids[-2:]
        best = sample.prompt.row["best"]
        return 0.5 * (first == 3 + best) + 0.5 * (second == 5 + best)

    return model, prompts, Judge([Term(name="pay", weight=1.0, call=each(pay))])


def rollout(model, prompts, judge, config: RolloutConfig, advantage: Advantage, play: Play, **more) -> Rollout:
    policy = more.pop("policy", model)
    return Rollout(policy=policy, engine=Engine(policy, None, EngineConfig(max_seqs=32), stop_ids=()), prompts=prompts,
                   judge=judge, env=SingleTurn(), play=play, config=config, advantage=advantage, **more)


def learner(options: RLOptions, *, critic: str = "head", accumulate: int = 1, seed: int = 0, lr: float = 5e-3,
            precision: str = "fp32") -> Run:
    """A run on the bandit as the recipe would build it."""
    options = derive(options)
    model, prompts, judge = bandit()
    policy = model
    if options.algorithm == "ppo":
        model = add_value_head(model) if critic == "head" else ActorCritic(policy, critic_of(policy, seed=1))
    reference = build(policy.config, seed=0).eval() if options.policy.kl else None
    r = options.rollout
    source = rollout(model, prompts, judge, RolloutConfig(prompts=r.prompts, epochs=r.epochs,
                                                                 minibatches=r.minibatches), advantage_of(options),
                     Play(answers=r.answers, max_new=2, temperature=r.temperature), policy=policy, seed=seed,
                     accumulate=accumulate, reference=reference, critic=model if model is not policy else None)
    optim = OptimConfig(kind="adamw", weight_decay=0.0)
    objective = objective_of(options)
    backend = NativeBackend(model.train(), objective, build_optimizers(parameter_groups(model, optim), optim),
                            precision=precision)
    source.autocast = backend.autocast
    return Run(source, objective, backend, schedule=lambda step: lr, accumulate=accumulate, after_step=[source.report])


def options_for(algorithm: str, **more) -> RLOptions:
    answers = {"prompts": 48, "answers": 1} if algorithm == "ppo" else {"prompts": 6, "answers": 8}
    return RLOptions(algorithm=algorithm, rollout=SamplingOptions(max_new=2, **answers | more))


@torch.no_grad()
def chance_of_best(run: Run) -> float:
    """The probability that the policy pulls the best arms, over the three prompts."""
    policy, prompts, total = run.source.policy, run.source.prompts, 0.0
    for i, ids in enumerate(prompts.ids):
        x = torch.tensor([[*ids, 3 + i]])
        p = policy(x, torch.arange(x.shape[1])[None]).logits().softmax(-1)[0]
        total += float(p[-2, 3 + i] * p[-1, 5 + i]) / len(prompts.ids)
    return total


# ------------------------------------------------------------------------------------------------------- it is learnt

def learnt(run: Run, steps: int = 150) -> bool:
    """Whether the best arms are pulled nearly always after so many steps, or before."""
    for step in range(steps):
        train_step(run)
        if step % 10 == 9 and chance_of_best(run) > 0.9:
            return True
    return False


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_finds_the_best_arms(algorithm):
    run = learner(options_for(algorithm))
    assert chance_of_best(run) < 0.1
    assert learnt(run)


def test_a_critic_of_its_own():
    run = learner(options_for("ppo"), critic="model")
    before = train_step(run)["value_error"]
    assert learnt(run)
    assert train_step(run)["value_error"] < 0.5 * before


@pytest.mark.parametrize("where", ["loss", "reward"])
def test_a_divergence_keeps_the_policy_near_its_reference(where):
    def after(kl: float) -> float:
        options = options_for("grpo")
        run = learner(replace(options, policy=replace(options.policy, kl=kl, kl_in=where)))
        for _ in range(60):
            train_step(run)
        return chance_of_best(run)

    assert after(3.0) < 0.5 < 0.9 < after(0.001)


# ------------------------------------------------------------------------------------- the engine's words are the ones

@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_ratio_begins_at_one_with_the_engines_own_figures(algorithm, temperature):
    """The log-probabilities that the engine reports stand in for the trainer's."""
    run = learner(options_for(algorithm, temperature=temperature))
    randomise(run.source.policy, 3)
    run.source.collect()
    for part in run.source.queue:
        for t in part:
            t.figures["old_logps"] = t.figures["sampled_logps"]
    metrics = train_step(run)
    assert abs(metrics["ratio"] - 1) < 1e-4 and metrics["clipped"] == 0
    assert metrics["engine_gap"] < 1e-6           # they are the same by now


def test_the_ratio_begins_at_one_in_bf16_too():
    """What is compared with was computed as the loss computes."""
    def first(blind: bool) -> float:
        run = learner(options_for("grpo"), precision="bf16")
        randomise(run.source.policy, 3)
        if blind:
            run.source.autocast = contextlib.nullcontext
        return train_step(run)["kl_old"]

    assert first(blind=False) < 1e-9 < 1e-6 < first(blind=True)


def test_engine_and_trainer_agree_and_a_wrong_temperature_shows():
    model, prompts, judge = bandit()
    source = rollout(model, prompts, judge, RolloutConfig(prompts=6), Advantage(), Play(max_new=2, temperature=0.7))
    randomise(model, 1)
    source.collect()
    some = [t for part in source.queue for t in part]
    for temperature, agree in ((0.7, True), (1.0, False)):
        found = score(model, some, logps_read(temperature))
        gap = max(float(np.abs(one - t.figures["sampled_logps"]).max()) for one, t in zip(found, some))
        assert (gap < 1e-5) == agree


def test_only_what_the_policy_said_counts():
    t = Trajectory(ids=[5, 6, 7, 1, 2, 3], mine=[False, True, True, False, False, True])
    t.put("advantages", [1.0, 2.0, 3.0])
    batch = pack([t])
    assert batch.targets[0, :5].tolist() == [6, 7, 1, 2, 3]
    assert batch.weights[0].tolist() == [1, 1, 0, 0, 1, 0, 0, 0]
    assert batch.extra["advantages"][0, :5].tolist() == [1, 2, 0, 0, 3]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.integers(0, 99))
def test_packing_loses_nothing(lengths, seed):
    random = np.random.default_rng(seed)
    some = []
    for n in lengths:
        t = Trajectory(ids=random.integers(0, 50, n).tolist(), mine=[False, *(random.random(n - 1) < 0.6).tolist()])
        t.put("figure", random.normal(size=t.length))
        some.append(t)
    batch = pack(some)
    assert int((batch.weights != 0).sum()) == sum(t.length for t in some)
    assert batch.ids.shape[1] % 8 == 0 and batch.ids.shape[1] < max(lengths) + 8
    for t, back in zip(some, unpack(batch.extra["figure"], some)):
        np.testing.assert_array_equal(back, t.figures["figure"])
    for row in range(len(batch.ids)):             # positions restart at each, and only there
        steps = batch.positions[row, 1:] - batch.positions[row, :-1]
        assert ((steps == 1) | (batch.positions[row, 1:] == 0)).all()


def test_scores_do_not_depend_on_the_batch():
    model, *_ = bandit()
    randomise(model, 2)
    random = np.random.default_rng(0)
    some = [Trajectory(ids=random.integers(0, ARMS, n).tolist(), mine=[False] + [True] * (n - 1))
            for n in (4, 9, 3, 17, 12)]
    together = score(model, some, logps_read(0.8), slots=40)
    for t, one in zip(some, together):
        logits = model(torch.tensor([t.ids]), torch.arange(len(t.ids))[None]).logits()[0, :-1] / 0.8
        alone = logits.log_softmax(-1).gather(-1, torch.tensor(t.ids[1:])[:, None])[:, 0]
        np.testing.assert_allclose(one[1:], alone.detach().numpy(), atol=1e-5)


# ----------------------------------------------------------------------------------------------------- going on, ranks

@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_resumed_in_the_middle_of_a_rollout_to_the_bit(algorithm):
    def weights(run: Run) -> list[torch.Tensor]:
        return [p.detach().clone() for p in run.backend.params]

    whole, first, second = (learner(options_for(algorithm, minibatches=3)) for _ in range(3))
    for _ in range(8):
        train_step(whole)
    for _ in range(4):                            # a rollout is three steps: this is in the second one
        train_step(first)
    assert first.source.queue
    state = {"model": first.backend.model.state_dict(), "backend": first.backend.state_dict(),
             "source": first.source.state_dict()}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second.backend.model.load_state_dict(saved["model"])
    second.backend.load_state_dict(saved["backend"])
    second.source.load_state_dict(saved["source"])
    for _ in range(4):
        train_step(second)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second)))


def test_accumulating_changes_nothing():
    one, four = learner(options_for("grpo")), learner(options_for("grpo"), accumulate=4)
    for _ in range(3):
        a, b = train_step(one), train_step(four)
        assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-4)
        assert math.isclose(a["loss"], b["loss"], abs_tol=1e-5)


def test_other_prompts_are_refused_on_resuming():
    run = learner(options_for("grpo"))
    state = run.source.state_dict()
    run.source.prompts = Fixed([[1], [2], [3]])
    with pytest.raises(UserError, match="other prompts"):
        run.source.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------------- advantages

def test_groups_and_leave_one_out():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    found = group_advantages(rewards)
    assert torch.allclose(found[0], torch.tensor([1.0, -1.0, -1.0, 1.0]) * 0.5 / (rewards[0].std() + 1e-4))
    assert (found[1] == 0).all() and degenerate(rewards).tolist() == [False, True]
    assert torch.allclose(group_advantages(rewards, scale="off")[0], torch.tensor([0.5, -0.5, -0.5, 0.5]))
    for i in range(4):
        others = torch.cat([rewards[0, :i], rewards[0, i + 1:]]).mean()
        assert torch.isclose(leave_one_out(rewards)[0, i], rewards[0, i] - others)


def test_gae_is_the_sum_of_discounted_surprises():
    torch.manual_seed(1)
    rewards, values = torch.randn(3, 7).double(), torch.randn(3, 7).double()
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0, 1, 1, 0, 0, 1, 1]])
    gamma, lam = 0.9, 0.8
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row in range(3):
        at = mask[row].nonzero()[:, 0].tolist()
        deltas = [rewards[row, t] + gamma * (values[row, at[i + 1]] if i + 1 < len(at) else 0) - values[row, t]
                  for i, t in enumerate(at)]
        for i, t in enumerate(at):
            wanted = sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(at)))
            assert torch.isclose(advantages[row, t], wanted) and torch.isclose(returns[row, t], wanted + values[row, t])
        assert (advantages[row][mask[row] == 0] == 0).all()


def test_whitened():
    x, mask = torch.randn(4, 9).double() * 3 + 5, torch.rand(4, 9) < 0.7
    y = whitened(x, mask)[mask]
    assert abs(y.mean()) < 1e-9 and abs(y.std() - 1) < 1e-6
    kept = whitened(x, mask, shift=False)[mask]
    assert torch.allclose(kept.mean(), x[mask].mean())


def test_the_weight_of_the_divergence_follows_it():
    a = Advantage(kl=0.1, target_kl=6.0, horizon=100)
    a.adapt(12.0, 10)
    assert math.isclose(a.kl, 0.1 * 1.02)         # the error is clipped at 0.2
    a.adapt(0.0, 10)
    assert math.isclose(a.kl, 0.1 * 1.02 * 0.98)


# -------------------------------------------------------------------------------------------------- what users do wrong

def test_no_difference_between_rewards_stops_with_advice():
    model, prompts, _ = bandit()
    source = rollout(model, prompts, Judge([Term(name="flat", weight=1.0, call=each(lambda s: 0.0))]),
                     RolloutConfig(prompts=2, patience=3), Advantage(), Play(max_new=2, answers=4))
    with pytest.raises(UserError, match="in 3 rollouts in a row no two answers"):
        next(source)


def test_a_step_reports_the_rollout_that_it_learns_from():
    model, prompts, judge = bandit()
    pay, calls = judge.terms[0].call, []

    def at_first_nothing(samples):
        calls.append(len(samples))
        return pay(samples) if len(calls) > 2 else [0.0] * len(samples)

    source = rollout(model, prompts, Judge([Term(name="pay", weight=1.0, call=at_first_nothing)]),
                     RolloutConfig(prompts=3), Advantage(), Play(max_new=2, answers=8))
    next(source)
    told = source.report()
    assert told["barren"] == 2 and told["degenerate"] < 1 and told["learnt_from"] > 0 and told["reward"] > 0


def test_dynamic_sampling_draws_until_groups_differ():
    model, prompts, _ = bandit()
    judge = Judge([Term(name="pay", weight=1.0, call=each(
        lambda s: float(s.prompt.row["best"] == 1 and s.trajectory.ids[-1] % 2)))])       # one prompt in three tells
    config = RolloutConfig(prompts=3, dynamic=4)
    source = rollout(model, prompts, judge, config, Advantage(), Play(max_new=2, answers=8))
    source.collect()
    assert source.drawn == 9 and source.metrics["learnt_from"] == 24 and source.metrics["degenerate"] > 0.6


REWARDS = """
import time
def fine(row, answer): return True
def raises(row, answer): raise KeyError("colour")
def slow(row, answer): time.sleep(30)
def nan(row, answer): return float("nan")
def text(row, answer): return "good"
"""


@pytest.mark.parametrize("name, says", [
    ("raises", "raised KeyError: 'colour'"), ("slow", "has not answered within 0.2 s"), ("nan", "no finite number"),
    ("text", "'good', which is no number")])
def test_a_bad_reward_names_itself_and_the_sample(tmp_path, name, says):
    file = tmp_path / "mine.py"
    file.write_text(REWARDS)
    model, prompts, _ = bandit()
    judge = Judge([function(1.0, f"{file}:{name}", timeout_s=0.2)])
    source = rollout(model, prompts, judge, RolloutConfig(prompts=1), Advantage(), Play(max_new=2, answers=2))
    with pytest.raises(UserError) as error:
        next(source)
    assert says in str(error.value) and repr(name) in str(error.value) and "for the answer" in str(error.value)
    assert source.drawn == 0                       # these prompts are asked again by a run that goes on
    assert function(1.0, f"{file}:fine", timeout_s=1.0).call([]) == []


def test_reward_functions_that_are_not_there(tmp_path):
    (tmp_path / "mine.py").write_text(REWARDS)
    for where, says in ((f"{tmp_path}/mine.py:nice", "has no function 'nice'"), ("nowhere.py:x", "does not exist"),
                        ("nonsense", "is not FILE.py:NAME")):
        with pytest.raises(UserError, match=says):
            function(1.0, where, timeout_s=1.0)


def test_repetition():
    def of(ids: list[int]) -> float:
        from mindseed.rl.reward import Sample
        t = Trajectory(ids=[9, *ids], mine=[False] + [True] * len(ids))
        return repetition(1.0).call([Sample(prompt=Prompt(messages=[]), trajectory=t, texts=[""])])[0]

    assert of(list(range(12))) == 0 and of([1] * 12) == -(1 - 1 / 9) and of([1, 2]) == 0


@pytest.mark.parametrize("given, says", [
    (RLOptions(rollout=SamplingOptions(answers=1)), "must be at least 2"),
    (RLOptions(rollout=SamplingOptions(temperature=0.0)), "greedy answers")])
def test_options_that_do_not_go_together(given, says):
    with pytest.raises(UserError, match=says):
        derive(given)


def test_settings_of_the_algorithms():
    assert objective_of(derive(RLOptions())) == GRPO()
    dapo = derive(RLOptions(algorithm="dapo"))
    assert objective_of(dapo).clip_high == 0.28 and dapo.rollout.dynamic == 3 and dapo.reward.length == 1.0
    assert advantage_of(derive(RLOptions(algorithm="rloo"))).baseline == "leave-one-out"
    given = RLOptions(algorithm="gspo", policy=replace(RLOptions().policy, clip_low=0.1))
    assert objective_of(derive(given)).clip_low == 0.1 and objective_of(derive(given)).clip_high == 4e-4
