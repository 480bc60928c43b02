"""Two processes against one, on two cores: what dividing the work costs, and of it the reduction of gradients.

Every process has one thread. `apart` are two processes that do the same work side by side and never speak: what two
cores can give, since they share the memory's bandwidth. What DDP takes beyond that is the reduction of its gradients,
as far as the backward pass does not hide it.
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
from mindseed.plan.params import count_params

NAME = "ranks"
ROUNDS, STEPS = 1, 6
ONE = Job(rows=4, seq_len=256, precision="fp32", cpu=True)


def two(rows: int = 2, **options) -> Job:
    return replace(ONE, rows=rows, world=2, parallel=ParallelOptions(**options))


APART = "apart"
SETTINGS = {                                      # 4 rows a step, over all ranks
    "one process": ONE, APART: replace(ONE, rows=2), "DDP": two(),
    **{f"ZeRO-{stage}": two(zero=stage) for stage in (1, 2, 3)},
    "tensor": two(4, tensor=2), "context": two(4, context=2),
    "pipeline, 1F1B, 4 pieces": two(4, pipe=2, microbatches=4),
}


def measure(name: str) -> dict[str, list[float]]:
    """Seconds of some steps on this rank."""
    job, seconds = SETTINGS[name], []
    step = prepared(made("mini", 6400, job), job)
    for _ in range(STEPS):
        dist.barrier()
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds}


def main() -> None:
    if sys.argv[1:2] == ["measure"]:
        torch.set_num_threads(1)
        with dist.process_group(torch.device("cpu")):
            print(json.dumps(measure(sys.argv[2])))
        return
    found: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(ROUNDS):
        for name, job in SETTINGS.items():
            ranks = beside() if name == APART else on_ranks("benchmarks.ranks", "measure", name, world=job.world)
            found[name] += [max(of_all) for of_all in zip(*(rank["seconds"] for rank in ranks))]
            print(name, [f"{s:.2f}" for s in found[name]], flush=True)
    took = {name: statistics.median(seconds) for name, seconds in found.items()}
    rows = [[name, f"{1e3 * took[name]:.0f} ms ({1e3 * min(found[name]):.0f} to {1e3 * max(found[name]):.0f})",
             f"{4 * 256 / took[name]:.0f}", f"{took['one process'] / took[name]:.2f}x",
             f"{took[name] / took[APART] - 1:+.0%}" if job.world > 1 else ""] for name, job in SETTINGS.items()]
    size, cost = 4 * count_params(made("mini", 6400, ONE)).total / 1e6, 1e3 * (took["DDP"] - took[APART])
    report(NAME, "Two processes against one, 26M, 4 x 256 tokens a step, fp32, CPU", [
        "what", "a step", "tokens/s", "against one process", "beyond two that do not speak"], rows,
        command="python -m benchmarks ranks",
        notes=f"Median (min to max) of {ROUNDS * STEPS} steps, of the slower rank. Reducing {size:.0f} MB of gradients "
              f"over gloo costs DDP {cost:.0f} ms a step ({cost / 1e3 / took['DDP']:.0%}) beyond what its backward "
              f"pass hides. `{APART}`: two processes of 2 rows each that never speak.")


def beside() -> list[dict]:
    """Two processes of one rank each, at the same time."""
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(on_ranks, "benchmarks.ranks", "measure", APART, world=1) for _ in range(2)]
        return [rank for job in jobs for rank in job.result()]


if __name__ == "__main__":
    main()
