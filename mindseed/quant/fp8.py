"""Training with the matrix products of Linears in 8-bit floating point (fp8), at twice the rate of bfloat16 on a GPU.

Eight bits hold a sign, an exponent and very little else: E4M3 has 3 bits of mantissa (steps of 1/8) and ends at 448,
E5M2 has 2 and ends at 57344. So a tensor is divided by a scale that brings its largest value to that end, rounded to
nearest, multiplied, and the result is multiplied by both scales again. Which values share a scale is the question:

    tensor   all of a tensor; gradients of outputs in E5M2, which reaches further down (torchao's recipe)
    row      a row of either factor, along the sum
    block    1 x 128 values of activations and gradients along the sum, 128 x 128 of a weight (DeepSeek-V3, 2412.19437,
             section 3.3): one outlier then spoils 127 neighbours and not the tensor

All three products of a Linear are in fp8, each factor cast with its scales along the dimension that the product sums
over: y = x W^T along the inputs, dx = g W along the outputs, dW = g^T x along the tokens. The weight, its gradient and
the optimiser stay in float32. Embedding, head, norms, routers and the stacked experts of a mixture stay wide, as does a
Linear whose dimensions do not suit the hardware.

    print(to_fp8(model, "tensor"))       after adapters are added, before the blocks are compiled

torch.compile joins a cast with what comes before it and casts an input of several Linears once; uncompiled, casts cost
as much time as they save. Where the hardware cannot multiply fp8, the same numbers are multiplied in float32: right,
and slow.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindseed.base.errors import UserError
from mindseed.models.lm import LM
from mindseed.nn.linear import Linear
from mindseed.nn.norm import compute_dtype
from mindseed.quant.linear import general, put, quantisable

Scaling = Literal["tensor", "row", "block"]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TILE = 128                                        # values of a block along each dimension
UNIT = {"tensor": 16, "row": 16, "block": TILE}   # what every dimension of a product must be a multiple of
SMALLEST = 1e-30                                  # a largest value below this counts as this: 1 / scale stays finite


class Codes(NamedTuple):
    """A matrix (R, C) in fp8. It stands for codes * scales, each scale for a tile of equal size: scales (1, 1), (R, 1),
    (R, C / 128) or (R / 128, C / 128), float32."""

    values: Tensor
    scales: Tensor

    @property
    def T(self) -> Codes:
        """Of tiles as high as they are wide."""
        return Codes(self.values.T.contiguous(), self.scales.T)


# ------------------------------------------------------------------------------------------------------------- the cast

def tiles(x: Tensor, rows: int, cols: int) -> Tensor:
    """(R, C) -> (R / rows, rows, C / cols, cols), a view."""
    return x.unflatten(1, (-1, cols)).unflatten(0, (-1, rows))


def tile_scales(x: Tensor, rows: int, cols: int, dtype: torch.dtype = E4M3, *, power_of_two: bool = False) -> Tensor:
    """(R / rows, C / cols), float32: the largest value of each tile over the largest of `dtype`, [rounded up to a power
    of two]."""
    largest = tiles(x, rows, cols).abs().amax((1, 3)).to(torch.float32)
    scales = largest.clamp_min(SMALLEST) / torch.finfo(dtype).max
    if power_of_two:                              # any mantissa but 0 carries over into the exponent
        scales = ((scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return scales


def cast(x: Tensor, scales: Tensor, dtype: torch.dtype = E4M3) -> Codes:
    """x (R, C) in fp8, rows contiguous; saturating, to the nearest, ties to even. What is no number stays none."""
    rows, cols = (n // m for n, m in zip(x.shape, scales.shape))
    top = torch.finfo(dtype).max
    wide = torch.promote_types(x.dtype, torch.float32)
    values = (tiles(x, rows, cols).to(wide) / scales[:, None, :, None]).clamp(-top, top).to(dtype)
    return Codes(values.reshape(x.shape).contiguous(), scales)


def quantize(x: Tensor, scaling: Scaling, dtype: torch.dtype = E4M3, *, square: bool = False,
             power_of_two: bool = False) -> Codes:
    """x (R, C), which will be summed over C, in fp8. `square`: blocks as high as they are wide, for weights."""
    R, C = x.shape
    size = {"tensor": (R, C), "row": (1, C), "block": (TILE if square else 1, TILE)}[scaling]
    return cast(x, tile_scales(x, *size, dtype, power_of_two=power_of_two), dtype)


def dequantize(codes: Codes, dtype: torch.dtype = torch.float32) -> Tensor:
    rows, cols = (n // m for n, m in zip(codes.values.shape, codes.scales.shape))
    wide = tiles(codes.values.to(dtype), rows, cols) * codes.scales.to(dtype)[:, None, :, None]
    return wide.reshape(codes.values.shape)


# --------------------------------------------------------------------------------------------------------- the products

def multiply(a: Codes, b: Codes, scaling: Scaling, dtype: torch.dtype, *, native: bool, fast: bool = False) -> Tensor:
    """a b^T: (M, K) and (N, K) -> (M, N) in `dtype`, the sum in float32; `fast` allows tensor cores to keep fewer bits
    of it for a while. Not `native`: multiplied in float32."""
    if not native:
        wide = torch.promote_types(dtype, torch.float32)
        with torch.autocast(a.values.device.type, enabled=False):
            return (dequantize(a, wide) @ dequantize(b, wide).T).to(dtype)
    if scaling == "block":
        return block_product(*a, *b, dtype)
    return torch._scaled_mm(a.values, b.values.T, a.scales, b.scales.T, out_dtype=dtype, use_fast_accum=fast)


def scaled_blocks(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`multiply` of blocks on Hopper (CUDA 12.9 or later)."""
    (a_scales, a_kind), (b_scales, b_kind) = laid_out(a_scales, len(a)), laid_out(b_scales, len(b))
    return F.scaled_mm(a, b.T, a_scales, a_kind, b_scales, b_kind, output_dtype=dtype)


# opaque to torch.compile, which might lay out the scales anew
block_product = torch.library.custom_op("mindseed::fp8_block_product", scaled_blocks, mutates_args=())


@block_product.register_fake
def _(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype) -> Tensor:
    return a.new_empty(len(a), len(b), dtype=dtype)


def laid_out(scales: Tensor, rows: int) -> tuple[Tensor, F.ScalingType]:
    """Scales of a matrix of so many rows as cuBLAS reads them: those of 1 x 128 values as (rows, K / 128), those of
    128 x 128 as (K / 128, rows / 128) with the first dimension filled up to a multiple of 4; either dense in the first
    dimension."""
    def dense(x: Tensor) -> Tensor:
        return x.clone(memory_format=torch.contiguous_format).T

    if len(scales) == rows:
        return dense(scales.T), F.ScalingType.BlockWise1x128
    return dense(F.pad(scales, (0, -scales.shape[1] % 4))), F.ScalingType.BlockWise128x128


class FP8Product(torch.autograd.Function):
    """x W^T, (..., K) and (N, K) -> (..., N) in `dtype`, and both gradients.

    For the backward pass x waits in fp8, cast as the product with the outputs' gradient wants it; the weight is cast
    again, so that no second copy of all weights stays. `learns`: whether the weight has a gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, dtype: torch.dtype, scaling: Scaling, power_of_two: bool, native: bool,
                learns: bool) -> Tensor:
        ctx.settings = scaling, power_of_two, native
        rows = filled_up(x.flatten(0, -2), UNIT[scaling])                         # (M, K)
        x8 = quantize(rows, scaling, power_of_two=power_of_two)
        w8 = quantize(weight, scaling, square=True, power_of_two=power_of_two)
        y = multiply(x8, w8, scaling, dtype, native=native, fast=True)
        kept = () if not learns else x8 if scaling == "tensor" else quantize(rows.T, scaling, power_of_two=power_of_two)
        ctx.save_for_backward(weight, w8.scales, *kept)
        return y[:x.numel() // x.shape[-1]].view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, g: Tensor):
        weight, w_scales, *kept = ctx.saved_tensors
        scaling, power_of_two, native = ctx.settings
        rows = filled_up(g.flatten(0, -2), UNIT[scaling])                         # (M, N)
        kind = E5M2 if scaling == "tensor" else E4M3
        g8, g_x, g_weight = quantize(rows, scaling, kind, power_of_two=power_of_two), None, None
        if ctx.needs_input_grad[0]:
            w8 = (quantize(weight.T, scaling, power_of_two=power_of_two) if scaling == "row" else
                  cast(weight.T, w_scales.T))
            g_x = multiply(g8, w8, scaling, g.dtype, native=native)
            g_x = g_x[:g.numel() // g.shape[-1]].view(*g.shape[:-1], -1)
        if kept:
            if scaling == "tensor":
                g8, x8 = g8.T, Codes(*kept).T
            else:
                g8, x8 = quantize(rows.T, scaling, kind, power_of_two=power_of_two), Codes(*kept)
            g_weight = multiply(g8, x8, scaling, weight.dtype, native=native)
        return g_x, g_weight, None, None, None, None, None


def filled_up(x: Tensor, unit: int) -> Tensor:
    """With rows of zeros up to a multiple of `unit` rows."""
    short = -len(x) % unit
    return F.pad(x, (0, 0, 0, short)) if short else x


# ---------------------------------------------------------------------------------------------------------- on a model

class FP8Linear(Linear):
    """What `linear` computes, with its very weight and adapter, in fp8; in training as in use."""

    def __init__(self, linear: Linear, scaling: Scaling, *, power_of_two: bool = False, native: bool = False) -> None:
        nn.Module.__init__(self)                  # Linear's would make a weight
        self.in_features, self.out_features, self.role = linear.in_features, linear.out_features, linear.role
        self.adapter, self.weight = linear.adapter, linear.weight
        self.register_parameter("bias", None)
        self.scaling, self.power_of_two, self.native = scaling, power_of_two, native
        self.train(linear.training)

    def product(self, x: Tensor) -> Tensor:
        learns = self.weight.requires_grad and torch.is_grad_enabled()
        return FP8Product.apply(x, self.weight, compute_dtype(x), self.scaling, self.power_of_two, self.native, learns)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, fp8 by {self.scaling}"


@dataclass(frozen=True, kw_only=True)
class FP8Coverage:
    """What is multiplied in fp8. `rows` are for `base.log.table`, under `HEADER`; `emulated` says why the hardware
    does not do it, if it does not."""

    rows: list[list[str]]
    matrices: int
    all_matrices: int
    scaling: Scaling
    emulated: str | None

    HEADER = ["matrices", "shape", "in fp8"]

    def __str__(self) -> str:
        shared = {"tensor": "tensor", "row": "row", "block": f"block of {TILE}"}[self.scaling]
        return f"{self.matrices} of {self.all_matrices} matrices are multiplied in fp8, with a scale for each {shared}"


def to_fp8(model: LM, scaling: Scaling = "tensor", *, power_of_two: bool = False, smallest: int = 128) -> FP8Coverage:
    """Let the Linears of the blocks multiply in fp8 from now on, but for those with a dimension below `smallest` or
    that is no multiple of UNIT. Parameters stay what they are. UserError if none is left."""
    there, unit, kinds = quantisable(model), UNIT[scaling], {}
    emulated = why_emulated(model.embed.weight.device, scaling)
    for name, linear in there.items():
        fits = all(n % unit == 0 and n >= smallest for n in linear.weight.shape)
        kinds.setdefault((general(name), linear.in_features, linear.out_features), []).append(fits)
        if fits:
            put(model, name, FP8Linear(linear, scaling, power_of_two=power_of_two, native=emulated is None))
    if not any(map(any, kinds.values())):
        raise UserError(f"no matrix of this model can be multiplied in fp8 by {scaling}: that takes dimensions of "
                        f"{smallest} and more that are multiples of {unit}, and weights that are not packed; use bf16")
    rows = [[kind, f"{K} -> {N}", f"{sum(fits)} of {len(fits)}"] for (kind, K, N), fits in kinds.items()]
    rows.append(["embeddings, head, norms, routers, experts", "", "never"])
    return FP8Coverage(rows=rows, matrices=sum(sum(fits) for fits in kinds.values()), all_matrices=len(there),
                       scaling=scaling, emulated=emulated)


@functools.cache
def why_emulated(device: torch.device, scaling: Scaling) -> str | None:
    """Why products in fp8 are emulated on a device; None if they need not be, which a small trial shows: all three
    products must be taken, and come out as emulated."""
    if device.type != "cuda":
        return f"{device.type} has no fast products of fp8"
    if (have := torch.cuda.get_device_capability(device)) < (8, 9):
        return f"this GPU has compute capability {have[0]}.{have[1]}, and fp8 needs 8.9"
    g = torch.Generator().manual_seed(0)

    def uneven(n: int, m: int) -> Tensor:         # so that every scale is another one
        return (torch.randn(n, m, generator=g) * (1 + torch.arange(n)[:, None] % 7) * (1 + torch.arange(m) // TILE)).to(
            device)

    x, weight, g_y = uneven(2 * TILE, 3 * TILE), uneven(5 * TILE, 3 * TILE), uneven(2 * TILE, 5 * TILE)
    results = []
    try:
        for native in (True, False):
            parts = x.bfloat16().requires_grad_(), weight.clone().requires_grad_()
            with torch.enable_grad():
                y = FP8Product.apply(*parts, torch.bfloat16, scaling, False, native, True)
            results.append((y, *torch.autograd.grad(y, parts, g_y.bfloat16())))
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        return f"torch {torch.__version__} refuses them on {torch.cuda.get_device_name(device)}: {first_line(error)}"
    for a, b in zip(*results):
        if not (a - b).norm() <= 0.01 * b.norm():
            return f"torch {torch.__version__} computes them wrongly on {torch.cuda.get_device_name(device)}"
    return None


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
