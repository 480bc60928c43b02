"""Generation in one call: `generate` answers a list of prompts, `stream` hands out their tokens as they come.

Both are an engine that is made for the occasion; who asks more than once keeps an `Engine` (engine.py), which remembers
the beginnings of prompts. `generate_uncached` is the oracle of all of them: the same choices made without cache, batch
or kernels, by running the model over the whole text for every token. Slow, obvious, and what the engine is tested
against.
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

import torch

from mindseed.base.errors import UserError
from mindseed.core import Tokenizer
from mindseed.infer.engine import Engine, EngineConfig, Request
from mindseed.infer.rows import Completion, Row, Token, check_prompt, ends_of
from mindseed.infer.sample import Chooser, Sampling, choose
from mindseed.models.lm import LM

MAX_SEQS = 64                                     # answers written at once


def generate(model: LM, tokenizer: Tokenizer | None, prompts: list[list[int]], *, sampling: Sampling = Sampling(),
             max_new: int = 128, stop: Collection[str] = (), stop_ids: Collection[int] | None = None,
             seeds: list[int] | None = None, on_token: Callable[[Token], None] | None = None) -> list[Completion]:
    """Answer every prompt; see `stream` for the options. `on_token` is called with every token as it comes."""
    done = [Completion() for _ in prompts]
    for token in stream(model, tokenizer, prompts, sampling=sampling, max_new=max_new, stop=stop, stop_ids=stop_ids,
                        seeds=seeds):
        done[token.row].add(token)
        if on_token is not None:
            on_token(token)
    return done


def stream(model: LM, tokenizer: Tokenizer | None, prompts: list[list[int]], *, sampling: Sampling = Sampling(),
           max_new: int = 128, stop: Collection[str] = (), stop_ids: Collection[int] | None = None,
           seeds: list[int] | None = None) -> Iterator[Token]:
    """Tokens of all rows as they are chosen, every row until it stops, has `max_new`, or fills the context.

    Prompts are ids and may differ in length. `stop_ids` are by default the tokenizer's end of text and of turn; `stop`
    are strings, found across token borders. Row i draws with `seeds[i]`, by default `sampling.seed + i`, whatever else
    is in the batch. Without a tokenizer there is no text. Puts the model in eval mode while it runs. UserError for a
    prompt that is empty or leaves no room in the context.
    """
    limit = check(model, prompts, max_new)
    if not prompts:
        return
    lengths = sorted((min(len(p) + max_new, limit) for p in prompts), reverse=True)[:MAX_SEQS]
    config = EngineConfig(max_seqs=len(lengths), cache_tokens=max(sum(n + 16 for n in lengths), limit),
                          max_queue=len(prompts))
    requests = [Request(prompt=list(prompt), max_new=max_new, stop=tuple(stop),
                        stop_ids=None if stop_ids is None else tuple(stop_ids),
                        sampling=replace(sampling, seed=sampling.seed + i if seeds is None else seeds[i]))
                for i, prompt in enumerate(prompts)]
    with evaluating(model):
        engine = Engine(model, tokenizer, config)
        for row, token in engine.stream(requests):
            yield replace(token, row=row)


@torch.inference_mode()
def generate_uncached(model: LM, tokenizer: Tokenizer | None, prompts: list[list[int]], *,
                      sampling: Sampling = Sampling(), max_new: int = 128, stop: Collection[str] = (),
                      stop_ids: Collection[int] | None = None, seeds: list[int] | None = None) -> list[Completion]:
    """The oracle of `generate`: one prompt after the other, the whole text through the model for every token."""
    limit, device = check(model, prompts, max_new), model.embed.weight.device
    vocab = model.config.vocab_size if tokenizer is None else min(model.config.vocab_size, tokenizer.vocab_size)
    ends = frozenset(ends_of(tokenizer) if stop_ids is None else stop_ids)
    done = []
    with evaluating(model):
        for i, prompt in enumerate(prompts):
            ids, completion = list(prompt), Completion()
            row = Row(i, tokenizer, stop, ends, limit - len(prompt), max_new)
            chooser = Chooser.of(sampling, sampling.seed + i if seeds is None else seeds[i], prompt, vocab, device)
            while row.finish is None:
                x = torch.tensor([ids], device=device)
                logits = model(x, torch.arange(len(ids), device=device)[None]).logits()[:, -1, :vocab]
                choice = choose(logits, [chooser])
                id = choice.ids.item()
                chooser.chose(id)
                completion.add(row.push(id, choice.logps.item(), sampled_logp=choice.sampled_logps.item()))
                ids.append(id)
            done.append(completion)
    return done


def check(model: LM, prompts: list[list[int]], max_new: int) -> int:
    """The context's limit. UserError, naming the prompt, for those that cannot be answered."""
    if max_new < 1:
        raise UserError(f"max_new={max_new} must be at least 1")
    for i, prompt in enumerate(prompts):
        check_prompt(prompt, model.config.seq_len, model.config.vocab_size,
                     f"prompt {i + 1}" if len(prompts) > 1 else "the prompt")
    return model.config.seq_len


class evaluating:
    """Eval mode inside the block, the former mode after it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *exception: object) -> None:
        self.model.train(self.training)
