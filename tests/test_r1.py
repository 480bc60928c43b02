"""The R1 pipeline on a world of one answer: every stage makes what the next one needs, and is not made twice."""
from __future__ import annotations

import json
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from mindseed.base.errors import UserError
from mindseed.base.files import locked
from mindseed.interop.directory import load_directory, save_directory
from mindseed.models.lm import build
from mindseed.models.presets import Shape
from mindseed.recipes import r1
from mindseed.recipes.model_options import ModelOptions
from mindseed.rl.rollout import hopeless
from mindseed.rl.trajectory import Trajectory
from mindseed.tasks.verify import thought_first
from mindseed.tokenizers import bpe_train
from mindseed.train.loop import Interrupted

COLOURS = ("red", "blue", "green", "white")


def problem(i: int) -> dict:
    return {"question": f"Is {COLOURS[i % 4]} a colour, number {i}?", "answer": "yes it is"}


def trace(i: int, thought: str | None) -> dict:
    said = {"role": "assistant", "content": "yes it is", **({"reasoning_content": thought} if thought else {})}
    return {"conversations": [{"role": "user", "content": problem(i)["question"]}, said]}


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> r1.Options:
    folder = tmp_path_factory.mktemp("r1")

    def write(name: str, rows: list[dict]) -> tuple[str, ...]:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return (str(folder / name),)

    problems = [problem(i) for i in range(40)]
    chats = [trace(i, f"{COLOURS[i % 4]} is one" if i % 3 else None) for i in range(60)]
    write("plain.jsonl", [trace(0, None)])
    tokenizer = bpe_train.train((json.dumps(row) for row in chats), vocab_size=320)
    model = build(Shape(layers=2, dim=48, heads=3, kv_heads=1, head_dim=16, ffn_dim=64).lm_config(
        vocab_size=tokenizer.vocab_size, seq_len=192), seed=0)
    save_directory(model, tokenizer, folder / "base")
    lesson = r1.LessonOptions(steps=60, batch=8, lr=5e-3)
    reinforce = r1.ReinforceOptions(steps=4, prompts=4, answers=4, max_new=32)
    return r1.Options(
        out=str(folder / "run"), base=str(folder / "base"), device="cpu", samples=2, optimizer="adamw", tag_weight=2.0,
        data=r1.R1Data(problems=write("problems.jsonl", problems), heldout=write("heldout.jsonl", problems[:8]),
                       traces=write("traces.jsonl", chats), general=write("general.jsonl", chats), seq_len=128),
        cold=lesson, first=reinforce, again=lesson, second=reinforce, small=replace(lesson, steps=20),
        student=ModelOptions(layers=1, dim=32, heads=2, kv_heads=1, head_dim=16, ffn_dim=48))


def stages(options: r1.Options) -> dict[str, dict]:
    return {row["stage"]: row for row in json.loads((Path(options.out) / "summary.json").read_text())["stages"]}


@pytest.fixture(scope="module")
def ran(options) -> r1.Options:
    assert r1.main(replace(options, until="rl")) == 0
    assert list(stages(options)) == ["base", "cold-start", "rl"]
    assert r1.main(options) == 0                  # goes on
    return options


def test_every_stage_is_run_and_graded(ran):
    found = stages(ran)
    assert list(found) == ["base", *(name for name in r1.STAGES if name != "rejection")]
    assert found["base"]["right"] == 0
    assert found["cold-start"]["right"] > 50 and found["cold-start"]["thinks"] > 50 and found["rl-again"]["right"] > 50
    student, base = (load_directory(path).model for path in (Path(ran.out) / "student/model", Path(ran.base)))
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in base.parameters())


def test_lessons_are_the_right_answers_and_no_two_alike(ran):
    rows = [json.loads(line) for line in (Path(ran.out) / "rejection/lessons.jsonl").read_text().splitlines()]
    assert rows and all(row["messages"][-1]["content"] == "yes it is" for row in rows)
    assert len({json.dumps(row) for row in rows}) == len(rows)
    traces = [json.loads(line) for line in (Path(ran.out) / "cold-start-traces.jsonl").read_text().splitlines()]
    assert traces and all(row["conversations"][-1].get("reasoning_content") for row in traces)


def test_what_is_done_is_not_done_again(ran):
    files = [*Path(ran.out).rglob("model.safetensors"), *Path(ran.out).rglob("log.jsonl")]
    before = {file: file.stat().st_mtime_ns for file in files}
    assert r1.main(ran) == 0
    assert {file: file.stat().st_mtime_ns for file in files} == before


def test_other_options_are_refused_in_the_same_folder(ran):
    with pytest.raises(UserError, match="other options: samples was 2, is 3.* --redo rejection"):
        r1.main(replace(ran, samples=3))
    with pytest.raises(UserError, match="other options: second.lr was 0.0003, is 0.1.* --redo rl-again"):
        r1.main(replace(ran, second=replace(ran.second, lr=0.1), small=replace(ran.small, steps=3)))


def test_a_stage_is_made_anew_with_other_options(ran, tmp_path, capsys):
    """And nothing before it is touched."""
    out = tmp_path / "run"
    shutil.copytree(ran.out, out)
    kept = {file: file.stat().st_mtime_ns for name in r1.STAGES[:4] for file in (out / name).rglob("*.safetensors")}
    other = replace(ran, out=str(out), small=replace(ran.small, steps=3))
    with pytest.raises(UserError, match="other options: samples was 2, is 3"):             # of an earlier stage
        r1.main(replace(other, samples=3, redo="student"))
    with pytest.raises(UserError, match="after --until rl"):
        r1.main(replace(other, until="rl", redo="student"))
    assert (out / "student/model").exists() and (out / "summary.json").read_bytes() == (
        Path(ran.out) / "summary.json").read_bytes()
    capsys.readouterr()
    assert r1.main(replace(other, redo="rl-again", until="rl-again")) == 0
    assert list(stages(other)) == list(stages(ran))[:-1] and not (out / "student").exists()
    assert r1.main(other) == 0
    said = capsys.readouterr().out
    assert "thrown away: rl-again, student" in said and all(
        re.search(rf"^{name}: .*% right", said, re.M) for name in ("rl-again", "student"))
    assert list(stages(other)) == list(stages(ran))
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert len((out / "student/log.jsonl").read_text().splitlines()) == 3
    with pytest.raises(UserError, match="small.steps was 3, is 20"):
        r1.main(replace(ran, out=str(out)))


def test_a_pipeline_goes_on_under_a_version_with_more_options(ran):
    path = Path(ran.out) / "summary.json"
    summary = json.loads(path.read_text())
    del summary["options"]["data.plain"], summary["options"]["tag_weight"]
    path.write_text(json.dumps(summary))
    summary["options"]["gone"] = {"of an older version": 1}
    path.write_text(json.dumps(summary))
    with pytest.raises(UserError, match="other options: tag_weight was 1.0, is 2.0"):      # 2 then, by default 1
        r1.main(ran)
    summary["options"]["tag_weight"] = 2.0
    path.write_text(json.dumps(summary))
    assert r1.main(ran) == 0


def test_another_length_of_graded_answers_grades_all_stages_again(ran, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(ran.out, out)
    other = replace(ran, out=str(out), until="rl-again", redo="rl-again", second=replace(ran.second, max_new=2))
    assert r1.main(other) == 0
    assert max(stage["tokens"] for stage in stages(other).values()) <= 2
    assert list(stages(other)) == list(stages(ran))[:-1]


def test_what_was_read_is_known_by_its_contents(ran, tmp_path):
    out, heldout, problems = tmp_path / "run", tmp_path / "heldout.jsonl", tmp_path / "problems.jsonl"
    for path, rows in ((heldout, [problem(i) for i in range(4)]), (problems, [problem(i) for i in range(8)])):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    here = replace(ran, out=str(out), zero=True, base=str(Path(ran.out) / "cold-start/model"),
                   first=replace(ran.first, steps=1), data=replace(ran.data, heldout=(str(heldout),),
                                                                   problems=(str(problems),)))
    assert r1.main(here) == 0
    heldout.write_text(json.dumps(problem(5)) + "\n")
    assert r1.main(here) == 0                      # graded again
    assert all(row["right"] in (0, 100) for row in stages(here).values())
    problems.write_text(json.dumps(problem(5)) + "\n")
    with pytest.raises(UserError, match="data.problems was .*--redo rl"):
        r1.main(here)


def test_problems_of_other_families_are_taken_anew_after_a_start_that_failed(ran, tmp_path):
    """Nothing of the first try is left to be learnt from."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps(problem(i) | {"family": "ab"[i % 2]}) + "\n" for i in range(20)))
    here = replace(ran, out=str(tmp_path / "run"), data=replace(ran.data, problems=(str(problems),)))
    for family in "ab":
        pipeline = r1.Pipeline(replace(here, data=replace(here.data, families=(family,))), torch.device("cpu"))
        (some,) = pipeline.problems_of_first()
        assert {json.loads(line)["family"] for line in Path(some).read_text().splitlines()} == {family}


def test_advice_names_options_that_there_are():
    said = hopeless(3, [Trajectory(ids=[1], mine=[True])], False)
    named = re.findall(r"first\.(\w+)", r1.in_section(said, "first"))
    assert named and "rollout." not in r1.in_section(said, "first")
    assert set(named) <= {f.name for f in fields(r1.ReinforceOptions)}


def test_two_at_once_in_one_folder_are_refused(ran):
    with locked(Path(ran.out) / ".lock"), pytest.raises(UserError, match="another process"):
        r1.main(ran)


def test_zero_begins_with_the_base(ran, tmp_path):
    """The base is already a model that answers, as a pretrained one may: here, the cold start's."""
    zero = replace(ran, out=str(tmp_path / "zero"), zero=True, base=str(Path(ran.out) / "cold-start/model"))
    assert r1.main(zero) == 0
    assert list(stages(zero)) == ["base", "rl"]


def test_zero_asks_a_base_in_plain_text(ran, tmp_path, capsys):
    zero = replace(ran, out=str(tmp_path / "zero"), zero=True, base=str(Path(ran.out) / "cold-start/model"),
                   data=replace(ran.data, plain="{question}", stop=("\n",)))
    with pytest.raises(UserError, match="stage rl: .*nothing to learn from.*first.answers") as error:
        r1.main(replace(zero, samples=9))         # as text it has never been asked
    assert "rollout." not in str(error.value)
    assert re.search(r"warning: without effect.*--zero.* samples", capsys.readouterr().err)
    said = (Path(zero.out) / "rl/config.toml").read_text()
    assert 'plain = "{question}"' in said and 'stop = ["\\n"]' in said
    with pytest.raises(UserError, match="are for --zero"):
        r1.main(replace(zero, zero=False))


def test_interrupted_is_told_and_goes_on(options, tmp_path, monkeypatch, capsys):
    here, real = replace(options, out=str(tmp_path / "run"), until="cold-start"), r1.train.train

    def stopped(*_):
        raise Interrupted("stopped by SIGINT")

    monkeypatch.setattr(r1.train, "train", stopped)
    assert r1.main(here) == 130
    assert "Give the same command again to go on" in capsys.readouterr().out
    monkeypatch.setattr(r1.train, "train", real)
    assert r1.main(here) == 0


@pytest.mark.parametrize("change, says", [
    (lambda o: replace(o, base=None), "which base model"),
    (lambda o: replace(o, samples=0), "samples=0"),
    (lambda o: replace(o, data=replace(o.data, trace_limit=0)), "trace_limit=0"),
    (lambda o: replace(o, cold=replace(o.cold, steps=0)), "cold: .*steps=0"),
    (lambda o: replace(o, small=replace(o.small, lr=-1.0)), "small: .*lr"),
    (lambda o: replace(o, second=replace(o.second, answers=1)), "second: .*second.answers=1"),
    (lambda o: replace(o, first=replace(o.first, steps=0)), "first: .*steps=0"),
    (lambda o: replace(o, seed=-1), "seed=-1"),
    (lambda o: replace(o, data=replace(o.data, heldout=())), "data.heldout is empty"),
    (lambda o: replace(o, data=replace(o.data, traces=())), "data.traces is empty"),
    (lambda o: replace(o, data=replace(o.data, traces=(o.data.general[0].replace("general", "plain"),))),
     "hold no conversation with thoughts"),
    (lambda o: replace(o, data=replace(o.data, families=("sums",))), "sums")])
def test_what_is_missing_is_said(options, tmp_path, change, says):
    with pytest.raises(UserError, match=says):
        r1.main(change(replace(options, out=str(tmp_path / "run"), until="rl", cold=r1.LessonOptions(steps=2))))
    assert not (tmp_path / "run").exists()        # said before anything is done


def test_what_is_too_long_for_the_model_is_not_right(ran, tmp_path):
    """Held-out problems that its context cannot hold still count among all."""
    more = tmp_path / "heldout.jsonl"
    long = problem(1) | {"question": problem(1)["question"] + " so" * 200}
    more.write_text("".join(json.dumps(row) + "\n" for row in [*[problem(i) for i in range(3)], long]))
    here = replace(ran, out=str(tmp_path / "run"), zero=True, base=str(Path(ran.out) / "cold-start/model"),
                   data=replace(ran.data, heldout=(str(more),)), first=replace(ran.first, steps=1))
    pipeline = r1.Pipeline(here, torch.device("cpu"))
    pipeline.grade("base", Path(here.base))
    assert pipeline.seen[0]["right"] in (0, 25, 50, 75)


def test_thinking_first_is_one_block_and_an_answer():
    assert thought_first("<think>\nwell\n</think>\n\nyes")
    assert not thought_first("yes") and not thought_first("<think>\n\n</think>\n\nyes")
    assert not thought_first("<think>a</think><think>b</think>yes") and not thought_first("<think>a</think>")
