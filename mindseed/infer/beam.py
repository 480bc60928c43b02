"""Beam search: the likeliest answer, or nearly, by keeping the few best beginnings at every step.

Always taking the likeliest token can miss the likeliest text, whose first token may be the second best. So `beams`
beginnings are kept; each is asked for its likeliest next tokens, and of all the pairs the best are kept again. A
beginning that ends goes aside with its log-probability divided by length ** length_penalty, since otherwise the
shortest would win; when as many have ended as there are beams, the search is over.

Nothing here knows of the cache: every step asks the engine for one token after each beginning, and finds all of it but
the last block in the engine's prefix cache.
"""
from __future__ import annotations

from dataclasses import dataclass

from mindseed.base.errors import UserError
from mindseed.infer.engine import Engine, Request
from mindseed.infer.sample import Sampling


@dataclass(frozen=True)
class Beam:
    """An answer, an end id included, and its log-probability, which may be divided by a power of its length."""

    ids: list[int]
    score: float
    finished: bool = False


def beam_search(engine: Engine, prompt: list[int], *, beams: int, max_new: int = 128, length_penalty: float = 1.0,
                stop_ids: tuple[int, ...] | None = None) -> list[Beam]:
    """At most `beams` answers, the best first. UserError for a number of beams that the engine cannot have."""
    if not 1 <= beams <= engine.config.max_seqs:
        raise UserError(f"beams={beams} must lie between 1 and max_seqs={engine.config.max_seqs}")
    engine.check(Request(prompt=prompt, max_new=max_new))
    ends = frozenset(engine.stop_ids if stop_ids is None else stop_ids)
    room = min(max_new, engine.limit - len(prompt))
    running, done = [Beam([], 0.0)], []
    for length in range(1, room + 1):
        asked = [Request(prompt=prompt + beam.ids, sampling=Sampling(temperature=0), max_new=1, stop_ids=(),
                         top_logps=(1 + max(len(ends), 1)) * beams) for beam in running]
        tops: list[tuple[tuple[int, float], ...]] = [()] * len(asked)
        for i, token in engine.stream(asked):
            tops[i] = token.top
        found = sorted((Beam([*beam.ids, id], beam.score + logp, id in ends) for beam, top in zip(running, tops)
                        for id, logp in top), key=lambda beam: -beam.score)
        done += [finish(beam, length_penalty) for beam in found[:beams] if beam.finished]
        running = [beam for beam in found if not beam.finished][:beams]
        if len(done) >= beams:
            break
    if len(done) < beams:
        done += [finish(beam, length_penalty) for beam in running]
    return sorted(done, key=lambda beam: -beam.score)[:beams]


def finish(beam: Beam, length_penalty: float) -> Beam:
    return Beam(beam.ids, beam.score / len(beam.ids) ** length_penalty, beam.finished)
