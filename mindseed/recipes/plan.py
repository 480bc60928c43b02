"""What a run would cost before its first step: parameters, arithmetic, memory, communication, time and money.

  mindseed plan --depth 8                          the dial
  mindseed plan configs/real-cpu.toml --loop.batch 64      the preset and flags of a `mindseed train` command
  mindseed plan llama3.1-8b --gpus 64 --hardware h100 --parallel.zero 3      before such machines are rented
  mindseed plan llama3.1-405b --gpus 16384 --hardware h100 --search      the best mesh of all that fit
  mindseed plan --depth 12 --lora.rank 8 --lora.nf4        fine-tuned by QLoRA: adapters beside a base in four bits
  mindseed plan --measure                          time this machine once, so that its plans are computed too

Parameters, cache and FLOPs are exact; memory agrees with measurements within a few percent. The time of a step is
computed from the data sheet and what devices attain of it, or from measurements of this machine; `--mfu` overrides it.
docs/PLANNING.md says what stands behind every figure, and how near plans came to published runs.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mindseed.base import dist
from mindseed.base.config import option, suggestion
from mindseed.base.errors import UserError
from mindseed.base.hardware import peak, total_memory
from mindseed.base.log import bytes_text, say, warn
from mindseed.data.shards import Prepared
from mindseed.models.config import LMConfig, untrainable
from mindseed.models.presets import PRESETS
from mindseed.models.splitting import splitting_problems
from mindseed.plan.flops import Flops, flops_per_token
from mindseed.plan.job import Job
from mindseed.plan.machines import Machine, machine
from mindseed.plan.measure import cache_path, load_machine, measure_machine, save_machine
from mindseed.plan.memory import memory_of
from mindseed.plan.params import count_params
from mindseed.plan.published import PUBLISHED, published
from mindseed.plan.search import ROOM, Plan, nearest, search
from mindseed.plan.time import step_time
from mindseed.recipes import plan_picture, plan_tables
from mindseed.recipes.launch import config_ahead, job_of, run_problems
from mindseed.recipes.machine import choose_device, choose_precision, warn_if_too_big
from mindseed.recipes.options import TrainOptions, derive, with_rows

ASSUMED_MFU = 0.4                                 # of a machine that is neither in the table nor measured


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions):
    name: str | None = option(None, positional=True, help="a preset of model.preset, a published model "
                                                          f"({', '.join(PUBLISHED)}), or a model directory")
    hardware: str | None = option(None, alias="gpu", help="plan for a device that is not here, by its name on the data "
                                                          "sheet: H100, A100, RTX 4090 ...")
    gpus: int | None = option(None, alias="world", help="number of devices [derived: 1]")
    node: int | None = option(None, help="devices of a node [derived: 8, as far as the table knows]")
    network: float | None = option(None, help="Gbit/s between nodes, for every device [derived: from the table]")
    mfu: float | None = option(None, help="share of the device's peak that training reaches [derived: from the time of "
                                          "every kernel and transfer]")
    tokens: float | None = option(None, help="tokens of the whole run [derived: as training would]")
    price: float | None = option(None, help="US dollars for an hour of a device [derived: an assumption]")
    search: bool = option(False, help="try every mesh, and show the best and why others do not fit")
    keep: int = option(5, help="with search: how many of the best are shown")
    measure: bool = option(False, help="time products, attention, memory and steps of this machine, and remember them")
    machine: str | None = option(None, help="file of such measurements [derived: in your cache folder]")
    picture: str | None = option(None, help="write a picture (png, svg, pdf) of memory and time: needs matplotlib")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise ValueError(f"mfu={self.mfu} must lie in (0, 1]")
        for name in ("gpus", "node", "keep"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("network", "tokens"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if self.tokens is not None and self.tokens > 1e18:
            raise ValueError(f"tokens={self.tokens:g} is more than any run can take")
        if self.price is not None and self.price < 0:
            raise ValueError(f"price={self.price} must not be negative")


def main(options: Options) -> None:
    if options.measure:
        return remember_machine(options)
    options, config = the_model(options)
    board, device = the_machine(options)
    world, params = options.gpus or dist.world_size(), count_params(config)
    job = the_job(options, config, board, device, world)
    flops = flops_per_token(config, job.seq_len, recompute=job.recompute)
    if options.search:
        return show_search(options, config, job, board, flops)
    if job.pieces > 1 and options.loop.micro_batch is None:  # a pipeline's micro-batch is cut into pieces
        options = replace(options, loop=replace(options.loop, micro_batch=job.rows))
    computed = computable(board, options)
    speed = tokens_per_s(options, config, job, board, flops)
    options = derive(options, params=params.active, rows_per_epoch=rows_per_epoch(options), world=job.sizes.data,
                     tokens=options.tokens or options.loop.minutes and 60 * options.loop.minutes * speed)
    job = replace(job, rows=options.loop.micro_batch, accumulate=max(1, options.loop.batch // (
        options.loop.micro_batch * job.sizes.data)))
    check(config, job)
    memory = memory_of(config, job)
    time = step_time(config, job, board) if computed else None
    speed = time.tokens_per_s if time else speed

    plan_tables.show_model(config, params, options.lora.rank)
    if options.lora.targets:
        warn("memory is that of adapters beside every matrix of the blocks; with lora.targets it is less")
    plan_tables.show_flops(flops)
    plan_tables.show_memory(memory, job, board)
    warn_of_memory(options, config, job, board, device, memory.total)
    if time:
        plan_tables.show_time(time)
        plan_tables.show_transfers(time)
    plan_tables.show_run(options, params, flops, job, board, speed=speed, mfu=time.mfu if time else options.mfu or
                         ASSUMED_MFU, price=board.price if options.price is None else options.price)
    plan_tables.show_decoding(config, params)
    if options.picture:
        plan_picture.draw(config, variants(config, job, board), board, Path(options.picture))


# ------------------------------------------------------------------------------------------------------ what is planned

def the_model(options: Options) -> tuple[Options, LMConfig]:
    """The model that training would build or start from, or one that has been published."""
    name = options.name
    if name in PUBLISHED:
        asked = options.data.seq_len
        config = published(name)
        options = replace(options, data=replace(options.data, seq_len=asked or config.seq_len))
        return options, replace(config, seq_len=max(config.seq_len, options.data.seq_len))
    if name is not None and name in PRESETS:
        options = replace(options, model=replace(options.model, preset=name))
    elif name is not None and (Path(name) / "config.json").exists():
        options = replace(options, model=replace(options.model, start=name))
    elif name is not None:
        raise UserError(f"{name!r} is neither a preset nor a published model nor a model directory"
                        f"{suggestion(name, [*PRESETS, *PUBLISHED])}")
    options = with_rows(options)
    config = config_ahead(options)
    if reason := untrainable(config):
        warn(f"this model runs but must not be trained: {reason}")
    return options, config


def the_machine(options: Options) -> tuple[Machine, torch.device | None]:
    """(figures, device): one that is only named has no device here."""
    if options.hardware is None:
        device = choose_device(options.device)
        path = Path(options.machine) if options.machine else cache_path(device)
        if options.machine or path.exists():
            board = load_machine(path)
        else:
            kind = choose_precision(plain(options), device)
            top = peak(device, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[kind])
            board = Machine(name=str(device), source=top.source, peaks={kind: top.flops}, memory=total_memory(device))
    else:
        board, device = machine(options.hardware), None
    if options.node:
        board = replace(board, per_node=options.node)
    return replace(board, network=options.network / 8 * 1e9) if options.network else board, device


def plain(options: TrainOptions) -> str:
    """Of the two precisions in 8 bits, that of all else."""
    return "bf16" if options.loop.precision.startswith("fp8") else options.loop.precision


def the_job(options: Options, config: LMConfig, board: Machine, device: torch.device | None, world: int) -> Job:
    """A step of `world` devices, as far as it is known before the batch is derived. UserError with everything that is
    wrong with the mesh."""
    loop, parallel, precision = options.loop, options.parallel, precision_of(options, board, device)
    problems = parallel.problems(world) + splitting_problems(config, parallel, seq_len=options.data.seq_len)
    problems += run_problems(options)
    if problems and not options.search:
        raise UserError("\n".join(["this cannot be shared out so:", *(f"  {line}" for line in problems)])
                        if len(problems) > 1 else problems[0])
    job = job_of(options, device, rows=1, world=world, precision=precision)
    rows = loop.micro_batch or max(1, 4096 // job.seq_len) * (1 if options.search else job.pieces)
    return replace(job, rows=rows)


def precision_of(options: Options, board: Machine, device: torch.device | None) -> str:
    asked = options.loop.precision
    if device is not None:
        chosen = choose_precision(plain(options), device)
    else:
        chosen = plain(options) if asked != "auto" else "bf16" if "bf16" in board.peaks else "fp16"
    if asked.startswith("fp8"):
        chosen = "fp8"
    if chosen not in board.peaks and board.source == "data sheet":
        raise UserError(f"the data sheet of {board.name} says nothing of {chosen}; give --loop.precision "
                        f"{' or '.join(name for name in board.peaks if name != 'tf32')}")
    return chosen


def check(config: LMConfig, job: Job) -> None:
    """What the batch adds to what may be wrong."""
    problems = splitting_problems(config, job.parallel, seq_len=job.seq_len, micro_batch=job.rows)
    if problems:
        raise UserError("\n".join(problems))


def rows_per_epoch(options: TrainOptions) -> int | None:
    """Rows in one pass over prepared folders, as if packed without a gap; None where no epochs are asked for."""
    if options.loop.epochs is None or not options.data.train:
        return None
    raw = [entry for entry in options.data.train if not (Path(entry) / "manifest.json").exists()]
    if raw:
        raise UserError(f"loop.epochs of {raw[0]} cannot be planned before it is tokenised; `mindseed prepare` it "
                        "first, or give loop.steps")
    tokens = sum(int(Prepared(entry).split("train").lengths.sum()) for entry in options.data.train)
    return max(1, tokens // options.data.seq_len)


# --------------------------------------------------------------------------------------------------------- time, memory

def computable(board: Machine, options: Options) -> bool:
    """Whether the time of a step follows from the machine, not from an assumed utilisation."""
    return options.mfu is None and (board.source == "data sheet" and bool(board.units) or board.rates is not None)


def tokens_per_s(options: Options, config: LMConfig, job: Job, board: Machine, flops: Flops) -> float:
    """Before the batch is known: of one micro-batch."""
    if computable(board, options):
        return step_time(config, job, board).tokens_per_s
    top = board.peaks["bf16" if job.precision == "fp8" else job.precision]
    return job.world * top * (options.mfu or ASSUMED_MFU) / flops.model


def warn_of_memory(options: Options, config: LMConfig, job: Job, board: Machine, device: torch.device | None,
                   need: int) -> None:
    """Where it does not fit, and the smallest change after which it does."""
    if device is not None:
        return warn_if_too_big(need, device)
    if need <= ROOM * board.memory:
        return None
    better = nearest(config, job, ROOM * board.memory, refused=lambda one: run_problems(replace(
        options, parallel=one.parallel, loop=replace(options.loop, recompute=one.recompute))))
    remedy = plan_tables.changes(job, better) if better else ("none of the settings near to it: --search tries every "
                                                              "mesh, and --gpus takes more devices")
    warn(f"this needs {bytes_text(need)}, and a {board.name} has {bytes_text(board.memory)}, of which {ROOM:.0%} are "
         f"to be had; what fits is {remedy}")


def variants(config: LMConfig, job: Job, board: Machine) -> list[Plan]:
    """The plan, and what other stages of ZeRO and recomputation would make of it."""
    jobs = [replace(job, recompute=recompute, parallel=replace(job.parallel, zero=zero))
            for zero in ((0, 1, 2, 3) if job.sizes.data > 1 else (job.parallel.zero,)) for recompute in (False, True)
            if zero or job.parallel.replicas == 1 and not job.parallel.offload]
    jobs = [one for one in jobs if not one.parallel.problems(one.world)
            and not (one.recompute and one.parallel.splits_backward)]
    return [Plan(one, memory_of(config, one), step_time(config, one, board)) for one in jobs]


def show_search(options: Options, config: LMConfig, job: Job, board: Machine, flops: Flops) -> None:
    params = count_params(config)
    if not computable(board, options):
        raise UserError("--search compares times: give --hardware, or `mindseed plan --measure` this machine first")
    probe = tokens_per_s(options, config, replace(job, world=1, parallel=type(job.parallel)()), board, flops)
    derived = derive(options, params=params.active, rows_per_epoch=rows_per_epoch(options), world=1,
                     tokens=options.tokens or options.loop.minutes and 60 * options.loop.minutes * probe * job.world)
    if options.loop.batch is None:                # meshes divide it
        batch = round_rows(derived.loop.batch, job.world)
        tokens = derived.loop.steps * derived.loop.batch * job.seq_len
        derived = derive(replace(options, loop=replace(options.loop, batch=batch)), params=params.active, world=1,
                         rows_per_epoch=rows_per_epoch(options), tokens=tokens)
    found = search(config, job, board, rows=derived.loop.batch, keep=options.keep,
                   refused=lambda mesh: run_problems(replace(options, parallel=mesh)))
    plan_tables.show_model(config, params, options.lora.rank)
    plan_tables.show_found(found, board, derived.loop.batch, derived.loop.steps,
                           board.price if options.price is None else options.price, options)
    if options.picture and found.plans:
        plan_picture.draw(config, found.plans, board, Path(options.picture))


def round_rows(rows: int, world: int) -> int:
    """A number near to `rows` that many meshes divide: one, two or three times a power of two, and a multiple of the
    world where it is larger."""
    unit = world if rows >= world else 1
    near = [unit * times << k for k in range(rows.bit_length()) for times in (1, 3)]
    return min(near, key=lambda n: abs(math.log(n / rows)))


def remember_machine(options: Options) -> None:
    """Time this machine and write down what it can do."""
    device = choose_device(options.device)
    path = Path(options.machine) if options.machine else cache_path(device)
    board = measure_machine(device, say=say)
    save_machine(board, path)
    plan_tables.show_machine(board)
    say(f"\nremembered in {path}; plans for this machine are computed from it")
