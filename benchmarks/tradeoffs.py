"""Memory against time: recomputation, smaller micro-batches, narrow states, offloading.

Each setting in a process of its own: first its peak memory, as benchmarks/memory_plan.py takes it, then the time of its
steps. On a GPU offloaded states and weights lie in the CPU's memory and come back for every step. On a CPU they have
nowhere to go, so there only the price shows.
"""
from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import replace

import torch

from benchmarks.common import report
from benchmarks.memory_plan import made, on_ranks, prepared
from mindseed.base import dist
from mindseed.base.mesh import ParallelOptions
from mindseed.plan.job import Job
from mindseed.plan.memory import memory_of
from mindseed.plan.meter import GIVE_BACK, peak_bytes

CUDA = torch.cuda.is_available()
ROUNDS, STEPS, SHAPE = 1, 5, "small" if CUDA else "mini"
BASE = Job(rows=16, seq_len=1024, precision="bf16") if CUDA else Job(rows=4, seq_len=512, precision="fp32", cpu=True)
SETTINGS = {
    "everything kept": BASE,
    "selective recomputation": replace(BASE, recompute="selective"),
    "full recomputation": replace(BASE, recompute=True),
    "four micro-batches": replace(BASE, rows=BASE.rows // 4, accumulate=4),
    "states in 8 bits": replace(BASE, states="8bit"),
    "ZeRO-1 alone on one rank": replace(BASE, parallel=ParallelOptions(zero=1)),
    "the same, offloaded": replace(BASE, parallel=ParallelOptions(zero=1, offload=True)),
    "ZeRO-3, offloaded": replace(BASE, parallel=ParallelOptions(zero=3, offload=True)),
}
DEVICE = "cuda" if CUDA else "cpu"


def measure(name: str) -> dict[str, object]:
    job = SETTINGS[name]
    config = made(SHAPE, 6400, job)
    peak, seconds, step = peak_bytes(lambda: prepared(config, job, DEVICE)), [], prepared(config, job, DEVICE)
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        if CUDA:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"bytes": peak, "seconds": seconds}


def main() -> None:
    if sys.argv[1:2] == ["measure"]:
        torch.set_num_threads(1)
        with dist.process_group(torch.device(DEVICE)):
            print(json.dumps(measure(sys.argv[2])))
        return
    peaks: dict[str, int] = {}
    found: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(ROUNDS):
        for name in SETTINGS:
            one = on_ranks("benchmarks.tradeoffs", "measure", name, world=1, **GIVE_BACK)[0]
            peaks[name], found[name] = one["bytes"], found[name] + one["seconds"]
            print(name, f"{peaks[name] / 1e6:.0f} MB", [f"{s:.3f}" for s in one["seconds"]], flush=True)
    first, rows = next(iter(SETTINGS)), []
    for name, job in SETTINGS.items():
        took, base = (statistics.median(found[n]) for n in (name, first))
        plan = memory_of(made(SHAPE, 6400, job), job)
        rows.append([name, f"{peaks[name] / 1e6:.0f} MB", f"{plan.total / 1e6:.0f} MB",
                     f"{peaks[name] / peaks[first]:.2f}x",
                     f"{1e3 * took:.0f} ms ({1e3 * min(found[name]):.0f} to {1e3 * max(found[name]):.0f})",
                     f"{took / base:.2f}x"])
    report(f"tradeoffs-{DEVICE}", f"Memory against time, {SHAPE}, {BASE.rows} x {BASE.seq_len} tokens a step, "
           f"{BASE.precision}, {DEVICE.upper()}", ["what", "peak memory", "planned", "of all kept", "a step", "takes"],
           rows, command="python -m benchmarks tradeoffs",
           notes=f"Median (min to max) of {ROUNDS * STEPS} steps, AdamW" + (
               ", 1 thread. On a CPU what is offloaded stays in the same memory: only its price shows, and `planned` "
               "is what a GPU would hold." * (not CUDA)))


if __name__ == "__main__":
    main()
