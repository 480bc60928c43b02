"""How much memory tensors take while something runs: what a plan is held against.

On a GPU the allocator keeps the books. On a CPU there are two ways. Torch's profiler notes every allocation and every
release of torch's own allocator, temporaries inside operators included; adding them up in their order gives the bytes
that are live at each moment. It sees one thread, though, and collectives release their tensors in another; where
ranks speak with each other, the system is asked for the most that was ever resident instead. That counts libraries
too, so it is a difference to before, and glibc must be told (GIVE_BACK) to return at once what is freed.
"""
from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

FLAG = 1_000_003                                  # bytes of a tensor that nothing else allocates: a mark in the books
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}    # in the environment

Prepare = Callable[[], Callable[[], object]]


def peak_bytes(prepare: Prepare) -> int:
    """The most bytes of tensors that were live while `prepare()()` ran. What `prepare` makes counts, as far as it is
    still there; what it needed on the way does not. Tensors from before are not seen."""
    gc.collect()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        run = prepare()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as books:
        run = prepare()
        gc.collect()
        torch.empty(FLAG, dtype=torch.uint8)
        run()
    found = [(e.start_ns(), e.nbytes()) for e in books.profiler.kineto_results.events() if e.name() == "[memory]"]
    live, most, flags = 0, 0, 0
    for _, change in sorted(found, key=lambda event: event[0]):
        flags += abs(change) == FLAG
        live += change
        most = max(most, live) if flags >= 2 else 0
    return most


def resident_bytes(prepare: Prepare) -> int:
    """The same by what the system keeps resident for this process, on Linux. What runs should have run once before,
    in a small way, so that libraries have taken what they take."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    run = prepare()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")                # the peak begins anew
    run()
    return status("VmHWM") - before


def status(name: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    assert sys.platform == "linux"
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
