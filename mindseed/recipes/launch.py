"""What is checked when several ranks start together: that the mesh suits the run, and that all ranks mean the same run.

The first needs no other rank, so it comes before the ranks meet: whoever is started with a mesh that cannot work is
told everything that is wrong with it, and nobody waits.
"""
from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mindseed
from mindseed.base import config as base_config
from mindseed.base import dist
from mindseed.base.errors import UserError
from mindseed.base.files import read_json
from mindseed.base.hardware import fast_bfloat16, total_memory
from mindseed.base.log import bytes_text
from mindseed.base.mesh import ParallelOptions
from mindseed.core import Objective
from mindseed.interop.directory import config_of
from mindseed.models.config import LMConfig
from mindseed.models.splitting import splitting_problems
from mindseed.models.upcycle import upcycled_config
from mindseed.parallel.mesh import Mesh
from mindseed.plan.job import Job
from mindseed.plan.memory import memory_of
from mindseed.plan.pipeline import bubble_share
from mindseed.recipes.options import TrainOptions
from mindseed.recipes.rl_options import RLOptions
from mindseed.tokenizers.hf_json import load_tokenizer
from mindseed.train.native import NativeBackend


def check_mesh(options: TrainOptions | RLOptions) -> None:
    """Raise UserError with every reason why this run cannot be shared out as asked."""
    world, mesh = dist.ranks_started(), options.parallel
    if mesh == ParallelOptions() and world == 1:
        return
    problems = mesh.problems(world) + run_problems(options)
    if (config := config_ahead(options)) is not None:
        data = options.data
        problems += splitting_problems(config, mesh, seq_len=getattr(data, "seq_len", None),
                                       micro_batch=options.loop.micro_batch)
        problems += [] if mesh.problems(world) else memory_problems(options, config, world)
    if problems:
        raise UserError("this run cannot be shared out so:\n" + "\n".join(f"  {line}" for line in problems))


def memory_problems(options: TrainOptions | RLOptions, config: LMConfig, world: int) -> list[str]:
    """What is offloaded must have room in the memory of the machine."""
    if not options.parallel.offload:
        return []
    job = Job(rows=options.parallel.pieces, seq_len=config.seq_len, world=world, parallel=options.parallel,
              optimizer=options.optim.kind, lora_rank=options.lora.rank)
    ranks, one, have = dist.local_ranks(), memory_of(config, job).host, total_memory("cpu")
    if ranks * one <= have:
        return []
    return [f"parallel.offload puts {bytes_text(one)} of every rank into the CPU's memory, and this machine's {ranks} "
            f"rank(s) have {bytes_text(have)} together; spread them over more machines, or take a smaller model"]


def run_problems(options: TrainOptions | RLOptions) -> list[str]:
    """What in the options, the model aside, does not go with the mesh."""
    mesh, found, method = options.parallel, [], getattr(options, "method", "rl")
    inside = [name for name in ("tensor", "context", "pipe") if getattr(mesh, name) > 1]
    apart = inside + ["expert"] * (mesh.expert > 1)          # where no rank can have the whole model for a while
    named, parted = (" and ".join(f"parallel.{name}" for name in names) for names in (inside, apart))
    if inside and method != "sft":
        found.append(f"{named}: for --method sft alone; {method} runs data-parallel, with parallel.zero or without")
    if apart and options.lora.rank:
        found.append(f"adapters (lora.rank) run data-parallel, with parallel.zero or without, not with {parted}")
    if apart and getattr(options.loop, "sample_every", None):
        found.append(f"loop.sample_every: samples cannot be drawn while the model lies on several ranks ({parted}); "
                     "`mindseed generate` draws them from the model at the end")
    if mesh.expert > 1 and (method == "rl" or method == "distill" and options.distill.on_policy):
        found.append("parallel.expert: every rank draws answers of its own, as long as they come, and experts on other "
                     "ranks would wait for each other; share the weights out with parallel.zero")
    if mesh.tensor > 1 and getattr(getattr(options, "objective", None), "label_smoothing", 0):
        found.append("objective.label_smoothing needs the whole vocabulary, which parallel.tensor splits")
    if not mesh.plain and options.optim.states != "fp32":
        found.append(f"optim.states={options.optim.states} keeps whole matrices' states; on a mesh parallel.zero "
                     "shares them out")
    if not mesh.plain and options.lora.rank and options.lora.nf4:
        found.append("lora.nf4 packs the base's weights, which parallel.zero would have to take apart")
    if mesh.splits_backward and options.loop.recompute:
        found.append(f"the {mesh.schedule} schedule takes the backward pass of a block in many parts, and "
                     "loop.recompute would run the block again for each; leave it out, or take --parallel.schedule "
                     "1f1b or interleaved")
    if mesh.backend == "deepspeed" and options.loop.precision.startswith("fp8"):
        found.append(f"the deepspeed backend trains in fp32, bf16 or fp16; loop.precision={options.loop.precision} is "
                     "the native backend's")
    if mesh.backend == "deepspeed" and options.optim.kind != "adamw":
        found.append("the deepspeed backend updates with AdamW alone, which does not mind how weights are cut (Muon "
                     "needs whole matrices): give --optim.kind adamw, or --parallel.backend native")
    if mesh.backend == "deepspeed" and mesh.zero == 3 and getattr(options.loop, "ema", None):
        found.append("loop.ema averages weights that DeepSpeed's stage 3 has taken apart; parallel.zero=2 or "
                     "parallel.backend=native keep them")
    if mesh.deepspeed and mesh.backend != "deepspeed":
        found.append("parallel.deepspeed names a file for parallel.backend=deepspeed, which is not asked for")
    return found


def config_ahead(options: TrainOptions | RLOptions) -> LMConfig | None:
    """The model's shape, as far as it can be known before data are read."""
    if options.model.start is not None and isinstance(options, RLOptions):
        return config_of(options.model.start)
    if options.model.start is not None:
        config, mixture = config_of(options.model.start), options.model.upcycling()
        config = options.model.going_on(config, options.data.seq_len or config.seq_len)
        return config if mixture is None else upcycled_config(config, mixture)
    vocab_size = options.data.vocab_size
    prepared = [Path(entry) / "manifest.json" for entry in options.data.train or ()]
    if options.data.tokenizer and Path(options.data.tokenizer).exists():
        vocab_size = load_tokenizer(options.data.tokenizer).vocab_size
    elif known := [path for path in prepared if path.exists()]:
        vocab_size = read_json(known[0], {"vocab_size": int})["vocab_size"]
    return options.model.shape(options.depth).lm_config(vocab_size=vocab_size, seq_len=options.data.seq_len or 512)


def job_of(options: TrainOptions, device: torch.device | None, *, rows: int, world: int, precision: str) -> Job:
    """What the planner is told of a step of `rows` rows on each rank; device None: a GPU that is not here."""
    loop, cpu = options.loop, device is not None and device.type == "cpu"
    return Job(rows=rows, seq_len=options.data.seq_len, world=world, parallel=options.parallel, precision=precision,
               recompute=loop.recompute, optimizer=options.optim.kind, states=options.optim.states,
               paged=device is None or device.type == "cuda", ema=loop.ema is not None, lora_rank=options.lora.rank,
               nf4=options.lora.nf4, cpu=cpu, widened=cpu and precision == "bf16" and not fast_bfloat16(),
               compiled=loop.compile)


def shared_out(options: ParallelOptions, world: int, micro_batch: int) -> str:
    """The mesh in words, with what a pipeline costs."""
    sizes = options.sizes(world)
    said = sizes.describe() + f", ZeRO-{options.zero}" * (options.zero > 0) + ", offloaded" * options.offload
    said += ", by DeepSpeed" * (options.backend == "deepspeed")
    if sizes.pipe == 1:
        return said
    pieces = options.pieces
    return (f"{said}; the pipeline ({options.schedule}) runs {pieces} pieces of {micro_batch // pieces} row(s), and a "
            f"rank stands still for {bubble_share(options.schedule, sizes.pipe, pieces):.0%} of a step (the bubble), "
            "longer where stages are unequal")


def gathers_in_bf16(options: TrainOptions | RLOptions, device: torch.device) -> bool:
    """Whether weights that ZeRO gathers travel in bf16: autocast would round them to it anyway."""
    asked = options.parallel.gather
    return asked == "bf16" or asked == "auto" and device.type == "cuda" and options.loop.precision.startswith(
        ("bf16", "fp8"))


def backend_of(options: TrainOptions | RLOptions, model: nn.Module, objective: Objective,
               optimizers: list[torch.optim.Optimizer], mesh: Mesh | None) -> Any:
    """The backend that the mesh asks for, around a model that has been shared out."""
    mine = options.parallel
    if mine.backend == "deepspeed":
        from mindseed.train.deepspeed import deepspeed_backend
        rows = options.loop.micro_batch * dist.row_ranks()
        bf16 = gathers_in_bf16(options, next(model.parameters()).device)
        return deepspeed_backend(
            model, objective, optimizers, zero=mine.zero, offload=mine.offload, precision=options.loop.precision,
            gather="bf16" if bf16 else "fp32", max_norm=options.optim.max_norm, micro_batch=options.loop.micro_batch,
            accumulate=max(1, (getattr(options.loop, "batch", None) or 0) // rows), json=mine.deepspeed)
    how: dict[str, Any] = {"precision": options.loop.precision, "max_norm": options.optim.max_norm, "mesh": mesh}
    if mesh and mesh.sizes.pipe > 1:
        from mindseed.train.pipelined import PipelinedBackend
        return PipelinedBackend(model, objective, optimizers, **how)
    return NativeBackend(model, objective, optimizers, **how)


@functools.cache
def code_hash() -> str:
    """Of all source files of the package."""
    digest, top = hashlib.sha256(), Path(mindseed.__file__).parent
    for file in sorted(top.rglob("*.py")):
        digest.update(str(file.relative_to(top)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def check_ranks(options: Any) -> None:
    """Compare what the ranks were started with; a collective call, the first of a run."""
    mine, facts = base_config.to_dict(options), {}
    if len({*dist.gather(short_hash(mine))}) > 1:            # name those that differ
        every = dist.gather(mine)
        names = {name for other in every for name in base_config.diff(every[0], other)}
        flat = base_config.flatten(mine)
        facts = {name: str(flat.get(name)) for name in sorted(names)}
    dist.agree(code=code_hash(), mindseed=mindseed.__version__, torch=torch.__version__, **facts)


def short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]
