"""Plans as text: one table for each question."""
from __future__ import annotations

from typing import Any

from mindseed.base.log import YEAR_S, bytes_text, console, duration, say, si, table, units, warn
from mindseed.models.config import LMConfig
from mindseed.models.describe import describe
from mindseed.plan.flops import Flops
from mindseed.plan.job import Job
from mindseed.plan.machines import Machine
from mindseed.plan.memory import TrainMemory, cache_bytes, cache_bytes_per_token, token_ratio
from mindseed.plan.params import Params, adapter_matrices
from mindseed.plan.search import ROOM, Found
from mindseed.plan.time import StepTime

MEMORY_ROWS = {"weights": "weights", "gradients": "gradients", "optimizer": "optimiser state",
               "ema": "moving average", "casts": "narrow copies of weights", "gathered": "weights gathered whole",
               "activations": "activations", "logits": "logits and their gradient",
               "transient": "of one block, for a moment", "communication": "buffers of collectives",
               "scratch": "buffers of kernels", "cache": "cache of keys and values", "update": "the optimiser at work"}
TIME_ROWS = {"products": "matrix products", "attention": "attention", "memory": "norms, rotations, activations, sums",
             "head": "head and loss", "computed again": "computed again", "launching": "waiting for launches",
             "waiting": "waiting for other ranks", "bubble": "bubble of the pipeline", "update": "optimiser"}
WIDE = 115                                        # columns of a terminal for all that is known of a plan
RECOMPUTE = {False: "false", "selective": "selective", True: "true"}


def show_model(config: LMConfig, params: Params, lora_rank: int) -> None:
    say(f"model      {describe(config)}")
    parts = [("embedding (and head)" if config.tied else "embedding", params.embedding),
             ("attention", params.attention), ("feed-forward", params.ffn), ("norms, gates, filters", params.vectors),
             ("head", params.head), ("multi-token prediction", params.mtp), ("total", params.total)]
    if params.active != params.total:
        parts.append(("active for one token", params.active))
    if lora_rank:
        parts.append((f"adapters of rank {lora_rank}, which learn", sum(
            m.entries for m in adapter_matrices(config, lora_rank))))
    table("parameters", ["part", "number", "share"],
          [[name, f"{n:,}", f"{n / params.total:.1%}"] for name, n in parts if n])


def show_flops(flops: Flops) -> None:
    rows = [("forward", flops.forward), ("backward", flops.backward), ("model (what MFU counts)", flops.model),
            ("computed again", flops.recompute), ("hardware", flops.hardware)]
    table("arithmetic per token", ["pass", "FLOPs", "of model"],
          [[name, si(n), f"{n / flops.model:.1%}"] for name, n in rows])


def show_memory(memory: TrainMemory, job: Job, board: Machine) -> None:
    """Each part at its own largest, and what of it exists at the worst moment of a step."""
    worst = memory.parts
    rows = [[text, bytes_text(n), bytes_text(worst[name]) if worst.get(name) else ""]
            for name, text in MEMORY_ROWS.items() if (n := max(getattr(memory, name), worst.get(name, 0)))]
    rows.append(["total", "", bytes_text(memory.total)])
    if board.memory:
        rows.append([f"of {bytes_text(board.memory)}", "", f"{memory.total / board.memory:.0%}"])
    if memory.host:
        rows.append(["in the CPU's memory", bytes_text(memory.host), ""])
    table(f"memory per device, micro-batch {job.rows} x {job.seq_len}, {job.sizes.describe()}",
          ["what", "at most", f"at {memory.worst}"], rows)


def show_time(time: StepTime) -> None:
    rows = [[text, duration_of(time.kinds[name]), f"{time.kinds[name] / time.total:.1%}"]
            for name, text in TIME_ROWS.items() if time.kinds.get(name, 0) > 0.0005 * time.total]
    rows += [["step", duration_of(time.total), ""], ["model FLOPs utilisation (MFU)", f"{time.mfu:.1%}", ""]]
    table("time of a step", ["what", "takes", "share"], rows)


def show_transfers(time: StepTime) -> None:
    if time.transfers:
        table("communication of a step, per device", ["axis", "what", "sent", "takes", "waited for"], [
            [t.axis, t.what, bytes_text(t.sent), duration_of(t.seconds), duration_of(t.exposed)]
            for t in time.transfers])


def duration_of(seconds: float) -> str:
    return duration(seconds) if seconds >= 60 else units(seconds, "s") if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def show_run(options: Any, params: Params, flops: Flops, job: Job, board: Machine, *, speed: float, mfu: float,
             price: float) -> None:
    loop, seq_len = options.loop, options.data.seq_len
    tokens = loop.steps * loop.batch * seq_len
    took, kind = tokens / speed, "bf16" if job.precision == "fp8" else job.precision
    rows = [
        ["steps", f"{loop.steps:,}"],
        ["tokens per step", f"{loop.batch * seq_len:,} ({loop.batch} rows of {seq_len})"],
        ["tokens", si(tokens)],
        ["tokens per active parameter" if params.active != params.total else "tokens per parameter",
         f"{token_ratio(params, tokens):.1f} (compute-optimal: 20)"],
        ["learning rate", f"{options.optim.lr:g}"],
        ["arithmetic", f"{tokens * flops.model:.2e} FLOP"],
        ["device", f"{job.world} x {board.name}, {units(board.peaks[kind], 'FLOP/s')} in {kind} ({board.source})"],
        [f"speed at mfu {mfu:.0%}", f"{si(speed)} tok/s" + f", {si(speed / job.world)} a device" * (job.world > 1)],
        ["time", duration(took)]]
    if price:
        hours = took / 3600 * job.world
        rows.append(["device hours", si(hours)])
        rows.append([f"cost at ${price:g} an hour" + " (an assumption)" * (options.price is None),
                     f"${si(hours * price)}"])
    table("run", ["what", "value"], rows)
    if took > YEAR_S:
        warn(f"this run would take {duration(took)}; take a smaller model (--depth), fewer tokens (loop.steps, "
             "loop.minutes), or more devices (--gpus)")


def show_decoding(config: LMConfig, params: Params) -> None:
    say(f"\ndecoding   {bytes_text(cache_bytes_per_token(config))} of cache per token in bf16, "
        f"{bytes_text(cache_bytes(config, config.seq_len))} for a context of {config.seq_len}; "
        f"{bytes_text(2 * (params.total - params.mtp))} of weights")


# ------------------------------------------------------------------------------------------------------------ searching

def settings(job: Job) -> dict[str, str]:
    """The options that make a job what it is, by their names."""
    parallel, loop = job.parallel, {"loop.micro_batch": str(job.rows)}
    named = {f"parallel.{name}": str(getattr(parallel, name)).lower() for name in (
        "zero", "replicas", "tensor", "context", "expert", "pipe", "offload")}
    if parallel.pipe > 1:
        named |= {"parallel.schedule": parallel.schedule, "parallel.microbatches": str(job.pieces)}
    return named | loop | {"loop.recompute": RECOMPUTE[job.recompute]}


def changes(before: Job, after: Job) -> str:
    """What to set to come from one job to another."""
    old = settings(before)
    return ", ".join(f"{name}={value}" for name, value in settings(after).items() if old.get(name) != value)


def show_found(found: Found, board: Machine, rows: int, steps: int, price: float, options: Any) -> None:
    seq_len = options.data.seq_len
    shown = []
    for number, plan in enumerate(found.plans, 1):
        job, time = plan.job, plan.time
        hours = steps * time.total / 3600
        cost = f"${si(hours * job.world * price)}" if price else ""
        shown.append([str(number), job.sizes.describe(), f"{job.parallel.zero}",
                      f"{job.parallel.schedule}, {job.pieces}" if job.sizes.pipe > 1 else "",
                      f"{job.rows // job.pieces}", RECOMPUTE[job.recompute], bytes_text(plan.memory.total),
                      *(f"{time.kinds.get(kind, 0) / time.total:.0%}" for kind in ("waiting", "bubble")),
                      f"{si(time.tokens_per_s / job.world)}", f"{time.mfu:.1%}", duration(3600 * hours), cost])
    names = ["", "mesh", "zero", "pipeline", "rows at a time", "recompute", "memory", "waiting", "bubble",
             "tok/s a device", "mfu", "time", "cost"]
    if console.width < WIDE:                      # the mesh in words, and what decides
        kept = [names.index(name) for name in ("", "memory", "tok/s a device", "mfu", "time")]
        shown = [[row[kept[0]], describe_plan(plan.job), *(row[i] for i in kept[1:])]
                 for row, plan in zip(shown, found.plans)]
        names = ["", "mesh", "memory", "tok/s a device", "mfu", "time"]
    world = options.gpus or 1
    table(f"the best of {found.tried:,} plans for {world:,} x {board.name}, {rows} rows of {seq_len} a step, {steps:,} "
          "steps", names, shown)
    if not found.tried:
        warn(f"no mesh suits the model and {rows} rows a step, so none was tried")
    elif not found.plans:
        warn(f"nothing fits into {ROOM:.0%} of {bytes_text(board.memory)}: take more devices (--gpus)")
    say(f"{found.fitting:,} plans fit into {ROOM:.0%} of {bytes_text(board.memory)}"
        + ("; of those that do not, the nearest need "
           + ", ".join(f"{bytes_text(n)} ({job.sizes.describe()}, zero {job.parallel.zero})"
                       for n, job in found.too_big[:3]) if found.too_big else ""))
    if found.problems:
        say("meshes that do not suit the model or the run: " + "; ".join(
            f"{line} ({n} of them)" for line, n in found.problems.most_common(3)))
    if found.plans:
        usual = settings(Job(rows=0, seq_len=1))
        say(f"\nthe first as options: --loop.batch {rows} " + " ".join(
            f"--{name} {value}" for name, value in settings(found.plans[0].job).items() if value != usual.get(name)))


def show_machine(board: Machine) -> None:
    rows = [[f"products in {kind}, {m} x {k} x {n}", units(rate, "FLOP/s")]
            for kind, entries in (board.rates or {}).items() for m, k, n, rate in entries if m == k == n]
    rows += [[f"attention over {tokens} tokens, forward, backward",
              f"{units(forward, 'FLOP/s')}, {units(backward, 'FLOP/s')}"] for tokens, forward, backward in
             board.attention_rates]
    rows += [["memory", units(board.bandwidth, "B/s")],
             ["AdamW and clipping", units(board.update_rate, "parameters/s")],
             ["passes through memory, against fused operations", f"{board.passes:.2g}"],
             ["overhead of a block", duration_of(board.overhead)]]
    table(f"what {board.name} can do", ["what", "measured"], rows)


def describe_plan(job: Job) -> str:
    """In a few words, for a picture."""
    words = [f"zero {job.parallel.zero}" if job.world > 1 else "", job.parallel.schedule if job.sizes.pipe > 1 else "",
             {False: "", "selective": "selectively recomputed", True: "recomputed"}[job.recompute]]
    return "\n".join([job.sizes.describe(), ", ".join(word for word in words if word)]).strip()


