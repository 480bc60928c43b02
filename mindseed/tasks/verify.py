"""Answers that a program can check: numbers, texts, JSON of a schema, code with tests; and the form they come in.

A grader is grade(row, answer) -> {"score": 0..1, "format": 0 or 1}. What a row asks for is plain from what it holds:
the embedded world's rows have a "family", code has "tests", JSON a "schema", all others an "answer", which is a number
or a text. `answer` is the whole turn of the assistant, with its <think> block; what is judged stands after that, and
inside <answer> tags where there are any.
"""
from __future__ import annotations

import ast
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
NUMBER = re.compile(r"(?<![A-Za-z0-9_.^])[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:/\d+|(?:\.\d+)?(?:[eE][-+]?\d{1,3})?)"
                    r"|\.\d+(?:[eE][-+]?\d{1,3})?)(?![\d^])")
BARE = re.compile(rf"[$£€¥￥]?\s*({NUMBER.pattern})\s*%?\.?")     # a reference that is a number and nothing else
FENCE = re.compile(r"```[ \t]*(?:python|py|json)?\d?[ \t]*\r?\n(.*?)```", re.DOTALL | re.IGNORECASE)
LONGEST = 400                                     # characters of a number that is still read as one


def kind_of(row: dict, where: str = "this row") -> Kind:
    """What the row asks for. UserError if it holds nothing that an answer could be checked against."""
    if "family" in row and "answer" in row:
        return "toy"
    for key, kind in (("tests", "code"), ("schema", "schema")):
        if key in row:
            return kind
    if not isinstance(row.get("answer"), (str, int, float)):
        raise UserError('a problem needs an "answer" (a number or a text), "tests" (code) or a "schema" (JSON); '
                        f"{where} has only {', '.join(map(repr, row)) or 'nothing'}")
    asked = reference(row)
    whole = "####" in str(row["answer"]) or BARE.fullmatch(asked.replace("\u2212", "-"))
    return "number" if whole and number_in(asked) is not None else "text"


def grade(row: dict, answer: str, kind: Kind | None = None) -> Grade:
    """The score of a turn of the assistant, and whether it has the form that was asked for. An answer that cannot be
    read, since it is nested a thousand deep, say, is wrong."""
    grader = GRADERS[kind or kind_of(row)]
    try:
        return grader(row, answer)
    except (ValueError, RecursionError, MemoryError, OverflowError):
        return {"score": 0.0, "format": 0.0}


def require_gradable(row: dict, kind: Kind | None = None, *, where: str = "this row") -> None:
    """UserError if the row lacks what its grader reads, so that a run does not end in the middle for it."""
    kind = kind or kind_of(row, where)
    tests = row.get("tests")
    good = {"toy": isinstance(row.get("family"), str) and isinstance(row.get("answer"), str),
            "code": isinstance(tests, str) or isinstance(tests, list) and all(isinstance(t, str) for t in tests),
            "schema": isinstance(row.get("schema"), (dict, bool)),
            "number": isinstance(row.get("answer"), (str, int, float)) and number_in(reference(row)) is not None,
            "text": isinstance(row.get("answer"), (str, int, float)) and bool(reference(row))}[kind]
    if not good:
        raise UserError(f"{where} cannot be graded as {kind!r}, which reads {READS[kind]}")
    if kind == "schema":
        jsonschema = schema_library()
        try:
            jsonschema.Draft202012Validator.check_schema(row["schema"])
            jsonschema.Draft202012Validator(row["schema"]).is_valid(None)
        except (jsonschema.SchemaError, unresolvable()) as error:
            raise UserError(f"{where} has a schema that is none: {str(error).splitlines()[0]}") from None


READS = {"toy": 'a "family" and an "answer" that is a text', "code": '"tests", a text or a list of texts',
         "schema": 'a "schema", a JSON object', "number": 'an "answer" with a number in it',
         "text": 'an "answer" that is a text or a number'}


def reference(row: dict) -> str:
    """The answer of a row; after `####`, where GSM8K puts it (2110.14168)."""
    return str(row["answer"]).rpartition("####")[2].strip()


def said(answer: str) -> str:
    """What the turn says in the end: without its thoughts, and only what is inside <answer>, if that is there."""
    content = parse_answer(answer)["content"]
    tagged = ANSWER.findall(content)
    return (tagged[-1] if tagged else content).strip()


def number_in(text: str) -> Fraction | None:
    """The last number of a text, exactly: 1,234.50, 1/3, .5 and 1e6 are read, $ and % are passed over."""
    found = NUMBER.findall(text.replace("\u2212", "-"))
    if not found or len(found[-1]) > LONGEST:
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
    jsonschema, text = schema_library(), said(answer)
    fenced = FENCE.findall(text)
    try:
        value = json.loads(fenced[-1] if fenced else text)
    except json.JSONDecodeError:
        return {"score": 0.0, "format": 0.0}
    try:
        return {"score": float(jsonschema.Draft202012Validator(row["schema"]).is_valid(value)), "format": 1.0}
    except unresolvable() as error:
        raise UserError(f"a schema refers to what is not in it: {str(error).splitlines()[0]}") from None


def schema_library() -> Any:
    try:
        import jsonschema
    except ImportError:
        raise UserError(f"checking answers against a schema needs jsonschema: {install('[rl]')}") from None
    return jsonschema


def unresolvable() -> type[Exception]:
    """What a schema raises that refers to what is not there."""
    import referencing.exceptions
    return referencing.exceptions.Unresolvable


def grade_code(row: dict, answer: str) -> Grade:
    """The share of the row's "tests" (Python statements that raise if wrong) that the code passes, each run in a
    process of its own (sandbox.py). Code that also passes a test which nothing can pass has got round the tests, and
    has passed none. "format": it compiles, and does or defines something."""
    text = said(answer)
    fenced = FENCE.findall(text)
    code = fenced[-1] if fenced else text
    try:
        compile(code, "answer", "exec")
        shaped = any(not isinstance(statement, ast.Expr) for statement in ast.parse(code).body)
    except (SyntaxError, ValueError):
        return {"score": 0.0, "format": 0.0}
    tests = row["tests"] if isinstance(row["tests"], list) else [row["tests"]]
    passed = sum(passes(code + "\n" + test) for test in tests)
    if passed and passes(code + "\nraise AssertionError"):
        passed = 0
    return {"score": passed / max(len(tests), 1), "format": float(shaped)}


GRADERS: dict[Kind, Grader] = {"toy": grade_toy, "code": grade_code, "schema": grade_schema, "number": grade_number,
                               "text": grade_text}


def thought_first(answer: str, *, tagged: bool = False) -> bool:
    """Whether the turn has the form of a reasoner: one <think> block that says something, then an answer; `tagged`: the
    answer inside <answer> tags and nothing beside them (as DeepSeek-R1-Zero was asked to write, 2501.12948)."""
    inside = r"<think>(.*?)</think>\s*" + (r"<answer>(.*?)</answer>\s*" if tagged else r"(.*?)\s*")
    found: Any = re.fullmatch(inside, answer.strip(), re.DOTALL)
    return bool(found and all(part.strip() for part in found.groups())
                and not re.search(r"</?(think|answer)>", "".join(found.groups())))
