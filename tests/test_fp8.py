"""Linears in fp8: the cast against the grid of the format, the products against float64 and against a reference written
out tile by tile, whole models beside bfloat16, and what the hardware is handed against torch's own checks."""
from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindseed.adapt.lora import LoRAConfig, add_adapter, merge
from mindseed.base.errors import UserError
from mindseed.models.config import LayerConfig
from mindseed.models.lm import LM, build
from mindseed.models.presets import Shape
from mindseed.nn.linear import Linear
from mindseed.nn.linear_attention import DeltaConfig
from mindseed.nn.moe import MoEConfig
from mindseed.quant import fp8
from mindseed.quant.fp8 import E4M3, E5M2, FP8Linear, FP8Product, cast, dequantize, quantize, tile_scales, to_fp8
from mindseed.recipes import machine
from mindseed.train.native import AUTOCAST
from tests.tiny import MIXER_KIT, kit, kit_model, random_batch, tiny_model

SCALINGS = ("tensor", "row", "block")
HALF = {E4M3: (2.0 ** -4, 2.0 ** -10), E5M2: (2.0 ** -3, 2.0 ** -17)}         # half a step: of a value, of the smallest


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def uneven(R: int, C: int, seed: int = 0) -> Tensor:
    """Rows and stretches of columns of very different sizes."""
    g = torch.Generator().manual_seed(seed)
    return draw(R, C, seed=seed) * torch.randn(R, 1, generator=g).exp() * torch.randn(C, generator=g).mul_(2).exp()


# ------------------------------------------------------------------------------------------------------------- the cast

@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_rounds_to_the_nearest_and_ties_to_even(dtype):
    """Against the whole list of numbers that the format has."""
    grid = torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float64)
    codes = torch.arange(256, dtype=torch.uint8)[grid.isfinite()]
    grid, order = grid[grid.isfinite()].sort()
    codes = codes[order]
    middles = ((grid[1:] + grid[:-1]) / 2)[grid[1:] != grid[:-1]]
    x = torch.cat([draw(3000, seed=1).to(torch.float64) * 10 ** draw(3000, seed=2).to(torch.float64), middles, grid])
    x = x.clamp(-float(grid.max()), float(grid.max())).to(torch.float32)[:, None]
    got = cast(x, torch.ones(1, 1), dtype).values[:, 0].to(torch.float64)
    far = (x.double() - grid).abs()
    best = far == far.min(1, keepdim=True).values
    even = best & (codes % 2 == 0)
    want = torch.where(best.sum(1) > 1, (even * grid).sum(1), (best * grid).sum(1))
    assert torch.equal(got[x[:, 0] != 0], want[x[:, 0] != 0])


def test_saturates():
    x = torch.tensor([[1e9, -470.0, 449.0, 1.0]])
    assert cast(x, torch.ones(1, 1), E4M3).values.float().tolist() == [[448, -448, 448, 1]]
    assert cast(x, torch.ones(1, 1), E5M2).values.float().tolist() == [[57344, -448, 448, 1]]


@pytest.mark.parametrize("rows, cols", [(256, 384), (1, 384), (1, 128), (128, 128)])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_the_largest_value_becomes_the_largest_of_the_format(rows, cols, dtype):
    x = uneven(256, 384)
    scales = tile_scales(x, rows, cols, dtype)
    assert scales.shape == (256 // rows, 384 // cols) and scales.dtype == torch.float32
    largest = fp8.tiles(cast(x, scales, dtype).values.float(), rows, cols).abs().amax((1, 3))
    assert (largest == torch.finfo(dtype).max).all()
    powers = tile_scales(x, rows, cols, dtype, power_of_two=True)
    assert (powers.frexp().mantissa == 0.5).all()
    assert (powers >= scales).all() and (powers < 2 * scales).all()


def test_a_scale_that_is_a_power_of_two_stays():
    x = torch.tensor([[448.0, 7.0, 448.0 * 2 ** -70, 449.0]]).T
    assert tile_scales(x, 1, 1, power_of_two=True)[:, 0].tolist() == [1, 2.0 ** -6, 2.0 ** -70, 2]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("power", [False, True])
def test_every_value_is_within_half_a_step(scaling, dtype, power):
    for x, square in ((uneven(128, 256), False), (uneven(256, 128).T, False), (uneven(256, 384), True)):
        codes = quantize(x, scaling, dtype, square=square, power_of_two=power)
        assert codes.values.is_contiguous() and codes.values.dtype == dtype
        assert ((dequantize(codes, torch.float64) - x).abs() <= reach(x, scaling, dtype, square) * (1 + power)).all()


def reach(x: Tensor, scaling: str, dtype: torch.dtype = E4M3, square: bool = False) -> Tensor:
    """How far a value may be from what its code stands for: half a step of itself, or of the smallest of its tile."""
    scales = quantize(x, scaling, dtype, square=square).scales.double()
    R, C = x.shape
    of_each = scales.repeat_interleave(R // len(scales), 0).repeat_interleave(C // scales.shape[1], 1)
    own, least = HALF[dtype]
    return torch.maximum(x.double().abs() * own, of_each * least) * (1 + 1e-6)


def test_a_transposed_view_is_cast_like_its_copy():
    x = uneven(256, 128)
    for scaling in SCALINGS:
        for a, b in zip(quantize(x.T, scaling), quantize(x.T.contiguous(), scaling)):
            assert torch.equal(a.float(), b.float())


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("power", [False, True])
def test_zeros_extremes_and_what_is_no_number(scaling, power):
    x = draw(128, 128)
    x[3] = 0
    x[5] *= 1e-41
    codes = quantize(x, scaling, power_of_two=power)
    assert codes.scales.isfinite().all() and (codes.scales > 0).all() and (dequantize(codes)[3] == 0).all()
    assert dequantize(quantize(torch.zeros(128, 128), scaling, power_of_two=power)).abs().max() == 0
    assert dequantize(quantize(x * 1e37, scaling, power_of_two=power)).isfinite().all()
    for bad in (torch.nan, torch.inf):
        x[7, 9] = bad
        assert not dequantize(quantize(x, scaling, power_of_two=power))[7].isfinite().all()


# --------------------------------------------------------------------------------------------------------- the products

def differentiate(x: Tensor, w: Tensor, g: Tensor, scaling: str, *, power: bool = False,
                  dtype: torch.dtype | None = None, native: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = FP8Product.apply(x, w, dtype or x.dtype, scaling, power, native, True)
    return y.detach(), *torch.autograd.grad(y, (x, w), g.to(y.dtype))


def by_tiles(x: Tensor, rows: int, cols: int, dtype: torch.dtype = E4M3) -> Tensor:
    """What x stands for in fp8, in float64, one tile after the other."""
    x, top = x.float(), torch.finfo(dtype).max
    out = torch.empty(x.shape, dtype=torch.float64)
    for i in range(0, len(x), rows):
        for j in range(0, x.shape[1], cols):
            tile = x[i:i + rows, j:j + cols]
            scale = tile.abs().max().clamp(min=1e-30) / top
            out[i:i + rows, j:j + cols] = (tile / scale).clamp(-top, top).to(dtype).double() * scale.double()
    return out


def written_out(x: Tensor, w: Tensor, g: Tensor, scaling: str) -> tuple[Tensor, Tensor, Tensor]:
    """y = x W^T, dx = g W, dW = g^T x, each factor cast by the tiles of the scheme along the sum of that product."""
    if scaling == "tensor":
        x8, w8, g8 = by_tiles(x, *x.shape), by_tiles(w, *w.shape), by_tiles(g, *g.shape, E5M2)
        return x8 @ w8.T, g8 @ w8, g8.T @ x8
    if scaling == "row":
        x8, w8, g8, xT8, wT8, gT8 = (by_tiles(m, 1, m.shape[1]) for m in (x, w, g, x.T, w.T, g.T))
        return x8 @ w8.T, g8 @ wT8.T, gT8 @ xT8.T
    short = -len(x) % 128                          # tokens are filled up with zeros
    x, g = F.pad(x, (0, 0, 0, short)), F.pad(g, (0, 0, 0, short))
    w8, n = by_tiles(w, 128, 128), len(x) - short
    return ((by_tiles(x, 1, 128) @ w8.T)[:n], (by_tiles(g, 1, 128) @ w8)[:n],
            by_tiles(g.T, 1, 128) @ by_tiles(x.T, 1, 128).T)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("M", [128, 45])
def test_equals_the_reference_written_out(scaling, M):
    x, w, g = uneven(M, 256, seed=1), draw(128, 256, seed=2), uneven(M, 128, seed=3) * 1e-6
    for a, b in zip(differentiate(x, w, g, scaling), written_out(x, w, g, scaling)):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-6 * b.abs().max().item())


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("shape", [(32, 128, 128), (7, 384, 256), (200, 128, 256)])
def test_is_as_near_to_float64_as_the_format_allows(scaling, shape):
    M, K, N = shape
    x, w, g = uneven(M, K, seed=4), draw(N, K, seed=5), draw(M, N, seed=6)
    kind = E5M2 if scaling == "tensor" else E4M3
    filled = [F.pad(a, (0, 0, 0, -M % 128)) for a in (x, g)]
    for got, a, b, far_a, far_b in zip(
            differentiate(x, w, g, scaling), (x, g, g.T), (w, w.T, x.T),
            (reach(x, scaling), reach(g, scaling, kind), reach(filled[1].T, scaling, kind)[:, :M]),
            (reach(w, scaling, square=True), reach(w.T, scaling, square=True), reach(filled[0].T, scaling)[:, :M])):
        a, b = a.double(), b.double()
        want, most = a @ b.T, far_a @ b.abs().T + a.abs() @ far_b.T + far_a @ far_b.T
        assert ((got.double() - want).abs() <= most + 1e-5 * want.abs().max()).all()
        typical = 0.08 if kind == E5M2 else 0.045                                 # errors average out
        assert (got.double() - want).norm() < typical * want.norm()


def test_blocks_keep_an_outlier_to_itself():
    """The exponents of E4M3 reach over 17 powers of two, so a row 1000 times as large costs its neighbours little yet,
    and one 100 000 times as large much. A column is the same for rows, and for one in three blocks."""
    x, w, g = draw(128, 384, seed=7), draw(128, 384, seed=8), draw(128, 128, seed=9)

    def far(times: float) -> dict[str, float]:
        large = x.clone()
        large[5] *= times
        want, others = large.double() @ w.double().T, torch.arange(128) != 5
        found = {s: (differentiate(large, w, g, s)[0].double() - want)[others].norm() for s in SCALINGS}
        return {s: (value / want[others].norm()).item() for s, value in found.items()}

    little, much = far(1e3), far(1e5)
    assert little["block"] < little["tensor"] and little["row"] < little["tensor"]
    assert max(much["block"], much["row"]) < 0.04 and much["tensor"] > 0.3

    large = x.clone()
    large[:, 40] *= 1e5
    far_of = {s: (dequantize(quantize(large, s)).double() - large.double())[:, 128:].norm() for s in SCALINGS}
    assert far_of["block"] < 0.03 * x.norm() and far_of["row"] > 3 * far_of["block"]


def test_the_result_has_the_dtype_of_products():
    linear = FP8Linear(Linear(64, 32, role="column"), "tensor")
    x = draw(2, 5, 64)
    assert linear(x).dtype == torch.float32 and linear(x).shape == (2, 5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
        assert y.dtype == linear(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(y, linear(x).bfloat16())
    y.float().sum().backward()
    assert linear.weight.grad.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------- on a model

def wide_model(seed: int = 0) -> LM:
    shape = Shape(layers=1, dim=128, heads=2, kv_heads=2, head_dim=64, ffn_dim=256)
    return build(shape.lm_config(vocab_size=61, seq_len=32), seed=seed)


def test_parameters_stay_what_they_are():
    model = wide_model()
    before = dict(model.named_parameters())
    cover = to_fp8(model, "block")
    assert list(before) == list(dict(model.named_parameters()))
    assert all(p is before[name] for name, p in model.named_parameters())
    assert cover.matrices == cover.all_matrices == 7 and cover.emulated
    assert sum(type(m) is FP8Linear for m in model.modules()) == 7
    assert "7 of 7" in str(cover) and "block of 128" in str(cover)
    batch = random_batch(2, 8)
    other = copy.deepcopy(model)                  # as a frozen reference is made
    assert torch.equal(other(batch.ids, batch.positions).hidden, model(batch.ids, batch.positions).hidden)


def test_what_does_not_fit_stays_wide_and_is_counted():
    model = tiny_model(heads=2, kv_heads=1, head_dim=20, ffn_dim=48)              # q: 40, k: 20, o: from 40
    cover = to_fp8(model, "tensor", smallest=16)
    assert {name.rpartition(".")[2] for name, m in model.named_modules() if type(m) is FP8Linear} == {
        "gate", "up", "down"}
    assert (cover.matrices, cover.all_matrices) == (6, 14)
    assert [row[2] for row in cover.rows] == ["0 of 2"] * 4 + ["2 of 2"] * 3 + ["never"]
    for scaling in SCALINGS:
        with pytest.raises(UserError, match="no matrix of this model can be multiplied in fp8"):
            to_fp8(tiny_model(), scaling)


def test_sensitive_parts_stay_wide():
    """Though they would fit: a head of its own, a router of 16 experts, the gates of 16 heads."""
    layers = tuple(LayerConfig(mixer=mixer, ffn=MoEConfig(experts=16, top_k=2, expert_dim=16)) for mixer in (
        MIXER_KIT["gqa"], DeltaConfig(heads=16, key_heads=16, key_dim=4, value_dim=4)))
    model = kit_model(kit("gqa", layers=layers, tied=False, vocab_size=64)).float()
    to_fp8(model, "tensor", smallest=16)
    changed = {name for name, m in model.named_modules() if type(m) is FP8Linear}
    plain = {name.rpartition(".")[2] for name, m in model.named_modules() if type(m) is Linear}
    assert {"blocks.0.mixer.q", "blocks.0.mixer.o", "blocks.1.mixer.o"} <= changed
    assert plain == {"head", "router", "a", "b"} and all(
        n % 16 == 0 for m in model.modules() if type(m) is Linear for n in m.weight.shape)
    batch = random_batch(2, 8)
    model.train()(batch.ids, batch.positions).logps(batch.targets).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("scaling", ["tensor", "block"])
def test_learns_nearly_as_well_as_bfloat16(scaling):
    losses = {}
    for kind in (None, scaling):
        model, batch = wide_model().train(), random_batch(2, 24)
        if kind:
            to_fp8(model, kind)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(14):
            with torch.autocast("cpu", torch.bfloat16):
                loss = -model(batch.ids, batch.positions).logps(batch.targets).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[kind] = loss.item()
    assert losses[None] < 2 and abs(losses[scaling] - losses[None]) < 0.1 * losses[None], losses


def test_recomputation_changes_nothing():
    grads = []
    for recompute in (False, True):
        model, batch = wide_model().train(), random_batch(2, 8)
        to_fp8(model, "block")
        model.recompute = recompute
        model(batch.ids, batch.positions).logps(batch.targets).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("first", [True, False])
def test_an_adapter_beside_it_learns(first):
    """Its own products are wide; the base answers in fp8, keeps nothing for a gradient it has not, and merges."""
    model = wide_model()
    if first:
        add_adapter(model, LoRAConfig(rank=4), seed=1)
    to_fp8(model, "tensor")
    if not first:
        add_adapter(model, LoRAConfig(rank=4), seed=1)
    linear = model.blocks[0].mixer.q
    part = linear.adapter.parts["default"]
    with torch.no_grad():
        part.B.normal_(0, 0.3)
    x = draw(2, 8, 128).requires_grad_()
    y = linear(x)
    scale = 16 / 4
    wide = x.detach().clone().requires_grad_()
    want = FP8Product.apply(wide, linear.weight, torch.float32, "tensor", False, False, False) + scale * (
        wide @ part.A.T @ part.B.T)
    torch.testing.assert_close(y, want)
    y.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(x.grad, wide.grad)
    assert linear.weight.grad is None and part.B.grad.abs().max() > 0
    dense = linear.dense().detach().clone()
    merge(model, keep=False)
    torch.testing.assert_close(linear.weight.detach(), dense)


def test_a_frozen_weight_keeps_no_input():
    linear = FP8Linear(Linear(64, 32, role="column"), "tensor")
    x = draw(16, 64).requires_grad_()
    for learns in (True, False):
        linear.weight.requires_grad_(learns)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            linear(x)
        assert [t.dtype for t in kept if t.shape == (16, 64)] == ([E4M3] if learns else [])


def test_compiled_it_is_the_same_and_casts_a_shared_input_once():
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def look(graph, _):
        graphs.append(sum("amax" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (FP8Linear(Linear(128, 128, role="column"), "block") for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x)

    module = Two()
    for i, p in enumerate(module.parameters()):
        p.data = draw(128, 128, seed=i)
    results = []
    backend = aot_autograd(fw_compiler=look, partition_fn=min_cut_rematerialization_partition)        # as torch's own
    for call in (module, torch.compile(module, backend=backend, fullgraph=True)):
        x = draw(128, 128, seed=5).requires_grad_()
        y = call(x)
        results.append((y, *torch.autograd.grad(y, (x, *module.parameters()), draw(128, 128, seed=6))))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert graphs[0] == 4                         # x along both dimensions, and two weights


# --------------------------------------------------------------------------------------------------------- the hardware

class Context:
    needs_input_grad = (True, True)

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("M, K, N", [(384, 384, 640), (128, 128, 128), (256, 128, 256), (50, 512, 2048)])
def test_torch_accepts_what_the_hardware_is_handed(scaling, M, K, N, monkeypatch):
    """On the meta device torch checks shapes and strides as for a GPU."""
    handed, real = [], fp8.laid_out
    monkeypatch.setattr(fp8, "block_product", fp8.scaled_blocks)
    monkeypatch.setattr(fp8, "laid_out", lambda scales, rows: handed.append(real(scales, rows)) or handed[-1])
    x, w, g = (torch.empty(*shape, device="meta") for shape in ((M, K), (N, K), (M, N)))
    ctx = Context()
    y = FP8Product.forward(ctx, x.bfloat16(), w, torch.bfloat16, scaling, False, True, True)
    g_x, g_w, *_ = FP8Product.backward(ctx, g.bfloat16())
    assert [(t.shape, t.dtype) for t in (y, g_x, g_w)] == [
        ((M, N), torch.bfloat16), ((M, K), torch.bfloat16), ((N, K), torch.float32)]
    assert len(handed) == (6 if scaling == "block" else 0)
    for scales, kind in handed:                   # dense in the first dimension; squares in steps of 16 bytes
        assert scales.stride() == (1, len(scales))
        assert kind == F.ScalingType.BlockWise1x128 or len(scales) % 4 == 0


def test_scales_are_laid_out_without_changing_their_values():
    fine, square = draw(256, 3), draw(2, 3)
    assert torch.equal(fp8.laid_out(fine, 256)[0], fine)
    laid = fp8.laid_out(square, 256)[0]
    assert torch.equal(laid[:3].T, square) and (laid[3:] == 0).all()


def test_the_precision_of_a_run():
    assert machine.choose_precision("fp8", torch.device("cpu")) == "fp8"
    for name in machine.FP8:
        assert AUTOCAST[name] == machine.DTYPES[name] == torch.bfloat16


def test_a_run_is_told_what_is_emulated(capsys):
    model = wide_model()
    machine.multiply_in(model, "bf16")
    assert type(model.blocks[0].mixer.q) is Linear and not capsys.readouterr().out
    machine.multiply_in(model, "fp8-block")
    assert model.blocks[0].mixer.q.scaling == "block"
    told = capsys.readouterr()
    assert "7 of 7 matrices are multiplied in fp8" in told.out and "emulated" in told.err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("M, K, N", [(1024, 1024, 4096), (130, 384, 128), (4096, 128, 512)])
def test_a_gpu_multiplies_as_emulated(scaling, M, K, N):
    if why := fp8.why_emulated(torch.device("cuda", torch.cuda.current_device()), scaling):
        pytest.skip(why)
    x, w, g = uneven(M, K, seed=1).cuda().bfloat16(), draw(N, K, seed=2).cuda(), draw(M, N, seed=3).cuda()
    results = [differentiate(x, w, g, scaling, dtype=torch.bfloat16, native=native) for native in (True, False)]
    for a, b in zip(*results):
        assert (a - b).norm() < 0.01 * b.norm()
