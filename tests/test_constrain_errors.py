"""What cannot be constrained is a UserError of one line, and what would take hours is refused or given up in time."""
from __future__ import annotations

import random
import sys
import time

import pytest

from mindseed.base.errors import UserError
from mindseed.infer.constrain import Grammar
from mindseed.tokenizers.bpe_train import train
from mindseed.tokenizers.byte import Byte

pytest.importorskip("llguidance")
ADD = {"name": "add", "parameters": {"properties": {"x": {"type": "integer"}}}}


def deep(levels: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


BAD = {
    "no type": ({"type": "strin"}, "Invalid type: strin"),
    "unknown": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "not": ({"not": {"type": "integer"}}, "not"),
    "format": ({"type": "string", "format": "colour"}, "Unknown format: colour"),
    "pattern": ({"type": "string", "pattern": "a(?=b)"}, "look-around"),
    "empty": ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
    "no value": ({"enum": []}, "Unsatisfiable"),
    "endless": ({"$ref": "#"}, "no text fulfils it"),
    "remote": ({"$ref": "http://127.0.0.1:9/schema.json"}, "not present"),
    "lost": ({"$ref": "#/$defs/none"}, "\\$defs/none"),
    "surrogate": ({"enum": ["\ud800"]}, "hex escape|surrogate"),
    "not finite": ({"const": float("nan")}, "not JSON"),
    "not json": ({"const": {1, 2}}, "not JSON"),
    "not an object": ([], "must be an object"),
    "deep": (deep(200), "recursion limit|nested too deeply"),
    "very deep": (deep(20000), "nested too deeply"),
    "wide": ({"type": "object", "properties": {f"p{i}": {} for i in range(1001)}}, "at most 1000 members"),
    "large": ({"anyOf": [{"properties": {f"p{i}": {} for i in range(900)}} for _ in range(12)]}, "10000 in all"),
    "product": ({"allOf": [{"anyOf": [{"type": "object", "properties": {f"a{i}{j}": {"type": "integer"}}}
                                      for j in range(4)]} for i in range(9)]}, "too large"),
    "multiples": ({"type": "integer", "multipleOf": 9999991}, "multipleOf"),
    "many multiples": ({"allOf": [{"type": "integer", "multipleOf": n} for n in (97, 89, 83)]}, "multipleOf"),
    "many conditions": ({"allOf": [{"type": "string", "pattern": f".*{n}.*"} for n in range(11)]}, "more than 10"),
    "long pattern": ({"type": "string", "pattern": "^(a{100}){300}$"}, "would have to follow"),
}


@pytest.mark.parametrize("name", BAD)
def test_schemas_that_cannot_be_followed_are_user_errors(name):
    schema, message = BAD[name]
    begin = time.perf_counter()
    with pytest.raises(UserError, match=message) as caught:
        Grammar.json_schema(Byte(), schema)
    assert time.perf_counter() - begin < 20
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("pattern, message", [("(", "unclosed group"), ("a(?=b)", "look-around"),
                                              (r"(a)\1", "backreferences"), (r"a\b", "lookarounds"),
                                              ("(a{100}){300}", "would have to follow"),
                                              (r"[^\s\S]", "no text"), ("(" * 2000 + "a" + ")" * 2000, "nest"),
                                              ("\ud800", "surrogate")])
def test_patterns_that_cannot_be_followed_are_user_errors(pattern, message):
    with pytest.raises(UserError, match=message) as caught:
        Grammar.regex(Byte(), pattern)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_other_requests_that_make_no_sense():
    byte = Byte()
    for make, message in [
        (lambda: Grammar.choice(byte, []), "list of texts"), (lambda: Grammar.choice(byte, "ab"), "list of texts"),
        (lambda: Grammar.choice(byte, ["a", 1]), "list of texts"),
        (lambda: Grammar.choice(byte, ["\ud800"]), "surrogate"),
        (lambda: Grammar.tool_calls(byte, []), "no tools"),
        (lambda: Grammar.tool_calls(byte, [{"name": ""}]), "tool 0"),
        (lambda: Grammar.tool_calls(byte, [ADD, "add"]), "tool 1 must be"),
        (lambda: Grammar.tool_calls(byte, [ADD, ADD]), "two tools"),
        (lambda: Grammar.tool_calls(byte, [ADD], choice="sub"), "'sub' is no function of this request; there are add"),
        (lambda: Grammar.tool_calls(byte, [{"name": "f", "parameters": {"type": "array"}}]), "have the type object"),
        (lambda: Grammar.tool_calls(byte, [{"name": "f", "parameters": []}]), "must be an object"),
        (lambda: Grammar.tool_calls(byte, [{"name": "f", "parameters": {"properties": {"a": {"type": "int"}}}}]),
         "Invalid type"),
        (lambda: Grammar.tool_calls(Byte(("<|x|>",)), [ADD]), "no special token <tool_call>"),
        (lambda: Grammar.regex(byte, "a").after("</thought>"), "no special token </thought>"),
    ]:
        with pytest.raises(UserError, match=message):
            make()


def test_a_grammar_that_grows_too_complex_on_the_way_is_a_user_error():
    """Some patterns are small until text comes: the library gives up within bounds, and says so."""
    rng, begin = random.Random(0), time.perf_counter()
    tokenizer = train(["".join(rng.choice("abc") for _ in range(20000))], vocab_size=1000)
    matcher = Grammar.regex(tokenizer, "(.*a.{200}){20}").start()
    with pytest.raises(UserError, match="can't be followed from here: .*too many"):
        for i in range(3000):
            matcher.allowed()
            matcher.advance(tokenizer.encode("ab"[i * i % 7 % 2])[0])
    assert time.perf_counter() - begin < 60
    assert not matcher.done and not matcher.may_stop


def test_a_long_text_that_must_follow_costs_little():
    byte = Byte()
    matcher = Grammar.regex(byte, "[xy](a{100}){150}").start()
    matcher.advance(byte.encode("x")[0])
    matcher.allowed()
    begin = time.perf_counter()
    for _ in range(20):
        assert matcher.allowed()[byte.encode("a")[0]]
        matcher.advance(byte.encode("a")[0])
    assert time.perf_counter() - begin < 30
    matcher = Grammar.regex(byte, "[xy](a{100}){500}").start()
    matcher.advance(byte.encode("x")[0])
    with pytest.raises(UserError, match="from here: a text of .* would have to follow"):
        matcher.allowed()


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"-m pip install .*\[serve\]"):
        Grammar.json_object(Byte())
