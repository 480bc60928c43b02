"""Steps until the end: log, validate, sample, save; stop cleanly when asked to, and never lose a good checkpoint.

`fit` knows no algorithm. What happens every so many steps is a list of hooks, so a recipe adds its own (samples,
a graded task) without the loop knowing. SIGTERM and Ctrl-C finish the step, save and return; a second Ctrl-C does
not wait.
"""
from __future__ import annotations

import contextlib
import signal
import time
from dataclasses import dataclass, field
from typing import Any, Callable

import torch

from mindseed.base import dist
from mindseed.base.errors import UserError
from mindseed.base.hardware import peak_memory
from mindseed.base.log import Sink, StepBar
from mindseed.optim.ema import EMA
from mindseed.train.native import NonFinite
from mindseed.train.state import Checkpoints
from mindseed.train.step import Run, next_batches, train_step


@dataclass(kw_only=True)
class Hook:
    """`call(step)` after every `every` steps and after the last one; what it returns is logged. 0: never."""

    every: int
    call: Callable[[int], dict[str, Any]]
    before_first: bool = False                    # also before the first step


@dataclass(kw_only=True)
class Fit:
    """How long to train and what to do on the way."""

    run: Run
    steps: int
    checkpoints: Checkpoints | None = None
    save_every: int = 0                           # 0: only at the end
    ema: EMA | None = None
    hooks: list[Hook] = field(default_factory=list)
    sinks: list[Sink] = field(default_factory=list)
    flops_per_token: float = 0.0                  # forward and backward, for model FLOPs utilisation
    peak_flops: float = 0.0                       # of all devices together
    score: str = "bits_per_byte"                  # the logged value by which the best checkpoint is chosen,
    highest: bool = False                         # where it is lowest, or highest
    last: dict[str, Any] = field(default_factory=dict)


class Interrupted(Exception):
    """The run was asked to stop, and saved itself."""


def fit(plan: Fit) -> dict[str, Any]:
    """Train from `run.step` to `steps`. Returns the last values logged.

    Raises Interrupted after a signal (the checkpoint is written), UserError when the numbers stop being finite.
    """
    run, began = plan.run, time.monotonic()
    with Signals() as signals, StepBar(plan.steps, start=run.step, enabled=dist.is_main()) as bar:
        if run.step == 0:
            record(plan, run_hooks(plan, bar, [h for h in plan.hooks if h.every and h.before_first]))
        while run.step < plan.steps:
            start = time.monotonic()
            try:
                values = train_step(run)
            except NonFinite as error:
                raise UserError(stop_message(plan, error)) from None
            except UserError as error:            # of the data, a reward, a rollout
                raise kept(plan, error) from None
            spent = time.monotonic() - start
            values = speed(plan, values, spent) | {"elapsed_s": round(time.monotonic() - began, 3)}
            bar.update(run.step, values)
            done = run.step == plan.steps
            due = [h for h in plan.hooks if h.every and (done or run.step % h.every == 0)]
            try:
                values |= run_hooks(plan, bar, due)
            except UserError as error:
                raise kept(plan, error) from None
            record(plan, values)
            stop = dist.any_rank(signals.received, run.device)
            if plan.checkpoints and (done or stop or plan.save_every and run.step % plan.save_every == 0):
                score = values.get(plan.score)
                path = plan.checkpoints.save(run, plan.ema, score=-score if score and plan.highest else score)
                if stop and not done:
                    plan.checkpoints.wait()
                    raise Interrupted(f"stopped after step {run.step} of {plan.steps}; saved {path}")
    if plan.checkpoints:
        plan.checkpoints.wait()
    return plan.last


def kept(plan: Fit, error: UserError) -> UserError:
    """The error, after what has been learnt so far is saved, if it is not yet. Saving takes all ranks, and this may be
    the only one that has failed: then what was begun is finished, and the others are told (base/watch.py)."""
    if not plan.checkpoints or plan.run.step == 0:
        return error
    if dist.world_size() > 1:
        plan.checkpoints.wait()
        newest = plan.checkpoints.found()[-1:]
        return UserError(f"{error}\nThe same command with --resume goes on from {newest[0]}") if newest else error
    if plan.checkpoints.holds(plan.run.step):
        return error
    where = plan.checkpoints.save(plan.run, plan.ema)
    plan.checkpoints.wait()
    return UserError(f"{error}\nWhat was learnt in {plan.run.step} steps is saved in {where}")


def run_hooks(plan: Fit, bar: StepBar, hooks: list[Hook]) -> dict[str, Any]:
    """Call hooks with dropout off; a string among their values is printed, the rest is logged."""
    if not hooks:
        return {}
    model = plan.run.backend.model
    model.eval()
    out: dict[str, Any] = {}
    for hook in hooks:
        out |= hook.call(plan.run.step)
    model.train()
    figures = [f"{key} {value:.4f}" for key, value in out.items() if isinstance(value, float)]
    if figures:
        bar.say(f"  step {plan.run.step}  {'  '.join(figures)}")
    for key, value in out.items():
        if isinstance(value, str):
            bar.say(f"  {key}: {value}")
    return out


def record(plan: Fit, values: dict[str, Any]) -> None:
    plan.last |= values
    if dist.is_main() and values:
        for sink in plan.sinks:
            sink.write(plan.run.step, values)


def speed(plan: Fit, values: dict[str, float], spent_s: float) -> dict[str, Any]:
    """Add tokens per second over all ranks, utilisation of the peak, and memory."""
    out: dict[str, Any] = dict(values)
    rows = plan.run.tokens_per_step
    out["tokens_per_s"] = rows / spent_s
    if plan.flops_per_token and plan.peak_flops:
        out["mfu"] = plan.flops_per_token * rows / spent_s / plan.peak_flops
    out["memory_bytes"] = peak_memory(plan.run.device)
    if getattr(plan.run.backend, "skipped", 0):
        out["skipped"] = plan.run.backend.skipped
    return out


def stop_message(plan: Fit, error: NonFinite) -> str:
    if plan.checkpoints:
        with contextlib.suppress(UserError):      # of the one that is being written
            plan.checkpoints.wait()
    newest = plan.checkpoints.found()[-1:] if plan.checkpoints else []
    kept = f"the last good checkpoint is {newest[0]}" if newest else "no checkpoint had been written"
    wide = getattr(plan.run.backend, "precision", "") == "fp32"
    return (f"step {plan.run.step}: {error}.\nNothing was updated; {kept}"
            + (", from which --resume goes on" if newest else "") + ". Lower optim.lr, or look at the samples with "
            "show-batch" + ("." if wide else "; loop.precision=fp32 shows whether it is the precision."))


class Signals:
    """SIGTERM and Ctrl-C set a flag; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self.before[number] = signal.signal(number, self.handle)
            except ValueError:                    # not in the main thread: leave signals to whoever owns them
                pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, _frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True


def steps_for_minutes(run: Run, minutes: float, *, trials: int = 3) -> int:
    """How many steps fit into `minutes`, from timing a few at a learning rate of 0, before the first step. They leave
    no trace: the stream, the random state and what the optimisers remember are put back."""
    stream, random, backend = run.source.state_dict(), torch.get_rng_state(), run.backend.state_dict()
    times = []
    for _ in range(trials + 1):
        start = time.monotonic()
        batches = next_batches(run)
        scale = 1 / torch.stack([run.objective.count(b) for b in batches]).sum().clamp_min(1)
        for i, batch in enumerate(batches):
            run.backend.forward_backward(batch, scale=scale, last=i == run.accumulate - 1)
        with contextlib.suppress(NonFinite):      # the run itself will say which samples caused it
            run.backend.step(0.0)
        times.append(time.monotonic() - start)
    run.backend.load_state_dict(backend)
    if run.balance:
        run.balance.forget()
    run.source.load_state_dict(stream)
    torch.set_rng_state(random)
    slowest = max(dist.gather(sorted(times[1:])[trials // 2]))
    return max(1, int(60 * minutes / (slowest * 1.25)))         # a quarter for validation, samples and saving
