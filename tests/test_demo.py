"""The demo at a fiftieth of its size: every stage in turn, going on where it stopped, and what it leaves behind."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mindseed.base.errors import UserError
from mindseed.data.toy import World
from mindseed.interop.directory import load_directory
from mindseed.recipes import demo
from mindseed.train.loop import Interrupted

STAGES = ["untrained", "pretrain", "fine-tune", "dpo", "grpo"]


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> demo.Options:
    """Stopped before its last stage, and then gone on with."""
    options = demo.Options(out=str(tmp_path_factory.mktemp("demo") / "run"), scale=0.02, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        every = World.heldout
        patch.setattr(World, "heldout", lambda self: every(self)[::20])          # which are graded five times
        train = demo.rl_recipe.train
        patch.setattr(demo.rl_recipe, "train", stopped)
        assert demo.main(options) == 130
        assert [stage["name"] for stage in summary(options)] == STAGES[:-1]
        patch.setattr(demo.rl_recipe, "train", train)
        assert demo.main(options) == 0
    return options


def stopped(*_: object) -> None:
    raise Interrupted("stopped by SIGINT")


def summary(options: demo.Options) -> list[dict]:
    return json.loads((Path(options.out) / "summary.json").read_text())


def test_every_stage_is_there_with_its_figures(grown):
    found = summary(grown)
    assert [stage["name"] for stage in found] == STAGES
    assert all(0 <= stage["exact_match"] <= 100 and stage["bits_per_byte"] > 0 for stage in found)
    assert found[1]["bits_per_byte"] < found[0]["bits_per_byte"]                 # it has read something
    for name in STAGES[1:]:
        assert load_directory(Path(grown.out) / name / "model").model.config.dim == 192
        assert (Path(grown.out) / name / "log.jsonl").read_text()


def test_the_report_shows_every_stage(grown):
    page = (Path(grown.out) / "report.html").read_text()
    assert all(word in page for word in ("pretrain", "fine-tune", "dpo", "grpo", "<svg"))


def test_preferences_and_rewards_are_learnt_from_the_stage_before(grown):
    infos = [load_directory(Path(grown.out) / name / "model").info for name in STAGES[2:]]
    parents = [Path(info["parent"]).relative_to(grown.out).parts[0] for info in infos]
    assert parents == ["pretrain", "fine-tune", "dpo"]


def test_a_finished_demo_is_only_shown(grown, capsys):
    models = {path: path.stat().st_mtime_ns for path in Path(grown.out).rglob("model.safetensors")}
    assert demo.main(grown) == 0 and "chat" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in models} == models


def test_another_seed_in_the_same_folder_is_refused(grown):
    with pytest.raises(UserError, match="seed was 0, is 1"):
        demo.main(replace(grown, seed=1))
