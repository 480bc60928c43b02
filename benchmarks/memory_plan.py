"""Peak memory of a training step, measured and as `mindseed plan` predicts it, for the settings that change it most.

Each in a process of its own (two for those that share the work), on the CPU. Measured is the third step
(mindseed/plan/meter.py): the bytes of live tensors by torch's profiler, and where there are two
ranks, resident memory above what there was before the model.
"""
from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import torch

from benchmarks.common import report
from mindseed.adapt.lora import LoRAConfig, add_adapter
from mindseed.base import dist
from mindseed.base.hardware import fast_bfloat16
from mindseed.base.mesh import ParallelOptions
from mindseed.core import Batch
from mindseed.models.config import LMConfig
from mindseed.models.lm import build
from mindseed.models.presets import PRESETS
from mindseed.nn.linear import BUFFERS
from mindseed.objectives.sft import SFT
from mindseed.optim.groups import OptimConfig, build_optimizers, parameter_groups
from mindseed.parallel.mesh import make_mesh
from mindseed.parallel.parallelize import parallelize
from mindseed.plan.job import Job
from mindseed.plan.memory import TrainMemory, memory_of
from mindseed.plan.meter import GIVE_BACK, peak_bytes, resident_bytes
from mindseed.train.native import NativeBackend
from mindseed.train.pipelined import PipelinedBackend

NAME = "memory-plan"
FEW = Job(rows=4, seq_len=256, precision="fp32", cpu=True)
SETTINGS: dict[str, tuple[str, int, Job]] = {                # name: shape, vocabulary, job
    "AdamW, fp32": ("toy", 6400, FEW),
    "Muon, fp32": ("toy", 6400, replace(FEW, optimizer="muon")),
    "bf16": ("toy", 6400, replace(FEW, precision="bf16", widened=not fast_bfloat16())),
    "LoRA, rank 8": ("mini", 6400, replace(FEW, rows=2, lora_rank=8)),
    "recomputed": ("toy", 6400, replace(FEW, rows=8, recompute=True)),
    "two micro-batches": ("toy", 6400, replace(FEW, accumulate=2)),
    "2048 tokens": ("toy", 6400, replace(FEW, rows=1, seq_len=2048)),
    "vocabulary of 32,000": ("toy", 32_000, FEW),
    "mixture": ("qwen3-moe-toy", 6400, FEW),
    "latent attention, mixture": ("deepseek-v3-toy", 6400, FEW),
    "26M, AdamW": ("mini", 6400, replace(FEW, rows=2)),
    "26M, Muon, recomputed": ("mini", 6400, replace(FEW, rows=2, optimizer="muon", recompute=True)),
    "DDP, 2 ranks": ("mini", 6400, replace(FEW, rows=1, world=2)),
    **{f"ZeRO-{stage}, 2 ranks": ("mini", 6400, replace(FEW, rows=1, world=2, parallel=ParallelOptions(zero=stage)))
       for stage in (1, 2, 3)},
    "ZeRO-1, 2 ranks, two micro-batches": (
        "mini", 6400, replace(FEW, rows=1, world=2, accumulate=2, parallel=ParallelOptions(zero=1))),
    "ZeRO-3, 2 ranks, two micro-batches": (
        "mini", 6400, replace(FEW, rows=1, world=2, accumulate=2, parallel=ParallelOptions(zero=3))),
    "Muon, ZeRO-2, 2 ranks": ("mini", 6400, replace(FEW, rows=1, world=2, optimizer="muon",
                                                    parallel=ParallelOptions(zero=2))),
    "tensor 2": ("mini", 6400, replace(FEW, rows=2, world=2, parallel=ParallelOptions(tensor=2))),
    "context 2": ("mini", 6400, replace(FEW, rows=2, world=2, parallel=ParallelOptions(context=2))),
    "pipeline of 2, 4 pieces": ("mini/untied", 6400, replace(FEW, rows=4, world=2, parallel=ParallelOptions(
        pipe=2, microbatches=4))),
    "pipeline of 2, tied, a further token": ("mini/ahead", 6400, replace(FEW, rows=4, world=2, parallel=ParallelOptions(
        pipe=2, microbatches=4))),
    "pipeline of 2 x ZeRO-3, 4 ranks": ("mini/untied", 6400, replace(FEW, rows=4, world=4, parallel=ParallelOptions(
        pipe=2, microbatches=4, zero=3))),
    "experts on 2 ranks": ("qwen3-moe-toy", 6400, replace(FEW, rows=2, world=2, parallel=ParallelOptions(expert=2))),
}

CHANGES = {"": {}, "untied": {"tied": False}, "ahead": {"mtp": 1}}


def config_of(name: str) -> LMConfig:
    return made(*SETTINGS[name])


def made(shape: str, vocab: int, job: Job) -> LMConfig:
    name, _, change = shape.partition("/")
    return replace(PRESETS[name], **CHANGES[change]).lm_config(vocab_size=vocab, seq_len=job.seq_len)


def planned(name: str) -> TrainMemory:
    return memory_of(config_of(name), SETTINGS[name][2])


def measured(name: str) -> int:
    """Bytes, of this rank where there are several."""
    shape, vocab, job = SETTINGS[name]
    if job.world == 1:
        BUFFERS.__dict__.clear()
        return peak_bytes(lambda: prepared(config_of(name), job))
    small = replace(job, rows=job.pieces, seq_len=64)
    tiny = made("qwen3-moe-toy" if "moe" in shape else f"toy/{shape.partition('/')[2]}", 512, small)
    prepared(tiny, small)()                       # libraries take their own memory at first use
    gc.collect()
    BUFFERS.__dict__.clear()
    return resident_bytes(lambda: prepared(config_of(name), job))


def prepared(config: LMConfig, job: Job, device: str = "cpu"):
    """A callable that does one step. Two came before: by the third one states exist, and DDP has ordered its buckets
    anew and filled them."""
    mesh = make_mesh(job.parallel, torch.device(device))
    model = build(config, device=torch.device(device)).train()
    model.recompute = job.recompute
    if job.lora_rank:
        add_adapter(model, LoRAConfig(rank=job.lora_rank))
    parallelize(model, mesh, bf16=job.gather_itemsize == 2)
    optim = OptimConfig(kind=job.optimizer, lr=1e-3, states=job.states)
    kind = PipelinedBackend if job.parallel.pipe > 1 else NativeBackend
    backend = kind(model, SFT(), build_optimizers(parameter_groups(model, optim), optim),
                   precision=job.precision, mesh=mesh)
    own = torch.Generator().manual_seed(dist.row_rank())
    shape = job.rows, job.seq_len // job.parallel.context
    ids = torch.randint(0, config.vocab_size, (shape[0], shape[1] + 1), generator=own)
    batch = Batch(ids=ids[:, :-1], targets=ids[:, 1:], weights=torch.ones(shape),
                  positions=torch.arange(shape[1]).expand(shape)).to(device)

    def step() -> None:
        for i in range(job.accumulate):
            backend.forward_backward(batch, scale=torch.tensor(1e-3, device=device), last=i == job.accumulate - 1)
        backend.step(1e-3)

    step()
    step()
    return step


def in_processes(name: str) -> int:
    """The largest peak of all ranks."""
    found = on_ranks("benchmarks.memory_plan", "measure", name, world=SETTINGS[name][2].world, **GIVE_BACK)
    return max(rank["bytes"] for rank in found)


def on_ranks(module: str, *arguments: str, world: int, **variables: str) -> list[dict]:
    """What each of so many processes, of one thread each, prints as JSON on its last line."""
    port, environment = free_port(), {**os.environ, **variables, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen(
        [sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environment | ({} if world == 1 else {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port)})) for rank in range(world)]
    said = [rank.communicate(timeout=900) for rank in ranks]
    for rank, (_, errors) in zip(ranks, said):
        if rank.returncode:
            raise RuntimeError(f"{' '.join(arguments)} failed:\n{errors[-2000:]}")
    return [json.loads(out.strip().splitlines()[-1]) for out, _ in said]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def main() -> None:
    if sys.argv[1:2] == ["measure"]:
        torch.set_num_threads(1)
        with dist.process_group(torch.device("cpu")):
            print(json.dumps({"bytes": measured(sys.argv[2])}))
        return
    rows = []
    for name in [n for n in SETTINGS if not sys.argv[1:] or n in sys.argv[1:]]:
        peak, plan = in_processes(name), planned(name)
        parts = sorted(plan.parts.items(), key=lambda part: -part[1])[:4]
        rows.append([name, f"{peak / 1e6:.1f} MB", f"{plan.total / 1e6:.1f} MB", f"{plan.total / peak - 1:+.1%}",
                     plan.worst, ", ".join(f"{what} {n / 1e6:.0f}" for what, n in parts)])
        print(rows[-1], flush=True)
    if sys.argv[1:]:
        return
    report(NAME, "Peak memory of a training step, measured and planned", [
        "setting", "measured", "planned", "off by", "worst moment", "of it, MB"], rows,
        command="python -m benchmarks memory_plan",
        notes="Bytes of live tensors on a CPU, of the rank that needs most. Rows of 256 tokens unless said; 2.8M "
              "parameters (toy) or 26M (mini). Target: within 10%. A plan takes experts to be equally busy; in the "
              "last row they are not yet: a rank gets up to 70% of a layer's visits.")


if __name__ == "__main__":
    main()
