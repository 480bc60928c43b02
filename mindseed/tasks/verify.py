"""Answers that a program can check: numbers, texts, JSON of a schema, code with tests; and the form they come in.

A grader is grade(row, answer) -> {"score": 0..1, "format": 0 or 1}. What a row asks for is plain from what it holds:
the embedded world's rows have a "family", code has "tests", JSON a "schema", all others an "answer", which is a number
or a text. `answer` is the whole turn of the assistant, with its <think> block; what is judged stands after that, and
inside <answer> tags where there are any.
"""
from __future__ import annotations

import json
import re
from fractions import Fraction
from typing import Any, Callable, Literal

from mindseed.base.errors import UserError
from mindseed.base.extras import install
from mindseed.tasks.sandbox import passes
from mindseed.tasks.toy import ToyTask, plain
from mindseed.tokenizers.chat import parse_answer

Grade = dict[str, float]
Grader = Callable[[dict, str], Grade]
Kind = Literal["toy", "code", "schema", "number", "text"]

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
NUMBER = re.compile(r"(?<![A-Za-z0-9_.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+|/\d+)?")
FENCE = re.compile(r"```(?:python|py|json)?\n(.*?)```", re.DOTALL)


def kind_of(row: dict) -> Kind:
    """What the row asks for. UserError if it holds nothing that an answer could be checked against."""
    if "family" in row and "answer" in row:
        return "toy"
    for key, kind in (("tests", "code"), ("schema", "schema")):
        if key in row:
            return kind
    if not isinstance(row.get("answer"), (str, int, float)):
        raise UserError('a problem needs an "answer" (a number or a text), "tests" (code) or a "schema" (JSON); this '
                        f"row has only {', '.join(map(repr, row)) or 'nothing'}")
    return "number" if number_in(reference(row)) is not None else "text"


def grade(row: dict, answer: str, kind: Kind | None = None) -> Grade:
    """The score of a turn of the assistant, and whether it has the form that was asked for."""
    return GRADERS[kind or kind_of(row)](row, answer)


def reference(row: dict) -> str:
    """The answer of a row; after `####`, where GSM8K puts it (2110.14168)."""
    return str(row["answer"]).rpartition("####")[2].strip()


def said(answer: str) -> str:
    """What the turn says in the end: without its thoughts, and only what is inside <answer>, if that is there."""
    content = parse_answer(answer)["content"]
    tagged = ANSWER.findall(content)
    return (tagged[-1] if tagged else content).strip()


def number_in(text: str) -> Fraction | None:
    """The last number of a text, exactly: 1,234.50 and 1/3 are read, $ and % are passed over."""
    found = NUMBER.findall(text)
    if not found:
        return None
    try:
        return Fraction(found[-1].replace(",", ""))
    except ZeroDivisionError:
        return None


def grade_number(row: dict, answer: str) -> Grade:
    """Equal as numbers; of several that are said the last one counts."""
    got = number_in(said(answer).rpartition("####")[2])
    return {"score": float(got is not None and got == number_in(reference(row))), "format": float(got is not None)}


def grade_text(row: dict, answer: str) -> Grade:
    got = plain(said(answer))
    return {"score": float(got == plain(reference(row))), "format": float(bool(got))}


def grade_toy(row: dict, answer: str) -> Grade:
    return ToyTask([]).grade(row, answer)


def grade_schema(row: dict, answer: str) -> Grade:
    """JSON, fenced or bare, that the row's schema allows. "format": it is JSON at all."""
    try:
        import jsonschema
    except ImportError:
        raise UserError(f"checking answers against a schema needs jsonschema: {install('[rl]')}") from None
    text = said(answer)
    fenced = FENCE.findall(text)
    try:
        value = json.loads(fenced[-1] if fenced else text)
    except json.JSONDecodeError:
        return {"score": 0.0, "format": 0.0}
    return {"score": float(jsonschema.Draft202012Validator(row["schema"]).is_valid(value)), "format": 1.0}


def grade_code(row: dict, answer: str) -> Grade:
    """The share of the row's "tests" (Python statements that raise if wrong) that the code passes, each run in a
    process of its own (sandbox.py). "format": there is code that compiles."""
    text = said(answer)
    fenced = FENCE.findall(text)
    code = fenced[-1] if fenced else text
    try:
        compile(code, "answer", "exec")
    except (SyntaxError, ValueError):
        return {"score": 0.0, "format": 0.0}
    tests = row["tests"] if isinstance(row["tests"], list) else [row["tests"]]
    return {"score": sum(passes(code + "\n" + test) for test in tests) / max(len(tests), 1), "format": 1.0}


GRADERS: dict[Kind, Grader] = {"toy": grade_toy, "code": grade_code, "schema": grade_schema, "number": grade_number,
                               "text": grade_text}


def thought_first(answer: str, *, tagged: bool = False) -> bool:
    """Whether the turn has the form of a reasoner: one <think> block that says something, then an answer; `tagged`: the
    answer inside <answer> tags and nothing beside them (as DeepSeek-R1-Zero was asked to write, 2501.12948)."""
    inside = r"<think>(.*?)</think>\s*" + (r"<answer>(.*?)</answer>\s*" if tagged else r"(.*?)\s*")
    found: Any = re.fullmatch(inside, answer.strip(), re.DOTALL)
    return bool(found and all(part.strip() for part in found.groups())
                and not re.search(r"</?(think|answer)>", "".join(found.groups())))
