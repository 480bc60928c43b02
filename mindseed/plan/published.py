"""Shapes of published models, to plan with before anyone trains one: by their names, with vocabulary and context.

Sources are the models' own reports and the config.json beside their weights. Their parameters are counted from these
shapes, and a test holds the counts to those of the weights that were published.
"""
from __future__ import annotations

from dataclasses import replace

from mindseed.models.config import LMConfig
from mindseed.models.presets import LatentShape, Shape
from mindseed.nn.moe import MoEConfig

LLAMA = Shape(layers=32, dim=4096, heads=32, kv_heads=32, head_dim=128, ffn_dim=11_008, qk_norm=False, tied=False,
              norm_eps=1e-5)
QWEN3 = Shape(layers=36, dim=4096, heads=32, kv_heads=8, head_dim=128, ffn_dim=12_288, tied=False, theta=1e6)
GPT3 = Shape(layers=96, dim=12_288, heads=96, kv_heads=96, head_dim=128, ffn_dim=49_152, qk_norm=False,
             positions="learned", norm="layer", activation="gelu")
DEEPSEEK = Shape(layers=61, dim=7168, heads=128, kv_heads=128, head_dim=128, ffn_dim=18_432, qk_norm=False, tied=False,
                 dense_layers=3, latent=LatentShape(kv_rank=512, q_rank=1536, rope_dim=64),
                 moe=MoEConfig(experts=256, top_k=8, expert_dim=2048, shared_dim=2048, score="sigmoid", scaling=2.5,
                               groups=8, top_groups=4, bias=True))

PUBLISHED: dict[str, tuple[Shape, int, int]] = {             # shape, vocabulary, context
    "gpt3": (GPT3, 50_257, 2048),                            # 2005.14165
    "llama-7b": (LLAMA, 32_000, 2048),                       # 2302.13971; Llama 2 has the same shape
    "llama-13b": (replace(LLAMA, layers=40, dim=5120, heads=40, kv_heads=40, ffn_dim=13_824), 32_000, 4096),
    "llama-70b": (replace(LLAMA, layers=80, dim=8192, heads=64, kv_heads=8, ffn_dim=28_672), 32_000, 4096),
    "llama3.1-8b": (replace(LLAMA, kv_heads=8, ffn_dim=14_336, theta=5e5), 128_256, 8192),       # 2407.21783
    "llama3.1-70b": (replace(LLAMA, layers=80, dim=8192, heads=64, kv_heads=8, ffn_dim=28_672, theta=5e5),
                     128_256, 8192),
    "llama3.1-405b": (replace(LLAMA, layers=126, dim=16_384, heads=128, kv_heads=8, ffn_dim=53_248, theta=5e5),
                      128_256, 8192),
    "qwen3-0.6b": (replace(QWEN3, layers=28, dim=1024, heads=16, ffn_dim=3072, tied=True), 151_936, 4096),  # 2505.09388
    "qwen3-8b": (QWEN3, 151_936, 4096),
    "qwen3-30b-a3b": (replace(QWEN3, layers=48, dim=2048, kv_heads=4, ffn_dim=6144, moe=MoEConfig(
        experts=128, top_k=8, expert_dim=768, balance_weight=0.001)), 151_936, 4096),
    "deepseek-v3": (DEEPSEEK, 129_280, 4096),                # 2412.19437, without the module for a further token
}


def published(name: str) -> LMConfig:
    shape, vocab_size, seq_len = PUBLISHED[name]
    return shape.lm_config(vocab_size=vocab_size, seq_len=seq_len)
