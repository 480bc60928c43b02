"""What the benchmark of post-training measures of a model: right answers, pairs, what is forgotten, how near a teacher.

Nothing here was trained on: the held-out questions of the world, pairs and conversations from further down the streams
of which the training files are the beginning, and pretraining texts that were set apart.
"""
from __future__ import annotations

import statistics
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.post_data import PAIRS, judged, of_translation
from mindseed.data.loader import Evaluation
from mindseed.data.readers import read_rows
from mindseed.data.shards import Prepared
from mindseed.data.toy import World
from mindseed.interop.directory import load_directory
from mindseed.models.heads import score
from mindseed.models.lm import LM
from mindseed.objectives.sft import SFT
from mindseed.recipes.grade import grade
from mindseed.tasks.toy import ToyTask
from mindseed.tokenizers.chat import encode_chat, normalise
from mindseed.train.native import NativeBackend
from mindseed.train.validate import evaluate

UNSEEN = 400                                      # pairs

Encoded = list[tuple[list[int], list[bool]]]      # (ids, which of them the assistant said), per conversation


def exact(loaded: Any, world: World) -> dict[str, float]:
    """Percent of the held-out questions answered right, in all and by family."""
    scores, _ = grade(loaded.model, loaded.tokenizer, ToyTask(world))
    return {"exact": scores["overall"], **{f"exact/{name}": value for name, value in scores["families"].items()}}


def preferred(loaded: Any, world: World) -> dict[str, float]:
    """Percent of unseen pairs of which the chosen answer is likelier per token, or better rewarded."""
    rows = list(judged(world, PAIRS, PAIRS + UNSEEN))
    sides = [encoded(loaded.tokenizer, [{"messages": row[side]} for row in rows]) for side in ("chosen", "rejected")]
    if loaded.model.value_head is not None:
        ranks = [score(loaded.model, [ids for ids, _ in some]) for some in sides]
    else:
        ranks = [[said(loaded.model, *one).mean().item() for one in some] for some in sides]
    return {"pairs": 100 * statistics.mean(a > b for a, b in zip(*ranks))}


def kept(loaded: Any, folder: Path) -> dict[str, float]:
    """What a model still does that it was not trained on last: bits per byte of texts, and loss (nats per token) of
    conversations about other things than translation."""
    texts = Evaluation(Prepared(folder / "pretrain/data/0-pretrain").split("heldout"), seq_len=384, batch_size=16,
                       limit=300)
    bits = evaluate(NativeBackend(loaded.model, SFT(), []), texts, raw_bytes=texts.bytes)["bits_per_byte"]
    others = encoded(loaded.tokenizer, [row for row in unseen(folder) if not of_translation(row)])
    logps = torch.cat([said(loaded.model, *one) for one in others])
    return {"bits": bits, "others": -logps.mean().item()}


@torch.no_grad()
def nearness(loaded: Any, teacher: LM, folder: Path) -> dict[str, float]:
    """Of the assistant's tokens in unseen conversations: KL(teacher, student) in nats, and percent of the tokens at
    which both find the same one likeliest."""
    divergences, agreed = [], []
    for ids, mine in encoded(loaded.tokenizer, unseen(folder)):
        own = torch.tensor(mine[1:])
        p, q = (distribution(model, ids)[own] for model in (teacher, loaded.model))
        divergences.append((p.exp() * (p - q)).sum(-1))
        agreed.append(p.argmax(-1) == q.argmax(-1))
    return {"kl": torch.cat(divergences).mean().item(), "agreed": 100 * torch.cat(agreed).float().mean().item()}


@cache
def unseen(folder: Path) -> tuple[dict, ...]:
    return tuple(row.row for row in read_rows([folder / "world/unseen.jsonl"]))


def encoded(tokenizer: Any, rows: Any) -> Encoded:
    found = []
    for row in rows:
        messages, tools = normalise(row)
        ids, mine = encode_chat(tokenizer, messages, tools=tools)
        found.append((ids[:384], mine[:384]))
    return found


def distribution(model: LM, ids: list[int]) -> torch.Tensor:
    """(T - 1, V): log-probabilities of what follows."""
    x = torch.tensor([ids[:-1]])
    return model(x, torch.arange(x.shape[1])[None]).logits()[0].float().log_softmax(-1)


@torch.no_grad()
def said(model: LM, ids: list[int], mine: list[bool]) -> torch.Tensor:
    """(n,): log p of every token that the assistant said."""
    x, own = torch.tensor([ids]), torch.tensor([mine])[:, 1:]
    return model(x[:, :-1], torch.arange(len(ids) - 1)[None]).logps(x[:, 1:])[own]


def open_model(directory: Path) -> Any:
    loaded = load_directory(directory)
    loaded.model.eval()
    return loaded
