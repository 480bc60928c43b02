"""Activations made again in the backward pass instead of kept (1604.06174): memory for time.

    full         a block keeps its input alone and runs again: a third more work.
    selective    what is dear to make is kept, what is cheap is made again (2205.05198): of the products with matrices
                 every second is kept, and what attention gives; norms, rotations, gates and the other products are
                 made again.
"""
from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = bool | Literal["selective"]

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten._grouped_mm.default}
ATTENTION = {aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default,
             aten._scaled_dot_product_cudnn_attention.default,
             aten._scaled_dot_product_flash_attention_for_cpu.default}


def run_again(block: nn.Module, how: Recompute, *inputs: Any) -> Any:
    """block(*inputs), of which the backward pass will run again what was not kept."""
    draws = any(getattr(module, "dropout", 0) for module in block.modules())      # numbers that must come again
    keeping = {"context_fn": contexts} if how == "selective" else {}
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=draws, **keeping)


def contexts() -> tuple[Any, Any]:
    seen = {"forward": 0, "again": 0}
    return create_selective_checkpoint_contexts(partial(policy, seen))


def policy(seen: dict[str, int], context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what attention gives and every second product, counted alike both times."""
    keep = op in ATTENTION or getattr(op, "namespace", "") == "mindseed"          # our own kernels are attention's
    if op in PRODUCTS:
        when = "again" if context.is_recompute else "forward"
        seen[when] += 1
        keep = seen[when] % 2 == 0
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
