"""One matrix and what adapts it: LoRA, rsLoRA and DoRA as arithmetic.

LoRA (2106.09685) leaves a matrix W alone and learns a product of two thin ones beside it, B A, of rank r:

    y = W x + s B A x         A (r, in) random, B (out, r) zero at first, so that nothing changes at the start

    s = alpha / r             LoRA: the update becomes smaller per direction as the rank grows
    s = alpha / sqrt(r)       rsLoRA (2312.03732): the size that keeps large ranks learning

DoRA (2402.09353) takes the sum apart into the direction of every row and its length, and learns the lengths m by
themselves:

    y = m / |W + s B A| (W + s B A) x            |.| by rows, a constant to the gradient; m = |W| at first

Every adapter is thus a change of W that is added: several may be active at once, each with a weight, and in DoRA's case
the weight leads from the base (0) to the whole change (1). Dropout thins out what A sees. While rows of a batch have
adapters of their own, all are stacked, and each row's pair is gathered: (B, T, r) products beside one large one.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindseed.nn.adapters import Switch
from mindseed.nn.linear import Linear, project
from mindseed.nn.moe import ExpertLinear


class LowRank(nn.Module):
    """What one adapter holds for one matrix (out, in), or for a stack of them (E, out, in): A (.., r, in),
    B (.., out, r), and for DoRA the lengths of rows (.., out)."""

    adapts = True                                 # so optim/groups.py tells A and B from the matrices of a model

    def __init__(self, A: Tensor, B: Tensor, magnitude: Tensor | None = None, *, alpha: float, rs: bool = False,
                 dropout: float = 0.0) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        self.alpha, self.rs, self.dropout = alpha, rs, dropout

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank ** 0.5 if self.rs else self.rank)

    def forward(self, x: Tensor) -> Tensor:
        """s B A x: (.., in) -> (.., out)."""
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.A.dtype)
        return project(project(x, self.A) * self.scale, self.B)

    def update(self) -> Tensor:
        """s B A: (.., out, in)."""
        with torch.autocast(self.A.device.type, enabled=False):
            return self.B @ self.A * self.scale

    def gain(self, weight: Tensor) -> Tensor | None:
        """DoRA: by how much every row of W + s B A is stretched, (.., out); None for LoRA."""
        if self.magnitude is None:
            return None
        norms = row_norms(weight, self.update().detach())
        return self.magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny)    # a row of zeros stays one


def row_norms(weight: Tensor, update: Tensor | None = None) -> Tensor:
    """(.., out, in) -> (.., out), in at least float32 and without gradients."""
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return torch.linalg.vector_norm(weight if update is None else weight + update.to(weight.dtype), dim=-1)


def fresh(weight: Tensor, *, rank: int, alpha: float, rs: bool, dora: bool, dropout: float,
          generator: torch.Generator) -> LowRank:
    """A new adapter of a matrix that changes nothing yet, in at least float32."""
    *stack, rows, columns = weight.shape
    dtype = torch.promote_types(weight.dtype, torch.float32)
    A = torch.empty(*stack, rank, columns, dtype=dtype).normal_(0, 1 / rank, generator=generator)
    B = torch.zeros(*stack, rows, rank, dtype=dtype)
    return LowRank(A.to(weight.device), B.to(weight.device), row_norms(weight) if dora else None, alpha=alpha, rs=rs,
                   dropout=dropout)


@dataclass(frozen=True)
class Stack:
    """All adapters of one matrix, by the numbers of the switch; 0 is the base, and so is one that has no part here."""

    A: Tensor                                     # (n, r, in), of the largest rank, filled up with zeros
    B: Tensor                                     # (n, out, r), scales and stretches of rows included
    share: Tensor | None                          # (n, out): of W x, where DoRA stretches rows


class Adapter(nn.Module):
    """All that adapts one Linear, by name. `Linear.adapter` describes how it is asked."""

    def __init__(self, switch: Switch) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        self.switch = switch
        self.stack: tuple[tuple, Stack] | None = None         # and what it was made for

    def active(self) -> list[tuple[LowRank, float]]:
        return [(self.parts[name], weight) for name, weight in self.switch.active.items() if name in self.parts]

    @property
    def one_matrix(self) -> bool:
        return not self.switch.by_row or self.switch.only is not None

    def forward(self, linear: Linear, x: Tensor) -> Tensor:
        y = linear.product(x)
        if self.switch.by_row:
            return self.each_its_own(linear, x, y)
        total = None
        for part, weight in self.active():
            change = part(x)
            if part.magnitude is not None:        # else the matrix is not asked for: it may have to be unpacked
                gain = part.gain(linear.matrix())
                change = gain * change + (gain - 1) * y
            change = change if weight == 1 else weight * change
            total = change if total is None else total + change
        return y if total is None else y + total.to(y.dtype)

    def each_its_own(self, linear: Linear, x: Tensor, y: Tensor) -> Tensor:
        """Row b of x (B, T, in) with its adapter."""
        stack, which, dtype = self.stacked(linear), self.which(), y.dtype
        A, B = stack.A[which], stack.B[which]                                     # (B, r, in), (B, out, r)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(A.dtype)
        change = project(project(x, A), B) if A.ndim == 2 else torch.bmm(torch.bmm(x, A.mT), B.mT)      # (B, T, out)
        if stack.share is not None:
            share = stack.share[which]
            y = y * (share if share.ndim == 1 else share[:, None])
        return (y + change).to(dtype)

    def which(self) -> Tensor | int:
        """The number of every row, or the one that all have."""
        return self.switch.rows if self.switch.only is None else self.switch.only

    def stacked(self, linear: Linear) -> Stack:
        """Kept for as long as nothing is learnt and the switch's version stays."""
        some = next(iter(self.parts.values()))
        key = (self.switch.version, some.A.device, some.A.dtype)
        if not torch.is_grad_enabled() and self.stack is not None and self.stack[0] == key:
            return self.stack[1]
        matrix, rank = linear.matrix(), max(part.rank for part in self.parts.values())
        ones = some.B.new_ones(matrix.shape[0])
        A, B, share = [some.A.new_zeros(rank, matrix.shape[1])], [some.B.new_zeros(matrix.shape[0], rank)], [ones]
        for name in self.switch.names:
            part = self.parts[name] if name in self.parts else None
            gain = None if part is None else part.gain(matrix)
            A.append(A[0] if part is None else F.pad(part.A, (0, 0, 0, rank - part.rank)))
            wide = B[0] if part is None else F.pad(part.B * part.scale, (0, rank - part.rank))
            B.append(wide if gain is None else gain[:, None] * wide)
            share.append(ones if gain is None else gain)
        dora = any(part.magnitude is not None for part in self.parts.values())
        stack = Stack(torch.stack(A), torch.stack(B), torch.stack(share) if dora else None)
        self.stack = None if torch.is_grad_enabled() else (key, stack)
        return stack

    def dense(self, linear: Linear) -> Tensor:
        """W as it acts: (out, in)."""
        if not self.switch.by_row:
            return changed(linear.matrix(), self.active())
        assert self.switch.only is not None, "rows of this batch have different matrices"
        name = self.switch.names[self.switch.only - 1] if self.switch.only else None
        return changed(linear.matrix(), [(self.parts[name], 1.0)] if name in self.parts else [])


class ExpertAdapter(Adapter):
    """The same for a stack of experts. Their products are taken with the sum of both, which is made anew for every
    pass: it costs a copy of the experts, rows cannot have adapters of their own, and there is no input to thin out."""

    def dense(self, linear: ExpertLinear) -> Tensor:
        """W as it acts: (E, out, in). The switch sees to it that no row asks for one of these alone."""
        return linear.matrix() if self.switch.by_row else changed(linear.matrix(), self.active())


def changed(matrix: Tensor, parts: list[tuple[LowRank, float]]) -> Tensor:
    """A matrix, or a stack of them, with everything added that is active, in the wider dtype of the two."""
    kept, total = 1.0, None
    for part, weight in parts:
        change, gain = part.update(), part.gain(matrix)
        if gain is not None:                      # (1 - weight) W + weight (stretched sum): W itself cancels at 1
            change, kept = gain[..., None] * (matrix + change), kept - weight
        change = change if weight == 1 else weight * change
        total = change if total is None else total + change
    if total is None:
        return matrix
    return total if kept == 0 else matrix * kept + total if kept != 1 else matrix + total
