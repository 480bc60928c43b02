"""The merges shown are the merges made."""
from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindseed.tokenizers.bpe import BPE
from mindseed.tokenizers.bpe_train import train
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.trace import birth, replay

TEXTS = ["the cat sat on the mat, the other cat hid", "安娜住在里瓦，安娜养猫。", "lower lowest newer newest widest"] * 4


@pytest.fixture(scope="module")
def bpe() -> BPE:
    return train(TEXTS, vocab_size=380)


@given(text=st.text(max_size=40) | st.sampled_from(TEXTS))
@settings(max_examples=150, deadline=None)
def test_a_replay_ends_where_the_encoder_does(bpe, text):
    for piece in bpe.splitter(text):
        steps = replay(bpe, piece.encode())
        assert list(steps[-1].ids) == bpe.encode_piece(piece.encode())
        for before, after in zip(steps, steps[1:]):
            left, right = before.ids[after.at], before.ids[after.at + 1]
            assert bpe.merges[after.rank] == (left, right) and len(after.ids) == len(before.ids) - 1
            assert bpe.tokens[after.ids[after.at]] == bpe.tokens[left] + bpe.tokens[right]


def test_every_token_has_a_birth(bpe):
    for id, token in bpe.tokens.items():
        steps = birth(bpe, id)
        assert steps[-1].ids == (id,) and len(steps) == len(token)
        assert len(steps[0].ids) == len(token) and steps[0].rank is None


def test_what_no_merge_makes(bpe):
    assert birth(bpe, bpe.specials["<|im_end|>"]) is None
    assert birth(Byte(), 70) is None
    whole = BPE(bpe.tokens | {500: b"never merged"}, bpe.merges, specials=bpe.specials, whole_words=True)
    assert birth(whole, 500)[0].ids == (500,) and len(birth(whole, 500)) == 1
    plain = BPE(bpe.tokens | {500: b"never merged"}, bpe.merges, specials=bpe.specials)
    assert birth(plain, 500) is None
