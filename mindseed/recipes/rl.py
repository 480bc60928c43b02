"""Reinforcement learning: the model answers, rewards judge, better answers become likelier.

  mindseed rl --model.start runs/demo/fine-tune/model --data.train runs/demo/world/problems.jsonl
  mindseed rl runs/chat/model --data.train gsm8k.jsonl --algorithm dapo --reward.form think-answer
  mindseed rl runs/chat/model --data.train problems.jsonl --algorithm ppo --policy.kl 0.05 --policy.kl_in reward
  mindseed rl runs/chat/model --data.train problems.jsonl --reward.function my_rewards.py:polite
  mindseed rl configs/grpo.toml --resume auto                        a preset; goes on where it stopped

Rows are problems ("question" or "messages", and "answer"), code with "tests", JSON with a "schema", or conversations
whose last answer is left out. Every term of the reward is logged by itself, so that it shows when one is gamed.
"""
from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mindseed.adapt.lora import base_of
from mindseed.base import dist
from mindseed.base.config import to_dict
from mindseed.base.errors import UserError
from mindseed.base.hardware import peak
from mindseed.base.log import check_sinks, say, table, warn
from mindseed.data.shuffle import key_of, shuffled
from mindseed.infer.engine import Engine, EngineConfig
from mindseed.interop.directory import Loaded, load_directory, save_directory
from mindseed.models.config import config_to_dict
from mindseed.models.describe import describe
from mindseed.models.heads import add_value_head, score
from mindseed.optim.groups import build_optimizers, group_table, parameter_groups
from mindseed.optim.schedule import learning_rate
from mindseed.parallel.mesh import make_mesh
from mindseed.parallel.parallelize import parallelize
from mindseed.recipes import adapter
from mindseed.recipes.launch import backend_of, check_ranks, gathers_in_bf16
from mindseed.recipes.machine import DTYPES, choose_precision
from mindseed.recipes.rl_options import RLOptions, advantage_of, derive, objective_of, without_effect
from mindseed.recipes.run_folder import alone_in_its_folder, carried_out, open_run, options_of_run, say_changes
from mindseed.rl import reward as terms
from mindseed.rl.critic import ActorCritic, critic_of
from mindseed.rl.env import Play, SingleTurn, ToolUse
from mindseed.rl.prompts import Prompt, Prompts, read_prompts
from mindseed.rl.reward import Judge, Sample
from mindseed.rl.rollout import Rollout, RolloutConfig
from mindseed.tasks.tools import TOOLS
from mindseed.tasks.verify import kind_of, require_gradable
from mindseed.train.balance import Balance
from mindseed.train.loop import Fit, Hook, fit
from mindseed.train.native import NativeBackend
from mindseed.train.state import Checkpoints, restore
from mindseed.train.step import Run

Options = RLOptions


def main(options: RLOptions) -> int:
    return carried_out(options, train)


def train(options: RLOptions, device: torch.device) -> Path:
    """The whole run; returns the model directory. Raises Interrupted when it was asked to stop."""
    return alone_in_its_folder(options, device, train_in)


def train_in(run_folder: Path, options: RLOptions, given: RLOptions, device: torch.device) -> Path:
    check_early(options)
    if dist.is_main():
        for line in without_effect(options):
            warn(line)
    check_ranks(options)
    mesh = make_mesh(options.parallel, device)
    options = derive(options)
    options = replace(options, loop=replace(options.loop, precision=choose_precision(options.loop.precision, device)))
    loaded = load_directory(options.model.start, device=device)
    model, policy = open_models(options, loaded, device)
    cover = adapter.adapt(policy, options.lora, options.seed)
    prompts, heldout = open_prompts(options, loaded)
    if dist.is_main():
        say_what(options, loaded, prompts, heldout)
        adapter.show(cover, options.lora)

    objective = objective_of(options)
    reference = reference_of(options, policy, device)
    parallelize(model, mesh, bf16=gathers_in_bf16(options, device))
    groups = parameter_groups(model, options.optim)
    backend = backend_of(options, model, objective, build_optimizers(groups, options.optim), mesh)
    for lm in {policy, getattr(model, "critic", policy)}:
        lm.recompute = options.loop.recompute
    rollout = options.rollout
    engine = Engine(policy, loaded.tokenizer, EngineConfig(max_seqs=max(64, rollout.answers), max_queue=1 << 20),
                    stop_ids=loaded.stop_ids or None)
    answers = rollout.prompts * rollout.answers // rollout.minibatches        # of a step, over all ranks
    source = Rollout(
        policy=policy, engine=engine, prompts=prompts, judge=judge_of(options, loaded, prompts.tail(), device),
        env=ToolUse(tools=TOOLS) if options.data.tools else SingleTurn(),
        play=Play(answers=rollout.answers, max_new=rollout.max_new, temperature=rollout.temperature,
                  turns=rollout.turns, stop=rollout.stop),
        config=RolloutConfig(prompts=rollout.prompts, epochs=rollout.epochs, minibatches=rollout.minibatches,
                             dynamic=rollout.dynamic, drop_cut=rollout.drop_cut, patience=rollout.patience),
        advantage=advantage_of(options), device=device, seed=options.seed,
        autocast=backend.autocast,
        accumulate=max(1, -(-answers // (options.loop.micro_batch * dist.world_size()))),
        reference=reference, critic=model if model is not policy else None,
        told=judged_by(options))
    run = Run(source, objective, backend, schedule=learning_rate(options.schedule, peak=options.optim.lr,
                                                                 steps=options.loop.steps),
              device=device, accumulate=source.accumulate, balance=Balance(policy), after_step=[source.report],
              around=backend.whole)
    checkpoints = Checkpoints(run_folder / "checkpoints", keep=options.loop.keep, fingerprints={
        "model": config_to_dict(policy.config), "tokenizer": loaded.tokenizer.hash(), "algorithm": options.algorithm,
        "optim.kind": options.optim.kind} | adapter.fingerprint(options.lora))
    resumed = None
    if options.resume != "never" and (newest := checkpoints.newest()) is not None:
        resumed, saved = newest
        restore(run, None, saved)
    else:
        torch.manual_seed(options.seed + 1_000_003 * dist.rank())
    if dist.is_main():
        table("optimisers", ["group", "optimiser", "tensors", "parameters", "decay", "rate x"],
              [list(row) for row in group_table(groups)])
        if resumed:
            say_changes(options, run_folder, run.step)
        say(f"going on from {resumed}" if resumed else f"writing to {run_folder}")
    fit(Fit(run=run, steps=options.loop.steps, checkpoints=checkpoints, save_every=options.loop.save_every,
            hooks=[Hook(every=options.loop.validate_every, call=measure(source, heldout, backend),
                        before_first=True),
                   Hook(every=options.loop.sample_every, call=lambda step: shown(source.samples))],
            sinks=open_run(options, given, resumed) if dist.is_main() else [], score="heldout/reward",
            highest=True,
            peak_flops=dist.world_size() * peak(device, DTYPES[options.loop.precision]).flops))
    return finish(options, loaded, policy, backend, run, run_folder)


# ----------------------------------------------------------------------------------------------------------- the parts

def check_early(options: RLOptions) -> None:
    """What would fail later fails now."""
    check_sinks(options.trackers)
    if not options.model.start:
        raise UserError("which model? mindseed rl DIRECTORY --data.train FILE, for example "
                        "mindseed rl runs/demo/fine-tune/model --data.train runs/demo/world/problems.jsonl")
    if not options.data.train:
        raise UserError("data.train is empty: name files of problems, e.g. --data.train runs/demo/world/problems.jsonl")
    if Path(options.model.start).resolve() == (Path(options.out) / "model").resolve():
        raise UserError(f"{options.model.start} would be written over by the model of this run; choose another --out")
    if bool(options.reward.model) != bool(options.model.reward):
        raise UserError("reward.model is the weight of the reward model, and model.reward names its directory: give "
                        "both or none of them")
    if options.reward.function:
        terms.load(options.reward.function)
    if not 0 <= options.data.share < 1 or options.data.limit < 1:
        raise UserError(f"data.share={options.data.share} must lie in [0, 1), and data.limit={options.data.limit} be "
                        "at least 1")
    if options.lora.dropout:
        raise UserError("lora.dropout has no place in reinforcement learning: the answers were drawn without it, so "
                        "the ratio would compare two models")


def open_models(options: RLOptions, loaded: Loaded, device: torch.device) -> tuple[torch.nn.Module, Any]:
    """(what learns, the policy in it): they are the same unless the critic is a model of its own."""
    policy = loaded.model
    policy.mtp.requires_grad_(False)              # no loss here looks further ahead
    if policy.value_head is not None:
        policy.value_head = None                  # a reward model's; as a policy it needs none
    if options.algorithm != "ppo":
        return policy.train(), policy
    if options.model.critic == "head":
        add_value_head(policy, seed=options.seed)
        return policy.train(), policy
    critic = critic_of(policy, seed=options.seed).to(device)
    if critic.head is not None:
        critic.head.requires_grad_(False)
    return ActorCritic(policy, critic).train(), policy


def reference_of(options: RLOptions, policy: Any, device: torch.device):
    """A frozen copy of what the run began with, or another model; None if nothing asks for it."""
    if not options.policy.kl:
        return None
    if options.lora.rank and not options.model.reference:
        return base_of(policy)
    if options.model.reference or options.resume != "never":
        reference = load_directory(options.model.reference or options.model.start, device=device).model
    else:
        reference = copy.deepcopy(policy)
    reference.value_head = None
    return reference.eval().requires_grad_(False)


def open_prompts(options: RLOptions, loaded: Loaded) -> tuple[Prompts, Prompts | None]:
    """What is learnt from, and what is measured on."""
    data, seq_len = options.data, loaded.model.config.seq_len
    rows = read_prompts(data.train, system=data.system)
    if data.heldout:
        heldout = read_prompts(data.heldout, system=data.system)
    else:
        order = shuffled(np.arange(len(rows)), len(rows), key_of(options.seed, 8))
        apart = {int(i) for i in order[:round(data.share * len(rows))]} if len(rows) > 1 else set()
        rows, heldout = [r for i, r in enumerate(rows) if i not in apart], [r for i, r in enumerate(rows) if i in apart]
    if data.plain and not options.rollout.stop and dist.is_main():
        warn("data.plain without rollout.stop: a base goes on after its answer until it ends a document")
    thinking = {"auto": None, "on": True, "off": False}[data.thinking]
    check_rows(options, [*rows, *heldout])

    def encoded(some: list[Prompt]) -> Prompts:
        return Prompts(some, loaded.tokenizer, seed=options.seed, template=loaded.template, thinking=thinking,
                       longest=seq_len - options.rollout.max_new, plain=data.plain)

    if len(heldout) > data.limit:                 # from the whole file, whose rows may be sorted by what they ask
        some = shuffled(np.arange(len(heldout)), len(heldout), key_of(options.seed, 9))[:data.limit]
        heldout = [heldout[i] for i in sorted(some)]
    return encoded(rows), encoded(heldout) if heldout else None


def check_rows(options: RLOptions, prompts: list[Prompt]) -> None:
    """UserError for a row that its grader could not grade, before anything is learnt."""
    r = options.reward
    if not (r.accuracy or r.format and r.form == "task"):
        return
    kind = None if r.task == "auto" else r.task
    for prompt in prompts:
        if kind is None and kind_of(prompt.row, prompt.name) == "code":
            raise UserError(f"{prompt.name} has tests, for which code that the model writes would be run, in a limited "
                            "process of its own but as this user: if you want that, say --reward.task code")
        require_gradable(prompt.row, kind, where=prompt.name)


def judge_of(options: RLOptions, loaded: Loaded, tail: list[int], device: torch.device) -> Judge:
    """The terms that have a weight. `tail` is what follows the end of a turn in a conversation as it is written out: a
    reward model has learnt to judge whole ones."""
    r, kind = options.reward, None if options.reward.task == "auto" else options.reward.task
    found = [terms.accuracy(r.accuracy, kind)] if r.accuracy else []
    if r.format:
        found.append(terms.task_format(r.format, kind) if r.form == "task" else
                     terms.thinking_format(r.format, tagged=r.form == "think-answer"))
    found += [terms.length(r.length, longest=options.rollout.max_new * options.rollout.turns)] if r.length else []
    found += [terms.repetition(r.repetition)] if r.repetition else []
    found += [terms.used_result(r.result)] if r.result else []
    if r.model:
        judge = load_directory(options.model.reward, device=device)
        if judge.model.value_head is None:
            raise UserError(f"{options.model.reward} is no reward model: it has no value head; train one with "
                            "`mindseed train --method reward`")
        if judge.tokenizer.hash() != loaded.tokenizer.hash():
            raise UserError(f"{options.model.reward} has another tokenizer than {options.model.start}, so it would "
                            "read other texts than those that were said")
        found.append(terms.model(r.model, lambda documents: score(
            judge.model, [[*ids, *tail] if ids[-1] in loaded.stop_ids else ids for ids in documents])))
    if r.function:
        found.append(terms.function(r.function_weight, r.function, timeout_s=r.timeout_s))
    return Judge(found)


def judged_by(options: RLOptions) -> dict[str, Any]:
    """What a reward and a divergence depend on, as a checkpoint holds it."""
    reward, code = to_dict(options.reward), options.reward.function.rpartition(":")[0]
    return {**reward, "code": Path(code).read_text(encoding="utf-8") if code else "", "judge": options.model.reward,
            "reference": options.policy.kl and (options.model.reference or options.model.start)}


def measure(source: Rollout, prompts: Prompts | None, backend: NativeBackend):
    """A hook: the likeliest answers to the prompts set apart, judged."""
    def call(step: int) -> dict[str, Any]:
        if prompts is None:
            return {}
        with backend.whole():
            return {f"heldout/{name}": value for name, value in source.measure(prompts).items()}

    return call


def shown(samples: list[Sample]) -> dict[str, str]:
    """The worst and the best answer of the last rollout with their rewards, to look at."""
    ranked = sorted(samples, key=lambda s: s.trajectory.reward)
    picked = ranked[:1] + [s for s in ranked[:0:-1] if s.text != ranked[0].text][:1]
    return {f"sample {i + 1}": f"{s.prompt.messages[-1]['content']} >>> {s.text}  [" + ", ".join(
        f"{name} {value:g}" for name, value in s.trajectory.terms.items()) + "]" for i, s in enumerate(picked)}


def say_what(options: RLOptions, loaded: Loaded, prompts: Prompts, heldout: Prompts | None) -> None:
    r, p = options.rollout, options.policy
    say(f"model      {options.model.start}: {describe(loaded.model.config)}")
    say(f"prompts    {len(prompts):,} to learn from, {len(heldout or ()):,} to measure on")
    say(f"rollout    {r.prompts} prompts x {r.answers} answers of up to {r.max_new} tokens at temperature "
        f"{r.temperature:g}, learnt from {r.epochs} time(s) in {r.minibatches} step(s)")
    if p.kl and p.kl_in == "loss" and p.kl_estimator == "k1":
        warn("in the loss k1 pulls nowhere: its gradient is 0 in the mean. Choose policy.kl_estimator k2 or k3, or "
             "policy.kl_in reward")
    if loaded.model.config.dropout:
        warn(f"the model was made with dropout {loaded.model.config.dropout:g}: answers are drawn without it and "
             "learnt from with it, so the ratio is not 1 where it should be")
    say(f"objective  {options.algorithm}: ratio of {p.level}, clipped to 1 - {p.clip_low:g} .. 1 + {p.clip_high:g}, "
        f"averaged over {p.average}" + (f", divergence x {p.kl:g} in the {p.kl_in}" if p.kl else ""))
    if options.reward.task == "code":
        warn("code that the model writes will be run, in a limited process of its own, but as this user")


def finish(options: RLOptions, loaded: Loaded, policy: Any, backend: NativeBackend, run: Run, folder: Path) -> Path:
    out = folder / "model"
    with backend.to_save() as whole:
        if whole is not None:
            policy = whole if policy is backend.model else whole.policy
            policy.eval()
            policy.value_head = None              # the critic's, of no use to whoever talks to the policy
            if options.lora.rank:
                adapter.hang_up(policy, folder, base=options.model.start, seed=options.seed)
            save_directory(policy, loaded.tokenizer, out, **loaded.kept, info={
                "parent": str(options.model.start), "data": list(options.data.train), "seed": options.seed,
                "steps": run.step, "algorithm": options.algorithm})
    dist.barrier()
    return out
