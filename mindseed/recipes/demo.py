"""Grow a chat model from nothing on this machine, in minutes, and see what each stage taught it.

A small closed world in English and Chinese is written out, a tokenizer trained on it, a model of two million
parameters pretrained on its texts and fine-tuned on its conversations; then it learns which of two answers is preferred
(DPO), and from being told whether its own answers are right (GRPO). Before and after each stage the model answers
questions it has never seen. Everything is in runs/demo: report.html to look at, summary.json for programs, and the
model itself. A demo that was stopped goes on where it was.
"""
from __future__ import annotations

import shlex
import shutil
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mindseed import __version__
from mindseed.base.config import option, to_dict
from mindseed.base.errors import UserError
from mindseed.base.files import read_json, write_json
from mindseed.base.hardware import describe_machine
from mindseed.base.log import duration, notes, say, table
from mindseed.core import Tokenizer
from mindseed.data.loader import Evaluation
from mindseed.data.readers import read_rows, row_texts
from mindseed.data.shards import Prepared
from mindseed.data.toy import World, write_world
from mindseed.interop.directory import load_directory
from mindseed.models.lm import LM, build
from mindseed.models.presets import PRESETS
from mindseed.objectives.sft import SFT
from mindseed.optim.groups import OptimConfig
from mindseed.optim.schedule import ScheduleConfig
from mindseed.recipes import prepare
from mindseed.recipes import rl as rl_recipe
from mindseed.recipes import train as train_recipe
from mindseed.recipes.grade import grade
from mindseed.recipes.machine import choose_device
from mindseed.recipes.options import DataOptions, LoopOptions, ModelOptions, TrainOptions
from mindseed.recipes.post_options import DPOOptions
from mindseed.recipes.report import write_report
from mindseed.recipes.rl_options import PromptOptions, RLLoop, RLOptions, SamplingOptions, StartOptions
from mindseed.recipes.run_folder import commit
from mindseed.tasks.toy import ToyTask
from mindseed.tokenizers import bpe_train
from mindseed.tokenizers.chat import normalise, render
from mindseed.tokenizers.hf_json import load_tokenizer, save_tokenizer
from mindseed.train.loop import Interrupted
from mindseed.train.native import NativeBackend
from mindseed.train.validate import evaluate

VOCAB, CONTEXT = 1216, 384
STAGES = [{"name": str, "seconds": float, "exact_match": float, "families": {str: float}, "bits_per_byte": float}]
DETAILS = {"options": {"seed": int, "scale": float}, "timings?": {str: float}, "runs?": {str: str},
           "answers?": [{"stage": str, "family": str, "question": str, "score": float}]}


@dataclass(frozen=True, kw_only=True)
class Options:
    out: str = option("runs/demo", help="folder for everything the demo makes")
    seed: int = option(0, help="another seed grows another world, other weights and other questions")
    scale: float = option(1.0, help="share of the texts, conversations and steps; 0.02 only shows that it runs")
    device: str = option("auto", help="cpu, cuda, cuda:1, mps; auto: the GPU if there is one")


@dataclass
class Demo:
    """The state of a demo: what is measured so far, kept on disk after every stage."""

    options: Options
    folder: Path
    stages: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def done(self, name: str) -> bool:
        return any(stage["name"] == name for stage in self.stages)

    def save(self) -> None:
        write_json(self.folder / "details.json", self.details)
        write_json(self.folder / "summary.json", self.stages)


def main(options: Options) -> int:
    if not 0 < options.scale <= 10:
        raise UserError(f"scale={options.scale} must be above 0 and at most 10")
    device, demo = choose_device(options.device), open_demo(options)
    try:
        grow(demo, device)
    except Interrupted as stop:
        say(f"{stop}. Give the same command again to go on")
        return 130
    say(f"\nreport     {write_report(demo.folder)}")
    rows = {family: [f"{s['families'][family]:.0f}" for s in demo.stages] for family in demo.stages[0]["families"]}
    rows |= {"overall": [f"{s['exact_match']:.1f}" for s in demo.stages],
             "bits per byte": [f"{s['bits_per_byte']:.3f}" for s in demo.stages],
             "time": [duration(s["seconds"]) for s in demo.stages]}
    table("held-out questions answered right, %", ["", *(s["name"] for s in demo.stages)],
          [[name, *values] for name, values in rows.items()])
    model, ask = demo.folder / demo.stages[-1]["name"] / "model", to_ask(demo.details["answers"])
    say("\nTalk to the model you have grown. It knows its small world only" + (", so ask it, say:" if ask else "."))
    say("\n".join(f"    {question}" for question in ask) + f"\n\n    {command()} chat {model}\n")
    say("In the browser: make studio. Behind OpenAI's API: make serve\n")
    return 0


def to_ask(answers: list[dict[str, Any]]) -> list[str]:
    """A short held-out question of each family and language that it answered right."""
    best: dict[tuple[str, bool], str] = {}
    for answer in answers:
        question, kind = answer["question"], (answer["family"], answer["question"].isascii())
        if answer["score"] == 1 and answer["family"] in ("facts", "arithmetic", "translation", "told"):
            best[kind] = min(best.get(kind, question), question, key=len)
    return list(best.values())


def grow(demo: Demo, device: torch.device) -> None:
    """All stages, each skipped when an earlier call finished it."""
    options, folder = demo.options, demo.folder
    with timed(demo, "world"):
        if not (folder / "world" / "heldout.jsonl").exists():
            write_world(folder / "world", options.seed, options.scale)
    with timed(demo, "tokenizer"):
        tokenizer = make_tokenizer(demo)
    judge = Judge(demo, tokenizer, device)
    if not demo.done("untrained"):
        config = PRESETS["toy"].lm_config(vocab_size=tokenizer.vocab_size, seq_len=CONTEXT)
        judge(build(config, seed=options.seed, device=device), "untrained", 0.0)
    for name, options_of in (("pretrain", pretraining), ("fine-tune", fine_tuning), ("dpo", preferring),
                             ("grpo", reinforcing)):
        if demo.done(name):
            continue
        say(f"\n--- {name}")
        start, stage = time.monotonic(), options_of(options, folder)
        directory = (rl_recipe if isinstance(stage, RLOptions) else train_recipe).train(stage, device)
        judge(load_directory(directory, device=device).model, name, time.monotonic() - start)


def pretraining(options: Options, folder: Path) -> TrainOptions:
    return TrainOptions(
        out=str(folder / "pretrain"), resume="auto", seed=options.seed, device=options.device,
        model=ModelOptions(preset="toy"),
        data=DataOptions(train=(str(folder / "world" / "pretrain.jsonl"),), tokenizer=str(folder / "tokenizer"),
                         seq_len=CONTEXT, heldout=0.02),
        optim=OptimConfig(lr=1e-2, weight_decay=0.05),
        schedule=ScheduleConfig(kind="wsd", warmup_steps=20, decay=0.2, final=0.3),
        loop=LoopOptions(steps=scaled(220, options), batch=8, validate_documents=100, sample_every=0,
                         validate_every=scaled(50, options)))


def fine_tuning(options: Options, folder: Path) -> TrainOptions:
    base = pretraining(options, folder)
    return replace(
        base, out=str(folder / "fine-tune"), model=ModelOptions(start=str(folder / "pretrain" / "model")),
        data=replace(base.data, train=(str(folder / "world" / "conversations.jsonl"),
                                       str(folder / "pretrain" / "data" / "0-pretrain")), weights=(0.8, 0.2)),
        schedule=ScheduleConfig(kind="linear", warmup_steps=20, final=0.02),
        loop=replace(base.loop, steps=scaled(360, options)))


def preferring(options: Options, folder: Path) -> TrainOptions:
    """Pairs of answers, a right one and one that is false or repeats itself."""
    return TrainOptions(
        out=str(folder / "dpo"), resume="auto", seed=options.seed, device=options.device, method="dpo",
        dpo=DPOOptions(beta=0.5, sft=0.5),
        model=ModelOptions(start=str(folder / "fine-tune" / "model")),
        data=DataOptions(train=(str(folder / "world" / "preferences.jsonl"),), seq_len=CONTEXT // 2, heldout=0.05),
        optim=OptimConfig(kind="adamw", lr=5e-5, weight_decay=0.0),
        schedule=ScheduleConfig(kind="linear", warmup_steps=5),
        loop=LoopOptions(steps=scaled(40, options), batch=32, micro_batch=16, sample_every=0,
                         validate_every=scaled(20, options)))


def reinforcing(options: Options, folder: Path) -> RLOptions:
    """Its own answers to problems, told right from wrong."""
    return RLOptions(
        out=str(folder / "grpo"), resume="auto", seed=options.seed, device=options.device,
        model=StartOptions(start=str(folder / "dpo" / "model")),
        data=PromptOptions(train=(str(folder / "world" / "problems.jsonl"),), limit=60),
        rollout=SamplingOptions(prompts=32, answers=8, max_new=96),
        optim=OptimConfig(kind="adamw", lr=2e-4, weight_decay=0.0),
        schedule=ScheduleConfig(kind="linear", warmup_steps=5),
        loop=RLLoop(steps=scaled(30, options), micro_batch=64, sample_every=0, validate_every=scaled(15, options)))


def scaled(steps: int, options: Options) -> int:
    return max(2, round(steps * options.scale))


class Judge:
    """Grades a model on the held-out questions, and measures its bits per byte on held-out text."""

    def __init__(self, demo: Demo, tokenizer: Tokenizer, device: torch.device) -> None:
        self.demo, self.tokenizer, self.device = demo, tokenizer, device
        self.task = ToyTask(World(demo.options.seed))

    def __call__(self, model: LM, name: str, seconds: float) -> None:
        start = time.monotonic()
        scores, answers = grade(model, self.tokenizer, self.task)
        bits = self.bits_per_byte(model)
        demo = self.demo
        demo.stages.append({"name": name, "seconds": round(seconds, 1), "exact_match": scores["overall"],
                            "families": scores["families"], "bits_per_byte": round(bits, 4)})
        demo.details["answers"] = demo.details.get("answers", []) + [{"stage": name, **a} for a in answers]
        demo.details["model"] = {"parameters": sum(p.numel() for p in model.parameters()),
                                 "layers": len(model.config.layers), "dim": model.config.dim}
        demo.details["timings"][f"grading ({name})"] = round(time.monotonic() - start, 1)
        if seconds:
            demo.details["runs"][name] = f"{name}/log.jsonl"
        demo.save()
        say(f"{name}: {scores['overall']:.1f}% of the held-out questions right, "
            f"{bits:.3f} bits per byte of unseen text")

    def bits_per_byte(self, model: LM) -> float:
        """On the pretraining texts set apart; they are prepared here if the first stage has not done it yet."""
        options = pretraining(self.demo.options, self.demo.folder)
        out = self.demo.folder / "pretrain" / "data" / "0-pretrain"
        if not (out / "manifest.json").exists():
            prepare.main(prepare.Options(paths=options.data.train, out=str(out), tokenizer=options.data.tokenizer,
                                         heldout=options.data.heldout))
        documents = Evaluation(Prepared(out).split("heldout"), seq_len=CONTEXT, batch_size=16, limit=300)
        backend = NativeBackend(model.eval(), SFT(), [])
        return evaluate(backend, documents, raw_bytes=documents.bytes)["bits_per_byte"]


def make_tokenizer(demo: Demo) -> Tokenizer:
    """A byte-level BPE of the world's texts and conversations; its compression by language goes into the details."""
    folder, world = demo.folder / "tokenizer", demo.folder / "world"
    if not folder.exists():
        paths = [world / "pretrain.jsonl", world / "conversations.jsonl"]
        with notes.status("training the tokenizer"):
            texts = (text for row in read_rows(paths) for text in as_trained_on(row.row))
            made = bpe_train.train(texts, vocab_size=VOCAB)
        save_tokenizer(made, folder, max_len=CONTEXT)
    tokenizer = load_tokenizer(folder)
    texts: dict[str, list[str]] = {"en": [], "zh": []}
    for row in World(demo.options.seed).pretrain(400):
        chinese = sum(ord(c) > 0x2E80 for c in row["text"]) > len(row["text"]) / 3
        texts["zh" if chinese else "en"].append(row["text"])
    demo.details["tokenizer"] = {"vocab_size": tokenizer.vocab_size, "bytes_per_token": {
        lang: round(sum(len(t.encode()) for t in some) / sum(len(ids) for ids in tokenizer.encode_batch(some)), 2)
        for lang, some in texts.items()}}
    return tokenizer


def as_trained_on(row: dict) -> list[str]:
    """The texts of a row as the model will meet them: a conversation with its markup, tools and calls."""
    if "conversations" not in row:
        return list(row_texts(row))
    messages, tools = normalise(row)
    return [span.text for span in render(messages, tools=tools) if not span.control]


def open_demo(options: Options) -> Demo:
    """A new demo, or one that was stopped; one that was made with other options is left alone."""
    folder = Path(options.out)
    demo = Demo(options=options, folder=folder)
    if (folder / "details.json").exists():
        remedy = f"choose another folder with --out, or delete {folder}"
        demo.details = read_json(folder / "details.json", DETAILS, remedy=remedy)
        if (folder / "summary.json").exists():        # it is written after the details
            demo.stages = read_json(folder / "summary.json", STAGES, remedy=remedy)
        then, now = demo.details["options"], to_dict(options)
        different = [f"{key} was {then[key]}, is {now[key]}" for key in ("seed", "scale") if then[key] != now[key]]
        if different:
            raise UserError(f"{folder} holds a demo with other options ({'; '.join(different)}); "
                            f"choose another folder with --out, or delete that one")
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no demo; choose another folder with --out")
    demo.details |= {"machine": describe_machine(), "command": shlex.join(["mindseed", *sys.argv[1:]]),
                     "program": command(),
                     "version": __version__, "commit": commit(), "options": to_dict(options)}
    demo.details.setdefault("timings", {})
    demo.details.setdefault("runs", {})
    demo.save()
    return demo


class timed:
    """`with timed(demo, "world")`: the seconds of a block that did something, into the details."""

    def __init__(self, demo: Demo, name: str) -> None:
        self.demo, self.name = demo, name

    def __enter__(self) -> None:
        self.start = time.monotonic()

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.demo.details["timings"].setdefault(self.name, round(time.monotonic() - self.start, 1))


def command() -> str:
    """How the user calls us: the script beside this Python, if `mindseed` alone would not be found."""
    script = Path(sys.executable).with_name("mindseed")
    found = shutil.which("mindseed")
    if found and Path(found).resolve() == script.resolve():
        return "mindseed"
    if script.exists():
        return str(script.relative_to(Path.cwd())) if script.is_relative_to(Path.cwd()) else str(script)
    return f"{sys.executable} -m mindseed"
