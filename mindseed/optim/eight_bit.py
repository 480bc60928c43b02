"""AdamW whose two moments take a byte each instead of four (2110.02861), by bitsandbytes.

Every block of 256 numbers of a moment is kept as its largest absolute value and a code each, in the 8 bits with a
dynamic exponent that quant/nf4.py writes out; an update unpacks a block, changes it and packs it again. Blocks keep an
outlier to itself. As in the paper, embeddings stay in float32, and so does what has fewer than 4096 entries.

bitsandbytes has kernels for GPUs and for CPUs. On a CPU an update takes about twenty times as long as torch's fused
one.
"""
from __future__ import annotations

import torch

from mindseed.base.errors import UserError
from mindseed.base.extras import install


def eight_bit_adamw(groups: list[dict], *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """For groups of float32 parameters. UserError where bitsandbytes is missing."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError(f"optim.states=8bit needs bitsandbytes: {install('[8bit]')}") from None
    return AdamW8bit(groups, lr=lr, betas=betas, eps=eps)
