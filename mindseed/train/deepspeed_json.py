"""DeepSpeed's settings for a run: what follows from our options, and a JSON file laid over it.

DeepSpeed overlooks what it does not know at the top of such a file; and what says something else than our options
would be followed by the engine alone, and by nothing around it. So both are errors here. The word "auto", which Hugging
Face's Trainer fills in, means what follows from our options: files that were written for it can be read.
"""
from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

from mindseed.base import dist
from mindseed.base.errors import UserError
from mindseed.base.files import read_json
from mindseed.train.native import Precision

BUCKET = 500_000_000                              # elements, DeepSpeed's own choice
TRAVEL_IN_BF16 = ["mindseed.nn.linear.Linear", "mindseed.nn.moe.ExpertLinear"]
OURS = {"train_batch_size": "loop.batch", "train_micro_batch_size_per_gpu": "loop.micro_batch",
        "gradient_accumulation_steps": "loop.batch", "gradient_clipping": "optim.max_norm",
        "zero_optimization.stage": "parallel.zero"}
REFUSED = {"optimizer": "optim.* say how weights are updated", "scheduler": "schedule.* say how the rate goes",
           "fp16": "loop.precision=fp16 does it, with weights in fp32",
           "managed_gradient_accumulation": "mindseed says itself where a step ends",
           "gradient_allreduce_op": "the loss is divided by what all ranks counted, and gradients are averaged"}
KNOWN = {                                         # what may stand at the top, as DeepSpeed documents it
    *(key for key in OURS if "." not in key), *REFUSED, "activation_checkpointing", "aio", "autotuning", "bf16",
    "checkpoint", "comet", "comms_logger", "communication_data_type", "compile", "compression_training", "csv_monitor",
    "data_efficiency", "data_types", "dataloader_drop_last", "disable_allgather", "disable_python_gc", "dump_state",
    "flops_profiler", "gradient_predivide_factor", "hybrid_engine", "log_level", "memory_breakdown", "monitor_config",
    "prescale_gradients", "steps_per_print", "tensorboard", "torch_autocast", "wall_clock_breakdown", "wandb",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization"}
TABLES = ("bf16", "fp16", "torch_autocast", "zero_optimization")


def deepspeed_config(*, zero: int, offload: bool = False, precision: Precision = "fp32",
                     gather: Literal["fp32", "bf16"] = "fp32", max_norm: float = 1.0, micro_batch: int = 1,
                     accumulate: int = 1, params: int = BUCKET, pin: bool = False,
                     json: Path | str | None = None) -> dict[str, Any]:
    """DeepSpeed's settings for our options, with those of the file `json` laid over them.

    `gather`: the dtype in which matrices and their gradients travel; `params`: of the model, since no buffer need be
    larger; `pin`: offloaded memory is pinned, which a GPU reads faster. UserError for a file that contradicts our
    options or holds what DeepSpeed would overlook.
    """
    bucket = min(BUCKET, params + params % 2)     # DeepSpeed wants an even number
    stage: dict[str, Any] = {"stage": zero, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if offload:
        stage["offload_optimizer"] = {"device": "cpu", "pin_memory": pin}
    if offload and zero == 3:
        stage["offload_param"] = {"device": "cpu", "pin_memory": pin}
    config = {"train_batch_size": micro_batch * accumulate * dist.world_size(),
              "train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": accumulate,
              "gradient_clipping": max_norm if zero else 0.0,                     # without ZeRO we clip ourselves
              "zero_optimization": stage, "zero_force_ds_cpu_optimizer": False, "steps_per_print": None}
    if precision == "bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16",
                                    "lower_precision_safe_modules": TRAVEL_IN_BF16 if gather == "bf16" else []}
    if json is None:
        return config
    given = without_auto(read_json(json, {str: Any}, remedy="it must be one JSON object, as DeepSpeed documents it"))
    check(given, config | {"gradient_clipping": max_norm}, precision, json)
    if given.get("bf16", {}).get("enabled"):
        config.pop("torch_autocast")              # weights are in bf16 then, and the masters DeepSpeed's
    return merged(config, given)


def check(given: dict[str, Any], ours: dict[str, Any], precision: str, file: Path | str) -> None:
    """Refuse a file that says something else than our options, or what nobody reads."""
    for key, value in given.items():
        if key not in KNOWN:
            close = difflib.get_close_matches(key, KNOWN, n=1)
            raise UserError(f"{file}: DeepSpeed does not read {key}" + (f"; did you mean {close[0]}?" if close else ""))
        if key in TABLES and not isinstance(value, dict):
            raise UserError(f"{file}: {key} must be an object, it is {value}")
        if key in REFUSED and (key != "fp16" or value.get("enabled")):
            raise UserError(f"{file}: leave out {key}: {REFUSED[key]}")
    for name, option in OURS.items():
        mine, theirs = ours, given
        for part in name.split("."):
            mine, theirs = mine[part], (theirs or {}).get(part)
        if theirs is not None and theirs != mine:
            raise UserError(f"{file}: {name} is {theirs}, but {option} makes it {mine}; leave it out, or change the "
                            "option")
    if given.get("bf16", {}).get("enabled") and precision != "bf16":
        raise UserError(f"{file}: bf16 is enabled, but loop.precision is {precision}; set it to bf16")


def without_auto(value: Any) -> Any:
    """A JSON value without whatever is "auto"."""
    if isinstance(value, dict):
        return {key: without_auto(item) for key, item in value.items() if item != "auto"}
    return value


def merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `under`, table by table."""
    out = dict(under)
    for key, value in over.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out
