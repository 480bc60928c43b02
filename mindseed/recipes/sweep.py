"""Many small runs that differ in size and budget: planned before the first, resumed where they broke, one line each.

Loss at a budget is the loss of a run whose learning rate has come down by then, so a long run's loss on its way says
nothing of a short one. With the schedule warm-up, stable, decay, runs of one size share all but their ends
(2404.06395): the *trunk* is trained at the full rate; where a budget's decay would begin its state is saved, the
*branch* decays and is measured, and the trunk goes on from what was saved. A branch is, bit for bit, the run trained
alone.

A finished run is a line of runs.jsonl and is never trained again. Whatever is interrupted goes on with the same
command: from its last checkpoint, of the trunk or of the branch.
"""
from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Iterable

import torch

from mindseed.base import config as base_config
from mindseed.base.errors import UserError
from mindseed.base.files import misfit, parse_json, read_json, read_text, write_json, write_text
from mindseed.base.log import StepBar, si
from mindseed.data.loader import RowSource
from mindseed.models.config import LMConfig, config_to_dict
from mindseed.models.lm import build
from mindseed.models.presets import Shape, shape_of_depth
from mindseed.objectives.sft import SFT
from mindseed.optim.groups import OptimConfig, build_optimizers, parameter_groups
from mindseed.optim.schedule import ScheduleConfig, learning_rate
from mindseed.plan.flops import flops_per_token
from mindseed.plan.params import Params, count_params
from mindseed.recipes.options import TrainOptions, derive
from mindseed.recipes.training_data import Data
from mindseed.train.balance import Balance
from mindseed.train.loop import Interrupted, Signals
from mindseed.train.native import NativeBackend, NonFinite
from mindseed.train.state import Checkpoints, restore
from mindseed.train.step import Run, train_step
from mindseed.train.validate import evaluate

ROW = {"run": str, "size": str, "params": int, "non_embedding": int, "tokens": int, "loss": float,
       "bits_per_byte": float, "flops": float, "lr": float, "batch": int, "steps": int, "seconds": float}


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One run before it begins."""

    size: str
    budget: float                # tokens asked for
    config: LMConfig
    lr: float
    batch: int                   # rows of a step
    micro_batch: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.size}-{si(self.budget)}"

    @property
    def count(self) -> Params:
        return count_params(self.config)

    @property
    def non_embedding(self) -> int:
        return self.count.total - self.count.embedding - self.count.head

    @property
    def tokens(self) -> int:
        """Slots of all steps; what rows are not filled with counts for nothing once it runs."""
        return self.steps * self.batch * self.config.seq_len

    @property
    def flops_per_token(self) -> float:
        return flops_per_token(self.config, self.config.seq_len).model


def shape_of(size: str) -> Shape:
    """`4x128` is 4 layers of width 128, with heads of 32 (of 64 from a width of 256 on) and the proportions of the
    dial; `4` alone is the dial at depth 4."""
    layers, _, dim = size.partition("x")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", size):
        raise UserError(f"size {size!r} is neither LAYERSxWIDTH, such as 4x128, nor a depth, such as 4")
    if not dim:
        return shape_of_depth(int(layers))
    width, wide = int(dim), 64 if int(dim) >= 256 else 32
    if width % wide:
        raise UserError(f"size {size}: the width must be a multiple of {wide}, the width of a head")
    heads = width // wide
    return replace(shape_of_depth(1), layers=int(layers), dim=width, heads=heads, head_dim=wide,
                   kv_heads=heads // 2 if heads % 2 == 0 else heads, ffn_dim=-(-8 * width // 3 // 64) * 64)


def plan_line(size: str, budgets: Iterable[float], options: TrainOptions, *, vocab_size: int) -> list[Planned]:
    """The runs of one size that share a trunk: one batch and one rate, those that `mindseed train` derives for the
    budget in their (geometric) middle."""
    budgets = sorted(budgets)
    config = shape_of(size).lm_config(vocab_size=vocab_size, seq_len=options.data.seq_len)
    middle = math.exp(sum(map(math.log, budgets)) / len(budgets))
    derived = derive(options, params=count_params(config).active, rows_per_epoch=None, tokens=middle)
    batch = derived.loop.batch
    return [Planned(size=size, budget=budget, config=config, lr=derived.optim.lr, batch=batch,
                    micro_batch=derived.loop.micro_batch, steps=max(1, math.ceil(budget / (batch * config.seq_len))))
            for budget in budgets]


def problems(lines: list[list[Planned]], schedule: ScheduleConfig) -> list[str]:
    """What would spoil the sweep, all at once."""
    names = Counter(p.name for line in lines for p in line)
    found = [f"{name} is planned {n} times; name a size once, and take budgets further apart"
             for name, n in names.items() if n > 1]
    for line in lines:
        short = [p for p in line if len(line) > 1 and p.steps < 2 * schedule.warmup_steps]
        found += [f"{p.name} has {p.steps} steps, fewer than twice schedule.warmup_steps={schedule.warmup_steps}, so "
                  "it cannot share the warm-up of longer ones; give more tokens, a smaller batch, or fewer "
                  "schedule.warmup_steps" for p in short]
        steps = [p.steps for p in line]
        if len(set(steps)) < len(steps):
            found.append(f"budgets of {line[0].size} take the same number of steps; take budgets further apart")
    return found


@dataclass(kw_only=True)
class Sweep:
    """Where the sweep stands. `rows` are its finished runs by name."""

    out: Path
    data: Data
    device: torch.device
    precision: str
    seed: int
    optim: OptimConfig
    schedule: ScheduleConfig
    save_s: float
    bar: StepBar | None = None                    # while it runs
    signals: Signals | None = None
    done_flops: float = 0.0
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    saved: float = field(default_factory=time.monotonic)      # when a checkpoint was written last,
    since: float = field(default_factory=time.monotonic)      # and when a run ended

    @property
    def table(self) -> Path:
        return self.out / "runs.jsonl"

    def read(self, planned: list[Planned]) -> None:
        """The finished runs of the table; UserError for one that was trained otherwise than it is planned now."""
        if not self.table.exists():
            return
        plans = {p.name: p for p in planned}
        whole = read_text(self.table).rpartition("\n")[0]                         # a kill may have left half a line
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = parse_json(line)
                problem = misfit(row, ROW)
            except ValueError as error:
                problem = str(error)
            if problem:
                raise UserError(f"{self.table}:{number} is damaged ({problem}); delete that line")
            self.rows[row["run"]] = row
            if (p := plans.get(row["run"])) is None:
                continue
            now = {"params": p.count.total, "lr": p.lr, "batch": p.batch, "steps": p.steps}
            if other := [f"{key} {row[key]} then, {value} now" for key, value in now.items() if row[key] != value]:
                raise UserError(f"{row['run']} was trained otherwise ({', '.join(other)}); choose another --out, or "
                                f"delete its line in {self.table} to train it anew")

    def left(self, lines: list[list[Planned]]) -> float:
        """FLOPs that are still to be spent: of every line its trunk up to the last fork, and the branches."""
        total = 0.0
        for line in lines:
            todo = [p for p in line if p.name not in self.rows]
            steps, start = 0, 0
            for p in todo:
                steps, start = steps + p.steps - start, self.fork(line, p)
            if todo:
                total += steps * todo[0].tokens / todo[0].steps * todo[0].flops_per_token
        return total

    # ---------------------------------------------------------------------------------------------------- one line

    def train_line(self, line: list[Planned]) -> None:
        """All runs of a line that are not finished. Raises Interrupted after a signal, with everything saved."""
        todo = [p for p in line if p.name not in self.rows]
        if not todo:
            return
        work = self.out / "work" / (line[0].size if len(line) > 1 else line[0].name)
        run = self.begin(line[0])
        trunk = self.checkpoints(work / "trunk", line[0])
        newest = trunk.newest()
        if newest and newest[1]["step"] <= self.fork(line, todo[0]):
            self.go_on(run, todo[0], newest[1])
        elif newest:                              # a shorter run was asked for since
            shutil.rmtree(trunk.folder)
        for planned in todo:
            run.schedule = learning_rate(self.schedule, peak=planned.lr, steps=planned.steps)
            branch, fork = self.checkpoints(work / planned.name, planned), self.fork(line, planned)
            halfway = branch.newest()
            if halfway and (planned is todo[-1] or trunk.holds(fork)):
                self.go_on(run, planned, halfway[1])
            else:
                self.advance(run, planned, fork, trunk)
                if planned is not todo[-1]:
                    trunk.save(run, None)         # where the longer ones will go on
            self.advance(run, planned, planned.steps, branch)
            self.finish(run, planned)
            shutil.rmtree(work / planned.name, ignore_errors=True)
            if planned is not todo[-1]:
                restore(run, None, trunk.newest()[1])
        shutil.rmtree(work, ignore_errors=True)

    def begin(self, planned: Planned) -> Run:
        """A run before its first step: the same as `mindseed train` would begin."""
        model = build(planned.config, seed=self.seed, device=self.device).train()
        optim = replace(self.optim, lr=planned.lr)
        backend = NativeBackend(model, SFT(), build_optimizers(parameter_groups(model, optim), optim),
                                precision=self.precision, max_norm=optim.max_norm)
        torch.manual_seed(self.seed)
        return Run(RowSource(self.data.rows, batch_size=planned.micro_batch), SFT(), backend,
                   schedule=lambda step: 0.0, device=self.device, balance=Balance(model),
                   accumulate=planned.batch // planned.micro_batch)

    def go_on(self, run: Run, planned: Planned, saved: dict[str, Any]) -> None:
        """From a checkpoint further on the way: what it took to get there is spent already."""
        self.done_flops += (saved["step"] - run.step) * planned.tokens / planned.steps * planned.flops_per_token
        restore(run, None, saved)

    def fork(self, line: list[Planned], planned: Planned) -> int:
        """The step from which the rate of a run falls: until there, longer ones do the same. A run that shares nothing
        is all trunk."""
        rate, step = learning_rate(self.schedule, peak=1.0, steps=planned.steps), planned.steps
        while len(line) > 1 and step > 0 and rate(step - 1) < 1.0:
            step -= 1
        return step

    def checkpoints(self, folder: Path, planned: Planned) -> Checkpoints:
        return Checkpoints(folder, keep=1, fingerprints={
            "model": config_to_dict(planned.config), "tokenizer": self.data.tokenizer.hash(),
            "data": self.data.rows.identity(), "lr": planned.lr, "batch": planned.batch})

    def advance(self, run: Run, planned: Planned, until: int, checkpoints: Checkpoints) -> None:
        """Steps until `until` are done, saving now and then, and at once before it stops on a signal."""
        flops = planned.flops_per_token
        while run.step < until:
            start = time.monotonic()
            try:
                values = train_step(run)
            except NonFinite as error:
                raise UserError(f"{planned.name}, step {run.step}: {error}; lower optim.lr in another --out, or leave "
                                "this size out and give the command again") from None
            now = time.monotonic()
            self.done_flops += run.tokens_per_step * flops
            self.bar.update(round(self.done_flops / 1e9), {
                "loss": values["loss"], "tokens_per_s": run.tokens_per_step / (now - start), "lr": values["lr"],
                "run": planned.name, "step": f"{run.step}/{planned.steps}"})
            if self.signals.received and run.step < planned.steps:
                checkpoints.save(run, None)
                raise Interrupted(f"stopped in {planned.name} after step {run.step} of {planned.steps}; "
                                  f"{len(self.rows)} runs are finished")
            if now - self.saved > self.save_s and run.step < until:
                checkpoints.save(run, None)
                self.saved = now

    def finish(self, run: Run, planned: Planned) -> None:
        """Measure on the held-out text, and write the line that says it is finished. Its seconds are those since the
        line before, so that they add up."""
        result = judge(run.backend, self.data.heldout.values())
        row = {"run": planned.name, "size": planned.size, "params": planned.count.total,
               "non_embedding": planned.non_embedding, "tokens": run.tokens, **result,
               "flops": float(f"{planned.flops_per_token * run.tokens:.6g}"), "lr": planned.lr, "batch": planned.batch,
               "steps": planned.steps, "seconds": round(time.monotonic() - self.since, 1)}
        self.since = time.monotonic()
        before = read_text(self.table).rpartition("\n")[0] if self.table.exists() else ""
        write_text(self.table, f"{before}\n{json.dumps(row)}\n".lstrip())
        self.rows[planned.name] = row
        self.bar.say(f"  {planned.name}: {row['loss']:.4f} nats a token, {row['bits_per_byte']:.4f} bits per byte")

    def train(self, lines: list[list[Planned]], total: float) -> None:
        """Every line, smallest first, under one bar that counts GFLOPs: `total` is what all phases together take."""
        with Signals() as self.signals, StepBar(round(total / 1e9), start=round(self.done_flops / 1e9), every_s=30,
                                                unit="GFLOP") as self.bar:
            for line in lines:
                self.train_line(line)
        with contextlib.suppress(OSError):        # empty now, or another phase's
            (self.out / "work").rmdir()


def judge(backend: NativeBackend, heldout: Iterable[Any]) -> dict[str, float]:
    """Nats per token and bits per byte over all held-out documents, as `mindseed train` measures them."""
    backend.model.eval()
    nats = tokens = raw = 0.0
    for documents in heldout:
        result = evaluate(backend, documents, raw_bytes=documents.bytes)
        here = result["bits_per_byte"] * documents.bytes * math.log(2)
        nats, tokens, raw = nats + here, tokens + here / result["nll"], raw + documents.bytes
    backend.model.train()
    return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / raw}


def same_sweep(out: Path, decides: dict[str, Any], data: Data | None = None) -> None:
    """Note what decides the results of the sweep in `out`; UserError if it was begun with something else."""
    path = out / "sweep.json"
    now = json.loads(json.dumps(base_config.to_dict(decides)))
    if data is not None:
        now |= {"tokenizer": data.tokenizer.hash(), "identity": json.loads(json.dumps(data.rows.identity()))}
    then = read_json(path, {str: Any}) if path.exists() else {}
    changed = base_config.diff({k: v for k, v in then.items() if k in now}, now) if then else {}
    changed = {name: pair for name, pair in changed.items() if name.partition(".")[0] in then}
    if changed:
        raise UserError(f"{out} holds a sweep that was begun otherwise ("
                        + "; ".join(f"{name}: {a} then, {b} now" for name, (a, b) in changed.items())
                        + "); give its options to go on, or choose another --out")
    write_json(path, then | now)

