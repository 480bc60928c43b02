"""A small model for the studio's tests that knows a few conversations by heart, and a run folder to look at."""
from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from mindseed.interop.directory import save_directory
from mindseed.models.config import LayerConfig, LMConfig
from mindseed.models.lm import LM, build
from mindseed.models.presets import Shape
from mindseed.nn.gqa import GQAConfig
from mindseed.nn.linear_attention import DeltaConfig
from mindseed.nn.moe import MoEConfig
from mindseed.tokenizers.bpe import BPE
from mindseed.tokenizers.bpe_train import train
from mindseed.tokenizers.chat import encode_chat, render
from mindseed.tasks.tools import TOOLS

HELLO, GREETING = "hello", "Good morning, dear reader."
SUM = "12+30=?"
CALL = {"name": "calculate", "arguments": {"sum": "12+30"}}
WHY, THOUGHT, BECAUSE = "why?", "Let me see.", "Because it is so."
CHATS = [
    ([{"role": "user", "content": HELLO}, {"role": "assistant", "content": GREETING}], None),
    ([{"role": "user", "content": SUM}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
      {"role": "tool", "content": '{"value": "42"}'}, {"role": "assistant", "content": "12+30=42"}],
     [TOOLS["calculate"].openai()]),
    ([{"role": "user", "content": WHY},
      {"role": "assistant", "content": BECAUSE, "reasoning_content": THOUGHT}], None),
]
CHATS.append((CHATS[0][0] + CHATS[2][0], None))             # one after the other


def tokenizer() -> BPE:
    texts = [span.text for messages, tools in CHATS for span in render(messages, tools=tools) if not span.control]
    return train(texts * 4, vocab_size=520)


def taught(known: BPE, *, steps: int = 45) -> LM:
    """A model that has learnt the conversations by heart."""
    model = build(Shape(layers=2, dim=64, heads=4, kv_heads=2, head_dim=16, ffn_dim=128).lm_config(
        vocab_size=known.vocab_size, seq_len=1024))
    rows = [encode_chat(known, messages, tools=tools, training=True) for messages, tools in CHATS]
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows])      # what comes after is not seen before
    keep = torch.tensor([learnt + [False] * (length - len(learnt)) for _, learnt in rows])[:, 1:]
    positions = torch.arange(length - 1).expand(len(rows), -1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * min(1, (step + 1) / 5, 2 * (1 - step / steps) + 0.02)
        losses = -model(ids[:, :-1], positions).logps(ids[:, 1:])[keep]
        optimiser.zero_grad()
        losses.mean().backward()
        optimiser.step()
    assert losses.max() < 0.3, losses                           # surer of every token than of all others
    return model.eval()


def mixture(known: BPE) -> LM:
    """A random model with a layer of each kind that the page about the inside has something to say of."""
    ffn = MoEConfig(experts=4, top_k=2, expert_dim=16)
    gqa = GQAConfig(heads=2, kv_heads=1, head_dim=16, window=8)
    return build(LMConfig(vocab_size=known.vocab_size, dim=32, seq_len=8192, layers=(
        LayerConfig(mixer=gqa, ffn=ffn), LayerConfig(mixer=DeltaConfig(heads=2, key_heads=2, key_dim=8, value_dim=8),
                                                     ffn=ffn)))).eval()


def save_models(folder: Path) -> tuple[Path, Path]:
    torch.manual_seed(0)
    known = tokenizer()
    greedy = {"do_sample": False}
    return (save_directory(taught(known), known, folder / "taught" / "model", sampling=greedy),
            save_directory(mixture(known), known, folder / "mixture" / "model", sampling=greedy))


def save_run(folder: Path, steps: int, *, lr: float = 0.01, of: int | None = None) -> Path:
    """A run as `mindseed train` leaves it, with mixtures and samples."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(f'out = "{folder.name}"\n[loop]\nsteps = {of or steps}\n[optim]\nlr = {lr}\n')
    (folder / "run.json").write_text(json.dumps({"command": "mindseed train --depth 2", "commit": "abc123"}))
    with open(folder / "log.jsonl", "w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps(row(step)) + "\n")
    return folder


def row(step: int) -> dict:
    busy = 0.25 + 0.1 * math.sin(step)
    values = {"step": step, "time": 1.0 * step, "loss": 4 / step + 0.5, "lr": 0.01, "grad_norm": 1.0 / step,
              "tokens_per_s": 2000.0, "supervised": 100, "elapsed_s": 2.0 * step, "load_max": 1.2,
              "router_entropy": 0.9, **{f"load/0/{e}": share for e, share in enumerate((busy, 0.5 - busy, 0.25, 0.25))}}
    if step % 10 == 0:
        values |= {"bits_per_byte": 2 / step + 0.3, "sample 1": f"once upon >>> a time {step}"}
    return values
