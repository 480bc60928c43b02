"""Peak memory of fine-tuning everything, of LoRA and of QLoRA, measured and as `mindseed plan` predicts it.

Each in a process of its own that trains a few steps of one short row in float32 on the CPU, so that weights, gradients
and states are most of what there is. Measured is resident memory above what the process held before the model; the
dense model is there before its base is packed, and what that took is given back before the steps are watched. Once so
that glibc gives back at once what torch frees, which is what a plan can know of, and once as glibc does by itself, with
holes between what stays.
"""
from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time

import torch

from benchmarks.common import in_process, report
from benchmarks.train_step import resident
from mindseed.adapt.lora import LoRAConfig, add_adapter
from mindseed.core import Batch
from mindseed.models.config import LMConfig
from mindseed.models.lm import build
from mindseed.models.presets import PRESETS, shape_of_depth
from mindseed.objectives.sft import SFT
from mindseed.optim.groups import OptimConfig, build_optimizers, parameter_groups
from mindseed.plan.memory import TrainMemory, plan_memory
from mindseed.plan.params import count_params
from mindseed.quant.linear import quantize_model
from mindseed.train.native import NativeBackend

NAME = "qlora"
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}    # glibc: larger pieces from the system, and straight back to it
LENGTH, VOCAB, RANK, STEPS = 128, 6400, 8, 2
SHAPES = {"toy": PRESETS["toy"], "mini": PRESETS["mini"], "depth 16": shape_of_depth(16)}
METHODS = {"everything": {}, "everything, states in 8 bits": {"states": "8bit"}, "LoRA": {"lora_rank": RANK},
           "QLoRA": {"lora_rank": RANK, "nf4": True}}


def config_of(shape: str) -> LMConfig:
    return SHAPES[shape].lm_config(vocab_size=VOCAB, seq_len=LENGTH)


def planned(shape: str, method: str) -> TrainMemory:
    return plan_memory(config_of(shape), batch_size=1, seq_len=LENGTH, itemsize=4, cpu=True, **METHODS[method])


def backend_of(shape: str, method: str) -> NativeBackend:
    asked, model = METHODS[method], build(config_of(shape)).train()
    optim = OptimConfig(kind="adamw", lr=1e-3, states=asked.get("states", "fp32"))
    if asked.get("nf4"):
        quantize_model(model)
    if "lora_rank" in asked:
        add_adapter(model, LoRAConfig(rank=RANK))
    return NativeBackend(model, SFT(), build_optimizers(parameter_groups(model, optim), optim), precision="fp32")


def memory(shape: str, method: str) -> None:
    """Peak resident bytes of a few steps, beyond those before the model; in a child process."""
    ids = torch.randint(0, VOCAB, (1, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids=ids[:, :-1], targets=ids[:, 1:], weights=torch.ones(1, LENGTH),
                  positions=torch.arange(LENGTH)[None])
    train(backend_of("toy", method), batch, 1)    # libraries take their own memory at first use
    before, backend = resident(), backend_of(shape, method)
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    top, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            top[0] = max(top[0], resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    train(backend, batch, STEPS)
    done.set()
    watcher.join()
    print(json.dumps({"bytes": top[0] - before}))


def train(backend: NativeBackend, batch: Batch, steps: int) -> None:
    for _ in range(steps):
        backend.forward_backward(batch, scale=torch.tensor(1 / LENGTH), last=True)
        backend.step(1e-3)


def main() -> None:
    if sys.argv[1:2] == ["memory"]:
        memory(*sys.argv[2:4])
        return
    rows, whole = [], {}
    for shape in ("mini", "depth 16"):
        size = count_params(config_of(shape)).total
        for method in METHODS:
            plan, peak = planned(shape, method), measured(shape, method, GIVE_BACK)
            holes = f"{measured(shape, method, {}) / 1e6:.0f} MB" if shape == "mini" else ""
            whole.setdefault(shape, peak)
            parts = (plan.total, plan.weights, plan.gradients + plan.optimizer, plan.activations + plan.logits)
            rows.append([f"{size / 1e6:.0f}M", method, f"{peak / 1e6:.0f} MB", f"{peak / whole[shape]:.2f}x",
                         *(f"{n / 1e6:.0f} MB" for n in parts), f"{peak / plan.total:.2f}", holes])
    report(NAME, f"Peak memory of fine-tuning: everything, LoRA and QLoRA, rank {RANK}, 1 x {LENGTH} tokens, fp32, CPU",
           ["parameters", "what learns", "peak", "of everything", "planned", "weights", "gradients, states",
            "activations, logits", "peak / planned", "peak with holes"], rows,
           command="python -m benchmarks qlora",
           notes=f"AdamW; adapters beside every matrix of the blocks. One row of {LENGTH} tokens, so that weights and "
                 "states are seen: what a token keeps for the backward pass is much the same in all four, and with the "
                 "4096 tokens of a usual micro-batch it is most of the memory, however the base is kept (`mindseed "
                 "plan` tells; loop.recompute is the remedy). A plan adds up gradients and activations, which are at "
                 "their largest at different moments, and knows nothing of what a product or an update needs for a "
                 "moment. With holes: as glibc keeps memory by itself, different in every run. Packing a base needs "
                 "it dense first: the peak of loading is that of the dense weights.")


def measured(shape: str, method: str, settings: dict[str, str]) -> int:
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        return in_process("benchmarks.qlora", "memory", shape, method)["bytes"]
    finally:
        os.environ.clear()
        os.environ.update(before)


if __name__ == "__main__":
    main()
