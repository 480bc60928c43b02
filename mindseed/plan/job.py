"""What a training step is asked to do, in the numbers that its memory and its time follow from.

A `Job` is a model's step without the model: how many rows, on how many ranks, shared out how, in which precision, with
which optimiser, and what is computed again instead of kept. Planners ask it for what one rank sees: its piece of the
tokens, its part of the mesh.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from mindseed.base.mesh import STAGES, ParallelOptions, Sizes
from mindseed.models.config import LayerConfig, LMConfig
from mindseed.nn.recompute import Recompute

ITEMSIZE = {"fp8": 2, "bf16": 2, "fp16": 2, "fp32": 4}       # of activations; fp8 is of products alone


@dataclass(frozen=True, kw_only=True)
class Job:
    """`rows` of `seq_len` tokens are a micro-batch of one data-parallel rank; `accumulate` of them make a step."""

    rows: int
    seq_len: int
    accumulate: int = 1
    world: int = 1
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    precision: str = "bf16"
    recompute: Recompute = False
    optimizer: str = "adamw"
    states: str = "fp32"             # of the optimiser; paged: on the GPU while they are used
    paged: bool = False              # whether there is a GPU to page from
    ema: bool = False
    chunk: int = 1024                # tokens per application of the head
    lora_rank: int = 0
    nf4: bool = False
    cpu: bool = False                # buffers and the head's kernel are others than on a GPU
    widened: bool = False            # products in float32 although activations are narrow: a CPU without a matrix unit
    compiled: bool = False
    cache_tokens: int = 0            # remembered by an engine beside the training: rollouts

    @cached_property
    def sizes(self) -> Sizes:
        return self.parallel.sizes(self.world)

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return ITEMSIZE[self.precision]

    @property
    def gather_itemsize(self) -> int:
        """Bytes in which a weight travels when ZeRO gathers it."""
        if self.parallel.gather == "auto":
            return 2 if self.precision in ("bf16", "fp8") and not self.cpu else 4
        return 2 if self.parallel.gather == "bf16" else 4

    @cached_property
    def pieces(self) -> int:
        """Of a micro-batch, for the pipeline."""
        return self.parallel.pieces

    @cached_property
    def tokens(self) -> float:
        """Tokens that pass through a block of one rank at a time: its part of every row of a piece."""
        return self.rows / self.pieces * self.seq_len / self.sizes.context

    @cached_property
    def tokens_per_step(self) -> int:
        """Over all ranks."""
        return self.rows * self.seq_len * self.accumulate * self.sizes.data

    @property
    def sequence(self) -> int:
        """Over how many ranks the stream between the matrices is cut."""
        return self.sizes.tensor if self.parallel.sequence else 1


def by_model(function: Callable) -> Callable:
    """Remember answers by the identity of configs and machines, whose hashing would take longer than most answers, and
    by the value of everything else."""
    known: dict[tuple, tuple] = {}

    @functools.wraps(function)
    def call(*args):
        key = tuple(id(x) if isinstance(x, (LMConfig, LayerConfig)) else x for x in args)
        if key not in known:
            if len(known) >= REMEMBERED:
                known.clear()
            known[key] = (args, function(*args))             # the arguments stay, so that no id is given twice
        return known[key][1]

    return call


REMEMBERED = 1 << 16


@dataclass(frozen=True)
class Chunk:
    """A stage's part of the model: some blocks, as (kind of layer, how often in a row), and what stands before the
    first or behind the last of all."""

    runs: tuple[tuple[LayerConfig, int], ...]
    first: bool
    last: bool


def runs(layers: tuple[LayerConfig, ...]) -> Iterator[tuple[LayerConfig, int]]:
    """(layer, how often in a row) for stretches of equal layers."""
    start = 0
    for i in range(1, len(layers) + 1):
        if i == len(layers) or layers[i] is not layers[start] and layers[i] != layers[start]:
            yield layers[start], i - start
            start = i


def chunks(config: LMConfig, job: Job) -> list[list[Chunk]]:
    """What every rank of the pipeline holds: one stage each, or two under schedules that say so. Each has
    as many blocks as the others, or one more (parallel/pipeline.py)."""
    return cut(config, job.parallel.pipe, job.parallel.schedule if job.parallel.pipe > 1 else "1f1b")


def unlike(held: list[list[Chunk]]) -> list[int]:
    """The ranks of a pipeline that hold something else than those before them: the first of each kind. Of equals it is
    the first that keeps the most pieces under way."""
    kinds: dict[tuple, int] = {}
    for rank, some in enumerate(held):
        kind = tuple((tuple((id(layer), times) for layer, times in c.runs), c.first, c.last) for c in some)
        kinds.setdefault(kind, rank)
    return list(kinds.values())


@by_model
def cut(config: LMConfig, pipe: int, schedule: str) -> list[list[Chunk]]:
    stages, layers, made = pipe * STAGES[schedule], len(config.layers), []
    for i in range(stages):
        own = config.layers[i * layers // stages:(i + 1) * layers // stages]
        made.append(Chunk(tuple(runs(own)), i == 0, i == stages - 1))
    return [[made[i] for i in stages_of(schedule, pipe, rank)] for rank in range(pipe)]


def stages_of(schedule: str, pipe: int, rank: int) -> list[int]:
    """Which stages a rank runs: one; two in a loop; or two in a V, whose tip is the last rank."""
    if STAGES[schedule] == 1:
        return [rank]
    return [rank, rank + pipe if schedule == "interleaved" else 2 * pipe - 1 - rank]
