"""Distillation: a student that learns the whole distribution of a teacher, not only the token that came (1503.02531).

At every token the distance of two distributions is minimised, of the teacher, P, and of the student, Q:

    forward     KL(P || Q)     the student covers all that the teacher may say
    reverse     KL(Q || P)     the student keeps to what the teacher surely says (2306.08543)
    jsd         b KL(P || M) + (1 - b) KL(Q || M),  M = b P + (1 - b) Q     between both (2306.13649): divided by b it
                is the forward one as b goes to 0, divided by 1 - b the reverse one as b goes to 1

A `temperature` above 1 shows more of what is unlikely; the loss is then multiplied by its square, so that gradients
keep their size. `hard` mixes in the ordinary loss of the token that came. Distributions exist for no more than `chunk`
tokens at a time, in either pass. The batch may hold anybody's text or, on-policy, the student's own.

With `states` or `relations` the student also follows the teacher within, see matching.py.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Callable, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mindseed.core import Batch, Output
from mindseed.objectives.matching import relation_distance, state_distance
from mindseed.objectives.sft import SFT

Distance = Literal["forward", "reverse", "jsd"]
Teacher = Callable[[Tensor, Tensor], Output]      # (ids, positions) -> Output, without gradients


@dataclass(frozen=True, kw_only=True)
class Distill:
    """`teacher` and `teacher_head` (V, D of the teacher): its hidden states travel in the batch, its head stays here.
    Rows of both heads from `vocab_size` on belong to no token and are left out. `states` and `relations` weigh what is
    matched within, per token; both models must tell it."""

    teacher: Teacher
    teacher_head: Tensor
    vocab_size: int
    distance: Distance = "forward"
    beta: float = 0.5                             # of jsd
    temperature: float = 1.0
    hard: float = 0.0
    states: float = 0.0
    relations: float = 0.0
    chunk: int = 256                              # tokens of which both distributions exist at once
    splittable = True

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta={self.beta} must lie between 0 and 1; at its ends the jsd is 0")
        if not 0 <= self.hard <= 1:
            raise ValueError(f"hard={self.hard} is a share, from 0 to 1")
        if self.states < 0 or self.relations < 0:
            raise ValueError(f"states={self.states} and relations={self.relations} must not be negative")
        if not 0 < self.vocab_size <= len(self.teacher_head):
            raise ValueError(f"vocab_size={self.vocab_size} must lie between 1 and the {len(self.teacher_head)} rows "
                             "of the teacher's head")

    def prepare(self, batch: Batch) -> Batch:
        """With what the teacher makes of the batch: "teacher" (B, T, D of the teacher), and what is matched."""
        told = self.teacher(batch.ids, batch.positions)
        inside = {f"teacher_state_{i}": x for i, x in enumerate(told.states)} if self.states else {}
        inside |= {f"teacher_{name}": x for name, x in told.parts.items()} if self.relations else {}
        return replace(batch, extra=batch.extra | {"teacher": told.hidden} | inside)

    def count(self, batch: Batch) -> Tensor:
        """Tokens, by weight."""
        return batch.weights.sum()

    def loss(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        counted = batch.weights != 0
        bare = replace(output, states=(), parts={})
        some, weights = bare.at(counted), batch.weights[counted]
        each = ChunkedDistance.apply(some.hidden[0], some.head, batch.extra["teacher"][counted], self.teacher_head,
                                     self, some.dtype or some.hidden.dtype)       # (n,)
        metrics = {"distance": (each * weights).sum()}
        total = (1 - self.hard) * self.temperature ** 2 * metrics["distance"]
        if self.hard:
            metrics["nll"] = SFT().of_tokens(bare, batch.targets, batch.weights)[0]
            total = total + self.hard * metrics["nll"]
        for name, weight, value in self.within(output, batch):
            metrics[name] = (value * batch.weights).sum()
            total = total + weight * metrics[name]
        total, beside = SFT().beside(total, bare, batch)
        return total, {name: value.detach() for name, value in (metrics | beside).items()}

    def within(self, output: Output, batch: Batch) -> list[tuple[str, float, Tensor]]:
        """(name, weight, (B, T)) of what is matched: states as a mean over depths, relations as a sum over kinds."""
        found = []
        if self.states:
            each = [state_distance(x, batch.extra[f"teacher_state_{i}"]) for i, x in enumerate(output.states)]
            found.append(("states", self.states, torch.stack(each).mean(0)))
        if self.relations:
            each = [relation_distance(x, batch.extra[f"teacher_{name}"], batch.positions)
                    for name, x in output.parts.items()]
            found.append(("relations", self.relations, torch.stack(each).sum(0)))
        return found


class ChunkedDistance(torch.autograd.Function):
    """The distance at each of n tokens, (n,), both heads applied `chunk` tokens at a time, in both directions.

    The student's products run in `dtype`, the teacher's in its own, reductions in at least float32. Backward computes
    the two distributions of a chunk again: had the gradient been kept from the forward pass, fp16 would have rounded it
    before the loss was scaled.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, theirs: Tensor, their_head: Tensor, about: Distill,
                dtype: torch.dtype) -> Tensor:
        w, their_w = head[:about.vocab_size].to(dtype), their_head[:about.vocab_size].to(theirs.dtype)
        ctx.save_for_backward(hidden, w, theirs, their_w)
        ctx.about, ctx.head_dtype, ctx.head_rows = about, head.dtype, len(head)
        out = hidden.new_empty(len(hidden), dtype=torch.promote_types(dtype, torch.float32))
        with torch.autocast(hidden.device.type, enabled=False):                   # which would change both dtypes
            for at, p, q in distributions(hidden, w, theirs, their_w, about):
                out[at] = divergence(p, q, about.distance, about.beta)
        return out

    @staticmethod
    def backward(ctx, g: Tensor):
        hidden, w, theirs, their_w = ctx.saved_tensors
        g_hidden, learns = torch.empty_like(hidden), ctx.needs_input_grad[1]        # a frozen head does not
        g_head = torch.zeros(ctx.head_rows if learns else 0, w.shape[1], dtype=g.dtype, device=w.device)
        for at, p, q in distributions(hidden, w, theirs, their_w, ctx.about):
            grad = slope(p, q, ctx.about.distance, ctx.about.beta).mul_(g[at, None] / ctx.about.temperature).to(w.dtype)
            g_hidden[at] = grad @ w
            if learns:
                g_head[:len(w)] += grad.T @ hidden[at].to(w.dtype)
        return g_hidden, g_head.to(ctx.head_dtype) if learns else None, None, None, None, None


def distributions(hidden: Tensor, w: Tensor, theirs: Tensor, their_w: Tensor, about: Distill):
    """Chunk by chunk (which tokens, log-probabilities (n, V) of the teacher, of the student)."""
    for i in range(0, len(hidden), about.chunk):
        at = slice(i, i + about.chunk)
        p, q = (F.linear(x[at].to(head.dtype), head) for x, head in ((theirs, their_w), (hidden, w)))
        yield at, *((x.to(torch.promote_types(x.dtype, torch.float32)) / about.temperature).log_softmax(-1)
                    for x in (p, q))


def divergence(p: Tensor, q: Tensor, distance: Distance, beta: float = 0.5) -> Tensor:
    """Of log-probabilities (n, V) of the teacher and the student: (n,)."""
    if distance == "forward":
        return (p.exp() * (p - q)).sum(-1)
    if distance == "reverse":
        return (q.exp() * (q - p)).sum(-1)
    m = mixture(p, q, beta)
    return (beta * p.exp() * (p - m) + (1 - beta) * q.exp() * (q - m)).sum(-1)


def slope(p: Tensor, q: Tensor, distance: Distance, beta: float = 0.5) -> Tensor:
    """The derivative (n, V) of the divergence by the logits behind q. Of a sum of f(q_i) it is q_i (f'(q_i) - mean of
    f' under q), and constants in f' fall out; for KL(P || Q) that is Q - P."""
    if distance == "forward":
        return q.exp() - p.exp()
    change = q - p if distance == "reverse" else (1 - beta) * (q - mixture(p, q, beta))
    likely = q.exp()
    return likely * (change - (likely * change).sum(-1, keepdim=True))


def mixture(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """log(beta P + (1 - beta) Q)."""
    share = torch.tensor(beta, dtype=p.dtype, device=p.device)
    return torch.logaddexp(p + share.log(), q + (-share).log1p())
