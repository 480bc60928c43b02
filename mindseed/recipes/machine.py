"""What a recipe runs on: the device and the precision, chosen from what is there unless they are named."""
from __future__ import annotations

import os

import torch

from mindseed.base import dist
from mindseed.base.errors import UserError
from mindseed.base.hardware import fast_bfloat16, total_memory
from mindseed.base.log import bytes_text, say, table, warn
from mindseed.models.lm import LM
from mindseed.quant.fp8 import FP8Coverage, Scaling, to_fp8

FP8: dict[str, Scaling] = {"fp8": "tensor", "fp8-block": "block"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16} | dict.fromkeys(FP8, torch.bfloat16)


def choose_device(name: str) -> torch.device:
    """The device of an option; `auto` is this rank's GPU, or Apple's, or the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name!r} is not a device; use cpu, cuda, cuda:0, mps or auto") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device={name}: this version runs on cpu, cuda and mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device={name}: torch finds no Apple GPU here; use --device cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name}: torch finds no CUDA GPU here; use --device cpu, or a CUDA build of torch")
    if device.type == "cuda" and device.index is None and dist.launched():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.index is not None and device.index >= count:
        raise UserError(f"device={device}: there {'is' if count == 1 else 'are'} {count} of that kind, counted from 0")
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """`auto`: bf16 on GPUs that have it; on a CPU bf16 if it has a matrix unit for it."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if device.type != "cpu":
        return "fp32"
    return "bf16" if fast_bfloat16() else "fp32"


def multiply_in(model: LM, precision: str) -> None:
    """Let the Linears of a model multiply in fp8 if that is the precision, and say which do. UserError if none can."""
    if precision not in FP8:
        return
    found = to_fp8(model, FP8[precision])
    if dist.is_main():
        table("products in fp8", FP8Coverage.HEADER, found.rows)
        say(f"fp8        {found}; all else is in bf16")
        if found.emulated:
            warn(f"products in fp8 are emulated, at a fraction of the speed of bf16: {found.emulated}")


def warn_if_too_big(need: int, device: torch.device) -> None:
    """Say before the first step what the system would say in the middle of the run."""
    need *= dist.local_ranks() if device.type == "cpu" else 1                     # which share its memory
    if device.type in ("cpu", "cuda") and need > total_memory(device):
        warn(f"this needs {bytes_text(need)}, {device} has {bytes_text(total_memory(device))}; lower "
             "loop.micro_batch or give --loop.recompute")
