"""The options of a training run, and how what is left open follows from the rest.

Whatever is None is derived and printed: `--depth N` gives the model's shape; the number of parameters gives the number
of tokens to train on; both together give the batch and the learning rate. Any of it may be set.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mindseed.base.config import diff, option
from mindseed.base.errors import UserError
from mindseed.base.mesh import ParallelOptions
from mindseed.interop.directory import context_of
from mindseed.nn.recompute import Recompute
from mindseed.objectives.sft import SFT
from mindseed.optim.groups import OptimConfig
from mindseed.optim.schedule import ScheduleConfig
from mindseed.recipes.machine import choose_device
from mindseed.recipes.model_options import ModelOptions
from mindseed.recipes.post_options import (DistillOptions, DPOOptions, KTOOptions, LoRAOptions, Method,
                                            RewardModelOptions)

PrecisionChoice = Literal["auto", "fp32", "bf16", "fp16"]
TrainPrecision = Literal["auto", "fp32", "bf16", "fp16", "fp8", "fp8-block"]
Resume = Literal["never", "newest", "auto"]
LONGEST = 1 << 24                                 # tokens of a row; more would be a slip of the finger
ROW = 512                                         # tokens of a row where nothing says otherwise


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    train: tuple[str, ...] = option((),
                                    help="files, folders or globs (jsonl, gz, zst, parquet, txt), or prepared folders",
                                    stray=True, elsewhere=("data_path", "train_file", "dataset"))
    weights: tuple[float, ...] = option((),
                                        help="share of each entry of data.train in the mixture [derived: by tokens]")
    tokenizer: str | None = option(None,
                                   help="directory or tokenizer.json [derived: model.start's, a prepared folder's, or "
                                             "trained on the data]",
                                   elsewhere=("tokenizer_path", "tokenizer_name"))
    vocab_size: int = option(6400, help="size of the tokenizer that is trained when none is given")
    seq_len: int | None = option(None, help="tokens per row, the context the model is trained on [512; less if "
                                            "model.start was trained on less]",
                                 elsewhere=("max_seq_len", "max_length", "max_seq_length", "block_size"))
    packing: Literal["best-fit", "sequential", "pad"] = option("best-fit",
                                                               help="how documents share a row; pad: one a row")
    cross_documents: bool = option(False, help="packed documents of a row see each other, as DeepSeek-V3 packs them")
    fim_rate: float = option(0.0, help="share of the texts told with their middle last (fill in the middle)")
    heldout: float = option(0.01, help="share of the documents kept apart for validation, chosen by their hash")
    remember: tuple[str, ...] = option((), help="rows of what model.start can do already: its loss on them is measured "
                                                "before, on the way and after, so that it shows what was forgotten")
    max_skipped: float = option(0.01,
                                help="bad lines put up with: below 1 a share (at least 10 lines), else a number")
    workers: int | None = option(None, help="processes that tokenise [derived: one per core]",
                                 elsewhere=("num_workers", "dataloader_num_workers"))

    def __post_init__(self) -> None:
        if self.seq_len is not None and not 1 <= self.seq_len <= LONGEST:
            raise ValueError(f"seq_len={self.seq_len} must lie between 1 and {LONGEST}")
        if not 0 <= self.fim_rate <= 1 or not 0 <= self.heldout < 1:
            raise ValueError(f"fim_rate={self.fim_rate} and heldout={self.heldout} are shares, between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    label_smoothing: float = option(0.0, help="share of the target spread over the whole vocabulary")
    z_loss: float = option(0.0, help="weight of the squared log partition function (1e-4 is usual)")
    tag_weight: float = option(1.0, help="weight of the tokens <think>, </think> (and <answer>) among the others")

    def __post_init__(self) -> None:
        SFT(**vars(self))                         # which checks them


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    steps: int | None = option(None, help="optimiser steps [derived: from minutes, epochs or tokens_per_param]",
                               elsewhere=("max_steps", "max_iters"))
    minutes: float | None = option(None,
                                   help="train for about this long: steps follow from timing a few on this machine")
    epochs: float | None = option(None, help="passes over the data, instead of steps",
                                  elsewhere=("epochs", "num_train_epochs"))
    tokens_per_param: float = option(20.0,
                                     help="tokens per parameter when neither steps, minutes nor epochs are given")
    batch: int | None = option(None,
                               help="rows per optimiser step, over all ranks [derived: from the arithmetic of the run]",
                               elsewhere=("accumulation_steps ROWS, those of all micro-batches of a step",
                                          "gradient_accumulation_steps ROWS, those of all micro-batches of a step"))
    micro_batch: int | None = option(None, help="rows per forward pass and rank [derived: up to 4096 tokens]",
                                     elsewhere=("batch_size", "per_device_train_batch_size"))
    precision: TrainPrecision = option("auto",
                                       help="auto: bf16 where it is the faster one, else fp32; masters are fp32; fp8: "
                                            "bf16 with products of Linears in 8 bits, on an H100 or later, with "
                                            "--loop.compile; fp8-block: the same, with a scale for each 128 values",
                                       elsewhere=("dtype", "bf16 bf16", "fp16 fp16"))
    compile: bool = option(False, help="compile each block with torch.compile",
                           elsewhere=("use_compile", "torch_compile"))
    attention: Literal["auto", "sdpa", "flex", "flash"] = option(
        "auto", help="sdpa: torch's fused attention, which reads a mask of all pairs where rows are packed; flex: "
                     "torch's FlexAttention, and flash: our FlashAttention in Triton (a lesson in torch on a CPU), "
                     "which pass over what packing and windows hide; auto: sdpa, on a CPU our own in blocks")
    recompute: Recompute = option(False,
                                  help="make activations again in the backward pass: a block keeps its input alone, "
                                       "for a third more work; selective: also what is dear, so that only what is "
                                       "cheap is made again", elsewhere=("gradient_checkpointing",))
    ema: float | None = option(None,
                               help="keep a moving average of the weights with this decay, and save it as the model")
    validate_every: int | None = option(None, help="steps between validations, 0: never [derived: a tenth of all]",
                                        elsewhere=("eval_steps", "eval_interval"))
    validate_documents: int = option(500, help="held-out documents used, at most, of each entry of data.train")
    sample_every: int | None = option(None, help="steps between printed samples, 0: never [derived: a quarter of all]")
    save_every: int | None = option(None, help="steps between checkpoints, 0: only the last [derived: a tenth of all]",
                                    elsewhere=("save_steps", "save_interval STEPS, those of the optimiser"))
    background_save: bool = option(True, help="weights that are spread over ranks are saved while training goes on")
    keep: int = option(2, help="checkpoints kept, besides the best one", elsewhere=("save_total_limit",))

    def __post_init__(self) -> None:
        given = [name for name in ("steps", "minutes", "epochs") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say how long to train; give one of them")
        for name in ("steps", "minutes", "epochs", "batch", "micro_batch", "keep", "tokens_per_param"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
            if getattr(self, name) is not None and getattr(self, name) > 1e12:
                raise ValueError(f"{name}={getattr(self, name):g} is more than any run can take")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema={self.ema} must lie in (0, 1)")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    out: str = option("runs/train",
                      help="folder of the run: config, log, checkpoints, and the model directory at the end",
                      elsewhere=("save_dir", "save_weight", "output_dir", "out_dir"))
    resume: Resume = option("never", bare="newest",
                            help="newest: go on from the last checkpoint; auto: start, or go on",
                            elsewhere=("from_resume auto", "resume_from_checkpoint auto"))
    method: Method = option("sft", help="sft: texts and answers (pretraining too); dpo, kto: preferences; reward, "
                                        "process-reward: a model that judges; distill: from a teacher")
    depth: int | None = option(None,
                               help="the one dial: layers, width, heads, batch, learning rate and steps follow from it")
    seed: int = option(0, help="seed of the weights, the order of the data, dropout and samples")
    device: str = option("auto", help="cpu, cuda, cuda:1, mps; auto: the GPU if there is one")
    trackers: tuple[str, ...] = option((), help="also log to: tensorboard, wandb, swanlab, trackio",
                                       elsewhere=("report_to", "use_swanlab swanlab",
                                                  "use_wandb swanlab, or wandb"))
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    dpo: DPOOptions = field(default_factory=DPOOptions)
    kto: KTOOptions = field(default_factory=KTOOptions)
    reward: RewardModelOptions = field(default_factory=RewardModelOptions)
    distill: DistillOptions = field(default_factory=DistillOptions)
    lora: LoRAOptions = field(default_factory=LoRAOptions)
    loop: LoopOptions = field(default_factory=LoopOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed={self.seed} must lie between 0 and 2^63 - 1")


GROUPS = {"objective": "sft", "dpo": "dpo", "kto": "kto", "reward": "reward", "distill": "distill"}
SHARE = {"sft": 1 / 5, "distill": 1 / 5, "reward": 1 / 5, "process-reward": 1 / 5, "dpo": 1 / 50, "kto": 1 / 50}


def idle_optim(options: Any) -> dict[str, str | None]:
    """Options of the optimiser and its schedule that others make idle, and by what; of any kind of run."""
    optim, kind, device = options.optim, options.schedule.kind, choose_device(options.device)
    return {"optim.states": (f"states are paged from a CUDA GPU, and this runs on {device}"
                             if optim.states == "paged" and device.type != "cuda" else None),
            "optim.momentum": "optim.kind is adamw" if optim.kind == "adamw" else None,
            "schedule.decay": f"schedule.kind is {kind}" if kind != "wsd" else None,
            "schedule.final": "schedule.kind is constant" if kind == "constant" else None}


def without_effect(options: TrainOptions) -> list[str]:
    """A line for every option that was given and that another one makes idle."""
    data, loop, dpo, distill = options.data, options.loop, options.dpo, options.distill
    long = next((name for name in ("steps", "minutes", "epochs") if getattr(loop, name) is not None), None)
    prepared = data.train and all((Path(entry) / "manifest.json").exists() for entry in data.train)
    tokenizer = ("data.tokenizer is given" if data.tokenizer else "model.start brings its tokenizer"
                 if options.model.start else "the data are prepared" if prepared else None)
    causes = {
        **idle_optim(options),
        "loop.tokens_per_param": f"loop.{long} says how long to train" if long else None,
        "loop.validate_documents": "loop.validate_every is 0" if loop.validate_every == 0 else None,
        "data.remember": "loop.validate_every is 0" if loop.validate_every == 0 else None,
        "data.vocab_size": tokenizer,
        **dict.fromkeys(("data.heldout", "data.fim_rate", "data.max_skipped"), "the data are prepared already"
                        if prepared else None)}
    causes |= dict.fromkeys(("dpo.reference", "dpo.reference_logps"), None if dpo.needs_reference else
                            f"{dpo.kind} has no reference")
    causes |= {"distill.beta": f"distill.distance is {distill.distance}" if distill.distance != "jsd" else None,
               "distill.layers": None if distill.states else "distill.states is 0",
               "distill.related": None if distill.relations else "distill.relations is 0"}
    causes |= {f"distill.{name}": None if distill.on_policy else "distill.on_policy is 0"
               for name in ("prompts", "answers", "max_new", "sampling_temperature")}
    mesh = options.parallel
    causes |= dict.fromkeys(("parallel.schedule", "parallel.microbatches"), "parallel.pipe is 1" if mesh.pipe == 1
                            else None)
    causes |= {"parallel.sequence": "parallel.tensor is 1" if mesh.tensor == 1 else None,
               "parallel.gather": None if mesh.zero else "parallel.zero is 0"}
    packed = options.method in ("sft", "distill")
    causes |= dict.fromkeys(("data.packing", "data.cross_documents", "data.fim_rate"), None if packed else
                            f"--method {options.method} packs nothing but the two documents of a row")
    causes |= {f"{group}.{name}": f"--method is {options.method}" for group, own in GROUPS.items()
               if own != options.method for name in vars(getattr(options, group))}
    causes |= {f"lora.{name}": "lora.rank is 0" for name in vars(options.lora) if not options.lora.rank}
    changed = diff(TrainOptions(), options)
    return [f"{name} has no effect: {cause}" for name, cause in causes.items() if cause and name in changed]


def with_rows(options: TrainOptions) -> TrainOptions:
    """Fill in data.seq_len, which everything else needs."""
    if options.data.seq_len is not None:
        return options
    start = options.model.start
    return replace(options, data=replace(options.data, seq_len=min(ROW, context_of(start)) if start else ROW))


def derive(options: TrainOptions, *, params: int, rows_per_epoch: int | None, world: int = 1,
           tokens: float | None = None) -> TrainOptions:
    """Fill in what is None, except the model's shape. `params` are those that a token meets; `tokens` is how many a run
    of `loop.minutes` will see, which needs a clock: while it is None, batch, steps and rate of such a run stay open.

    Batch and learning rate follow from the arithmetic of the whole run, C = 6 x parameters x tokens, as DeepSeek LLM
    fitted them (2401.02954): 0.292 C^0.3271 tokens a step and a rate of 0.3118 C^-0.125. A short run on a laptop gets
    small batches and a high rate, a long one on GPUs the other way round. The fit is for 1e17 to 2e19 FLOPs;
    docs/LOG.md says how it does at 1e13. Muon's update is scaled to AdamW's size, so one rate serves both.
    """
    options = with_rows(options)
    loop, seq_len = options.loop, options.data.seq_len
    pieces = options.parallel.pieces              # a pipeline cuts every micro-batch
    micro = loop.micro_batch or pieces * max(1, 4096 // seq_len // pieces)
    if tokens is None and loop.epochs is not None:
        if rows_per_epoch is None:
            raise UserError("loop.epochs needs data.train; give loop.steps instead")
        tokens = loop.epochs * rows_per_epoch * seq_len
    if tokens is None and loop.steps is None and loop.minutes is None:
        tokens = loop.tokens_per_param * params
    batch = loop.batch
    if options.method == "kto" and loop.micro_batch is None:          # one number is shared by the whole batch
        micro = batch // world if batch else max(8, micro)
    if batch is None and (tokens or loop.steps):
        batch = batch_rows(params, seq_len, micro * world, tokens=tokens, steps=loop.steps)
        if options.method == "kto":
            batch = micro * world
    if batch is not None:
        micro = loop.micro_batch or pieces * largest_divisor(max(1, batch // world // pieces), micro // pieces)
        if batch % (micro * world):
            raise UserError(f"loop.batch={batch} rows cannot be cut into micro-batches of loop.micro_batch={micro} "
                            f"rows on {world} rank(s); choose a batch that is a multiple of {micro * world}, or "
                            "another loop.micro_batch")
    steps, lr = loop.steps, options.optim.lr
    if steps is None and tokens is not None:
        steps = max(1, math.ceil(tokens / (batch * seq_len)))
    if lr is None and steps is not None:
        share = 1 if options.model.start is None else SHARE[options.method] * (2 if options.lora.rank else 1)
        lr = peak_rate(params, steps * batch * seq_len, share=share)
    return replace(options, optim=replace(options.optim, lr=lr), loop=replace(
        loop, batch=batch, micro_batch=micro, steps=steps, epochs=None if steps is not None else loop.epochs,
        minutes=None if steps is not None else loop.minutes))


def peak_rate(params: int, tokens: int, *, share: float = 1.0) -> float:
    """Peak learning rate of a run of so many tokens from nothing, or a share of it, to two digits."""
    return float(f"{share * 0.3118 * (6 * params * tokens) ** -0.125:.2g}")


def batch_rows(params: int, seq_len: int, unit: int, *, tokens: float | None, steps: int | None) -> int:
    """Rows of a step for a run of so many tokens, or of so many steps; a multiple of `unit`, one at least."""
    if tokens is not None:
        size = 0.292 * (6 * params * tokens) ** 0.3271
    else:                                         # tokens = steps x size, solved for size
        size = (0.292 * (6 * params * steps) ** 0.3271) ** (1 / (1 - 0.3271))
    return unit * max(1, round(size / seq_len / unit))


def derive_intervals(options: TrainOptions) -> TrainOptions:
    """Validation, samples and checkpoints a few times in a run, once `loop.steps` is known."""
    loop = options.loop
    assert loop.steps is not None

    def interval(given: int | None, times: int) -> int:
        return given if given is not None else max(1, -(-loop.steps // times))

    return replace(options, loop=replace(loop, validate_every=interval(loop.validate_every, 10),
                                         sample_every=interval(loop.sample_every, 4),
                                         save_every=interval(loop.save_every, 10)))


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is at most `limit`."""
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)
