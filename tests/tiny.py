"""Small models and batches that several tests share."""
from __future__ import annotations

import torch

from mindseed.core import Batch
from mindseed.models.lm import LM, build
from mindseed.models.presets import Shape

VOCAB = 61


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
