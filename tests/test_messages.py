"""What a newcomer is told: an error names the remedy that fits, and help is true."""
from __future__ import annotations

import errno
import importlib
import os
import random
import re
import sys

import pytest
import torch

from benchmarks import __main__ as benchmarks
from mindseed import cli
from mindseed.base.config import leaves
from mindseed.base.errors import UserError
from mindseed.base.files import atomic
from mindseed.recipes.options import TrainOptions
from mindseed.recipes.tokenizer import read_texts
from mindseed.train.state import compare


@pytest.mark.parametrize("name", ["train_step", "engine", "moe"])
def test_a_benchmark_without_transformers_names_the_remedy(name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)               # as if it were not installed
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit) as left:
        importlib.import_module(f"benchmarks.{name}").main()
    said = capsys.readouterr().err
    assert left.value.code == 2 and f"make bench ARGS={name} " in said and len(said.splitlines()) == 1
    assert name in benchmarks.ALL


def test_a_plan_that_takes_years_says_so(capsys):
    assert cli.main(["plan", "--depth", "100"]) == 0
    said = capsys.readouterr()
    years = re.search(r"time +│ +([\d,]+ years)", said.out)[1]
    assert f"warning: this run would take {years}; take a smaller model" in said.err
    assert cli.main(["plan", "--depth", "2", "--loop.steps", "10"]) == 0
    assert "would take" not in capsys.readouterr().err


def complaint(capsys, *words: object) -> str:
    """What a mistake is told, with exit code 2."""
    capsys.readouterr()
    assert cli.main([*map(str, words)]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name, file", [("pyarrow", "x.parquet"), ("zstandard", "x.jsonl.zst")])
def test_a_missing_reader_is_installed_by_its_own_name(name, file, monkeypatch, capsys, tmp_path):
    """`mindseed[...]` would be looked for on an index, also by those who have a clone."""
    monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / file).write_bytes(b"x")
    said = complaint(capsys, "tokenizer", tmp_path / file, "--out", tmp_path / "t")
    assert said.endswith(f"-m pip install {name}\n")


def test_rows_of_another_kind_are_what_the_error_is_about(capsys, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"txt": "a"}\n' * 3)
    for words in (["tokenizer", tmp_path / "a.jsonl", "--out"],
                  ["train", "--data.train", tmp_path / "a.jsonl", "--loop.steps", 1, "--out"]):
        last = complaint(capsys, *words, tmp_path / "out").splitlines()[-1]
        assert last.startswith("error: no row holds text to learn from; 3 skipped, the first ")
        assert 'a.jsonl:1: unknown schema: the keys are "txt"; accepted are' in last
    (tmp_path / "a.jsonl").write_text('{"txt": "a"}\n{"text": "a"}\n')
    assert list(read_texts((str(tmp_path / "a.jsonl"),))) == ["a"]


def test_only_a_full_disk_asks_for_space(tmp_path):
    def failing(number: int, at: str | None = None) -> str:
        with pytest.raises(UserError) as caught, atomic(tmp_path / "x.jsonl") as temp:
            raise OSError(number, os.strerror(number), at or str(temp))
        return str(caught.value)

    assert "free some space" in failing(errno.ENOSPC) and "free some space" in failing(errno.EDQUOT)
    for number in (errno.ENOENT, errno.EACCES, errno.EROFS):
        assert "space" not in failing(number) and "; choose another place. " in failing(number)
    assert f"no file can be made in {tmp_path}" in failing(errno.ENOENT)                 # as in /proc
    assert "No such file" in failing(errno.ENOENT, at="something else")


@pytest.mark.parametrize("words, message", [
    (["train", "--loop.minutes"], '--loop.minutes needs a value: a number or "none"'),
    (["train", "--model.preset", "--seed", "3"], '--model.preset needs a value: a string or "none"'),
    (["chat", "--model"], "--model needs a value: a string")])
def test_a_flag_without_its_value(words, message, capsys):
    assert complaint(capsys, *words) == f"error: {message}\n"


def test_a_checkpoint_is_no_model_but_leads_to_one(capsys, tmp_path):
    step = tmp_path / "run" / "checkpoints" / "step-00000004"
    step.mkdir(parents=True)
    (step / "checkpoint.json").write_text("{}")
    assert "it is a checkpoint, from which its run can go on (--resume)" in complaint(capsys, "chat", step)
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    for place in (step, step.parent, step.parent.parent):
        assert complaint(capsys, "chat", place).endswith(f"did you mean {tmp_path / 'run' / 'model'}?\n")


def test_a_model_without_its_tokenizer(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mindseed"}')
    assert "tokenizer.json does not exist; copy it there" in complaint(capsys, "chat", tmp_path)


def test_noise_is_not_taken_for_code(capsys, tmp_path):
    for seed in range(200):
        noise = random.Random(seed).randbytes(2000)
        (tmp_path / "x.pth").write_bytes(noise if seed % 2 else b"\x80\x02" + noise)       # as a pickle begins
        said = complaint(capsys, "convert", tmp_path / "x.pth", tmp_path / "out")
        assert "not a file that torch.save wrote" in said and "stranger" not in said, seed
    torch.save({}, tmp_path / "x.pth")
    data = bytearray((tmp_path / "x.pth").read_bytes())
    data[data.rindex(b"PK\x06\x07") + 16] = 2                            # a zip on two disks
    (tmp_path / "x.pth").write_bytes(data)
    assert "not a file that torch.save wrote" in complaint(capsys, "convert", tmp_path / "x.pth", tmp_path / "out")


def test_what_differs_in_a_list_of_layers_is_named():
    layer = {"mixer": {"heads": 2, "window": None}, "dim": 8}
    wide = {"mixer": {"heads": 3, "window": None}, "dim": 8}
    assert compare({"layers": [layer] * 2, "shape": [1, 2]}, {"layers": [layer, wide, wide], "shape": [1, 3]}) == [
        "layers: 2 then, 3 now", "layers[1].mixer.heads: 2 then, 3 now", "shape: [1, 2] then, [1, 3] now"]
    assert compare({"layers": [layer]}, {"layers": [layer]}) == []


def test_help_shows_no_default_of_none(capsys, tmp_path):
    (tmp_path / "x.toml").write_text("[loop]\nsteps = 123\n")
    with pytest.raises(SystemExit) as left:
        cli.main(["train", str(tmp_path / "x.toml"), "--help"])
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert left.value.code == 0 and "default: None" not in words
    assert "steps between validations, 0: never [derived: a tenth of all] --loop.validate_documents" in words
    assert "tokens_per_param] (default: 123) --loop.minutes" in words and "(default: runs/train)" in words
    assert all(f"--{leaf.name}" in words for leaf in leaves(TrainOptions))
