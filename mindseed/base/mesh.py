"""How the processes of a run share the work: the sizes of the axes of a mesh, and what follows from them by arithmetic.

Every rank has a place on five axes, here from the one whose ranks speak least with each other to the one whose ranks
speak most:

    pipe      different layers             (pipeline parallel)
    replica   whole copies of the weights  (data parallel, gradients are averaged over it)
    shard     parts of the weights         (data parallel too: ZeRO, each rank keeps a slice)
    context   parts of every sequence      (ring attention)
    tensor    parts of every matrix        (column and row parallel)

`replica x shard` ranks read different rows; together with `context` they hold different tokens, and over these the loss
is summed. Experts are dealt out over ranks that hold different tokens, so `expert` is no axis of its own: it takes
consecutive ranks of `replica x shard x context`. No torch here: planners ask the same questions about machines that
nobody has.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mindseed.base.config import option

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero-bubble", "dualpipe-v"]
STAGES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero-bubble": 2, "dualpipe-v": 2}        # on every rank
V_SHAPED = ("zero-bubble", "dualpipe-v")


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    backend: Literal["native", "deepspeed"] = option(
        "native", help="native: torch's own engine; deepspeed: DeepSpeed's, for parallel.zero and parallel.offload")
    zero: int = option(0, help="what data-parallel ranks share out instead of each keeping it whole: 0 nothing (DDP), "
                               "1 optimiser states, 2 gradients too, 3 weights too (FSDP2); in a pipeline 2 and 3 save "
                               "no more than 1")
    replicas: int = option(1, help="with zero: whole copies, each sharded over the ranks of its group (hybrid "
                                   "sharding)")
    tensor: int = option(1, help="ranks that share every matrix of a block: tensor parallel")
    sequence: bool = option(True, help="with tensor: between the matrices each rank keeps a part of the sequence only")
    context: int = option(1, help="ranks that share every sequence: ring attention, for long contexts")
    expert: int = option(1, help="ranks that share the experts of a mixture, within the data-parallel ranks")
    pipe: int = option(1, help="ranks that share the layers: pipeline parallel")
    schedule: Schedule = option("1f1b", help="of the pipeline: which micro-batch runs when")
    microbatches: int | None = option(None, help="pieces that a micro-batch is cut into for the pipeline [derived: two "
                                                 "for every stage]")
    offload: bool = option(False, help="with zero: optimiser states, gradients and weights wait in the CPU's memory")
    gather: Literal["auto", "fp32", "bf16"] = option(
        "auto", help="with zero: dtype in which weights travel; auto: bf16 on a GPU that trains in bf16, else fp32")
    deepspeed: str | None = option(None, help="a DeepSpeed JSON file, laid over what follows from these options")

    def __post_init__(self) -> None:
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"zero={self.zero} must be 0, 1, 2 or 3")
        for name in ("replicas", "tensor", "context", "expert", "pipe"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.microbatches is not None and self.microbatches < 1:
            raise ValueError(f"microbatches={self.microbatches} must be at least 1")

    def sizes(self, world: int) -> Sizes:
        """The axes for `world` ranks; what is left after all others is `shard` under ZeRO, else `replica`.

        Raises ValueError where the product cannot be `world`; `problems` says the same together with all else.
        """
        if problems := self.problems(world):
            raise ValueError("; ".join(problems))
        data = world // (self.pipe * self.tensor * self.context)
        replica = self.replicas if self.zero else data
        return Sizes(pipe=self.pipe, replica=replica, shard=data // replica, context=self.context, tensor=self.tensor,
                     expert=self.expert)

    def problems(self, world: int) -> list[str]:
        """Everything that is wrong with these sizes, whatever the model."""
        found, rest = [], self.pipe * self.tensor * self.context
        product = f"pipe {self.pipe} x context {self.context} x tensor {self.tensor} = {rest}"
        if world % rest:
            found.append(f"{product} does not divide the {world} ranks of this run")
        data = max(1, world // rest)
        if self.replicas > 1 and not self.zero:
            found.append(f"parallel.replicas={self.replicas} has a meaning with parallel.zero 1, 2 or 3 only: without "
                         "it every data-parallel rank is a whole copy")
        if self.zero and data % self.replicas:
            found.append(f"parallel.replicas={self.replicas} does not divide the {data} data-parallel ranks")
        if (data * self.context) % self.expert:
            found.append(f"parallel.expert={self.expert} does not divide the {data * self.context} ranks that hold "
                         "different tokens")
        elif self.zero and self.expert > 1 and self.expert != data // self.replicas * self.context:
            found.append(f"under parallel.zero={self.zero} experts are sharded by being dealt out, so parallel.expert "
                         f"must be {data // self.replicas * self.context} (shard x context), it is {self.expert}")
        if self.offload and not self.zero:
            found.append("parallel.offload needs parallel.zero 1, 2 or 3 (on one rank too)")
        if self.backend == "deepspeed" and self.replicas > 1:
            found.append("the deepspeed backend shards over all ranks, so it cannot have parallel.replicas="
                         f"{self.replicas}")
        if self.backend == "deepspeed" and rest * self.expert > 1:
            found.append(f"the deepspeed backend knows data parallelism alone, not {product}, expert {self.expert}")
        return found

    @property
    def pieces(self) -> int:
        """Of a micro-batch, for the pipeline."""
        return 1 if self.pipe == 1 else self.microbatches or 2 * self.pipe * STAGES[self.schedule]

    @property
    def splits_backward(self) -> bool:
        """Whether gradients of inputs and of weights come in passes of their own. What is recomputed is then made again
        for every one of them, several times a block."""
        return self.pipe > 1 and self.schedule in V_SHAPED

    @property
    def plain(self) -> bool:
        """Whether all there is to do is what DDP does."""
        return (self.backend, self.zero, self.tensor, self.context, self.expert, self.pipe) == ("native", 0, 1, 1, 1, 1)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The length of every axis of a mesh."""

    pipe: int = 1
    replica: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def world(self) -> int:
        return self.pipe * self.data * self.context * self.tensor

    @property
    def data(self) -> int:
        """Ranks that read different rows."""
        return self.replica * self.shard

    @property
    def parts(self) -> int:
        """Ranks that hold different tokens: over these the loss is summed."""
        return self.data * self.context

    def describe(self) -> str:
        named = [f"{name} {size}" for name, size in vars(self).items() if size > 1]
        return " x ".join(named) or "one process"
