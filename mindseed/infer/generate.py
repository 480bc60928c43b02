"""Generation: read the prompts once, then go on token by token, keeping what every layer remembers in a cache.

`stream` is the loop and hands out tokens as they come; `generate` collects them. `generate_uncached` is the oracle:
the same choices made without cache or batch, by running the model over the whole text for every token. Slow, obvious,
and what the fast loop is tested against.
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mindseed.base.errors import UserError
from mindseed.core import Tokenizer
from mindseed.infer.sample import Sampler, Sampling
from mindseed.infer.state import Cache
from mindseed.infer.step import decoding_step
from mindseed.models.lm import LM
from mindseed.nn.linear import transposed_product, wants_transposed
from mindseed.tokenizers.base import EOS, PAD, Stream, document_marks

Finish = Literal["stop", "length", "context"]     # a stop id or string; max_new reached; no room left in the context


@dataclass(frozen=True, kw_only=True)
class Token:
    """One step of one row. `text` is what may be shown by now; it never contains a stop id or string."""

    row: int
    id: int
    text: str
    logp: float | None
    finish: Finish | None


@dataclass(kw_only=True)
class Completion:
    """What a prompt was answered with. `ids` are all that the model chose, a final stop id included; `text` is without
    it and without the stop string. `logps` are the model's own log-probabilities, before temperature and filters."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    logps: list[float] = field(default_factory=list)
    finish: Finish = "length"


def generate(model: LM, tokenizer: Tokenizer | None, prompts: list[list[int]], *, sampling: Sampling = Sampling(),
             max_new: int = 128, stop: Collection[str] = (), stop_ids: Collection[int] | None = None,
             seeds: list[int] | None = None, logps: bool = False,
             on_token: Callable[[Token], None] | None = None) -> list[Completion]:
    """Answer every prompt; see `stream` for the options. `on_token` is called with every token as it comes."""
    done = [Completion() for _ in prompts]
    for token in stream(model, tokenizer, prompts, sampling=sampling, max_new=max_new, stop=stop, stop_ids=stop_ids,
                        seeds=seeds, logps=logps):
        collect(done[token.row], token)
        if on_token is not None:
            on_token(token)
    return done


def collect(completion: Completion, token: Token) -> None:
    completion.ids.append(token.id)
    completion.text += token.text
    if token.logp is not None:
        completion.logps.append(token.logp)
    if token.finish is not None:
        completion.finish = token.finish


@torch.inference_mode()
def stream(model: LM, tokenizer: Tokenizer | None, prompts: list[list[int]], *, sampling: Sampling = Sampling(),
           max_new: int = 128, stop: Collection[str] = (), stop_ids: Collection[int] | None = None,
           seeds: list[int] | None = None, logps: bool = False) -> Iterator[Token]:
    """Tokens of all rows as they are chosen, every row until it stops, has `max_new`, or fills the context.

    Prompts are ids and may differ in length. `stop_ids` are by default the tokenizer's end of text and of turn; `stop`
    are strings, found across token borders. Row i draws with `seeds[i]`, by default `sampling.seed + i`, whatever else
    is in the batch. Without a tokenizer there is no text. Puts the model in eval mode while it runs. UserError for a
    prompt that is empty or leaves no room in the context.
    """
    limit, vocab = check(model, tokenizer, prompts, max_new)
    rows = begin(tokenizer, prompts, stop, stop_ids, limit, max_new)
    if not rows:
        return
    device = model.embed.weight.device
    seeds = seeds if seeds is not None else [sampling.seed + row.index for row in rows]
    sampler = Sampler(sampling, prompts, seeds, vocab, device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    width = int(lengths.max())
    cache = Cache(model.state_specs(), len(prompts), capacity=min(width + max_new, 2 * limit))
    ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=device)
    at = torch.arange(width, device=device).expand(len(prompts), -1)
    with evaluating(model):
        output = model(ids, at.masked_fill(at >= lengths[:, None], -1), cache)
        hidden = output.hidden[torch.arange(len(prompts), device=device), lengths - 1]          # (B, D)
        step = decoding_step(model, cache)
        head, positions = output.head[:vocab], lengths[:, None]
        while True:
            product = transposed_product if wants_transposed(hidden) else F.linear
            logits = product(hidden, head)                                        # (B, V)
            chosen = sampler(logits)
            logp = logprobs(logits, chosen) if logps else [None] * len(rows)
            for row, id, value in zip(rows, chosen.tolist(), logp):
                yield row.push(id, value)
            going = [i for i, row in enumerate(rows) if row.finish is None]
            if not going:
                return
            if len(going) < len(rows):
                rows = [rows[i] for i in going]
                keep = torch.tensor(going, device=device)
                chosen, positions = chosen[keep], positions[keep]
                cache.keep(keep)
                sampler.keep(going)
            hidden = step(chosen, positions)                                      # (B, D)
            positions = positions + 1


@torch.inference_mode()
def generate_uncached(model: LM, tokenizer: Tokenizer | None, prompts: list[list[int]], *,
                      sampling: Sampling = Sampling(), max_new: int = 128, stop: Collection[str] = (),
                      stop_ids: Collection[int] | None = None, seeds: list[int] | None = None,
                      logps: bool = False) -> list[Completion]:
    """The oracle of `generate`: one prompt after the other, the whole text through the model for every token."""
    limit, vocab = check(model, tokenizer, prompts, max_new)
    done = []
    with evaluating(model):
        for row in begin(tokenizer, prompts, stop, stop_ids, limit, max_new):
            ids, completion = list(prompts[row.index]), Completion()
            seed = sampling.seed + row.index if seeds is None else seeds[row.index]
            sampler = Sampler(sampling, [ids], [seed], vocab, model.embed.weight.device)
            while row.finish is None:
                x = torch.tensor([ids], device=model.embed.weight.device)
                logits = model(x, torch.arange(len(ids), device=x.device)[None]).logits()[:, -1, :vocab]
                chosen = sampler(logits)
                logp = logprobs(logits, chosen)[0] if logps else None
                collect(completion, row.push(chosen.item(), logp))
                ids.append(chosen.item())
            done.append(completion)
    return done


# --------------------------------------------------------------------------------------------------------- the pieces

class Row:
    """One answer in the making: its text so far, and whether it is finished."""

    def __init__(self, index: int, tokenizer: Tokenizer | None, stop: Collection[str], stop_ids: frozenset[int],
                 room: int, max_new: int) -> None:
        self.index, self.stop_ids, self.room, self.max_new = index, stop_ids, room, max_new
        self.text = None if tokenizer is None else Stream(tokenizer)
        self.stop = [s for s in stop if s]
        self.held = ""                            # text that may yet turn out to begin a stop string
        self.count = 0
        self.finish: Finish | None = None

    def push(self, id: int, logp: float | None) -> Token:
        self.count += 1
        if id in self.stop_ids:
            text, self.finish = self.flush(), "stop"
        else:
            text, stopped = self.release(self.text.push(id)) if self.text else ("", False)
            if stopped:
                self.finish = "stop"
            elif self.count >= min(self.room, self.max_new):
                self.finish = "length" if self.count >= self.max_new else "context"
                text += self.flush()
        return Token(row=self.index, id=id, text=text, logp=logp, finish=self.finish)

    def flush(self) -> str:
        """All that was held back, when no more text will come."""
        text, stopped = self.release(self.text.close()) if self.text else ("", False)
        held, self.held = "" if stopped else self.held, ""
        return text + held

    def release(self, text: str) -> tuple[str, bool]:
        """(what may be shown, whether a stop string is complete): holds back an end that could begin a stop string."""
        text = self.held + text
        found = [at for s in self.stop if (at := text.find(s)) >= 0]
        if found:
            self.held = ""
            return text[:min(found)], True
        keep = max((n for s in self.stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n])),
                   default=0)
        self.held = text[len(text) - keep:]
        return text[:len(text) - keep], False


def begin(tokenizer: Tokenizer | None, prompts: list[list[int]], stop: Collection[str],
          stop_ids: Collection[int] | None, limit: int, max_new: int) -> list[Row]:
    if stop_ids is None:
        known = {} if tokenizer is None else tokenizer.specials
        stop_ids = [known[mark] for mark in (EOS, PAD, *(document_marks(known) or ())[1:]) if mark in known]
    return [Row(i, tokenizer, stop, frozenset(stop_ids), limit - len(p), max_new) for i, p in enumerate(prompts)]


def check(model: LM, tokenizer: Tokenizer | None, prompts: list[list[int]], max_new: int) -> tuple[int, int]:
    """(context limit, number of ids that may be chosen). UserError for prompts that cannot be answered."""
    limit, rows = model.config.seq_len, model.config.vocab_size
    if max_new < 1:
        raise UserError(f"max_new={max_new} must be at least 1")
    for i, prompt in enumerate(prompts):
        name = f"prompt {i + 1}" if len(prompts) > 1 else "the prompt"
        if not prompt:
            raise UserError(f"{name} is empty; a text begins with the tokenizer's begin token")
        if len(prompt) >= limit:
            raise UserError(f"{name} has {len(prompt)} tokens and the model's context is {limit}, which leaves no room "
                            "for an answer; shorten it")
        if not 0 <= min(prompt) <= max(prompt) < rows:
            raise UserError(f"{name} has the id {max(prompt, key=lambda id: abs(id - rows / 2))}; the model's "
                            f"vocabulary is 0 to {rows - 1}: it was encoded with another tokenizer")
    return limit, rows if tokenizer is None else min(rows, tokenizer.vocab_size)


def logprobs(logits: Tensor, chosen: Tensor) -> list[float]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(-1)).tolist()


class evaluating:
    """Eval mode inside the block, the former mode after it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *exception: object) -> None:
        self.model.train(self.training)
