"""The nine nouns: every idea that crosses a folder boundary, on one page.

A model reads a `Batch` and answers with an `Output`; an `Objective` turns the two into a loss; a `Source` hands out
batches; a `Backend` turns losses into updates. A `Tokenizer` makes ids of text, a `StateSpec` says what a layer
remembers while decoding, a `Task` grades answers and a `Tool` is something a model may call.

Shape letters, the same in every file: B batch, T time (query tokens), S key time, D model width, V vocabulary,
H query heads, G key/value heads, K head width, E experts.
"""
from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, fields, replace
from typing import Any, Callable, Iterator, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back. Special tokens never arise from plain text unless `allow_special` is set."""

    vocab_size: int
    specials: dict[str, int]                      # spelling -> id, e.g. {"<|im_end|>": 2}

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]: ...
    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...
    def decode(self, ids: list[int], *, skip_special: bool = False) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a model reads and what it should predict. Every tensor is (B, T).

    `positions` restart at 0 for every packed document, so they alone say which tokens may see each other.
    `extra` holds what one objective or one modality needs; every value has B as its first axis.
    """

    ids: Tensor              # long
    targets: Tensor          # long: the token that should follow ids[b, t]
    weights: Tensor          # float32: how much the loss counts here, 0 for prompts and padding
    positions: Tensor        # long
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for f in fields(self):
            x = getattr(self, f.name)
            if isinstance(x, Tensor) and x.shape != self.ids.shape:
                raise ValueError(f"Batch.{f.name} has shape {tuple(x.shape)}, ids has {tuple(self.ids.shape)}")

    def to(self, device: torch.device | str) -> Batch:
        move = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self) if f.name != "extra"}
        return replace(self, **move, extra={k: v.to(device, non_blocking=True) for k, v in self.extra.items()})


class Source(Protocol):
    """An endless stream of batches that is a pure function of (seed, index).

    Its state is one integer, the number of rows handed out over ALL ranks, so resuming is exact, costs O(1) and
    survives a change of world size.
    """

    def __next__(self) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class StateSpec:
    """What a mixer remembers while decoding, per layer. Shapes are without batch and time axes.

    Per-token state grows with the sequence, up to the last `window` tokens if there is a window, and can be paged;
    per-sequence state is of fixed size, and its presence forbids the reuse of a partial prefix. Cache allocation,
    memory planning and prefix caching all read this.
    """

    per_token: dict[str, tuple[int, ...]] = field(default_factory=dict)
    per_seq: dict[str, tuple[int, ...]] = field(default_factory=dict)
    window: int | None = None

    def bytes_per_token(self, itemsize: int) -> int:
        return sum(torch.Size(s).numel() for s in self.per_token.values()) * itemsize

    def bytes_per_seq(self, itemsize: int) -> int:
        return sum(torch.Size(s).numel() for s in self.per_seq.values()) * itemsize

    def bytes_of(self, length: int, itemsize: int) -> int:
        """What a sequence of `length` tokens takes up."""
        kept = length if self.window is None else min(length, self.window)
        return kept * self.bytes_per_token(itemsize) + self.bytes_per_seq(itemsize)


class LayerState(Protocol):
    """One layer's memory of a batch of sequences: where a mixer keeps what its StateSpec declares."""

    def append(self, **new: Tensor) -> tuple[Tensor, ...]:
        """Store per-token tensors (B, T, ...) and return each whole, (B, S, ...), in the order given."""
        ...

    def get(self, name: str) -> Tensor | None: ...          # per-sequence state, None before the first token
    def put(self, name: str, value: Tensor) -> None: ...


class State(Protocol):
    """What a model remembers of a batch of sequences while decoding."""

    def begin(self, positions: Tensor) -> dict[int | None, Tensor]:
        """Make room for new tokens at positions (B, T); return the positions (B, S) of all keys that layers will see,
        by their window (None: no window)."""
        ...

    def layer(self, index: int) -> LayerState: ...


def tokens_ahead(x: Tensor, distance: int) -> Tensor:
    """x[b, t + distance] for x (B, T), and the last one where the row has ended: what is said there is not counted."""
    return torch.cat([x[:, distance:], x[:, -1:].expand(-1, min(distance, x.shape[1]))], dim=1)


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a language model hands to an objective: hidden states, and the head that is still to be applied.

    An objective asks for the least it needs: `logps` applies the head chunk by chunk, so that (B, T, V) never exists.
    """

    hidden: Tensor                                # (B, T, D), after the last norm
    head: Tensor                                  # (V, D)
    chunk: int = 1024                             # tokens per application of the head
    dtype: torch.dtype | None = None              # of the head's products; None: that of `hidden`
    kernel: Callable[..., tuple[Tensor, Tensor]] | None = None    # what applies it, as ChunkedHead (None) does
    values: Tensor | None = None                  # (B, T): a critic's or reward model's estimate
    aux: dict[str, Tensor] = field(default_factory=dict)   # auxiliary losses of layers, per token (B, T), weighed
    further: tuple[Tensor, ...] = ()              # (B, T, D) each: what predicts the token 2, 3, ... ahead
    further_weight: float = 0.0                   # of the mean of their losses
    ahead: Callable[[Tensor, int], Tensor] = tokens_ahead         # what finds those tokens, also where rows are cut
    states: tuple[Tensor, ...] = ()               # (B, T, ...) each: the residual stream where it was asked for
    parts: dict[str, Tensor] = field(default_factory=dict)   # (B, T, ...) each: what one layer's attention works with

    def logits(self) -> Tensor:
        """(B, T, V), in the dtype of the head's product; for decoding and for objectives that need them all."""
        return torch.nn.functional.linear(self.hidden, self.head)

    def at(self, tokens: Tensor) -> Output:
        """Only some tokens, as one row (1, n, D), so that no head is applied to the others: those where a boolean
        (B, T) is True, or whose numbers (n,) in the flattened batch are given."""
        index = tokens.flatten().nonzero()[:, 0] if tokens.dtype == torch.bool else tokens

        def pick(x: Tensor) -> Tensor:
            return x.flatten(0, 1).index_select(0, index)[None]

        return replace(self, hidden=pick(self.hidden), values=None if self.values is None else pick(self.values),
                       aux={name: pick(x) for name, x in self.aux.items()}, further=tuple(map(pick, self.further)),
                       states=tuple(map(pick, self.states)), parts={name: pick(x) for name, x in self.parts.items()})

    def logps(self, targets: Tensor) -> Tensor:
        """log p(targets), (B, T), in at least float32; recomputes the head in the backward pass."""
        return self.logps_and_lse(targets)[0]

    def logps_and_lse(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """log p(targets) and log of the partition function (for z-loss), both (B, T)."""
        kernel = self.kernel or ChunkedHead.apply
        logps, lse = kernel(self.hidden.flatten(0, 1), self.head, targets.flatten(), self.chunk,
                            self.dtype or self.hidden.dtype)
        return logps.view_as(targets), lse.view_as(targets)


class Objective(Protocol):
    """What is minimised. It never sees the model, only its output, so that no algorithm can bypass a wrapper.

    `prepare` runs without gradients and may attach reference, teacher or old-policy quantities to `Batch.extra`.
    `loss` returns SUMS over the units that `count` counts; the loop divides once, by the global count. Metrics beside
    the loss are such sums too, or with an attribute `of_tokens = True` sums over tokens, whatever the loss counts.
    """

    splittable: bool                              # False if micro-batches must not be cut apart (contrastive losses)

    def prepare(self, batch: Batch) -> Batch: ...
    def count(self, batch: Batch) -> Tensor: ...
    def loss(self, output: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]: ...


class Backend(Protocol):
    """How a loss becomes an update: native (DDP, FSDP2), a pipeline schedule, or DeepSpeed."""

    def forward_backward(self, batch: Batch, *, scale: Tensor, last: bool) -> dict[str, Tensor]:
        """Add the gradient of `scale * loss` for one micro-batch; `last` closes the accumulation."""
        ...

    def step(self, lr: float) -> float:
        """Clip, update with learning rate `lr`, clear gradients; return the gradient norm before clipping."""
        ...

    def whole(self) -> contextlib.AbstractContextManager:
        """Inside, ranks may run the model without waiting for each other, as far as the backend lets them."""
        ...

    def cut(self, batch: Batch) -> Batch:
        """This rank's part of rows that are shared with other ranks."""
        ...

    def score(self, batch: Batch) -> Tensor:
        """The summed loss of a batch, without gradients: to find the sample that spoilt a step."""
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Task(Protocol):
    """A set of examples with a grader; evaluation and reinforcement learning share both."""

    name: str

    def examples(self) -> Iterator[dict]: ...
    def prompt(self, example: dict) -> list[dict]: ...            # chat messages
    def grade(self, example: dict, answer: str) -> dict[str, float]: ...   # {"score": 0..1, ...}


class Tool(Protocol):
    """Something a model may call: agents, RL environments, the server and MCP share it."""

    name: str
    description: str
    schema: dict                                  # JSON schema of the arguments

    def call(self, arguments: dict) -> str: ...


class ChunkedHead(torch.autograd.Function):
    """Linear head, log-softmax and pick of the target, `chunk` tokens at a time, in both directions.

    The logits of one chunk are all that ever exists: the forward pass keeps the log partition function, from which
    the backward pass rebuilds the softmax of a chunk with one product. Products run in `dtype`, reductions in at least
    float32.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor, chunk: int,
                dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        h, w = hidden, head.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        logps, lse = h.new_empty(2, len(h), dtype=wide)
        with torch.autocast(h.device.type, enabled=False):                        # which would change `dtype`
            for i in range(0, len(h), chunk):
                logits = torch.nn.functional.linear(h[i:i + chunk].to(dtype), w).to(wide)     # (chunk, V)
                lse[i:i + chunk] = logits.logsumexp(-1)
                logps[i:i + chunk] = logits.gather(-1, targets[i:i + chunk, None])[:, 0] - lse[i:i + chunk]
        ctx.save_for_backward(h, w, targets, lse)
        ctx.chunk, ctx.head_dtype = chunk, head.dtype
        return logps, lse

    @staticmethod
    def backward(ctx, g_logps: Tensor, g_lse: Tensor):
        h, w, targets, lse = ctx.saved_tensors
        g_hidden = torch.empty_like(h)
        learns = ctx.needs_input_grad[1]                                          # not under an adapter
        g_head = torch.zeros(w.shape, dtype=lse.dtype, device=w.device) if learns else None
        for i in range(0, len(h), ctx.chunk):
            at = slice(i, i + ctx.chunk)
            here = h[at].to(w.dtype)
            grad = torch.nn.functional.linear(here, w).to(lse.dtype).sub_(lse[at, None]).exp_()     # softmax
            grad.mul_((g_lse[at] - g_logps[at])[:, None])
            grad.scatter_add_(-1, targets[at, None], g_logps[at, None])
            grad = grad.to(w.dtype)
            g_hidden[at] = grad @ w
            if learns:
                g_head += grad.T @ here
        return g_hidden, g_head.to(ctx.head_dtype) if learns else None, None, None, None
