"""Small models and batches that several tests share."""
from __future__ import annotations

import torch

from mindseed.core import Batch
from mindseed.infer.paged import PagedCache, Pages, windows_of
from mindseed.models.config import LayerConfig, LMConfig
from mindseed.models.lm import LM, build
from mindseed.models.presets import Shape
from mindseed.nn.alibi import AlibiConfig
from mindseed.nn.ffn import MLPConfig, SwiGLUConfig
from mindseed.nn.gqa import GQAConfig
from mindseed.nn.linear_attention import DeltaConfig
from mindseed.nn.mla import MLAConfig
from mindseed.nn.moe import MoEConfig
from mindseed.nn.rope import DynamicScaling, LinearScaling, Llama3Scaling, RopeConfig, YarnScaling

VOCAB = 61

GQA_KIT = dict(heads=4, kv_heads=2, head_dim=8)
MLA_KIT = dict(heads=3, kv_rank=12, q_rank=10, plain_dim=6, rope_dim=4, value_dim=5)
YARN = YarnScaling(factor=4.0, original=8, beta_fast=4.0)
MIXER_KIT = {
    "gqa": GQAConfig(**GQA_KIT),
    "no qk-norm": GQAConfig(**GQA_KIT, qk_norm=False),
    "window": GQAConfig(**GQA_KIT, window=3),
    "window 1": GQAConfig(**GQA_KIT, window=1),
    "no positions": GQAConfig(**GQA_KIT, positions=None),
    "alibi": GQAConfig(heads=6, kv_heads=2, head_dim=8, positions=AlibiConfig()),
    "alibi, window": GQAConfig(**GQA_KIT, positions=AlibiConfig(), window=4),
    "interleaved": GQAConfig(**GQA_KIT, positions=RopeConfig(interleaved=True)),
    "linear": GQAConfig(**GQA_KIT, positions=RopeConfig(scaling=LinearScaling(factor=3.0))),
    "yarn": GQAConfig(**GQA_KIT, positions=RopeConfig(scaling=YARN)),
    "llama3": GQAConfig(**GQA_KIT, positions=RopeConfig(scaling=Llama3Scaling(factor=4.0, original=8))),
    "mla": MLAConfig(**MLA_KIT),
    "mla, plain queries": MLAConfig(**MLA_KIT | {"q_rank": None, "rope": RopeConfig(scaling=YarnScaling(
        factor=4.0, original=8, mscale=1.0, mscale_all_dim=0.7))}),
    "delta": DeltaConfig(heads=4, key_heads=2, key_dim=6, value_dim=5),
    "linear attention": DeltaConfig(heads=2, key_heads=2, key_dim=6, value_dim=5, conv=1, delta=False),
}
DYNAMIC = GQAConfig(**GQA_KIT, positions=RopeConfig(scaling=DynamicScaling(factor=2.0, original=6)))
FFN_KIT = {
    "swiglu": SwiGLUConfig(ffn_dim=48),
    "relu2": MLPConfig(ffn_dim=40, activation="relu2"),
    "moe": MoEConfig(experts=4, top_k=2, expert_dim=20, shared_dim=12),
    "moe, groups": MoEConfig(experts=8, top_k=2, expert_dim=12, score="sigmoid", groups=4, top_groups=2, scaling=2.5,
                             bias=True),
}


def kit(*mixers: str | GQAConfig, ffn: str = "swiglu", **changes) -> LMConfig:
    """A tiny model with one layer per mixer of MIXER_KIT."""
    layers = tuple(LayerConfig(mixer=MIXER_KIT.get(m, m), ffn=FFN_KIT[ffn]) for m in mixers)
    return LMConfig(**{"vocab_size": VOCAB, "dim": 32, "layers": layers, "seq_len": 32} | changes)


KITS = {name: kit(name, name) for name in MIXER_KIT} | {
    "mixed": kit("window", "mla", "delta", "gqa", "alibi"),
    "learned": kit("no positions", "no positions", learned_positions=True),
    "layer norm, post": kit("gqa", "delta", norm="layer", placement="post", ffn="relu2"),
    "sandwich": kit("gqa", "mla", placement="sandwich"),
    "moe": kit("gqa", "gqa", ffn="moe"),
    "moe, groups": kit("mla", "mla", ffn="moe, groups", mtp=(LayerConfig(mixer=MIXER_KIT["mla"], ffn=FFN_KIT["moe"]),)),
}


def kit_model(config: LMConfig, seed: int = 0) -> LM:
    """The model with every parameter random, in float64 and eval mode."""
    model = build(config, seed=seed)
    randomise(model, seed)
    return model.double().eval()


def tiny_model(seed: int = 0, **changes) -> LM:
    """About 20 thousand parameters, every one of them random (default norms are all ones and would hide a swap)."""
    shape = Shape(**{"layers": 2, "dim": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_dim": 48} | changes)
    model = build(shape.lm_config(vocab_size=VOCAB, seq_len=32), seed=seed)
    randomise(model, seed)
    return model


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed + 1000)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.uniform_(0.5, 1.5, generator=generator)
            else:
                p.normal_(0, 0.15, generator=generator)


def pages(model: LM, batch: int, tokens: int = 64, *, block_size: int = 4, int8: bool = False) -> Pages:
    """A State for a fixed batch: every row has its own blocks, in disorder, for so many tokens."""
    specs, each = model.state_specs(), -(-tokens // block_size)
    shuffled = torch.randperm(batch * each, generator=torch.Generator().manual_seed(batch)).view(batch, each) + 1
    cache = PagedCache(specs, {window: batch * each + 1 for window in windows_of(specs)}, block_size, slots=batch + 1,
                       dtype=model.embed.weight.dtype, int8=int8)
    return Pages(cache, {window: shuffled for window in cache.windows}, torch.arange(1, batch + 1))


def some_rows(state: Pages, rows: list[int]) -> Pages:
    """The State of these rows alone, when the others have ended."""
    return Pages(state.cache, {window: table[rows] for window, table in state.tables.items()}, state.slots[rows])


def random_batch(rows: int, length: int, *, seed: int = 0, empty: tuple[int, ...] = ()) -> Batch:
    """Packed rows with uneven documents and uneven supervision; rows in `empty` have no supervised token."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, length), generator=g)
    starts = torch.rand(rows, length, generator=g) < 0.15
    starts[:, 0] = True
    at = torch.arange(length).expand(rows, length)
    first = torch.where(starts, at, 0).cummax(1).values
    weights = (torch.rand(rows, length, generator=g) < torch.rand(rows, 1, generator=g)).float()
    weights[list(empty)] = 0
    return Batch(ids=ids, targets=torch.randint(0, VOCAB, (rows, length), generator=g), weights=weights,
                 positions=at - first, extra={"row": torch.arange(rows)})


def split(batch: Batch, pieces: int) -> list[Batch]:
    """The rows of a batch dealt out in order."""
    size = len(batch.ids) // pieces
    def cut(x, i):
        return x[i * size:(i + 1) * size]
    return [Batch(ids=cut(batch.ids, i), targets=cut(batch.targets, i), weights=cut(batch.weights, i),
                  positions=cut(batch.positions, i), extra={k: cut(v, i) for k, v in batch.extra.items()})
            for i in range(pieces)]


class Fixed:
    """A Source over given batches, again and again."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches, self.at = batches, 0

    def __next__(self) -> Batch:
        self.at += 1
        return self.batches[(self.at - 1) % len(self.batches)]

    def describe(self, rows: list[int]) -> list[str]:
        return [f"row-{r}" for r in rows]

    def state_dict(self) -> dict:
        return {"at": self.at}

    def load_state_dict(self, state: dict) -> None:
        self.at = state["at"]


def flat(model: torch.nn.Module, what: str = "data") -> torch.Tensor:
    """All parameters, or all gradients (`what="grad"`), as one vector."""
    return torch.cat([getattr(p, what).detach().flatten() for p in model.parameters()])
