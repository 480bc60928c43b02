"""Graders of answers that a program can check, and the process that code runs in."""
from __future__ import annotations

import re
import time
from fractions import Fraction

import pytest
from hypothesis import given, strategies as st

from mindseed.base.errors import UserError
from mindseed.tasks.sandbox import passes
from mindseed.tasks.verify import grade, kind_of, number_in, require_gradable, thought_first


@pytest.mark.parametrize("text, value", [
    ("The answer is 42.", 42), ("costs $1,234.50 in all", Fraction(2469, 2)), ("-3", -3), ("1/3 of it", Fraction(1, 3)),
    ("12 then 7", 7), ("nothing", None), ("1/0", None), ("3.0", 3), ("v1.2", None), ("一共5个", 5), ("50%", 50),
    ("it is \u22125", -5), (".5", Fraction(1, 2)), ("1e6", 10 ** 6), ("10^5", None), ("9-5", 5), ("9" * 5000, None)])
def test_numbers_in_texts(text, value):
    assert number_in(text) == value


@given(st.integers(-10 ** 9, 10 ** 9))
def test_a_number_is_read_with_and_without_commas(n):
    assert number_in(f"It is {n:,}.") == number_in(f"#### {n}") == n


@pytest.mark.parametrize("row, answer, score, shape", [
    ({"answer": "so 3+4=7\n#### 7"}, "<think>3+4</think>\n<answer>7</answer>", 1, 1),
    ({"answer": "#### 7"}, "7 and not 8", 0, 1), ({"answer": "#### 7"}, "<think>7</think>\nwho knows", 0, 0),
    ({"answer": "1,000"}, "it is 1000.0", 1, 1),
    ({"answer": "Paris"}, "<think>France?</think>\nParis.", 1, 1), ({"answer": "Paris"}, "paris", 0, 1),
    ({"answer": "Paris"}, "", 0, 0),
    ({"schema": {"type": "object", "required": ["a"]}}, '```json\n{"a": 1}\n```', 1, 1),
    ({"schema": {"type": "object", "required": ["a"]}}, '{"b": 1}', 0, 1), ({"schema": {}}, "{", 0, 0),
    ({"tests": ["assert f(2) == 4", "assert f(3) == 9"]}, "```python\ndef f(x):\n    return x + x\n```", 0.5, 1),
    ({"tests": ["pass"]}, "def f(:", 0, 0),
    ({"family": "facts", "answer": "Ann lives in Rome."}, "Ann lives in Rome", 1, 1)])
def test_grades(row, answer, score, shape):
    assert grade(row, answer) == {"score": score, "format": shape}


@pytest.mark.parametrize("answer, kind", [
    ("5", "number"), ("1,234", "number"), ("$18", "number"), ("5%", "number"), ("-5.", "number"), ("\u22125", "number"),
    ("x #### 72", "number"), (7, "number"), ("10:30", "text"), ("2024-05-17", "text"), ("Boeing 747", "text"),
    ("The Battle of Hastings, 1066", "text"), ("3, 4 and 5", "text")])
def test_what_merely_holds_a_number_is_a_text(answer, kind):
    assert kind_of({"answer": answer}) == kind


@pytest.mark.parametrize("row, answer", [
    ({"answer": "5"}, "9" * 5000), ({"schema": {}}, "[" * 100_000), ({"schema": {}}, "9" * 5000),
    ({"tests": "pass"}, "-" * 3000 + "1"), ({"tests": "pass"}, "not " * 3000 + "1"),
    ({"tests": "pass"}, "x" + ".a" * 30_000), ({"tests": "pass"}, "\0")])
def test_an_answer_that_cannot_be_read_is_wrong(row, answer):
    assert grade(row, answer)["score"] == 0


@pytest.mark.parametrize("answer", ["", "Sorry", "5", '"a text"'])
def test_what_defines_nothing_has_not_the_form_of_code(answer):
    assert grade({"tests": "assert f(2) == 4"}, answer)["format"] == 0


@pytest.mark.parametrize("fence", ["```python\n", "```Python\n", "```python3 \n", "``` py\r\n", "```\n"])
def test_fences_as_models_write_them(fence):
    assert grade({"tests": "assert f(2) == 4"}, f"Here:\n{fence}def f(x):\n    return x * x\n```\nDone.")["score"] == 1


def test_code_that_gets_round_the_tests_has_passed_none():
    """It finds the word that only the end of the code should say."""
    cheat = "import sys, os\nos.write(1, sys._getframe(1).f_globals['word'].encode())\nos._exit(0)"
    assert passes(cheat + "\nassert False") and grade({"tests": "assert False"}, cheat)["score"] == 0


@pytest.mark.parametrize("row, kind, says", [
    ({"answer": "x"}, "code", "which reads \"tests\""), ({"answer": "x"}, "toy", "a \"family\""),
    ({"family": "facts", "answer": 3}, None, "an \"answer\" that is a text"), ({"tests": [1]}, None, "\"tests\""),
    ({"schema": "{}"}, None, "a JSON object"), ({"schema": {"type": "nothing"}}, None, "a schema that is none"),
    ({"schema": {"$ref": "#/nowhere"}}, None, "a schema that is none"), ({"answer": "abc"}, "number", "a number in it"),
    ({"question": "?"}, None, "row 7 has only")])
def test_rows_that_cannot_be_graded_are_told_beforehand(row, kind, says):
    with pytest.raises(UserError, match=re.escape(says)):
        require_gradable(row, kind, where="row 7")


def test_a_row_without_anything_to_check():
    with pytest.raises(UserError, match="needs an \"answer\""):
        kind_of({"question": "why?"})


@pytest.mark.parametrize("answer, plain, tagged", [
    ("<think>a</think>\n5", True, False), ("<think>a</think><answer>5</answer>", False, True),
    ("<think>\n</think>\n5", False, False), ("5", False, False), ("<think>a</think>", False, False),
    ("<think>a</think><think>b</think>5", False, False), ("<answer>5</answer><think>a</think>", False, False),
    ("<think>a</think>\n<answer>5</answer> and more", False, False)])
def test_the_form_of_a_thought(answer, plain, tagged):
    assert thought_first(answer) == plain and thought_first(answer, tagged=True) == tagged


@pytest.mark.parametrize("code, good", [
    ("assert 1 + 1 == 2", True), ("assert 1 + 1 == 3", False), ("raise SystemExit(0)", False),
    ("import os; os._exit(0)", False), ("x = bytearray(2 ** 31)", False), ("print('\\n' * 99)", True),
    ("open('big', 'wb').write(b'x' * (2 << 20))", False), ("import os; assert not os.environ.get('HOME')", True),
    ("x = '\\ud800'", True)])
def test_code_in_its_process(code, good):
    assert passes(code) == good


def test_an_endless_loop_is_ended():
    start = time.monotonic()
    assert not passes("while True: pass", timeout_s=0.5)
    assert time.monotonic() - start < 20


def test_a_flood_of_output_is_not_kept():
    assert not passes("while True: print('x' * 100_000)", timeout_s=20)          # ended by its size, not by the clock
