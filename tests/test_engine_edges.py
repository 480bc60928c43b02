"""Vocabularies with holes, engines that are shared, stop strings of every kind."""
from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindseed.base.errors import UserError
from mindseed.infer.beam import beam_search
from mindseed.infer.engine import Engine, EngineConfig, Request
from mindseed.infer.generate import generate_uncached
from mindseed.infer.rows import Row
from mindseed.infer.sample import Sampling
from mindseed.models.config import LayerConfig, LMConfig
from mindseed.models.lm import build
from mindseed.nn.ffn import SwiGLUConfig
from mindseed.tokenizers.base import EOS, SIGNS
from mindseed.tokenizers.byte import Byte
from tests.oracle import check_empty
from tests.tiny import DYNAMIC, kit_model, randomise, tiny_model


class Holed(Byte):
    """Bytes, of which some ids are no tokens; the model has rows beyond the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.holes = {id for id, token in self.tokens.items() if token in (b"q", b"Q", b"7")}
        self.tokens = {id: token for id, token in self.tokens.items() if id not in self.holes}


def holed_engine(**more) -> tuple[Engine, Holed]:
    tokenizer = Holed()
    model = build(LMConfig(vocab_size=tokenizer.vocab_size + 12, dim=32, seq_len=64, layers=(
        LayerConfig(mixer=tiny_model().config.layers[0].mixer, ffn=SwiGLUConfig(ffn_dim=48)),)))
    randomise(model)
    return Engine(model, tokenizer, EngineConfig(**more)), tokenizer


@pytest.mark.parametrize("fused", [True, False])
def test_ids_without_a_token_are_never_said_nor_read(fused):
    engine, tokenizer = holed_engine(fused=fused)
    with torch.no_grad():                         # nothing would be likelier
        engine.model.embed.weight[[*tokenizer.holes]] *= 40
    engine.update_weights(engine.model)
    asked = [Request(prompt=[5, 6, i], sampling=Sampling(seed=i, temperature=5.0), max_new=40, stop_ids=(),
                     top_logps=20, prompt_logps=True) for i in range(6)]
    said = set()
    for i, token in engine.stream(asked):
        said.add(token.id)
        assert all(id not in tokenizer.holes and logp > -torch.inf for id, logp in token.top)
    assert said and not said & tokenizer.holes and max(said) < tokenizer.vocab_size
    hole = min(tokenizer.holes)
    for request in (Request(prompt=[5, hole]), Request(prompt=[5, tokenizer.vocab_size]),
                    Request(prompt=[5], sampling=Sampling(logit_bias=((hole, 5.0),))),
                    Request(prompt=[5], sampling=Sampling(logit_bias=((tokenizer.vocab_size + 3, 5.0),)))):
        with pytest.raises(UserError):
            engine.submit(request)
    with pytest.raises(UserError):
        engine.embed([[5, hole]])


def test_everybody_who_asks_one_engine_gets_their_own_tokens():
    """Two streams read in turn, one read to its end beside them, and one that was submitted by hand."""
    engine, lengths = Engine(tiny_model(), None), (6, 9, 4, 7)
    asked = [Request(prompt=[i, 2], sampling=Sampling(seed=i), max_new=n, stop_ids=()) for i, n in enumerate(lengths)]
    want = [engine.generate([one])[0][0].ids for one in asked]
    number, got = engine.submit(asked[3]), {i: [] for i in range(4)}
    streams = [engine.stream([one]) for one in asked[:2]]
    for _ in range(3):
        for i, stream in enumerate(streams):
            got[i].append(next(stream)[1].id)
    got[2] = engine.generate([asked[2]])[0][0].ids
    for i, stream in enumerate(streams):
        got[i] += [token.id for _, token in stream]
    while engine.busy:
        got[3] += [token.id for id, token in engine.step() if id == number]
    assert [got[i] for i in range(4)] == want
    check_empty(engine)


@pytest.mark.parametrize("settings", [{"chunk": 2}, {}, {"chunk": 3, "block_size": 2}])
def test_angles_that_depend_on_the_length_are_those_of_the_whole_prompt(settings):
    """Beyond the trained length what follows a prompt does not depend on how it was read, or on what came before."""
    config = LMConfig(vocab_size=61, dim=32, seq_len=64, layers=(LayerConfig(mixer=DYNAMIC, ffn=SwiGLUConfig(
        ffn_dim=48)),) * 3)
    model = kit_model(config, seed=3)
    engine = Engine(model, None, EngineConfig(**settings))
    prompt = [random.Random(1).randrange(61) for _ in range(30)]
    want = generate_uncached(model, None, [prompt], sampling=Sampling(temperature=0), max_new=1, stop_ids=())[0]
    for _ in range(2):
        engine.generate([Request(prompt=prompt[:20] + [4] * 5, max_new=2, stop_ids=())])
        [[got]] = engine.generate([Request(prompt=prompt, sampling=Sampling(temperature=0), max_new=1, stop_ids=())])
        assert got.ids == want.ids and abs(got.logps[0] - want.logps[0]) < 1e-9


def test_beams_need_a_prompt_and_room_for_an_answer():
    engine = Engine(tiny_model(), None)
    for prompt, more in (([1] * 40, {}), ([], {}), ([1], {"max_new": 0}), ([99], {})):
        with pytest.raises(UserError):
            beam_search(engine, prompt, beams=2, **more)


# ------------------------------------------------------------------------------------------------------- stop strings

@settings(max_examples=300, deadline=None)
@given(st.text("ab", max_size=40), st.lists(st.text("ab", min_size=1, max_size=6), max_size=4), st.data())
def test_stop_strings_are_found_wherever_the_text_is_cut(text, stops, data):
    """What is shown is the text before the first stop string to be complete, and nothing that may begin one is shown
    too early."""
    tokenizer = Byte()
    row = Row(0, tokenizer, stops, frozenset(), 100, 100)
    shown = ""
    for i, id in enumerate(tokenizer.encode(text)):
        token = row.push(id, None)
        shown += token.text
        assert text.startswith(shown) and not any(stop in shown for stop in stops)
        if token.finish:
            break
    else:
        shown += row.flush()
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert shown == text and row.finish is None
        return
    starts = [min(ends) - len(stop) for stop in stops if text[:min(ends)].endswith(stop)]
    assert row.finish == "stop" and shown == text[:min(starts)]


def test_a_special_token_is_none_of_the_text_that_spells_it():
    tokenizer = Byte()
    row = Row(0, tokenizer, ["k>x", "</think>"], frozenset(), 100, 100)
    think, end = tokenizer.specials["<think>"], tokenizer.specials["</think>"]
    ids = [think, *tokenizer.encode("x<think>\ufdd0"), tokenizer.specials[EOS], end]
    tokens = [row.push(id, None) for id in ids]
    assert "".join(token.text for token in tokens) == f"<think>x<think>\ufffd{EOS}" and tokens[-1].finish == "stop"
    assert "".join(token.signed for token in tokens) == f"{SIGNS['<think>']}x<think>\ufffd{SIGNS[EOS]}"
