"""What post-training gains on the embedded world: every method from the same fine-tuned model, over three seeds.

Per seed a world is written and a model of 1.8M parameters pretrained on its texts, as the demo does, and fine-tuned on
conversations whose answers are right but mostly given three times over (post_data.py). That model is `start`. From it
begin DPO, a reward model, GRPO, PPO, adapters, and the teaching of a model of half the size; the R1 pipeline begins
with the base, as it must. Each is the product's own recipe. Everything is kept in runs/post-training and found there
the next time; a run that was stopped goes on.

    python -m benchmarks.post_training                   all seeds, then the tables in docs/RESULTS.md
    python -m benchmarks.post_training 0 dpo grpo        some stages of one seed, and what they came to
    python -m benchmarks.post_training tables            the tables, of what is there
"""
from __future__ import annotations

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import torch

from benchmarks.common import report
from benchmarks.post_data import CARELESS, SMALL, write_data
from benchmarks.post_figures import exact, kept, nearness, open_model, preferred
from mindseed.base.files import read_json, write_json, write_text
from mindseed.base.log import say
from mindseed.data.toy import World, write_world
from mindseed.optim.groups import OptimConfig
from mindseed.optim.schedule import ScheduleConfig
from mindseed.recipes import demo, r1, rl, train
from mindseed.recipes.model_options import ModelOptions
from mindseed.recipes.options import DataOptions, LoopOptions, TrainOptions
from mindseed.recipes.post_options import DistillOptions, DPOOptions, LoRAOptions
from mindseed.recipes.rl_options import PolicyOptions, PromptOptions, RLLoop, RLOptions, SamplingOptions, StartOptions

NAME, FOLDER, SEEDS = "post-training", Path("runs/post-training"), (0, 1, 2)
CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[1] / "docs" / "RESULTS.md"
HALF = dict(dim=128, heads=4, kv_heads=2, ffn_dim=320)          # 0.85M parameters in four layers, beside 1.81M


class Seed:
    """The stages of one seed: what each is, where it lies, what it came to."""

    def __init__(self, seed: int) -> None:
        self.seed, self.folder, self.world = seed, FOLDER / str(seed), World(seed)
        self.grown = demo.Options(out=str(self.folder), seed=seed, device="cpu")
        self.stages: dict[str, Callable[[], Any]] = {
            "pretrain": lambda: demo.pretraining(self.grown, self.folder),
            "start": lambda: self.chat("start", "pretrain", "careless"),
            "dpo": lambda: self.pairs("dpo", 120, 1.5e-4, dpo=DPOOptions(beta=0.5, sft=0.5)),
            "chosen": self.chosen,
            "reward": lambda: self.pairs("reward", 450, 2e-3, kind="muon"),
            "grpo": lambda: self.reinforced("grpo", 60, 3e-4),
            "ppo": lambda: self.reinforced("ppo", 60, 3e-4, policy=PolicyOptions(kl=0.01, kl_in="reward")),
            "small": lambda: replace(demo.pretraining(self.grown, self.folder), out=str(self.folder / "small"),
                                     model=ModelOptions(preset="toy", **HALF)),
            "tuned": lambda: self.student("tuned"),
            "distilled": lambda: self.student("distilled", method="distill", distill=DistillOptions(
                teacher=self.path("start"))),
            "full": lambda: self.domain("full", 1e-3),
            "full-slow": lambda: self.domain("full-slow", 5e-4),
            "lora": lambda: self.domain("lora", 2.5e-3, lora=LoRAOptions(rank=6, alpha=12.0)),
            "lora-slow": lambda: self.domain("lora-slow", 1.25e-3, lora=LoRAOptions(rank=6, alpha=12.0)),
            "alone": self.alone}
        self.parents = {"start": "pretrain", "tuned": "small", "distilled": "small", "small": None, "pretrain": None}

    def path(self, name: str) -> str:
        return str(self.folder / name / "model")

    def files(self, *names: str) -> tuple[str, ...]:
        return tuple(str(self.folder / "world" / f"{name}.jsonl") for name in names)

    # ------------------------------------------------------------------------------------------------- what is trained

    def chat(self, name: str, parent: str, data: str, steps: int = 440) -> TrainOptions:
        """The demo's fine-tuning on other conversations."""
        options = demo.fine_tuning(self.grown, self.folder)
        return replace(options, out=str(self.folder / name), model=ModelOptions(start=self.path(parent)),
                       data=replace(options.data, train=(*self.files(data), options.data.train[1])),
                       loop=replace(options.loop, steps=steps, validate_every=0))

    def pairs(self, method: Any, steps: int, lr: float, *, kind: Any = "adamw", **more: Any) -> TrainOptions:
        """DPO or the reward model, on pairs of answers."""
        return TrainOptions(
            out=str(self.folder / method), resume="auto", seed=self.seed, device="cpu", method=method,
            model=ModelOptions(start=self.path("start")),
            data=DataOptions(train=self.files("pairs"), seq_len=demo.CONTEXT // 2, heldout=0.02),
            optim=OptimConfig(lr=lr, kind=kind, weight_decay=0.0),
            schedule=ScheduleConfig(kind="linear", warmup_steps=5),
            loop=LoopOptions(steps=steps, batch=32, micro_batch=16, sample_every=0, validate_every=0), **more)

    def chosen(self) -> TrainOptions:
        """Fine-tuning on as many chosen answers as DPO sees, once: what those alone teach."""
        write_text(self.folder / "world" / "chosen.jsonl", "".join(
            json.dumps({"conversations": row["chosen"]}, ensure_ascii=False) + "\n" for row in (
                json.loads(line) for line in (self.folder / "world/pairs.jsonl").read_text().splitlines()[:120 * 32])))
        return TrainOptions(
            out=str(self.folder / "chosen"), resume="auto", seed=self.seed, device="cpu",
            model=ModelOptions(start=self.path("start")),
            data=DataOptions(train=self.files("chosen"), seq_len=demo.CONTEXT, heldout=0.0),
            optim=OptimConfig(lr=1e-3, kind="adamw", weight_decay=0.0),
            schedule=ScheduleConfig(kind="linear", warmup_steps=5),
            loop=LoopOptions(epochs=1, batch=4, sample_every=0, validate_every=0))

    def reinforced(self, algorithm: Any, steps: int, lr: float, **more: Any) -> RLOptions:
        """GRPO or PPO on the world's problems, which are of the training side of its border."""
        sampling = SamplingOptions(max_new=96, prompts=32 if algorithm == "grpo" else 256)
        return RLOptions(
            out=str(self.folder / algorithm), resume="auto", seed=self.seed, device="cpu", algorithm=algorithm,
            model=StartOptions(start=self.path("start")), rollout=sampling,
            data=PromptOptions(train=self.files("problems"), limit=60),
            optim=OptimConfig(lr=lr, kind="adamw", weight_decay=0.0),
            schedule=ScheduleConfig(kind="constant", warmup_steps=5),
            loop=RLLoop(steps=steps, micro_batch=64, validate_every=0, sample_every=0), **more)

    def student(self, name: str, **more: Any) -> TrainOptions:
        """A model of half the size on the same few conversations, seen about 12 times."""
        return TrainOptions(
            out=str(self.folder / name), resume="auto", seed=self.seed, device="cpu",
            model=ModelOptions(start=self.path("small")),
            data=DataOptions(train=self.files("small"), seq_len=demo.CONTEXT, heldout=0.0),
            optim=OptimConfig(lr=5e-3), schedule=ScheduleConfig(kind="linear", warmup_steps=20, final=0.02),
            loop=LoopOptions(steps=300, batch=8, sample_every=0, validate_every=0), **more)

    def domain(self, name: str, lr: float, **more: Any) -> TrainOptions:
        """Translations alone, each said once."""
        return TrainOptions(
            out=str(self.folder / name), resume="auto", seed=self.seed, device="cpu",
            model=ModelOptions(start=self.path("start")),
            data=DataOptions(train=self.files("translations"), seq_len=demo.CONTEXT, heldout=0.0),
            optim=OptimConfig(lr=lr, kind="adamw", weight_decay=0.0),
            schedule=ScheduleConfig(kind="linear", warmup_steps=10),
            loop=LoopOptions(steps=150, batch=8, sample_every=0, validate_every=0), **more)

    def pipeline(self) -> r1.Options:
        """configs/r1-toy.toml in this seed's folder, on the careless conversations."""
        lesson, reinforce = r1.LessonOptions, r1.ReinforceOptions
        return r1.Options(
            out=str(self.folder / "r1"), base=self.path("pretrain"), seed=self.seed, device="cpu",
            data=r1.R1Data(problems=self.files("problems"), heldout=self.files("heldout"),
                           traces=self.files("careless"), general=self.files("careless"),
                           families=("steps", "arithmetic"), trace_limit=6000), cold_general=0.5,
            cold=lesson(steps=240), first=reinforce(steps=40), again=lesson(steps=300), second=reinforce(steps=60),
            small=lesson(steps=300), student=ModelOptions(start=self.path("small")))

    def zero(self) -> r1.Options:
        """configs/r1-zero-toy.toml in this seed's folder."""
        return r1.Options(
            out=str(self.folder / "zero"), base=self.path("pretrain"), seed=self.seed, device="cpu", zero=True,
            data=r1.R1Data(problems=self.files("sums"), heldout=self.files("sums-heldout"), plain="{question}",
                           stop=("\n",)),
            first=r1.ReinforceOptions(steps=240, max_new=8, format=0.0))

    def alone(self) -> TrainOptions:
        """Fine-tuning on the careless conversations, without texts beside them, for as many tokens of answers as the R1
        pipeline learnt from."""
        self.reasoner(self.pipeline())
        self.model("start")
        read = read_json(self.folder / "start/data/0-careless/manifest.json")["splits"]["train"]
        options = self.chat("alone", "pretrain", "careless")
        a_step = 0.994 * options.loop.batch * options.data.seq_len * read["supervised"] / read["tokens"]
        return replace(options, data=replace(options.data, train=self.files("careless"), weights=()),
                       loop=replace(options.loop, steps=round(self.learnt() / a_step)))

    def learnt(self) -> float:
        """Tokens of answers that the R1 pipeline learnt from, up to its last model of full size."""
        return sum(spent(self.folder / "r1" / name) for name in ("cold-start", "rl", "again", "rl-again"))

    # ------------------------------------------------------------------------------------------------ what is measured

    def model(self, name: str) -> Path:
        """The model directory of a stage, which is run if it has not been."""
        if not (self.folder / "world/careless.jsonl").exists():
            write_world(self.folder / "world", self.seed)
            write_data(self.folder / "world", self.seed)
        if not (self.folder / "tokenizer").exists():
            demo.make_tokenizer(demo.Demo(options=self.grown, folder=self.folder))
        done = Path(self.path(name))
        if not done.exists():
            if parent := self.parents.get(name, "start"):
                self.model(parent)
            say(f"\n--- seed {self.seed}: {name}")
            options = self.stages[name]()
            (rl if isinstance(options, RLOptions) else train).train(options, CPU)
        return done

    def reasoner(self, options: r1.Options) -> dict[str, float]:
        """The stages of the R1 pipeline, and how much of what is held out is right after each."""
        self.model("pretrain")
        if not options.zero:
            self.model("small")
        pipeline = r1.Pipeline(options, CPU)
        pipeline.run()
        return {seen["stage"]: seen["right"] for seen in pipeline.seen}

    def figures(self, name: str) -> dict[str, float]:
        """What a stage came to."""
        path = self.folder / f"{name}.json"
        if path.exists():
            return read_json(path)
        if name in ("r1", "zero"):
            found = self.reasoner(self.pipeline() if name == "r1" else self.zero())
        elif name in ("tuned", "distilled"):
            loaded, teacher = open_model(self.model(name)), open_model(self.model("start"))
            found = nearness(loaded, teacher.model, self.folder)
        else:
            loaded = open_model(self.model(name))
            found = {} if name == "reward" else exact(loaded, self.world)
            found |= {"tokens": spent(self.folder / name) / self.learnt()} if name == "alone" else {}
            found |= preferred(loaded, self.world) if name in ("start", "dpo", "chosen", "reward") else {}
            found |= kept(loaded, self.folder) if name in ("start", *DOMAIN) else {}
        write_json(path, found)
        return found


def spent(folder: Path) -> float:
    """Tokens of answers that a run has learnt from. In reinforcement learning all that were sampled are counted, also
    those whose groups taught nothing."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return sum(row["length"] * row["prompts"] * 8 if "length" in row else row.get("supervised", 0)
               for row in rows if ("length" in row) == any("length" in row for row in rows))


# ---------------------------------------------------------------------------------------------------------- the tables

DOMAIN = {"full": "everything, rate 1e-3", "full-slow": "everything, 5e-4", "lora": "LoRA, 2.5e-3",
          "lora-slow": "LoRA, 1.25e-3"}
STAGES = ("start", "dpo", "chosen", "reward", "grpo", "ppo", "tuned", "distilled", "full", "full-slow", "lora",
          "lora-slow", "r1", "zero", "alone")


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "tables"]
    seeds = [int(word) for word in words if word.isdigit()] or SEEDS
    names = [word for word in words if not word.isdigit()] or STAGES
    found = {name: [Seed(seed).figures(name) for seed in seeds] for name in names}
    if words:
        for name, some in found.items():
            say(f"{name}: " + ", ".join(f"{key} {told(some, key)}" for key in some[0]))
    else:
        write_tables(found)


def write_tables(found: dict[str, list[dict[str, float]]]) -> None:
    """Four tables in docs/RESULTS.md."""
    seeds = f"Mean (lowest to highest) over seeds {', '.join(map(str, SEEDS))}."

    def table(name: str, title: str, header: list[str], rows: list[list[str]], notes: str) -> None:
        report(f"{NAME}-{name}", title, header, rows, page=RESULTS, command="python -m benchmarks.post_training",
               notes=f"{notes} {seeds}")

    table("preferences", "Preferences and rewards, embedded world",
          ["model", "held-out questions right, %", "unseen pairs the right way round, %"],
          [[name, told(found[name], "exact"), told(found[name], "pairs")]
           for name in ("start", "dpo", "chosen", "reward", "grpo", "ppo")],
          f"`start` is fine-tuned on conversations of which {CARELESS:.0%} of the answers are given three times over; "
          "all others begin with it. DPO sees 3,840 pairs once, with half of the chosen answers' own loss beside its "
          "own; `chosen` is fine-tuned on as many chosen answers alone, 1e-3. GRPO draws 30 rollouts of 256 answers, "
          "PPO 15, each for 60 optimiser steps. A "
          "pair is the right way round if the chosen answer is likelier per token; of the reward model, better "
          "rewarded, which is another measure.")
    table("distillation", "A teacher for a model of half the size, embedded world",
          ["student", "KL(teacher, student), nats", "same likeliest token, %"],
          [[name, told(found[name], "kl", 3), told(found[name], "agreed")] for name in ("tuned", "distilled")],
          f"The teacher is `start`; both students are one pretrained model of 0.85M parameters, which saw the same "
          f"{SMALL} conversations in the same order for 300 steps. Measured on the assistant's tokens of 300 others. "
          "The divergence is what `distilled` learns to lower; right answers are not counted: the teacher gives few.")
    gained = {name: sum(after["exact/translation"] - before["exact/translation"]
                        for after, before in zip(found[name], found["start"])) for name in DOMAIN}
    measured = {"exact/translation": 1, "exact/tools": 1, "others": 3, "bits": 3}
    table("lora", "A domain by fine-tuning and by LoRA, embedded world",
          ["model", "translations right, %", "calls of tools right, %", "loss on other conversations, nats",
           "bits per byte of texts"],
          [[DOMAIN.get(name, name), *(told(found[name], key, digits) for key, digits in measured.items())]
           for name in ("start", *DOMAIN)],
          "150 steps on translations alone, each said once. LoRA of rank 6 trains 4.5% of the parameters and has "
          f"{100 * gained['lora'] / gained['full']:.0f}% of full fine-tuning's gain, at half of both rates "
          f"{100 * gained['lora-slow'] / gained['full-slow']:.0f}%.")
    table("r1", "The R1 pipeline, embedded world", ["stage", "held-out questions right, %"],
          [[stage, told(found["r1"], stage)] for stage in found["r1"][0]]
          + [["fine-tuning alone, as many tokens", told(found["alone"], "exact")],
             ["sums, plain text: base", told(found["zero"], "base")],
             ["sums, plain text: reinforcement on the base (zero)", told(found["zero"], "rl")]],
          "configs/r1-toy.toml on the careless conversations; its student, 300 steps, is the small model of above. "
          "Rewards and rejection know the right answers of the training problems. Fine-tuning "
          "alone learns from as many tokens of answers as all stages up to `rl-again` together "
          f"({told(found['alone'], 'tokens', 2)} of them). Below, "
          "configs/r1-zero-toy.toml measured on sums of two numbers that no row holds.")


def told(some: list[dict[str, float]], key: str, digits: int = 1) -> str:
    values = [one[key] for one in some if key in one]
    return (f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})" if values
            else "")


if __name__ == "__main__":
    main()
