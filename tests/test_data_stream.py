"""Packing, loading, mixing, prefetching: nothing lost, nothing twice, nothing moved; a stream is its index."""
from __future__ import annotations

import math
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindseed import cli
from mindseed.base.errors import UserError
from mindseed.data import pack
from mindseed.data.loader import Evaluation, PackedRows, PackedSource, RowSource
from mindseed.data.mix import BLOCK, Mixture
from mindseed.data.pack import best_fit, next_fit, plan
from mindseed.data.prefetch import Prefetch
from mindseed.data.shards import MemoryDocuments
from mindseed.data.shuffle import key_of, shuffled
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.hf_json import save_tokenizer
from tests.tiny import tiny_model

quick = settings(max_examples=50, deadline=None)


def corpus(lengths, chat=(), seed=0):
    """Documents in which every token is unique: document d holds d * 1000 + 0, 1, 2, ..."""
    rng = np.random.default_rng(seed)
    return MemoryDocuments([(d * 1000 + np.arange(n), rng.random(n) < 0.4 if d in chat else None)
                            for d, n in enumerate(lengths)])


def epoch(source):
    return [next(source) for _ in range(math.ceil(len(source.rows) / source.batch_size))]


# ------------------------------------------------------------------------------------------------------ shuffling

@quick
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_shuffled_is_a_permutation(n, key):
    assert sorted(shuffled(np.arange(n), n, key).tolist()) == list(range(n))


def test_shuffled_looks_random():
    n = 4096
    orders = np.stack([shuffled(np.arange(n), n, key_of(7, epoch)) for epoch in range(50)])
    assert abs(np.corrcoef(orders[0], np.arange(n))[0, 1]) < 0.06
    assert abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 0.06
    assert abs((np.diff(orders[0]) == 1).mean()) < 0.01
    assert abs(orders[:, 0].mean() / n - 0.5) < 0.2 and len(set(orders[:, 0])) > 45
    assert shuffled(5, 10, 1).shape == () and shuffled(np.arange(4), 10, 1).tolist() == [2, 4, 6, 0]    # for ever


# -------------------------------------------------------------------------------------------------------- packing

@quick
@given(st.integers(1, 50), st.data())
def test_best_fit_is_the_textbook_algorithm(capacity, data):
    lengths = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=80))
    room: list[int] = []
    for length in sorted(lengths, reverse=True):                      # one document at a time
        fitting = [i for i, left in enumerate(room) if left >= length]
        if fitting:
            room[min(fitting, key=lambda i: room[i])] -= length
        else:
            room.append(capacity - length)
    row = best_fit(np.array(lengths), capacity)
    assert sorted(capacity - np.bincount(row, weights=lengths)) == sorted(room)


@quick
@given(st.integers(1, 50), st.data())
def test_next_fit_is_the_textbook_algorithm(capacity, data):
    lengths = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=80))
    used, expected, row = 0, [], 0
    for length in lengths:
        if used + length > capacity:
            used, row = 0, row + 1
        used += length
        expected.append(row)
    assert next_fit(np.array(lengths), capacity).tolist() == expected


def test_best_fit_fills_more_than_sequential_than_padding():
    lengths = np.random.default_rng(0).lognormal(4.5, 0.8, 3000).astype(int).clip(3, 900)
    fill = {s: plan(corpus(lengths), 512, strategy=s).stats.fill for s in ("best-fit", "sequential", "pad")}
    assert fill["best-fit"] > 0.99 > fill["sequential"] + 0.05 and fill["sequential"] > fill["pad"] + 0.3


def test_windows_keep_memory_constant_and_lose_nothing(monkeypatch):
    monkeypatch.setattr(pack, "WINDOW", 16)
    lengths = np.random.default_rng(1).integers(2, 60, 100)
    packed = plan(corpus(lengths), 32)
    assert packed.stats.slots == (lengths - 1).sum() == packed.segments[:, 2].sum()
    assert len(packed) == packed.rows.size - 1 and packed.rows[-1] == len(packed.segments)


# -------------------------------------------------------------------------------------------------------- loading

@quick
@given(st.lists(st.integers(2, 70), min_size=1, max_size=40), st.integers(3, 40),
       st.sampled_from(["best-fit", "sequential", "pad"]), st.integers(0, 5))
def test_every_target_once_per_epoch_and_every_mask_in_place(lengths, seq_len, strategy, seed):
    documents = corpus(lengths)
    source = PackedSource(documents, seq_len=seq_len, batch_size=1, strategy=strategy, seed=seed)
    seen: Counter = Counter()
    for batch in epoch(source):
        for i, t, w, p in zip(*(x[0].tolist() for x in (batch.ids, batch.targets, batch.weights, batch.positions))):
            if w:
                assert t == i + 1 and p == (t % 1000 - 1) % seq_len   # positions restart at every segment
                seen[t] += 1
            else:
                assert (i, t, w, p) == (0, 0, 0.0, 0)                 # padding
    assert seen == Counter(d * 1000 + k for d, n in enumerate(lengths) for k in range(1, n))


def test_golden_row():
    documents = MemoryDocuments([([1, 10, 11, 12, 2], [0, 0, 1, 0, 1]), ([1, 20, 2], None)])
    batch = next(PackedSource(documents, seq_len=8, batch_size=1))
    assert batch.ids.tolist() == [[1, 10, 11, 12, 1, 20, 0, 0]]
    assert batch.targets.tolist() == [[10, 11, 12, 2, 20, 2, 0, 0]]
    assert batch.weights.tolist() == [[0, 1, 0, 1, 1, 1, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 0, 0]]
    assert [x.dtype for x in (batch.ids, batch.targets, batch.weights, batch.positions)] == [
        torch.long, torch.long, torch.float32, torch.long]


def test_long_conversations_are_cut_and_counted_and_dropped_if_nothing_is_learned():
    learned_early, learned_late = [0] * 20, [0] * 20
    learned_early[3] = learned_late[15] = 1
    documents = MemoryDocuments([(range(20), learned_early), (range(20), learned_late), (range(20), None)])
    packed = plan(documents, 8)
    assert (packed.stats.cut, packed.stats.dropped, packed.stats.pieces) == (1, 1, 1)
    assert sorted(packed.segments.tolist()) == [[0, 0, 8], [2, 0, 8], [2, 8, 8], [2, 16, 3]]
    assert "1 long conversations cut, 1 dropped" in str(packed.stats)
    with pytest.raises(UserError, match="raise data.seq_len"):
        plan(MemoryDocuments([(range(20), learned_late)]), 8)


def same(a, b):
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("ids", "targets", "weights", "positions")) \
        and torch.equal(a.extra["row"], b.extra["row"])


def test_the_stream_is_a_function_of_its_index_on_any_number_of_ranks():
    documents = corpus(np.random.default_rng(2).integers(2, 60, 50), chat={3, 4, 5})
    make = lambda batch_size, **more: PackedSource(documents, seq_len=32, batch_size=batch_size, seed=5, **more)  # noqa
    one = make(12)
    whole = [next(one) for _ in range(9)]                             # several epochs
    ranks = [make(4, rank=r, world=3) for r in range(3)]
    for batch in whole[:4]:
        parts = [next(source) for source in ranks]
        assert torch.equal(torch.cat([p.ids for p in parts]), batch.ids)
    states = [source.state_dict() for source in ranks]
    assert states[0] == states[1] == states[2]
    for world in (1, 2, 6):                                           # go on elsewhere
        others = [make(12 // world, rank=r, world=world) for r in range(world)]
        for source in others:
            source.load_state_dict(states[0])
        for batch in whole[4:]:
            parts = [next(source) for source in others]
            assert torch.equal(torch.cat([p.ids for p in parts]), batch.ids)
            assert torch.equal(torch.cat([p.extra["row"] for p in parts]), batch.extra["row"])


def test_seeds_and_epochs_differ_and_rows_are_named():
    documents = corpus([5] * 64)
    source = PackedSource(documents, seq_len=4, batch_size=8)
    first, second = (torch.cat([b.ids for b in epoch(source)]) for _ in range(2))
    other = torch.cat([b.ids for b in epoch(PackedSource(documents, seq_len=4, batch_size=8, seed=1))])
    assert not torch.equal(first, second) and not torch.equal(first, other)
    assert sorted(first[:, 0].tolist()) == sorted(second[:, 0].tolist())
    source = PackedSource(documents, seq_len=4, batch_size=8)
    batch = next(source)
    assert source.describe(batch.extra["row"]) == [f"memory:{d}" for d in (batch.ids[:, 0] // 1000).tolist()]


def test_resuming_on_other_data_says_what_differs():
    state = PackedSource(corpus([9] * 9), seq_len=8, batch_size=2).state_dict()
    with pytest.raises(UserError, match="seq_len was 8, is 4"):
        PackedSource(corpus([9] * 9), seq_len=4, batch_size=2).load_state_dict(state)
    with pytest.raises(UserError, match="data was"):
        PackedSource(corpus([9] * 8), seq_len=8, batch_size=2).load_state_dict(state)


@pytest.mark.parametrize("settings, message", [
    (dict(seq_len=0), "seq_len = 0"), (dict(strategy="bestfit"), "best-fit"), (dict(batch_size=0), "batch_size = 0")])
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        PackedSource(corpus([5]), **{"seq_len": 8, "batch_size": 1, **settings})


# --------------------------------------------------------------------------------------- documents that see each other

def test_crossing_documents_changes_positions_alone():
    documents = corpus([5, 9, 4, 30, 7, 3])
    plain, crossed = (next(RowSource(PackedRows(documents, seq_len=12, cross_documents=x), batch_size=6))
                      for x in (False, True))
    for name in ("ids", "targets", "weights"):
        assert torch.equal(getattr(plain, name), getattr(crossed, name))
    starts = (plain.positions == 0) & (plain.targets > 0)
    assert (starts.sum(1) > 1).any()                                  # some row holds several documents
    for row, targets in zip(crossed.positions.tolist(), crossed.targets.tolist()):
        used = sum(t > 0 for t in targets)
        assert row == [*range(used), *[0] * (12 - used)]              # through the row; padding stays apart


@pytest.mark.parametrize("crossed", [False, True])
def test_only_crossed_documents_see_each_other(crossed):
    documents = MemoryDocuments([(np.arange(1 + 9 * d, 8 + 9 * d), None) for d in range(2)])
    batch = next(RowSource(PackedRows(documents, seq_len=12, cross_documents=crossed), batch_size=1))
    model = tiny_model().eval()
    logits = model(batch.ids, batch.positions).logits()
    batch.ids[:, 2] = 60                                              # within the first document
    moved = (model(batch.ids, batch.positions).logits() - logits).abs().amax(-1)[0]
    assert (moved[:2] == 0).all() and (moved[2:6] > 0).all()
    assert (moved[6:] > 0).all() if crossed else (moved[6:] == 0).all()


def test_crossing_documents_is_another_stream():
    parts = [PackedRows(corpus([9] * 9), seq_len=8, cross_documents=x) for x in (False, True)]
    assert parts[0].identity() != parts[1].identity()
    with pytest.raises(UserError, match="cross_documents was False, is True"):
        RowSource(parts[1], batch_size=2).load_state_dict(RowSource(parts[0], batch_size=2).state_dict())


def test_a_run_does_not_go_on_with_documents_crossed(tmp_path, capsys):
    save_tokenizer(Byte(), tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "text {i}"}}\n' for i in range(20)))
    command = (f"train --data.train {tmp_path}/a.jsonl --data.tokenizer {tmp_path}/tokenizer --out {tmp_path}/run "
               "--data.seq_len 32 --loop.batch 2 --model.layers 1 --model.dim 16 --model.heads 2 --model.kv_heads 1 "
               "--model.head_dim 8 --model.ffn_dim 16 --data.heldout 0 --loop.sample_every 0 --loop.steps").split()
    assert cli.main([*command, "1"]) == 0
    assert cli.main([*command, "2", "--data.cross_documents", "--resume"]) == 2
    assert "data.cross_documents: False then, True now" in capsys.readouterr().err
    assert cli.main([*command, "2", "--resume"]) == 0


# --------------------------------------------------------------------------------------------------------- mixing

def test_mixture_keeps_proportions_and_every_part_its_own_epochs():
    parts = [PackedRows(corpus([5] * n, seed=n), seq_len=4, seed=n) for n in (300, 40)]
    mixture = Mixture([(parts[0], 3.0), (parts[1], 1.0)], seed=1)
    where, inner = mixture._locate(range(3 * BLOCK))
    assert np.bincount(where).tolist() == [2250, 750]
    for part in (0, 1):
        assert sorted(inner[where == part].tolist()) == list(range((where == part).sum()))
    share = np.convolve(where, np.ones(200) / 200, "valid")
    assert 0.1 < share.min() and share.max() < 0.4                    # even within a block
    assert mixture.epochs(4000) == {"part 0": 10.0, "part 1": 25.0}


def test_mixture_is_a_function_of_its_index():
    parts = [(PackedRows(corpus([7] * n), seq_len=6), weight) for n, weight in ((30, 0.5), (50, 0.3), (9, 0.2))]
    source = RowSource(Mixture(parts), batch_size=16)
    whole = [next(source) for _ in range(140)]                        # more than two blocks
    other = RowSource(Mixture(parts), batch_size=16)
    other.load_state_dict({**source.state_dict(), "rows_seen": 16 * 120})
    assert all(same(next(other), batch) for batch in whole[120:])
    assert len(source.describe(whole[0].extra["row"])) == 16
    with pytest.raises(UserError, match="mixture was"):
        RowSource(Mixture([(rows, 1.0) for rows, _ in parts]), batch_size=16).load_state_dict(source.state_dict())


@pytest.mark.parametrize("weights, message", [((1, -1), "positive"), ((1, 1e-6), "under 1/1000"), ((), "positive")])
def test_bad_mixtures(weights, message):
    rows = PackedRows(corpus([5]), seq_len=4)
    with pytest.raises(UserError, match=message):
        Mixture([(rows, weight) for weight in weights])
    with pytest.raises(UserError, match="one length"):
        Mixture([(rows, 1), (PackedRows(corpus([5]), seq_len=5), 1)])


# ---------------------------------------------------------------------------------------------------- prefetching

def test_prefetch_changes_neither_stream_nor_state():
    make = lambda: PackedSource(corpus([9] * 30), seq_len=8, batch_size=4)      # noqa: E731
    plain, ahead = make(), Prefetch(make(), depth=3)
    assert ahead.state_dict() == plain.state_dict()
    for _ in range(5):
        assert same(next(ahead), next(plain)) and ahead.state_dict() == plain.state_dict()
    time.sleep(0.05)                                                  # let it run ahead
    state = ahead.state_dict()
    rest = [next(ahead) for _ in range(4)]
    ahead.load_state_dict(state)                                      # and back
    assert all(same(next(ahead), batch) for batch in rest)
    assert ahead.describe(rest[0].extra["row"]) and ahead.seq_len == 8
    ahead.close()
    plain.load_state_dict(state)
    assert [same(next(plain), batch) for batch in rest] == [True] * 4
    assert ahead.source.state_dict() == plain.state_dict() and same(next(ahead), next(plain))


def test_prefetch_hands_on_errors():
    class Broken(PackedSource):
        def __next__(self):
            if self.rows_seen >= 8:
                raise UserError("the disk is gone")
            return super().__next__()

    source = Prefetch(Broken(corpus([9] * 30), seq_len=8, batch_size=4))
    next(source), next(source)
    for _ in range(2):
        with pytest.raises(UserError, match="the disk is gone"):
            next(source)


# ----------------------------------------------------------------------------------------------------- evaluation

@quick
@given(st.lists(st.integers(2, 70), min_size=1, max_size=30), st.integers(3, 40), st.integers(1, 5), st.integers(1, 40))
def test_evaluation_covers_whole_documents_exactly(lengths, seq_len, batch_size, limit):
    documents = corpus(lengths, chat=set(range(0, len(lengths), 3)))
    documents.bytes = np.arange(1, len(lengths) + 1) * 7
    pass_ = Evaluation(documents, seq_len=seq_len, batch_size=batch_size, limit=limit)
    for _ in range(2):
        batches = list(pass_)
        assert len(batches) == len(pass_) and {b.ids.shape for b in batches} == {(batch_size, seq_len)}
        used = torch.cat([b.targets[(b.positions > 0) | (b.targets > 0)] for b in batches]).tolist()
        chosen = {t // 1000 for t in used}
        assert Counter(used) == Counter(d * 1000 + k for d in chosen for k in range(1, lengths[d]))
        assert len(chosen) == pass_.documents == min(limit, len(lengths))
        assert pass_.bytes == sum(int(documents.bytes[d]) for d in chosen)
        expected = sum(lengths[d] - 1 if documents.trainable[d] is None else int(documents.trainable[d][1:].sum())
                       for d in chosen)
        assert sum(float(b.weights.sum()) for b in batches) == expected
    with pytest.raises(UserError, match="held-out split is empty"):
        Evaluation(corpus([]), seq_len=8, batch_size=1)
