"""Reinforcement learning at its edges: what is odd, cut, changed on resuming, or gamed."""
from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mindseed.base.errors import UserError
from mindseed.infer.engine import Engine, EngineConfig
from mindseed.infer.rows import Completion
from mindseed.models.lm import build
from mindseed.objectives.grpo import divergence
from mindseed.objectives.sft import SFT
from mindseed.optim.groups import OptimConfig
from mindseed.recipes.rl import judged_by, open_prompts
from mindseed.recipes.rl_options import (PolicyOptions, PromptOptions, RewardOptions, RLOptions, SamplingOptions,
                                         StartOptions, derive, without_effect)
from mindseed.rl.env import Play, SingleTurn, ToolUse, answered, play, say
from mindseed.rl.prompts import Prompt, Prompts, prompt_of
from mindseed.rl.rejection import seed_of
from mindseed.rl.reward import Judge, Sample, Term, each, function, used_result
from mindseed.rl.rollout import Advantage, RolloutConfig
from mindseed.rl.trajectory import Trajectory
from mindseed.tasks.tools import TOOLS
from mindseed.tokenizers.byte import Byte
from mindseed.train.step import train_step
from tests.test_rl import bandit, learner, options_for, rollout
from tests.tiny import random_batch, tiny_model


# ------------------------------------------------------------------------------------------------------------- rewards

MINE = """
from __future__ import annotations
from dataclasses import dataclass
import numpy as np

@dataclass
class Rule:
    word: str

def huge(row, answer): return 10 ** 400
def several(row, answer): return np.ones(2)
def scalar(row, answer): return np.float32(0.5)
def nothing(row, answer): return None
"""


def sample(*texts: str, messages: list[dict] = ()) -> Sample:
    prompt = Prompt(messages=[{"role": "user", "content": "?"}])
    return Sample(prompt=prompt, texts=list(texts), messages=list(messages),
                  trajectory=Trajectory(ids=[1, 2], mine=[False, True]))


@pytest.mark.parametrize("file", ["mine.py", "rewards.txt"])
def test_rewards_that_are_no_numbers(tmp_path, file):
    where = tmp_path / file
    where.write_text(MINE)
    assert function(1.0, f"{where}:scalar", timeout_s=5).call([sample("a")]) == [0.5]
    for name in ("huge", "several", "nothing"):
        with pytest.raises(UserError, match="which is no number, for the answer 'a'"):
            Judge([function(1.0, f"{where}:{name}", timeout_s=5)])([sample("a")])
    with pytest.raises(UserError, match="no finite number"):
        Judge([Term(name="own", weight=1.0, call=each(lambda s: 10 ** 400))])([sample("a")])


def told(result: str, said: str) -> float:
    messages = [{"role": "tool", "content": result}, {"role": "assistant", "content": said, "tool_calls": []}]
    return used_result(1.0).call([sample("call", said, messages=messages)])[0]


def test_a_result_is_used_only_if_it_is_one_and_it_is_said():
    assert told('{"result": "7"}', "It is 7.") == 1
    assert told('{"result": "7"}', "<think>\n7\n</think>\n\nNo idea.") == 0
    assert told('{"error": "there is no tool a"}', "there is no tool a") == 0


def test_tags_of_several_tokens_weigh_more():
    batch = replace(random_batch(2, 8), weights=torch.ones(2, 8))
    batch.targets[0, 2:5] = torch.tensor([50, 51, 52])
    batch.targets[1, 7] = 50                      # the tag is cut off
    batch.targets[1, 0] = 60
    weights = SFT(tags=((50, 51, 52), (60,), tuple(range(9))), tag_weight=3.0).prepare(batch).weights
    wanted = torch.ones(2, 8)
    wanted[0, 2:5] = wanted[1, 0] = 3
    assert torch.equal(weights, wanted)


def test_as_a_loss_k1_has_no_gradient_in_the_mean():
    torch.manual_seed(0)
    logits, other = torch.randn(5, dtype=torch.float64).requires_grad_(), torch.randn(5, dtype=torch.float64)
    logps, reference = logits.log_softmax(-1), other.log_softmax(-1)
    p = logps.exp().detach()
    true, = torch.autograd.grad((logps.exp() * (logps - reference)).sum(), logits, retain_graph=True)
    found = {name: torch.autograd.grad((p * divergence(logps, reference, name)).sum(), logits, retain_graph=True)[0]
             for name in ("k1", "k2")}
    assert found["k1"].abs().max() < 1e-12 and torch.allclose(found["k2"], true)


# ------------------------------------------------------------------------------------------------------------- episodes

def test_an_episode_goes_on_after_any_end_of_a_turn():
    """A turn may end in the mark of a document, too; then the template's own end is read after it."""
    tokenizer = Byte()
    prompts = Prompts([Prompt(messages=[{"role": "user", "content": "2+3?"}])], tokenizer, seed=0)
    call = tokenizer.encode('<tool_call>{"name": "calculate", "arguments": {"expression": "2+3"}}</tool_call>',
                            allow_special=True)
    ends = {name: tokenizer.specials[name] for name in ("<|im_end|>", "<|endoftext|>")}
    read = {}
    for name, end in ends.items():
        one = Sample(prompt=prompts.prompts[0], trajectory=Trajectory(
            ids=list(prompts.ids[0]), mine=[False] * len(prompts.ids[0]),
            figures={"sampled_logps": np.zeros(len(prompts.ids[0]), np.float32)}))
        text = '<tool_call>{"name": "calculate", "arguments": {"expression": "2+3"}}</tool_call>'
        say(one, Completion(text=text, ids=[*call, end], logps=[0.0] * (len(call) + 1),
                            sampled_logps=[0.0] * (len(call) + 1), finish="stop"), prompts)
        before = len(one.trajectory.ids)
        assert answered(one, ToolUse(tools=TOOLS), prompts, room=4096)
        read[name] = one.trajectory.ids[before:]
        assert not any(one.trajectory.mine[before:])
    assert read["<|endoftext|>"] == [ends["<|im_end|>"], *read["<|im_end|>"]]


def test_seeds_of_answers_do_not_repeat_between_runs():
    seeds = [{seed_of(seed, number, answer) for number in range(50) for answer in range(4)} for seed in range(3)]
    assert all(len(one) == 200 for one in seeds) and not seeds[0] & seeds[1] and not seeds[1] & seeds[2]


# ------------------------------------------------------------------------------------------------------------- rollouts

def test_cut_answers_are_compared_with_but_not_learnt_from():
    model, prompts, _ = bandit()
    calls = iter(range(100))

    def pay(s: Sample) -> float:                  # of four answers two are cut and worth nothing
        cut = next(calls) % 2
        s.trajectory.finish = "length" if cut else "stop"
        return 1.0 - cut

    judge = Judge([Term(name="pay", weight=1.0, call=each(pay))])
    source = rollout(model, prompts, judge, RolloutConfig(prompts=2, drop_cut=True), Advantage(scale="off"),
                     Play(max_new=2, answers=4))
    batch = next(source)
    assert int((batch.positions == 0).logical_and(batch.weights.cumsum(-1) >= 0).sum()) >= 4
    assert batch.extra["advantages"][batch.weights != 0].unique().tolist() == [0.5]


def test_all_answers_cut_is_told_as_that():
    model, prompts, _ = bandit()
    judge = Judge([Term(name="odd", weight=1.0, call=each(lambda s: float(s.trajectory.ids[-1] % 2)))])
    source = rollout(model, prompts, judge, RolloutConfig(prompts=2, drop_cut=True, patience=2), Advantage(),
                     Play(max_new=2, answers=4))  # without a stop id every answer ends at its longest
    with pytest.raises(UserError, match="every answer was cut"):
        next(source)


@pytest.mark.parametrize("change", ["kl", "temperature", "reward"])
def test_answers_drawn_under_other_settings_are_thrown_away_on_resuming(change, capsys):
    run = learner(options_for("grpo", minibatches=3))
    train_step(run)
    state = run.source.state_dict()
    assert state["queue"]
    more = {"policy": PolicyOptions(kl=0.1)} if change == "kl" else {}
    options = replace(options_for("grpo", minibatches=3), **more)
    if change == "temperature":
        options = replace(options, rollout=replace(options.rollout, temperature=0.7))
    other = learner(options)
    if change == "reward":
        other.source.told = {"function": "another.py:one"}
    other.source.load_state_dict(state)
    assert not other.source.queue and "are thrown away" in capsys.readouterr().err
    for _ in range(2):
        assert np.isfinite(train_step(other)["loss"])
    same = learner(options_for("grpo", minibatches=3))
    same.source.load_state_dict(state)
    assert same.source.queue


def test_a_steered_weight_goes_on_and_a_new_one_holds():
    given = PolicyOptions(kl=0.1, kl_in="reward", target_kl=2.0)
    run = learner(replace(options_for("grpo"), policy=given))
    train_step(run)
    state = run.source.state_dict()
    assert state["kl"] != 0.1
    same, other = (learner(replace(options_for("grpo"), policy=p)) for p in (given, replace(given, kl=0.5)))
    for one in (same, other):
        one.source.load_state_dict(state)
    assert same.source.advantage.kl == state["kl"] and other.source.advantage.kl == 0.5


# ------------------------------------------------------------------------------------------------------------- options

@pytest.mark.parametrize("more, says", [
    ({"rollout": SamplingOptions(prompts=0)}, "prompts=0"),
    ({"rollout": SamplingOptions(minibatches=0)}, "minibatches=0"),
    ({"rollout": SamplingOptions(max_new=0)}, "max_new=0"), ({"policy": PolicyOptions(clip_low=2.0)}, "clip_low=2.0"),
    ({"policy": PolicyOptions(correction=-1.0)}, "correction=-1.0"),
    ({"algorithm": "cispo", "policy": PolicyOptions(level="mean")}, "weight_only"),
    ({"algorithm": "ppo", "policy": PolicyOptions(average="answers")}, "ppo with these options")])
def test_impossible_settings_are_told(more, says):
    with pytest.raises(UserError, match=says):
        derive(RLOptions(**more))


@pytest.mark.parametrize("more, option", [
    ({"model": StartOptions(reference="x")}, "model.reference"),
    ({"model": StartOptions(critic="model")}, "model.critic"),
    ({"policy": PolicyOptions(gamma=0.9)}, "policy.gamma"), ({"policy": PolicyOptions(kl_in="reward")}, "policy.kl_in"),
    ({"policy": PolicyOptions(kl_estimator="k2")}, "policy.kl_estimator"),
    ({"policy": PolicyOptions(kl=0.1, kl_in="reward", kl_estimator="k2")}, "policy.kl_estimator"),
    ({"reward": RewardOptions(format=0.0, form="think")}, "reward.form"),
    ({"algorithm": "rloo", "policy": PolicyOptions(scale="group")}, "policy.scale"),
    ({"algorithm": "cispo", "policy": PolicyOptions(clip_low=0.1)}, "policy.clip_low"),
    ({"rollout": SamplingOptions(turns=3)}, "rollout.turns"),
    ({"algorithm": "ppo", "rollout": SamplingOptions(dynamic=3)}, "rollout.dynamic"),
    ({"reward": RewardOptions(result=0.5)}, "reward.result"),
    ({"optim": OptimConfig(kind="adamw", momentum=0.5)}, "optim.momentum")])
def test_options_without_effect_are_told(more, option):
    assert any(line.startswith(option + " has no effect") for line in without_effect(RLOptions(**more)))


@pytest.mark.parametrize("more", [{}, {"policy": PolicyOptions(kl=0.1, kl_estimator="k2")},
                                  {"algorithm": "ppo", "policy": PolicyOptions(gamma=0.9)}])
def test_options_with_effect_are_not(more):
    assert not without_effect(RLOptions(**more))




def test_what_rewards_and_references_are_is_part_of_a_checkpoint(tmp_path):
    """So that answers which another reward judged are not learnt from."""
    mine = tmp_path / "mine.py"
    mine.write_text("def good(row, answer): return 1.0")
    usual = RLOptions(model=StartOptions(start="base"), reward=RewardOptions(function=f"{mine}:good"))
    told = judged_by(usual)
    for other in (replace(usual, reward=replace(usual.reward, format=0.3)),
                  replace(usual, model=replace(usual.model, reward="judge")),
                  replace(usual, policy=PolicyOptions(kl=0.1))):
        assert judged_by(other) != told
    mine.write_text("def good(row, answer): return -1.0")
    assert judged_by(usual) != told


@pytest.mark.parametrize("last", [[{"role": "assistant", "content": ""}], [{"role": "assistant", "content": None}], [],
                                  [{"role": "assistant", "content": "4"}, {"role": "assistant", "content": ""}]])
def test_the_last_answer_is_left_out_of_a_prompt_and_may_be_empty(last):
    turns = [{"role": "user", "content": "2+2?"}, *last]
    for row in ({"conversations": turns}, {"prompt": turns}, {"messages": turns, "answer": "4"}):
        assert [m["content"] for m in prompt_of(row).messages] == ["2+2?"]


def test_what_is_measured_on_is_spread_over_a_sorted_file(tmp_path):
    rows = [{"question": f"{family} {i}", "answer": "1", "family": family} for family in "abc" for i in range(40)]
    for name in ("learnt", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = RLOptions(rollout=SamplingOptions(max_new=8),
                        data=PromptOptions(train=(str(tmp_path / "learnt.jsonl"),), limit=30,
                                           heldout=(str(tmp_path / "heldout.jsonl"),)))
    loaded = SimpleNamespace(model=tiny_model(), tokenizer=Byte(), template=None)
    _, heldout = open_prompts(options, loaded)
    assert min(Counter(p.row["family"] for p in heldout.prompts)[family] for family in "abc") >= 5


def test_plain_text_in_place_of_the_template_and_texts_that_end_an_answer():
    tokenizer = Byte()
    model = build(replace(tiny_model().config, vocab_size=tokenizer.vocab_size, seq_len=128))
    asked = [Prompt(messages=[{"role": "user", "content": "2+3"}], name="some:1")]
    prompts = Prompts(asked, tokenizer, seed=0, plain="Sum: {question}=")
    assert prompts.ids == [[tokenizer.bos_id, *tokenizer.encode("Sum: 2+3=")]] and prompts.tail() == []
    engine = Engine(model, tokenizer, EngineConfig(max_seqs=8))
    ends = tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    samples = play(engine, prompts, [0], SingleTurn(), Play(answers=8, max_new=40, stop=ends))
    assert sum(s.trajectory.finish == "stop" for s in samples) >= 4
    for s in samples:
        said = tokenizer.decode([id for id, mine in zip(s.trajectory.ids, s.trajectory.mine) if mine])
        assert not set(s.text) & set(ends)
        assert s.trajectory.finish != "stop" or said[-1] in ends               # it was drawn, so it is learnt
    with pytest.raises(UserError, match="needs {question}"):
        Prompts(asked, tokenizer, seed=0, plain="Sum:")
    with pytest.raises(UserError, match="some:1: as plain text one question"):
        Prompts([replace(asked[0], tools=[{}])], tokenizer, seed=0, plain="{question}")
    with pytest.raises(UserError, match="leaves out the chat template"):
        derive(RLOptions(data=PromptOptions(train=("x",), plain="{question}", tools=True)))


def test_settings_that_cannot_go_together_are_refused():
    for data, rollout_, says in (
            (PromptOptions(train=("x",), tools=True), SamplingOptions(stop=("\n",)), "in the middle of a turn"),
            (PromptOptions(train=("x",), plain="{question}", thinking="on"), SamplingOptions(), "opens a <think>"),
            (PromptOptions(train=("x",)), SamplingOptions(stop=("",)), "empty text")):
        with pytest.raises(UserError, match=says):
            derive(RLOptions(data=data, rollout=rollout_))
    assert derive(RLOptions(rollout=SamplingOptions(stop=(r"\n",)))).rollout.stop == ("\n",)
