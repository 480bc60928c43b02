"""What this machine can do, measured once and kept in a file, so that plans for it are computed and not assumed.

Timed are the parts that a step is made of: matrix products over a grid of sizes, attention forward and backward at
some lengths, a pass over memory, the head's logits, AdamW's update. What is left of a step is found by running a few:
norms, rotations and activations go through memory more often than fused operations would (`passes`), and every block
costs something beside (`overhead`); two numbers, fitted to short steps of small models. Each figure is the best of
several, for other programs only ever add time.
"""
from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch

from mindseed.base.errors import UserError
from mindseed.base.files import read_json, write_json
from mindseed.base.hardware import describe_machine, fast_bfloat16, total_memory
from mindseed.models.lm import LM, build
from mindseed.models.presets import TOY, Shape
from mindseed.nn.attend import Layout, attend
from mindseed.nn.fused_head import apply_head
from mindseed.plan.flops import mean_keys
from mindseed.plan.job import Job
from mindseed.plan.machines import MEMORY, Machine
from mindseed.plan.roofline import grid
from mindseed.plan.time import step_time
from mindseed.plan.work import moved_in

SIZES = {"cpu": ((256, 1024, 4096), (64, 256, 1024, 4096), 2e10), "cuda": ((1024, 4096, 16_384), (256, 1024, 4096,
                                                                                                  16_384), 2e13)}
LENGTHS = {"cpu": (128, 512, 2048), "cuda": (512, 2048, 8192)}
LONG_ENOUGH_S = 0.2                               # of timing one thing
STEPS = ((2, 4), (8, 4), (4, 2), (4, 8))                     # rows of 256 tokens, layers
WIDE_LAYERS = Shape(layers=4, dim=2048, heads=16, kv_heads=16, head_dim=128, ffn_dim=5632)


def best_s(call: Callable[[], object], device: torch.device, times: int = 5) -> float:
    """Seconds of the fastest of some calls, of quick ones of more, after one that is not counted."""
    wait, clock, spent = torch.cuda.synchronize if device.type == "cuda" else lambda: None, clock_of(device), []
    while len(spent) <= times or sum(spent) < LONG_ENOUGH_S:
        wait()
        start = clock()
        call()
        wait()
        spent.append(clock() - start)
    return min(spent[1:])


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds as they pass; of the CPU alone, where torch uses one thread: then other programs do not count."""
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def measure_machine(device: torch.device, *, say: Callable[[str], None] = lambda line: None) -> Machine:
    """About half a minute on an idle laptop."""
    kinds = {"fp32": torch.float32}
    if device.type == "cuda" and torch.cuda.is_bf16_supported() or device.type == "cpu" and fast_bfloat16():
        kinds["bf16"] = torch.bfloat16
    rates = {}
    for kind, dtype in kinds.items():
        say(f"timing products in {kind}")
        rates[kind] = measure_products(device, dtype)
    dtype = list(kinds.values())[-1]
    say("timing attention, memory, the head and the optimiser")
    board = Machine(
        name=name_of(device), source="measured", rates=rates, memory=total_memory(device),
        peaks={kind: max(row[3] for row in table) for kind, table in rates.items()}
        | ({"bf16": max(row[3] for row in rates["fp32"])} if "bf16" not in rates else {}),
        bandwidth=measure_bandwidth(device) / MEMORY, attention_rates=measure_attention(device, dtype),
        update_rate=measure_update(device), logit_s=measure_logits(device, dtype), passes=0.0,
        gpu=device.type == "cuda")
    say("timing short steps of small models")
    return calibrated(board, device)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(describe_machine()["cpu"])


def measure_products(device: torch.device, dtype: torch.dtype) -> tuple[tuple[int, int, int, float], ...]:
    """Rates over a grid of sizes; of the largest ones as with fewer rows."""
    rows, widths, most = SIZES[device.type if device.type in SIZES else "cpu"]
    own, found = torch.Generator(device).manual_seed(0), {}
    for m, k, n in itertools.product(rows, widths, widths):
        if 2.0 * m * k * n > most and (m // 4, k, n) in found:
            found[m, k, n] = found[m // 4, k, n]
            continue
        a, b = (torch.randn(shape, generator=own, device=device, dtype=dtype) for shape in ((m, k), (n, k)))
        found[m, k, n] = 2.0 * m * k * n / best_s(lambda: a @ b.mT, device, 4)
    return tuple((*size, rate) for size, rate in found.items())


def measure_bandwidth(device: torch.device) -> float:
    """Bytes a second that a sum of two large tensors reads and writes."""
    a, b, out = (torch.zeros((16 if device.type == "cpu" else 256) << 20, device=device) for _ in range(3))
    return 3 * a.nbytes / best_s(lambda: torch.add(a, b, out=out), device)


def measure_attention(device: torch.device, dtype: torch.dtype) -> tuple[tuple[int, float, float], ...]:
    """(tokens, FLOP/s forward, backward) of what layers call, over plain rows."""
    found, heads, width = [], 8, 64
    for T in LENGTHS[device.type if device.type in LENGTHS else "cpu"]:
        B = max(1, 1024 // T if device.type == "cpu" else 16_384 // T)
        layout = Layout(torch.arange(T, device=device).expand(B, T))
        layout.add_view(None)
        q, k, v = (torch.randn(B, T, n, width, device=device, dtype=dtype).requires_grad_() for n in (heads, 2, 2))
        flops = 4 * mean_keys(T, None, True) * heads * width * B * T
        forward = best_s(lambda: attend(q, k, v, layout.views[None]), device, 4)
        both = best_s(lambda: attend(q, k, v, layout.views[None]).sum().backward(), device, 4)
        found.append((T, flops / forward, 2.5 * flops / max(both - forward, forward / 2)))
    return tuple(found)


def measure_update(device: torch.device) -> float:
    """Parameters a second: norm, clipping and AdamW."""
    params = [torch.zeros(1 << 20, device=device).requires_grad_() for _ in range(8 if device.type == "cpu" else 64)]
    optimizer = torch.optim.AdamW(params, fused=True)
    for p in params:
        p.grad = torch.ones_like(p)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return sum(p.numel() for p in params) / best_s(update, device)


def measure_logits(device: torch.device, dtype: torch.dtype) -> float:
    """Seconds for one logit, forward and backward, products left out: they are narrow here."""
    vocab, tokens, dim = 8192, 1024 if device.type == "cpu" else 8192, 8
    head = torch.randn(vocab, dim, device=device).requires_grad_()
    hidden = torch.randn(tokens, dim, device=device, dtype=dtype).requires_grad_()
    targets = torch.randint(vocab, (tokens,), device=device)
    return best_s(lambda: apply_head(hidden, head, targets, 1024, dtype)[0].sum().backward(), device) / (
        vocab * tokens)


def calibrated(board: Machine, device: torch.device) -> Machine:
    """With `passes` and `overhead`, by least squares over a few short steps, each weighed by its own time. On a GPU the
    one is taken from a large step and the other from a small one, which is launches alone."""
    if board.gpu:
        took, _, _ = measured_step(board, device, replace(TOY, layers=16), 1)
        large, bare, moved = measured_step(board, device, replace(WIDE_LAYERS, layers=4), 64)
        return replace(board, overhead=took / 16, passes=max(1.0, (large - bare) / moved))
    rows = []
    for count, layers in STEPS:
        took, bare, moved = measured_step(board, device, replace(TOY, layers=layers), count)
        rows.append((moved / took, layers / took, (took - bare) / took))
    left, right = np.array([row[:2] for row in rows]), np.array([row[2] for row in rows])
    found = np.linalg.lstsq(left, right, rcond=None)[0]
    for without in (0, 1):                        # where one comes out negative, the other explains it all
        if found[without] < 0:
            other = left[:, 1 - without]
            found[without], found[1 - without] = 0.0, max(0.0, other @ right / (other @ other))
    return replace(board, passes=float(found[0]), overhead=float(found[1]))


def measured_step(board: Machine, device: torch.device, shape: Shape, rows: int) -> tuple[float, float, float]:
    """(seconds of a step with so many rows of 256 tokens, what of them is planned so far, seconds for the bytes of
    fused operations to go through memory once)."""
    config = shape.lm_config(vocab_size=2048, seq_len=256)
    job = Job(rows=rows, seq_len=256, precision="fp32", cpu=device.type == "cpu")
    took = best_s(training_step(build(config, device=device).train(), rows, 256), device, 6)
    moved = 3 * len(config.layers) * moved_in(config, config.layers[0], job) / (board.bandwidth * MEMORY)
    return took, step_time(config, job, board).total, moved


def training_step(model: LM, rows: int, tokens: int) -> Callable[[], None]:
    """Forward, loss, backward, clipping and AdamW in float32."""
    device = next(model.parameters()).device
    own = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (rows, tokens), generator=own).to(device)
    positions = torch.arange(tokens, device=device).expand(rows, tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        (-model(ids, positions).logps(ids).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# -------------------------------------------------------------------------------------------------------------- on disk

def cache_path(device: torch.device) -> Path:
    """Where measurements of a device lie unless told otherwise."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mindseed"
    return folder / f"machine-{re.sub(r'[^a-zA-Z0-9]+', '-', name_of(device)).strip('-').lower()}.json"


def save_machine(board: Machine, path: Path) -> None:
    facts = {key: value for key, value in describe_machine().items() if key in ("cpu", "cores", "torch", "threads")}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"measured_on": facts, **{f.name: getattr(board, f.name) for f in fields(board)}})


def load_machine(path: Path) -> Machine:
    """UserError for a file that `mindseed plan --measure` did not write."""
    if not path.exists():
        raise UserError(f"{path} does not exist; write it with `mindseed plan --measure --machine {path}`")
    values = read_json(path, {"name": str, "source": str, "peaks": dict, "rates": dict})
    known = {f.name for f in fields(Machine)}
    try:
        values["rates"] = {kind: tuple((int(m), int(k), int(n), float(rate)) for m, k, n, rate in table)
                           for kind, table in values["rates"].items()}
        values["attention_rates"] = tuple((int(t), float(a), float(b)) for t, a, b in values["attention_rates"])
        values["attention"] = tuple(values["attention"])
        board = Machine(**{name: value for name, value in values.items() if name in known})
        for table in board.rates.values():
            axes, entries = grid(table)
            if len(entries) != len(axes[0]) * len(axes[1]) * len(axes[2]):
                raise ValueError("its products are no grid")
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a file of measurements ({error}); write it anew with --measure") from None
    return board
