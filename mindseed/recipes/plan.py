"""What a run would cost before its first step: parameters, arithmetic, memory and time.

  mindseed plan --depth 8                          the dial
  mindseed plan configs/real-cpu.toml --loop.batch 64      the preset and flags of a `mindseed train` command
  mindseed plan configs/small-gpu.toml --gpu H100 --world 8      before such a machine is rented
  mindseed plan --depth 12 --lora.rank 8 --lora.nf4        fine-tuned by QLoRA: adapters beside a base in four bits

Parameters, cache and FLOPs are exact; activations agree with what autograd keeps within 2%; the time rests on an
assumed utilisation (`--mfu`) of the device's peak, which is the data sheet's or measured here.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mindseed.base import dist
from mindseed.base.config import option
from mindseed.base.errors import UserError
from mindseed.base.hardware import PEAKS, Peak, peak
from mindseed.base.log import YEAR_S, bytes_text, duration, say, si, table, units, warn
from mindseed.data.shards import Prepared
from mindseed.models.config import LMConfig
from mindseed.models.describe import describe
from mindseed.models.upcycle import upcycled_config
from mindseed.plan.flops import Flops, flops_per_token
from mindseed.plan.memory import TrainMemory, cache_bytes, cache_bytes_per_token, plan_memory, token_ratio
from mindseed.plan.params import Params, adapter_matrices, count_params
from mindseed.recipes.options import TrainOptions, derive, with_rows
from mindseed.recipes.machine import DTYPES, choose_device, choose_precision, warn_if_too_big

MEMORY_ROWS = {"weights": "weights", "gradients": "gradients", "optimizer": "optimiser state",
               "ema": "moving average", "casts": "narrow copies of weights",
               "activations": "activations of a micro-batch", "logits": "one chunk of logits"}


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions):
    gpu: str | None = option(None, help="plan for a GPU that is not here, by its name on the data sheet: H100, A100, "
                                        "RTX 4090 ...")
    mfu: float = option(0.4, help="share of the device's peak that training is assumed to reach")
    world: int | None = option(None, help="number of devices [derived: 1]")

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu={self.mfu} must lie in (0, 1]")
        if self.world is not None and self.world < 1:
            raise ValueError(f"world={self.world} must be at least 1")


def main(options: Options) -> None:
    options = with_rows(options)
    device = options.gpu.upper() if options.gpu else choose_device(options.device)
    world = options.world or dist.world_size()
    config = model_config(options)
    params = count_params(config)
    precision, top = pace(options, device)
    loop, seq_len = options.loop, options.data.seq_len
    flops = flops_per_token(config, seq_len, recompute=loop.recompute)
    speed = world * top.flops * options.mfu / flops.model                        # tokens per second
    options = derive(options, params=params.active, rows_per_epoch=rows_per_epoch(options), world=world,
                     tokens=loop.minutes and 60 * loop.minutes * speed)
    loop = options.loop
    memory = plan_memory(config, batch_size=loop.micro_batch, seq_len=seq_len, itemsize=DTYPES[precision].itemsize,
                         optimizer=options.optim.kind, ema=loop.ema is not None, recompute=loop.recompute,
                         lora_rank=options.lora.rank, nf4=options.lora.nf4, states=options.optim.states,
                         paged=not isinstance(device, torch.device) or device.type == "cuda")

    show_model(config, params, options.lora.rank)
    if options.lora.targets:
        warn("memory is that of adapters beside every matrix of the blocks; with lora.targets it is less")
    show_flops(flops)
    show_memory(memory, device, loop.micro_batch, seq_len)
    show_run(options, params, flops, speed=speed,
             machine=f"{world} x {device}, {units(top.flops, 'FLOP/s')} in {precision} ({top.source})")
    say(f"\ndecoding   {bytes_text(cache_bytes_per_token(config))} of cache per token in bf16, "
        f"{bytes_text(cache_bytes(config, config.seq_len))} for a context of {config.seq_len}; "
        f"{bytes_text(2 * (params.total - params.mtp))} of weights")


def pace(options: Options, device: torch.device | str) -> tuple[str, Peak]:
    """(precision, peak) of a device that is here, or of one that is only named."""
    if isinstance(device, torch.device):
        precision = choose_precision(options.loop.precision, device)
        return precision, peak(device, DTYPES[precision])
    known = {name.upper(): figures for name, figures in PEAKS}
    if device not in known:
        raise UserError(f"gpu={options.gpu} is not in the table of data sheets; choose one of {', '.join(known)}")
    asked = options.loop.precision
    precision = asked if asked != "auto" else "bf16" if "bf16" in known[device] else "fp16"
    if precision not in known[device]:
        raise UserError(f"the data sheet of {device} says nothing of {precision}; give --loop.precision "
                        f"{' or '.join(name for name in known[device] if name in DTYPES)}")
    return precision, Peak(flops=known[device][precision] * 1e12, source="data sheet")


def model_config(options: TrainOptions) -> LMConfig:
    """The model that training would build or start from."""
    if options.model.start is not None:
        from mindseed.interop.directory import load_directory
        config = options.model.going_on(load_directory(options.model.start).model.config, options.data.seq_len)
        mixture = options.model.upcycling()
        return config if mixture is None else upcycled_config(config, mixture)
    vocab_size = options.data.vocab_size
    if options.data.tokenizer:
        from mindseed.tokenizers.hf_json import load_tokenizer
        vocab_size = load_tokenizer(options.data.tokenizer).vocab_size
    return options.model.shape(options.depth).lm_config(vocab_size=vocab_size, seq_len=options.data.seq_len)


def rows_per_epoch(options: TrainOptions) -> int | None:
    """Rows in one pass over prepared folders, as if packed without a gap; None where no epochs are asked for."""
    if options.loop.epochs is None or not options.data.train:
        return None
    raw = [entry for entry in options.data.train if not (Path(entry) / "manifest.json").exists()]
    if raw:
        raise UserError(f"loop.epochs of {raw[0]} cannot be planned before it is tokenised; `mindseed prepare` it "
                        "first, or give loop.steps")
    tokens = sum(int(Prepared(entry).split("train").lengths.sum()) for entry in options.data.train)
    return max(1, tokens // options.data.seq_len)


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


def show_memory(memory: TrainMemory, device: torch.device | str, micro_batch: int, seq_len: int) -> None:
    """One device's need; warns where it does not fit."""
    rows = [[text, bytes_text(n)] for name, text in MEMORY_ROWS.items() if (n := getattr(memory, name))]
    table(f"memory per device, micro-batch {micro_batch} x {seq_len}", ["what", "bytes"],
          [*rows, ["total", bytes_text(memory.total)]])
    if isinstance(device, torch.device):          # of another one the table does not know the memory
        warn_if_too_big(memory.total, device)


def show_run(options: Options, params: Params, flops: Flops, *, speed: float, machine: str) -> None:
    loop, seq_len = options.loop, options.data.seq_len
    tokens = loop.steps * loop.batch * seq_len
    table("run", ["what", "value"], [
        ["steps", f"{loop.steps:,}"],
        ["tokens per step", f"{loop.batch * seq_len:,} ({loop.batch} rows of {seq_len})"],
        ["tokens", si(tokens)],
        ["tokens per parameter", f"{token_ratio(params, tokens):.1f} (compute-optimal: 20)"],
        ["learning rate", f"{options.optim.lr:g}"],
        ["arithmetic", units(tokens * flops.model, "FLOP")],
        ["device", machine],
        [f"speed at mfu {options.mfu:.0%}", f"{si(speed)} tok/s"],
        ["time", duration(tokens / speed)]])
    if tokens / speed > YEAR_S:
        warn(f"this run would take {duration(tokens / speed)}; take a smaller model (--depth), fewer tokens "
             "(loop.steps, loop.minutes), or more devices (--world)")
