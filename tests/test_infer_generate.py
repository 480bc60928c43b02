"""Generation against its oracle: with and without cache, alone and in a batch, stopped anywhere."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from mindseed.base.errors import UserError
from mindseed.infer.generate import generate, generate_uncached, stream
from mindseed.infer.rows import Row
from mindseed.infer.sample import Sampling
from mindseed.models.lm import build
from mindseed.models.presets import Shape
from mindseed.tokenizers.bpe_train import train
from mindseed.tokenizers.byte import Byte
from tests.tiny import pages, randomise, some_rows

SAMPLINGS = {"greedy": Sampling(temperature=0), "greedy, penalty": Sampling(temperature=0, repetition_penalty=1.4),
             "sampled": Sampling(seed=5),
             "filtered": Sampling(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, seed=3)}
PROMPTS = [[1, 40, 41], [1], [1, *range(50, 71)], [1, 99, 98, 97, 96, 95]]


def byte_model(extra_rows: int = 0, dtype=torch.float64, **changes):
    shape = Shape(**{"layers": 2, "dim": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_dim": 48} | changes)
    model = build(shape.lm_config(vocab_size=Byte().vocab_size + extra_rows, seq_len=48))
    randomise(model)
    return model.to(dtype)


@pytest.fixture(scope="module")
def model():
    return byte_model()


def same(a, b):
    assert [(c.ids, c.text, c.finish) for c in a] == [(c.ids, c.text, c.finish) for c in b]
    for x, y in zip(a, b):
        assert len(x.logps) == len(x.sampled_logps) == len(x.ids)
        torch.testing.assert_close(torch.tensor(x.logps), torch.tensor(y.logps))
        torch.testing.assert_close(torch.tensor(x.sampled_logps), torch.tensor(y.sampled_logps))


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cached_equals_uncached(sampling, kv_heads):
    model = byte_model(kv_heads=kv_heads)
    options = {"sampling": sampling, "max_new": 30, "stop_ids": range(40, 60)}
    fast, slow = (f(model, Byte(), PROMPTS, **options) for f in (generate, generate_uncached))
    same(fast, slow)
    assert len({len(c.ids) for c in fast}) > 1                         # rows left the batch at different times


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_a_batch_equals_its_rows_alone(model, sampling):
    together = generate(model, Byte(), PROMPTS, sampling=sampling, max_new=20, seeds=[9, 8, 7, 6])
    alone = [generate(model, Byte(), [p], sampling=sampling, max_new=20, seeds=[s])[0]
             for p, s in zip(PROMPTS, [9, 8, 7, 6])]
    same(together, alone)


def test_seeds(model):
    one, again, other = (generate(model, Byte(), [[1, 50]] * 2, sampling=Sampling(seed=s), max_new=12)
                         for s in (4, 4, 5))
    assert [c.ids for c in one] == [c.ids for c in again]
    assert one[0].ids != one[1].ids and one[1].ids == other[0].ids     # row i draws with seed + i


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_take_the_transposed_product(dtype):
    """More than eight rows go another way through every matrix; logps must not notice beyond rounding."""
    model = byte_model(dtype=dtype)
    prompts = [[1, *range(40, 42 + i)] for i in range(20)]
    many = generate(model, Byte(), prompts, max_new=1)
    for prompt, one, i in zip(prompts, many, range(20)):
        ids = torch.tensor([prompt])
        logits = model(ids, torch.arange(len(prompt))[None]).logits()[0, -1].double()   # with gradients: the plain way
        want = logits.log_softmax(-1)[one.ids[0]].item()
        assert one.logps[0] == pytest.approx(want, abs=1e-4 if dtype == torch.float32 else 0.08)


def test_stop_ids_end_the_row_and_stay_out_of_the_text(model):
    [free] = generate(model, Byte(), [[1, 60]], max_new=20, stop_ids=())
    end = free.ids[7]
    [cut] = generate(model, Byte(), [[1, 60]], max_new=20, stop_ids=[end])
    n = free.ids.index(end)
    assert cut.ids == free.ids[:n + 1] and cut.text == Byte().decode(free.ids[:n]) and cut.finish == "stop"


def test_default_stop_ids_are_the_ends_of_turn_and_text(model):
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    for end in (0, 2):
        other = byte_model(tied=False)
        other.load_state_dict(weights | {"head.weight": model.embed.weight.detach().clone()})
        with torch.no_grad():
            other.head.weight.zero_()
            hidden = other(torch.tensor([[1, 60]]), torch.tensor([[0, 1]])).hidden[0, -1]
            other.head.weight[end] = hidden                            # now the likeliest
        [done] = generate(other, Byte(), [[1, 60]], sampling=Sampling(temperature=0), max_new=5)
        assert (done.ids, done.text, done.finish) == ([end], "", "stop")


def test_finish_reasons_and_the_context(model):
    long = [1] * 40
    done = generate(model, Byte(), [long, [1]], max_new=20, stop_ids=())
    assert [(len(c.ids), c.finish) for c in done] == [(8, "context"), (20, "length")]
    same(done, generate_uncached(model, Byte(), [long, [1]], max_new=20, stop_ids=()))


def test_rows_beyond_the_tokenizer_are_never_chosen():
    model = byte_model(extra_rows=200)
    [done] = generate(model, Byte(), [[1]], sampling=Sampling(temperature=50.0), max_new=40, stop_ids=())
    assert max(done.ids) < Byte().vocab_size


def test_stream_is_what_generate_collects_and_mode_returns(model):
    model.train()
    tokens = list(stream(model, Byte(), PROMPTS, sampling=Sampling(seed=1), max_new=9))
    assert model.training
    seen = []
    done = generate(model, Byte(), PROMPTS, sampling=Sampling(seed=1), max_new=9, on_token=seen.append)
    assert seen == tokens and model.training
    for row, c in enumerate(done):
        mine = [t for t in tokens if t.row == row]
        assert [t.id for t in mine] == c.ids and "".join(t.text for t in mine) == c.text
        assert [t.finish for t in mine] == [None] * (len(mine) - 1) + [c.finish]
    running = stream(model, Byte(), PROMPTS)
    next(running)
    assert not torch.is_inference_mode_enabled()
    running.close()                                                    # as after Ctrl-C
    assert model.training


def test_dropout_is_off():
    model = byte_model(dropout=0.5).train()
    one, two = (generate(model, Byte(), PROMPTS, sampling=Sampling(temperature=0), max_new=9) for _ in range(2))
    assert [c.ids for c in one] == [c.ids for c in two]


def test_nothing_to_do_and_no_tokenizer(model):
    assert generate(model, Byte(), []) == []
    [done] = generate(model, None, [[1, 2]], max_new=3)
    assert len(done.ids) == 3 and done.text == ""


@pytest.mark.parametrize("prompts, words", [
    ([[1] * 48], "the prompt has 48 tokens.*context is 48"), ([[1], [1] * 90], "prompt 2 has 90 tokens"),
    ([[]], "the prompt is empty"), ([[1, 292]], "id 292.*another tokenizer"), ([[1, -1]], "id -1")])
def test_prompts_that_cannot_be_answered(model, prompts, words):
    with pytest.raises(UserError, match=words):
        generate(model, Byte(), prompts)
    with pytest.raises(UserError, match="max_new=0"):
        generate(model, Byte(), [[1]], max_new=0)


# ------------------------------------------------------------------------------------------------------- stop strings

def feed(text: str, stop, tokenizer, encode=None):
    """The pieces that a row releases for a text, token by token, and the token that ended it."""
    row = Row(0, tokenizer, stop, frozenset(), 10_000, 10_000)
    pieces, ids = [], (encode or tokenizer.encode)(text)
    for n, id in enumerate(ids, 1):
        token = row.push(id, None)
        pieces.append(token.text)
        if token.finish:
            return pieces, n
    return [*pieces, row.flush()], None


@settings(max_examples=50, deadline=None)
@given(text=st.text("ab\nC种🙂", max_size=40), stop=st.lists(st.text("ab\nC种🙂", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(text, stop):
    pieces, ended = feed(text, stop, Byte())
    first = min((at for s in stop if (at := text.find(s)) >= 0), default=None)
    if first is None:
        assert "".join(pieces) == text and ended is None
        return
    # a stop string is complete at its last byte: of several, the one that ends first decides, and cuts where it begins
    end = min(text.find(s) + len(s) for s in stop if s in text)
    cut = min(text[:end].find(s) for s in stop if s in text[:end])
    assert "".join(pieces) == text[:cut] and ended == len(text[:end].encode())


def test_stop_strings_across_tokens_and_inside_one():
    tokenizer = train(["the end the end END. the"] * 9, vocab_size=340)
    text = "we are at the end. More"
    for stop, want in (("e e", "we are at th"), ("the end", "we are at "), (" M", "we are at the end."), ("w", "")):
        pieces, ended = feed(text, [stop], tokenizer)
        assert "".join(pieces) == want and ended is not None
    pieces, _ = feed(text, ["at the stop"], tokenizer)
    assert "".join(pieces) == text
    assert any(not piece for piece in pieces)                          # "at the " was held back for a while


def test_stop_strings_in_generation(model):
    [free] = generate(model, Byte(), [[1, 70]], max_new=40, stop_ids=(), sampling=Sampling(seed=2))
    stop = free.text[6:9]
    for run in (generate, generate_uncached):
        [cut] = run(model, Byte(), [[1, 70]], max_new=40, stop_ids=(), stop=[stop], sampling=Sampling(seed=2))
        assert cut.text == free.text[:free.text.index(stop)] and cut.finish == "stop"
        assert cut.ids == free.ids[:len(cut.ids)] and len(cut.ids) < 40


def test_half_a_character_at_the_end_is_shown_as_such(model):
    [id] = Byte().encode("种")[:1]
    row = Row(0, Byte(), (), frozenset(), 99, 1)
    assert row.push(id, None).text == "\ufffd"


# -------------------------------------------------------------------------------------------------------------- cache

def test_rows_of_a_cache_go_on_when_others_leave(model):
    ids, positions = torch.randint(0, 200, (3, 24)), torch.arange(24).expand(3, -1)
    with torch.inference_mode():
        small, large = pages(model, 3, 24, block_size=1), pages(model, 3, 99, block_size=16)
        for t in range(23):
            a, b = (model(ids[:, t:t + 1], positions[:, t:t + 1], state).hidden for state in (small, large))
            torch.testing.assert_close(a, b)
        a, b = (model(ids[[2, 0], 23:], positions[:2, 23:], some_rows(state, [2, 0])).hidden
                for state in (small, large))
        full = model(ids[[2, 0]], positions[:2]).hidden[:, -1:]
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(a, full)


def test_pads_of_ragged_prompts_stay_finite(model):
    with torch.inference_mode():
        state = pages(model, 2)
        out = model(torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([[0, 1, 2], [0, -1, -1]]), state)
    assert out.hidden.isfinite().all()
