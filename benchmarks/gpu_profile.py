"""Where the time of a step goes on a GPU: kernels by kind, the longest of them, and where the host waits for it."""
from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Callable

import torch


def profile(step: Callable, wait: Callable, device: torch.device, path: Path, steps: int = 3) -> dict[str, float]:
    """Milliseconds of a step by kind of kernel; the longest kernels go to `path`, and the lines of code that made the
    host wait for the device."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds if device.type == "cuda" else kinds[:1]) as trace:
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        wall = 1e3 * (time.perf_counter() - start) / steps
    totals: dict[str, float] = {}
    kernels: dict[str, list[float]] = {}
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not annotates(event):
            ms = event.time_range.elapsed_us() / 1e3 / steps
            kind = kind_of(event.name)
            totals[kind] = totals.get(kind, 0.0) + ms
            kernels.setdefault(event.name, []).append(ms)
    lines = [f"{sum(ms):9.3f} ms {len(ms) / steps:7.1f} x  {kernel[:150]}"
             for kernel, ms in sorted(kernels.items(), key=lambda item: -sum(item[1]))[:40]]
    lines += [f"waits: {place}" for place in (waiting(step) if device.type == "cuda" else [])]
    head = f"== {path.stem}: {wall:.2f} ms a step under the profiler, {sum(totals.values()):.2f} ms of kernels"
    path.write_text("\n".join([head, *lines, ""]))
    return {key: round(ms, 3) for key, ms in sorted(totals.items(), key=lambda item: -item[1])} | {
        "wall_profiled": round(wall, 3)}


def annotates(event) -> bool:
    """Whether it spans kernels and is none itself."""
    return getattr(event, "is_user_annotation", False) or event.name.startswith(("Optimizer.", "ProfilerStep", "##"))


def waiting(step: Callable) -> list[str]:
    """Where the host waits for the device in one step."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(w.filename).parent.name}/{Path(w.filename).name}:{w.lineno}" for w in heard
            if "synchroniz" in str(w.message)]


def kind_of(kernel: str) -> str:
    """A rough class of a kernel, by the words in its name."""
    name = kernel.lower()
    for kind, words in (("copies", ("memcpy", "memset")),
                        ("attention", ("flash", "fmha", "attention", "attend", "sdpa")),
                        ("head", ("head", "cross_entropy", "nll", "softmax")),
                        ("products", ("gemm", "cutlass", "nvjet", "xmma", "cublas", "matmul", "_mm")),
                        ("optimiser", ("multi_tensor_apply", "fusedadam", "foreach", "lpnorm")),
                        ("compiled", ("triton_",))):
        if any(word in name for word in words):
            return kind
    return "other"
