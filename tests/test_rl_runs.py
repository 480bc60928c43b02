"""`mindseed rl` from the command line: killed and resumed, on two ranks, with tools, with what users do wrong."""
from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from mindseed.adapt.peft import load_adapter
from mindseed.data.toy import World
from mindseed.interop.directory import load_directory, save_directory
from mindseed.models.lm import build
from mindseed.models.presets import Shape
from mindseed.tokenizers import bpe_train
from tests.test_runs import finish, kill_after, mindseed

REWARD = "def vowels(row, answer):\n    return sum(c in 'aeiou' for c in answer) / 10\n"
SMALL = {"rollout.prompts": 4, "rollout.answers": 4, "rollout.max_new": 8, "loop.micro_batch": 4, "loop.save_every": 1,
         "loop.validate_every": 4, "loop.sample_every": 0, "optim.lr": 1e-3, "reward.accuracy": 0, "reward.format": 0}


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Path:
    """A model directory of random weights, problems, and a reward that random answers differ in."""
    folder = tmp_path_factory.mktemp("rl")
    world = World(5)
    texts = (json.dumps(row, ensure_ascii=False) for row in [*world.pretrain(200), *world.conversations(200)])
    tokenizer = bpe_train.train(texts, vocab_size=400)
    shape = Shape(layers=2, dim=32, heads=2, kv_heads=1, head_dim=16, ffn_dim=48)
    model = build(shape.lm_config(vocab_size=tokenizer.vocab_size, seq_len=512), seed=1)
    save_directory(model, tokenizer, folder / "model")
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in world.problems(60)))
    (folder / "mine.py").write_text(REWARD)
    return folder


def rl(start: Path, run: Path, *flags: str, ranks: int = 1, steps: int = 8, **more: object) -> list[str]:
    """The command; `more` are options over the usual ones, `__` for a dot."""
    options = {"data.train": start / "problems.jsonl", "out": run, "loop.steps": steps,
               "reward.function": f"{start / 'mine.py'}:vowels", **SMALL,
               **{name.replace("__", "."): value for name, value in more.items()}}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return mindseed("rl", start / "model", *words, *flags, ranks=ranks)


def figures(run: Path, *names: str) -> list[tuple]:
    return [tuple(row.get(name) for name in ("step", *names)) for row in map(
        json.loads, (run / "log.jsonl").read_text().splitlines())]


@pytest.mark.parametrize("algorithm, ranks", [("ppo", 1), ("grpo", 2)])
def test_killed_and_resumed_equals_uninterrupted(start, tmp_path, algorithm, ranks):
    more = {"algorithm": algorithm, "rollout__minibatches": 3, "policy__kl": 0.05, "policy__kl_in": "reward",
            "ranks": ranks}
    finish(rl(start, tmp_path / "whole", **more))
    assert kill_after(rl(start, tmp_path / "parts", **more), tmp_path / "parts", 4) != 0
    assert "going on from" in finish(rl(start, tmp_path / "parts", "--resume", **more))
    names = ("loss", "grad_norm", "reward", "length", "heldout/vowels", "kl_answer")
    assert figures(tmp_path / "parts", *names) == figures(tmp_path / "whole", *names)
    assert (tmp_path / "parts/model/model.safetensors").read_bytes() == (
        tmp_path / "whole/model/model.safetensors").read_bytes()


@pytest.mark.parametrize("algorithm, zero", [("grpo", 0), ("ppo", 0), ("grpo", 3), ("ppo", 2)])
def test_two_ranks_do_what_one_does(start, tmp_path, algorithm, zero):
    for ranks in (1, 2):
        finish(rl(start, tmp_path / str(ranks), ranks=ranks, steps=4, algorithm=algorithm, rollout__prompts=5,
                  parallel__zero=zero if ranks == 2 else 0))
    names = ("loss", "grad_norm", "reward", "length", "heldout/vowels", "supervised")
    for one, two in zip(figures(tmp_path / "1", *names), figures(tmp_path / "2", *names), strict=True):
        assert [x or 0 for x in one] == pytest.approx([x or 0 for x in two], rel=2e-3, abs=1e-5)


def test_the_model_of_a_run_is_a_model_directory_and_rewards_rise(start, tmp_path):
    said = finish(rl(start, tmp_path / "run", loop__validate_every=0, optim__kind="adamw", steps=40, optim__lr=5e-3,
                    rollout__answers=8, loop__micro_batch=16, loop__save_every=0))
    assert "engine_gap" in said and " reward " in said
    rewards = [r for _, r in figures(tmp_path / "run", "reward/vowels") if r is not None]
    assert sum(rewards[-4:]) > 1.3 * sum(rewards[:4])
    loaded = load_directory(tmp_path / "run" / "model")
    assert loaded.model.value_head is None and loaded.info["algorithm"] == "grpo"


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_an_adapter_learns_alone_and_goes_on_to_the_bit(start, tmp_path, algorithm):
    more = {"algorithm": algorithm, "lora__rank": 4, "policy__kl": 0.05, "steps": 6}
    finish(rl(start, tmp_path / "whole", **more))
    assert kill_after(rl(start, tmp_path / "parts", **more), tmp_path / "parts", 3) != 0
    said = finish(rl(start, tmp_path / "parts", "--resume", **more))
    assert "going on from" in said and "adapter alone is in" in said
    names = ("loss", "grad_norm", "reward", "heldout/vowels", "ratio")
    assert figures(tmp_path / "parts", *names) == figures(tmp_path / "whole", *names)
    rows = figures(tmp_path / "whole", "ratio", "reward")
    first = [ratio for _, ratio, reward in rows if ratio and reward is not None]         # the first step of a rollout
    assert first and first == pytest.approx([1] * len(first), abs=1e-5)
    base, merged = (load_directory(path).model for path in (start / "model", tmp_path / "whole/model"))
    assert torch.equal(base.embed.weight, merged.embed.weight)
    x = torch.randint(0, 400, (2, 9), generator=torch.Generator().manual_seed(0))
    at = torch.arange(9).expand(2, 9)
    before = base.eval()(x, at).logits()
    load_adapter(base, tmp_path / "whole/adapter")
    assert not torch.allclose(before, merged(x, at).logits(), atol=1e-5)
    assert torch.allclose(base.eval()(x, at).logits(), merged(x, at).logits(), atol=1e-4)


def test_tools_are_carried_out_and_the_log_tells_each_term(start, tmp_path):
    said = finish(rl(start, tmp_path / "run", "--data.tools", reward__result=0.5, loop__sample_every=1, steps=2))
    assert "result 0" in said and "reward/vowels" in said


def test_the_best_checkpoint_is_that_of_the_highest_reward(start, tmp_path):
    finish(rl(start, tmp_path / "run", steps=6, loop__validate_every=1, loop__save_every=1, loop__keep=6))
    rewards = {step: reward for step, reward in figures(tmp_path / "run", "heldout/reward") if step}
    best = json.loads((tmp_path / "run/checkpoints/best.json").read_text())
    assert max(rewards.values()) > min(rewards.values())
    assert rewards[int(best["checkpoint"].split("-")[1])] == max(rewards.values()) == -best["score"]


def test_nothing_is_measured_where_nothing_is_to_be(start, tmp_path):
    finish(rl(start, tmp_path / "run", steps=2, loop__validate_every=0))
    assert not [row for row in figures(tmp_path / "run", "heldout/reward") if row[1] is not None]


def test_an_error_in_a_reward_loses_nothing(start, tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("calls = []\ndef late(row, answer):\n    calls.append(1)\n"
                   "    if len(calls) > 40: raise ValueError('so')\n    return len(calls) % 3\n")
    run = tmp_path / "run"
    said = finish(rl(start, run, reward__function=f"{bad}:late", loop__save_every=0, loop__validate_every=0), code=2)
    assert "raised ValueError: so" in said and "is saved in" in said
    assert list((run / "checkpoints").glob("step-*"))


def test_an_error_in_a_measurement_loses_nothing(start, tmp_path):
    """The reward of held-out answers fails after step 4, before the checkpoint that is due then."""
    bad = tmp_path / "bad.py"
    bad.write_text("calls = []\ndef late(row, answer):\n    calls.append(1)\n"
                   "    if len(calls) > 35: raise ValueError('so')\n    return len(calls) % 3\n")
    run = tmp_path / "run"                        # 2 held out, 2 x 16 learnt from, then 2 again
    said = finish(rl(start, run, reward__function=f"{bad}:late", loop__save_every=4), code=2)
    assert "What was learnt in 4 steps is saved in" in said and (run / "checkpoints/step-00000004").exists()


def test_measuring_plays_what_training_plays(start, tmp_path):
    """With tools, held-out episodes have their results too."""
    run = tmp_path / "run"
    finish(rl(start, run, "--data.tools", reward__result=0.5, steps=2, loop__validate_every=1))
    assert all("heldout/result" in row for row in map(json.loads, (run / "log.jsonl").read_text().splitlines()))


def test_code_is_run_only_if_that_is_asked_for(start, tmp_path):
    rows = [{"question": f"square {i}", "tests": "assert f(2) == 4"} for i in range(4)]
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"data__train": tmp_path / "code.jsonl", "reward__accuracy": 1.0, "steps": 2}
    assert "say --reward.task code" in finish(rl(start, tmp_path / "run", **more), code=2)
    said = finish(rl(start, tmp_path / "run", reward__task="code", **more))
    assert "code that the model writes will be run" in said


@pytest.mark.parametrize("more, says", [
    ({"data__share": 1.0}, "data.share=1.0 must lie in [0, 1)"), ({"data__limit": 0}, "data.limit=0"),
    ({"lora__rank": 4, "lora__dropout": 0.1}, "lora.dropout has no place"),
    ({"reward__task": "code", "reward__accuracy": 1}, "problems.jsonl:1 cannot be graded as 'code'"),
    ({"data__train": "nowhere.jsonl"}, "nowhere.jsonl"),
    ({"rollout__max_new": 512}, "rollout.max_new leaves nothing"),
    ({"reward__model": 1.0}, "give both or none"),
    ({"reward__function": ""}, "there is no reward"),
    ({"algorithm": "grop"}, "grop"),
    ({"policy__target_kl": 6}, "policy.target_kl steers")])
def test_what_users_do_wrong(start, tmp_path, more, says):
    assert says in finish(rl(start, tmp_path / "run", **more), code=2)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_a_directory_that_is_no_reward_model(start, tmp_path):
    said = finish(rl(start, tmp_path / "run", reward__model=1.0, model__reward=start / "model"), code=2)
    assert "is no reward model" in said


def test_sigterm_saves(start, tmp_path):
    run = tmp_path / "run"
    assert kill_after(rl(start, run, loop__save_every=0, steps=400), run, 2, signal.SIGTERM) == 130
    assert len(list((run / "checkpoints").glob("step-*"))) == 1 and os.path.exists(run / "config.toml")
