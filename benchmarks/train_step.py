"""(a) One training step of the 26M preset, 8 x 512, bf16 autocast, on the CPU, against transformers' Qwen3 of the same
shape with fused AdamW: eager against eager, compiled against compiled, tokens/s and peak memory.

Both get the same ids, the same clipping and the same optimiser. Theirs is given its labels, so that it computes its
own loss. Ours is the step that `mindseed train` runs, with AdamW for a like-for-like comparison.
"""
from __future__ import annotations

import json
import resource
import statistics
import sys
import threading
import time
from pathlib import Path

import torch

from benchmarks.common import ROUNDS, in_process, in_turn, ratio, reference, report, seconds, spread
from mindseed.base.hardware import measured_peak, peak_memory
from mindseed.core import Batch
from mindseed.models.lm import build
from mindseed.models.presets import PRESETS, Shape
from mindseed.objectives.sft import SFT
from mindseed.optim.groups import OptimConfig, build_optimizers, parameter_groups
from mindseed.plan.flops import flops_per_token
from mindseed.train.native import NativeBackend

NAME = "train-step"
ROWS, LENGTH, VOCAB = 8, 512, 6400


def batch() -> torch.Tensor:
    return torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def our_step(compiled: bool, shape: Shape = PRESETS["mini"], precision: str = "bf16"):
    """A callable that does one step."""
    config = shape.lm_config(vocab_size=VOCAB, seq_len=LENGTH)
    model, optim = build(config).train(), OptimConfig(kind="adamw", lr=1e-3)
    backend = NativeBackend(model, SFT(), build_optimizers(parameter_groups(model, optim), optim), precision=precision)
    if compiled:
        model.compile_blocks()
    ids = batch()
    one = Batch(ids=ids[:, :-1], targets=ids[:, 1:], weights=torch.ones(ROWS, LENGTH),
                positions=torch.arange(LENGTH).expand(ROWS, LENGTH))

    def step() -> None:
        backend.forward_backward(one, scale=torch.tensor(1 / (ROWS * LENGTH)), last=True)
        backend.step(1e-3)

    return step


def their_step(compiled: bool, shape: Shape = PRESETS["mini"], precision: str = "bf16"):
    transformers = reference("train_step")
    s, kind, more = shape, "Qwen3", {}
    if s.moe is not None:
        kind, more = "Qwen3Moe", {"num_experts": s.moe.experts, "num_experts_per_tok": s.moe.top_k,
                                  "moe_intermediate_size": s.moe.expert_dim, "norm_topk_prob": s.moe.renormalise,
                                  "output_router_logits": True, "router_aux_loss_coef": s.moe.balance_weight}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCAB, hidden_size=s.dim, intermediate_size=s.ffn_dim, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head_dim, tie_word_embeddings=True,
        max_position_embeddings=LENGTH, use_cache=False, **more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).train()
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = batch()[:, :-1].contiguous()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


STEPS = {"ours": our_step, "theirs": their_step}


def memory(which: str, compiled: bool) -> None:
    """Peak resident bytes of three steps beyond what the process held before building the model; in a child process.
    """
    before, step, top, done = resident(), STEPS[which](compiled), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            top[0] = max(top[0], resident())
            time.sleep(0.002)

    if compiled:
        step()                                    # the compiler's own memory is not the step's
    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(3):
        step()
    done.set()
    watcher.join()
    print(json.dumps({"bytes": top[0] - before, "whole": peak_memory("cpu")}))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    if sys.argv[1:2] == ["memory"]:
        memory(sys.argv[2], sys.argv[3] == "compiled")
        return
    reference("train_step")
    peak, flops = measured_peak("cpu", torch.bfloat16), None
    rows = []
    for kind in ("eager", "compiled"):
        steps = {name: make(kind == "compiled") for name, make in STEPS.items()}
        for step in steps.values():
            step()
            step()
        times = in_turn({name: lambda step=step: seconds(step) for name, step in steps.items()}, ROUNDS)
        del steps
        peaks = {name: in_process("benchmarks.train_step", "memory", name, kind)["bytes"] for name in STEPS}
        config = PRESETS["mini"].lm_config(vocab_size=VOCAB, seq_len=LENGTH)
        flops = flops_per_token(config, LENGTH).model * ROWS * LENGTH
        speed = {name: [ROWS * LENGTH / t for t in values] for name, values in times.items()}
        ours, theirs = peaks["ours"], peaks["theirs"]
        rows.append([kind, spread(speed["ours"]), spread(speed["theirs"]),
                     f"{ratio(times['theirs'], times['ours']):.2f}x",
                     f"{100 * flops / statistics.median(times['ours']) / peak:.0f}%",
                     f"{ours / 1e6:.0f} / {theirs / 1e6:.0f} MB", f"{ours / theirs:.2f}x"])
    report(NAME, "Training step, 26M parameters, 8 x 512 tokens, bf16 autocast, CPU, against transformers",
           ["", "ours, tok/s", "transformers, tok/s", "speed", "of bf16 peak", "peak memory", "memory"], rows,
           command="python -m benchmarks.train_step",
           notes=f"Target: eager 1.3x, compiled 1.1x, memory 0.7x, 60% of the peak. Measured bf16 matmul peak: "
                 f"{peak / 1e9:.0f} GFLOP/s; fp32: {measured_peak('cpu', torch.float32) / 1e9:.0f} GFLOP/s. Medians of "
                 f"{ROUNDS} steps each, in turn; memory in a process of its own, above what it held before the model.")


if __name__ == "__main__":
    main()
