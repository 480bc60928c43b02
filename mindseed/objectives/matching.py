"""How far the inside of a student is from that of a teacher, token by token. What is compared: models/matching.py.

*States* are vectors of one width by now. Their squared distance is taken in units of the teacher's own length, since a
residual stream grows from block to block (and some tokens stand out a hundredfold): 0 is equal, 1 is as wrong as saying
nothing.

*Relations*, for each of queries, keys and values x (T, K) of a head: softmax(x x^T / sqrt(K)) over the tokens that
token t may look at is a distribution, what t is like; the divergence of the teacher's from the student's is what is
lost at t. Only some rows of a map exist at a time, and again in the backward pass.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def state_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """(B, T) of vectors (B, T, D)."""
    ours, theirs = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (ours, theirs))
    least = torch.finfo(theirs.dtype).tiny
    return (ours - theirs).square().sum(-1) / theirs.square().sum(-1).clamp_min(least)


def relation_distance(ours: Tensor, theirs: Tensor, positions: Tensor, chunk: int = 128) -> Tensor:
    """(B, T), the mean over R heads, of vectors (B, T, R, K); K may differ, positions (B, T) restart at documents."""
    document = (positions == 0).cumsum(1)                                         # (B, T)
    return torch.cat([checkpoint(rows_distance, ours, theirs, document, i, i + chunk, use_reentrant=False)
                      for i in range(0, ours.shape[1], chunk)], dim=1)


def rows_distance(ours: Tensor, theirs: Tensor, document: Tensor, first: int, last: int) -> Tensor:
    """Of the tokens from `first` to below `last`, (B, t), which see none beyond themselves."""
    visible = document[:, first:last, None] == document[:, None, :last]           # (B, t, S)
    visible = visible.tril(first)[:, None]                                        # (B, 1, t, S)
    with torch.autocast(ours.device.type, enabled=False):                         # which would round what was widened
        q, p = (relation(x[:, first:last], x[:, :last], visible) for x in (ours, theirs))
    return (p.exp() * (p - q)).sum(-1).mean(1)                                    # (B, R, t, S) -> (B, t)


def relation(rows: Tensor, x: Tensor, visible: Tensor) -> Tensor:
    """Log-probabilities (B, R, t, S) of which tokens of x (B, S, R, K) its rows (B, t, R, K) are like. What is hidden
    is so unlikely that it counts for nothing; an infinity would spoil the gradient."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scores = torch.einsum("btrk,bsrk->brts", rows.to(wide), x.to(wide)) * x.shape[-1] ** -0.5
    return scores.masked_fill(~visible, -1e9).log_softmax(-1)
