"""Malformed files and odd options: every one ends in one or two lines and exit code 2, never in a traceback."""
from __future__ import annotations

import io
import json
import shutil
import sys

import pytest
import torch

from mindseed.base.errors import UserError
from mindseed.base.files import misfit, read_json
from mindseed.base.log import read_jsonl
from mindseed.cli import main
from mindseed.infer.sample import Chooser, Sampling, choose
from mindseed.interop.directory import load_directory, save_directory
from mindseed.models.config import config_from_dict, config_to_dict
from mindseed.models.lm import build
from mindseed.models.presets import Shape
from mindseed.recipes import chat
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.hf_json import save_tokenizer
from mindseed.train.state import Checkpoints

SHAPE = ["--model.layers", "1", "--model.dim", "16", "--model.heads", "2", "--model.kv_heads", "1",
         "--model.head_dim", "8", "--model.ffn_dim", "16", "--device", "cpu"]
NESTED = "[" * 100_000
WHOLE = ["", "[]", '"x"', "3", "null", NESTED, "1" * 5000, "\0", "\udcff", "a folder"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model, a tokenizer, rows of text and the same prepared."""
    root = tmp_path_factory.mktemp("made")
    config = Shape(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, ffn_dim=16)
    model = build(config.lm_config(vocab_size=Byte().vocab_size, seq_len=64))
    save_directory(model, Byte(), root / "base" / "model")
    save_tokenizer(Byte(), root / "tok")
    (root / "text.jsonl").write_text("".join(json.dumps({"text": f"number {i} of these"}) + "\n" for i in range(40)))
    assert main(["prepare", str(root / "text.jsonl"), "--out", str(root / "data"), "--tokenizer", str(root / "tok"),
                 "--heldout", "0.2"]) == 0
    return root


@pytest.fixture
def fails(capsys, monkeypatch):
    """Run a command that must fail as a user's mistake does; returns what it said."""
    def run(*argv, stdin: str | bytes = "", lines: int = 3) -> str:
        raw = io.BytesIO(stdin if isinstance(stdin, bytes) else stdin.encode())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw, encoding="utf-8"))
        capsys.readouterr()
        assert main([str(word) for word in argv]) == 2
        said = capsys.readouterr().err
        assert "error: " in said and said.count("\n") <= lines, said
        return said
    return run


def spoil(path, text):
    """Put `text` in the place of a file, or a folder."""
    path.unlink()
    if text == "a folder":
        path.mkdir()
    else:
        path.write_bytes(text.encode(errors="surrogateescape"))


# -------------------------------------------------------------------------------------------------------------- JSON

@pytest.mark.parametrize("value, shape, problem", [
    ({"a": 1}, {"a": int, "b?": str}, None), ({"a": 1}, {"a": float}, None), ({}, {"a": int}, "a is missing"),
    ({"a": True}, {"a": int}, "a must be a whole number, not the boolean true"), ([1, "x"], [int], "[1] must be"),
    ({"a": [{"b": None}]}, {"a": [{"b": str | None}]}, None), ([], {"a?": int}, "the whole must be an object"),
    ({"a": [{"b": 2}]}, {"a": [{"b": str}]}, "a[0].b must be a string, not the number 2"),
    ({"x": {"y": 1.5}}, {str: {str: int}}, "x.y must be a whole number")])
def test_shapes_of_json(value, shape, problem):
    said = misfit(value, shape)
    assert said is None if problem is None else problem in said


@pytest.mark.parametrize("text", WHOLE)
@pytest.mark.parametrize("name", ["config.json", "mindseed.json", "generation_config.json", "tokenizer.json",
                                  "tokenizer_config.json"])
def test_files_of_a_model(made, fails, tmp_path, name, text):
    shutil.copytree(made / "base" / "model", tmp_path / "m")
    spoil(tmp_path / "m" / name, text)
    assert name in fails("generate", tmp_path / "m", "--prompt", "hi", "--device", "cpu")


@pytest.mark.parametrize("name, key, value", [
    ("config.json", "model_type", []), ("config.json", "hidden_size", 1.5), ("config.json", "vocab_size", 10**30),
    ("config.json", "num_key_value_heads", True), ("config.json", "num_hidden_layers", -1),
    ("mindseed.json", "config", []),
    ("mindseed.json", "config", {"kind": []}),
    ("generation_config.json", "eos_token_id", 1.5), ("generation_config.json", "eos_token_id", [[]]),
    ("generation_config.json", "temperature", "x"), ("generation_config.json", "temperature", 10**30),
    ("generation_config.json", "top_k", 1.5)])
def test_values_of_a_model(made, fails, tmp_path, name, key, value):
    shutil.copytree(made / "base" / "model", tmp_path / "m")
    if name == "config.json":
        (tmp_path / "m" / "mindseed.json").unlink()                   # else the two would only be said to differ
    path = tmp_path / "m" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert key in fails("generate", tmp_path / "m", "--prompt", "hi", "--device", "cpu")


@pytest.mark.parametrize("change", [{"layers": "x"}, {"layers": [None]}, {"mtp": 3}, {"dim": 1.5}, {"dim": 10**30},
                                    {"norm": 3}, {"tied": None}])
def test_types_of_a_configuration(made, change):
    good = config_to_dict(load_directory(made / "base" / "model").model.config)
    assert config_from_dict(good).dim == 16
    with pytest.raises(UserError, match=next(iter(change))):
        config_from_dict(good | change)


@pytest.mark.parametrize("recipe", ["show-batch", "prepare"])
@pytest.mark.parametrize("text", [*WHOLE, "{}", '{"schema": 1}', '{"schema": 1, "tokenizer_hash": "x"}', "shards"])
def test_manifests(made, fails, tmp_path, recipe, text):
    shutil.copytree(made / "data", tmp_path / "data")
    if text == "shards":
        text = json.dumps(json.loads((tmp_path / "data" / "manifest.json").read_text())
                          | {"splits": {"train": {"shards": [None]}}})
    spoil(tmp_path / "data" / "manifest.json", text)
    words = ["--rows", "1"] if recipe == "show-batch" else ["--out", tmp_path / "data", "--tokenizer", made / "tok",
                                                            "--heldout", "0.2"]
    assert "data" in fails(recipe, tmp_path / "data" if recipe == "show-batch" else made / "text.jsonl", *words)


@pytest.mark.parametrize("header", ["[]", '{"ids": 3}',
                                    '{"ids": {"dtype": "F99", "shape": [1], "data_offsets": [0, 2]}}',
                                    '{"ids": {"dtype": "U16", "shape": [9], "data_offsets": [0, 2]}}', NESTED,
                                    '{"ids": {"dtype": "U16", "shape": [1], "data_offsets": [0, 2]}}'])
def test_shards(made, fails, tmp_path, header):
    shutil.copytree(made / "data", tmp_path / "data")
    path = tmp_path / "data" / "train" / "00000.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"xx")
    assert "00000.safetensors" in fails("show-batch", tmp_path / "data")


@pytest.mark.parametrize("text", [*WHOLE, "{}", '{"format": 1, "files": {"trainer.pt": 3}, "fingerprints": {}}'])
def test_checkpoints(tmp_path, text):
    """A damaged one is passed over as a truncated one is; a damaged best.json says how to go on."""
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "step-old").mkdir()
    (tmp_path / "step-00000002" / "checkpoint.json").touch()
    (tmp_path / "best.json").touch()
    for path in (tmp_path / "step-00000002" / "checkpoint.json", tmp_path / "best.json"):
        spoil(path, text)
    found = Checkpoints(tmp_path, keep=1, fingerprints={})
    with pytest.raises(UserError, match="no whole checkpoint is left"):
        found.newest()
    with pytest.raises(UserError, match="delete it|best.json cannot be read|best.json is not text"):
        found.best_of_run()


@pytest.mark.parametrize("line", ["[]", "{}", '{"step": "1"}', "garbage", NESTED, "\udcff"])
def test_a_log_names_its_damaged_line(tmp_path, line):
    log = tmp_path / "log.jsonl"
    log.write_bytes(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n{{"st'.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="log.jsonl:2 is damaged"):
        read_jsonl(log)


def test_the_folder_one_is_in(made, monkeypatch):
    monkeypatch.chdir(made / "base" / "model")
    assert load_directory(".").family


# ------------------------------------------------------------------------------------------------------------ options

@pytest.mark.parametrize("words, said", [
    *((f"--{name} {value}", name.rpartition(".")[2]) for name in (
        "optim.lr", "optim.max_norm", "loop.minutes", "data.heldout", "objective.z_loss", "loop.ema", "model.theta")
      for value in ("nan", "inf")),
    ("--objective.label_smoothing 1.5", "[0, 1)"), ("--objective.z_loss=-1", "z_loss"), ("--optim.beta1 1", "beta1"),
    ("--optim.beta2=-0.1", "beta2"),
    ("--device mps", "mps"), ("--device xpu", "runs on cpu"),
    ("--device meta", "meta"),
    ("--device cpu:9", "counted from 0"), ("--device cuda:99", "cuda"), ("--device gpu", "not a device"),
    ("--loop.batch 1 --world 2", "multiple of 2"), ("--data.seq_len 99999999999", "seq_len"),
    ("--depth 99999", "depth"),
    ("--loop.minutes 1e300", "minutes"), ("--model.moe.experts 0", "experts"), ("--model.mla.kv_rank 4 "
     "--model.mla.q_rank 0", "q_rank")])
def test_options(fails, words, said):
    if said == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    assert said in fails("plan", *words.split())


@pytest.mark.parametrize("text", ["loop = []", "optim.lr = nan", "a = " + "[" * 9999, "x = " + "9" * 5000, "[loop",
                                  "seed = 1979-05-27", 'out = "\\u0000"', "\udcff"])
def test_presets(fails, tmp_path, text):
    path = tmp_path / "p.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    fails("plan", path)
    fails("plan", tmp_path / "p.toml" / "..")


def test_what_was_meant(made, fails):
    file, base = made / "text.jsonl", made / "base"
    assert f"--data.train {file}?" in fails("train", file)
    assert "--data.train" not in fails("train", made / "nowhere.jsonl")
    said = fails("train", "--data.train", made / "data", "--model.start", base, "--out", made / "run")
    assert f"did you mean {base / 'model'}?" in said
    assert f"did you mean {base / 'model'}?" in fails("chat", base, "--prompt", "hi")


@pytest.mark.parametrize("words", ["--first 9999999999999999999999", "--first -1", "--rows 99999999999",
                                   "--seq_len 99999999999", "--seq_len 0"])
def test_rows_to_show(made, fails, words):
    fails("show-batch", made / "data", *words.split())


@pytest.mark.parametrize("words", ["--temperature 1e-39", "--temperature nan", "--temperature 1e39", "--top_p nan",
                                   "--min_p nan", "--repetition_penalty 1e-300", "--seed 99999999999999999999",
                                   "--device meta"])
@pytest.mark.parametrize("recipe", ["chat", "generate"])
def test_sampling(made, fails, recipe, words):
    fails(recipe, made / "base" / "model", "--prompt", "hi", *words.split())


def test_logits_that_are_not_finite():
    with pytest.raises(UserError, match="not finite"):
        choose(torch.full((1, 3), torch.nan), [Chooser.of(Sampling(), 0, [1], 3)])


# --------------------------------------------------------------------------------------------------------------- text

CHAT = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], '
ROWS = ['{"text": "a", "b": ' + NESTED, NESTED, '{"text": "a", "n": ' + "1" * 5000 + "}", '{"text": "a\\ud800"}',
        '{"\\ud800": 1}', '{"chosen": "a", "rejected": "b"}', '{"chosen": ["a"], "rejected": ["b"]}',
        '{"chosen": null, "rejected": null}', '{"text": null}', CHAT + f'"tools": "{NESTED}"}}', CHAT + '"tools": 3}',
        '{"messages": [null]}', '{"instruction": 3, "output": 4}', '{"instruction": "a", "output": "b", "input": [1]}']


@pytest.mark.parametrize("row", ROWS)
def test_rows(made, fails, tmp_path, row):
    """A bad row is named by its place; where bad rows are put up with, its reason can be written down."""
    (tmp_path / "d.jsonl").write_text('{"text": "good"}\n' + row + "\n")
    words = ["prepare", tmp_path / "d.jsonl", "--tokenizer", made / "tok", "--heldout", "0", "--out", tmp_path / "out"]
    assert "d.jsonl:2: " in fails(*words, "--max_skipped", "0", lines=4)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert main([*map(str, words), "--max_skipped", "1"]) == 0


@pytest.mark.parametrize("row, kind", [
    ('{"text": "hello", "conversations": null}', "text"), (CHAT.replace("{", '{"conversations": null, ', 1) + '"text": '
                                                           "null}", "chat")])
def test_a_null_key_is_absent(made, tmp_path, row, kind):
    (tmp_path / "d.jsonl").write_text(row + "\n")
    assert main(["prepare", str(tmp_path / "d.jsonl"), "--tokenizer", str(made / "tok"), "--heldout", "0", "--out",
                 str(tmp_path / "out")]) == 0
    assert read_json(tmp_path / "out" / "manifest.json")["kind"] == kind


@pytest.mark.parametrize("recipe", ["chat", "generate"])
def test_text_in_another_encoding(made, fails, recipe):
    said = fails(recipe, made / "base" / "model", "--device", "cpu", stdin="中文\n".encode("gbk"))
    assert "iconv -f GBK -t UTF-8" in said


@pytest.mark.parametrize("line", [NESTED, '{"prompt": ' + "1" * 5000 + "}", '{"prompt": "\\ud800"}', "3",
                                  '{"messages": [{"role": "user", "content": "q"}], "tools": "' + NESTED + '"}'])
def test_prompts(made, fails, line):
    assert "stdin:1: " in fails("generate", made / "base" / "model", "--input", "jsonl", "--device", "cpu", stdin=line)


def test_a_conversation_is_not_saved_over_a_folder(made, tmp_path):
    talk = chat.Conversation(load_directory(made / "base" / "model"), Sampling(), max_new=2)
    (tmp_path / "old.jsonl").write_bytes(b"\xff\n")
    for path in (tmp_path, tmp_path / "old.jsonl"):
        with pytest.raises(UserError, match=path.name):
            chat.command(talk, f"/save {path}")
