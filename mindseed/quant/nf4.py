"""NF4: weights in four bits and a bit, for bases that stay frozen (QLoRA, 2305.14314).

Trained weights are about normally distributed. So the sixteen values that four bits can name are quantiles of the
normal distribution, each standing for an equal share of the weights, scaled to [-1, 1] and with an exact zero among
them. A matrix is read row by row in blocks of 64 weights; a block keeps its largest absolute value, the scale, and for
every weight the nearest of the sixteen, two to a byte.

A float32 scale per block is half a bit per weight. *Double quantisation* brings that to an eighth: less their mean, the
scales are themselves stored in 8 bits, in blocks of 256. Those 8 bits have a *dynamic* exponent (2110.02861): the first
one bit says how many tenths to take, and the further it stands to the left, the more bits are left for the fraction.

Codes, their order and the weights they stand for are bit for bit those of bitsandbytes.
"""
from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mindseed.base.errors import UserError
from mindseed.nn.linear import scratch

BLOCK = 64                                        # weights that share a scale
SCALES = 256                                      # scales that share a scale of their own
OUTERMOST = 0.9677083                             # probability of the last quantile, which becomes 1
LEVELS = 32767.5                                  # see `nearest_dynamic`
PART = 1 << 17                                    # bytes of codes that are unpacked at a time


class Packed(NamedTuple):
    """n weights in NF4. `spread` and `mean` are there under double quantisation, when `scales` are codes."""

    codes: Tensor                                 # (ceil(n / 2),) uint8; the first weight of a pair is the high half
    scales: Tensor                                # (ceil(n / 64),) float32, or uint8
    spread: Tensor | None = None                  # (ceil(blocks / 256),) float32: scales of the scales
    mean: Tensor | None = None                    # () float32: of the scales

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self if x is not None)


def quantize(weight: Tensor, *, double: bool = True) -> Packed:
    """The weights in the order of their rows. Raises UserError where they are not finite, or too large for float32."""
    flat = weight.detach().flatten()
    short = len(flat) % BLOCK
    rows = (torch.nn.functional.pad(flat, (0, BLOCK - short)) if short else flat).view(-1, BLOCK)
    parts = [quantize_rows(some.to(torch.float32)) for some in rows[:-1 if short else None].split(PART // BLOCK)]
    if short:                                     # in a block that is not full bitsandbytes divides
        parts.append(quantize_rows(rows[-1:].to(torch.float32), divide=True))
    codes, scales = (torch.cat(some) for some in zip(*parts))
    packed = Packed(codes.flatten()[:(len(flat) + 1) // 2].clone(), scales)
    if double:
        mean = scales.mean()
        packed = Packed(packed.codes, *quantize_dynamic(scales - mean), mean)
    if not torch.isfinite(scales if packed.mean is None else packed.mean).all():
        raise UserError("weights that are not finite, or too large for float32, cannot be quantised")
    return packed


def quantize_rows(rows: Tensor, *, divide: bool = False) -> tuple[Tensor, Tensor]:
    """Blocks (n, 64) in float32 -> their codes (n, 32) and scales (n,)."""
    scales = rows.abs().amax(1) if len(rows) else rows[:, 0]
    small = scales.clamp_min(1e-38)[:, None]
    share = rows / small if divide else rows * (1 / small)
    codes = torch.bucketize(share.clamp_(-1, 1), middles(quantiles(rows.device)), out_int32=True).to(torch.uint8)
    return codes[:, ::2] << 4 | codes[:, 1::2], scales


def dequantize(packed: Packed, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *,
               passing: bool = False) -> Tensor:
    """The weights again: a value of the table times its block's scale in float32, then in `dtype`.

    If they are only `passing`, they may lie in a buffer that the next call uses again: large pieces of memory made and
    freed between activations that stay leave a CPU's heap full of holes, in which what was saved is lost again.
    """
    device = packed.codes.device
    count, scales, pairs, again = math.prod(shape), block_scales(packed), byte_values(device), device.type == "cpu"
    size = 2 * len(packed.codes)
    weight = scratch("nf4", (size,), dtype) if passing and again else scales.new_empty(size, dtype=dtype)
    for at in range(0, len(packed.codes), PART):
        index, out = packed.codes[at:at + PART], None
        if again:
            index = scratch("index", index.shape, torch.int32).copy_(index)
            out = scratch("pairs", index.shape, torch.float64)
        part = torch.index_select(pairs, 0, index.int(), out=out).view(torch.float32)          # two weights each
        here, whole = scales[2 * at // BLOCK:], len(part) // BLOCK
        part[:whole * BLOCK].view(-1, BLOCK).mul_(here[:whole, None])
        part[whole * BLOCK:].mul_(here[whole:whole + 1])
        weight[2 * at:2 * at + len(part)] = part
    return weight[:count].view(shape)


def block_scales(packed: Packed) -> Tensor:
    """(blocks,) float32"""
    if packed.spread is None:
        return packed.scales
    values = dynamic_values(packed.scales.device).index_select(0, packed.scales.int())
    return values * packed.spread.repeat_interleave(SCALES)[:len(values)] + packed.mean


def quantize_dynamic(x: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) float32 -> codes (n,) uint8 and the largest absolute value of every 256."""
    rows = torch.nn.functional.pad(x, (0, -len(x) % SCALES)).view(-1, SCALES)
    spread = rows.abs().amax(1) if len(x) else x
    share = rows * torch.where(spread > 0, 1 / spread, 0)[:, None]
    codes = torch.where(spread[:, None] > 0, nearest_dynamic(share), 0)
    return codes.flatten()[:len(x)].to(torch.uint8), spread


def nearest_dynamic(share: Tensor) -> Tensor:
    """Codes of numbers in [-1, 1]: first to one of 2^16 levels, as bitsandbytes does on a CPU, then to the nearest."""
    level = ((share + 1) * LEVELS + 0.5).floor()
    return torch.bucketize(level / LEVELS - 1, middles(dynamic_values(share.device)))


def middles(values: Tensor) -> Tensor:
    """What is halfway between neighbours goes to the lower one."""
    return (values[1:] + values[:-1]) / 2


@cache
def quantiles(device: torch.device) -> Tensor:
    """(16,) float32, rising: seven quantiles below zero, zero, and eight above, over the last one.

    They stand at equal distances of probability between one half and OUTERMOST, which itself is halfway between the
    midpoint of the last of 15 and that of the last of 16 equal shares. Rounded to float32 where bitsandbytes rounds.
    """
    last = float(np.float32(OUTERMOST))

    def half(count: int) -> list[float]:
        return [NormalDist().inv_cdf(float(np.float32(last + (0.5 - last) * i / count))) for i in range(count)]

    values = torch.tensor(sorted([0.0, *half(8), *(-x for x in half(7))]), dtype=torch.float32)
    return (values / values[-1]).to(device)


@cache
def byte_values(device: torch.device) -> Tensor:
    """(256,): the two float32 values of every byte of codes, seen as one number of 8 bytes, so that one look-up finds
    both."""
    values = quantiles(torch.device("cpu"))
    high, low = values.repeat_interleave(16), values.repeat(16)
    return torch.stack([high, low], dim=1).view(torch.float64)[:, 0].contiguous().to(device)


@cache
def dynamic_values(device: torch.device) -> Tensor:
    """(256,) float32, rising: for each exponent 0.1^6 ... 1 the middles of 1, 2, 4 ... 64 equal parts of [0.1, 1], with
    either sign; and 0 and 1."""
    values = [torch.zeros(1), torch.ones(1)]
    for bits in range(7):
        edges = torch.linspace(0.1, 1, 2 ** bits + 1)
        part = 10 ** (bits - 6) * ((edges[1:] + edges[:-1]) / 2)
        values += [part, -part]
    return torch.cat(values).sort().values.to(device)
