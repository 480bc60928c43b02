"""The R1 pipeline, from a base model to a reasoner and its small student, stage by stage (DeepSeek-R1, 2501.12948).

  mindseed r1 configs/r1-toy.toml                  over what `mindseed demo` has grown; goes on where it stopped
  mindseed r1 configs/r1-zero-toy.toml             reinforcement learning straight on the base (R1-Zero)

    cold start  the base is fine-tuned on some conversations with traces of thought, so that it thinks readably
    rl          rules reward right answers and that form; nobody shows it how to think
    rejection   what it answers now: right and readable answers become lessons
    again       the base is fine-tuned anew, on those and on general conversations
    rl again    rewards over all prompts
    student     a smaller model learns from the last one's answers

Every stage is graded on the held-out problems and stands in summary.json beside the length of its
answers; the curves of each run are in the studio. A stage that is done is not done again, unless --redo says so:

  mindseed r1 configs/r1-toy.toml --first.lr 1e-4 --redo rl          other options for a stage: it and what follows
"""
from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import time
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mindseed.base.config import diff, flatten, option, to_dict
from mindseed.base.errors import UserError
from mindseed.base.files import locked, make_folder, read_json, write_json, write_text
from mindseed.base.log import StepBar, duration, read_jsonl, say, table, warn
from mindseed.data.formats import check as check_file
from mindseed.data.readers import expand, read_rows
from mindseed.infer.engine import Engine, EngineConfig, Request
from mindseed.infer.sample import Sampling
from mindseed.interop.directory import load_directory, require_folder
from mindseed.optim.groups import OptimConfig
from mindseed.optim.schedule import ScheduleConfig
from mindseed.recipes import rl, train
from mindseed.recipes.machine import choose_device
from mindseed.recipes.model_options import ModelOptions
from mindseed.recipes.options import DataOptions, LoopOptions, ObjectiveOptions, TrainOptions
from mindseed.recipes.rl_options import (Algorithm, PolicyOptions, PromptOptions, RewardOptions, RLLoop, RLOptions,
                                         SamplingOptions, StartOptions, derive)
from mindseed.recipes.run_folder import asked_plainly
from mindseed.rl.prompts import Prompt, Prompts, read_prompts
from mindseed.rl.rejection import Answer, sample_answers
from mindseed.tasks.verify import grade, kind_of, require_gradable, thought_first
from mindseed.tokenizers.chat import normalise
from mindseed.train.loop import Interrupted

Stage = Literal["cold-start", "rl", "rejection", "again", "rl-again", "student"]
STAGES: tuple[Stage, ...] = typing.get_args(Stage)
SEEN = {"stage": str, "right": float, "thinks": float, "tokens": float, "seconds": float}
FIRST_USED: dict[str, Stage] = {                  # the first stage that an option is of any consequence to
    "first": "rl", "data.problems": "rl", "data.families": "rl", "samples": "rejection", "temperature": "rejection",
    "again": "again", "second": "rl-again", "small": "student", "student": "student"}         # all others: the first
ELSEWHERE = ("out", "until", "device", "redo")    # of no consequence to what is made


@dataclass(frozen=True, kw_only=True)
class LessonOptions:
    """A stage of fine-tuning."""

    steps: int = option(100, help="optimiser steps")
    batch: int = option(8, help="rows of a step")
    lr: float = option(5e-3, help="peak learning rate")


@dataclass(frozen=True, kw_only=True)
class ReinforceOptions:
    """A stage of reinforcement learning."""

    steps: int = option(120, help="optimiser steps")
    lr: float = option(3e-4, help="learning rate")
    algorithm: Algorithm = option("grpo", help="see mindseed rl --help")
    prompts: int = option(32, help="prompts of a rollout")
    answers: int = option(8, help="answers to each")
    max_new: int = option(96, help="longest answer, in tokens; the last stage's is that of grading as well")
    temperature: float = option(1.0, help="of sampling")
    dynamic: int = option(1, help="draw up to this many times the prompts until enough groups differ in their rewards")
    format: float = option(0.5, help="weight of thinking in the right form, beside 1 for being right")
    kl: float = option(0.0, help="weight of the divergence from the model that the stage begins with")


@dataclass(frozen=True, kw_only=True)
class R1Data:
    problems: tuple[str, ...] = option((), help="problems with checkable answers")
    heldout: tuple[str, ...] = option((), help="problems to grade every stage on")
    traces: tuple[str, ...] = option((), help="conversations with thoughts, for the cold start; others are skipped")
    general: tuple[str, ...] = option((), help="conversations of all kinds, mixed in when fine-tuning again")
    families: tuple[str, ...] = option((), help="the first reinforcement learning takes problems of these families "
                                                "alone, those that need thought [all]")
    trace_limit: int = option(2000, help="traces used, at most")
    plain: str = option("", help="with --zero: text with {question} in it in place of the chat template, which a base "
                                 "has never read")
    stop: tuple[str, ...] = option((), help="with --zero: texts that end an answer and are no part of it")
    seq_len: int = option(384, help="tokens per row when fine-tuning")


@dataclass(frozen=True, kw_only=True)
class Options:
    out: str = option("runs/r1", help="folder of all stages")
    base: str | None = option(None, help="the base model's directory", elsewhere=("model.start",))
    zero: bool = option(False, help="no cold start: reinforcement learning on the base, and nothing else (R1-Zero)")
    until: Stage = option("student", help="stop after this stage")
    redo: Stage | None = option(None, help="throw away this stage and those after it, and make them anew")
    seed: int = option(0, help="seed of every stage")
    device: str = option("auto", help="cpu, cuda, mps; auto: the GPU if there is one")
    tag_weight: float = option(1.0, help="weight of the think and answer tags in the cold start's loss; above 1 the "
                                         "form is learnt sooner")
    cold_general: float = option(0.0, help="share of general conversations in the cold start; a base that has learnt "
                                           "little needs some, for reinforcement finds only what is sometimes right")
    samples: int = option(4, help="answers to each problem of which the right ones become lessons")
    temperature: float = option(0.8, help="of these answers")
    optimizer: Literal["adamw", "muon"] = option("muon", help="of the stages of fine-tuning")
    data: R1Data = field(default_factory=R1Data)
    cold: LessonOptions = field(default_factory=LessonOptions)
    first: ReinforceOptions = field(default_factory=ReinforceOptions)
    again: LessonOptions = field(default_factory=LessonOptions)
    second: ReinforceOptions = field(default_factory=ReinforceOptions)
    small: LessonOptions = field(default_factory=LessonOptions)
    student: ModelOptions = field(default_factory=ModelOptions)


def main(options: Options) -> int:
    check(options)
    if idle := without_effect(options):
        warn(f"without effect, for --zero has one stage, reinforcement learning on the base: {', '.join(idle)}")
    folder = make_folder(options.out)
    with locked(folder / ".lock", wait_s=0, busy=f"another process works on {folder}; end it first, or choose another "
                "--out"):
        pipeline = Pipeline(options, choose_device(options.device))
        try:
            pipeline.run()
        except Interrupted as stop:
            say(f"{stop}. Give the same command again to go on" + (", without --redo" if options.redo else ""))
            return 130
        pipeline.show()
    return 0


def check(options: Options) -> None:
    if not options.base:
        raise UserError("which base model? --base DIRECTORY, for example runs/demo/pretrain/model")
    data = options.data
    if (data.plain or data.stop) and not options.zero:
        raise UserError("data.plain and data.stop are for --zero; the other stages learn the chat template")
    needed = ["problems", "heldout"] + ([] if options.zero else ["traces", "general"])
    if missing := [name for name in needed if not getattr(data, name)]:
        raise UserError(f"data.{missing[0]} is empty: name files; configs/r1-toy.toml shows which")
    if not 0 <= options.cold_general < 1:
        raise UserError(f"cold_general is a share from 0 to below 1, not {options.cold_general:g}")
    if options.samples < 1 or data.trace_limit < 1 or options.temperature < 0:
        raise UserError(f"samples={options.samples} and data.trace_limit={data.trace_limit} must be at least 1, "
                        f"temperature={options.temperature} at least 0")
    if options.zero and options.redo not in (None, "rl"):
        raise UserError(f"--zero has no stage {options.redo}; its one stage is rl")
    if options.redo and not options.zero and STAGES.index(options.until) < STAGES.index(options.redo):
        raise UserError(f"--redo {options.redo} makes a stage anew that comes after --until {options.until}")
    try:                                          # what a later stage would fail for fails now
        for name in ("cold", "again", "small"):
            lesson(options, name, getattr(options, name), ("x",))
        for name in ("first", "second"):
            derive(reinforcement(options, name, Path("x"), getattr(options, name), ["x"], form="think"))
    except (ValueError, UserError) as error:
        raise UserError(f"{name}: {in_section(str(error), name)}") from None
    problems = read_prompts(data.problems)
    for prompt in [*problems, *read_prompts(data.heldout)]:
        if kind_of(prompt.row, prompt.name) == "code":
            raise UserError(f"{prompt.name} has tests, and code is not run here; mindseed rl --reward.task code does")
        require_gradable(prompt.row, where=prompt.name)
    there = {p.row.get("family") for p in problems}
    if unknown := set(data.families) - there:
        raise UserError(f"data.families names {', '.join(sorted(unknown))}, of which data.problems has no problem; it "
                        f"has {', '.join(sorted(map(str, there)))}")
    if not options.zero:
        thoughtful(data.traces, 1)
        for path in expand(data.general):
            check_file(path)


def lesson(o: Options, name: str, how: LessonOptions, files: tuple[str, ...], *, weights: tuple[float, ...] = (),
           model: ModelOptions | None = None, tokenizer: str | None = None,
           objective: ObjectiveOptions = ObjectiveOptions()) -> TrainOptions:
    """A stage of fine-tuning, as `mindseed train` would be told of it."""
    return TrainOptions(
        out=str(Path(o.out) / name), resume="auto", seed=o.seed, device=o.device,
        model=model or ModelOptions(start=str(o.base)), objective=objective,
        data=DataOptions(train=files, weights=weights, seq_len=o.data.seq_len, heldout=0.0, tokenizer=tokenizer),
        optim=OptimConfig(kind=o.optimizer, lr=how.lr),
        schedule=ScheduleConfig(kind="linear", warmup_steps=min(20, how.steps // 4), final=0.02),
        loop=LoopOptions(steps=how.steps, batch=how.batch, sample_every=0, validate_every=0))


def reinforcement(o: Options, name: str, start: Path, how: ReinforceOptions, files: list[str], *,
                  form: Any) -> RLOptions:
    """A stage of reinforcement learning, as `mindseed rl` would be told of it."""
    return RLOptions(
        out=str(Path(o.out) / name), resume="auto", seed=o.seed, device=o.device, algorithm=how.algorithm,
        model=StartOptions(start=str(start)),
        data=PromptOptions(train=tuple(files), heldout=o.data.heldout, limit=60, plain=o.data.plain),
        rollout=SamplingOptions(prompts=how.prompts, answers=how.answers, max_new=how.max_new, stop=o.data.stop,
                                temperature=how.temperature, dynamic=how.dynamic),
        reward=RewardOptions(accuracy=1.0, format=how.format, form=form if how.format else "task"),
        policy=PolicyOptions(kl=how.kl), optim=OptimConfig(kind="adamw", lr=how.lr, weight_decay=0.0),
        schedule=ScheduleConfig(kind="constant", warmup_steps=5), loop=RLLoop(steps=how.steps, micro_batch=64))


def in_section(said: str, section: str) -> str:
    """A message about options of `mindseed rl` or `train` in those that a stage has."""
    return re.sub(r"\b(?:rollout|optim|loop|reward|policy)\.(?=[a-z])", f"{section}.", said)


def without_effect(options: Options) -> list[str]:
    """The options that were given and that --zero makes idle."""
    if not options.zero:
        return []
    used = {"zero", "base", "seed", *ELSEWHERE, "data.problems", "data.heldout", "data.families", "data.plain",
            "data.stop", "first"} - {"until"}
    return [name for name in diff(Options(), options) if not used & {name, name.split(".")[0]}]


def identity(options: Options) -> dict[str, Any]:
    """What the stages depend on, as JSON holds it: options by dotted names, and the contents of what they read."""
    found = flatten(json.loads(json.dumps(to_dict(options))))
    for name in ("problems", "heldout", *(() if options.zero else ("traces", "general"))):
        found[f"data.{name}"] = [f"{path} {fingerprint(path)}" for path in expand(getattr(options.data, name))]
    weights = sorted(require_folder(Path(options.base)).glob("*.safetensors"))
    found["base"] = [str(options.base), *map(fingerprint, weights)]
    return {name: value for name, value in found.items() if name not in ELSEWHERE}


def fingerprint(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


class Pipeline:
    """The stages, and what each came to."""

    def __init__(self, options: Options, device: torch.device) -> None:
        self.options, self.device, self.folder = options, device, make_folder(options.out)
        self.summary, self.now = self.folder / "summary.json", identity(options)
        kept = read_json(self.summary, {"stages": [SEEN], "options": dict}) if self.summary.exists() else {"stages": []}
        self.seen = kept["stages"]
        self.longest = (options.first if options.zero else options.second).max_new          # answer when graded
        gone = STAGES[STAGES.index(options.redo):] if options.redo else ()
        if "options" in kept:
            self.compare(flatten(kept["options"]), gone)
        if gone:
            self.throw_away(gone)
        self.heldout = read_prompts(options.data.heldout)

    def compare(self, was: dict[str, Any], gone: tuple[Stage, ...]) -> None:
        """UserError if a stage that stays was made with other options. One that an older version did not have, and one
        that this version has no more, do not count: of the first the default was in force."""
        usual, zero = flatten(json.loads(json.dumps(to_dict(Options())))), self.options.zero
        changed = [name for name in self.now if was.get(name, usual.get(name)) != self.now[name]]
        there = [stage for stage in STAGES if (self.folder / stage).exists() and stage not in gone]
        graded = ["data.heldout", "first.max_new" if zero else "second.max_new"]             # all stages alike
        for name in changed:
            first = STAGES.index(FIRST_USED.get(name, FIRST_USED.get(name.split(".")[0], STAGES[zero])))
            if name == "data.general" and not self.options.cold_general:
                first = STAGES.index("again")
            if name != "data.heldout" and any(STAGES.index(stage) >= first for stage in there):
                raise UserError(
                    f"{self.folder} holds stages that were made with other options: {name} was "
                    f"{was.get(name, usual.get(name))}, is {self.now[name]}. Give the old ones to go on, --redo "
                    f"{STAGES[first]} to make that stage and those after it anew, or another --out")
        if not there or any(name in changed for name in graded):
            self.seen = []                        # they are graded again

    def throw_away(self, gone: tuple[Stage, ...]) -> None:
        self.seen = [seen for seen in self.seen if seen["stage"] not in gone]
        self.write()                              # first: a grade without its model is worse than the reverse
        found = [self.folder / stage for stage in gone if (self.folder / stage).exists()]
        for path in found:
            shutil.rmtree(path)
        say(f"thrown away: {', '.join(path.name for path in found) or 'nothing, there was none of them'}")

    def run(self) -> None:
        o = self.options
        self.grade("base", Path(o.base))
        if o.zero:
            self.stage("rl", lambda: self.reinforce("rl", Path(o.base), o.first, self.problems_of_first()))
            return
        for name, make in (("cold-start", self.cold_start), ("rl", self.first_rl), ("rejection", self.reject),
                           ("again", self.fine_tune_again), ("rl-again", self.second_rl), ("student", self.teach)):
            self.stage(name, make)
            if name == o.until:
                return

    def stage(self, name: Stage, make: Callable[[], None]) -> None:
        """Run a stage unless an earlier call finished it, and grade what it made."""
        done = self.folder / name / ("lessons.jsonl" if name == "rejection" else "model")
        if not done.exists():
            self.seen = [seen for seen in self.seen if seen["stage"] != name]
            say(f"\n--- {name}" + ("" if self.options.zero else f", stage {STAGES.index(name) + 1} of {len(STAGES)}"))
            self.write()                          # with which options it begins
            make()
        if name != "rejection":
            self.grade(name, done)

    def write(self) -> None:
        write_json(self.summary, {"stages": self.seen, "options": self.now})

    # ------------------------------------------------------------------------------------------------------ the stages

    def cold_start(self) -> None:
        """Conversations with thoughts, few of them."""
        traces = self.folder / "cold-start-traces.jsonl"
        write_rows(traces, thoughtful(self.options.data.traces, self.options.data.trace_limit))
        o = self.options
        general, share = (o.data.general, o.cold_general) if o.cold_general else ((), 0.0)
        weights = (1 - share, *[share / len(general)] * len(general)) if general else ()
        self.fine_tune("cold-start", o.cold, (str(traces), *general), weights=weights,
                       objective=ObjectiveOptions(tag_weight=o.tag_weight))

    def problems_of_first(self) -> list[str]:
        """Those that need thought, if data.families says which."""
        wanted, problems = set(self.options.data.families), self.options.data.problems
        if not wanted:
            return list(problems)
        some = self.folder / "rl-problems.jsonl"
        write_rows(some, [p.row for p in read_prompts(problems) if p.row.get("family") in wanted])
        return [str(some)]

    def first_rl(self) -> None:
        """Rewards for being right, and for thinking, on the problems that need thought."""
        self.reinforce("rl", self.folder / "cold-start" / "model", self.options.first, self.problems_of_first())

    def reject(self) -> None:
        """What the model answers by now, kept where it is right and readable."""
        began, o = time.monotonic(), self.options
        rows, asked = self.right_answers("rl", o.first.max_new, seed=o.seed)
        if not rows:
            raise UserError("the model of stage rl answered no problem right, so there is nothing to learn from; "
                            "give it more steps (first.steps, with --redo rl)")
        folder = make_folder(self.folder / "rejection")
        write_json(folder / "summary.json", {"asked": asked, "kept": len(rows), "seconds": time.monotonic() - began})
        write_rows(folder / "lessons.jsonl", rows)

    def fine_tune_again(self) -> None:
        lessons = (str(self.folder / "rejection" / "lessons.jsonl"), *self.options.data.general)
        share = 1 / len(self.options.data.general) / 2
        self.fine_tune("again", self.options.again, lessons, weights=(0.5, *[share] * len(self.options.data.general)))

    def second_rl(self) -> None:
        o = self.options
        self.reinforce("rl-again", self.folder / "again" / "model", o.second, list(o.data.problems), form="task")

    def teach(self) -> None:
        """A smaller model learns from the last one's answers, and from general conversations."""
        lessons = make_folder(self.folder / "student") / "lessons.jsonl"
        if not lessons.exists():
            rows, _ = self.right_answers("rl-again", self.options.second.max_new, seed=self.options.seed + 1)
            if not rows:
                raise UserError("the model of stage rl-again answered no problem right, so a student could learn "
                                "nothing from it; give it more steps (second.steps, with --redo rl-again)")
            write_rows(lessons, rows)
        model, tokenizer = self.options.student, None
        if model.start is None:
            tokenizer = str(self.options.base)
        general = self.options.data.general
        self.fine_tune("student", self.options.small, (str(lessons), *general), model=model, tokenizer=tokenizer,
                       weights=(0.5, *[1 / len(general) / 2] * len(general)))

    # ------------------------------------------------------------------------------------------------- what they share

    def fine_tune(self, name: Stage, how: LessonOptions, files: tuple[str, ...], **more: Any) -> None:
        train.train(lesson(self.options, name, how, files, **more), self.device)

    def reinforce(self, name: Stage, start: Path, how: ReinforceOptions, files: list[str], *,
                  form: str = "think") -> None:
        try:
            rl.train(reinforcement(self.options, name, start, how, files, form=form), self.device)
        except UserError as error:
            section = {"rl": "first", "rl-again": "second"}[name]
            raise UserError(f"stage {name}: {in_section(str(error), section)}. --redo {name} begins it anew, --redo "
                            "with an earlier stage gives it another model to begin with") from None

    def right_answers(self, name: Stage, max_new: int, *, seed: int) -> tuple[list[dict], int]:
        """(rows of conversations, answers that were asked for): what the model of a stage answers to the problems,
        where it is right and readable, and at most one of the same wording to a prompt."""
        o, prompts, rows = self.options, read_prompts(self.options.data.problems), []
        loaded = load_directory(self.folder / name / "model", device=self.device)
        engine = Engine.of(loaded, EngineConfig(max_seqs=64, max_queue=1 << 20))
        with StepBar(len(prompts), unit="prompt") as bar:
            for i, sampled in enumerate(sample_answers(
                    engine, prompts, n=o.samples, keep=right, max_new=max_new, template=loaded.template,
                    sampling=Sampling(temperature=o.temperature, seed=seed))):
                rows += [with_tools(sampled.prompt, answer) for answer in sampled.answers]
                bar.update(i + 1, {"kept": len(rows)})
        asked = len(prompts) * o.samples
        say(f"{len(rows):,} of {asked:,} answers are right, readable and no repetition, and are kept")
        return rows, asked

    def grade(self, name: str, folder: Path) -> None:
        """The likeliest answers to the held-out problems: how many are right, how many think, how long they are."""
        if any(seen["stage"] == name for seen in self.seen):
            return
        loaded = load_directory(folder, device=self.device)
        o, longest = self.options, self.longest
        prompts = Prompts(self.heldout, loaded.tokenizer, seed=0, template=loaded.template, plain=o.data.plain,
                          longest=loaded.model.config.seq_len - longest,
                          room="first.max_new" if o.zero else "second.max_new")
        engine = Engine.of(loaded, EngineConfig(max_seqs=64, max_queue=1 << 20))
        answers = [c for c, in engine.generate([Request(prompt=ids, max_new=longest, stop=o.data.stop,
                                                        sampling=Sampling(temperature=0.0)) for ids in prompts.ids])]
        right = [grade(p.row, c.text)["score"] for p, c in zip(prompts.prompts, answers)]
        log = self.folder / name / "log.jsonl"
        clock = [row["elapsed_s"] for row in read_jsonl(log) if "elapsed_s" in row] if log.exists() else []
        spent = sum(a for a, b in zip(clock, [*clock[1:], 0]) if b < a)           # it begins anew when a run goes on
        of = len(self.heldout)                    # one that is too long for the model is not right
        self.seen.append({"stage": name, "right": 100 * float(np.sum(right)) / of, "seconds": float(spent),
                          "thinks": 100 * float(np.mean([thought_first(c.text) for c in answers])),
                          "tokens": float(np.mean([len(c.ids) for c in answers]))})
        self.write()
        seen = self.seen[-1]
        say(f"{name}: {seen['right']:.1f}% right, {seen['thinks']:.0f}% think first, {seen['tokens']:.0f} tokens an "
            "answer")

    def show(self) -> None:
        rows = [[s["stage"], f"{s['right']:.1f}%", f"{s['thinks']:.0f}%", f"{s['tokens']:.0f}",
                 duration(s["seconds"]) if s["seconds"] else ""] for s in self.seen]
        if (kept := self.folder / "rejection" / "summary.json").exists() and len(rows) > 2:
            lessons = read_json(kept, {"asked": int, "kept": int, "seconds": float})
            rows.insert(3, ["rejection", f"{lessons['kept']:,} of {lessons['asked']:,} answers kept", "", "",
                            duration(lessons["seconds"])])
        table(f"{len(self.heldout)} held-out problems",
              ["stage", "right", "think first", "tokens an answer", "time"], rows)
        last, o = str(self.folder / self.seen[-1]["stage"] / "model"), self.options
        say(f"\nThe figures are in {self.summary}, the curves in the studio (mindseed ui). " + (
            asked_plainly(shlex.quote(last), o.data.stop) if o.data.plain else
            f"Talk to the last one:\n\n    mindseed chat {shlex.quote(last)}") + "\n")


# ------------------------------------------------------------------------------------------------------ rows of lessons

def thoughtful(paths: tuple[str, ...], most: int) -> list[dict]:
    """Conversations whose last turn has thoughts, from the beginning of the files."""
    found = []
    for row in read_rows(paths):
        try:
            messages, _ = normalise(row.row)
        except (UserError, ValueError, TypeError, KeyError):
            continue
        if messages and messages[-1]["role"] == "assistant" and messages[-1].get("reasoning_content"):
            found.append(row.row)
            if len(found) == most:
                break
    if not found:
        raise UserError(f"{', '.join(paths)} hold no conversation with thoughts (reasoning_content, or <think> in the "
                        "content), from which the cold start could learn")
    return found


def right(prompt: Prompt, answer: Answer) -> bool:
    return grade(prompt.row, answer.text)["score"] == 1.0


def with_tools(prompt: Prompt, answer: Answer) -> dict:
    return {"messages": answer.messages} | ({"tools": prompt.tools} if prompt.tools else {})


def write_rows(path: Path, rows: list[dict]) -> None:
    """A file that holds just these already is left as it is, with its time."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
