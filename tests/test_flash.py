"""FlashAttention, in torch and in Triton, against attention written out: every kind of mask, forward and backward. The
kernels run in Triton's interpreter where Triton is installed, and on a GPU where there is one."""
from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from mindseed.nn import flash, flash_triton
from mindseed.nn.alibi import alibi_slopes
from mindseed.nn.attend import Layout, attend, attend_oracle
from mindseed.nn.flash import FlashAttention, Spans, flash_backward, flash_forward, spans
from mindseed.nn.linear import product_dtype
from tests.tiny import KITS, kit_model, random_batch

EXACT = dict(rtol=1e-10, atol=1e-10)
SCALE = 0.3


def ends(kind: str, B: int, T: int, S: int, seed: int = 0) -> Spans:
    """Spans of one kind for rows of T queries and S keys."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, max(2, T // 3), (B, T), generator=g).tolist()
    positions = torch.stack([torch.cat([torch.arange(n) for n in row])[:T] for row in lengths])
    return {
        "causal": lambda: Spans(),
        "window": lambda: spans(torch.arange(T).expand(B, T), max(1, T // 4)),
        "documents": lambda: spans(positions),
        "documents and window": lambda: spans(positions, max(1, T // 5)),
        "all": lambda: Spans(hi=torch.full((B, T), S - 1, dtype=torch.int32)),
        "any": lambda: Spans(*(torch.randint(-S // 2, S + S // 2, (B, T), generator=g, dtype=torch.int32).sort(1).values
                               for _ in range(2))),
        "nothing": lambda: Spans(torch.full((B, T), 2, dtype=torch.int32), torch.full((B, T), 1, dtype=torch.int32)),
    }[kind]()


KINDS = ("causal", "window", "documents", "documents and window", "all", "any", "nothing")


def visible(given: Spans, B: int, T: int, S: int) -> torch.Tensor:
    """The mask (B, 1, T, S), by the definition."""
    i, j = torch.arange(T), torch.arange(S)
    lo = torch.zeros(B, T, 1) if given.lo is None else given.lo[..., None]
    hi = i[None, :, None] if given.hi is None else given.hi[..., None]
    return ((j >= lo) & (j <= hi)).expand(B, T, S)[:, None]


def tensors(B: int, T: int, S: int, H: int, G: int, K: int, V: int, dtype=torch.float64, seed: int = 0) -> list:
    """q, k, v and the gradient of the output."""
    g = torch.Generator().manual_seed(seed)
    shapes = (B, T, H, K), (B, S, G, K), (B, S, G, V), (B, T, H, V)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def wanted(q, k, v, g_out, given: Spans, slopes=None) -> tuple:
    """out, lse and the gradients in float64, by the oracle; rows that see nothing have 0, -inf and 0."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    (B, T, H, _), S = q.shape, k.shape[1]
    mask = visible(given, B, T, S)
    bias = None
    if slopes is not None:
        bias = -slopes.double()[:, None, None] * (torch.arange(T)[:, None] - torch.arange(S))
    empty = ~mask.any(-1)                                                          # (B, 1, T)
    out = attend_oracle(q, k, v, mask | empty[..., None], scale=SCALE, bias=bias)
    out = out.masked_fill(empty.transpose(1, 2)[..., None], 0)
    gradients = torch.autograd.grad((out * g_out.double()).sum(), (q, k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(H // k.shape[2], 2)) * SCALE
    scores = scores if bias is None else scores + bias
    return out.detach(), scores.masked_fill(~mask, -torch.inf).logsumexp(-1).detach(), *gradients


def found(q, k, v, g_out, given: Spans, slopes=None, module=flash) -> tuple:
    out, lse = module.flash_forward(q, k, v, given, SCALE, slopes)
    return out, lse, *module.flash_backward(g_out, q, k, v, out, lse, given, SCALE, slopes)


def close(got: tuple, want: tuple, **how) -> None:
    for name, a, b in zip(("out", "lse", "gq", "gk", "gv"), got, want):
        torch.testing.assert_close(a.double(), b, **how, msg=lambda text: f"{name}: {text}")


SHAPES = [(2, 7, 7, 2, 2, 4, 4), (1, 300, 300, 6, 2, 8, 5), (2, 129, 129, 3, 1, 5, 9), (2, 40, 170, 4, 2, 4, 6),
          (1, 270, 30, 2, 1, 4, 4)]                            # B, T, S, H, G, K, V; tiles are of 128


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("module", [flash, flash_triton], ids=["function", "operator"])
def test_flash_attention_equals_the_oracle(module, shape, kind):
    B, T, S, H = shape[:4]
    given = ends(kind, B, T, S, seed=T)
    inputs = tensors(*shape)
    slopes = alibi_slopes(H).double() if kind in ("documents", "any") else None
    close(found(*inputs, given, slopes, module), wanted(*inputs, given, slopes), **EXACT)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_narrow_inputs(dtype, tolerance):
    given = ends("documents", 2, 150, 150)
    inputs = tensors(2, 150, 150, 4, 2, 16, 16, dtype)
    got = found(*inputs, given)
    assert [x.dtype for x in got] == [dtype, torch.float32, dtype, dtype, dtype]
    close(got, wanted(*inputs, given), rtol=tolerance, atol=tolerance)


def test_the_differentiable_forms_agree():
    given, slopes = ends("documents and window", 2, 140, 140), torch.rand(4, dtype=torch.float64)
    *inputs, g_out = tensors(2, 140, 140, 4, 2, 6, 3)
    want = wanted(*inputs, g_out, given, slopes)
    for function in (FlashAttention.apply, flash_triton.flash_attend):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves, given, SCALE, slopes)
        close((out, want[1], *torch.autograd.grad((out * g_out).sum(), leaves)), want, **EXACT)


def test_large_scores_stay_finite():
    q, k, v, g_out = tensors(1, 150, 150, 2, 1, 8, 8, torch.float32)
    given = ends("any", 1, 150, 150)
    out, lse, *gradients = found(q * 300, k * 300, v, g_out, given)
    assert all(x.isfinite().all() for x in (out, *gradients)) and not lse.isnan().any()


@pytest.mark.parametrize("kind", KINDS)
def test_keys_in_chunks_are_joined_by_lse(kind):
    """Ring attention: every rank has some keys; outputs join, and gradients given the joint lse add up."""
    shape = (2, 150, 150, 4, 2, 6, 5)
    q, k, v, g_out = tensors(*shape)
    B, T, S = shape[:3]
    given = ends(kind, B, T, S, seed=3)
    whole = wanted(q, k, v, g_out, given)
    lo = torch.zeros(B, T, dtype=torch.int32) if given.lo is None else given.lo
    hi = torch.arange(T, dtype=torch.int32).expand(B, T) if given.hi is None else given.hi
    chunks = [(slice(at, stop), Spans(lo - at, hi - at)) for at, stop in ((0, 10), (10, 97), (97, 150))]
    parts = [flash_forward(q, k[:, at], v[:, at], some, SCALE) for at, some in chunks]
    lses = torch.stack([lse for _, lse in parts])
    lse = lses.logsumexp(0)
    weights = (lses - lse.masked_fill(lse == -torch.inf, 0)).exp()                 # (chunks, B, H, T)
    out = sum(o * w.transpose(1, 2)[..., None] for (o, _), w in zip(parts, weights))
    gradients = [flash_backward(g_out, q, k[:, at], v[:, at], out, lse, some, SCALE) for at, some in chunks]
    gq, gk, gv = zip(*gradients)
    close((out, lse, sum(gq), torch.cat(gk, 1), torch.cat(gv, 1)), whole, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys", [1, 40, 75])
def test_spans_from_the_side_of_the_keys(kind, keys):
    B, T = 3, 50
    given = ends(kind, B, T, keys)
    turned = given.by_key(keys)
    i = torch.arange(T)
    since = torch.arange(keys).expand(B, keys) if turned.since is None else turned.since
    until = torch.full((B, keys), T - 1) if turned.until is None else turned.until
    assert torch.equal((i >= since[..., None]) & (i <= until[..., None]), visible(given, B, T, keys)[:, 0].mT)
    assert turned.by_key(keys) is turned


def test_only_the_tiles_that_are_needed():
    """Of 8 x 8 tiles: 36 lie below the diagonal; documents of 128 tokens need 8; a window of 128 needs 2 in a row."""
    at, tiles = torch.arange(1024)[None], lambda given: sum(len([*keys]) for _, keys in flash.Tile(
        given.ends(1024, 1024, at.device), 1.0, None, 1).needed())
    assert [tiles(Spans()), tiles(spans(at % 128)), tiles(spans(at, 128))] == [36, 8, 15]


@pytest.mark.parametrize("window", [None, 1, 5, 70, 1000])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_attend_through_a_layout(packed, alibi, window):
    q, k, v, g_out = tensors(2, 150, 150, 6, 2, 8, 5)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    positions = random_batch(2, 150).positions if packed else torch.arange(150).expand(2, 150)
    slopes, results = alibi_slopes(6).double() if alibi else None, []
    for attention in ("sdpa", "flash"):
        layout = Layout(positions, attention=attention)
        layout.add_view(window, distance=alibi)
        assert (layout.views[window].spans is not None) == (attention == "flash")
        out = attend(q, k, v, layout.views[window], slopes=slopes)
        results.append((out, *torch.autograd.grad((out * g_out).sum(), (q, k, v))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("name", KITS)
def test_models_learn_the_same(name):
    model, batch, gradients = kit_model(KITS[name]).train(), random_batch(2, 20), []
    for model.attention in ("sdpa", "flash"):
        loss = model(batch.ids, batch.positions).logps(batch.targets).mul(batch.weights).sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for a, b in zip(*gradients):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, **EXACT)


def test_the_operators_keep_torchs_rules():
    given = ends("documents and window", 2, 20, 20)
    *inputs, g_out = tensors(2, 20, 20, 4, 2, 6, 3)
    leaves = [x.requires_grad_() for x in inputs]
    rest = given.lo, given.hi, given.since, given.until, torch.rand(4, dtype=torch.float64), SCALE
    which = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(flash_triton.forward_op, (*leaves, *rest), test_utils=which)
    out, lse = flash_forward(*(x.detach() for x in inputs), given, SCALE)
    torch.library.opcheck(flash_triton.backward_op, (g_out, *(x.detach() for x in inputs), out, lse, *rest),
                          test_utils=which)


def test_a_compiled_block_stays_one_graph():
    model = kit_model(KITS["gqa"]).train()
    model.attention = "flash"
    batch, results = random_batch(2, 20), []
    for compiled in (False, True):
        if compiled:
            for block in model.blocks:
                block.compile(fullgraph=True, backend="aot_eager")
        loss = model(batch.ids, batch.positions).logps(batch.targets).mul(batch.weights).sum()
        results.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, **EXACT)


def test_autocast_reaches_the_inputs_alone():
    """What goes in and comes out has the dtype of products; those inside are wide whatever autocast says."""
    inputs = tensors(1, 30, 30, 2, 1, 8, 8, torch.float32)[:3]
    layout = Layout(torch.arange(30)[None], attention="flash")
    layout.add_view(None)
    with torch.autocast("cpu", torch.bfloat16):
        dtype = product_dtype(inputs[0])
        got = attend(*inputs, layout.views[None])
    assert got.dtype == dtype and torch.equal(got, attend(*(x.to(dtype) for x in inputs), layout.views[None]))


# ---------------------------------------------------------------------------------------------- the kernels in Triton

INTERPRETED = """
import sys, torch
sys.path.insert(0, ".")
from mindseed.nn import flash_triton
from tests.test_flash import close, ends, found, tensors, wanted
flash_triton.by_triton = lambda q, v: True
for kind, M, N, dtype, shape in [                       # B, T, S, H, G, K, V
        ("causal", 16, 16, torch.float32, (1, 33, 33, 2, 1, 16, 16)),
        ("documents and window", 16, 32, torch.float16, (1, 50, 50, 2, 1, 24, 16)),
        ("documents", 32, 16, torch.float32, (2, 33, 33, 1, 1, 16, 20)),
        ("any", 16, 16, torch.float32, (1, 40, 33, 1, 1, 16, 16)),
        ("nothing", 16, 16, torch.float32, (1, 5, 5, 1, 1, 16, 16)),
        ("all", 16, 16, torch.float32, (1, 9, 40, 3, 1, 4, 3))]:
    flash_triton.tiles = lambda *_: flash_triton.Tiles(M, N, 4, 2)
    B, T, S, H = shape[:4]
    given, inputs = ends(kind, B, T, S, seed=1), tensors(*shape, dtype)
    slopes = torch.rand(H) if kind in ("documents", "any") else None
    tolerance = 2e-5 if dtype == torch.float32 else 4e-3
    close(found(*inputs, given, slopes, flash_triton), wanted(*inputs, given, slopes), rtol=tolerance, atol=tolerance)
"""


def test_the_kernels_in_tritons_interpreter():
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", INTERPRETED], capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-4)])
@pytest.mark.parametrize("shape", [(2, 500, 500, 4, 2, 64, 64), (1, 300, 410, 4, 1, 128, 128),
                                   (1, 257, 257, 2, 2, 96, 40)], ids=str)
def test_the_kernels_on_a_gpu(shape, dtype, tolerance, kind):
    B, T, S, H = shape[:4]
    given, inputs = ends(kind, B, T, S, seed=1), tensors(*shape, dtype)
    slopes = alibi_slopes(H) if kind in ("documents", "any") else None
    want = wanted(*inputs, given, slopes)
    on_gpu = replace(given, **{name: x.cuda() for name, x in vars(given).items() if x is not None})
    got = found(*(x.cuda() for x in inputs), on_gpu, None if slopes is None else slopes.cuda(), flash_triton)
    for name, a, b in zip(("out", "lse", "gq", "gk", "gv"), (x.cpu().double() for x in got), want):
        seen = b != -torch.inf                                                    # the lse of no keys
        assert torch.equal(a != -torch.inf, seen), name
        if seen.any():
            assert (a - b)[seen].abs().max() <= tolerance * b[seen].abs().max().clamp_min(1), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_on_a_gpu(compiled):
    model, batch, gradients = kit_model(KITS["mixed"]).float().cuda().train(), random_batch(2, 20).to("cuda"), []
    for model.attention in ("sdpa", "flash"):
        if compiled and model.attention == "flash":
            model.compile_blocks()
        loss = model(batch.ids, batch.positions).logps(batch.targets).mul(batch.weights).sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for a, b in zip(*gradients):
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)
