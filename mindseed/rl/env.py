"""What happens between the turns of an episode: nothing, or tools that answer.

An episode begins with a prompt. The policy says a turn; the environment may answer it with further messages, which the
policy reads and answers in turn, until the environment has nothing more to say. The policy's words are the ids that it
drew, kept as they are; only what the environment says is tokenised, and never learnt from. The reward comes at the end.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Mapping, Protocol

import numpy as np

from mindseed.base.errors import UserError
from mindseed.core import Tool
from mindseed.infer.engine import Engine, Request
from mindseed.infer.sample import Sampling
from mindseed.rl.prompts import Prompt, Prompts
from mindseed.rl.reward import Sample
from mindseed.rl.trajectory import Trajectory
from mindseed.data.shuffle import key_of
from mindseed.tokenizers.chat import parse_answer

OPENED = "<think>\n"                              # what the prompt has said already when thinking is asked for


class Env(Protocol):
    def respond(self, prompt: Prompt, turn: dict) -> list[dict]:
        """Messages that follow the assistant's `turn` (content, reasoning_content, tool_calls); none: it is over."""
        ...


class SingleTurn:
    """Question and answer."""

    def respond(self, prompt: Prompt, turn: dict) -> list[dict]:
        return []


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """Every call of a turn is carried out and its result read. What cannot be called says so, to the policy."""

    tools: Mapping[str, Tool]

    def respond(self, prompt: Prompt, turn: dict) -> list[dict]:
        return [{"role": "tool", "content": self.result(call)} for call in turn["tool_calls"]]

    def result(self, call: dict) -> str:
        name, arguments = call.get("name"), call.get("arguments")
        if name not in self.tools:
            return json.dumps({"error": f"there is no tool {name}"}, ensure_ascii=False)
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except json.JSONDecodeError:
                arguments = None
        if not isinstance(arguments, dict):
            return json.dumps({"error": "the arguments are no JSON object"})
        try:
            return self.tools[name].call(arguments)
        except Exception as error:                # of the policy's making: it may learn from the message
            return json.dumps({"error": str(error) or type(error).__name__}, ensure_ascii=False)


@dataclass(frozen=True, kw_only=True)
class Play:
    """How episodes are played: `answers` to a prompt, each of at most `turns` turns of at most `max_new` ids, which end
    before the texts `stop` too."""

    answers: int = 8
    max_new: int = 256
    temperature: float = 1.0
    turns: int = 1
    stop: tuple[str, ...] = ()
    seed: int = 0

    def request(self, ids: list[int], *numbers: int, n: int = 1, max_new: int | None = None) -> Request:
        """What is drawn depends on the seed and the numbers of the prompt and the turn, and on nothing else."""
        seed = key_of(self.seed, 6, *numbers) >> 2
        return Request(prompt=ids, n=n, max_new=max_new or self.max_new, stop=self.stop,
                       sampling=Sampling(temperature=self.temperature, seed=seed))


def play(engine: Engine, prompts: Prompts, numbers: list[int], env: Env, how: Play) -> list[Sample]:
    """`how.answers` episodes of each of the prompts with these numbers in the stream, group by group."""
    asked = [prompts.at(number) for number in numbers]
    answers = engine.generate([how.request(ids, number, n=how.answers) for number, (_, ids) in zip(numbers, asked)])
    samples = []
    for number, (prompt, ids), group in zip(numbers, asked, answers):
        for completion in group:
            blank = Trajectory(ids=list(ids), mine=[False] * len(ids), prompt=number, version=engine.version,
                               figures={"sampled_logps": np.zeros(len(ids), np.float32)})
            sample = Sample(prompt=prompt, trajectory=blank)
            say(sample, completion, prompts)
            samples.append(sample)
    open_ = list(enumerate(samples))
    for turn in range(1, how.turns):
        going = [(i, sample) for i, sample in open_ if answered(sample, env, prompts, room=engine.limit)]
        again = engine.generate([how.request(s.trajectory.ids, s.trajectory.prompt, i % how.answers, turn)
                                 for i, s in going])
        for (_, sample), (completion,) in zip(going, again):
            say(sample, completion, prompts)
        open_ = going
    return samples


def say(sample: Sample, completion: Any, prompts: Prompts) -> None:
    """Append a turn of the policy: the ids that it drew, as they are."""
    t, new = sample.trajectory, completion.ids
    t.ids += new
    t.mine += [True] * len(new)
    t.figures["sampled_logps"] = np.concatenate([t.figures["sampled_logps"],
                                                 np.array(completion.sampled_logps, np.float32)])
    t.finish = completion.finish
    sample.texts.append((OPENED if prompts.thinking else "") + completion.text)
    sample.messages.append({"role": "assistant", **parse_answer(sample.text)})


def answered(sample: Sample, env: Env, prompts: Prompts, *, room: int) -> bool:
    """Whether the environment answers the last turn; its answer is appended, ready for the next one."""
    if sample.trajectory.finish != "stop":        # cut short: there is no turn to answer
        return False
    new = env.respond(sample.prompt, sample.messages[-1])
    if not new:
        return False
    ids = read_next(sample, new, prompts)
    t = sample.trajectory
    if len(t.ids) + len(ids) + 1 >= room:
        t.finish = "context"
        return False
    sample.messages += new
    t.ids += ids
    t.mine += [False] * len(ids)
    t.figures["sampled_logps"] = np.concatenate([t.figures["sampled_logps"], np.zeros(len(ids), np.float32)])
    return True


def read_next(sample: Sample, new: list[dict], prompts: Prompts) -> list[int]:
    """The ids of messages after a turn of the policy, up to where it speaks again. They follow the end of the turn,
    whatever the turn was: rendering only appends."""
    says = [*sample.prompt.messages, {"role": "assistant", "content": "x"}]
    before = prompts.rendered(says, sample.prompt.tools)
    after = prompts.encode([*says, *new], sample.prompt.tools)
    if after[:len(before)] != before:
        raise UserError("this chat template rewrites earlier turns when later ones come, so episodes of several turns "
                        "cannot be played token by token; use rollout.turns=1")
    last = sample.trajectory.ids[-1]
    end = next((len(before) - i for i, id in enumerate(reversed(before)) if id == last), None)
    if end is None:                               # another of the model's ends: the template's own is read after it
        return after[len(before) - len(prompts.tail()) - 1:]
    return after[end:]
