"""What an answer is worth: several terms, each with a weight, each logged by itself.

A sum hides what a policy has found out. A policy that learns to please a length term while it gets worse at the task
shows it here, since every term's mean stands in the log beside the others, before its weight.

A term is a function of a list of samples, so that a reward model reads them together. A user's own is a Python function
of (row, answer): what it raises, a value that is no number and a call that does not come back stop the run with a word
about which sample it was; nothing that was learnt is lost.
"""
from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import math
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Sequence

from mindseed.base.errors import UserError
from mindseed.rl.prompts import Prompt
from mindseed.rl.trajectory import Trajectory
from mindseed.tasks.verify import Kind, grade, said, thought_first


@dataclass(kw_only=True)
class Sample:
    """An episode as rewards see it: `texts` are the turns of the assistant as it said them, with its thoughts;
    `messages` are all that came after the prompt."""

    prompt: Prompt
    trajectory: Trajectory
    texts: list[str] = field(default_factory=list)                    # of its turns
    messages: list[dict] = field(default_factory=list)
    grades: dict[str, Any] = field(default_factory=dict)              # of the task's grader, computed once

    @property
    def text(self) -> str:
        """The last turn."""
        return self.texts[-1]


Call = Callable[[Sequence[Sample]], Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Term:
    name: str
    weight: float
    call: Call


class Judge:
    """Terms together: `judge(samples)` fills every trajectory's `terms` and `reward`."""

    def __init__(self, terms: Sequence[Term]) -> None:
        if not terms:
            raise UserError("there is no reward: give at least one term a weight that is not 0")
        if len({term.name for term in terms}) < len(terms):
            raise UserError("two rewards have the same name; give each its own")
        self.terms = list(terms)

    def __call__(self, samples: Sequence[Sample]) -> None:
        for term in self.terms:
            values = list(term.call(samples))
            if len(values) != len(samples):
                raise UserError(f"reward {term.name!r} gave {len(values)} numbers for {len(samples)} answers")
            for sample, value in zip(samples, values):
                if not finite(value):
                    raise UserError(f"reward {term.name!r} is {value!r}, which is no finite number, {about(sample)}")
                sample.trajectory.terms[term.name] = float(value)
        for sample in samples:
            sample.trajectory.reward = sum(t.weight * sample.trajectory.terms[t.name] for t in self.terms)


def finite(value: Any) -> bool:
    """Whether it is a number that a float can hold."""
    try:
        return not isinstance(value, (str, bytes)) and math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def about(sample: Sample) -> str:
    """Which sample, for an error."""
    where = f" ({sample.prompt.name})" if sample.prompt.name else ""
    return f"for the answer {sample.text[:120]!r} to {sample.prompt.messages[-1]['content'][:120]!r}{where}"


def each(call: Callable[[Sample], float]) -> Call:
    return lambda samples: [call(sample) for sample in samples]


# ----------------------------------------------------------------------------------------------------------- the terms

def graded(sample: Sample, kind: Kind | None = None) -> dict[str, float]:
    """The task's grade of a sample, computed once for all terms that read it: of its last turn, or, where the embedded
    world asks for a call of a tool, of the first."""
    if "grade" not in sample.grades:
        text = sample.texts[0] if sample.prompt.row.get("family") == "tools" else sample.text
        sample.grades["grade"] = grade(sample.prompt.row, text, kind)
    return sample.grades["grade"]


def accuracy(weight: float, kind: Kind | None = None) -> Term:
    """Right or wrong, as the row's own grader says."""
    return Term(name="accuracy", weight=weight, call=each(lambda sample: graded(sample, kind)["score"]))


def task_format(weight: float, kind: Kind | None = None) -> Term:
    """The form that the task's grader asks for."""
    return Term(name="format", weight=weight, call=each(lambda sample: graded(sample, kind)["format"]))


def thinking_format(weight: float, *, tagged: bool) -> Term:
    """A <think> block and then an answer; `tagged`: in <answer> tags."""
    return Term(name="format", weight=weight,
                call=each(lambda sample: float(thought_first(sample.text, tagged=tagged))))


def used_result(weight: float) -> Term:
    """Of an episode with tools: whether the last turn says, outside its thoughts, every value that the last call gave
    back. An error is no result: the policy chooses what it says, by the call that it makes."""
    def call(sample: Sample) -> float:
        results = [m["content"] for m in sample.messages if m["role"] == "tool"]
        if not results or sample.messages[-1]["role"] != "assistant":
            return 0.0
        try:
            values = json.loads(results[-1])
        except json.JSONDecodeError:
            values = results[-1]
        if isinstance(values, dict) and "error" in values:
            return 0.0
        values = list(values.values()) if isinstance(values, dict) else [values]
        return float(bool(values) and all(str(value) in said(sample.text) for value in values)
                     and not sample.messages[-1]["tool_calls"])

    return Term(name="result", weight=weight, call=each(call))


def length(weight: float, *, longest: int, from_: float = 0.75) -> Term:
    """0 up to a share `from_` of the longest answer allowed, then falling to -1 there (DAPO's soft overlong punishment,
    2503.14476)."""
    start = from_ * longest

    def call(sample: Sample) -> float:
        return -min(1.0, max(0.0, (sample.trajectory.length - start) / max(longest - start, 1.0)))

    return Term(name="length", weight=weight, call=each(call))


def repetition(weight: float, *, n: int = 4) -> Term:
    """Minus the share of the answer's n-grams of ids that were there before."""
    def call(sample: Sample) -> float:
        t = sample.trajectory
        ids = [id for id, mine in zip(t.ids, t.mine) if mine]
        grams = Counter(zip(*(ids[i:] for i in range(n))))
        return -(1 - len(grams) / total) if (total := grams.total()) else 0.0

    return Term(name="repetition", weight=weight, call=each(call))


def model(weight: float, score: Callable[[list[list[int]]], Sequence[float]]) -> Term:
    """What a reward model says of the whole trajectory; its tokenizer and chat format must be the policy's."""
    return Term(name="model", weight=weight, call=lambda samples: score([s.trajectory.ids for s in samples]))


# --------------------------------------------------------------------------------------------------- a user's function

def function(weight: float, where: str, *, timeout_s: float) -> Term:
    """`file.py:name`: name(row, answer) -> number, called once an answer."""
    name, call = load(where)

    def guarded(sample: Sample) -> float:
        done: dict[str, Any] = {}

        def work() -> None:
            try:
                done["value"] = call(sample.prompt.row, sample.text)
            except BaseException as error:        # whatever it is, it is told below
                done["error"] = error

        thread = threading.Thread(target=work, daemon=True)          # which does not hold up the end of the program
        thread.start()
        thread.join(timeout_s)
        if thread.is_alive():
            raise UserError(f"reward {name!r} has not answered within {timeout_s:g} s {about(sample)}; make it faster, "
                            "or raise reward.timeout_s")
        if "error" in done:
            error = done["error"]
            raise UserError(f"reward {name!r} raised {type(error).__name__}: {error}, {about(sample)}")
        value = done["value"]
        try:
            if isinstance(value, (str, bytes)):
                raise TypeError
            return float(value)                   # of numpy's and torch's numbers too
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise UserError(f"reward {name!r} gave {str(value)[:80]!r}, which is no number, {about(sample)}") from None

    return Term(name=name, weight=weight, call=each(guarded))


def load(where: str) -> tuple[str, Callable[[dict, str], float]]:
    """(name, function) of `file.py:name`."""
    file, _, name = where.rpartition(":")
    if not file or not name:
        raise UserError(f"reward.function={where!r} is not FILE.py:NAME")
    if not Path(file).is_file():
        raise UserError(f"reward.function: {file} does not exist")
    loader = importlib.machinery.SourceFileLoader("mindseed_reward", file)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("mindseed_reward", loader))
    sys.modules["mindseed_reward"] = module       # where dataclasses look for their module
    try:
        loader.exec_module(module)
    except Exception as error:
        raise UserError(f"reward.function: {file} cannot be loaded: {type(error).__name__}: {error}") from None
    call = getattr(module, name, None)
    if not callable(call):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"reward.function: {file} has no function {name!r}; it has {', '.join(there) or 'none'}")
    return name, call
