"""The time of a training step (and on a GPU its peak memory), measured and as `mindseed plan` predicts it from what
`mindseed plan --measure` has found out about this machine.

The steps are those of `mindseed train`, with AdamW or Muon. Predictions are made before the steps run; each step's time
is the best of several, since other programs only ever add to it.
"""
from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common import report
from mindseed.base.hardware import fast_bfloat16
from mindseed.core import Batch
from mindseed.models.lm import build
from mindseed.models.presets import PRESETS, Shape, shape_of_depth
from mindseed.objectives.sft import SFT
from mindseed.optim.groups import OptimConfig, build_optimizers, parameter_groups
from mindseed.plan.job import Job
from mindseed.plan.machines import Machine, machine
from mindseed.plan.measure import best_s, cache_path, load_machine, measure_machine, save_machine
from mindseed.plan.memory import memory_of
from mindseed.plan.time import step_time
from mindseed.train.native import NativeBackend

NAME = "plan-time"
LARGE = Shape(layers=12, dim=2048, heads=16, kv_heads=8, head_dim=128, ffn_dim=5632, qk_norm=False, tied=False)
SETTINGS: dict[str, dict[str, tuple[Shape, int, Job]]] = {
    "cpu": {
        "qwen3-toy, 8 x 256": (PRESETS["toy"], 6400, Job(rows=8, seq_len=256, precision="fp32")),
        "qwen3-mini, 4 x 512": (PRESETS["mini"], 6400, Job(rows=4, seq_len=512, precision="fp32")),
        "qwen3-mini, 1 x 128, Muon": (PRESETS["mini"], 6400, Job(rows=1, seq_len=128, precision="fp32",
                                                                optimizer="muon")),
        "qwen3-small, 2 x 512": (PRESETS["small"], 6400, Job(rows=2, seq_len=512, precision="fp32")),
        "depth 4, 8 x 512, recomputed": (shape_of_depth(4), 6400, Job(rows=8, seq_len=512, precision="fp32",
                                                                      recompute=True)),
        "qwen3-moe-toy, 8 x 256": (PRESETS["qwen3-moe-toy"], 6400, Job(rows=8, seq_len=256, precision="fp32"))},
    "cuda": {
        "qwen3-small, 16 x 1024": (PRESETS["small"], 32_000, Job(rows=16, seq_len=1024)),
        "0.8B, 4 x 4096": (LARGE, 32_000, Job(rows=4, seq_len=4096)),
        "0.8B, 4 x 4096, recomputed": (LARGE, 32_000, Job(rows=4, seq_len=4096, recompute=True)),
        "0.8B, 2 x 8192, compiled": (LARGE, 128_256, Job(rows=2, seq_len=8192, compiled=True)),
        "qwen3-moe-small, 8 x 1024": (PRESETS["qwen3-moe-small"], 32_000, Job(rows=8, seq_len=1024))}}


def step_of(shape: Shape, vocab: int, job: Job, device: torch.device):
    config = shape.lm_config(vocab_size=vocab, seq_len=job.seq_len)
    model, optim = build(config, device=device).train(), OptimConfig(kind=job.optimizer, lr=1e-4)
    model.recompute = job.recompute
    backend = NativeBackend(model, SFT(), build_optimizers(parameter_groups(model, optim), optim),
                            precision=job.precision)
    if job.compiled:
        model.compile_blocks()
    own = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (job.rows, job.seq_len + 1), generator=own)
    batch = Batch(ids=ids[:, :-1], targets=ids[:, 1:], weights=torch.ones(job.rows, job.seq_len),
                  positions=torch.arange(job.seq_len).expand(job.rows, -1)).to(device)

    def step() -> None:
        backend.forward_backward(batch, scale=torch.tensor(1e-4, device=device), last=True)
        backend.step(1e-4)

    return config, step


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = Path(sys.argv[1]) if sys.argv[1:] else cache_path(device)
    if not sys.argv[1:]:                          # unless a file is given, what the machine can do now
        save_machine(measure_machine(device, say=print), path)
    boards: dict[str, Machine] = {"measured": load_machine(path)}
    if device.type == "cuda":
        boards["data sheet"] = machine("H200" if "H200" in torch.cuda.get_device_name() else "H100")
    rows = []
    for name, (shape, vocab, job) in SETTINGS[device.type].items():
        job = replace(job, cpu=device.type == "cpu", widened=device.type == "cpu" and job.precision == "bf16"
                      and not fast_bfloat16())
        config = shape.lm_config(vocab_size=vocab, seq_len=job.seq_len)
        planned = {kind: step_time(config, job, board) for kind, board in boards.items()}
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        config, step = step_of(shape, vocab, job, device)
        took = best_s(step, device, 8)
        cells = [f"{1e3 * plan.total:.0f} ms ({plan.total / took - 1:+.0%})" for plan in planned.values()]
        if device.type == "cuda":
            peak, need = torch.cuda.max_memory_allocated(), memory_of(config, job).total
            cells += [f"{peak / 1e9:.2f} GB", f"{need / 1e9:.2f} GB ({need / peak - 1:+.0%})"]
        rows.append([name, f"{1e3 * took:.0f} ms", *cells])
        print(rows[-1], flush=True)
        del step
    report(NAME, f"Time of a training step, measured and planned, {device.type}", [
        "model, rows x tokens", "measured", *(f"planned, {kind}" for kind in boards),
        *(["peak memory", "planned"] if device.type == "cuda" else [])], rows, command="python -m benchmarks plan_time",
        notes=f"Best of 8 steps, AdamW unless said, {torch.get_num_threads()} thread(s)"
              + ", in CPU time" * (torch.get_num_threads() == 1 and device.type == "cpu")
              + ". Planned from rates of products, attention, memory and the optimiser that were timed on this machine,"
                " and from steps of other, smaller models. Target: within 20%.")



if __name__ == "__main__":
    main()
