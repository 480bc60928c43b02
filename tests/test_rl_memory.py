"""Logits of a whole batch are never in memory: not when sampling, not when scoring, not in the loss or its gradient."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from mindseed.core import Output
from mindseed.models.heads import add_value_head
from mindseed.models.lm import build
from mindseed.models.presets import Shape
from mindseed.recipes.rl_options import PolicyOptions, SamplingOptions
from mindseed.rl.env import Play
from mindseed.rl.reward import Judge, Term, each
from mindseed.rl.rollout import RolloutConfig
from mindseed.rl.scores import logps_read, score
from mindseed.rl.trajectory import Trajectory, pack
from mindseed.recipes.rl_options import RLOptions, advantage_of, derive, objective_of
from tests.test_distill import Largest
from tests.test_rl import Fixed, rollout

ROWS, LONG, VOCAB, DIM = 16, 512, 6400, 64        # the batch and the vocabulary of the 26M model, in a thinner one
CHUNK = 1024                                      # tokens that the head is applied to at a time


def model_of():
    shape = Shape(layers=1, dim=DIM, heads=2, kv_heads=1, head_dim=32, ffn_dim=96)
    return build(shape.lm_config(vocab_size=VOCAB, seq_len=LONG), seed=0)


@pytest.fixture
def no_logits(monkeypatch):
    monkeypatch.setattr(Output, "logits", lambda self: pytest.fail("all logits were asked for"))


@pytest.mark.parametrize("algorithm", ["grpo", "gspo", "rloo", "ppo"])
def test_a_batch_of_answers(algorithm, no_logits):
    options = derive(RLOptions(algorithm=algorithm, policy=PolicyOptions(kl=0.1),
                               rollout=SamplingOptions(temperature=0.7)))
    model, objective = model_of(), objective_of(options)
    if algorithm == "ppo":
        add_value_head(model)
    draw = np.random.default_rng(0)
    answers = []
    for i in range(ROWS):
        t = Trajectory(ids=draw.integers(0, VOCAB, LONG + 1).tolist(), mine=[False] + [True] * LONG, prompt=i // 4)
        for name in ("sampled_logps", "old_logps", "reference", "advantages", "returns", "old_values"):
            t.put(name, draw.normal(size=LONG) - (8 if "logps" in name or name == "reference" else 0))
        answers.append(t)
    with Largest() as seen:
        score(model, answers, logps_read(0.7), slots=ROWS * LONG)
        batch = pack(answers)
        assert batch.ids.shape == (ROWS, LONG)
        objective.loss(model.train()(batch.ids, batch.positions), batch)[0].backward()
    assert CHUNK * VOCAB <= seen.numbers < ROWS * LONG * VOCAB / 4


def test_a_rollout():
    """Long prompts are read without a head on every token; what is sampled takes one row of logits per answer."""
    model = model_of()
    prompts = Fixed([[i + 1] * (LONG - 8) for i in range(4)])
    judge = Judge([Term(name="even", weight=1.0, call=each(lambda s: float(s.trajectory.ids[-1] % 2)))])
    options = derive(RLOptions(algorithm="grpo"))
    source = rollout(model, prompts, judge, RolloutConfig(prompts=4), advantage_of(options),
                     Play(answers=4, max_new=8))
    with Largest() as seen:
        batch = next(source)
    assert batch.ids.shape[1] >= LONG - 8
    assert seen.numbers < ROWS * LONG * VOCAB / 4
