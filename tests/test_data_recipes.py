"""The commands `prepare` and `show-batch`, called as a user calls them."""
from __future__ import annotations

import json

import pytest
from rich.text import Text

from mindseed import cli
from mindseed.data.loader import PackedSource
from mindseed.data.shards import MemoryDocuments
from mindseed.recipes.show_batch import STYLES, paint
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.chat import encode_chat
from mindseed.tokenizers.hf_json import save_tokenizer

CHAT = [{"role": "user", "content": "Wer?"}, {"role": "assistant", "content": "Ich 🦊."}]


@pytest.fixture
def files(tmp_path):
    save_tokenizer(Byte(), tmp_path / "tokenizer")
    rows = [{"messages": CHAT}, {"text": "A tale of 汉字."}, {"messages": CHAT[:1]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_prepare_then_show(files, capsys):
    command = ["prepare", str(files / "a.jsonl"), "--out", str(files / "out"),
               "--tokenizer", str(files / "tokenizer"), "--heldout", "0"]
    assert cli.main(command) == 0
    seen = capsys.readouterr()
    assert "3 rows of kind chat" in seen.out and "2 documents" in seen.out
    assert "a.jsonl:3: no assistant turn" in seen.err.replace("\n", " ")
    assert cli.main(["show-batch", str(files / "out"), "--rows", "1", "--seq-len", "128"]) == 0
    shown = capsys.readouterr().out
    assert "Ich 🦊.<|im_end|>" in shown and "A tale of 汉字.<|im_end|>" in shown
    assert "a.jsonl:1" in shown and "a.jsonl:2" in shown and "slots of padding" in shown
    assert "⟦learned⟧   only read   ▌ a document begins" in shown                    # a pipe has no colours
    assert "\n⟦Ich 🦊.<|im_end|>⟧" in shown and "Wer?⟧" not in shown


def test_a_folder_above_prepared_data_is_told_of_them(files, capsys):
    run = files / "runs" / "x"
    (run / "data" / "0-a").mkdir(parents=True)
    assert cli.main(["show-batch", str(run)]) == 2
    assert "mindseed prepare FILES --out FOLDER " in capsys.readouterr().err         # never into a folder in use
    assert cli.main(["prepare", str(files / "a.jsonl"), "--out", str(run / "data" / "0-a"), "--tokenizer",
                     str(files / "tokenizer"), "--heldout", "0"]) == 0
    for place in (run, run / "data", run.parent):
        capsys.readouterr()
        assert cli.main(["show-batch", str(place)]) == 2
        assert capsys.readouterr().err.endswith(f"did you mean {run / 'data' / '0-a'}?\n")


@pytest.mark.parametrize("command, message", [
    (["prepare", "--out", "x"], "--paths is required"),
    (["prepare", "a.jsonl", "--out", "x", "--tokenizer", "absent.json"], "absent.json does not exist"),
    (["show-batch"], "--data is required"),
    (["show-batch", "absent"], "absent holds no prepared data"),
])
def test_mistakes_leave_with_exit_code_2(command, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(command) == 2
    assert message in capsys.readouterr().err


def test_colours_say_what_is_learned():
    tokenizer = Byte()
    source = PackedSource(MemoryDocuments([encode_chat(tokenizer, CHAT)]), seq_len=90, batch_size=1)
    text: Text = paint(next(source), 0, tokenizer, ["here:1"])
    by_style = {style: "".join(text.plain[s.start:s.end] for s in text.spans if s.style == style)
                for style in STYLES.values()}
    assert by_style["green"] == "Ich 🦊.<|im_end|>"
    assert by_style["bold cyan"] == "▌here:1 "
    assert by_style["bright_black"].startswith("<|im_start|>user\nWer?<|im_end|>\n<|im_start|>assistant\n\n")
