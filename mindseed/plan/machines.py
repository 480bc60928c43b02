"""What a device and the links between devices can do, as far as a plan needs it.

Peaks are the data sheet's (base/hardware.py). Memory, its bandwidth, links and networks are too: `link` is what a
device sends to its neighbours in a node, one way; `network` is the share of its node's network that belongs to it.
What is *attained* of all that is an assumption, stated here once, with where it comes from:

    ATTAINED   of the peak, by large products that go on for long. Chips that are at their limit of power lower their
               clock; the matmul finder of "Machine Learning Engineering" (Bekman) measures 702 of 989 TFLOP/s on an
               H200, 1439 of 2250 on a B200, 660 of 1307 on an MI300X. In a short burst it is 0.85 times as far from
               the peak again; where only the burst is known (A100 268 of 312), 0.85 of it is taken. A lower limit of
               power lowers the clock further: see `capped`. Products in fp8 reach 0.91 of the share (1453 of 1979)
    ATTENTION  of the peak, forward and backward: FlashAttention-2 on an H100, width 128, 8k tokens (2407.08608, figures
               5 and 6: 335 and about 300 of 989 TFLOP/s under a causal mask); on an A100 (2307.08691) about 190 and 170
               of 312. Kernels of the third generation are faster by half
    MEMORY     of the memory's bandwidth: what a large copy reaches
    EAGER      how often plain expressions go through memory where fused ones would once: measured, a step of ours of
               64M parameters on an H100 (benchmarks/train_cuda.py)
    LINK       of links and networks: NCCL's protocol takes about a fifth (370 of 450 GB/s on an H100, its authors say)
    HIDDEN     seconds that arithmetic loses to a second of communication beside it (2507.03114: 19% on average)

Prices are no data: what an hour of a device cost about, on demand, in 2025. Give --price.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches

from mindseed.base.errors import UserError
from mindseed.base.hardware import PEAKS

ATTAINED = {"A100": 0.73, "A800": 0.73, "H100": 0.71, "H200": 0.71, "H800": 0.71, "GH200": 0.71, "B200": 0.64,
            "GB200": 0.64, "MI300X": 0.50}
USUAL, IN_FP8 = 0.68, 0.91
ATTENTION, BEFORE_HOPPER = (0.34, 0.30), (0.60, 0.54)
HOPPER = ("H100", "H200", "H800", "B200", "MI300X")
MEMORY, LINK, HIDDEN = 0.90, 0.80, 0.19
LAUNCH_S = 5e-6                                   # of a kernel, from Python: below that a GPU waits for its CPU
EAGER, COMPILED = 6.5, 1.0                        # passes through memory, against fused operations


@dataclass(frozen=True, kw_only=True, eq=False)
class Machine:
    """One device, and how it is connected. Seconds, bytes, FLOP/s."""

    name: str
    source: str                                   # "data sheet" or "measured"
    peaks: dict[str, float]                       # dense, by precision
    attained: float = USUAL
    attention: tuple[float, float] = ATTENTION
    memory: float = 0.0
    bandwidth: float = 1e12
    units: int = 0                                # which work on tiles of a product; 0: unknown
    per_node: int = 1
    link: float = 10e9
    network: float = 1e9
    latency: float = 3e-6                         # of a message within a node
    network_latency: float = 10e-6
    host_link: float = 25e9                       # to the memory of the CPU
    price: float = 0.0                            # US dollars an hour
    passes: float | None = None                   # measured: instead of EAGER
    overhead: float = 0.0                         # measured: seconds per block beside what its parts take; on a GPU
    gpu: bool = True                              # at the least, for it computes while the CPU prepares what follows
    rates: dict[str, tuple[tuple[int, int, int, float], ...]] | None = None   # measured products: (m, k, n, FLOP/s)
    attention_rates: tuple[tuple[int, float, float], ...] = ()      # measured: (tokens, forward, backward FLOP/s)
    logit_s: float = 0.0                          # measured: seconds of one logit and its gradient, products left out
    update_rate: float = 0.0                      # measured: parameters a second that AdamW updates, clipping included


# Name on the data sheet: memory GB, its bandwidth TB/s, matrix units' hosts (SMs, CUs), devices of a node, link GB/s
# one way, network Gb/s of a device, dollars an hour.
BOARDS: dict[str, tuple[float, float, int, int, float, float, float]] = {
    "GB200": (186, 8.0, 148, 72, 900, 400, 6.0),
    "B200": (180, 7.7, 148, 8, 900, 400, 5.0),
    "H200 NVL": (141, 4.8, 132, 4, 450, 400, 3.2),
    "H200": (141, 4.8, 132, 8, 450, 400, 3.5),
    "GH200": (96, 4.0, 132, 1, 450, 400, 2.0),
    "H100 NVL": (94, 3.9, 132, 2, 300, 400, 2.2),
    "H100 PCIe": (80, 2.0, 114, 2, 300, 200, 2.0),
    "H100": (80, 3.35, 132, 8, 450, 400, 2.5),
    "H800": (80, 3.35, 132, 8, 200, 400, 2.0),
    "H20": (96, 4.0, 78, 8, 450, 400, 1.5),
    "A100": (80, 2.04, 108, 8, 300, 200, 1.5),
    "A800": (80, 2.04, 108, 8, 200, 200, 1.2),
    "A40": (48, 0.696, 84, 8, 32, 100, 0.5),
    "A30": (24, 0.933, 56, 8, 32, 100, 0.5),
    "A10G": (24, 0.6, 80, 8, 32, 100, 1.0),
    "A10": (24, 0.6, 72, 8, 32, 100, 0.7),
    "L40S": (48, 0.864, 142, 8, 32, 200, 0.9),
    "L40": (48, 0.864, 142, 8, 32, 100, 0.8),
    "L4": (24, 0.3, 58, 8, 32, 100, 0.6),
    "V100": (32, 0.9, 80, 8, 150, 100, 0.8),
    "T4": (16, 0.32, 40, 4, 16, 25, 0.4),
    "RTX 5090": (32, 1.792, 170, 8, 64, 25, 0.7),
    "RTX 4090": (24, 1.008, 128, 8, 32, 25, 0.4),
    "RTX 3090": (24, 0.936, 82, 8, 32, 25, 0.25),
    "MI300X": (192, 5.3, 304, 8, 448, 400, 2.5),
    "MI250X": (128, 3.2, 220, 4, 100, 200, 1.2),
}


def machine(name: str) -> Machine:
    """By its name on the data sheet, in any case. UserError with what was probably meant."""
    known = {board.upper(): board for board in BOARDS}
    if name.upper() not in known:
        near = get_close_matches(name.upper(), known, 1, 0.4)
        meant = f"; did you mean {known[near[0]]}?" if near else ""
        raise UserError(f"hardware={name} is not in the table of data sheets{meant}\nThe table has {', '.join(BOARDS)}")
    board = known[name.upper()]
    memory, bandwidth, units, per_node, link, network, price = BOARDS[board]
    recent = board.removeprefix("G").startswith(HOPPER)
    return Machine(
        name=board, source="data sheet", peaks={kind: 1e12 * top for kind, top in dict(PEAKS)[board].items()},
        attained=ATTAINED.get(board, USUAL), attention=ATTENTION if recent else BEFORE_HOPPER,
        memory=memory * 1e9, bandwidth=bandwidth * 1e12, units=units, per_node=per_node, link=link * 1e9,
        network=network / 8 * 1e9, price=price)


def capped(board: Machine, watts: float, of: float) -> Machine:
    """Under a lower limit of power. Power grows with frequency and the square of voltage, which grow together, so the
    clock that is left is the cube root of the share."""
    clock = (watts / of) ** (1 / 3)
    forward, backward = board.attention
    return replace(board, name=f"{board.name} at {watts:g} W", attained=board.attained * clock,
                   attention=(forward * clock, backward * clock))
