"""The folder of a training run: what it was told, what came of that, and going on with it.

    given.toml     the options as they were given: preset and flags
    config.toml    the same with everything derived from them and measured: the run can be repeated from it alone
    run.json       command, version, commit, machine
    log.jsonl      the figures of every step
    checkpoints/   see mindseed/train/state.py

To go on, the options given then lie beneath those given now, and what was derived is derived anew: a run made longer
is validated at other intervals, on other ranks its batch is cut otherwise. What decides the result and was not given
(batch and learning rate, the precision, the steps measured for loop.minutes) stays what it was.
"""
from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Iterator, TypeVar

import torch

from mindseed import __version__
from mindseed.base import config as base_config
from mindseed.base import dist
from mindseed.base.errors import UserError
from mindseed.base.files import locked, make_folder, read_json, write_json, write_text
from mindseed.base.hardware import describe_machine
from mindseed.base.log import open_sinks, read_jsonl, say, warn
from mindseed.optim.schedule import learning_rate
from mindseed.recipes.launch import check_mesh
from mindseed.recipes.machine import choose_device
from mindseed.recipes.options import TrainOptions
from mindseed.recipes.rl_options import RLOptions
from mindseed.train.loop import Interrupted

AnyOptions = TypeVar("AnyOptions", TrainOptions, RLOptions)
OWN = {"config.toml", "given.toml", "run.json", "log.jsonl", "data", "tokenizer", "checkpoints", "model", "adapter"}
LONG = ("steps", "minutes", "epochs")             # the options that say how long to train


def options_of_run(options: AnyOptions) -> dict[str, Any] | None:
    """What the run to go on with was given: it holds where the command says nothing else."""
    folder = Path(options.out)
    if options.resume == "never" or not (folder / "config.toml").exists():
        return None
    then = given_to(folder, type(options))
    given = base_config.to_dict(then) | {"out": options.out}
    if problems := then.parallel.problems(world := dist.ranks_started()):
        given.pop("parallel")                     # a run goes on on any mesh
        if int(os.environ.get("RANK", 0)) == 0:
            warn(f"the mesh that {folder} was given does not suit {world} rank(s) ({problems[0]}), so it goes on "
                 "without; parallel.* ask for another")
    loop, usual = options.loop, TrainOptions().loop
    if isinstance(options, TrainOptions) and (any(getattr(loop, name) is not None for name in LONG)
                                              or loop.tokens_per_param != usual.tokens_per_param):
        given["loop"] |= dict.fromkeys(LONG)
    return given


def begun(folder: Path) -> bool:
    """Whether a run in `folder` has taken a step, or measured anything; before that it may as well start anew."""
    log, kept = folder / "log.jsonl", folder / "checkpoints"
    return log.exists() and log.stat().st_size > 0 or kept.is_dir()


def given_to(folder: Path, kind: type[AnyOptions] = TrainOptions) -> AnyOptions:
    """The options that the run in `folder` was given."""
    given = folder / "given.toml"
    return base_config.load_toml(kind, given if given.exists() else folder / "config.toml")


def resolved(folder: Path, kind: type[AnyOptions] = TrainOptions) -> AnyOptions:
    """The options of the run in `folder` with all that was derived. UserError if a derived one is missing."""
    options = base_config.load_toml(kind, folder / "config.toml")
    for name in ("optim.lr", "loop.steps", "loop.batch", "loop.save_every"):
        if base_config.flatten(options).get(name, "not an option") is None:
            raise UserError(f"{folder / 'config.toml'} has lost {name}; put it back as it was")
    return options


def claim(options: AnyOptions, folder: Path) -> AnyOptions:
    """Refuse to write over another run; on going on, fill in what the run keeps (see above)."""
    if begun(folder) and options.resume != "never" and not (folder / "config.toml").exists():
        raise UserError(f"{folder} holds a run and has lost its config.toml; put it back, or start anew with another "
                        "--out")
    if options.resume == "newest" and not (folder / "config.toml").exists():
        raise UserError(f"{folder} holds no run to resume; leave out --resume to start one")
    if options.resume == "never" and begun(folder):
        raise UserError(f"{folder} already holds a run; go on with it (--resume) or choose another folder (--out NAME)")
    if options.resume == "never" or not begun(folder):
        others = sorted(p.name for p in folder.glob("[!.]*") if p.name not in OWN) if folder.is_dir() else []
        if others and dist.is_main():
            warn(f"{folder} holds other things ({', '.join(others[:3])}{', ...' * (len(others) > 3)}), and the run is "
                 "written beside them; --out NAME names a folder of its own")
        return options
    saved, given, loop = resolved(folder, type(options)), given_to(folder, type(options)), options.loop
    if loop.precision == "auto":
        loop = replace(loop, precision=saved.loop.precision)
    if isinstance(options, TrainOptions):
        if loop.minutes is not None and loop.minutes == given.loop.minutes:
            loop = replace(loop, minutes=None, steps=saved.loop.steps)
        if loop.batch is None:
            loop = replace(loop, batch=saved.loop.batch)
        if options.data.seq_len is None:
            options = replace(options, data=replace(options.data, seq_len=saved.data.seq_len))
    then, now = saved.model.start, options.model.start
    other = (then and Path(then).resolve()) != (now and Path(now).resolve())
    if other and (then is None or now is None or Path(then).exists()):
        raise UserError(f"{folder} started from {then or 'random weights'}, not from {now or 'random weights'}; leave "
                        "out model.start to go on with it, or start another run with another --out")
    if now is not None and not Path(now).exists():
        raise UserError(f"{now}, the model that {folder} started from, is gone; put it back, or name the place that "
                        "it was moved to (--model.start PLACE)")
    rate = saved.optim.lr if options.optim.lr is None else options.optim.lr
    return replace(options, loop=loop, optim=replace(options.optim, lr=rate))


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to the run as long as this one lives."""
    if not dist.is_main():
        yield
        return
    made, about = not folder.exists(), {}
    with contextlib.suppress(UserError):          # it is only for the message
        about = read_json(folder / "run.json", {"process": int})
    busy = (f"{folder} is being written by another process (number {about.get('process', 'unknown')}); end it first, "
            "or choose another folder (--out NAME)")
    with locked(folder / ".lock", wait_s=0, busy=busy):
        try:
            yield
        finally:
            if made and [p.name for p in folder.iterdir()] == [".lock"]:         # refused before anything was written
                shutil.rmtree(folder)


def carried_out(options: AnyOptions, train: Callable[[AnyOptions, torch.device], Path]) -> int:
    """A run from the command line, on one process or on those of torchrun: its exit code."""
    check_mesh(options)
    device = choose_device(options.device)
    with dist.process_group(device):
        try:
            folder = train(options, device)
        except Interrupted as stop:
            if dist.is_main():
                say(f"{stop}. Give the same command with --resume to go on")
            return 130
        if dist.is_main():
            say(f"\nThe model is in {folder}. {next_step(options, shlex.quote(str(folder)))}\n")
    return 0


def next_step(options: AnyOptions, folder: str) -> str:
    """What one does with the model of such a run."""
    if getattr(options, "method", "") == "reward":
        return ("Reward a policy with it:\n\n    mindseed rl MODEL --data.train problems.jsonl --model.reward "
                f"{folder} --reward.model 0.5")
    if getattr(options, "method", "") == "process-reward":
        return "It scores the steps of an answer, as docs/POST_TRAINING.md shows."
    if getattr(options.data, "plain", ""):
        return asked_plainly(folder, options.rollout.stop)
    return f"Talk to it:\n\n    mindseed chat {folder}"


def asked_plainly(folder: str, stop: tuple[str, ...]) -> str:
    ends = f" --stop ${stop[0]!r}" if stop else ""
    return f"It goes on with plain text:\n\n    mindseed generate {folder} --mode text --prompt '...'{ends}"


def alone_in_its_folder(options: AnyOptions, device: torch.device, train_in: Callable[..., Path]) -> Path:
    """`train_in(folder, options with what the run keeps, options as given, device)`, while nobody else writes there."""
    claimed = claim(options, Path(options.out))
    with alone(Path(options.out)):
        return train_in(Path(options.out), claimed, options, device)


def say_changes(options: AnyOptions, folder: Path, step: int) -> None:
    """A line for every option that is not what it was, and for a learning rate that jumps at this step."""
    saved = resolved(folder, type(options))
    for name, (then, now) in base_config.diff(replace(saved, out=options.out, resume=options.resume), options).items():
        say(f"changed    {name}: {then} then, {now} now")
    then, now = (learning_rate(o.schedule, peak=o.optim.lr, steps=o.loop.steps)(min(step, o.loop.steps - 1))
                 for o in (saved, options))
    if abs(then - now) > 0.01 * max(then, now):
        say(f"changed    the learning rate at step {step}: {then:.3g} then, {now:.3g} now")


def open_run(options: AnyOptions, given: AnyOptions, resumed: Path | None) -> list:
    """Record what this run is, and open its log; on resuming, log lines after the checkpoint are taken back."""
    folder = make_folder(options.out)
    log = folder / "log.jsonl"
    if log.exists():
        step = int(resumed.name.split("-")[1]) if resumed else -1
        kept = [row for row in read_jsonl(log) if row["step"] <= step]
        write_text(log, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    sinks = open_sinks(options.trackers, folder, base_config.to_dict(options), folder.name)
    for name, said in (("given", given), ("config", options)):
        write_text(folder / f"{name}.toml", base_config.to_toml(replace(said, resume="never")))
    write_json(folder / "run.json", {
        "command": shlex.join(["mindseed", *sys.argv[1:]]), "version": __version__, "commit": commit(),
        "process": os.getpid(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "machine": describe_machine(),
        "world_size": dist.world_size()})
    return sinks


def commit() -> str | None:
    """The commit of the package's own checkout, with `+` if it has changes; None outside a checkout."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
