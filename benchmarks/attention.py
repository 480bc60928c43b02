"""Attention, forward and backward, on a GPU: torch's fused kernels, FlexAttention and our FlashAttention.

The rows are whole, or packed with documents, or seen through a window. First our kernels are checked against float64;
then their tiles are chosen, which prints the table HOPPER of nn/flash_triton.py anew; then all are timed in turn.
FlexAttention compiles slowly, so no other is begun when most of 90 s has passed. On a CPU the torch versions run at a
small size.
"""
from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import report
from mindseed.nn import flash_triton
from mindseed.nn.attend import Layout, attend
from mindseed.nn.flash import Spans, spans
from mindseed.nn.flex import block_mask, flex_attend

NAME = "attention"
DOCUMENT, WINDOW = 400, 512                       # mean tokens of a document, tokens of a window
BUDGET_S = 65                                     # no other FlexAttention is begun after
SLOW_MS = 100                                     # what takes longer is timed once
START = time.perf_counter()


@dataclass(frozen=True)
class Case:
    mask: str                                     # causal, documents, window
    T: int
    K: int
    B: int
    H: int = 16
    G: int = 8
    V: int | None = None

    @functools.cache
    def positions(self, device: str) -> Tensor:
        """(B, T): documents of random lengths, or one."""
        if self.mask != "documents":
            return torch.arange(self.T, device=device).repeat(self.B, 1)
        g, rows = torch.Generator().manual_seed(self.T), []
        for _ in range(self.B):
            lengths = torch.empty(self.T).exponential_(1 / min(DOCUMENT, self.T / 4), generator=g).long() + 1
            rows.append(torch.cat([torch.arange(int(n)) for n in lengths[:64 + self.T // 32]])[:self.T])
        return torch.stack(rows).to(device)

    @property
    def window(self) -> int | None:
        return min(WINDOW, self.T // 4) if self.mask == "window" else None

    @functools.cache
    def spans(self, device: str) -> Spans:
        return Spans() if self.mask == "causal" else spans(self.positions(device), self.window)

    def visible(self, device: str) -> Tensor:
        """(B, 1, T, T)"""
        lo, hi = self.spans(device).ends(self.T, self.T, torch.device(device))
        j = torch.arange(self.T, device=device)
        return ((j >= lo[..., None]) & (j <= hi[..., None]))[:, None].expand(self.B, 1, -1, -1)

    def flops(self, device: str) -> float:
        """Of the products of one forward and one backward pass, on pairs that see each other: 2 and 5 products."""
        lo, hi = self.spans(device).ends(self.T, self.T, torch.device(device))
        pairs = float((hi - lo + 1).expand(self.B, -1).sum())
        V = self.V or self.K
        return 2 * pairs * self.H * ((self.K + V) + (3 * self.K + 2 * V))

    def tensors(self, device: str, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and the gradient of the output."""
        g = torch.Generator(device).manual_seed(0)
        V = self.V or self.K
        shapes = (self.H, self.K), (self.G, self.K), (self.G, V), (self.H, V)
        return [torch.randn(self.B, self.T, *shape, generator=g, device=device).to(dtype) for shape in shapes]

    def __str__(self) -> str:
        values = "" if self.V in (None, self.K) else f", values of {self.V}"
        return f"{self.mask}, {self.B} x {self.T}, {self.H} heads of {self.K}{values}, {self.G} of keys"


Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(mask: Tensor | None) -> Call:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
                                           is_causal=mask is None, enable_gqa=q.shape[2] != k.shape[2])
        return y.transpose(1, 2)
    return call


def repeated(case: Case, device: str) -> Call:
    """With a mask and a key head for every query head, for which torch has a fused kernel."""
    call = sdpa(case.visible(device).contiguous())
    return lambda q, k, v: call(q, *(x.repeat_interleave(case.H // case.G, 2) for x in (k, v)))


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(None)(q, k, v)


def ours(case: Case, device: str) -> Call:
    given = case.spans(device)
    return lambda q, k, v: flash_triton.flash_attend(q, k, v, given, 1 / math.sqrt(case.K))


def blocked(case: Case, device: str) -> Call:
    layout = Layout(case.positions(device))
    layout.add_view(case.window)
    return lambda q, k, v: attend(q, k, v, layout.views[case.window])


def flex(case: Case, device: str) -> Call:
    with torch.compiler.set_stance("force_eager"):
        blocks = block_mask(case.positions(device), case.window)
    return lambda q, k, v: flex_attend(q, k, v, blocks, scale=None, slopes=None)


def contenders(case: Case, device: str) -> dict[str, Call]:
    """What is compared, by name."""
    found = {"flash": ours(case, device)}
    if device == "cpu":
        return found | {"blocked": blocked(case, device), "sdpa, mask": sdpa(case.visible(device).contiguous())}
    if case.mask == "causal":
        return found | {"sdpa": sdpa(None), "sdpa, cuDNN": cudnn}
    return found | {"sdpa, mask": sdpa(case.visible(device).contiguous()),
                    "sdpa, mask, keys repeated": repeated(case, device)}


# ------------------------------------------------------------------------------------------------------------- checks

def error(got: Tensor, want: Tensor) -> float:
    """The largest error, as a share of the largest number."""
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def passes(call: Callable, q: Tensor, k: Tensor, v: Tensor, g_out: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = call(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, g_out)


def check(device: str) -> bool:
    """Ours against masked attention in float64, beside what torch's own kernel loses in the same dtype. True if no
    error is larger than twice torch's, and a second run gives the same bits."""
    B, T = (2, 1000) if device == "cuda" else (1, 150)
    usual = torch.bfloat16 if device == "cuda" else torch.float32
    heads = (64, 64, 2), (128, 128, 4), (192, 128, 4), (40, 24, 1), (256, 256, 2)                 # K, V, heads of keys
    given = [(Case(mask, T, K, B, 4, G, V), usual) for K, V, G in heads for mask in ("causal", "documents", "window")]
    given += [(Case("documents", T, 64, B, 4, 2, 64), dtype) for dtype in (torch.float16, torch.float32)]
    if device == "cuda":
        compile_ahead(lambda case=case, dtype=dtype: passes(ours(case, device), *case.tensors(device, dtype))
                      for case, dtype in given)
    right = True
    for case, dtype in given:
        inputs, theirs = case.tensors(device, dtype), repeated(case, device)
        want = passes(theirs, *(x.double() for x in inputs))
        first, again = (passes(ours(case, device), *inputs) for _ in range(2))
        errors = [(error(a, w), error(b, w)) for a, b, w in zip(first, passes(theirs, *inputs), want)]
        good = all(a <= 2 * b + 1e-5 for a, b in errors)
        same = all(torch.equal(a, b) for a, b in zip(first, again))
        right &= good and same
        print(f"{'right' if good else 'WRONG'}, {'the same twice' if same else 'DIFFERS'}: {str(dtype)[6:]}, {case}: " +
              ", ".join(f"{name} {a:.1e} (torch {b:.1e})" for name, (a, b) in zip(("out", "gq", "gk", "gv"), errors)),
              flush=True)
    print(f"checks: {'all right' if right else 'SOMETHING IS WRONG'}, {elapsed()}\n", flush=True)
    return right


# ---------------------------------------------------------------------------------------------------------- the tiles

@contextmanager
def replaced(**functions) -> Iterator[None]:
    """With other functions in flash_triton."""
    before = {name: getattr(flash_triton, name) for name in functions}
    try:
        vars(flash_triton).update(functions)
        yield
    finally:
        vars(flash_triton).update(before)


class Ahead:
    """A kernel that is compiled but not run."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple) -> Callable:
        return lambda *args, **named: self.kernel.warmup(*args, grid=grid, **named)


def compile_ahead(calls: Iterator[Callable[[], object]]) -> None:
    """Compile what the calls would run, in as many threads as there are processors, and run nothing."""
    import triton
    ahead = {name: Ahead(kernel) for name, kernel in flash_triton.kernels().items()}
    with (ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool, ignore_errors=True),
          replaced(kernels=lambda: ahead)):
        for call in calls:
            call()
    print(f"compiled, {elapsed()}", flush=True)


def choose_tiles(widths: tuple[int, ...]) -> None:
    """Time every candidate of flash_triton.HOPPER, put the fastest first, print the table. What counts is the product
    of a kernel's times on whole rows and on documents."""
    cases = {width: [Case(mask, 2048, width, 32) for mask in ("causal", "documents")] for width in widths}
    table = flash_triton.HOPPER
    compile_ahead(launch(name, case, tiles) for (name, width), candidates in table.items() if width in widths
                  for tiles in candidates for case in cases[width])
    for (name, width), candidates in table.items():
        if width in widths:
            times = {tiles: [milliseconds(launch(name, case, tiles)) for case in cases[width]] for tiles in candidates}
            table[name, width] = tuple(sorted(candidates, key=lambda tiles: math.prod(times[tiles])))
            for tiles in table[name, width]:
                print(f"{name:16s} {width:3d}  {str(tiles):52s} causal {times[tiles][0]:.3f} ms, "
                      f"documents {times[tiles][1]:.3f} ms")
    print("\n".join(f"    {key}: ({', '.join('Tiles' + str(tuple(vars(t).values())) for t in table[key])}),"
                    for key in table))
    print(f"tiles chosen, {elapsed()}\n", flush=True)


def launch(name: str, case: Case, tiles: flash_triton.Tiles) -> Callable[[], None]:
    """A call of one kernel."""
    q, k, v, g_out = case.tensors("cuda", torch.bfloat16)
    given, scale = case.spans("cuda"), 1 / math.sqrt(case.K)
    if name == "forward":
        more = {"out": torch.empty_like(g_out), "lse": torch.empty(case.B, case.H, case.T, device="cuda"),
                "lo": given.lo, "hi": given.hi}
    else:
        log, delta = torch.zeros(2, case.B, case.H, case.T, device="cuda")
        more = {"g_out": g_out, "log": log, "delta": delta, **flash_triton.strides(g=g_out)}
        more |= ({"gk": torch.empty_like(k), "gv": torch.empty_like(v), "lo": given.since, "hi": given.until}
                 if name == "backward_keys" else {"gq": torch.empty_like(q), "lo": given.lo, "hi": given.hi})

    def call() -> None:
        with replaced(tiles=lambda *_: tiles):
            flash_triton.launch(name, q, k, v, scale, None, **more)

    return call


def milliseconds(call: Callable[[], object], target_ms: float = 20) -> float:
    """Of one call, the mean over as many as fill the target; infinite if it cannot run."""
    try:
        call()
        once = events(call, 1)
        return events(call, max(1, min(50, int(target_ms / once))))
    except Exception as problem:                  # too much shared memory, no such backend: say so and go on
        print(f"  not to be run: {type(problem).__name__}: {str(problem).splitlines()[0][:100]}")
        torch.cuda.empty_cache()
        return math.inf


def events(call: Callable[[], object], times: int) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) * 1e3 / times
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / times


# --------------------------------------------------------------------------------------------------------- the timings

def rows(case: Case, calls: dict[str, Call], device: str, dtype: torch.dtype, rounds: int = 3) -> list[list[str]]:
    """A line for each contender: milliseconds forward and both ways, TFLOP/s both ways, and that time over ours."""
    *leaves, g_out = case.tensors(device, dtype)
    leaves = [x.requires_grad_() for x in leaves]
    parts = {(name, kind): part for name, call in calls.items() for kind, part in (
        ("forward", torch.no_grad()(functools.partial(call, *leaves))),
        ("both", lambda call=call: torch.autograd.grad(call(*leaves), leaves, g_out)))
        if (name, kind) != ("flex", "forward")}   # which would be compiled anew without gradients
    times = {part: [milliseconds(parts[part])] for part in parts}
    for _ in range(rounds - 1):
        for part in parts:
            if times[part][0] < SLOW_MS:
                times[part].append(milliseconds(parts[part]))
    middle = {part: statistics.median(values) for part, values in times.items()}
    flops, digits = case.flops(device) / 1e9, 0 if device == "cuda" else 3
    lines = [[str(case), name, "-" if name == "flex" else f"{middle[name, 'forward']:.3f}",
              f"{middle[name, 'both']:.3f}", f"{flops / middle[name, 'both']:.{digits}f}",
              f"{middle[name, 'both'] / middle['flash', 'both']:.2f}"]
             for name in calls]
    print("\n".join(" | ".join(line) for line in lines), f"({elapsed()})", flush=True)
    return lines


def elapsed() -> str:
    return f"{time.perf_counter() - START:.0f} s since the start"


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}", flush=True)
    check(device)
    if device == "cuda":
        choose_tiles((64, 128))
    sizes = [(2048, 128, 16), (2048, 64, 32), (8192, 128, 4)] if device == "cuda" else [(256, 64, 1)]
    cases = [Case(mask, T, K, B) for T, K, B in sizes for mask in ("causal", "documents", "window")]
    lines = [line for case in cases for line in rows(case, contenders(case, device), device, dtype)]
    for case in sorted(cases, key=lambda case: (case.K != 128, case.T, case.mask != "documents")):
        if device == "cuda" and time.perf_counter() - START < BUDGET_S:
            calls = {"flash": ours(case, device), "flex": flex(case, device)}
            lines += rows(case, calls, device, dtype, rounds=2)[1:]
    lines.sort(key=lambda line: [str(case) for case in cases].index(line[0]))
    report(NAME if device == "cuda" else f"{NAME}-cpu",
           "Attention, forward and backward" + ("" if device == "cuda" else ", at a small size on a CPU"),
           ["", "", "forward, ms", "forward and backward, ms", "TFLOP/s", "time over ours"], lines,
           command="python -m benchmarks.attention",
           notes=f"{str(dtype)[6:]}. TFLOP/s counts seven products on the pairs of tokens that see each other, two of "
                 f"them forward. Documents have {DOCUMENT} tokens in the mean, windows {WINDOW}; on a CPU, "
                 "a quarter of the row.")


if __name__ == "__main__":
    main()
