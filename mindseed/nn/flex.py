"""Attention through torch's FlexAttention (2412.05496), for training on a GPU.

A mask of pairs costs T x T bits and makes torch's fused kernels take a slower road. FlexAttention is told the rule
itself, as a function of two indices, compiles it into the kernel, and passes over blocks of 128 x 128 pairs in which
no query may see a key: what is left are the blocks along the diagonal of each packed document, or within the window.
Its backward pass exists on GPUs only; on a CPU the work is done by blocked.py.
"""
from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def block_mask(positions: Tensor, window: int | None) -> BlockMask:
    """Which blocks of pairs hold one to attend to. positions (B, T) restart at 0 with every document."""
    (B, T), device = positions.shape, positions.device
    document = (positions == 0).cumsum(1)
    reach = T if window is None else window

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < reach) & (document[b, i] == document[b, j])

    return on(device.type, create_block_mask)(visible, B, None, T, T, device=device)


def flex_attend(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask, *, scale: float | None,
                slopes: Tensor | None) -> Tensor:
    """As `attend.attend`: q (B, T, H, K), k (B, T, G, K), v (B, T, G, V) -> (B, T, H, V)."""
    def farther(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - slopes[h] * (i - j)

    y = on(q.device.type, flex_attention)(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=blocks, scale=scale,
        score_mod=None if slopes is None else farther, enable_gqa=q.shape[2] != k.shape[2])
    return y.transpose(1, 2)


def on(device: str, function: Callable) -> Callable:
    """Compiled on a GPU, where the kernel is only then a fused one; as it is elsewhere, and where all is compiled."""
    return function if device == "cpu" or torch.compiler.is_compiling() else compiled(function)


@functools.cache
def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)
