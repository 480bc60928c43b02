"""The options of reinforcement learning, and what each algorithm makes of those that are left open.

An algorithm is a row of settings of one objective and one source (objectives/grpo.py, rl/rollout.py). What is given on
the command line holds; the rest comes from the row.
"""
from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from mindseed.base.config import diff, option
from mindseed.base.errors import UserError
from mindseed.base.mesh import ParallelOptions
from mindseed.nn.recompute import Recompute
from mindseed.objectives.grpo import GRPO, Average, Estimator, Level
from mindseed.objectives.ppo import PPO
from mindseed.optim.groups import OptimConfig
from mindseed.optim.schedule import ScheduleConfig
from mindseed.recipes.options import PrecisionChoice, Resume, idle_optim
from mindseed.recipes.post_options import LoRAOptions
from mindseed.rl.advantages import Scale
from mindseed.rl.rollout import Advantage, Baseline, RolloutConfig

Algorithm = Literal["grpo", "dapo", "dr-grpo", "gspo", "cispo", "rloo", "ppo"]

ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dapo": {"clip_high": 0.28, "average": "tokens", "dynamic": 3, "length": 1.0},
    "dr-grpo": {"average": "constant", "scale": "off"},
    "gspo": {"level": "mean", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"weight_only": True, "clip_high": 4.0, "clip_low": 1.0, "average": "tokens"},
    "rloo": {"level": "product", "baseline": "leave-one-out", "scale": "off"},
    "ppo": {"average": "tokens", "baseline": "critic", "whiten": True, "answers": 1, "prompts": 128, "epochs": 2}}
USUAL: dict[str, Any] = {
    "clip_low": 0.2, "clip_high": 0.2, "level": "token", "average": "answers", "weight_only": False,
    "baseline": "group", "scale": "group", "whiten": False, "prompts": 16, "answers": 8, "epochs": 1,
    "minibatches": 2, "dynamic": 1, "length": 0.0}


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    start: str | None = option(None, help="the model directory to begin with: a fine-tuned one, or a base model",
                               positional=True, elsewhere=("model_name_or_path", "load_from", "from_weight"))
    reference: str | None = option(None, help="the model directory that the divergence is taken from [model.start]")
    critic: Literal["head", "model"] = option("head", help="PPO: the critic is a head on the policy, or a model of "
                                                     "its own")
    reward: str | None = option(None, help="model directory of a reward model, for reward.model")


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    train: tuple[str, ...] = option((), help="files of problems or conversations (jsonl, gz, zst, parquet)",
                                    elsewhere=("data_path", "dataset", "train_file"))
    heldout: tuple[str, ...] = option((), help="files of problems to measure on, not learnt from [a share of "
                                                "data.train]")
    share: float = option(0.05, help="share of the prompts set apart for measuring, if data.heldout is empty")
    limit: int = option(200, help="prompts measured on, at most, drawn from all that are held out")
    system: str = option("", help="system message put before every prompt")
    plain: str = option("", help="text with {question} in it in place of the chat template, for a base model, such as "
                                 "'{question}' or 'Q: {question} A:'")
    thinking: Literal["auto", "on", "off"] = option(
        "auto", help="on: every answer begins with a <think> block; off: with an empty one; auto: as the model likes")
    tools: bool = option(False, help="carry out calls of the built-in tools and let the model read the results")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    prompts: int | None = option(None, help="prompts answered before learning, over all ranks [16; ppo 128]")
    answers: int | None = option(None, help="answers to each, which are compared [8; ppo 1]",
                                 elsewhere=("num_generations",))
    max_new: int = option(256, help="longest answer (or turn), in tokens",
                          elsewhere=("max_gen_len", "max_completion_length"))
    temperature: float = option(1.0, help="of sampling; the loss is that of the distribution at this temperature")
    stop: tuple[str, ...] = option((), help="texts that end an answer and are no part of it, such as the end of a line "
                                            "(\\n) for a base model (data.plain)")
    turns: int | None = option(None, help="turns of an episode, at most [1; with data.tools 4]")
    epochs: int | None = option(None, help="times that each answer is learnt from [1; ppo 2]",
                                elsewhere=("num_iterations", "num_ppo_epochs"))
    minibatches: int | None = option(None, help="optimiser steps that a rollout is cut into, per epoch [2]")
    dynamic: int | None = option(None, help="draw up to this many times the prompts until enough groups differ in "
                                            "their rewards [1; dapo 3]")
    drop_cut: bool = option(False, help="do not learn from answers that were cut at their longest")
    patience: int = option(20, help="rollouts without any difference of rewards after which the run stops with advice")


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    accuracy: float = option(1.0, help="weight of being right, as the row's own grader says")
    task: Literal["auto", "toy", "number", "text", "code", "schema"] = option(
        "auto", help="how rows are graded [by what they hold]; code runs what the model wrote in a limited process")
    format: float = option(0.1, help="weight of the form of an answer")
    form: Literal["task", "think", "think-answer"] = option(
        "task", help="the form: what the task asks for; a <think> block, then the answer; the same with <answer> tags")
    length: float | None = option(None, help="weight of a penalty on the last quarter of the longest answer "
                                             "allowed [0; dapo 1]")
    repetition: float = option(0.0, help="weight of a penalty on repeated 4-grams")
    result: float = option(0.0, help="weight of saying what the tools gave back (data.tools)")
    model: float = option(0.0, help="weight of the reward model (model.reward)")
    function: str = option("", help="a function of yours: FILE.py:NAME, called with (row, answer), gives a number")
    function_weight: float = option(1.0, help="its weight")
    timeout_s: float = option(10.0, help="seconds that a call of it may take")


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    clip_low: float | None = option(None, help="the ratio is clipped below 1 minus this [0.2; gspo 3e-4]")
    clip_high: float | None = option(None, help="and above 1 plus this [0.2; dapo 0.28; gspo 4e-4; cispo 4]",
                                     elsewhere=("epsilon", "cliprange"))
    level: Level | None = option(None, help="ratio of a token, of an answer as the mean of its tokens' (gspo), or as "
                                            "their product (rloo)")
    average: Average | None = option(None, help="losses averaged over tokens, answers, or answers of one constant "
                                                "length")
    scale: Scale | None = option(None, help="advantages divided by the deviation of their group, of the batch, or not")
    whiten: bool | None = option(None, help="advantages shifted and scaled over the whole batch [ppo: yes]")
    kl: float = option(0.0, help="weight of the divergence from the reference", elsewhere=("beta", "kl_coef"))
    kl_in: Literal["loss", "reward"] = option("loss", help="the divergence is part of the loss, or taken from the "
                                                              "reward")
    kl_estimator: Estimator = option("k3", help="how it is estimated in the loss")
    target_kl: float = option(0.0, help="divergence per answer that the weight is steered towards "
                                         "(kl_in=reward); 0: fixed")
    correction: float = option(0.0, help="weigh tokens by how much likelier the trainer finds them than the engine, at "
                                         "most so much; 0: not")
    value: float = option(0.1, help="PPO: weight of the critic's loss")
    value_clip: float = option(0.2, help="PPO: how far a value may move in one rollout; 0: any")
    gamma: float = option(1.0, help="PPO: discount of later rewards")
    lam: float = option(0.95, help="PPO: lambda of the advantage estimate (GAE)")
    whiten_rewards: bool = option(False, help="PPO: divide rewards by their deviation")


@dataclass(frozen=True, kw_only=True)
class RLLoop:
    steps: int = option(200, help="optimiser steps", elsewhere=("max_steps",))
    micro_batch: int = option(16, help="answers in a forward pass, on each rank",
                             elsewhere=("per_device_train_batch_size",))
    precision: PrecisionChoice = option("auto", help="auto: bf16 where it is the faster one, else fp32")
    recompute: Recompute = option(False, help="make activations again in the backward pass: less memory, a "
                                                           "third more work; selective: only what is cheap")
    validate_every: int | None = option(None, help="steps between measurements, 0: never [derived: a fifth of all]")
    sample_every: int | None = option(None, help="steps between printed answers, 0: never [derived: a tenth of all]")
    save_every: int | None = option(None, help="steps between checkpoints, 0: only the last [derived: a fifth of all]")
    keep: int = option(2, help="checkpoints kept, besides the best one")

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batch", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RLOptions:
    out: str = option("runs/rl", help="folder of the run: config, log, checkpoints, and the model directory at the end",
                      elsewhere=("save_dir", "save_weight", "output_dir"))
    resume: Resume = option("never", bare="newest",
                            help="newest: go on from the last checkpoint; auto: start, or go on")
    algorithm: Algorithm = option("grpo", help="what the settings below are derived from, where they are not given")
    seed: int = option(0, help="seed of the order of prompts, of sampling and of dropout")
    device: str = option("auto", help="cpu, cuda, cuda:1, mps; auto: the GPU if there is one")
    trackers: tuple[str, ...] = option((), help="also log to: tensorboard, wandb, swanlab, trackio")
    model: StartOptions = field(default_factory=StartOptions)
    data: PromptOptions = field(default_factory=PromptOptions)
    rollout: SamplingOptions = field(default_factory=SamplingOptions)
    reward: RewardOptions = field(default_factory=RewardOptions)
    policy: PolicyOptions = field(default_factory=PolicyOptions)
    lora: LoRAOptions = field(default_factory=LoRAOptions)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loop: RLLoop = field(default_factory=RLLoop)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 62:
            raise ValueError(f"seed={self.seed} must lie between 0 and 2^62 - 1")


def derive(options: RLOptions) -> RLOptions:
    """Fill in what is None, from the algorithm; UserError for what does not go together."""
    row = USUAL | ALGORITHMS[options.algorithm]

    def filled(part: Any) -> Any:
        return replace(part, **{f.name: row[f.name] for f in fields(part)
                                if getattr(part, f.name) is None and f.name in row})

    rollout, policy, loop = filled(options.rollout), filled(options.policy), options.loop
    rollout = replace(rollout, stop=tuple(text.replace("\\n", "\n") for text in rollout.stop))     # as shells give it
    if any(not text for text in rollout.stop):
        raise UserError("rollout.stop holds an empty text, at which every answer would end")
    if rollout.turns is None:
        rollout = replace(rollout, turns=4 if options.data.tools else 1)
    if loop.validate_every is None:
        loop = replace(loop, validate_every=max(1, -(-loop.steps // 5)))
    if loop.sample_every is None:
        loop = replace(loop, sample_every=max(1, -(-loop.steps // 10)))
    if loop.save_every is None:
        loop = replace(loop, save_every=max(1, -(-loop.steps // 5)))
    optim = options.optim if options.optim.lr is not None else replace(options.optim, lr=1e-4)
    options = replace(options, rollout=rollout, policy=policy, loop=loop, optim=optim, reward=filled(options.reward))
    try:
        objective_of(options)
        RolloutConfig(prompts=rollout.prompts, epochs=rollout.epochs, minibatches=rollout.minibatches,
                      dynamic=rollout.dynamic, drop_cut=rollout.drop_cut, patience=rollout.patience)
        if min(rollout.answers, rollout.max_new, rollout.turns) < 1:
            raise ValueError(f"answers={rollout.answers}, max_new={rollout.max_new} and turns={rollout.turns} must be "
                             "at least 1")
    except ValueError as error:
        raise UserError(f"{options.algorithm} with these options: {error}") from None
    if options.algorithm != "ppo" and rollout.answers < 2:
        raise UserError(f"{options.algorithm} compares answers to one prompt with each other: rollout.answers="
                        f"{rollout.answers} must be at least 2 (ppo needs no others)")
    if policy.target_kl and (policy.kl_in != "reward" or not policy.kl):
        raise UserError("policy.target_kl steers the weight of a divergence in the reward: give policy.kl_in=reward "
                        "and policy.kl, where it begins")
    if options.data.tools and options.data.plain:
        raise UserError("data.plain leaves out the chat template, without which data.tools cannot be called")
    if options.data.plain and options.data.thinking != "auto":
        raise UserError("data.plain leaves out the chat template, which is what opens a <think> block (data.thinking)")
    if rollout.stop and rollout.turns > 1:
        raise UserError("rollout.stop ends an answer in the middle of a turn, which no tool can answer then; leave it "
                        "out, or use rollout.turns=1")
    if options.data.tools and rollout.turns < 2:
        raise UserError("data.tools needs rollout.turns of at least 2: a call, and what is said of its result")
    return options


def without_effect(options: RLOptions) -> list[str]:
    """A line for every option that was given and that another one makes idle."""
    p, r, name = options.policy, options.reward, options.algorithm
    free = "policy.kl is 0"
    causes = dict.fromkeys(("model.reference", "policy.kl_in", "policy.kl_estimator"), None if p.kl else free)
    causes |= {"policy.kl_estimator": free if not p.kl else "in the reward it is always k1" if p.kl_in == "reward" else
               None}
    causes |= dict.fromkeys(("model.critic", "policy.value", "policy.value_clip", "policy.gamma", "policy.lam",
                             "policy.whiten_rewards"), None if name == "ppo" else f"{name} has no critic")
    causes |= {"policy.scale": f"{name} compares no answers with each other" if name == "ppo" else
               "rloo divides by nothing" if name == "rloo" else None,
               "policy.clip_low": "cispo has no lower bound" if name == "cispo" else None,
               "reward.form": "reward.format is 0" if not r.format else None,
               "reward.function_weight": None if r.function else "reward.function is not given",
               "reward.timeout_s": None if r.function else "reward.function is not given",
               "data.share": "data.heldout is given" if options.data.heldout else None,
               **dict.fromkeys(("rollout.dynamic", "rollout.patience"), "ppo learns from every group, its critic tells "
                               "good from bad" if name == "ppo" else None),
               "reward.result": None if options.data.tools else "without data.tools there are no results",
               **idle_optim(options),
               "rollout.turns": None if options.data.tools else "without data.tools nobody answers a turn"}
    causes |= {f"lora.{field.name}": "lora.rank is 0" for field in fields(options.lora) if not options.lora.rank}
    changed = diff(RLOptions(), options)
    return [f"{option} has no effect: {cause}" for option, cause in causes.items() if cause and option in changed]


def objective_of(options: RLOptions) -> GRPO:
    """The loss that the (derived) options describe."""
    row, p = USUAL | ALGORITHMS[options.algorithm], options.policy
    shared = dict(clip_low=p.clip_low, clip_high=p.clip_high, level=p.level, average=p.average,
                  weight_only=row["weight_only"], kl=p.kl if p.kl_in == "loss" else 0.0, kl_estimator=p.kl_estimator,
                  length=options.rollout.max_new * options.rollout.turns if p.average == "constant" else 0,
                  temperature=options.rollout.temperature, correction=p.correction)
    if options.algorithm == "ppo":
        return PPO(**shared, value=p.value, value_clip=p.value_clip)
    return GRPO(**shared)


def advantage_of(options: RLOptions) -> Advantage:
    row, p = USUAL | ALGORITHMS[options.algorithm], options.policy
    baseline: Baseline = row["baseline"]
    return Advantage(baseline=baseline, scale=p.scale, whiten=p.whiten, whiten_rewards=p.whiten_rewards, gamma=p.gamma,
                     lam=p.lam, kl=p.kl if p.kl_in == "reward" else 0.0, target_kl=p.target_kl)
