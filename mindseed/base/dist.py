"""Which of how many processes this is, and which share of the work is its own. One process is the case where every call
here does nothing.

Processes that share a batch hold different tokens, and sums go over these alone. Unless a mesh says otherwise
(parallel/mesh.py calls `share`), that is every process, each with rows of its own.
"""
from __future__ import annotations

import contextlib
import os
import secrets
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from mindseed.base.errors import UserError
from mindseed.base.watch import Watch


@dataclass(frozen=True, kw_only=True)
class Share:
    """This process's part of a batch. `group` are the ranks that hold other tokens of it, None: all."""

    row_rank: int                                 # which rows are read here,
    row_ranks: int                                # of how many shares
    parts: int                                    # how many ranks hold different tokens
    group: dist.ProcessGroup | None


LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")    # gloo, nccl
MEETING_S = 1800.0                                # as torch waits: a machine may be long in coming
SHARE: list[Share] = []                           # at most one: the mesh in use


def share(mine: Share | None) -> None:
    """Say what this process's part is, or (None) that all processes hold rows of their own."""
    SHARE[:] = [mine] if mine else []


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def row_rank() -> int:
    """Which of the shares of rows is read here. Ranks that work on the same rows have the same one."""
    return SHARE[0].row_rank if SHARE else rank()


def row_ranks() -> int:
    """How many shares of rows there are."""
    return SHARE[0].row_ranks if SHARE else world_size()


def parts() -> int:
    """How many ranks hold different tokens of a batch: as many as gradients are averaged over."""
    return SHARE[0].parts if SHARE else world_size()


def ranks_started() -> int:
    """How many processes this run has, before they have met."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def local_ranks() -> int:
    """How many processes of this run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if launched() else 1


def is_main() -> bool:
    return rank() == 0


def launched() -> bool:
    """Were we started by torchrun (or anything that speaks its environment variables)?"""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def meet(backend: str) -> None:
    """Join the other processes where the launcher says. Where torchrun starts ranks anew, its store may still hold the
    addresses of those that died (pytorch#135712), so whoever meets has a part of the store to itself."""
    store, rank, world = next(rendezvous("env://"))
    life = greet(store, world) if rank == 0 else answer(store, rank)
    dist.init_process_group(backend, store=dist.PrefixStore(life, store), rank=rank, world_size=world)


def greet(store: dist.Store, world: int) -> str:
    """Rank 0 makes up a word for this meeting and tells it to every rank that has said hello. Who said so in an earlier
    life will not confirm it."""
    life, told, missing = secrets.token_hex(8), {}, set(range(1, world))
    until = time.monotonic() + MEETING_S
    while missing:
        for rank in sorted(missing):
            if store.check([f"hello-{rank}"]):
                hello = store.get(f"hello-{rank}").decode()
                if told.get(rank) != hello:
                    store.set(f"word-{hello}", life)
                    told[rank] = hello
                if store.check([f"heard-{hello}-{life}"]):
                    missing.remove(rank)
        if time.monotonic() > until:
            raise UserError(f"ranks {', '.join(map(str, sorted(missing)[:8]))} have not come in {MEETING_S:.0f} s; "
                            "were all ranks started, and can they reach MASTER_ADDR:MASTER_PORT?")
        time.sleep(0.01 * bool(missing))
    return life


def answer(store: dist.Store, rank: int) -> str:
    """The word of this meeting, as rank 0 tells it to a hello that nobody said before."""
    hello = secrets.token_hex(8)
    try:
        store.set(f"hello-{rank}", hello)
        store.wait([f"word-{hello}"], timedelta(seconds=MEETING_S))
        life = store.get(f"word-{hello}").decode()
        store.set(f"heard-{hello}-{life}", "")
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise UserError(f"rank {rank} has said hello and rank 0 did not answer ({why})") from None
    return life


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the group that torchrun set up, with nccl on CUDA and gloo elsewhere; leave it at the end. If this rank
    fails, or another, all end."""
    watch = None
    if launched():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        meet("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        if world_size() > 1:
            life = [secrets.token_hex(8)]
            dist.broadcast_object_list(life, src=0)
            watch = Watch(rank(), world_size(), life[0])
            watch.start()
    word: str | None = None
    well = False
    try:
        yield
        well = True
    except RuntimeError as error:
        word = str(error)
        if watch is None or not any(sign in word for sign in LOST):
            raise
        gone, word = watch.last_word(), None      # of the rank that failed first
        raise UserError(gone or f"another rank of this run is gone ({str(error).splitlines()[0]})") from None
    except BaseException as error:
        word = str(error) or type(error).__name__
        raise
    finally:
        if watch:
            watch.stop(word, well=well)
        share(None)
        if dist.is_initialized():                 # ZeRO on one process makes a group of its own
            dist.destroy_process_group()


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over all ranks that hold different tokens, as a new tensor without gradient."""
    x = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(x, group=SHARE[0].group if SHARE else None)
    return x


def joined(x: Tensor) -> Tensor:
    """(n, ...) of every rank that holds different tokens -> (ranks n, ...), in their order."""
    group = SHARE[0].group if SHARE else None
    out = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def place_among_parts() -> int:
    """This rank's number among those that hold different tokens."""
    return dist.get_rank(SHARE[0].group if SHARE else None) if dist.is_initialized() else 0


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on all ranks when it is true on one."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags)
    return bool(flags.item())


def gather(value: Any) -> list[Any]:
    """The picklable values of all ranks, in their order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def agree(**facts: str) -> None:
    """Raise UserError, on every rank, with all facts that are not the same everywhere. A collective call."""
    every, lines = gather(facts), []
    for name in facts:
        values = [found.get(name) for found in every]
        groups = {value: [i for i, v in enumerate(values) if v == value] for value in dict.fromkeys(values)}
        if len(groups) > 1:
            told = "; ".join(f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks[:8]))}"
                             f"{', ...' * (len(ranks) > 8)}: {value}" for value, ranks in groups.items())
            lines.append(f"  {name.replace('_', ' ')}: {told}")
    if lines:
        raise UserError("the ranks of this run do not agree, so they would not train one model:\n" + "\n".join(lines)
                        + "\nGive every rank the same command, code and data")


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def local(x: Tensor) -> Tensor:
    """What this rank holds of a tensor that is spread over ranks (a DTensor), sharing memory; any other as it is."""
    return x.detach().to_local() if hasattr(x, "to_local") else x
