"""Reading: every format gives the same rows, and every kind of damage has a place and a reason."""
from __future__ import annotations

import gzip
import json

import pytest

from mindseed.base.errors import UserError
from mindseed.data import formats, readers
from mindseed.data.readers import BadRow, kind_of, read_rows, row_texts

ROWS = [{"text": "two\nlines"}, {"text": "汉字 and emoji 🦊"},
        {"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def texts(*paths):
    return [(row.line, row.row) for row in read_rows(paths)]


def reasons(path):
    found = []
    rows = list(read_rows([path], bad=lambda file, line, reason: found.append((line, reason))))
    return rows, found


def test_every_container_gives_the_same_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\n", 1))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES[:40]) + gzip.compress(LINES[40:]))
    assert [row for _, row in texts(tmp_path / "a.jsonl")] == ROWS
    assert [line for line, _ in texts(tmp_path / "a.jsonl")] == [1, 3, 4]
    assert texts(tmp_path / "a.jsonl.gz") == list(enumerate(ROWS, 1))


def test_zstd(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    whole = b"".join(zstandard.compress(part) for part in (LINES[:40], LINES[40:]))
    (tmp_path / "a.jsonl.zst").write_bytes(whole)
    assert texts(tmp_path / "a.jsonl.zst") == list(enumerate(ROWS, 1))
    (tmp_path / "a.jsonl.zst").write_bytes(whole[:-9])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst:\d+: .*truncated"):
        texts(tmp_path / "a.jsonl.zst")


def test_parquet_that_stores_a_shared_text_once_is_not_unfolded_at_once(tmp_path):
    """400 rows of the same megabyte: a file of a megabyte, and a batch of a few megabytes, not 400."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    pa.parquet.write_table(pa.table({"text": ["x" * 1_000_000] * 400}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 2_000_000
    before, most = pa.total_allocated_bytes(), 0
    for count, row in enumerate(read_rows([tmp_path / "a.parquet"]), 1):
        most = max(most, pa.total_allocated_bytes() - before)
        assert len(row.row["text"]) == 1_000_000
    assert count == 400 and most < 30_000_000


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    reasoned = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!", "reasoning_content": "hm"}]
    rows = [{"messages": reasoned}, {"messages": ROWS[2]["conversations"]}, {"text": "a"}]
    pa.parquet.write_table(pa.table({key: [row.get(key) for row in rows] for key in ("messages", "text")}),
                           tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == list(enumerate(rows, 1))      # absent keys do not come back as nulls
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="not a readable parquet"):
        texts(tmp_path / "a.parquet")


def test_text_files_lose_nothing_and_are_cut_at_blank_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "TEXT_PIECE_BYTES", 100)
    poem = "".join(f"line {i} 春眠不觉晓\n" + "\n" * (i % 7 == 0) for i in range(200))
    endless = "字" * 5000
    (tmp_path / "poem.txt").write_text(poem)
    (tmp_path / "endless.txt").write_text(endless)
    pieces = list(read_rows([tmp_path / "poem.txt"]))
    assert "".join(p.row["text"] for p in pieces) == poem
    assert len(pieces) > 10 and all(p.row["text"].endswith("\n\n") for p in pieces[:-1])
    for p in pieces:
        assert poem.split("\n")[p.line - 1] == p.row["text"].split("\n")[0]
    cut = [row["text"] for _, row in texts(tmp_path / "endless.txt")]
    assert "".join(cut) == endless and len(cut) > 10
    (tmp_path / "poem.txt").write_text("one\n<|endoftext|>\ntwo\n")
    assert [row["text"] for _, row in texts(tmp_path / "poem.txt")] == ["one\n", "two\n"]


def test_folders_and_globs_in_a_fixed_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl.gz", "README.md", ".hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    names = [p.relative_to(tmp_path).as_posix() for p in readers.expand([tmp_path, tmp_path / "b*.jsonl"])]
    assert names == ["a.jsonl", "b.jsonl", "sub/c.jsonl.gz"]


@pytest.mark.parametrize("line, reason", [
    (b'{"text": "a"', "corrupt JSON"),
    (b'["a"]', "a list, not an object"),
    (b'{"text": 3}', '"text" is a number'),
    (b'{"text": " "}', "empty"),
    (b'{"txt": "a", "id": 1}', r'unknown schema: the keys are "txt", "id"; accepted are .*conversations'),
    (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"),
    (b"[" * 100_000, "corrupt JSON"),
    (b'{"text": "' + b"a" * 300 + b'"}', "longer than"),
], ids=lambda x: str(x)[:20])
def test_a_bad_line_has_a_place_and_a_reason(tmp_path, monkeypatch, line, reason):
    if reason == "longer than":
        monkeypatch.setattr(formats, "MAX_LINE_BYTES", 128)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "also good"}\n')
    with pytest.raises(UserError, match=rf"a\.jsonl:2: .*{reason}"):
        texts(path)
    rows, found = reasons(path)
    assert [row.row["text"] for row in rows] == ["good", "also good"] and [line for line, _ in found] == [2]


@pytest.mark.parametrize("name, data, reason", [
    ("a.jsonl", b"", "is empty"), ("a.jsonl", b"\n \n", "is empty"), ("a.txt", b"", "is empty"),
    ("a.jsonl", b"\x00\x01\x02", "binary"), ("a.txt", "hi".encode("utf-16"), "binary"),
    ("a.jsonl", gzip.compress(LINES, mtime=0), r"compressed: name it \.jsonl\.gz"),
    ("a.jsonl.gz", LINES, "damaged"),
    ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-12], r"a\.jsonl\.gz:\d+: .*truncated"),
    ("a.csv", b"x", "only .*parquet.* files are read"), ("a.json", b"[]", "jq"),
], ids=lambda x: str(x)[:20])
def test_a_bad_file_is_refused(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=reason):
        texts(tmp_path / name)


def test_missing_files_are_named(tmp_path):
    for path in ("absent.jsonl", "*.jsonl"):
        with pytest.raises(UserError, match="does not exist|no file matches"):
            texts(tmp_path / path)
    with pytest.raises(UserError, match="holds no file of a known kind"):
        texts(tmp_path)


@pytest.mark.parametrize("row, kind, found", [
    ({"text": "a"}, "text", ["a"]),
    (ROWS[2], "chat", ["hi", "yo"]),
    ({"messages": [{"role": "assistant", "reasoning_content": "why", "content": ""}]}, "chat", ["why"]),
    ({"instruction": "do", "input": "", "output": "done", "text": "whole prompt"}, "chat", None),
    ({"question": "2+2?", "answer": "4"}, "chat", ["2+2?", "4"]),
    ({"question": "Where?", "answer": "Here.", "text": "a document"}, "text", None),
    ({"prompt": "q", "chosen": "good", "rejected": "bad"}, "preference", ["q", "good", "bad"]),
    ({"prompt": "q", "completion": "good", "label": False}, "unpaired", ["q", "good"]),
    ({"prompt": "q", "steps": ["one", "two"], "labels": [1, 0]}, "steps", ["q", "one", "two"]),
    ({"prompt": "q", "completions": ["one"], "labels": [True]}, "steps", ["q", "one"]),
])
def test_kinds_and_their_texts(row, kind, found):
    assert kind_of(row) == kind
    assert found is None or list(row_texts(row)) == found


def test_no_kind():
    with pytest.raises(BadRow, match='the keys are "query", "answer"'):
        kind_of({"query": "?", "answer": "!"})
