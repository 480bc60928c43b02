"""Fill in the middle (2207.14255): a text cut in three is all there, told in another order, and only where asked."""
from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindseed import cli
from mindseed.base.errors import UserError
from mindseed.data import fim
from mindseed.data.prepare import prepare
from mindseed.data.shards import Prepared
from mindseed.recipes.generate import HOLE, fill_prompt
from mindseed.tokenizers.base import BOS_ID, BUFFERS, EOS_ID, SPECIALS
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.hf_json import save_tokenizer

TOKENIZER = Byte()
MARKS = fim.markers(TOKENIZER)
TEXTS = ["a", "种", "👩‍👩‍👧‍👦", "e\u0301", "\u202eright to left", "春眠不觉晓，处处闻啼鸟。", "<|buffer_0|> is text\n", "\0\t"]
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "an answer"}]}
PAIR = {"chosen": CHAT["messages"], "rejected": [*CHAT["messages"][:1], {"role": "assistant", "content": "no"}]}


def restored(ids: list[int]) -> bytes:
    """The text of a rearranged document; every mark must be there once, in the order prefix, suffix, middle."""
    assert ids[0] == BOS_ID and ids[-1] == EOS_ID
    assert [id for id in ids if id in TOKENIZER.specials.values()] == [BOS_ID, *MARKS, EOS_ID] and ids[1] == MARKS[0]
    suffix, middle = ids.index(MARKS[1]), ids.index(MARKS[2])
    before, after, between = ids[2:suffix], ids[suffix + 1:middle], ids[middle + 1:-1]
    return b"".join(TOKENIZER.tokens[id] for id in before + between + after)


def prepared(folder, rows, **options) -> Prepared:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return prepare(file, folder / "out", TOKENIZER, **{"heldout": 0} | options)


def documents(prepared: Prepared, split: str = "train") -> list[list[int]]:
    some = prepared.split(split)
    return [some.get(i)[0].tolist() for i in range(len(some))]


@settings(max_examples=300, deadline=None)
@given(UNICODE, st.integers(0, 2**63 - 1))
def test_the_parts_of_any_text_are_the_text(text, seed):
    parts = fim.chosen(text, 1.0, seed)
    assert "".join(parts) == text and parts == fim.chosen(text, 1.0, seed)
    assert fim.chosen(text, 0.0, seed) is None
    ids = fim.fim_ids(tuple(TOKENIZER.encode(part) for part in parts), MARKS)
    assert restored([BOS_ID, *ids, EOS_ID]) == text.encode()


def test_cuts_fall_everywhere_and_follow_from_the_seed():
    cuts = [tuple(map(len, fim.chosen("0123456789", 1.0, seed))) for seed in range(2000)]
    assert {c[0] for c in cuts} == {c[1] for c in cuts} == {c[2] for c in cuts} == set(range(11))
    assert all(sum(c) == 10 for c in cuts) and len(set(cuts)) == 66                      # every pair of cuts
    share = sum(fim.chosen(f"text {i}", 0.3, 5) is not None for i in range(3000)) / 3000
    assert abs(share - 0.3) < 0.03
    few = {i for i in range(500) if fim.chosen(f"text {i}", 0.1, 5)}
    assert few < {i for i in range(500) if fim.chosen(f"text {i}", 0.6, 5)}              # a higher rate only adds


def test_marks_are_reserved_ids_and_never_arise_from_text():
    assert MARKS == tuple(SPECIALS.index(name) for name in BUFFERS[:3])
    assert not set(TOKENIZER.encode(" ".join(BUFFERS))) & set(MARKS)
    assert TOKENIZER.decode(list(MARKS)) == "".join(BUFFERS[:3])
    assert TOKENIZER.decode(list(MARKS), skip_special=True) == ""


def test_a_tokenizer_with_marks_of_its_own_uses_them_and_one_without_is_refused():
    own = Byte()
    own.specials = {name: 400 + i for i, name in enumerate(fim.QWEN_MARKERS)} | own.specials
    assert fim.markers(own) == (400, 401, 402)
    bare = Byte()
    bare.specials = {name: id for name, id in bare.specials.items() if name != BUFFERS[1]}
    with pytest.raises(UserError, match="needs the special tokens .*fim_prefix"):
        fim.markers(bare)


def test_rate_0_changes_nothing_and_rate_1_every_text(tmp_path):
    rows = [{"text": text} for text in TEXTS]
    for name in ("never", "always"):
        (tmp_path / name).mkdir()
    plain = documents(prepared(tmp_path / "never", rows))
    assert plain == [[BOS_ID, *TOKENIZER.encode(text), EOS_ID] for text in TEXTS]
    cut = prepared(tmp_path / "always", rows, fim_rate=1.0)
    assert [restored(ids) for ids in documents(cut)] == [text.encode() for text in TEXTS]
    assert cut.split("train").bytes.tolist() == [len(text.encode()) for text in TEXTS]    # of the text, not the marks
    totals = cut.manifest["splits"]["train"]
    assert totals["supervised"] == totals["tokens"] - totals["documents"] == sum(map(len, plain)) + 2 * len(TEXTS)
    assert cut.manifest["fim_rate"] == 1.0


def test_conversations_preferences_and_held_out_texts_stay_whole(tmp_path):
    chats = [{"messages": [{"role": "user", "content": f"q {i}"}, CHAT["messages"][1]]} for i in range(20)]
    for rate in (0.0, 1.0):
        (tmp_path / str(rate)).mkdir()
        (tmp_path / f"{rate}p").mkdir()
    one, two = (documents(prepared(tmp_path / str(rate), chats, fim_rate=rate)) for rate in (0.0, 1.0))
    assert one == two
    one, two = (documents(prepared(tmp_path / f"{rate}p", [PAIR], fim_rate=rate)) for rate in (0.0, 1.0))
    assert one == two and len(one) == 2
    (tmp_path / "split").mkdir()
    both = prepared(tmp_path / "split", [{"text": f"text {i}"} for i in range(60)], fim_rate=1.0, heldout=0.3)
    assert all(MARKS[0] in ids for ids in documents(both))
    held = documents(both, "heldout")
    assert held and not any(set(MARKS) & set(ids) for ids in held)


def test_the_same_for_any_number_of_workers_and_another_seed_cuts_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr("mindseed.data.encode.CHUNK_ROWS", 8)
    monkeypatch.setattr("mindseed.data.prepare.INLINE_BYTES", 0)
    rows, made = [{"text": f"the text of row {i}, 第{i}行"} for i in range(50)], {}
    for name, options in {"one": {"workers": 1}, "two": {"workers": 2}, "other": {"workers": 1, "seed": 1}}.items():
        (tmp_path / name).mkdir()
        made[name] = documents(prepared(tmp_path / name, rows, fim_rate=0.5, **options))
    assert made["one"] == made["two"] != made["other"]
    told = [restored(ids) if MARKS[0] in ids else TOKENIZER.decode(ids[1:-1]).encode() for ids in made["other"]]
    assert told == [row["text"].encode() for row in rows]


def test_the_option_of_prepare_is_recorded_and_another_rate_is_another_folder(tmp_path, capsys):
    save_tokenizer(TOKENIZER, tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_text('{"text": "one two three"}\n')
    command = ["prepare", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--tokenizer",
               str(tmp_path / "tokenizer"), "--heldout", "0", "--fim_rate"]
    assert cli.main([*command, "1"]) == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["fim_rate"] == 1.0
    assert restored(documents(Prepared(tmp_path / "out"))[0]) == b"one two three"
    assert cli.main([*command, "0.5"]) == 2
    assert "fim_rate was 1.0, is 0.5" in capsys.readouterr().err
    assert cli.main([*command, "1.5", "--overwrite"]) == 2
    assert "fim_rate = 1.5 must lie between 0 and 1" in capsys.readouterr().err


def test_the_option_of_train_reaches_the_data(tmp_path):
    save_tokenizer(TOKENIZER, tmp_path / "tokenizer")
    rows = [{"text": f"{i} and {i} make {2 * i}"} for i in range(8)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = cli.main(f"train --data.train {tmp_path}/a.jsonl --data.tokenizer {tmp_path}/tokenizer --out {tmp_path}/run "
                    "--data.fim_rate 1 --data.heldout 0 --data.seq_len 32 --loop.steps 1 --loop.batch 2 "
                    "--model.layers 1 --model.dim 16 --model.heads 2 --model.kv_heads 1 --model.head_dim 8 "
                    "--model.ffn_dim 16".split())
    assert code == 0
    made = Prepared(tmp_path / "run" / "data" / "0-a")
    assert made.manifest["fim_rate"] == 1.0
    assert sorted(map(restored, documents(made))) == sorted(row["text"].encode() for row in rows)


def test_a_gap_is_asked_for_as_it_was_trained(tmp_path, capsys):
    """The prompt is what stands before the middle in a training document; texts without one gap are refused."""
    parts = ("def area(r): return ", "3.14", " * r")
    prompt = fill_prompt(f"{parts[0]}{HOLE}{parts[2]}", Byte())
    whole = [Byte().specials["<|im_start|>"], *fim.fim_ids(tuple(map(Byte().encode, parts)), fim.markers(Byte()))]
    assert whole == prompt + Byte().encode(parts[1])
    for text in ("no gap", f"{HOLE} and {HOLE}"):
        with pytest.raises(UserError, match="needs <fill> once"):
            fill_prompt(text, Byte())
    texts, chats = tmp_path / "texts.jsonl", tmp_path / "chats.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{i} is a number"}) + "\n" for i in range(30)))
    chats.write_text("".join(json.dumps({"messages": [{"role": "user", "content": f"{i}?"},
                                                      {"role": "assistant", "content": "yes"}]}) + "\n"
                             for i in range(30)))
    save_tokenizer(Byte(), tmp_path / "byte")
    train = ["train", "--data.tokenizer", str(tmp_path / "byte"), "--depth", "2", "--data.seq_len", "48",
             "--loop.steps", "2", "--loop.batch", "2", "--data.fim_rate", "0.5"]
    assert cli.main([*train, "--data.train", str(texts), "--out", str(tmp_path / "run")]) == 0
    assert "no effect" not in capsys.readouterr().err
    model = str(tmp_path / "run" / "model")
    assert cli.main(["generate", model, "--mode", "fim", "--prompt", f"1 {HOLE} number", "--max-new", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] > 0
    assert cli.main([*train, "--data.train", str(chats), "--out", str(tmp_path / "other")]) == 0
    assert "data.fim_rate has no effect: there are only conversations" in capsys.readouterr().err
    capsys.readouterr()                           # a run's folder is shown with the run's own settings
    assert cli.main(["show-batch", str(tmp_path / "run"), "--rows", "1"]) == 0
    said = capsys.readouterr().out
    assert "of 48 slots" in said and str(tmp_path / "run" / "data" / "0-texts") in said
    assert cli.main(["show-batch", str(tmp_path / "run"), "--entry", "1"]) == 2
    assert "was trained on 1 entries" in capsys.readouterr().err
