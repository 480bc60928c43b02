"""Rotary position embedding: turn every pair of key and query components by an angle that grows with the position,
so that their product depends on the distance alone (RoFormer, 2104.09864).

Pair j turns by position * theta^(-2j / K): the first pairs turn fast and tell neighbours apart, the last ones turn
slowly and tell far from near. A model only knows the angles it has met. To read longer texts than it was trained on,
the angles are scaled back into the range it knows:

    LinearScaling    every angle divided by the same factor (2306.15595): neighbours become harder to tell apart
    DynamicScaling   theta grows with the length of the text: fast pairs are spared, and short texts are untouched
    YarnScaling      each pair by its own need (2309.00071): those that turn often within the trained length stay, those
                     that never complete a turn are divided, those between are mixed; attention is sharpened a little
    Llama3Scaling    the same idea with the borders given as wavelengths (2407.21783)

Components are paired half-split, (0, K/2), (1, K/2 + 1), ..., as in the published Llama and Qwen weights, or
interleaved, (0, 1), (2, 3), ..., as in DeepSeek's.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    factor: float                    # how many times longer the text may be

    def __post_init__(self) -> None:
        check(self.factor)


@dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    factor: float
    original: int                    # the length trained on, in tokens

    def __post_init__(self) -> None:
        check(self.factor, self.original)


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """`attention_factor` multiplies queries and keys; None: it follows from the factor and the two mscales, as
    DeepSeek uses them."""

    factor: float
    original: int
    beta_fast: float = 32.0          # pairs that turn more often than this within `original` tokens are left alone
    beta_slow: float = 1.0           # pairs that turn less often are divided by the factor
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True            # round the borders to whole pairs

    def __post_init__(self) -> None:
        check(self.factor, self.original)
        if not self.beta_fast >= self.beta_slow > 0:
            raise ValueError(f"yarn: beta_fast={self.beta_fast} must be at least beta_slow={self.beta_slow} > 0")


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    factor: float
    original: int
    low_freq_factor: float = 1.0     # wavelengths above original / low are divided by the factor
    high_freq_factor: float = 4.0    # wavelengths below original / high are left alone

    def __post_init__(self) -> None:
        check(self.factor, self.original)
        if not self.high_freq_factor > self.low_freq_factor > 0:
            raise ValueError(f"llama3: high_freq_factor={self.high_freq_factor} must be above "
                             f"low_freq_factor={self.low_freq_factor} > 0")


def check(factor: float, original: int = 1) -> None:
    if factor < 1 or original < 1:
        raise ValueError(f"rope scaling: factor={factor} and original={original} must be at least 1")


Scaling = LinearScaling | DynamicScaling | YarnScaling | Llama3Scaling


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    theta: float = 10_000.0          # base of the geometric series of wavelengths
    scaling: Scaling | None = None
    interleaved: bool = False        # which components are pairs: see the head of this file

    def __post_init__(self) -> None:
        if self.theta <= 1:
            raise ValueError(f"rope theta={self.theta} must be above 1")

    @property
    def depends_on_length(self) -> bool:
        """Whether the angle of one position changes as the text grows: then keys are kept unrotated."""
        return isinstance(self.scaling, DynamicScaling)


def frequencies(config: RopeConfig, head_dim: int, length: Tensor | int = 0) -> tuple[Tensor, float]:
    """(angle per position of each pair (K/2,) in float64, factor on queries and keys) for a text of `length` tokens;
    for lengths (B,) the angles are (B, K/2) if they depend on it."""
    s, theta = config.scaling, torch.tensor(config.theta, dtype=torch.float64)
    exponent = torch.arange(head_dim // 2, dtype=torch.float64) / (head_dim // 2)
    if isinstance(s, DynamicScaling):
        longer = torch.as_tensor(length, dtype=torch.float64).cpu().clamp_min(s.original)
        theta = theta * (s.factor * longer / s.original - (s.factor - 1)) ** (head_dim / (head_dim - 2))
    plain = theta[..., None] ** -exponent
    if isinstance(s, LinearScaling):
        return plain / s.factor, 1.0
    if isinstance(s, YarnScaling):
        keep = 1 - ramp(*yarn_borders(s, config.theta, head_dim), head_dim // 2)
        return plain * keep + plain / s.factor * (1 - keep), yarn_attention_factor(s)
    if isinstance(s, Llama3Scaling):
        turns = s.original * plain / (2 * math.pi)                                # within the trained length
        keep = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
        return plain * keep + plain / s.factor * (1 - keep), 1.0
    return plain, 1.0


def yarn_borders(s: YarnScaling, theta: float, head_dim: int) -> tuple[float, float]:
    """The pairs between which scaling sets in: pair j turns original * theta^(-2j / K) / 2 pi times, solved for j."""
    def pair(turns: float) -> float:
        return head_dim * math.log(s.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(s.beta_fast), pair(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, head_dim - 1)


def ramp(low: float, high: float, pairs: int) -> Tensor:
    """0 up to pair `low`, 1 from pair `high` on, a straight line between."""
    return ((torch.arange(pairs, dtype=torch.float64) - low) / (max(high - low, 0) or 0.001)).clamp(0, 1)


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's temperature: longer texts blur attention, so scores grow with the logarithm of the length."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def yarn_attention_factor(s: YarnScaling) -> float:
    if s.attention_factor is not None:
        return s.attention_factor
    if s.mscale and s.mscale_all_dim:
        return mscale(s.factor, s.mscale) / mscale(s.factor, s.mscale_all_dim)
    return mscale(s.factor)


def rope_tables(config: RopeConfig, head_dim: int, positions: Tensor, dtype: torch.dtype,
                length: Tensor | int | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin, each (B, T, 1, K/2), for positions (B, T); angles are taken in float64 before they are rounded.

    `length` (B,) is that of the whole texts, by default up to the last position of each row.
    """
    if length is None:
        length = positions.amax(-1) + 1 if config.depends_on_length else 0
    frequency, factor = frequencies(config, head_dim, length)
    if frequency.dim() > 1:                                                       # every row has its own
        frequency = frequency[:, None, None]
    frequency = frequency.to(positions.device, non_blocking=True)                 # no need to wait for a GPU
    angle = positions[..., None, None] * frequency                                # (B, T, 1, K/2)
    cos, sin = angle.cos(), angle.sin()
    if factor != 1:
        cos, sin = cos.mul_(factor), sin.mul_(factor)
    return cos.to(dtype), sin.to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn x (B, T, H, K) by the tables of its positions; computed in the wider of both dtypes, returned as x's."""
    if torch.is_grad_enabled():
        return Rotate.apply(x, cos, sin, interleaved)
    return turn(x, cos, sin, interleaved)


class Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back, so nothing but the tables is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return turn(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx, g: Tensor):
        cos, sin = ctx.saved_tensors
        return turn(g, cos, -sin, ctx.interleaved), None, None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)                                # (B, T, H, K/2) each
        turned = torch.stack([(a * cos).sub_(b * sin), (b * cos).add_(a * sin)], dim=-1)
        return turned.flatten(-2).to(x.dtype)
    a, b = x.chunk(2, dim=-1)                                                     # (B, T, H, K/2) each
    return torch.cat([(a * cos).sub_(b * sin).to(x.dtype), (b * cos).add_(a * sin).to(x.dtype)], dim=-1)
