"""The fused head against plain log-softmax in float64: its kernels in Triton's interpreter where Triton is installed,
in a process of their own as the interpreter is chosen when Triton is imported; and on a GPU where there is one."""
from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from mindseed.core import ChunkedHead, Output
from mindseed.nn import fused_head
from mindseed.nn.fused_head import FusedHead, add_product, apply_head, pieces
from tests.tiny import random_batch, tiny_model

EDGES = [(1, 4, 3, 1), (5, 16, 50, 3), (2, 8, 4096, 1), (2, 8, 4097, 64), (3, 16, 9001, 2), (6, 8, 300, 3)]


def example(N: int, D: int, V: int, dtype: torch.dtype, seed: int = 0, device: str = "cpu", scale: float = 1.0):
    """hidden, head, targets (each several times among few tokens) and weights of both results, on the grid of dtype."""
    g = torch.Generator().manual_seed(seed)
    hidden, head = (torch.randn(n, D, generator=g, dtype=torch.float64) for n in (N, V))
    hidden = hidden * scale / D ** 0.5
    targets = torch.randint(0, V, (N,), generator=g)[torch.randint(0, N, (N,), generator=g)]
    weights = torch.randn(2, N, generator=g, dtype=torch.float64)
    return hidden.to(dtype).to(device), head.to(dtype).to(device), targets.to(device), weights.to(device)


def plain(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> list[Tensor]:
    """logps, lse and the gradients of hidden and head, in float64."""
    h, w = (x.double().detach().requires_grad_() for x in (hidden, head))
    logits = h @ w.T
    lse = logits.logsumexp(-1)
    logps = logits.gather(-1, targets[:, None])[:, 0] - lse
    (logps * weights[0] + lse.square() * weights[1]).sum().backward()
    return [logps.detach(), lse.detach(), h.grad, w.grad]


def fused(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, chunk: int, dtype: torch.dtype,
          kernel=FusedHead.apply) -> list[Tensor]:
    h, w = (x.detach().requires_grad_() for x in (hidden, head))
    logps, lse = kernel(h, w, targets, chunk, dtype)
    (logps * weights[0] + lse.square() * weights[1]).sum().backward()
    return [logps.detach(), lse.detach(), h.grad, w.grad]


def distance(x: Tensor, y: Tensor) -> float:
    assert x.shape == y.shape and x.isfinite().all()
    return ((x.double() - y).norm() / y.norm().clamp_min(1e-12)).item()


def bound(dtype: torch.dtype, hidden: Tensor, head: Tensor) -> float:
    """Of the distance from float64: logits are rounded to `dtype`, which changes exp(z) by |z| roundings, then the
    gradient is; sums over a vocabulary add roundings in float32."""
    largest = (hidden.double() @ head.double().T).abs().max().item()
    sums = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * len(head) ** 0.5
    return 4 * torch.finfo(dtype).eps * (1 + largest) + sums


# ----------------------------------------------------------------------------------------------- within the interpreter

class limits:
    """Fewer bytes than there are, for a while."""

    def __init__(self, *, chunk: int = 1, keep: int = 0) -> None:
        self.new = {"CHUNK_BYTES": chunk, "KEEP_BYTES": keep}

    def __enter__(self) -> None:
        self.old = {name: getattr(fused_head, name) for name in self.new}
        vars(fused_head).update(self.new)

    def __exit__(self, *_) -> None:
        vars(fused_head).update(self.old)


def inside_equals_float64():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for N, D, V, chunk in EDGES if dtype == torch.bfloat16 else EDGES[1::3]:
            given = example(N, D, V, dtype, seed=N)
            want = plain(*given)
            for keep in (0, 1 << 30):
                with limits(keep=keep):
                    got = fused(*given, chunk, dtype)
                assert [x.dtype for x in got] == [torch.promote_types(dtype, torch.float32)] * 2 + [dtype] * 2
                far = [distance(x, y) for x, y in zip(got, want)]
                assert max(far) < bound(dtype, *given[:2]), (dtype, N, D, V, chunk, keep, far)


def inside_equals_the_chunked_head():
    """With the very same rounding of logits, so closer than either is to float64."""
    given = example(6, 16, 4500, torch.bfloat16, scale=4.0)
    one, other = (fused(*given, 5, torch.bfloat16, kernel) for kernel in (FusedHead.apply, ChunkedHead.apply))
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one[1], other[1], rtol=1e-5, atol=1e-5)
    assert distance(one[2], other[2].double()) < torch.finfo(torch.bfloat16).eps


def inside_large_logits():
    hidden, head, targets, weights = example(6, 8, 700, torch.float32, scale=3e3)
    with limits():
        got, want = fused(hidden, head, targets, weights, 4, torch.float32), plain(hidden, head, targets, weights)
    assert want[1].abs().max() > 1e3
    assert max(distance(x, y) for x, y in zip(got, want)) < 1e-5


def inside_backward_twice():
    """The logits that waited became the gradient of the first time, and must not be taken for logits again."""
    hidden, head, targets, weights = example(9, 8, 130, torch.float32)
    h, w = hidden.requires_grad_(), head.requires_grad_()
    logps, _ = FusedHead.apply(h, w, targets, 4, torch.float32)
    once = torch.autograd.grad((logps * weights[0]).sum(), (h, w), retain_graph=True)
    twice = torch.autograd.grad((logps * weights[0]).sum(), (h, w))
    for a, b in zip(once, twice):
        torch.testing.assert_close(a, b)


def inside_one_of_both_results():
    hidden, head, targets, _ = example(9, 8, 130, torch.float32)
    for which in (0, 1):
        weights = torch.zeros(2, 9, dtype=torch.float64)
        weights[which] = 1
        h = hidden.detach().requires_grad_()
        result = FusedHead.apply(h, head, targets, 4, torch.float32)[which]
        (result if which == 0 else result.square()).sum().backward()              # one number for all, stride 0
        assert distance(h.grad, plain(hidden, head, targets, weights)[2]) < 1e-5


def inside_frozen_parts():
    hidden, head, targets, weights = example(9, 8, 130, torch.float32)
    want = plain(hidden, head, targets, weights)
    h = hidden.detach().requires_grad_()
    logps, lse = FusedHead.apply(h, head, targets, 4, torch.float32)
    (logps * weights[0] + lse.square() * weights[1]).sum().backward()
    assert head.grad is None and distance(h.grad, want[2]) < 1e-5
    with torch.no_grad():
        logps, lse = FusedHead.apply(hidden, head, targets, 4, torch.float32)
    assert distance(logps, want[0]) < 1e-5 and not logps.requires_grad


def inside_wide_parameters_with_narrow_products():
    """As under autocast: the head in float32, the products in bfloat16, gradients in the dtype of what they are of."""
    hidden, head, targets, weights = example(9, 16, 400, torch.bfloat16)
    got = fused(hidden, head.float(), targets, weights, 4, torch.bfloat16)
    assert got[3].dtype == torch.float32
    assert max(distance(x, y) for x, y in zip(got, plain(hidden, head, targets, weights))) < bound(
        torch.bfloat16, hidden, head)
    with torch.autocast("cpu", torch.bfloat16):
        again = fused(hidden.float(), head.float(), targets, weights, 4, torch.bfloat16)
    assert again[2].dtype == torch.float32
    torch.testing.assert_close(again[0], got[0])


def inside_nothing_and_nonsense():
    hidden, head, targets, _ = example(4, 8, 130, torch.float32)
    h, w = hidden[:0].requires_grad_(), head.requires_grad_()
    logps, lse = FusedHead.apply(h, w, targets[:0], 4, torch.float32)
    (logps.sum() + lse.sum()).backward()
    assert logps.shape == (0,) and h.grad.shape == (0, 8) and torch.equal(w.grad, torch.zeros_like(head))
    logps, lse = FusedHead.apply(hidden, head, torch.tensor([0, -100, 130, 129]), 4, torch.float32)
    assert logps.isnan().tolist() == [False, True, True, False] and lse.isfinite().all()
    assert FusedHead.apply(hidden * torch.tensor([[1], [torch.nan], [1], [1]]), head, targets, 4,
                           torch.float32)[1].isnan().tolist() == [False, True, False, False]


def run_inside() -> None:
    for name, check in list(globals().items()):
        if name.startswith("inside_"):
            print(name, flush=True)
            check()


def test_the_kernels_in_tritons_interpreter():
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
    code = "import sys; sys.path.insert(0, '.'); from tests.test_fused_head import run_inside; run_inside()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("inside_") == 8


# ------------------------------------------------------------------------------------------------------ without kernels

def test_pieces_cover_every_token_once():
    for N, rows in [(0, 4), (1, 4), (4, 4), (5, 4), (9, 4)]:
        found = [(list(range(N))[at], len(some)) for at, some in pieces(N, torch.empty(min(rows, N), 2))]
        assert sum((tokens for tokens, _ in found), []) == list(range(N))
        assert all(len(tokens) == n for tokens, n in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products_add_up_in_the_wide_dtype(dtype):
    wide = torch.promote_types(dtype, torch.float32)
    parts = [(torch.randn(5, 40).to(dtype), torch.randn(40, 3).to(dtype)) for _ in range(50)]
    total = None
    for a, b in parts:
        total = add_product(total, a, b, wide)
    assert total.dtype == wide
    torch.testing.assert_close(total.double(), sum(a.double() @ b.double() for a, b in parts), rtol=1e-5, atol=1e-4)


def test_on_a_cpu_the_chunked_head_answers():
    given = example(6, 8, 40, torch.float32)
    got = fused(*given, 4, torch.float32, kernel=apply_head)
    for x, y in zip(got, fused(*given, 4, torch.float32, kernel=ChunkedHead.apply)):
        assert torch.equal(x, y)


def test_an_output_takes_any_kernel():
    """What a model names reaches the products, and is handed what ChunkedHead is."""
    asked = []

    def kernel(hidden, head, targets, chunk, dtype):
        asked.append((hidden.shape, head.shape, targets.shape, chunk, dtype))
        return ChunkedHead.apply(hidden, head, targets, chunk, dtype)

    model, batch = tiny_model(), random_batch(2, 8)
    plain_output = model(batch.ids, batch.positions)
    model.apply_head = kernel
    output = model(batch.ids, batch.positions)
    assert torch.equal(output.logps(batch.targets), plain_output.logps(batch.targets))
    some = batch.weights > 0
    output.at(some).logps(batch.targets[some][None])
    D, V = model.config.dim, model.config.vocab_size
    assert asked == [((n, D), (V, D), (n,), 1024, torch.float32) for n in (16, int(some.sum()))]
    assert torch.equal(Output(hidden=output.hidden, head=output.head).logps(batch.targets),
                       plain_output.logps(batch.targets))


# ------------------------------------------------------------------------------------------------------------- on a GPU

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("keep", [0, 1 << 30])
@pytest.mark.parametrize("V", [6400, 32001])
def test_on_a_gpu(dtype, keep, V, monkeypatch):
    monkeypatch.setattr(fused_head, "KEEP_BYTES", keep)
    monkeypatch.setattr(fused_head, "CHUNK_BYTES", 1)
    given = example(1000, 128, V, dtype, device="cuda")
    far = [distance(x, y) for x, y in zip(fused(*given, 300, dtype, kernel=apply_head), plain(*given))]
    assert max(far) < bound(dtype, *given[:2]), far


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("keep", [0, 1 << 30])
def test_no_copy_of_the_logits_in_float32_on_a_gpu(keep, monkeypatch):
    monkeypatch.setattr(fused_head, "KEEP_BYTES", keep)
    N, D, V = 4096, 64, 32000
    hidden, head, targets, weights = example(N, D, V, torch.bfloat16, device="cuda")
    fused(hidden, head, targets, weights, N, torch.bfloat16)                      # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused(hidden, head, targets, weights, N, torch.bfloat16)
    assert torch.cuda.max_memory_allocated() - before < 1.5 * N * V * 2
