"""What this machine can do: peak FLOP/s for model FLOPs utilisation (MFU), memory, and a description for benchmarks.

MFU (PaLM, 2204.02311) is the share of the hardware's peak that the model's own arithmetic uses, so it needs an honest
peak. For known accelerators that is the dense figure of the vendor's data sheet (never the one "with sparsity"); for
everything else, CPUs above all, it is measured with a large matrix product, once per process.
"""
from __future__ import annotations

import contextlib
import functools
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Dense matrix TFLOP/s by device: (part of the name torch reports, {dtype: TFLOP/s}). The first match counts, so a
# longer name stands before a shorter one. fp32 is the plain unit's figure, tf32 that of the matrix unit.
# Source: the vendors' public data sheets (NVIDIA product data sheets and architecture white papers; AMD Instinct
# product pages); where a sheet gives only the sparse figure, half of it.
PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    ("GB200", {"bf16": 2500, "fp16": 2500, "tf32": 1250, "fp32": 80, "fp8": 5000}),
    ("B200", {"bf16": 2250, "fp16": 2250, "tf32": 1120, "fp32": 75, "fp8": 4500}),
    ("H200 NVL", {"bf16": 835, "fp16": 835, "tf32": 417, "fp32": 60, "fp8": 1671}),
    ("H200", {"bf16": 989, "fp16": 989, "tf32": 494, "fp32": 67, "fp8": 1979}),
    ("GH200", {"bf16": 989, "fp16": 989, "tf32": 494, "fp32": 67, "fp8": 1979}),
    ("H100 NVL", {"bf16": 835, "fp16": 835, "tf32": 417, "fp32": 60, "fp8": 1671}),
    ("H100 PCIe", {"bf16": 756, "fp16": 756, "tf32": 378, "fp32": 51, "fp8": 1513}),
    ("H100", {"bf16": 989, "fp16": 989, "tf32": 494, "fp32": 67, "fp8": 1979}),
    ("H800", {"bf16": 989, "fp16": 989, "tf32": 494, "fp32": 67, "fp8": 1979}),
    ("H20", {"bf16": 148, "fp16": 148, "tf32": 74, "fp32": 44, "fp8": 296}),
    ("A100", {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5}),
    ("A800", {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5}),
    ("A40", {"bf16": 149.7, "fp16": 149.7, "tf32": 74.8, "fp32": 37.4}),
    ("A30", {"bf16": 165, "fp16": 165, "tf32": 82, "fp32": 10.3}),
    ("A10G", {"bf16": 70, "fp16": 70, "tf32": 35, "fp32": 31.5}),
    ("A10", {"bf16": 125, "fp16": 125, "tf32": 62.5, "fp32": 31.2}),
    ("L40S", {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6, "fp8": 733}),
    ("L40", {"bf16": 181, "fp16": 181, "tf32": 90.5, "fp32": 90.5, "fp8": 362}),
    ("L4", {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3, "fp8": 242}),
    ("V100", {"fp16": 125, "fp32": 15.7}),
    ("T4", {"fp16": 65, "fp32": 8.1}),
    ("RTX 5090", {"bf16": 209.5, "fp16": 209.5, "tf32": 104.8, "fp32": 104.8, "fp8": 419}),
    ("RTX 4090", {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6, "fp8": 330.3}),
    ("RTX 3090", {"bf16": 71, "fp16": 71, "tf32": 35.6, "fp32": 35.6}),
    ("MI300X", {"bf16": 1307, "fp16": 1307, "tf32": 653, "fp32": 163, "fp8": 2614}),
    ("MI250X", {"bf16": 383, "fp16": 383, "fp32": 47.9}),
)
SHORT = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32", "torch.float64": "fp64"}
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8",
             "asimd", "sve", "bf16", "i8mm")


@dataclass(frozen=True, kw_only=True)
class Peak:
    """FLOP/s of dense matrix products, and where the figure comes from: "data sheet" or "measured"."""

    flops: float
    source: str


def peak(device: torch.device | str, dtype: torch.dtype) -> Peak:
    """The best figure for a device: the data sheet's if the device is known, else a measurement."""
    import torch
    device = torch.device(device)
    if device.type == "cuda":
        short = SHORT[str(dtype)]
        if short == "fp32" and torch.backends.cuda.matmul.allow_tf32:
            short = "tf32"
        listed = listed_peak(torch.cuda.get_device_name(device), short)
        if listed:
            return Peak(flops=listed, source="data sheet")
    return Peak(flops=measured_peak(device.type if device.type == "cpu" else str(device), dtype), source="measured")


def listed_peak(name: str, dtype: str) -> float | None:
    """FLOP/s by device name ("NVIDIA H100 80GB HBM3") and short dtype ("bf16"); None if the table does not know.

    A name matches by whole words, so that "L4" is not found in "L40S".
    """
    words = f" {name.replace('-', ' ')} "
    for part, peaks in PEAKS:
        if f" {part} " in words:
            return peaks[dtype] * 1e12 if dtype in peaks else None
    return None


@functools.cache
def measured_peak(device: str, dtype: torch.dtype, *, seconds: float = 0.5) -> float:
    """FLOP/s of a square matrix product, the fastest of several within about `seconds`; measured once per process.

    The fastest, not the mean: a peak is what the machine can do when nobody disturbs it. The size grows until one
    product takes 20 ms, so slow dtypes (fp16 on many CPUs) do not hold up a run.
    """
    import torch
    size, spent = 256, 0.0
    while True:
        own = torch.Generator().manual_seed(0)    # leave the seed of the caller alone
        a = torch.randn(size, size, generator=own).to(device, dtype)
        spent = min(timed_matmul(a) for _ in range(2))
        if spent > 0.02 or size >= (2048 if device == "cpu" else 8192):
            break
        size *= 2
    best, end = spent, time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, timed_matmul(a))
    return 2 * size**3 / best


def fast_bfloat16() -> bool:
    """Whether this CPU has a matrix unit for bfloat16 (AMX).

    A fact about the machine and not a measurement, for the numbers of a run hang on it: two processes on a busy machine
    may measure different things, and would then train different models from one seed. Vector instructions alone
    (avx512_bf16) are no reason: where we measured them, products took twice the time of float32 (docs/LOG.md).
    """
    return MATRIX_UNIT


def timed_matmul(a: torch.Tensor) -> float:
    """Seconds for a @ a, in the dtype of a: whoever asks may be inside autocast, which would change it."""
    import torch
    wait = torch.cuda.synchronize if a.is_cuda else lambda: None
    with torch.autocast(a.device.type, enabled=False), torch.no_grad():
        wait()
        start = time.perf_counter()
        a @ a
        wait()
        return time.perf_counter() - start


def total_memory(device: torch.device | str) -> int:
    """Bytes of memory of the device, or of the machine (its container's limit, if that is lower) for the CPU."""
    import torch
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(limit).read_text().strip() if Path(limit).exists() else "max"
        total = min(total, int(text)) if text.isdigit() else total
    return total


def peak_memory(device: torch.device | str) -> int:
    """Bytes: the most that tensors took on a GPU so far, or the process's largest resident size on the CPU."""
    if str(device).startswith("cuda"):
        import torch
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):      # getrusage begins with what the starting process had
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    import resource
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe_machine() -> dict[str, object]:
    """What a benchmark's reader needs to know: processor, cores, memory, instruction sets, devices, versions."""
    import torch
    info = cpu_info()
    flags = set(info.get("flags", info.get("Features", "")).split())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(total_memory("cpu") / 1e9, 1),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def cpu_info() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    entry = path.read_text().split("\n\n")[0] if path.exists() else ""
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in entry.splitlines())}


MATRIX_UNIT = "amx_bf16" in cpu_info().get("flags", "").split()
