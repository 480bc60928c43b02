"""Going on with a run: what holds, what is derived anew, what is refused, and what a damaged folder gets."""
from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from mindseed.base.config import load_toml, parse
from mindseed.base.errors import UserError
from mindseed.base.files import write_json
from mindseed.cli import main
from mindseed.data import pack
from mindseed.data.prepare import prepare
from mindseed.data.shards import Prepared
from mindseed.interop.directory import save_directory
from mindseed.models.lm import build
from mindseed.models.presets import Shape
from mindseed.recipes import run_folder
from mindseed.recipes.options import TrainOptions, derive
from mindseed.recipes.run_folder import claim, given_to
from mindseed.tokenizers import bpe_train
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.hf_json import save_tokenizer
from mindseed.train.state import Checkpoints
from tests.tiny import Fixed, random_batch, tiny_model
from tests.test_train import make_run

SHAPE = """--model.layers 1 --model.dim 16 --model.heads 2 --model.kv_heads 1 --model.head_dim 8 --model.ffn_dim 16
--device cpu --data.seq_len 32""".split()


@pytest.fixture
def texts(tmp_path) -> Path:
    rows = [{"text": f"the number {i} and what follows it, {i + 1}"} for i in range(60)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare([tmp_path / "texts.jsonl"], tmp_path / "texts", Byte())
    return tmp_path / "texts"


@pytest.fixture
def go(texts, tmp_path, capsys):
    """Run `mindseed train` and return what it said on both streams."""
    def run(*words, code: int = 0, data: bool = True) -> str:
        some = ["--data.train", str(texts), *SHAPE] if data else ["--device", "cpu"]
        capsys.readouterr()
        assert main(["train", "--out", str(tmp_path / "run"), *some, *map(str, words)]) == code
        said = "".join(capsys.readouterr())
        assert "Traceback" not in said
        return said
    return run


def kept(folder: Path) -> TrainOptions:
    return load_toml(TrainOptions, folder / "config.toml")


def test_a_longer_run_has_the_intervals_of_its_length(go, tmp_path):
    go("--loop.steps", 20, "--loop.batch", 4)
    assert (kept(tmp_path / "run").loop.validate_every, kept(tmp_path / "run").loop.sample_every) == (2, 5)
    said = go("--resume", "--loop.steps", 40, data=False)
    now = kept(tmp_path / "run").loop
    assert (now.validate_every, now.sample_every, now.save_every, now.batch) == (4, 10, 4, 4)
    assert "loop.validate_every: 2 then, 4 now" in said
    assert given_to(tmp_path / "run").loop.validate_every is None and given_to(tmp_path / "run").loop.steps == 40


def test_a_rate_that_jumps_is_said(go):
    go("--loop.steps", 10, "--optim.lr", 0.01, "--schedule.warmup_steps", 1)
    said = go("--resume", "--loop.steps", 100, data=False)
    assert "the learning rate at step 10: 0.00278 then, 0.01 now" in said
    assert "learning rate at" not in go("--resume", "--loop.steps", 100, "--loop.keep", 3, data=False)


@pytest.mark.parametrize("flag,value", [("--loop.epochs", 3), ("--loop.tokens_per_param", 0.5),
                                        ("--loop.minutes", 0.01)])
def test_how_long_may_be_said_anew_in_other_words(go, tmp_path, flag, value, monkeypatch):
    monkeypatch.setattr("mindseed.recipes.train.steps_for_minutes", lambda run, minutes: 33)
    go("--loop.steps", 3, "--loop.batch", 4)
    said = go("--resume", flag, value, data=False)
    steps = kept(tmp_path / "run").loop.steps
    assert steps > 3 and f"loop.steps: 3 then, {steps} now" in said and "no effect" not in said
    if flag == "--loop.minutes":
        assert steps == 33
        monkeypatch.setattr("mindseed.recipes.train.steps_for_minutes", lambda run, minutes: 1 / 0)
        assert "nothing is left to do" in go("--resume", flag, value, data=False)     # not timed again
        assert "nothing is left to do" in go("--resume", data=False)


def test_tokens_per_param_given_once_is_no_warning_later(go):
    go("--loop.tokens_per_param", 0.2)
    assert "no effect" not in go("--resume", data=False)


def test_another_number_of_ranks_cuts_the_batch_otherwise(go, tmp_path, monkeypatch):
    go("--loop.steps", 2, "--data.seq_len", 512, "--loop.batch", 32)
    before = kept(tmp_path / "run").loop
    assert (before.batch, before.micro_batch) == (32, 8)
    options = parse(TrainOptions, ["--out", str(tmp_path / "run"), "--resume", "--loop.batch", "none"],
                    under=run_folder.options_of_run)
    for world, micro in ((2, 8), (8, 4), (32, 1)):
        derived = derive(claim(options, tmp_path / "run"), params=1000, rows_per_epoch=10, world=world)
        assert (derived.loop.batch, derived.loop.micro_batch) == (32, micro)
    with pytest.raises(UserError, match="multiple"):
        derive(claim(options, tmp_path / "run"), params=1000, rows_per_epoch=10, world=3)


def test_a_run_that_was_moved_goes_on_where_it_is(go, tmp_path, monkeypatch):
    go("--loop.steps", 2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "run").rename(tmp_path / "runs" / "train")                # the folder that is meant if none is named
    assert main(["train", "--resume", "--loop.steps", "4", "--device", "cpu"]) == 0
    assert not (tmp_path / "run").exists() and kept(tmp_path / "runs" / "train").loop.steps == 4


def test_another_start_is_refused_unless_it_was_only_moved(go, tmp_path):
    go("--loop.steps", 2)
    start = shutil.copytree(tmp_path / "run" / "model", tmp_path / "start")
    assert "not from" in go("--resume", "--init", start, code=2, data=False)
    shutil.rmtree(tmp_path / "run")
    words = ["--data.train", tmp_path / "texts", "--data.seq_len", 32]
    go("--init", start, "--loop.steps", 2, *words, data=False)
    other = shutil.copytree(start, tmp_path / "other")
    assert f"started from {start}, not from {other}" in go("--resume", "--loop.steps", 3, "--init", other, code=2,
                                                           data=False)
    shutil.rmtree(start)
    said = go("--resume", "--loop.steps", 3, code=2, data=False)
    assert "--model.start" in said and str(start) in said
    go("--resume", "--loop.steps", 3, "--init", other, data=False)
    assert given_to(tmp_path / "run").model.start == str(other)


@pytest.mark.parametrize("name", ["given.toml", "config.toml"])
@pytest.mark.parametrize("text", ["loop = 3", "nonsense = 1", "[", "", "[loop]\nsteps = 'many'"])
def test_damaged_options_of_a_run(go, tmp_path, name, text):
    go("--loop.steps", 2)
    (tmp_path / "run" / name).write_text(text)
    if text:                                                             # an empty file means the defaults
        assert name in go("--resume", "--loop.steps", 4, code=2, data=False)


def test_a_damaged_run_json_costs_nothing(go, tmp_path):
    go("--loop.steps", 2)
    (tmp_path / "run" / "run.json").write_text("{")
    go("--resume", "--loop.steps", 3, data=False)


def test_a_refused_start_leaves_no_folder_and_removes_none(go, tmp_path):
    wrong = ["--loop.steps", 2, "--model.head_dim", 7]
    go(*wrong, code=2)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    go(*wrong, code=2)
    assert (tmp_path / "run").is_dir()
    (tmp_path / "run" / ".lock").unlink(missing_ok=True)
    (tmp_path / "run").rmdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    go(*wrong, code=2)
    assert (tmp_path / "run").is_symlink() and (tmp_path / "elsewhere").is_dir()


@pytest.mark.parametrize("words,said", [
    (["--trackers", "wandbb"], "'wandbb' is not known"), (["--trackers", "swanlab"], "-m pip install swanlab"),
    (["--model.heads", 3, "--model.kv_heads", 2], "heads=3"), (["--model.head_dim", 7], "must be even"),
    (["--init", "START", "--depth", 2], "brings its own shape"),
    (["--init", "START", "--data.tokenizer", "OTHER"], "another tokenizer"),
    (["--data.train", "PAIRS"], "preference pairs")])
def test_what_will_fail_fails_before_the_data_are_tokenised(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, find=importlib.util.find_spec: (
        None if name == "swanlab" else find(name)))
    rows = [{"text": f"the number {i}"} for i in range(30)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"chosen": pair, "rejected": pair}) + "\n")
    config = Shape(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, ffn_dim=16)
    save_directory(build(config.lm_config(vocab_size=Byte().vocab_size, seq_len=64)), Byte(), tmp_path / "start")
    save_tokenizer(bpe_train.train(["other words"], vocab_size=300), tmp_path / "other")
    places = {"START": tmp_path / "start", "OTHER": tmp_path / "other", "PAIRS": tmp_path / "pairs.jsonl"}
    monkeypatch.setattr("mindseed.recipes.training_data.prepare_entry", lambda *_: 1 / 0)
    command = ["train", "--out", tmp_path / "run", "--device", "cpu", "--loop.steps", 2,
               *(["--data.train", tmp_path / "texts.jsonl"] if "--data.train" not in words else []), *words]
    assert main([str(places.get(word, word)) for word in command]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_start_that_failed_before_its_first_step_may_be_given_again(go, tmp_path, monkeypatch):
    raw = ["--data.train", tmp_path / "texts.jsonl", "--data.vocab_size", 300, "--device", "cpu", "--loop.steps", 2]
    monkeypatch.setattr("mindseed.recipes.train.fit", lambda plan: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([str(word) for word in ["train", "--out", tmp_path / "run", *raw]])
    assert (tmp_path / "run" / "config.toml").exists()
    monkeypatch.undo()
    assert main([str(word) for word in ["train", "--out", tmp_path / "run", *raw, "--data.vocab_size", 320][:-4]
                 + ["--data.seq_len", "64", "--loop.steps", "2"]]) == 0
    assert "already holds a run" in go("--loop.steps", 2, code=2)


def test_data_that_a_refused_start_prepared_otherwise_are_prepared_again(tmp_path, capsys, texts):
    save_tokenizer(Byte(), tmp_path / "byte")
    save_tokenizer(bpe_train.train(["the number", "and what"], vocab_size=300), tmp_path / "other")
    command = ["train", "--out", tmp_path / "run", "--data.train", tmp_path / "texts.jsonl", *SHAPE, "--loop.steps", 2]
    prepare([tmp_path / "texts.jsonl"], tmp_path / "run" / "data" / "0-texts", Byte(), heldout=0.3)
    assert main([str(word) for word in [*command, "--data.tokenizer", tmp_path / "other"]]) == 0


def test_a_longer_row_than_the_model_knows_is_said(go, tmp_path):
    go("--loop.steps", 2)
    (tmp_path / "run").rename(tmp_path / "base")
    more = ["--init", tmp_path / "base" / "model", "--data.train", tmp_path / "texts", "--data.seq_len", 64,
            "--loop.steps", 2]
    assert "`mindseed extend`" in go(*more, data=False)


def test_rows_are_as_long_as_the_start_was_trained_on(go, tmp_path, capsys):
    """Where nothing is said: no warning of positions that it has never seen, and so when the run goes on."""
    go("--loop.steps", 2)
    (tmp_path / "run").rename(tmp_path / "base")
    more = ["train", "--model.start", tmp_path / "base/model", "--data.train", tmp_path / "texts", "--out",
            tmp_path / "run", "--loop.batch", 2, "--loop.steps"]
    assert main([str(word) for word in [*more, 2]]) == 0
    assert kept(tmp_path / "run").data.seq_len == 32
    assert main([str(word) for word in [*more, 3, "--resume"]]) == 0
    said = capsys.readouterr()
    assert "has never seen" not in said.err and "changed    data" not in said.out
    assert kept(tmp_path / "run").data.seq_len == 32


def test_every_step_is_in_the_log_and_a_run_by_the_clock_takes_its_whole_batch(go, tmp_path):
    go("--loop.minutes", 0.02, "--loop.micro_batch", 2, "--loop.batch", 8)
    loop = kept(tmp_path / "run").loop
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(loop.steps + 1)) and loop.batch == 8
    assert max(row.get("supervised", 0) for row in rows) > 6 * 32                  # of 8 x 32
    go("--resume", "--loop.steps", loop.steps + 2, data=False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(loop.steps + 3))


def test_a_batch_by_the_clock_is_the_one_that_is_taken(go, tmp_path, monkeypatch):
    monkeypatch.setattr("mindseed.recipes.options.batch_rows", lambda *_, **__: 8)
    monkeypatch.setattr("mindseed.recipes.train.steps_for_minutes", lambda run, minutes: 3)
    go("--loop.minutes", 1, "--loop.micro_batch", 2)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert kept(tmp_path / "run").loop.batch == 8 and max(row.get("supervised", 0) for row in rows) > 6 * 32


def test_a_run_keeps_its_precision(go, tmp_path, monkeypatch):
    go("--loop.steps", 2, "--loop.precision", "bf16")
    given = (tmp_path / "run" / "given.toml").read_text().replace('precision = "bf16"', 'precision = "auto"')
    (tmp_path / "run" / "given.toml").write_text(given)
    go("--resume", "--loop.steps", 3, data=False)
    assert kept(tmp_path / "run").loop.precision == "bf16"


def test_whether_checkpoints_are_gone_is_judged_by_the_intervals_of_the_run(go, tmp_path):
    go("--loop.steps", 20, "--loop.batch", 2)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert "no checkpoint any more" in go("--resume", "--loop.steps", 400, code=2, data=False)


def test_a_run_without_its_config_is_still_a_run(go, tmp_path):
    go("--loop.steps", 2)
    (tmp_path / "run" / "config.toml").unlink()
    assert "already holds a run" in go("--loop.steps", 2, code=2)
    assert "has lost its config.toml" in go("--loop.steps", 4, "--resume", code=2)


@pytest.mark.parametrize("name", ["lr", "steps", "batch"])
def test_a_config_that_lost_a_derived_value(go, tmp_path, name):
    go("--loop.steps", 2)
    config = tmp_path / "run" / "config.toml"
    config.write_text("".join(line for line in config.read_text().splitlines(True) if not line.startswith(f"{name} =")))
    assert "has lost" in go("--resume", "--loop.steps", 4, code=2, data=False)


def test_a_start_model_is_not_written_over_and_is_known_by_any_spelling(go, tmp_path, monkeypatch):
    go("--loop.steps", 2)
    (tmp_path / "base").mkdir()
    (tmp_path / "run" / "model").rename(tmp_path / "base" / "model")
    shutil.rmtree(tmp_path / "run")
    words = ["--data.train", tmp_path / "texts", "--data.seq_len", 32, "--loop.steps"]
    shutil.copytree(tmp_path / "base" / "model", tmp_path / "run" / "model")
    assert "would be written over" in go("--init", tmp_path / "run" / "model", *words, 2, code=2, data=False)
    shutil.rmtree(tmp_path / "run")
    go("--init", tmp_path / "base" / "model", *words, 2, data=False)
    go("--resume", "--init", f"{tmp_path}/base/../base/model/", *words, 3, data=False)


# ------------------------------------------------------------------------------------------------ kept packing plans

def planned(folder: Path) -> pack.Plan:
    return pack.plan(Prepared(folder).split("train"), 32)


def test_a_finished_plan_needs_no_lock(texts, monkeypatch):
    first = planned(texts)
    monkeypatch.setattr(pack, "locked", lambda path: 1 / 0)
    assert np.array_equal(planned(texts).segments, first.segments)


def test_a_plan_that_may_not_be_written_is_made_in_memory(texts, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(pack, "locked", refuse)
    made = planned(texts)
    assert made.mapped is None and not list((texts / "train").glob("plans/best*"))
    monkeypatch.undo()
    assert np.array_equal(planned(texts).segments, made.segments)


def zero_the_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40] + bytes(40))


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "plan.safetensors").unlink(),
    lambda folder: (folder / "plan.safetensors").write_bytes((folder / "plan.safetensors").read_bytes()[:-3]),
    lambda folder: (folder / "stats.json").write_text("{"),
    lambda folder: zero_the_end(folder / "plan.safetensors"),
    lambda folder: folder.rename(folder.with_name(f".{folder.name}.old"))])
def test_a_damaged_plan_is_made_again(texts, damage):
    first = planned(texts).segments.copy()
    damage(next(texts.rglob("plan.safetensors")).parent)
    again = planned(texts)
    assert again.mapped is not None and np.array_equal(again.segments, first)


# --------------------------------------------------------------------------------------------------------- checkpoints

def saved_at(folder: Path, *steps: int, scores: tuple = ()) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep=3, fingerprints={})
    run = make_run(tiny_model(), Fixed([random_batch(2, 8)]))
    for step, score in zip(steps, scores or [None] * len(steps)):
        run.step = step
        checkpoints.save(run, None, score=score)
    return checkpoints


def test_a_checkpoint_whose_list_lacks_its_file_is_passed_over(tmp_path, capsys):
    checkpoints = saved_at(tmp_path, 1, 2)
    about = tmp_path / "step-00000002" / "checkpoint.json"
    write_json(about, json.loads(about.read_text()) | {"files": {}})
    assert checkpoints.newest()[0].name == "step-00000001" and "lists no trainer.pt" in capsys.readouterr().out


def test_a_score_that_is_no_number_is_never_the_best(tmp_path):
    checkpoints = saved_at(tmp_path, 1, 2, 3, scores=(math.nan, 2.0, math.inf))
    assert checkpoints.best_of_run() == {"checkpoint": "step-00000002", "score": 2.0}
    (tmp_path / "best.json").write_text('{"checkpoint": "step-00000001", "score": NaN}')
    again = Checkpoints(tmp_path, keep=3, fingerprints={})
    again.newest()
    assert again.best is None


def test_a_checkpoint_moved_aside_by_a_kill_is_found(tmp_path):
    saved_at(tmp_path, 1, 2)
    (tmp_path / "step-00000002").rename(tmp_path / ".step-00000002.old")
    assert Checkpoints(tmp_path, keep=3, fingerprints={}).newest()[0].name == "step-00000002"


def test_a_mesh_of_another_number_of_ranks_is_not_remembered(tmp_path, capsys, monkeypatch):
    for name in ("config.toml", "given.toml"):
        (tmp_path / name).write_text("[parallel]\ntensor = 2\nzero = 1\n")
    options = TrainOptions(out=str(tmp_path), resume="newest")
    assert "parallel" not in run_folder.options_of_run(options)
    assert "does not suit 1 rank(s)" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run_folder.options_of_run(options)["parallel"]["tensor"] == 2 and not capsys.readouterr().err


def test_a_folder_with_other_things_is_warned_of(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "config.toml").write_text("")
    claim(TrainOptions(out=str(tmp_path)), tmp_path)
    assert "holds other things (notes.txt), and the run is" in capsys.readouterr().err
    (tmp_path / "notes.txt").unlink()
    claim(TrainOptions(out=str(tmp_path)), tmp_path)
    claim(TrainOptions(out=str(tmp_path / "new")), tmp_path / "new")
    assert not capsys.readouterr().err
