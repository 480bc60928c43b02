"""(c) Training on a GPU, 64M and 350M dense: tokens/s, MFU and peak memory, eager, compiled and with our kernels,
against transformers.

Every row is a process of its own, so that peaks of memory and compiled code are its own and a row that fails loses
nothing else. Building and compiling take far longer than measuring, so a few processes at a time make ready beside each
other; then they measure one after the other, each alone on the GPU. Ours is `train_step` as `mindseed train` runs it,
with everything that it waits for. transformers gets the same rows of ids, bf16 autocast over float32 weights, fused
AdamW, the same clipping and its own loss, and is never asked for a number between steps.
"""
from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable

import torch

from benchmarks.common import reference, report, spread
from benchmarks.gpu_profile import profile
from mindseed.base.hardware import peak, peak_memory, total_memory
from mindseed.core import Batch, ChunkedHead
from mindseed.models.config import LMConfig
from mindseed.models.lm import LM, build
from mindseed.models.presets import PRESETS, Shape
from mindseed.objectives.sft import SFT
from mindseed.optim.groups import OptimConfig, build_optimizers, parameter_groups
from mindseed.plan.flops import flops_per_token
from mindseed.plan.memory import plan_memory
from mindseed.plan.params import count_params
from mindseed.quant.fp8 import to_fp8
from mindseed.train.native import NativeBackend
from mindseed.train.step import Run, train_step

NAME = "train-cuda"
WINDOWS, DOCUMENT = 5, 300                        # timed windows of a row; mean length of packed documents, in tokens


@dataclass(frozen=True, kw_only=True)
class Size:
    shape: Shape
    vocab_size: int
    rows: int
    seq_len: int

    @property
    def config(self) -> LMConfig:
        return self.shape.lm_config(vocab_size=self.vocab_size, seq_len=self.seq_len)


SIZES = {
    "64M": Size(shape=PRESETS["small"], vocab_size=6400, rows=32, seq_len=1024),
    "350M": Size(shape=Shape(layers=24, dim=1024, heads=16, kv_heads=8, head_dim=64, ffn_dim=3328, theta=1e6),
                 vocab_size=32768, rows=16, seq_len=2048),
}
TINY = Size(shape=Shape(layers=2, dim=64, heads=4, kv_heads=2, head_dim=16, ffn_dim=128), vocab_size=512, rows=2,
            seq_len=128)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is measured. `attention` is that of loop.attention, `head` "fused" or "chunked"."""

    size: str
    side: str = "ours"
    compiled: bool = True
    attention: str = "sdpa"
    head: str = "chunked"
    precision: str = "bf16"
    recompute: bool = False
    packed: bool = False

    @property
    def words(self) -> str:
        if self.side != "ours":
            return f"transformers, {'compiled' if self.compiled else 'eager'}"
        words = ["compiled" if self.compiled else "eager"]
        words += {"sdpa": [], "flash": ["our attention"], "flex": ["FlexAttention"]}[self.attention]
        words += ["our head"] if self.head == "fused" else []
        words += [self.precision] if self.precision != "bf16" else []
        words += ["recomputed"] if self.recompute else []
        return ", ".join(words + (["packed documents"] if self.packed else []))


# What an H100 is assumed to do, for predictions made before anything was measured: FLOP/s of products (seven tenths of
# the data sheet's 989 T), of attention forward and backward, bytes per second, seconds of a step that it waits.
PRODUCTS, ATTENTION, BYTES, WAITS = 690e12, (400e12, 300e12), 2.8e12, 5e-3


def predicted(size: Size, row: Row) -> dict[str, float]:
    """Seconds of a compiled step by part, from counted operations and bytes; packed documents as if they were whole
    rows. Compiled blocks read and write, forward and backward, 60 bytes for each number of the width (a float32
    residual stream, two norms), 10 for each of queries and keys, 18 for each of the feed-forward; the optimiser 44 for
    each parameter (update 28, clipping 8, casts 8)."""
    s, tokens, params = size.shape, size.rows * size.seq_len, count_params(size.config).total
    logits = size.vocab_size * tokens
    scores = 2 * size.seq_len * s.heads * s.head_dim * s.layers * tokens          # forward; half of all pairs
    again = (2 if row.side == "ours" else 0) * logits * s.dim
    between = 60 * s.dim + 10 * (s.heads + s.kv_heads) * s.head_dim + 18 * s.ffn_dim
    head = {"fused": 6, "chunked": 64}[row.head] if row.side == "ours" else 40
    return {"products": (6 * params * tokens + again) / PRODUCTS,
            "attention": scores / ATTENTION[0] + 2.5 * scores / ATTENTION[1],
            "between": between * s.layers * tokens / BYTES,
            "head": head * logits / BYTES,
            "optimiser": 44 * params / BYTES,
            "waits": WAITS}


SCALINGS = {"fp8": "tensor", "fp8-block": "block"}
KERNELS = {"attention": "flash", "head": "fused"}
ROWS = {                                          # the most wanted first
    "350m-kernels": Row(size="350M", **KERNELS),
    "350m-transformers": Row(size="350M", side="transformers"),
    "350m-head": Row(size="350M", head="fused"),
    "64m-kernels": Row(size="64M", **KERNELS),
    "64m-transformers": Row(size="64M", side="transformers"),
    "350m-compiled": Row(size="350M"),
    "64m-compiled": Row(size="64M"),
    "350m-fp8": Row(size="350M", precision="fp8", **KERNELS),
    "350m-packed": Row(size="350M", packed=True, **KERNELS),
    "64m-packed": Row(size="64M", packed=True, **KERNELS),
    "350m-recompute": Row(size="350M", recompute=True, **KERNELS),
    "350m-eager": Row(size="350M", compiled=False),
    "64m-eager": Row(size="64M", compiled=False),
    "350m-fp8-block": Row(size="350M", precision="fp8-block", **KERNELS),
    "64m-transformers-eager": Row(size="64M", side="transformers", compiled=False),
    "350m-transformers-eager": Row(size="350M", side="transformers", compiled=False),
    "350m-flex-packed": Row(size="350M", attention="flex", head="fused", packed=True),
    "64m-fp8": Row(size="64M", precision="fp8", **KERNELS),
    "64m-recompute": Row(size="64M", recompute=True, **KERNELS),
}


class Synthetic:
    """A Source of random ids: whole rows of one document each, or documents of random lengths, in pinned memory."""

    def __init__(self, size: Size, *, packed: bool, pin: bool, kinds: int = 4) -> None:
        self.batches, self.index = [batch(size, packed, seed) for seed in range(kinds)], 0
        if pin:
            self.batches = [Batch(**{name: x.pin_memory() for name, x in vars(b).items() if name != "extra"})
                            for b in self.batches]

    def __next__(self) -> Batch:
        self.index += 1
        return self.batches[self.index % len(self.batches)]


def batch(size: Size, packed: bool, seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, size.vocab_size, (size.rows, size.seq_len + 1), generator=g)
    positions = torch.arange(size.seq_len).repeat(size.rows, 1)
    if packed:
        starts = torch.rand(size.rows, size.seq_len, generator=g) < 1 / DOCUMENT
        starts[:, 0] = True
        positions -= torch.where(starts, positions, 0).cummax(1).values
    return Batch(ids=ids[:, :-1].contiguous(), targets=ids[:, 1:].contiguous(), positions=positions,
                 weights=torch.ones(size.rows, size.seq_len))


def our_step(row: Row, size: Size, device: torch.device) -> tuple[Callable[[], float], int]:
    """(a callable that does one step and returns the loss, parameters)."""
    optim = OptimConfig(kind="adamw", lr=1e-4)
    model = equipped(build(size.config, device=device).train(), row)
    backend = NativeBackend(model, SFT(), build_optimizers(parameter_groups(model, optim), optim),
                            precision="bf16", max_norm=1.0)
    if row.compiled:
        model.compile_blocks()
    run = Run(Synthetic(size, packed=row.packed, pin=device.type == "cuda"), SFT(), backend, lambda step: 1e-4, device)
    return lambda: train_step(run)["loss"], sum(p.numel() for p in model.parameters())


def equipped(model: LM, row: Row) -> LM:
    """With the attention, head and precision of the row."""
    model.recompute, model.attention = row.recompute, row.attention
    if row.head == "chunked":
        model.apply_head = ChunkedHead.apply
    if row.precision != "bf16":
        covered = to_fp8(model, SCALINGS[row.precision])
        if covered.emulated:
            raise RuntimeError(f"{row.precision} would only be emulated: {covered.emulated}")
    return model


def their_step(row: Row, size: Size, device: torch.device) -> tuple[Callable[[], float], int]:
    transformers = reference("train_cuda")
    s = size.shape
    config = transformers.Qwen3Config(
        vocab_size=size.vocab_size, hidden_size=s.dim, intermediate_size=s.ffn_dim, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head_dim, tie_word_embeddings=s.tied,
        max_position_embeddings=size.seq_len, use_cache=False, attn_implementation="sdpa")
    with device:
        model = transformers.Qwen3ForCausalLM(config).float().train()
    if row.compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    source = Synthetic(size, packed=row.packed, pin=device.type == "cuda")

    def step() -> torch.Tensor:
        ids = next(source).ids.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, sum(p.numel() for p in model.parameters())


STEPS = {"ours": our_step, "transformers": their_step}


def measure(name: str, folder: Path, device: torch.device, *, tiny: bool, seconds: float, profiled: bool) -> None:
    """One row, in a process of its own: make ready, say so, wait to be called, measure."""
    row, began = ROWS[name], time.monotonic()
    size = TINY if tiny else SIZES[row.size]
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    step, params = STEPS[row.side](row, size, device)
    built = time.monotonic()
    for _ in range(3):
        step()
    wait()
    (folder / f"{name}.ready").touch()
    ready = time.monotonic()
    while not (folder / f"{name}.go").exists():
        time.sleep(0.02)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, loss = timed(step, wait, seconds)
    tokens, flops = size.rows * size.seq_len, flops_per_token(size.config, size.seq_len)
    speed = [tokens / t for t in times]
    best = peak(device, torch.bfloat16).flops
    result = {"row": name, **asdict(row), "words": row.words, "params": params,
              "expected_params": count_params(size.config).total, "batch": f"{size.rows} x {size.seq_len}",
              "step_ms": [1e3 * t for t in times], "tokens_per_s": speed, "loss": loss,
              "mfu": None if row.packed else [s * flops.model / best for s in speed],
              "predicted_ms": {part: round(1e3 * t, 2) for part, t in predicted(size, row).items()},
              "peak_bytes": peak_memory(device), "planned_bytes": planned_bytes(row, size),
              "build_s": built - began, "compile_s": ready - built}
    if profiled:
        try:
            result["profile"] = profile(step, wait, device, folder / f"{name}.profile")
        except Exception as error:                # a figure less, not a row less
            result["profile"] = {"failed": repr(error)[:300]}
    temporary = folder / f"{name}.tmp"
    temporary.write_text(json.dumps(result))
    temporary.rename(folder / f"{name}.json")


def timed(step: Callable, wait: Callable, seconds: float) -> tuple[list[float], float]:
    """(seconds per step of each window, the last loss). A window is a whole number of steps and ends when the device
    has done them."""
    def window(steps: int) -> float:
        nonlocal loss
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            loss = step()
        wait()
        return (time.perf_counter() - start) / steps

    loss = 0.0
    steps = max(1, min(50, int(seconds / WINDOWS / window(2))))
    times = [window(steps) for _ in range(WINDOWS)]
    return times, float(loss)


def everything(names: list[str], folder: Path, options: argparse.Namespace, results: dict[str, dict]) -> None:
    """All rows, `options.lanes` processes at a time, until the time is over; `results` gains what each found, or why it
    did not. One that finds too little memory beside another is tried again alone, at the end."""
    ends = time.monotonic() + options.seconds
    room = 0.9 * total_memory(options.device)
    groups = grouped(names, options.lanes, room if options.device == "cuda" else float("inf"))
    for together in groups:                       # which may grow
        if time.monotonic() > ends - 15:
            results |= {name: {"row": name, "error": "not begun: the time was over"} for name in together}
            continue
        deadline = min(ends, time.monotonic() + options.row_seconds)
        children = {name: start(name, folder, options) for name in together}

        def warming(name: str) -> bool:
            return children[name].poll() is None and not (folder / f"{name}.ready").exists()

        try:
            while time.monotonic() < deadline and any(map(warming, together)):
                time.sleep(0.05)
            for name in filter(warming, together):                                # it would disturb the others
                end(children[name])
            for name, child in children.items():
                (folder / f"{name}.go").touch()
                with suppress(subprocess.TimeoutExpired):
                    child.wait(max(deadline + 20 - time.monotonic(), 5))
                end(child)
                results[name] = found(name, folder, child.returncode)
                print(json.dumps(results[name]), flush=True)
                if len(together) > 1 and "out of memory" in results[name].get("error", ""):
                    groups.append([name])
                    (folder / f"{name}.go").unlink()
        finally:
            for child in children.values():
                end(child)


def grouped(names: list[str], lanes: int, room: float) -> list[list[str]]:
    """Who makes ready together, in the order of `names`: up to `lanes` rows that need no more than `room` bytes."""
    left, groups = list(names), []
    while left:
        groups.append([left.pop(0)])
        for name in list(left):
            if len(groups[-1]) < lanes and sum(map(need, [*groups[-1], name])) < room:
                groups[-1].append(name)
                left.remove(name)
    return groups


def need(name: str) -> float:
    """Bytes that a row takes, rather too many: what is planned, and whole logits where nothing cuts them up."""
    row, size = ROWS[name], SIZES[ROWS[name].size]
    planned = planned_bytes(row, size)
    if row.side == "ours":
        return 1.1 * planned
    return 1.1 * planned + 10 * size.vocab_size * size.rows * size.seq_len if row.compiled else 2.5 * planned


def planned_bytes(row: Row, size: Size) -> int:
    return plan_memory(size.config, batch_size=size.rows, seq_len=size.seq_len, optimizer="adamw",
                       recompute=row.recompute, compiled=row.compiled).total


def start(name: str, folder: Path, options: argparse.Namespace) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.train_cuda", "--row", name, "--folder", str(folder), "--device",
               options.device, "--measure", str(options.measure), *(["--tiny"] if options.tiny else []),
               *(["--profile"] if options.profile else [])]
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def end(child: subprocess.Popen) -> None:
    """A row and the compiler's processes that it started."""
    if child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def found(name: str, folder: Path, code: int) -> dict:
    path = folder / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    lines = (folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
    return {"row": name, "error": f"{'out of time' if code == -signal.SIGKILL else f'exit code {code}'}: "
                                  + "\n".join(lines[-25:])[-2500:]}


def cells(result: dict, results: dict[str, dict]) -> list[str]:
    """A row of the table."""
    rival = results.get(f"{result['size'].lower()}-transformers", {})
    share = statistics.median(result["tokens_per_s"]) / statistics.median(rival["tokens_per_s"]) if (
        "error" not in rival and rival) else None
    return [result["size"], result["words"], spread(result["tokens_per_s"], 4), spread(result["step_ms"]),
            f"{sum(result['predicted_ms'].values()):.0f}" if result["compiled"] else "",
            f"{100 * statistics.median(result['mfu']):.1f}%" if result["mfu"] else "",
            f"{share:.2f}x" if share else "", f"{result['peak_bytes'] / 1e9:.1f} GB",
            f"{result['planned_bytes'] / 1e9:.1f} GB" if result["side"] == "ours" else "",
            f"{result['compile_s']:.0f} s"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*ROWS], help="these rows, in this order", default=[*ROWS])
    parser.add_argument("--seconds", type=float, default=240, help="for everything; what is left then is left out")
    parser.add_argument("--row-seconds", type=float, default=130, help="for a row to make ready")
    parser.add_argument("--measure", type=float, default=2, help="seconds that a row measures")
    parser.add_argument("--lanes", type=int, default=3, help="rows that make ready beside each other")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try the benchmark itself")
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes, kernel by kernel")
    parser.add_argument("--page", type=Path, help="where the table goes [docs/BENCHMARKS.md, nowhere if tiny]")
    parser.add_argument("--folder", type=Path, help="where rows, logs and profiles go [a temporary folder]")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.row:
        measure(options.row, options.folder, torch.device(options.device), tiny=options.tiny, seconds=options.measure,
                profiled=options.profile)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: torch finds no CUDA GPU here; --device cpu --tiny tries the benchmark itself", file=sys.stderr)
        return 2
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            everything(options.only, folder, options, results)
        finally:                                  # whatever stops us, what was measured is told
            conclude(results, options.page or (folder / "page.md" if options.tiny else None))
    return 0


def conclude(results: dict[str, dict], page: Path | None) -> None:
    """Errors, and the table of what was measured."""
    for name, result in results.items():
        if "error" in result:
            print(f"\n{name}: {result['error']}", file=sys.stderr)
    measured = [result for result in results.values() if "error" not in result]
    if not measured:
        return
    header = ["size", "what", "tokens/s", "ms a step", "predicted", "MFU", "transformers", "peak memory", "planned",
              "ready in"]
    rows = [cells(result, results) for result in measured]
    sizes = {r["size"]: f"{r['size']}: {r['params'] / 1e6:.1f}M parameters, {r['batch']} tokens" for r in measured}
    report(NAME, "Training on a GPU, bf16 autocast over float32 weights, AdamW, against transformers", header, rows,
           command="python -m benchmarks.train_cuda", page=page,
           notes=f"{'; '.join(sizes.values())} a step. {versions()}. Median (min to max) of {WINDOWS} windows. "
                 f"`transformers`: tokens/s over those of transformers, compiled, in the same run. MFU is of the "
                 f"bf16 peak, also for fp8. `predicted`: before anything was measured, of bf16. Target: MFU 50% at "
                 f"350M and 1.5x transformers.")


def versions() -> str:
    names = [name for name in ("transformers", "triton") if importlib.util.find_spec(name)]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names) or "without Triton"


if __name__ == "__main__":
    sys.exit(main())
