"""What `mindseed convert` refuses: exit code 2, a line that names the file or the tensor, and nothing half-written."""
from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindseed import cli
from mindseed.interop.directory import save_directory
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.hf_json import save_tokenizer
from tests.test_minimind import SHAPES, original

INDEX = "model.safetensors.index.json"
Q = "model.layers.1.self_attn.q_proj.weight"
MODEL, STATE = original(SHAPES["dense"])


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    save_directory(MODEL, Byte(), folder / "whole")
    save_directory(MODEL, Byte(), folder / "shards", max_shard=20_000)
    return folder


@pytest.fixture
def refused(tmp_path, capsys):
    """Convert, and check that it was refused well; returns the words of the error."""
    def run(source: Path, *more: str) -> str:
        before = sorted(p for p in tmp_path.rglob("*"))
        assert cli.main(["convert", str(source), str(tmp_path / "out"), *more]) == 2
        said = capsys.readouterr()
        assert not said.out and said.err.startswith("error: ") and said.err.count("\n") <= 2, said.err
        assert len(said.err) < 900 and "Traceback" not in said.err and "\x1b" not in said.err
        assert sorted(p for p in tmp_path.rglob("*")) == before
        return said.err
    return run


def broken(sources: Path, tmp_path: Path, kind: str = "whole", **files) -> Path:
    """A copy of a source in which JSON files were changed: `config={"hidden_act": "gelu"}`, or replaced by a list."""
    folder = Path(shutil.copytree(sources / kind, tmp_path / "in"))
    for name, change in files.items():
        path = next(folder.glob(f"{name}*.json"))
        data = json.loads(path.read_text())
        path.write_text(json.dumps(data | change if isinstance(change, dict) else change))
    return folder


def test_the_sources_are_well(sources, tmp_path, capsys):
    for kind in ("whole", "shards"):
        assert cli.main(["convert", str(sources / kind), str(tmp_path / kind)]) == 0
    assert "DIFFERENT" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- directories

@pytest.mark.parametrize("files, words", [
    ({"config": {"model_type": "gpt_neox"}}, ["config.json", "'gpt_neox'", "reads qwen3, llama"]),
    ({"config": {"model_type": ["qwen3"]}}, ["config.json", "['qwen3']"]),
    ({"config": {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}}, ["config.json", "'longrope'"]),
    ({"config": {"rope_parameters": "yarn"}}, ["config.json"]),
    ({"config": {"rope_parameters": {"rope_type": "linear"}}}, ["config.json", "rope scaling linear lacks 'factor'"]),
    ({"config": {"hidden_size": 32.0}}, ["config.json", "hidden_size must be a whole number", "32.0"]),
    ({"config": {"num_hidden_layers": "3"}}, ["config.json", "num_hidden_layers must be a whole number", "'3'"]),
    ({"config": [1]}, ["config.json", "must be an object, not the list"]),
    ({"config": None}, ["config.json", "must be an object, not null"]),
    ({"mindseed": []}, ["mindseed.json", "must be an object, not the list"]),
    ({"generation": []}, ["generation_config.json", "must be an object, not the list"]),
    ({"generation": {"eos_token_id": "<|im_end|>"}}, ["eos_token_id must be", "<|im_end|>"]),
    ({"tokenizer_config": []}, ["tokenizer_config.json", "must be an object, not the list"]),
    ({"tokenizer": []}, ["tokenizer.json"]),
    ({"tokenizer": {"model": {"type": "Unigram"}}}, ["tokenizer.json", "Unigram"]),
])
def test_files_of_json_that_cannot_be_read(sources, tmp_path, refused, files, words):
    said = refused(broken(sources, tmp_path, **files))
    assert all(word in said for word in words), said


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop(Q), ["1 missing", Q]),
    (lambda t: t.update({"model.extra.weight": torch.ones(2)}), ["1 unexpected", "model.extra.weight"]),
    (lambda t: t.update({Q: torch.ones(3, 4)}), ["1 wrongly shaped", f"{Q} is [3, 4] instead of [24, 32]"]),
    (lambda t: t.update({Q: t[Q].to(torch.int8)}), [Q, "int8"]),
    (lambda t: t.update({Q: t[Q].double()}), [Q, "float64"]),
])
def test_tensors_that_do_not_fit(sources, tmp_path, refused, change, words):
    folder = broken(sources, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    said = refused(folder)
    assert all(word in said for word in [str(folder) if Q not in words else "", *words]), said


def test_shards(sources, tmp_path, refused):
    folder = broken(sources, tmp_path, "shards")
    index, files = folder / INDEX, sorted(folder.glob("model-*"))
    assert len(files) > 2
    about, second = json.loads(index.read_text()), files[1].read_bytes()
    files[1].write_bytes(second[:-7])
    assert "truncated" in (said := refused(folder)) and files[1].name in said
    files[1].unlink()
    assert f"{INDEX} names {files[1].name}, which is not there" in refused(folder)
    files[1].write_bytes(second)
    for wrong in ({}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}}):
        index.write_text(json.dumps(wrong))
        assert INDEX in (said := refused(folder)) and ("weight_map" in said or "names no tensor" in said)
    index.write_text(json.dumps({"weight_map": about["weight_map"] | {"a": "../model.safetensors"}}))
    assert f"{INDEX} names ../model.safetensors, outside its folder" in refused(folder)
    some = {name: file for name, file in about["weight_map"].items() if file != files[1].name}
    index.write_text(json.dumps({"weight_map": some}))
    assert "missing: " in refused(folder)
    index.write_text(json.dumps(about))
    name, first = next(iter(load_file(files[0]).items()))
    save_file({name: first + 1} | load_file(files[2]), files[2])
    assert f"holds {name}, which another of these files holds too" in refused(folder)


def test_targets(sources, tmp_path, refused, capsys):
    source = broken(sources, tmp_path)
    assert "'gpt2' is no family" in refused(source, "--to", "gpt2")
    assert "does not normalise queries and keys" in refused(source, "--to", "llama")
    assert "has a mixture of experts" in refused(source, "--to", "qwen3-moe")
    assert "latent attention" in refused(source, "--to", "deepseek_v3")
    assert "dtype='int8' is not known" in refused(source, "--dtype", "int8")
    assert "dtype='q8_0' is only written with --to gguf" in refused(source, "--dtype", "q8_0")
    assert "has no effect" in refused(source, "--tokenizer", str(source))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    assert "exists already; choose another place or add --overwrite" in refused(source)
    assert "no model directory, so it is not overwritten" in refused(source, "--overwrite")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"
    shutil.rmtree(tmp_path / "out")
    assert cli.main(["convert", str(source), str(tmp_path / "out")]) == 0
    capsys.readouterr()
    (source / "model.safetensors").write_bytes(b"")
    kept = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert "truncated" in refused(source, "--overwrite")              # what was there stays when the source is bad
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == kept


def test_sources_that_are_not_there(sources, tmp_path, refused):
    folder = broken(sources, tmp_path)
    torch.save(STATE, folder / "full_sft_32.pth")
    assert "fullsft.pth does not exist; beside it there is" in (said := refused(folder / "fullsft.pth"))
    assert "full_sft_32.pth" in said
    assert "no such folder" in refused(tmp_path / "model")
    (folder / "notes.txt").write_text("x")
    assert "notes.txt is a file of a kind that is not read" in refused(folder / "notes.txt")
    (folder / "config.json").unlink()
    assert "no config.json" in refused(folder)


# ----------------------------------------------------------------------------------------------------------- pickles

class Stranger:
    """Unpickling this runs a command."""

    def __reduce__(self):
        return os.mkdir, ("the-code-of-a-stranger-has-run",)


class Module(torch.nn.Linear):
    """torch.save of a whole model pickles its class."""


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", "directory"])
@pytest.mark.parametrize("how", ["zip", "legacy", "plain pickle"])
def test_a_pickle_that_would_run_code_is_not_run(tmp_path, refused, monkeypatch, suffix, how):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "in"
    if suffix == "directory":
        save_directory(MODEL, Byte(), folder)
        (folder / "model.safetensors").unlink()
        file = folder / "pytorch_model.bin"
    else:
        save_tokenizer(Byte(), folder)
        file = folder / f"x{suffix}"
    contents = STATE | {"model.norm.weight": Stranger()}
    if how == "plain pickle":
        file.write_bytes(pickle.dumps({"a": Stranger()}, protocol=2))
    else:
        torch.save(contents, file, _use_new_zipfile_serialization=how == "zip")
    said = refused(folder if suffix == "directory" else file)
    assert file.name in said and "not read" in said and "mkdir" in said
    assert not (tmp_path / "the-code-of-a-stranger-has-run").exists()


@pytest.mark.parametrize("contents, words", [
    (Module(2, 2), ["Module", "state_dict() alone"]),
    ([torch.ones(1)], ["no bare state dict", "list"]),
    ({}, ["no bare state dict", "empty"]),
    ({"model": STATE, "optimizer": {}, "epoch": 3}, ["beside tensors it holds model, optimizer, epoch"]),
    ({7: torch.ones(1)}, ["beside tensors it holds 7"]),
    ({k: x for k, x in STATE.items() if k != Q}, ["1 missing", Q]),
    (STATE | {"model.extra": torch.ones(1)}, ["1 unexpected", "model.extra"]),
    (STATE | {"model.layers.x.y": torch.ones(1)}, ["1 unexpected", "model.layers.x.y"]),
    (STATE | {Q: torch.ones(2, 2)}, ["1 wrongly shaped", Q]),
    (STATE | {Q: STATE[Q].to(torch.int8)}, [Q, "int8"]),
    (STATE | {Q: STATE[Q].double()}, [Q, "float64"]),
    (STATE | {"model.embed_tokens.weight": torch.ones(9)}, ["model.embed_tokens.weight has the shape [9]"]),
    (STATE | {"model.layers.0.self_attn.q_norm.weight": torch.ones(5)}, ["head_dim=5 must be even"]),
    (STATE | {"model.layers.0.self_attn.q_norm.weight": torch.ones(0)}, ["q_norm.weight has the shape [0]"]),
    (STATE | {"model.layers.0.self_attn.q_norm.weight": torch.tensor(1.0)}, ["q_norm.weight has the shape []"]),
    ({k: x for k, x in STATE.items() if "q_norm" not in k}, ["number of heads cannot be inferred"]),
])
def test_state_dicts_of_another_kind(tmp_path, refused, contents, words):
    save_tokenizer(Byte(), tmp_path / "in")
    torch.save(contents, tmp_path / "in" / "x.pth")
    said = refused(tmp_path / "in" / "x.pth")
    assert all(word in said for word in ["x.pth", *words]), said
    assert "config.json" not in said                                  # there is none


def test_tokenizers_of_state_dicts(tmp_path, refused):
    (tmp_path / "out2").mkdir()
    torch.save(STATE, tmp_path / "out2" / "x.pth")
    assert "--tokenizer DIR" in refused(tmp_path / "out2" / "x.pth")
    assert "does not exist" in refused(tmp_path / "out2" / "x.pth", "--tokenizer", str(tmp_path / "out2"))
    save_tokenizer(Byte(), tmp_path / "model")
    data = (tmp_path / "out2" / "x.pth").read_bytes()
    (tmp_path / "out2" / "cut.pth").write_bytes(data[:-100])
    assert "cut.pth is truncated" in refused(tmp_path / "out2" / "cut.pth")
    small = STATE | {name: STATE["model.embed_tokens.weight"][:9] for name in STATE if name.endswith(
        ("embed_tokens.weight", "lm_head.weight"))}
    torch.save(small, tmp_path / "out2" / "small.pth")
    assert "tokens but the model only 9" in refused(tmp_path / "out2" / "small.pth")
