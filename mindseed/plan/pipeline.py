"""How long the ranks of a pipeline wait for each other, and how many pieces of a batch are under way at once.

A micro-batch is cut into m pieces that pass through p ranks one behind the other. Until the first piece has reached the
last rank, and after the last one has left it, ranks stand still: the *bubble*. With f, b the time that a rank needs for
one piece, forward and backward, of which b = i + w (gradients of inputs and of weights):

    gpipe         (p - 1) (f + b)           1811.06965; all m pieces are kept
    1f1b          (p - 1) (f + b)           2104.04473; rank r keeps p - r
    interleaved   (p - 1) (f + b) / v       2104.04473, v stages on a rank; more are kept at the front
    zero-bubble   (p - 1) max(f, i, w) / 2  ZB-V of 2401.10241 and 2405.15362: weights' gradients fill the gaps, and
                                            what is left is the way of the first piece down the V; every rank keeps p
    dualpipe-v    (p - 1) max(f, i)         2412.19437 gives (p - 1)(F&B + B - 3W) with times of one of 2 p stages;
                                            torch runs F and B one after the other, so F&B = F + B; every rank keeps
                                            p + 1/2

The first three are exact. The last two are what a simulation of torch's own lists of actions gives, to within 10%; a
test does it again.
"""
from __future__ import annotations

from mindseed.base.mesh import STAGES


def bubble_s(schedule: str, pipe: int, forward: float, inputs: float, weights: float) -> float:
    """Seconds that a rank stands still in one pass of a micro-batch, from the seconds it works for one piece."""
    longest = {"gpipe": forward + inputs + weights, "1f1b": forward + inputs + weights,
               "interleaved": (forward + inputs + weights) / STAGES["interleaved"],
               "zero-bubble": max(forward, inputs, weights) / 2, "dualpipe-v": max(forward, inputs)}
    return (pipe - 1) * longest[schedule]


def bubble_share(schedule: str, pipe: int, pieces: int) -> float:
    """Of a rank's time that it stands still, where stages are equal and both gradients take as long as the forward
    pass."""
    idle = bubble_s(schedule, pipe, 1.0, 1.0, 1.0)
    return idle / (3 * pieces + idle)


def in_flight(schedule: str, pipe: int, pieces: int, rank: int) -> list[float]:
    """How many pieces each stage of a rank keeps at the worst moment, in the order of `stages_of`; the sum is exact,
    and where there are two stages it is shared evenly, the first one at most all pieces."""
    if schedule == "gpipe":
        return [pieces]
    if schedule == "1f1b":
        return [min(pieces, pipe - rank)]
    if schedule == "interleaved":
        total = min(2 * pieces, pipe + 2 * (pipe - rank - 1) + 1)
    else:
        total = min(2 * pieces, 2 * pipe + (schedule == "dualpipe-v"))
    first = min(pieces, -(-total // 2))
    return [first, total - first]
