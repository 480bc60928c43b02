"""What the engine must say: plain uncached decoding, remembered; and a driver that checks the books at every step."""
from __future__ import annotations

import random
from collections import Counter

import torch

from mindseed.infer.engine import Engine, Request
from mindseed.infer.generate import generate_uncached
from mindseed.infer.rows import Completion
from mindseed.infer.sample import Sampling
from mindseed.models.config import LMConfig
from mindseed.models.lm import LM
from tests.tiny import VOCAB, kit_model

GREEDY = Sampling(temperature=0)
NEAR = 1e-4                                       # logits that differ by less may change places in float32


def sharp_model(config: LMConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> LM:
    """A model of a kit whose likeliest tokens are so by far, and which does not say the same one for ever."""
    model = kit_model(config, seed)
    with torch.no_grad():
        model.norm.weight.mul_(2)
        model.embed.weight.mul_(2)
    return model.to(dtype)


class Oracle:
    """Greedy answers of up to `most` tokens without a stop, one uncached decoding for every prompt."""

    def __init__(self, model: LM, most: int = 8) -> None:
        self.model, self.most, self.near_ties = model, most, 0
        self.answers: dict[tuple[int, ...], Completion] = {}
        self.scores: dict[tuple[int, ...], torch.Tensor] = {}

    def answer(self, prompt: list[int]) -> Completion:
        key = tuple(prompt)
        if key not in self.answers:
            [self.answers[key]] = generate_uncached(self.model, None, [prompt], sampling=GREEDY, max_new=self.most,
                                                    stop_ids=())
        return self.answers[key]

    def expected(self, request: Request, limit: int) -> tuple[list[int], str]:
        """(ids, finish) for a greedy request of an engine with this context."""
        ids = self.answer(request.prompt).ids[:min(request.max_new, limit - len(request.prompt))]
        stop = next((i + 1 for i, id in enumerate(ids) if id in (request.stop_ids or ())), None)
        if stop is not None:
            return ids[:stop], "stop"
        return ids, "length" if len(ids) == request.max_new else "context"

    @torch.inference_mode()
    def logps(self, ids: list[int]) -> torch.Tensor:
        """Log-probabilities (T, V) of what follows every beginning of `ids`."""
        key = tuple(ids)
        if key not in self.scores:
            positions = torch.arange(len(ids))[None]
            self.scores[key] = self.model(torch.tensor([ids]), positions).logits()[0].log_softmax(-1)
        return self.scores[key]

    def check(self, request: Request, got: Completion, limit: int, *, whole: bool = True) -> None:
        """Assert that a greedy answer, or its beginning if not `whole`, is the oracle's."""
        ids, finish = self.expected(request, limit)
        for i, (a, b) in enumerate(zip(got.ids, ids)):
            if a != b:                            # excused only if the oracle itself could hardly tell the two apart
                logps = self.logps(request.prompt + ids[:i])[-1]
                assert abs(logps[a] - logps[b]) < NEAR, (request, got.ids, ids)
                self.near_ties += 1
                return
        assert got.ids == ids[:len(got.ids)]
        if whole:
            assert (len(got.ids), got.finish) == (len(ids), finish), (request, got, ids)
        torch.testing.assert_close(got.logps, self.answer(request.prompt).logps[:len(got.ids)], rtol=1e-3, atol=1e-3)
        assert got.sampled_logps == [0.0] * len(got.ids)
        if got.prompt_logps:
            want = self.logps(request.prompt)[:-1].gather(1, torch.tensor(request.prompt[1:])[:, None])[:, 0]
            assert got.prompt_logps[0] is None and len(got.prompt_logps) == len(request.prompt)
            torch.testing.assert_close(torch.tensor(got.prompt_logps[1:]), want, rtol=1e-3, atol=1e-3)


def check_books(engine: Engine) -> None:
    """No block, slot or job is lost, now."""
    engine.scheduler.check()
    alive = {id(s) for s in (*engine.scheduler.running, *engine.scheduler.waiting)}
    assert alive == {id(s) for job in engine.jobs.values() for s in job.sequences if s.owner.row.finish is None}
    assert all(s.running for s in engine.scheduler.running) and not any(s.running for s in engine.scheduler.waiting)
    for sequence in engine.scheduler.running:
        assert len(sequence.ids) - sequence.computed >= 1 and sequence.drafted <= sequence.computed
        for blocks, table in zip(engine.kinds, sequence.tables):
            gone = blocks.out_of_sight(sequence.computed)
            assert [bool(b) for b in table] == [i >= gone for i in range(-(-sequence.computed // blocks.block_size))]


def check_empty(engine: Engine) -> None:
    """All that was taken has been given back."""
    assert not engine.jobs and not engine.scheduler.running and not engine.scheduler.waiting
    assert all(blocks.free == blocks.count - 1 and not any(blocks.holders) for blocks in engine.kinds)
    assert engine.step() == []


def drive(engine: Engine, requests: list[Request], rng: random.Random, *, cancel: float = 0.0, rush: float = 0.5,
          seen: Counter | None = None) -> list[tuple[list[Completion], bool]]:
    """Answer requests that come at random times and are sometimes given up: ([answers], whether all are whole) each."""
    seen = Counter() if seen is None else seen
    waiting, number, given_up = list(range(len(requests))), {}, set()
    done = [[Completion() for _ in range(request.n)] for request in requests]
    while waiting or engine.jobs:
        while waiting and (not engine.jobs or rng.random() < rush):
            i = waiting.pop(0)
            number[engine.submit(requests[i])] = i
        if engine.jobs and rng.random() < cancel:
            lost = rng.choice(list(engine.jobs))
            given_up.add(number[lost])
            seen["cancelled"] += 1
            engine.cancel(lost)
            check_books(engine)
        seen["preempted forks"] += any(s.forks and s.preempted for s in engine.scheduler.waiting)
        for job, token in engine.step():
            i = number[job]
            if not done[i][token.row].ids and token.row == 0:
                seen["cached"] += token.cached
                seen["full hits"] += token.cached == len(requests[i].prompt) - 1 > 0
            assert len(token.top) == min(requests[i].top_logps, VOCAB)
            done[i][token.row].add(token)
        seen["steps"] += 1
        check_books(engine)
    check_empty(engine)
    seen["preempted"] += engine.stats().preemptions
    seen["answers"] += sum(len(answers) for answers in done)
    return [(answers, i not in given_up) for i, answers in enumerate(done)]
