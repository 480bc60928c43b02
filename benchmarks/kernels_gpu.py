"""Kernels on one GPU, right first and then fast: the fused head, and Linears in fp8 by tensor, row and block.

    python -m benchmarks.kernels_gpu

About a minute, and never more than two. A part that fails says so, and the next one goes on.
"""
from __future__ import annotations

import faulthandler
import statistics
import sys
import time
import traceback
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SOFT_S, HARD_S = 50, 110                          # no part begins after the first; the process ends at the second
HEADS = ((16384, 1024, 32000), (16384, 768, 6400))                                # tokens, width, vocabulary
LINEARS = ((16384, 1024, 4096), (16384, 4096, 4096))                              # tokens, inputs, outputs
SCALINGS = ("tensor", "row", "block")
BEGAN = time.perf_counter()


def main() -> int:
    if not torch.cuda.is_available():
        print("error: this measures kernels on a CUDA GPU, and torch finds none", file=sys.stderr)
        return 2
    faulthandler.dump_traceback_later(HARD_S, exit=True)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton()}")
    parts = [("the fused head against float64", check_head),
             *((f"fp8 by {s} against its emulation", lambda s=s: check_fp8(s)) for s in SCALINGS),
             *((f"the head, {N} x {D} x {V}", lambda shape=(N, D, V): time_head(*shape)) for N, D, V in HEADS),
             *((f"products alone, {M} x {K} x {N}", lambda shape=(M, K, N): time_products(*shape))
               for M, K, N in LINEARS),
             *((f"a Linear, {M} x {K} x {N}, {'compiled' if compiled else 'eager'}",
                lambda shape=(M, K, N), compiled=compiled: time_linears(*shape, compiled=compiled))
               for compiled in (False, True) for M, K, N in reversed(LINEARS))]
    failed = sum(not attempt(name, part) for name, part in parts)
    print(f"\n{len(parts) - failed} of {len(parts)} parts went well, {time.perf_counter() - BEGAN:.0f} s", flush=True)
    faulthandler.cancel_dump_traceback_later()
    return int(failed > 0)


def attempt(name: str, part: Callable[[], bool]) -> bool:
    """Whether it went well; what it raises is printed."""
    began = time.perf_counter()
    print(f"\n{name}", flush=True)
    if began - BEGAN > SOFT_S:
        print("  left out: no time is left")
        return False
    try:
        well = part()
    except Exception:                             # one part must not take the others' time on the GPU with it
        print("  FAILED", *traceback.format_exc().strip().splitlines()[-6:], sep="\n    ")
        well = False
    torch.cuda.empty_cache()
    print(f"  ({time.perf_counter() - began:.1f} s)", flush=True)
    return well


def triton() -> str:
    try:
        import triton
    except ImportError:
        return "missing"
    return triton.__version__


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def far(x: Tensor, y: Tensor) -> float:
    """The distance of x from y, relative to y; infinite for what is no number."""
    distance = ((x.double() - y.double()).norm() / y.double().norm()).item()
    return distance if distance == distance else float("inf")


def judge(name: str, distances: list[float], limit: float) -> bool:
    well = max(distances) < limit
    print(f"  {'ok   ' if well else 'WRONG'} {name:44s} {' '.join(f'{d:.1e}' for d in distances)} (limit {limit:.0e})")
    return well


def milliseconds(call: Callable[[], object], seconds: float = 0.25) -> float:
    """The median over as many calls as fit into `seconds`, after three that do not count."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    count = max(5, min(100, int(seconds / (time.perf_counter() - began))))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(marks, marks[1:]))


def peak_gib(call: Callable[[], object]) -> float:
    """What a call takes beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


# ------------------------------------------------------------------------------------------------------------- the head

def scored(kernel: Callable, hidden: Tensor, head: Tensor, targets: Tensor, dtype: torch.dtype) -> list[Tensor]:
    h, w = hidden.detach().requires_grad_(), head.detach().requires_grad_()
    logps, lse = kernel(h, w, targets, 1024, dtype)
    return [logps, lse, *torch.autograd.grad(1e-4 * lse.square().sum() - logps.sum(), (h, w))]


def plain(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(logps, lse) of logits that all exist, widened to float32 as cross entropy wants them."""
    logits = F.linear(hidden.to(dtype), head.to(dtype)).to(torch.promote_types(dtype, torch.float32))
    lse = logits.logsumexp(-1)
    return -F.cross_entropy(logits, targets, reduction="none"), lse


def check_head() -> bool:
    from mindseed.nn import fused_head
    well, old = [], fused_head.KEEP_BYTES
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        for V in (5003, 8192):
            hidden, head = draw(2050, 256, seed=1, dtype=dtype) / 16, draw(V, 256, seed=2, dtype=dtype)
            targets = torch.randint(0, V, (2050,), device="cuda")
            want = scored(plain, hidden.double(), head.double(), targets, torch.float64)
            for keep in (old, 0):
                fused_head.KEEP_BYTES, fused_head.CHUNK_BYTES = keep, fused_head.CHUNK_BYTES if keep else 1
                got = scored(fused_head.FusedHead.apply, hidden, head, targets, dtype)
                fused_head.KEEP_BYTES, fused_head.CHUNK_BYTES = old, 512 << 20
                name = f"{str(dtype)[6:]}, V = {V}, {'kept' if keep else 'in chunks'}"
                well.append(judge(name, [far(a, b) for a, b in zip(got, want)], limit))
    return all(well)


def time_head(N: int, D: int, V: int) -> bool:
    from mindseed.core import ChunkedHead
    from mindseed.nn import fused_head
    hidden, head = draw(N, D, seed=1), draw(V, D, seed=2, dtype=torch.float32) / D ** 0.5
    targets = torch.randint(0, V, (N,), device="cuda")

    def fused(chunk_mib: int) -> Callable:
        """In chunks of so many bytes; 0: as it comes, logits kept if they may be."""
        def kernel(*given):
            old = fused_head.KEEP_BYTES, fused_head.CHUNK_BYTES
            if chunk_mib:
                fused_head.KEEP_BYTES, fused_head.CHUNK_BYTES = 0, chunk_mib << 20
            try:
                return fused_head.FusedHead.apply(*given)
            finally:
                fused_head.KEEP_BYTES, fused_head.CHUNK_BYTES = old
        return kernel

    kernels = {"fused": fused(0), "fused, chunks of 512 MiB": fused(512), "fused, chunks of 128 MiB": fused(128),
               "core.ChunkedHead": ChunkedHead.apply, "plain cross entropy": plain}
    for name, kernel in kernels.items():
        def call(kernel=kernel):
            return scored(kernel, hidden, head, targets, torch.bfloat16)

        spent, peak = milliseconds(call), peak_gib(call)
        print(f"  {name:28s} {spent:8.2f} ms  {6 * N * D * V / spent / 1e9:6.0f} useful TFLOP/s  {peak:6.2f} GiB")
    return True


# -------------------------------------------------------------------------------------------------------------- Linears

def differentiated(module: Callable[[Tensor], Tensor], weight: Tensor, x: Tensor, g: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        y = module(x)
    return [y, *torch.autograd.grad(y, (x, weight), g)]


def linear_of(K: int, N: int, scaling: str | None):
    from mindseed.nn.linear import Linear
    from mindseed.quant.fp8 import FP8Linear, why_emulated
    linear = Linear(K, N, role="column").cuda()
    with torch.no_grad():
        linear.weight.copy_(draw(N, K, seed=3, dtype=torch.float32) / K ** 0.5)
    if scaling is None:
        return linear
    return FP8Linear(linear, scaling, native=why_emulated(torch.device("cuda", 0), scaling) is None)


def check_fp8(scaling: str) -> bool:
    from mindseed.quant.fp8 import FP8Linear, why_emulated
    if reason := why_emulated(torch.device("cuda", 0), scaling):
        print(f"  NOT NATIVE: {reason}")
        return False
    well = []
    for M, K, N in ((4096, 1024, 2048), (1000, 384, 640), (130, 128, 256)):
        x, g = draw(M, K, seed=1), draw(M, N, seed=2)
        x[::7] *= 30
        plain_linear = linear_of(K, N, None)
        want = differentiated(plain_linear, plain_linear.weight, x, g)
        results = {native: differentiated(FP8Linear(plain_linear, scaling, native=native), plain_linear.weight, x, g)
                   for native in (True, False)}
        for name, other, limit in (("its emulation", results[False], 1e-2), ("bfloat16", want, 8e-2)):
            well.append(judge(f"{M} x {K} x {N} beside {name}", [far(*p) for p in zip(results[True], other)], limit))
    return all(well)


def time_products(M: int, K: int, N: int) -> bool:
    from mindseed.quant.fp8 import multiply, quantize, why_emulated
    x, w = draw(M, K, seed=1), draw(N, K, seed=2)

    def tell(name: str, call: Callable[[], object]) -> None:
        spent = milliseconds(call)
        print(f"  {name:28s} {spent:8.3f} ms  {2 * M * K * N / spent / 1e9:6.0f} TFLOP/s")

    tell("bf16", lambda: x @ w.T)
    for s in SCALINGS:
        print(f"  {f'cast of x by {s}, eager':28s} {milliseconds(lambda: quantize(x, s)):8.3f} ms")
        if why_emulated(torch.device("cuda", 0), s) is None:
            a, b = quantize(x, s), quantize(w, s, square=True)
            tell(f"fp8 by {s}", lambda: multiply(a, b, s, torch.bfloat16, native=True, fast=True))
    return True


def time_linears(M: int, K: int, N: int, *, compiled: bool) -> bool:
    x, g, first = draw(M, K, seed=1), draw(M, N, seed=2), 0.0
    for scaling in (None, "tensor", "block") if compiled else (None, *SCALINGS):
        linear = linear_of(K, N, scaling)
        if scaling and not linear.native:
            print(f"  fp8 by {scaling:21s} left out: it is emulated here")
            continue
        torch._dynamo.reset()
        began = time.perf_counter()
        module = torch.compile(linear, dynamic=False) if compiled else linear

        def call(module=module, linear=linear):
            return differentiated(module, linear.weight, x, g)

        call()
        torch.cuda.synchronize()
        start, spent, peak = time.perf_counter() - began, milliseconds(call), peak_gib(call)
        first = first or spent
        print(f"  {f'fp8 by {scaling}' if scaling else 'bf16':28s} {spent:8.3f} ms  {6 * M * K * N / spent / 1e9:6.0f} "
              f"TFLOP/s  {first / spent:5.2f} x bf16  {peak:5.2f} GiB  (first call {start:.1f} s)", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
