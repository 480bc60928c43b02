"""Tokenizers keep every byte, never make a special token out of text, and agree with the Rust library."""
from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mindseed.base.errors import UserError
from mindseed.tokenizers.base import BOS_ID, EOS_ID, MARKUP, PAD_ID, SPECIALS, Stream
from mindseed.tokenizers.bpe import BPE, BYTE_ORDER, spell_bytes
from mindseed.tokenizers.bpe_train import count_pieces, learn_merges, train
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.split import GPT2, Splitter, by_pattern

def corpus(seed: int = 0, size: int = 400) -> list[str]:
    rng = random.Random(seed)
    words = ["the", "seed", "grows", "种子", "发芽", "模型", "it's", "2026", "aaaa", "abab", "🙂", "...", "x = y + 1\n"]
    words += ["".join(rng.choices("aeioulnrst", k=rng.randint(2, 7))) for _ in range(200)]
    return [" ".join(rng.choices(words, k=rng.randint(1, 12))) + rng.choice("。.\n!") for _ in range(size)]


bounded = settings(max_examples=50, deadline=None)
scripts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),                    # any Unicode but surrogates
    st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF)),   # Chinese
    st.text("🙂👩🏽‍🚀é́ \u200d\u3000\u00a0", max_size=20),                      # emoji, joiners, accents, odd spaces
    st.binary().map(lambda b: b.decode("latin-1")),                       # random bytes, control characters, NUL
    st.sampled_from(SPECIALS),                                            # what special tokens look like
    st.sampled_from(corpus()), st.text("aeioulnrst", max_size=40),        # what many merges in a row are about
    st.text("ab 1\n\r\t'sS.,", max_size=30),                              # what the pattern's branches are about
)
texts = st.lists(scripts, max_size=6).map("".join)


@pytest.fixture(scope="module")
def bpe() -> BPE:
    return train(corpus(), vocab_size=420)


@pytest.fixture(scope="module", params=["byte", "bpe", "gpt2 pattern", "nfc, whole words"])
def tokenizer(request, bpe):
    if request.param == "byte":
        return Byte()
    if request.param == "gpt2 pattern":
        return BPE.from_merges(bpe.merges, splitter=Splitter((by_pattern(GPT2),)))
    if request.param == "bpe":
        return bpe
    return BPE(bpe.tokens, bpe.merges, specials=bpe.specials, splitter=Splitter(nfc=True), whole_words=True)


def test_the_default_special_tokens_are_36_with_the_known_ids():
    assert len(SPECIALS) == len(set(SPECIALS)) == 36
    assert [SPECIALS[i] for i in (PAD_ID, BOS_ID, EOS_ID)] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert SPECIALS[3:9] == MARKUP


@bounded
@given(text=texts)
def test_python_and_rust_give_the_same_ids_and_decoding_returns_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.encode_batch([text]) == [ids]
    assert not set(ids) & set(tokenizer.specials.values())
    if not (isinstance(tokenizer, BPE) and tokenizer.splitter.nfc):
        assert tokenizer.decode(ids) == text


@bounded
@given(parts=st.lists(st.one_of(texts, st.sampled_from(SPECIALS)), max_size=8))
def test_allow_special_makes_markers_special_and_only_then(tokenizer, parts):
    text = "".join(parts)                         # no spelling is part of another, so counting them is unambiguous
    specials = set(tokenizer.specials.values())
    assert sum(id in specials for id in tokenizer.encode(text, allow_special=True)) == sum(map(text.count, SPECIALS))
    assert not specials & set(tokenizer.encode(text))


def test_the_longest_special_token_wins():
    tokenizer = Byte(("<a>", "<a><b>", "<b>"), frozenset())
    assert tokenizer.encode("<a><b><b><a>", allow_special=True) == [1, 2, 0]


def test_skipping_special_tokens_keeps_the_markup_that_programs_parse(bpe):
    ids = bpe.encode("<|im_start|><think>a</think>b<|im_end|>", allow_special=True)
    assert bpe.decode(ids, skip_special=True) == "<think>a</think>b"


@bounded
@given(ids=st.lists(st.integers(0, 419), max_size=30))
def test_streaming_any_ids_joins_to_decoding_them_and_never_splits_a_character(bpe, ids):
    stream = Stream(bpe)
    assert "".join([*map(stream.push, ids), stream.close()]) == bpe.decode(ids)


def test_a_stream_holds_back_half_a_character(bpe):
    stream = Stream(Byte())
    assert [stream.push(id) for id in Byte().encode("é🙂")] == ["", "é", "", "", "", "🙂"]


def test_one_huge_piece_is_encoded_in_reasonable_time(bpe):
    text = "a" * 200_000                          # quadratic merging would take hours here
    assert bpe.encode(text) == bpe.encode_batch([text])[0]


def test_bad_text_and_bad_ids_are_user_errors(tokenizer):
    for call in (lambda: tokenizer.encode("a\ud800"), lambda: tokenizer.encode_batch(["a", "a\udfff"])):
        with pytest.raises(UserError, match="surrogate U\\+D"):
            call()
    with pytest.raises(UserError, match="id 99999 is not in"):
        tokenizer.decode([99999])


def test_equal_hashes_mean_equal_ids(bpe):
    assert pickle.loads(pickle.dumps(bpe)).hash() == BPE.from_merges(bpe.merges).hash() == bpe.hash()
    others = [BPE.from_merges(bpe.merges[:-1]), BPE.from_merges(bpe.merges, splitter=Splitter((by_pattern(GPT2),))),
              BPE.from_merges(bpe.merges, specials=(*SPECIALS[:-1], "<|new|>")), Byte()]
    assert len({t.hash() for t in [bpe, *others]}) == 5


# -------------------------------------------------------------------------------------------------------- training

def rust_merges(texts: list[str], vocab_size: int) -> list[list[str]]:
    rust = Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.Sequence([Splitter().rust, pre_tokenizers.ByteLevel(False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, special_tokens=list(SPECIALS),
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    rust.train_from_iterator(texts, trainer)
    return json.loads(rust.to_str())["model"]["merges"]


@pytest.mark.parity
@bounded
@given(texts=st.lists(texts | st.text("ab", max_size=40), min_size=1, max_size=20))
def test_training_learns_the_merges_of_the_rust_trainer_in_its_order(texts):
    texts = ["seed", *texts]
    ours = train(texts, vocab_size=400)
    spelled = [[spell_bytes(ours.tokens[id]) for id in pair] for pair in ours.merges]
    assert spelled == rust_merges(texts, 400)


def naive_merges(counts: dict[str, int], new_tokens: int) -> list[tuple[int, int]]:
    """The definition: recount everything for every merge."""
    words = [([BYTE_ORDER.index(b) for b in piece.encode()], count) for piece, count in counts.items()]
    tokens = {i: bytes([b]) for i, b in enumerate(BYTE_ORDER)}
    merges = []
    while len(tokens) < 256 + new_tokens:
        pairs: dict[tuple[int, int], int] = {}
        for ids, count in words:
            for pair in zip(ids, ids[1:]):
                pairs[pair] = pairs.get(pair, 0) + count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merged = tokens[best[0]] + tokens[best[1]]
        new = next((id for id, token in tokens.items() if token == merged), len(tokens))
        tokens[new] = merged
        merges.append(best)
        for ids, _ in words:
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == best:
                    ids[i:i + 2] = [new]
                i += 1
    return merges


@bounded
@given(counts=st.dictionaries(st.text("abcé", min_size=1, max_size=12), st.integers(1, 3), min_size=1, max_size=15))
def test_incremental_counts_equal_recounting(counts):
    assert learn_merges(counts, 30) == naive_merges(counts, 30)


def test_neither_workers_nor_order_of_texts_change_the_result(monkeypatch):
    monkeypatch.setattr("mindseed.tokenizers.bpe_train.CHUNK_CHARS", 500)
    texts = corpus(1)
    one = count_pieces(texts, Splitter(), workers=1)
    assert count_pieces(reversed(texts), Splitter(), workers=3) == one
    assert train(texts, vocab_size=380).hash() == train(texts[::-1], vocab_size=380, workers=2).hash()


def test_workers_need_no_main_guard(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text("from mindseed.tokenizers.bpe_train import train\n"
                      "print(train(['a seed grows'] * 9, vocab_size=300, workers=2).vocab_size)\n")
    import mindseed
    root = next(iter(mindseed.__path__)) + "/.."
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env={"PYTHONPATH": root})
    assert (done.stdout, done.stderr) == ("300\n", "")


def test_a_text_that_is_no_unicode_is_a_user_error_from_a_worker_too():
    for workers in (1, 2):
        with pytest.raises(UserError, match="surrogate"):
            train(["fine", "\ud800"], vocab_size=300, workers=workers)


def test_training_refuses_what_cannot_be_and_stops_where_nothing_repeats():
    with pytest.raises(UserError, match="need 292"):
        train(["a"], vocab_size=291)
    with pytest.raises(UserError, match="no text"):
        train([], vocab_size=300)
    assert train(["abcdef"], vocab_size=400).vocab_size == 292
    assert train(corpus(), vocab_size=400).vocab_size == 400
