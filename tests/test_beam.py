"""Beam search: against enumeration where all texts can be written down, and against transformers."""
from __future__ import annotations

import itertools

import pytest
import torch

from mindseed.base.errors import UserError
from mindseed.infer.beam import beam_search
from mindseed.infer.engine import Engine, EngineConfig
from mindseed.interop.directory import load_directory, save_directory
from mindseed.models.lm import build
from mindseed.models.presets import Shape
from mindseed.tokenizers.byte import Byte
from tests.tiny import randomise

SHAPE = Shape(layers=2, dim=32, heads=4, kv_heads=2, head_dim=8, ffn_dim=48)
PROMPT = [1, 2, 3]


def model_of(vocab_size: int, seed: int = 0):
    model = build(SHAPE.lm_config(vocab_size=vocab_size, seq_len=64), seed=seed)
    randomise(model, seed)
    return model.eval()


def engine_of(model, **options):
    return Engine(model, None, EngineConfig(**{"max_seqs": 32, "block_size": 4} | options))


@torch.inference_mode()
def logp(model, ids: list[int]) -> float:
    text = torch.tensor([PROMPT + ids])
    logits = model(text, torch.arange(text.shape[1])[None]).logits()[0].log_softmax(-1)
    return sum(logits[len(PROMPT) + i - 1, id].item() for i, id in enumerate(ids))


@pytest.mark.parametrize("seed", range(4))
def test_enough_beams_find_the_likeliest_text(seed):
    model = model_of(5, seed)
    best = max(itertools.product(range(5), repeat=3), key=lambda ids: logp(model, list(ids)))
    found = beam_search(engine_of(model), PROMPT, beams=25, max_new=3, stop_ids=())[0]
    assert found.ids == list(best) and found.score == pytest.approx(logp(model, found.ids) / 3, abs=1e-4)


def test_answers_come_in_order_and_beat_the_greedy_one():
    model = model_of(50)
    engine = engine_of(model)
    found = beam_search(engine, PROMPT, beams=4, max_new=8, stop_ids=())
    assert len({tuple(beam.ids) for beam in found}) == 4
    assert [beam.score for beam in found] == sorted((beam.score for beam in found), reverse=True)
    greedy = beam_search(engine, PROMPT, beams=1, max_new=8, stop_ids=())[0]
    assert found[0].score >= greedy.score and not engine.busy


@pytest.mark.parity
@pytest.mark.parametrize("beams, penalty, seed, stop", [(3, 1.0, 0, ()), (4, 0.0, 1, (9,)), (5, 1.7, 2, (9, 30)),
                                                        (2, 1.0, 3, (9,))])
def test_equals_transformers(tmp_path, beams, penalty, seed, stop):
    transformers = pytest.importorskip("transformers")
    save_directory(model_of(320, seed), Byte(), tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    with torch.no_grad():                         # ends that are likely enough to matter
        mine = load_directory(tmp_path / "m").model
        for id in stop:
            for weight in (mine.embed.weight, theirs.get_input_embeddings().weight):
                weight[id] += 0.1
    want = theirs.generate(torch.tensor([PROMPT]), num_beams=beams, num_return_sequences=beams, max_new_tokens=10,
                           do_sample=False, early_stopping=True, length_penalty=penalty, pad_token_id=0,
                           eos_token_id=list(stop) or None, return_dict_in_generate=True, output_scores=True)
    got = beam_search(engine_of(mine), PROMPT, beams=beams, max_new=10, length_penalty=penalty, stop_ids=stop)
    texts = [row[len(PROMPT):].tolist() for row in want.sequences]
    texts = [ids[:min([ids.index(id) + 1 for id in stop if id in ids], default=len(ids))] for ids in texts]
    assert got[0].ids == texts[0]
    assert got[0].score == pytest.approx(want.sequences_scores[0].item(), abs=1e-4)


def test_a_number_of_beams_that_cannot_be():
    for beams in (0, 33):
        with pytest.raises(UserError, match=f"beams={beams}"):
            beam_search(engine_of(model_of(5)), PROMPT, beams=beams)
