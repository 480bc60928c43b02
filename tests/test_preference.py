"""Pairs and judged answers: what is read and refused, what a row holds, and that nothing depends on how it travels."""
from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindseed.base.errors import UserError
from mindseed.core import Batch
from mindseed.data.loader import Arrays, Once, PackedRows, RowSource
from mindseed.data.mix import Mixture
from mindseed.data.prefetch import Prefetch
from mindseed.data.preference import MULTIPLE, PairRows, UnpairedRows, fingerprint, reference_logps
from mindseed.data.prepare import prepare
from mindseed.data.shards import MemoryDocuments
from mindseed.objectives.dpo import DPO, side_logps
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.chat import encode_chat
from mindseed.tokenizers.template import Template
from mindseed.train.step import train_step
from tests.test_template import APPENDING, MARKS
from tests.test_train import make_run
from tests.tiny import VOCAB, tiny_model

quick = settings(max_examples=30, deadline=None)
NAMES = ("ids", "targets", "weights", "positions")


def documents(shapes: list[tuple[int, int]], labels=None) -> MemoryDocuments:
    """Documents of (prompt, answer) tokens, each token unlike all others: document d holds d * 1000 + 0, 1, 2 ..."""
    return MemoryDocuments([(d * 1000 + np.arange(p + a), [0] * p + [1] * a) for d, (p, a) in enumerate(shapes)],
                           labels=labels)


def random_documents(count: int, seed: int = 0, labels=None) -> MemoryDocuments:
    """Conversations of the tiny vocabulary; those of one pair share their prompt."""
    rng, made, prompt = np.random.default_rng(seed), [], np.zeros(0, np.int64)
    for d in range(count):
        prompt = rng.integers(VOCAB, size=rng.integers(2, 6)) if d % 2 == 0 else prompt
        answer = rng.integers(VOCAB, size=rng.integers(1, 9))
        made.append((np.concatenate([prompt, answer]), [0] * len(prompt) + [1] * len(answer)))
    return MemoryDocuments(made, labels=labels)


def used(batch: Batch, row: int) -> list[list[int]]:
    """A row without its padding."""
    end = int(batch.targets[row].nonzero().max()) + 1
    return [getattr(batch, name)[row, :end].tolist() for name in NAMES]


# ------------------------------------------------------------------------------------------------------------ rows

def test_golden_row():
    rows = PairRows(MemoryDocuments([([1, 10, 11, 2], [0, 0, 1, 1]), ([1, 10, 12, 13, 2], [0, 0, 1, 1, 1])]), seq_len=8)
    batch = next(RowSource(rows, batch_size=1))
    assert batch.ids.tolist() == [[1, 10, 11, 1, 10, 12, 13, 0]]
    assert batch.targets.tolist() == [[10, 11, 2, 10, 12, 13, 2, 0]]
    assert batch.weights.tolist() == [[0, 1, 1, 0, 1, 1, 1, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]


@quick
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 12)), min_size=2, max_size=24), st.integers(7, 16),
       st.integers(1, 5))
def test_every_pair_comes_once_an_epoch_and_batches_are_as_wide_as_they_must(shapes, seq_len, batch_size):
    shapes = shapes[:len(shapes) // 2 * 2]
    rows = PairRows(documents(shapes), seq_len=seq_len, seed=3)
    seen = Counter()
    for batch in Once(rows, batch_size=batch_size):
        ends = [len(used(batch, b)[0]) for b in range(len(batch.ids))]
        assert batch.ids.shape[1] == -(-max(ends) // MULTIPLE) * MULTIPLE
        for b in range(len(batch.ids)):
            ids, targets, weights, positions = used(batch, b)
            pair, at = ids[0] // 2000, 0
            seen[pair] += 1
            for side, (prompt, answer) in enumerate(shapes[2 * pair:2 * pair + 2]):
                slots = min(prompt + answer - 1, seq_len)
                first, here = (2 * pair + side) * 1000, slice(at, at + slots)
                assert ids[here] == list(range(first, first + slots)) and targets[here] == [x + 1 for x in ids[here]]
                assert positions[here] == list(range(slots))
                assert weights[here] == [float(t >= prompt) for t in range(1, slots + 1)]
                at += slots
            assert at == len(ids)
    assert seen == Counter(range(len(shapes) // 2))


def test_long_sides_are_cut_and_what_says_nothing_then_is_dropped_and_named():
    made = [(range(9), [0] * 3 + [1] * 6), (range(9), [0] * 3 + [1] * 5 + [1]),            # equal within 4 slots
            (range(9), [0] * 8 + [1]), ([0, 1, 2, 3, 9, 9], [0] * 4 + [1] * 2),             # no answer left of one
            (range(9), [0] * 3 + [1] * 6), ([0, 1, 2, 7, 7], [0] * 3 + [1] * 2),            # cut, kept
            ([0, 1, 2], [0, 1, 1]), ([0, 3], [0, 1])]                                      # short
    rows = PairRows(MemoryDocuments(made), seq_len=4, shuffle=False)
    assert rows.numbers.tolist() == [2, 3] and (rows.stats.cut, rows.stats.rows) == (1, 2)
    assert rows.stats.dropped == ("memory:0", "memory:2")
    assert str(rows.stats) == ("2 pairs, 1 cut at their end, 2 dropped (the limit leaves nothing of an answer, or no "
                               "difference): memory:0, memory:2")
    batch = next(RowSource(rows, batch_size=2))
    assert batch.ids[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 7] and rows.describe(0) == ["memory:4"]
    assert batch.weights[0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    with pytest.raises(UserError, match="raise\\s+data.seq_len"):
        PairRows(MemoryDocuments(made[:4]), seq_len=4)


@pytest.mark.parametrize("made, message", [
    (documents([]), "there are no pairs"), (documents([(2, 3)]), "no pairs"),
    (MemoryDocuments([(range(4), None), (range(4), [0, 0, 1, 1])]), "no pairs"),
    (documents([(2, 3), (2, 3)], labels=[1, 0]), "no pairs")])
def test_what_is_no_pairs_is_refused(made, message):
    with pytest.raises(UserError, match=message):
        PairRows(made, seq_len=8)
    with pytest.raises(UserError, match="at least 1"):
        PairRows(documents([(2, 3), (2, 3)]), seq_len=0)


# ---------------------------------------------------------------------------------------------------- the stream

def rows_of(kind: str, **changes) -> PairRows | UnpairedRows:
    made = random_documents(26, labels=[d % 3 == 0 for d in range(26)] if kind == "unpaired" else None)
    return (PairRows if kind == "pairs" else UnpairedRows)(made, **{"seq_len": 11, "seed": 4} | changes)


@pytest.mark.parametrize("kind", ["pairs", "unpaired", "pairs, one by one"])
def test_the_stream_is_a_function_of_its_index_on_any_number_of_ranks(kind):
    one = RowSource(rows_of(kind), batch_size=12)
    whole = {}
    for _ in range(6):                                                # several epochs
        batch = next(one)
        whole |= {int(r): (used(batch, i), [batch.extra[k][i].item() for k in batch.extra])
                  for i, r in enumerate(batch.extra["row"])}
    state = None
    for world, steps in ((3, range(0, 2)), (1, range(2, 3)), (2, range(3, 5)), (6, range(5, 6))):  # and go on elsewhere
        ranks = [Prefetch(RowSource(rows_of(kind), batch_size=12 // world, rank=r, world=world)) for r in range(world)]
        for source in ranks if state else []:
            source.load_state_dict(state)
        for step in steps:
            for rank, source in enumerate(ranks):
                batch = next(source)
                first = 12 * step + rank * (12 // world)
                assert batch.extra["row"].tolist() == list(range(first, first + 12 // world))
                for i, r in enumerate(batch.extra["row"].tolist()):
                    assert (used(batch, i), [batch.extra[k][i].item() for k in batch.extra]) == whole[r]
        state = ranks[0].state_dict()
        assert all(source.state_dict() == state for source in ranks)
        for source in ranks:
            source.close()


def test_resuming_on_other_pairs_says_what_differs():
    state = RowSource(rows_of("pairs"), batch_size=2).state_dict()
    with pytest.raises(UserError, match="seq_len was 11, is 12"):
        RowSource(rows_of("pairs", seq_len=12), batch_size=2).load_state_dict(state)
    with pytest.raises(UserError, match="rows was pairs, is judged answers"):
        RowSource(rows_of("pairs, one by one"), batch_size=2).load_state_dict(state)


def test_mixtures_of_pairs_but_not_with_other_rows():
    parts = [PairRows(documents([(2, n)] * 40), seq_len=9) for n in (3, 5)]
    source = RowSource(Mixture([(parts[0], 3), (parts[1], 1)]), batch_size=100)
    lengths = Counter(len(used(batch, b)[0]) for batch in [next(source) for _ in range(10)] for b in range(100))
    assert lengths == {8: 750, 12: 250}
    assert next(RowSource(Mixture([(parts[0], 1.0)]), batch_size=4)).ids.shape == (4, 8)
    with pytest.raises(UserError, match="one kind, got part 0: PairRows, part 1: PackedRows"):
        Mixture([(parts[0], 1), (PackedRows(documents([(2, 3)]), seq_len=9), 1)])
    known = parts[1].with_reference(np.zeros((20, 2), np.float32))
    with pytest.raises(UserError, match=r"part 0: PairRows, part 1: PairRows \+ reference"):
        Mixture([(parts[0], 1), (known, 1)])


@pytest.mark.parametrize("objective", [DPO(), DPO(kind="simpo", beta=2.0)], ids=["dpo", "simpo"])
def test_width_and_neighbours_change_no_loss(objective):
    """A pair in a row of its own, in a batch, and padded to twice the limit; and the two documents of it apart."""
    model, other = tiny_model(1).double(), tiny_model(2).double()
    objective, rows = replace(objective, reference=other), rows_of("pairs", shuffle=False)

    def loss(batch: Batch) -> torch.Tensor:
        batch = objective.prepare(batch)
        return objective.loss(model(batch.ids, batch.positions), batch)[0]

    with torch.no_grad():
        total = sum(loss(batch) for batch in Once(rows, batch_size=1))
        torch.testing.assert_close(sum(loss(batch) for batch in Once(rows, batch_size=5)), total)
        wide = Arrays.zeros(len(rows), 2 * rows.seq_len)
        rows.write(range(len(rows)), wide, range(len(rows)))
        torch.testing.assert_close(loss(wide.batch(range(len(rows)))), total)
        for k, batch in enumerate(Once(rows, batch_size=1)):
            sums = side_logps(model(batch.ids, batch.positions), batch)[0][0]
            for side, value in enumerate(sums):
                ids, learned = rows.documents.get(2 * k + side)
                ids = torch.tensor(ids[:12].astype(np.int64))[None]
                logps = model(ids[:, :-1], torch.arange(ids.shape[1] - 1)[None]).logps(ids[:, 1:])[0]
                torch.testing.assert_close(value, logps[torch.tensor(learned[1:12]) > 0].sum())


# --------------------------------------------------------------------------------------------------- judged answers

@pytest.mark.parametrize("kind", ["unpaired", "pairs, one by one"])
def test_a_judged_answer_stands_beside_its_prompt_with_another_answer(kind):
    labels = [d % 3 == 0 for d in range(24)] if kind == "unpaired" else None
    shapes = [(2 + d % 4, 1 + d % 7) for d in range(24)]
    rows = UnpairedRows(documents(shapes, labels=labels), seq_len=12, seed=1)
    partners, seen = set(), set()
    for batch in Once(rows, batch_size=5):
        for b in range(len(batch.ids)):
            ids, targets, weights, positions = used(batch, b)
            d, prompt = ids[0] // 1000, shapes[ids[0] // 1000][0]
            seen.add(d)
            assert batch.extra["label"][b] == (d % 3 == 0 if labels else d % 2 == 0)
            start = positions.index(0, 1)
            assert [*ids[:start], targets[start - 1]] == [d * 1000 + i for i in range(sum(shapes[d]))]
            mixed, p = [*ids[start:], targets[-1]], targets[-1] // 1000
            assert mixed == [d * 1000 + i for i in range(prompt)] + [p * 1000 + i for i in range(*(
                shapes[p][0], sum(shapes[p])))]
            assert weights[start:] == [0.0] * (prompt - 1) + [1.0] * shapes[p][1]
            assert p != d and (labels or p // 2 != d // 2)            # no answer to the same prompt
            partners.add(p)
    assert seen == partners == set(range(24))                         # every answer is another one's partner once
    assert rows.stats.kinds == ({"desirable": 8, "undesirable": 16} if labels else {"desirable": 12, "undesirable": 12})


def test_judged_answers_need_two_prompts_and_labels():
    with pytest.raises(UserError, match="two at least"):
        UnpairedRows(documents([(2, 3), (2, 4)]), seq_len=8)
    with pytest.raises(UserError, match="no judged answers"):
        UnpairedRows(documents([(2, 3)] * 3), seq_len=8)
    long = UnpairedRows(documents([(6, 9), (6, 9), (3, 2), (7, 1)], labels=[1, 0, 1, 1]), seq_len=6, shuffle=False)
    assert long.stats.dropped == ("memory:3",) and long.stats.cut == 2 and long.numbers.tolist() == [0, 1, 2]
    for batch in Once(long, batch_size=1):                            # a partner's answer may be cut, down to nothing
        assert max(batch.positions[0]) < 6


# --------------------------------------------------------------------------------------- what a reference thinks

def test_a_reference_is_asked_once_and_its_answers_are_those_it_would_give(tmp_path, monkeypatch):
    rows, model, reference = rows_of("pairs"), tiny_model(1), tiny_model(2, dropout=0.3).train()
    logps = reference_logps(rows, reference, 4, folder=tmp_path)
    assert reference.training and len(list(tmp_path.iterdir())) == 1
    asked, told = DPO(reference=tiny_model(2).eval()), DPO()
    for plain, known in zip(Once(rows, batch_size=5), Once(rows.with_reference(logps), batch_size=5)):
        plain = asked.prepare(plain)
        torch.testing.assert_close(known.extra["reference"], plain.extra["reference"], rtol=1e-5, atol=1e-4)
        with torch.no_grad():
            losses = [o.loss(model(b.ids, b.positions), o.prepare(b))[0] for o, b in ((asked, plain), (told, known))]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(type(reference), "forward", None)             # it cannot be asked again
    again = rows_of("pairs", seed=9)                                  # the same pairs in another order
    assert np.array_equal(reference_logps(again, reference, 7, folder=tmp_path), logps)
    monkeypatch.undo()
    other = reference_logps(rows, tiny_model(3), 4, folder=tmp_path)
    assert not np.allclose(other, logps) and len(list(tmp_path.iterdir())) == 2
    reference_logps(rows_of("pairs", seq_len=7), reference, 4, folder=tmp_path)
    reference_logps(rows_of("pairs, one by one"), reference, 4, folder=tmp_path)
    reference_logps(rows, reference, 4, folder=tmp_path, autocast=torch.bfloat16)
    assert len(list(tmp_path.iterdir())) == 5


def test_a_damaged_file_of_a_reference_is_made_again(tmp_path):
    rows, reference = rows_of("pairs, one by one"), tiny_model(2)
    logps = reference_logps(rows, reference, 4, folder=tmp_path)
    assert np.isfinite(logps).all() and np.array_equal(reference_logps(rows, reference, 4), logps)
    file = next(tmp_path.glob("reference-*"))
    np.save(tmp_path / "other.npy", logps[1:])
    other = (tmp_path / "other.npy").read_bytes()
    for damage in (b"", file.read_bytes()[:-9], b"\x80\x04junk", other):
        file.write_bytes(damage)
        assert np.array_equal(reference_logps(rows, reference, 4, folder=tmp_path), logps)
        assert np.array_equal(np.load(file), logps)


def test_what_a_reference_cannot_say_is_an_error(tmp_path):
    rows, broken = rows_of("pairs"), tiny_model(2)
    with torch.no_grad():
        broken.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match="13 of 13 pairs no finite log-probability, the first of them in memory:0"):
        reference_logps(rows, broken, 4, folder=tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="under a key"):
        reference_logps(rows, lambda ids, positions: None, 4, folder=tmp_path)
    with pytest.raises(ValueError, match="shape"):
        rows.with_reference(np.zeros((3, 2), np.float32))
    assert fingerprint(tiny_model(1)) == fingerprint(tiny_model(1)) != fingerprint(tiny_model(1).bfloat16())


# -------------------------------------------------------------------------------------------------- reading rows

TOKENIZER = Byte()
ASK = [{"role": "user", "content": "2+3?"}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 2}}]}
RESULT = {"role": "tool", "content": "5"}


def say(*texts: str) -> list[dict]:
    return [{"role": "assistant", "content": text} for text in texts]


def written(tmp_path, rows: list[dict], **settings):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return prepare(file, tmp_path / "out", TOKENIZER, heldout=0, overwrite=True, **settings)


FORMATS = {
    "MiniMind": {"chosen": ASK + say("5"), "rejected": ASK + say("6")},
    "strings": {"prompt": "2+3?", "chosen": "5", "rejected": "6"},
    "explicit prompt": {"prompt": ASK, "chosen": say("5"), "rejected": say("6")},
    "prompt beside whole conversations": {"prompt": "2+3?", "chosen": ASK + say("5"), "rejected": ASK + say("6"),
                                          "score_chosen": 9.0, "messages": ASK + say("5")},
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_pairs(tmp_path, name):
    prepared = written(tmp_path, [FORMATS[name]])
    assert prepared.kind == "preference" and prepared.manifest["rows"]["skipped"] == 0
    for i, answer in enumerate("56"):
        ids, learned = prepared.split("train").get(i)
        expected = encode_chat(TOKENIZER, ASK + say(answer))
        assert (ids.tolist(), learned.astype(bool).tolist()) == expected


def learned_text(prepared, i: int) -> str:
    ids, learned = prepared.split("train").get(i)
    return TOKENIZER.decode(ids[learned > 0].tolist())


def test_only_what_follows_the_common_prompt_is_learned(tmp_path):
    before = [{"role": "system", "content": "Be brief."}, *ASK, *say("five"), {"role": "user", "content": "sure?"}]
    rows = [{"chosen": before + say("yes"), "rejected": before + say("no")},
            {"chosen": ASK + [CALL, RESULT] + say("it is 5"), "rejected": ASK + [CALL, RESULT] + say("it is 6")},
            {"chosen": ASK + [CALL, RESULT] + say("5"), "rejected": ASK + say("I can not add.")}]
    prepared = written(tmp_path, rows)
    assert [learned_text(prepared, i) for i in range(4)] == [
        "yes<|im_end|>", "no<|im_end|>", "it is 5<|im_end|>", "it is 6<|im_end|>"]
    assert "add" in learned_text(prepared, 4) and learned_text(prepared, 5) == "I can not add.<|im_end|>"
    foreign = written(tmp_path, rows[:1], template=Template(APPENDING, MARKS))
    assert [learned_text(foreign, i) for i in (0, 1)] == ["yes<|im_end|>", "no<|im_end|>"]
    chat = written(tmp_path, [{"messages": before + say("yes")}])     # of one that is to be imitated, every answer
    assert learned_text(chat, 0) == "five<|im_end|>yes<|im_end|>"


REFUSED = {
    "the same": ({"chosen": ASK + say("5"), "rejected": ASK + say("5")}, "are the same, so neither is preferred"),
    "the same once told": ({"chosen": ASK + say("5"), "rejected": ASK + say("  5")}, "are the same"),
    "another question": ({"chosen": ASK + say("5"), "rejected": [{"role": "user", "content": "3+2?"}, *say("6")]},
                         "no prompt in common: message 0 differs, before the last answer"),
    "an earlier answer": ({"chosen": ASK + say("5") + ASK + say("5"), "rejected": ASK + say("6") + ASK + say("7")},
                          "no prompt in common: message 1 differs"),
    "a longer history": ({"chosen": ASK + say("5"), "rejected": ASK + say("5") + ASK + say("6")},
                         "no prompt in common: message 2 differs"),
    "empty": ({"prompt": "2+3?", "chosen": "5", "rejected": " "}, r"rejected: .*message 1 \(assistant\) is empty"),
    "empty, chosen": ({"chosen": ASK + say(""), "rejected": ASK + say("5")}, r"chosen: .*is empty"),
    "no answer": ({"chosen": ASK, "rejected": ASK + say("5")}, "chosen: no assistant turn"),
    "no answer of its own": ({"chosen": ASK + say("5"), "rejected": ASK + say("5") + [RESULT]},
                             "chosen ends without an answer of its own"),
    "ends in a result": ({"chosen": ASK + say("5"), "rejected": ASK + [CALL, RESULT]},
                         "rejected ends without an answer"),
    "results differ": ({"chosen": ASK + [CALL, RESULT] + say("5"),
                        "rejected": ASK + [CALL, RESULT | {"content": "6"}] + say("6")}, "a tool's result"),
    "no prompt": ({"chosen": say("5"), "rejected": say("6")}, "chosen answers no prompt"),
    "tools differ": ({"chosen": [ASK[0] | {"tools": [{"name": "add"}]}, *say("5")], "rejected": ASK + say("6")},
                     "different tools"),
    "texts without a prompt": ({"chosen": "Human: 2+3? Assistant: 5", "rejected": "Human: 2+3? Assistant: 6"},
                               'must be a list of messages, or an answer beside a "prompt"'),
    "label": ({"prompt": "2+3?", "completion": "5", "label": "true"}, '"label" must be true .* not a string'),
    "completion": ({"prompt": "2+3?", "completion": "", "label": True}, "prompt and completion: .*is empty"),
    "steps": ({"prompt": "2+3?", "steps": ["5"], "labels": [True]}, "rewards of steps"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_without_a_preference_are_refused_with_their_place(tmp_path, name):
    row, reason = REFUSED[name]
    good = {"prompt": "1?", "completion": "1", "label": True} if "label" in row else FORMATS["MiniMind"]
    prepared = written(tmp_path, [good, row])
    manifest = prepared.manifest
    assert manifest["rows"]["total"] == 2 and manifest["rows"]["skipped"] == 1 and manifest["rows"][prepared.kind] == 1
    assert len(prepared.split("train")) == (1 if "label" in row else 2)
    line = manifest["skipped"][0]
    assert line.startswith(f"{tmp_path}/a.jsonl:2: ")
    assert re.search(reason, line), line
    with pytest.raises(UserError, match=r"1 of the first 2 rows(.|\n)*a\.jsonl:2"):
        prepare(tmp_path / "a.jsonl", tmp_path / "strict", TOKENIZER, max_skipped=0)


def test_judged_answers_keep_their_labels(tmp_path):
    rows = [{"prompt": "2+3?", "completion": "5", "label": True},
            {"prompt": ASK, "completion": say("6"), "label": False},
            {"prompt": ASK + say("5") + ASK, "completion": say("five"), "label": 1}]
    prepared = written(tmp_path, rows * 3)
    made = prepared.split("train")
    assert prepared.kind == "unpaired" and made.labels.tolist() == [1, 0, 1] * 3
    assert [learned_text(prepared, i) for i in range(3)] == ["5<|im_end|>", "6<|im_end|>", "five<|im_end|>"]
    batch = next(RowSource(UnpairedRows(made, seq_len=99, shuffle=False), batch_size=3))
    assert batch.extra["label"].tolist() == [1, 0, 1]
    assert written(tmp_path, [FORMATS["strings"]]).split("train").labels is None
    with pytest.raises(UserError, match="unpaired rows and others"):
        written(tmp_path, [*rows, {"text": "a story"}])


# --------------------------------------------------------------------------------------------------------- learning

def test_a_tiny_model_learns_to_prefer():
    model, rows = tiny_model(1), rows_of("pairs")
    rows = rows.with_reference(reference_logps(rows, model, 8))
    run = make_run(model, RowSource(rows, batch_size=13), objective=DPO(), lr=3e-3)
    values = [train_step(run) for _ in range(40)]
    assert values[0]["loss"] == pytest.approx(np.log(2), abs=1e-3)
    assert values[-1]["accuracy"] == 1 and values[-1]["loss"] < 0.4 and values[-1]["margin"] > 1
