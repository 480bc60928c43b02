"""A mixture of experts, 8 experts of which two are visited: training steps against a dense model with as many active
parameters, and against transformers' Qwen3-MoE of the same shape; and what a token costs in the cache of MLA and GQA.

The mixture that meets the dense model has one shared expert as well; transformers' Qwen3-MoE has none, so the second
pair goes without. All take the same ids, AdamW (fused), clipping, and the auxiliary loss where there are experts.
"""
from __future__ import annotations

import itertools
from dataclasses import replace

from benchmarks.common import ROUNDS, in_turn, ratio, reference, report, seconds, spread
from benchmarks.train_step import LENGTH, ROWS, VOCAB, our_step, their_step
from mindseed.base.log import si
from mindseed.models.presets import PRESETS, Shape
from mindseed.nn.moe import MoEConfig
from mindseed.plan.memory import cache_bytes_per_token
from mindseed.plan.params import count_params

NAME = "moe"
EXPERT = 448
DENSE = replace(PRESETS["mini"], ffn_dim=3 * EXPERT)
SHARED = replace(DENSE, moe=MoEConfig(experts=8, top_k=2, expert_dim=EXPERT, shared_dim=EXPERT, balance_weight=0.01))
PLAIN = PRESETS["qwen3-moe-mini"]


def params(shape: Shape) -> str:
    count = count_params(shape.lm_config(vocab_size=VOCAB, seq_len=LENGTH))
    return f"{si(count.total)}-A{si(count.active)}" if count.active != count.total else si(count.total)


def main() -> None:
    reference("moe")
    rows = []
    pairs = (("mixture with a shared expert", SHARED, "dense", DENSE, our_step, 0.75),
             ("mixture", PLAIN, "transformers Qwen3-MoE", PLAIN, their_step, 1.5))
    for (name, shape, against, other, make, target), precision in itertools.product(pairs, ("bf16", "fp32")):
        steps = {"a": our_step(False, shape, precision), "b": make(False, other, precision)}
        for step in (*steps.values(), *steps.values()):
            step()
        times = in_turn({key: lambda step=step: seconds(step) for key, step in steps.items()}, ROUNDS)
        speed = {key: [ROWS * LENGTH / t for t in values] for key, values in times.items()}
        rows.append([f"{name}, {params(shape)}, {precision}", spread(speed["a"]), f"{against}, {params(other)}",
                     spread(speed["b"]), f"{ratio(times['b'], times['a']):.2f}x", f"{target}x"])
    for size in ("mini", "small"):
        mla, gqa = (cache_bytes_per_token(PRESETS[f"{family}-{size}"].lm_config(vocab_size=VOCAB, seq_len=LENGTH))
                    for family in ("deepseek-v3", "qwen3"))
        rows.append([f"MLA's cache, deepseek-v3-{size}", f"{mla} bytes a token", f"GQA's, qwen3-{size}",
                     f"{gqa} bytes a token", f"{mla / gqa:.2f}x", ""])
    report(NAME, "Mixtures of experts: a training step, 8 x 512 tokens, CPU; and the caches of MLA and GQA",
           ["what", "tok/s", "against", "tok/s", "ratio", "target"], rows, command="python -m benchmarks.moe",
           notes=f"Eager, AdamW, medians of {ROUNDS} steps each, in turn; bf16 is autocast. Caches in bf16, by "
                 "arithmetic.")


if __name__ == "__main__":
    main()
