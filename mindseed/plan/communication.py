"""What ranks send to each other, and how long that takes.

A group of n ranks, r of them in each of n / r nodes, exchanges S bytes (the whole tensor) in a ring. Every link sends

    all-gather, reduce-scatter    (n - 1) / n  S
    all-reduce                    2 (n - 1) / n  S        (a reduce-scatter, then an all-gather)
    all-to-all                    (n - 1) / n  of what a rank has
    point to point                what is sent

Between nodes only (nodes - 1) / nodes of S must pass, through the network cards of all r ranks of a node at once;
within a node the link is the limit. The slower of the two decides. A collective begins after one message to every
rank of a node and to every doubling of nodes (latency).

The axes of a mesh lie in nodes innermost first: tensor, context, shard, replica, pipe. Which transfers hide behind
arithmetic, and which do not, is time.py's business.
"""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from mindseed.base.mesh import Sizes
from mindseed.plan.machines import LINK, Machine


@dataclass(frozen=True)
class Group:
    """So many ranks, so many of them in one node."""

    ranks: int
    per_node: int

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.per_node)


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """All transfers of one kind in a step: bytes that a rank sends, seconds that they take, seconds that work waits."""

    axis: str
    what: str
    sent: float
    seconds: float
    exposed: float


@functools.lru_cache(maxsize=1 << 12)
def groups(sizes: Sizes, per_node: int) -> dict[str, Group]:
    """The groups of a mesh by axis, with those that flatten several: sharded, parts, expert."""
    strides, stride = {}, 1
    for axis in ("tensor", "context", "shard", "replica", "pipe"):
        strides[axis], stride = stride, stride * getattr(sizes, axis)

    def group(ranks: int, stride: int) -> Group:
        return Group(ranks, max(1, min(ranks, per_node // stride)))

    found = {axis: group(getattr(sizes, axis), strides[axis]) for axis in strides}
    return found | {"sharded": group(sizes.shard * sizes.context, strides["context"]),
                    "parts": group(sizes.parts, strides["context"]),
                    "expert": group(sizes.expert, strides["context"])}


def gather_s(board: Machine, group: Group, size: float) -> float:
    """Seconds of an all-gather or reduce-scatter of `size` bytes in all."""
    n, r, nodes = group.ranks, group.per_node, group.nodes
    if n == 1:
        return 0.0
    inside = size * (n - 1) / n / (board.link * LINK) if r > 1 else 0.0
    across = size * (nodes - 1) / nodes / (r * board.network * LINK) if nodes > 1 else 0.0
    return max(inside, across) + delay_s(board, group)


def reduce_s(board: Machine, group: Group, size: float) -> float:
    """Seconds of an all-reduce."""
    return 2 * gather_s(board, group, size)


def exchange_s(board: Machine, group: Group, size: float) -> float:
    """Seconds of an all-to-all in which every rank has `size` bytes for all ranks, itself among them."""
    n, r = group.ranks, group.per_node
    if n == 1:
        return 0.0
    return max(size * (r - 1) / n / (board.link * LINK), size * (n - r) / n / (board.network * LINK)
               ) + delay_s(board, group)


def pass_s(board: Machine, group: Group, size: float) -> float:
    """Seconds to send `size` bytes to the next rank of a group, some of which lies in another node."""
    if group.ranks == 1:
        return 0.0
    if group.nodes > 1:
        return size / (board.network * LINK) + board.network_latency
    return size / (board.link * LINK) + board.latency


def delay_s(board: Machine, group: Group) -> float:
    return (group.per_node - 1) * board.latency + math.ceil(math.log2(group.nodes)) * board.network_latency


def share(group: Group) -> float:
    """(n - 1) / n."""
    return (group.ranks - 1) / group.ranks
