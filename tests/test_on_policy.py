"""On-policy distillation: batches are the student's own answers, exactly reproducible, and it learns by them."""
from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from mindseed.base.errors import UserError
from mindseed.infer.engine import Engine, EngineConfig
from mindseed.infer.generate import evaluating, generate_uncached
from mindseed.infer.sample import Sampling
from mindseed.models.lm import build
from mindseed.objectives.distill import Distill, divergence
from mindseed.rl.env import Play
from mindseed.rl.on_policy import OnPolicy
from mindseed.rl.prompts import Prompt, Prompts
from mindseed.tokenizers.byte import Byte
from mindseed.train.state import capture, restore
from tests.test_train import make_run, steps
from tests.tiny import Fixed, flat, random_batch, randomise, tiny_model

QUESTIONS = ["hi", "2+2?", "你好", "who are you", "a", "b c"]
PLAY = Play(answers=2, max_new=6, temperature=0.8)


def byte_model(seed: int, **changes):
    model = build(replace(tiny_model(**changes).config, vocab_size=Byte().vocab_size, seq_len=128), seed=seed)
    randomise(model, seed)
    return model


def source(model, *, batch_size: int = 3, **more) -> OnPolicy:
    prompts = Prompts([Prompt(messages=[{"role": "user", "content": text}]) for text in QUESTIONS], Byte(), seed=5)
    training = model.training
    engine = Engine(model, Byte(), EngineConfig(max_seqs=16))
    model.train(training)
    return OnPolicy(policy=model, engine=engine, prompts=prompts, play=PLAY, batch_size=batch_size, seed=5, **more)


def documents(batch) -> list[tuple[list[int], list[int]]]:
    """(ids with the last target, targets that count) of every document of a batch that is not padding."""
    found = []
    for row in range(len(batch.ids)):
        starts = [t for t in range(batch.ids.shape[1]) if batch.positions[row, t] == 0]
        for a, b in zip(starts, [*starts[1:], batch.ids.shape[1]]):
            if batch.weights[row, a:b].any():
                own = batch.weights[row, a:b] > 0
                found.append(([*batch.ids[row, a:b].tolist(), batch.targets[row, b - 1].item()],
                              batch.targets[row, a:b][own].tolist()))
    return found


def test_a_batch_is_the_students_own_answers_and_only_they_count():
    """Drawn without dropout, although the model is in the middle of training."""
    model = byte_model(1, dropout=0.5).train()
    stream = source(model)
    found = documents(next(stream))
    assert len(found) == 3 * PLAY.answers and model.training
    for number in range(3):
        _, prompt = stream.prompts.at(number)
        request = PLAY.request(prompt, number)
        seed = replace(PLAY, seed=5).request(prompt, number).sampling.seed
        assert request.sampling.temperature == 0.8
        with evaluating(model):
            for i in range(PLAY.answers):
                want, = generate_uncached(model, Byte(), [prompt], sampling=Sampling(temperature=0.8), max_new=6,
                                          seeds=[seed + i])
                assert ([*prompt, *want.ids], want.ids) in found


def test_answers_are_those_of_the_weights_as_they_are_by_now():
    model = byte_model(1)
    stream, other = source(model), byte_model(2)
    before = documents(next(stream))
    stream.load_state_dict(stream.state_dict() | {"drawn": 0})
    assert documents(next(stream)) == before
    model.load_state_dict(other.state_dict())
    stream.load_state_dict(stream.state_dict() | {"drawn": 0})
    assert documents(next(stream)) == documents(next(source(other))) != before


def test_ranks_share_out_what_one_would_draw():
    model = byte_model(1)
    one = documents(next(source(model, batch_size=4)))
    parts = [documents(next(source(model, batch_size=2, rank=rank, world=2))) for rank in range(2)]
    assert sorted(one) == sorted([*parts[0], *parts[1]]) and len(parts[0]) == len(parts[1])


def test_some_batches_come_from_elsewhere_the_same_ones_each_time():
    model, texts = byte_model(1), random_batch(2, 8)
    stream = source(model, share=0.4, otherwise=Fixed([texts]))
    kinds = [next(stream) is texts for _ in range(60)]
    assert 24 <= sum(kinds) <= 48                                          # 36 expected
    resumed, later = source(model, share=0.4, otherwise=Fixed([texts])), source(model, share=0.4,
                                                                                otherwise=Fixed([texts]))
    assert [next(resumed) is texts for _ in range(20)] == kinds[:20]
    later.load_state_dict(resumed.state_dict())
    assert [next(later) is texts for _ in range(40)] == kinds[20:]
    with pytest.raises(UserError, match="nothing else to read"):
        source(model, share=0.5)
    with pytest.raises(UserError, match="seed was 5, is 6"):
        replace(source(model), seed=6).load_state_dict(source(model).state_dict())


def lesson(student, teacher, **more):
    asked = Distill(teacher=teacher, teacher_head=(teacher.head or teacher.embed).weight.detach(),
                    vocab_size=Byte().vocab_size, distance="reverse")
    run = make_run(student.train(), source(student, batch_size=2, **more), objective=asked, accumulate=2)
    run.schedule = lambda step: 1e-2
    return run


def test_a_run_is_resumed_to_the_bit_and_the_student_comes_nearer_on_its_own_answers():
    teacher = byte_model(7, dim=48, heads=6, kv_heads=2, head_dim=8).eval()
    run = lesson(byte_model(1), teacher)
    start = copy.deepcopy(run.backend.model)
    want = steps(run, 20)
    half = lesson(byte_model(1), teacher)
    got, saved = steps(half, 8), copy.deepcopy(capture(half, None))
    assert set(saved["source"]) == {"drawn", "stream", "otherwise"} and saved["source"]["drawn"] == 8 * 2 * 2
    other = lesson(byte_model(3), teacher)
    restore(other, None, saved)
    assert got + steps(other, 12) == want and torch.equal(flat(other.backend.model), flat(run.backend.model))

    def distance(model) -> float:
        batch = next(source(model.eval(), batch_size=6))
        with torch.no_grad():
            p, q = (m(batch.ids, batch.positions).logits().log_softmax(-1) for m in (teacher, model))
        return (divergence(p, q, "reverse") * batch.weights).sum().item() / batch.weights.sum().item()

    assert distance(run.backend.model) < 0.8 * distance(start)
