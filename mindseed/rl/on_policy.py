"""On-policy distillation: the student writes, the teacher reads what it wrote and says how it would have gone on.

A student that only ever learns from good texts does not know what to do after its own first mistake. Here the batches
are its own answers, as it gives them by now, so that it is corrected where it will stand (GKD, 2306.13649). There is no
reward: the objective (objectives/distill.py, best with the reverse divergence or the jsd) has the teacher's whole
distribution at every token of the answer.

With `otherwise`, the share of batches that are not the student's come from there, texts or conversations as ever. Which
ones is a function of (seed, index), and so are prompts and noise; what is answered depends on the weights besides,
which a resumed run has again. A batch is made when it is asked for, not before: nothing may read ahead
(data/prefetch.py).
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mindseed.base.errors import UserError
from mindseed.core import Batch, Source
from mindseed.data.shuffle import key_of
from mindseed.infer.engine import Engine
from mindseed.infer.generate import evaluating
from mindseed.models.lm import LM
from mindseed.rl.env import Env, Play, SingleTurn, play
from mindseed.rl.prompts import Prompts
from mindseed.rl.trajectory import pack


@dataclass(kw_only=True)
class OnPolicy:
    """A Source. `policy` is the model that learns and `engine` one over its weights; `batch_size` prompts make the
    micro-batch of a rank, with `play.answers` to each. Its state is `drawn`, the prompts over all ranks."""

    policy: LM
    engine: Engine
    prompts: Prompts
    play: Play
    batch_size: int
    share: float = 1.0                            # of the batches that the student writes
    otherwise: Source | None = None
    env: Env = SingleTurn()
    seed: int = 0
    rank: int = 0
    world: int = 1
    drawn: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not 0 <= self.rank < self.world:
            raise UserError(f"batch_size={self.batch_size} must be at least 1, rank={self.rank} below "
                            f"world={self.world}")
        if not 0 <= self.share <= 1:
            raise UserError(f"share={self.share} must lie between 0 and 1")
        if self.share < 1 and self.otherwise is None:
            raise UserError(f"share={self.share} leaves batches that the student does not write, and there is nothing "
                            "else to read: name data.train, or set the share to 1")

    def __next__(self) -> Batch:
        """One micro-batch. It is the student's own or not on all ranks alike."""
        round_, first = self.drawn // (self.batch_size * self.world), self.drawn + self.rank * self.batch_size
        self.drawn += self.batch_size * self.world
        if key_of(self.seed, 9, round_) >= self.share * 2.0 ** 64:
            return next(self.otherwise)
        with evaluating(self.policy):
            self.engine.update_weights(self.policy)
            samples = play(self.engine, self.prompts, list(range(first, first + self.batch_size)), self.env,
                           replace(self.play, seed=self.seed))
        return pack([replace(sample.trajectory, figures={}) for sample in samples])

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "stream": self.identity(),
                "otherwise": None if self.otherwise is None else self.otherwise.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        was, here = state["stream"], self.identity()
        if keys := [key for key in {**was, **here} if was.get(key) != here.get(key)]:
            raise UserError("the checkpoint was made on other prompts: " + "; ".join(
                f"{key} was {was.get(key)}, is {here.get(key)}" for key in keys)
                + ". Resume with the same ones, or start a new run from the checkpoint's model")
        self.drawn = state["drawn"]
        if self.otherwise is not None:
            self.otherwise.load_state_dict(state["otherwise"])

    def identity(self) -> dict[str, Any]:
        return {"prompts": len(self.prompts), "digest": self.prompts.digest(), "seed": self.seed, "share": self.share}
