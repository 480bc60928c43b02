"""Rollouts: a Source of batches that the policy itself has written.

    prompts -> engine -> trajectories -> rewards -> advantages -> batches

So reinforcement learning is the same training step as ever, with another source. Whenever its batches are used up, the
source lets the policy, as it is by now, answer some prompts, has the answers judged, and cuts what comes of it into the
minibatches of the next steps. Groups whose rewards are all equal are left out, unless a critic says what was to be
expected (PPO), and the loss is the mean over what is left: a step does not shrink as the policy gets better. Those
groups feel no divergence either.

Every rank plays its share of the prompts and then knows all trajectories, which are small; so groups, means and
deviations are those of the whole batch, two ranks do what one does, and the state is the same everywhere: how many
prompts were drawn, and the trajectories that are still to be learnt from. A run resumes in the middle, exactly.
"""
from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Literal, Sequence

import numpy as np
import torch

from mindseed.base import dist
from mindseed.base.errors import UserError
from mindseed.base.log import warn
from mindseed.core import Batch
from mindseed.data.shuffle import key_of
from mindseed.infer.engine import Engine
from mindseed.infer.generate import evaluating
from mindseed.models.lm import LM
from mindseed.objectives.grpo import divergence
from mindseed.rl.advantages import Scale, degenerate, gae, group_advantages, leave_one_out, whitened
from mindseed.rl.env import Env, Play, play
from mindseed.rl.prompts import Prompts
from mindseed.rl.reward import Judge, Sample
from mindseed.rl.scores import Forward, logps_read, score, values_read
from mindseed.rl.trajectory import Trajectory, pack

Baseline = Literal["group", "leave-one-out", "critic"]


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    prompts: int = 16                             # answered before learning, over all ranks
    epochs: int = 1                               # times that each answer is learnt from
    minibatches: int = 1                          # optimiser steps that a rollout is cut into, per epoch
    dynamic: int = 1                              # at most so many times the prompts are drawn until groups differ
    drop_cut: bool = False                        # do not learn from answers that were cut at their longest
    patience: int = 20                            # rollouts in a row without a difference of rewards: the run stops

    def __post_init__(self) -> None:
        for name in ("prompts", "epochs", "minibatches", "dynamic", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(kw_only=True)
class Advantage:
    """How rewards become advantages. `kl` > 0 takes that much of the divergence from the reference out of the reward,
    at every token; `target_kl` > 0 lets it follow the divergence (Ziegler et al., 1909.08593)."""

    baseline: Baseline = "group"
    scale: Scale = "group"
    whiten: bool = False                          # advantages over the whole batch
    whiten_rewards: bool = False
    gamma: float = 1.0
    lam: float = 0.95
    kl: float = 0.0
    target_kl: float = 0.0
    horizon: float = 10_000.0                     # answers in which the coefficient may about double

    def adapt(self, divergence: float, answers: int) -> None:
        if self.target_kl:
            error = min(0.2, max(-0.2, divergence / self.target_kl - 1))
            self.kl *= 1 + error * answers / self.horizon


@dataclass(kw_only=True)
class Rollout:
    """The Source. `policy` is the model that learns; `reference` and `critic` answer what they think of trajectories,
    or are None. `accumulate` are the micro-batches of a step on each rank."""

    policy: LM
    engine: Engine
    prompts: Prompts
    judge: Judge
    env: Env
    play: Play
    config: RolloutConfig
    advantage: Advantage
    accumulate: int = 1
    reference: Forward | None = None
    critic: Forward | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext      # as the trainer computes
    before: Callable[[], None] | None = None      # brings the engine's weights up to date, if they are not the policy's
    seed: int = 0
    drawn: int = 0                                # prompts so far, over all ranks
    rounds: int = 0                               # rollouts so far
    told: Any = None                              # by what else answers are judged: if it changes, they are drawn anew
    barren: int = 0                               # rollouts in a row from which nothing could be learnt
    queue: list[list[Trajectory]] = field(default_factory=list)       # the minibatches to come
    dealt: int = 0                                # micro-batches of the first one that were handed out on this rank
    metrics: dict[str, float] = field(default_factory=dict)           # of the last rollout, until they are reported
    samples: list[Sample] = field(default_factory=list)               # of the last rollout on this rank

    def __post_init__(self) -> None:
        self.given_kl = self.advantage.kl         # which may be steered

    def __next__(self) -> Batch:
        while not self.queue:
            self.collect()
        parts = deal(self.queue[0], self.accumulate * dist.world_size())
        batch = pack(parts[self.dealt * dist.world_size() + dist.rank()], names=[*self.queue[0][0].figures])
        self.dealt += 1
        if self.dealt == self.accumulate:
            self.queue.pop(0)
            self.dealt = 0
        return batch

    def collect(self) -> None:
        """One rollout: play, judge, weigh, and cut into minibatches. Raises UserError when there has been nothing to
        learn from for too long."""
        began, before = time.monotonic(), self.barren
        self.metrics = {}                         # those of a rollout from which nothing was learnt
        with evaluating(self.critic or self.policy):              # of the two in one, the policy as well
            kept, all_ = self.groups()
            if kept:
                with self.autocast():             # or the first ratio would not be 1
                    self.weigh(kept)
            if self.config.drop_cut:              # only now: they belong to what the others are compared with
                kept = [t for t in kept if t.finish == "stop"]
            self.rounds += 1
            self.barren = 0 if kept else self.barren + 1
            if self.barren >= self.config.patience:
                raise UserError(hopeless(self.barren, all_, self.config.drop_cut))
        self.metrics = summary(all_, kept, self.play.answers) | self.metrics | {"barren": before}
        self.metrics["rollout_tokens_per_s"] = sum(t.length for t in all_) / (time.monotonic() - began)
        for epoch in range(self.config.epochs if kept else 0):
            order = np.random.default_rng(key_of(self.seed, 7, self.rounds, epoch)).permutation(len(kept))
            for part in np.array_split(order, min(self.config.minibatches, len(kept))):
                self.queue.append([kept[i] for i in part])

    def groups(self) -> tuple[list[Trajectory], list[Trajectory]]:
        """(trajectories to learn from, all that were played): prompts are drawn until enough of them tell something."""
        kept: list[Trajectory] = []
        all_: list[Trajectory] = []
        n = self.play.answers
        for _ in range(self.config.dynamic):
            numbers = range(self.drawn, self.drawn + self.config.prompts)
            played = self.play_all(numbers)
            self.drawn += len(numbers)            # only now: what could not be judged is asked again
            all_ += played
            for first in range(0, len(played), n):
                group = played[first:first + n]
                if self.advantage.baseline == "critic" or not same(group):
                    kept += group
            if len(kept) >= self.config.prompts * n:
                break
        return [t for t in kept[:self.config.prompts * n] if t.length], all_

    def play_all(self, numbers: Sequence[int]) -> list[Trajectory]:
        """Trajectories of all ranks, judged, in the order of the prompts."""
        if self.before:
            self.before()
        self.engine.update_weights(self.engine.model if self.before else self.policy)
        self.samples, trajectories = self.played(numbers, self.prompts, replace(self.play, seed=self.seed))
        return trajectories

    def played(self, numbers: Sequence[int], prompts: Prompts, how: Play) -> tuple[list[Sample], list[Trajectory]]:
        """(samples of this rank, trajectories of all ranks in the order of the prompts), judged."""
        mine = [number for number in numbers if number % dist.world_size() == dist.rank()]
        samples, error = [], None
        try:
            samples = play(self.engine, prompts, mine, self.env, how)
            self.judge(samples)
        except UserError as problem:              # on one rank alone it would leave the others waiting
            error = problem
        errors = [e for e in dist.gather(str(error) if error else None) if e]
        if errors:
            raise UserError(errors[0])
        for sample in samples:
            sample.trajectory.version = self.rounds
        found = dist.gather([sample.trajectory.state() for sample in samples])
        trajectories = [Trajectory.of(state) for part in found for state in part]
        return samples, sorted(trajectories, key=lambda t: t.prompt)      # stable: answers stay in their order

    def measure(self, prompts: Prompts) -> dict[str, float]:
        """Means of the rewards of the likeliest episodes, one to a prompt, played as those that are learnt from."""
        self.engine.update_weights(self.engine.model)
        with evaluating(self.policy):
            found = self.played(range(len(prompts)), prompts, replace(self.play, answers=1, temperature=0.0))[1]
        terms = [t.terms | {"reward": t.reward} for t in found]
        return {name: float(np.mean([t[name] for t in terms])) for name in terms[0]}

    def weigh(self, kept: list[Trajectory]) -> None:
        """Put what the objective reads beside every trajectory."""
        several = self.config.epochs * min(self.config.minibatches, len(kept)) > 1
        a, logps = self.advantage, logps_read(self.play.temperature)
        if several or a.kl or a.baseline == "critic":
            self.fill(kept, "old_logps", self.policy, logps)
        if self.reference is not None:
            self.fill(kept, "reference", self.reference, logps)
        if a.baseline == "critic":
            self.fill(kept, "old_values", self.critic or self.policy, values_read)
        kl = [divergence_of(t) for t in kept] if a.kl else []
        if a.baseline == "critic":
            self.estimate(kept, kl)
        else:
            self.compare(kept, kl)
        if kl:
            mean = float(np.mean([k.sum() for k in kl]))
            self.metrics |= {"kl_answer": mean, "kl_weight": a.kl}
            a.adapt(mean, len(kept))

    def compare(self, kept: list[Trajectory], kl: list[np.ndarray]) -> None:
        """Advantages from the other answers to the same prompt."""
        a = self.advantage
        by_prompt: dict[int, list[int]] = {}
        for i, t in enumerate(kept):
            by_prompt.setdefault(t.prompt, []).append(i)
        rewards = np.array([t.reward for t in kept]) - (a.kl * np.array([k.sum() for k in kl]) if kl else 0)
        spread = float(np.std(rewards, ddof=1)) if len(rewards) > 1 else 0.0
        for group in by_prompt.values():
            some = torch.from_numpy(rewards[group])[None]             # (1, n)
            if len(group) == 1:
                found = torch.zeros(1, 1)
            elif a.baseline == "leave-one-out":
                found = leave_one_out(some)
            else:
                found = group_advantages(some, scale=a.scale if a.scale != "batch" else "off")
                found = found / (spread + 1e-4) if a.scale == "batch" else found
            for i, value in zip(group, found[0].tolist()):
                kept[i].put("advantages", value)
        if a.whiten:
            self.whiten(kept)

    def estimate(self, kept: list[Trajectory], kl: list[np.ndarray]) -> None:
        """Advantages and returns by what the critic expected, token by token."""
        a, width = self.advantage, max(t.length for t in kept)
        rewards, values, mask = (torch.zeros(len(kept), width, dtype=torch.float64) for _ in range(3))
        given = np.array([t.reward for t in kept])
        if a.whiten_rewards and len(kept) > 1:
            given = given / (given.std(ddof=1) + 1e-8)
        for i, t in enumerate(kept):
            own = np.array(t.mine, bool)
            mask[i, :t.length] = 1
            values[i, :t.length] = torch.from_numpy(t.figures["old_values"][own])
            if kl:
                rewards[i, :t.length] -= a.kl * torch.from_numpy(kl[i])
            rewards[i, t.length - 1] += given[i]
        advantages, returns = gae(rewards, values, mask, gamma=a.gamma, lam=a.lam)
        if a.whiten:
            advantages = whitened(advantages, mask)
        for i, t in enumerate(kept):
            t.put("advantages", advantages[i, :t.length].numpy())
            t.put("returns", returns[i, :t.length].numpy())
        explained = 1 - float((returns - values)[mask.bool()].var() / returns[mask.bool()].var().clamp_min(1e-8))
        self.metrics |= {"value_explained": explained}

    def whiten(self, kept: list[Trajectory]) -> None:
        width = max(t.length for t in kept)
        values, mask = torch.zeros(len(kept), width), torch.zeros(len(kept), width)
        for i, t in enumerate(kept):
            mask[i, :t.length] = 1
            values[i, :t.length] = torch.from_numpy(t.figures["advantages"][np.array(t.mine, bool)])
        for i, (t, row) in enumerate(zip(kept, whitened(values, mask))):
            t.put("advantages", row[:t.length].numpy())

    def fill(self, kept: list[Trajectory], name: str, forward: Forward, read: Any) -> None:
        """What a model thinks of every trajectory, each rank a share of them."""
        mine = kept[dist.rank()::dist.world_size()]
        found = dist.gather(score(forward, mine, read, device=self.device))
        for rank, values in enumerate(found):
            for t, one in zip(kept[rank::dist.world_size()], values):
                t.figures[name] = one

    def report(self) -> dict[str, float]:
        """The figures of the last rollout, once: for the log of the step that follows it."""
        metrics, self.metrics = self.metrics, {}
        return metrics

    # ------------------------------------------------------------------------------------------------ going on later

    def state_dict(self) -> dict[str, Any]:
        assert not self.dealt, "a checkpoint lies between two steps"
        return {"drawn": self.drawn, "rounds": self.rounds, "barren": self.barren, "kl": self.advantage.kl,
                "figures": self.figures(), "queue": [[t.state() for t in part] for part in self.queue],
                "stream": self.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        was, here = state["stream"], self.identity()
        if was != here:
            keys = [key for key in here if was.get(key) != here[key]]
            raise UserError("the checkpoint was made on other prompts: " + "; ".join(
                f"{key} was {was.get(key)}, is {here[key]}" for key in keys)
                + ". Resume with the same ones, or start a new run from the checkpoint's model")
        self.drawn, self.rounds, self.barren = state["drawn"], state["rounds"], state["barren"]
        self.queue, self.dealt = [], 0
        if state["figures"] == self.figures():
            self.advantage.kl = state["kl"]
            self.queue = [[Trajectory.of(t) for t in part] for part in state["queue"]]
        elif state["queue"] and dist.is_main():
            warn("how answers are drawn or weighed has changed, so those that were drawn and not learnt from yet are "
                 "thrown away")

    def figures(self) -> dict[str, Any]:
        """By what the answers that wait were drawn and weighed."""
        return {**vars(self.advantage), "kl": self.given_kl, **vars(replace(self.play, seed=0)),
                "reference": self.reference is not None, "told": self.told}

    def identity(self) -> dict[str, Any]:
        return {"prompts": len(self.prompts), "seed": self.seed, "digest": self.prompts.digest()}


def deal(trajectories: list[Trajectory], parts: int) -> list[list[Trajectory]]:
    """A minibatch in so many micro-batches of like lengths; some are empty if there are too few."""
    order = sorted(trajectories, key=lambda t: -len(t.ids))
    return [[order[i] for i in part] for part in np.array_split(np.arange(len(order)), parts)]


def same(group: list[Trajectory]) -> bool:
    """Whether nothing can be learnt from a group: all rewards are equal."""
    return bool(degenerate(torch.tensor([[t.reward for t in group]]))[0])


def divergence_of(t: Trajectory) -> np.ndarray:
    """log p - log p of the reference, at every id of the policy's own."""
    own = np.array(t.mine, bool)
    old, reference = (torch.from_numpy(t.figures[name][own]) for name in ("old_logps", "reference"))
    return divergence(old, reference, "k1").numpy()


def summary(all_: list[Trajectory], kept: list[Trajectory], n: int) -> dict[str, float]:
    """What is logged of a rollout."""
    groups = [all_[i:i + n] for i in range(0, len(all_), n)]
    terms = {f"reward/{name}": float(np.mean([t.terms[name] for t in all_])) for name in all_[0].terms}
    return {"reward": float(np.mean([t.reward for t in all_])), **terms,
            "group_deviation": float(np.mean([np.std([t.reward for t in group]) for group in groups])),
            "degenerate": float(np.mean([same(group) for group in groups])) if n > 1 else 0.0,
            "length": float(np.mean([t.length for t in all_])), "length_max": float(max(t.length for t in all_)),
            "cut": float(np.mean([t.finish != "stop" for t in all_])), "prompts": float(len(groups)),
            "learnt_from": float(len(kept))}


def hopeless(rounds: int, all_: list[Trajectory], drop_cut: bool) -> str:
    """Why nothing can be learnt, and what to do."""
    if drop_cut and all(t.finish != "stop" for t in all_):
        return (f"in {rounds} rollouts in a row there was nothing to learn from; of the last one every answer was cut "
                "at its longest, and cut answers are left out (rollout.drop_cut): raise rollout.max_new, or leave "
                "that option away")
    mean = float(np.mean([t.reward for t in all_]))
    best = max(t.reward for t in all_)
    advice = ("every answer gets the same reward, and it may be that none is right: fine-tune on some examples first, "
              "take easier prompts, or add a term that tells better from worse answers (reward.format)"
              if best <= 0 or mean < best / 2 else
              "every answer is as good as the others: the prompts are too easy by now; take harder ones, or stop here")
    return (f"in {rounds} rollouts in a row no two answers to a prompt had different rewards (mean {mean:.3g}), so "
            f"there is nothing to learn from. Most likely {advice}. More answers to a prompt (rollout.answers), a "
            "higher rollout.temperature or rollout.dynamic above 1 help when it is only rare.")
