"""Constrained answers: whatever is chosen among the allowed ids follows the grammar, and all that does is allowed."""
from __future__ import annotations

import gc
import json
import random
import re
import threading
import weakref

import pytest
import torch
from hypothesis import example, given, settings, strategies as st

from mindseed.base.errors import UserError
from mindseed.infer.constrain import Grammar, Matcher, compiled, vocabulary
from mindseed.tokenizers.base import EOS, SPECIALS, ByteLevel
from mindseed.tokenizers.bpe_train import train
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.chat import call_json, parse_answer

pytest.importorskip("llguidance")
bounded = settings(max_examples=60, deadline=None)
TEXTS = ['{"name": "weather", "arguments": {"city": "北京", "days": 3}}',
         '{"id": -12, "tags": ["red", "green"], "ok": true}', "the seed grows, the seed is sown",
         "种子发芽。好的。", "\n\n  null false 0.5e-3 yes no maybe"] * 5
CALL, CALL_END, THINK_END = (SPECIALS.index(tag) for tag in ("<tool_call>", "</tool_call>", "</think>"))


@pytest.fixture(scope="module", params=["byte", "bpe"])
def tokenizer(request) -> ByteLevel:
    return Byte() if request.param == "byte" else train(TEXTS, vocab_size=400)


def walk(matcher: Matcher, tokenizer: ByteLevel, seed: int, *, most: int = 4000, stop: float = 0.3) -> list[int]:
    """Ids of an answer that chooses uniformly among what is allowed, and ends where it may with probability `stop`."""
    rng, ids = random.Random(seed), []
    while not matcher.done:
        allowed = matcher.allowed()
        assert allowed is not None and allowed.shape == (tokenizer.vocab_size,) and allowed.dtype == torch.bool
        able = allowed.nonzero()[:, 0].tolist()
        assert able or matcher.may_stop
        if matcher.may_stop and (not able or rng.random() < stop):
            break
        assert len(ids) < most, tokenizer.decode(ids)
        closing = [id for id in able if not tokenizer.tokens.get(id, b"x").strip(b'"}].')]
        ids.append(rng.choice(closing if closing and rng.random() < 0.7 else able))           # or strings hardly end
        matcher.advance(ids[-1])
    return ids


def feed(matcher: Matcher, ids: list[int]) -> Matcher:
    for id in ids:
        allowed = matcher.allowed()
        assert allowed is None or allowed[id], f"refused: {id}"
        matcher.advance(id)
    return matcher


def spelt(tokenizer: ByteLevel, matcher: Matcher) -> set[bytes]:
    return {tokenizer.token_bytes(id) for id in matcher.allowed().nonzero()[:, 0].tolist()}


# ------------------------------------------------------------------------------------------------------------ schemas

POINT = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}, "required": ["x", "y"],
         "additionalProperties": False}
COLOURS = ["red", "gr\"een\n", "好", 3, None, {"a": [1]}]
SCHEMAS = {
    "integer": ({"type": "integer", "minimum": -3, "maximum": 12}, lambda v: type(v) is int and -3 <= v <= 12),
    "number": ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, lambda v: 0 < v <= 1),
    "multiple": ({"type": "integer", "multipleOf": 7}, lambda v: v % 7 == 0),
    "boolean": ({"type": "boolean"}, lambda v: type(v) is bool),
    "null": ({"type": "null"}, lambda v: v is None),
    "enum": ({"enum": COLOURS}, lambda v: v in COLOURS),
    "const": ({"const": {"a": 1, "b": "é"}}, lambda v: v == {"a": 1, "b": "é"}),
    "length": ({"type": "string", "minLength": 2, "maxLength": 4}, lambda v: 2 <= len(v) <= 4),
    "pattern": ({"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$"}, lambda v: re.fullmatch("[A-Z]{2}-[0-9]+", v)),
    "date": ({"type": "string", "format": "date"}, lambda v: re.fullmatch(r"\d{4}-\d\d-\d\d", v)),
    "array": ({"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 4},
              lambda v: 2 <= len(v) <= 4 and set(v) <= {"a", "b"}),
    "tuple": ({"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False, "minItems": 2},
              lambda v: type(v[0]) is bool and v[1:] == [None]),
    "nested": ({"type": "object", "properties": {"id": {"type": "integer"}, "at": POINT,
                                                 "路": {"type": "array", "items": POINT, "maxItems": 2}},
                "required": ["id", "at"], "additionalProperties": False},
               lambda v: type(v["id"]) is int and set(v["at"]) == {"x", "y"} and set(v) <= {"id", "at", "路"}),
    "additional": ({"type": "object", "additionalProperties": {"type": "integer"}},
                   lambda v: all(type(x) is int for x in v.values())),
    "any of": ({"anyOf": [POINT, {"type": "string", "maxLength": 3}]}, lambda v: len(v) <= 3),
    "one of": ({"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 3}]}, lambda v: type(v) in (int, str)),
    "all of": ({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]}, lambda v: 3 <= v <= 9),
    "ref": ({"$ref": "#/$defs/list", "$defs": {"list": {"anyOf": [{"type": "null"}, {
        "type": "object", "properties": {"next": {"$ref": "#/$defs/list"}}, "required": ["next"],
        "additionalProperties": False}]}}}, lambda v: v is None or set(v) == {"next"}),
    "object": ({"type": "object"}, lambda v: type(v) is dict),
    "remarks": ({"type": "integer", "title": "n", "description": "how many", "default": 3, "examples": [1],
                 "$schema": "https://json-schema.org/draft/2020-12/schema"}, lambda v: type(v) is int),
    "anything": ({}, lambda v: True),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_walk_through_a_schema_follows_it(tokenizer, name):
    schema, good = SCHEMAS[name]
    grammar = Grammar.json_schema(tokenizer, schema)
    for seed in range(12):
        ids = walk(grammar.start(), tokenizer, seed)
        text = tokenizer.decode(ids)
        value = json.loads(text)
        assert good(value), text
        assert all(id in tokenizer.tokens for id in ids)
        try:
            import jsonschema
            jsonschema.validate(value, schema)
        except ImportError:
            pass


def test_json_is_written_as_json_dumps_writes_it(tokenizer):
    grammar = Grammar.json_schema(tokenizer, {})
    for text in TEXTS[:2]:
        matcher = feed(grammar.start(), tokenizer.encode(text))
        assert matcher.done and matcher.may_stop and not matcher.allowed().any()
    for text in (' {', '{ ', '{"a":1', '{"a" ', '{"a": 1 ', '{"a":  ', '{"a": [1,2', '{"a": 1}\n', '{"a": "\t',
                 '{"a": "\\ud8'):
        with pytest.raises(AssertionError, match="refused"):
            feed(grammar.start(), [tokenizer.encode(c)[0] for c in text])


def test_no_key_passes_for_another_one(tokenizer):
    """Escapes that spell a character in a longer way than needed never come, or "a" could be said as "\\u0061"."""
    schema = {"type": "object", "properties": {"a/é": {"type": "integer"}}, "required": ["a/é"]}
    grammar = Grammar.json_schema(tokenizer, schema)
    for start in ('{"a/é": 1, "', '{"a/é": 1, "b\\\\', '{"a/é": 1, "b": "\\n'):
        matcher = feed(grammar.start(), tokens_of(tokenizer, start))
        assert matcher.allowed()[byte(tokenizer, b"\\")]
        matcher.advance(byte(tokenizer, b"\\"))
        assert {b"n", b'"', b"\\"} <= spelt(tokenizer, matcher) and not {b"u", b"/"} & spelt(tokenizer, matcher)
    for seed in range(20):
        text = tokenizer.decode(walk(grammar.start(), tokenizer, seed))
        assert type(json.loads(text)["a/é"]) is int and "\\u" not in text.replace("\\\\", "")
    forced = Grammar.json_schema(tokenizer, {"enum": ["\x01", "\x02b"]})          # here there is no other way
    said = {json.loads(tokenizer.decode(walk(forced.start(), tokenizer, seed))) for seed in range(12)}
    assert said == {"\x01", "\x02b"}


def byte(tokenizer: ByteLevel, one: bytes) -> int:
    return next(id for id, token in tokenizer.tokens.items() if token == one)


def tokens_of(tokenizer: ByteLevel, text: str) -> list[int]:
    return [byte(tokenizer, bytes([b])) for b in text.encode()] if isinstance(tokenizer, Byte) else (
        tokenizer.encode(text))


def test_more_properties_than_are_named_cannot_be_promised(tokenizer):
    loose = {"type": "object", "minProperties": 2, "patternProperties": {"^[ab]$": {"enum": [0]}},
             "additionalProperties": False}
    with pytest.raises(UserError, match="at least 2 properties and requires 0"):
        Grammar.json_schema(tokenizer, loose)
    Grammar.json_schema(tokenizer, POINT | {"minProperties": 2})


def test_a_json_object_is_an_object(tokenizer):
    grammar = Grammar.json_object(tokenizer)
    assert spelt(tokenizer, grammar.start()) <= {b"{", b'{"', b'{}'}
    for seed in range(10):
        assert type(json.loads(tokenizer.decode(walk(grammar.start(), tokenizer, seed)))) is dict


def test_a_schema_does_not_bring_its_own_white_space(tokenizer):
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False,
              "x-guidance": {"whitespace_flexible": True, "lenient": True}}
    for seed in range(5):
        assert tokenizer.decode(walk(Grammar.json_schema(tokenizer, schema).start(), tokenizer, seed)) == '{"a": 1}'
    with pytest.raises(UserError, match="uniqueItems"):
        Grammar.json_schema(tokenizer, {**schema, "uniqueItems": True})


# -------------------------------------------------------------------------------------------------- patterns and texts

@pytest.mark.parametrize("pattern", ["[a-c]{2,4}", "^(yes|no|maybe)$", r"\d{1,3}\.[\d/]{2}", "(ab?c|天)*x",
                                     r"a/b\n\$\"", "(?i)seed", "[^a-z]{3}", "好.", "", "a|ab|abc", r"\p{Lu}+",
                                     "line\nend"])
def test_every_walk_matches_the_pattern(tokenizer, pattern):
    grammar = Grammar.regex(tokenizer, pattern)
    oracle = re.compile(pattern.replace(r"\p{Lu}", r"[^\W\d_a-z]"))
    for seed in range(20):
        text = tokenizer.decode(walk(grammar.start(), tokenizer, seed))
        assert oracle.fullmatch(text), text


@pytest.mark.parametrize("pattern, good, bad", [("[ab]{1,3}c?", ["a", "abc", "bbb"], ["", "c", "aaaa", "acb"]),
                                                ("([0-9][0-9])+", ["12", "1234"], ["", "1", "123"])])
def test_the_mask_is_exact(tokenizer, pattern, good, bad):
    """An id may follow just if the text with it can still become a match; where the answer may end, it matches."""
    able = re.compile(pattern)
    for text in good + bad:
        matcher = Grammar.regex(tokenizer, pattern).start()
        for i, c in enumerate(text.encode()):
            one = tokenizer.encode(chr(c))[0]
            if not matcher.allowed()[one]:
                assert text in bad
                break
            matcher.advance(one)
            for id, token in tokenizer.tokens.items():
                so_far = text.encode()[:i + 1] + token
                completable = any(able.fullmatch((so_far.decode("latin-1") + end)) for end in ("", "0", "00", "a", "c"))
                assert bool(matcher.allowed()[id]) == completable, (so_far, matcher.done)
        else:
            assert matcher.may_stop == (text in good) == bool(able.fullmatch(text))


texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=1, max_size=4, unique=True)


@bounded
@given(texts=texts, seed=st.integers(0, 99))
@example(texts=["a", "ab", "a/b|c\\", '"\n', "\\u0041", "é", "e\u0301", "\0", "\xff"], seed=1)
def test_a_choice_is_one_of_its_texts_and_each_can_be_chosen(tokenizer, texts, seed):
    grammar = Grammar.choice(tokenizer, texts)
    assert tokenizer.decode(walk(grammar.start(), tokenizer, seed)) in texts
    for text in texts:
        matcher = grammar.start()
        for id in tokenizer.encode(text):
            if not matcher.allowed()[id]:         # another spelling of the same bytes, where only those can follow
                break
            matcher.advance(id)
        else:
            assert matcher.may_stop


def test_what_must_follow_comes_in_its_usual_tokens(tokenizer):
    for text in ("the seed grows", "种子发芽。", '{"name": "weather", "arguments": {"city": '):
        matcher, ids = Grammar.choice(tokenizer, [text]).start(), []
        while not matcher.done:
            able = matcher.allowed().nonzero()[:, 0].tolist()
            assert len(able) == 1
            ids += able
            matcher.advance(able[0])
        assert ids == tokenizer.encode(text)


def test_special_tokens_are_not_text(tokenizer):
    """Neither their ids where text is free, nor in a text that spells them."""
    everything = Grammar.regex(tokenizer, r"(?s:.*)").start()
    for text in ("a", "<|im_end|>", "<tool_call>", "</think>", "天"):
        allowed = everything.allowed()
        assert not allowed[list(tokenizer.specials.values())].any() and everything.may_stop
        feed(everything, tokenizer.encode(text))
    assert feed(Grammar.choice(tokenizer, [EOS]).start(), tokenizer.encode(EOS)).done


def test_gaps_and_bytes_that_no_text_holds_never_follow():
    class Gaps(Byte):
        def __init__(self) -> None:
            super().__init__()
            tokens = {id + 40 * (id > 200): token for id, token in self.tokens.items()} | {400: b"\xff[", 401: b"ab"}
            ByteLevel.__init__(self, tokens, self.specials, self.visible)
    tokenizer = Gaps()
    matcher = Grammar.regex(tokenizer, "(?s:.)+").start()
    able = set(matcher.allowed().nonzero()[:, 0].tolist())
    assert able <= tokenizer.tokens.keys() and 401 in able and 400 not in able and tokenizer.vocab_size == 402
    assert not any(tokenizer.tokens[id] == b"\xff" for id in able)
    body = compiled(tokenizer, f'start: /a*/ <[{CALL}]> "b"', "it")           # nor where a special token may follow
    able = [id for id, bias in enumerate(body.compute_logit_bias()) if bias]
    assert {tokenizer.token_bytes(id) for id in able} == {b"<tool_call>", b"a"}
    free = Grammar.regex(tokenizer, "a").after("</think>").start().allowed()
    assert set(free.nonzero()[:, 0].tolist()) == {*tokenizer.tokens, *tokenizer.specials.values()}


# --------------------------------------------------------------------------------------------------------- tool calls

WEATHER = {"type": "function", "function": {"name": "weather", "description": "how it will be", "parameters": {
    "type": "object", "required": ["city"], "properties": {
        "city": {"enum": ["北京", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}}}}}
ADD = {"name": "add", "parameters": {"required": ["x", "y"], "properties": {"x": {"type": "integer"},
                                                                            "y": {"type": "integer"}}}}
ODD = {"name": 'o"b\\\n天', "parameters": None}
TOOLS = [WEATHER, ADD, ODD]


def check_call(call: dict) -> None:
    name, arguments = call["name"], call["arguments"]
    if name == "weather":
        assert set(arguments) <= {"city", "days"} and arguments["city"] in ("北京", "Oslo")
        assert type(arguments.get("days", 1)) is int and 1 <= arguments.get("days", 1) <= 9
    elif name == "add":
        assert set(arguments) == {"x", "y"} and all(type(value) is int for value in arguments.values())
    else:
        assert name == ODD["name"] and type(arguments) is dict


def test_required_calls_are_calls_and_nothing_else(tokenizer):
    names = []
    for parallel in (True, False):
        grammar = Grammar.tool_calls(tokenizer, TOOLS, choice="required", parallel=parallel)
        for seed in range(25):
            ids = walk(grammar.start(), tokenizer, seed)
            answer = parse_answer(tokenizer.decode(ids))
            assert ids[0] == CALL and answer["content"] == "" and answer["reasoning_content"] is None
            assert 1 <= len(answer["tool_calls"]) == ids.count(CALL) == ids.count(CALL_END)
            assert parallel or len(answer["tool_calls"]) == 1
            assert not {*ids} & {*tokenizer.specials.values()} - {CALL, CALL_END}
            for call in answer["tool_calls"]:
                check_call(call)
            names += [call["name"] for call in answer["tool_calls"]]
    assert {*names} == {"weather", "add", ODD["name"]} and len(names) > 50


def test_a_named_function_is_the_one_that_is_called(tokenizer):
    for name in ("weather", "add"):
        grammar = Grammar.tool_calls(tokenizer, TOOLS, choice=name)
        for seed in range(8):
            calls = parse_answer(tokenizer.decode(walk(grammar.start(), tokenizer, seed)))["tool_calls"]
            assert {call["name"] for call in calls} == {name}


def test_a_call_is_written_as_it_was_learnt(tokenizer):
    call = {"name": "add", "arguments": {"x": 1, "y": -20}}
    for tools in ([ADD], TOOLS):
        for choice in ("auto", "required"):
            matcher = Grammar.tool_calls(tokenizer, tools, choice=choice).start()
            feed(matcher, [CALL, *tokenizer.encode(f"\n{call_json(call)}\n"), CALL_END])
            assert matcher.may_stop and not matcher.done


@pytest.mark.parametrize("parallel", [True, False])
def test_auto_is_free_around_calls_and_bound_within(tokenizer, parallel):
    matcher = Grammar.tool_calls(tokenizer, TOOLS, choice="auto", parallel=parallel).start()
    for turn in range(2):
        for id in (*tokenizer.encode("well, <tool_call> {"), tokenizer.specials["<think>"], CALL_END):
            assert matcher.allowed() is None and matcher.may_stop and not matcher.done
            matcher.advance(id)
        matcher.advance(CALL)
        assert not matcher.may_stop and matcher.allowed() is not None and not matcher.done
        rng, ids = random.Random(turn), [CALL]
        while ids[-1] != CALL_END:
            able = matcher.allowed().nonzero()[:, 0].tolist()
            assert CALL_END not in able or able == [CALL_END]
            assert not {*able} & {*tokenizer.specials.values()} - {CALL_END} and not matcher.may_stop
            ids.append(rng.choice(able))
            matcher.advance(ids[-1])
            if len(ids) > 2000:                   # a long string: another draw
                pytest.skip("the walk went on for too long")
        answer = parse_answer(tokenizer.decode(ids))
        assert answer["content"] == "" and len(answer["tool_calls"]) == 1
        check_call(answer["tool_calls"][0])
        if not parallel:
            assert matcher.done and matcher.may_stop and not matcher.allowed().any()
            return
    assert matcher.allowed() is None


def test_after_a_thought(tokenizer):
    required = Grammar.tool_calls(tokenizer, [ADD], choice="required").after("</think>")
    matcher = required.start()
    for id in (*tokenizer.encode("hm </think>"), CALL, tokenizer.specials[EOS]):
        allowed = matcher.allowed()               # free, but it may not end: the call is still missing
        assert allowed[[*tokenizer.tokens, *tokenizer.specials.values()]].all()
        assert not matcher.may_stop and not matcher.done
        matcher.advance(id)
    matcher.advance(THINK_END)
    assert matcher.allowed().nonzero()[:, 0].tolist() == [CALL]
    feed(matcher, [CALL, *tokenizer.encode('\n{"name": "add", "arguments": {"x": 0, "y": 0}}\n'), CALL_END])
    assert matcher.may_stop

    auto = Grammar.tool_calls(tokenizer, [ADD], choice="auto").after("</think>").start()
    for id in (CALL, *tokenizer.encode("thoughts about it"), THINK_END, THINK_END):
        assert auto.allowed() is None and auto.may_stop
        auto.advance(id)
    auto.advance(CALL)
    assert auto.allowed() is not None
    may_be_empty = Grammar.regex(tokenizer, "a*").after("</think>").start()
    assert may_be_empty.allowed() is None and may_be_empty.may_stop


def test_parameters_by_the_letter_or_as_far_as_they_are_known(tokenizer):
    odd = {"type": "object", "required": ["a"], "properties": {
        "a": {"type": "array", "items": {"const": 1}, "uniqueItems": True, "maxItems": 2}}}
    for seed in range(5):
        grammar = Grammar.tool_calls(tokenizer, [{"name": "f", "parameters": odd}], choice="f", parallel=False)
        answer = parse_answer(tokenizer.decode(walk(grammar.start(), tokenizer, seed)))
        assert answer["tool_calls"][0]["arguments"]["a"] in ([], [1], [1, 1])
    with pytest.raises(UserError, match="uniqueItems"):
        Grammar.tool_calls(tokenizer, [{"name": "f", "parameters": odd, "strict": True}])
    mine = {"name": "f", "parameters": {"properties": {"a": {}}}}
    Grammar.tool_calls(tokenizer, [mine])
    bare = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    none = Grammar.tool_calls(tokenizer, [bare], choice="f", parallel=False)
    assert '"arguments": {}}' in tokenizer.decode(walk(none.start(), tokenizer, 0))
    assert mine == {"name": "f", "parameters": {"properties": {"a": {}}}}


# ------------------------------------------------------------------------------------------------- matchers, grammars

def test_forks_go_their_own_ways(tokenizer):
    matcher = feed(Grammar.choice(tokenizer, ["red", "rose"]).start(), tokenizer.encode("r")[:1])
    fork = matcher.fork()
    feed(matcher, tokenizer.encode("e")[:1])
    assert spelt(tokenizer, matcher) == {b"d"} and {b"e", b"o"} <= spelt(tokenizer, fork)
    fork.advance(tokenizer.encode("o")[0])
    assert "r" + "o" + tokenizer.decode(walk(fork, tokenizer, 0)) == "rose" and fork.done and not matcher.done
    assert tokenizer.decode(walk(matcher, tokenizer, 0)) == "d"
    waiting = Grammar.tool_calls(tokenizer, [ADD]).start()
    called = waiting.fork()
    called.advance(CALL)
    assert waiting.allowed() is None and called.allowed() is not None


def test_an_id_that_was_not_allowed_is_an_error_of_ours(tokenizer):
    matcher = Grammar.choice(tokenizer, ["ab"]).start()
    with pytest.raises(ValueError, match="not allowed"):
        matcher.advance(tokenizer.encode("z")[0])
    done = Grammar.choice(tokenizer, ["a"]).start()
    done.advance(tokenizer.encode("a")[0])
    with pytest.raises(ValueError, match="not allowed"):
        done.advance(tokenizer.encode("a")[0])


def test_a_mask_is_the_callers_own(tokenizer):
    matcher = Grammar.regex(tokenizer, "a+").start()
    mask = matcher.allowed()
    mask.fill_(True)
    assert matcher.allowed().sum() < 20


def test_threads_share_a_grammar(tokenizer):
    grammar, wrong = Grammar.json_schema(tokenizer, SCHEMAS["nested"][0]), []

    def work(seed: int) -> None:
        for i in range(5):
            if not SCHEMAS["nested"][1](json.loads(tokenizer.decode(walk(grammar.start(), tokenizer, seed + i)))):
                wrong.append(seed)
    threads = [threading.Thread(target=work, args=(10 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def test_a_vocabulary_is_laid_out_once_and_goes_with_its_tokenizer():
    tokenizer = Byte()
    assert vocabulary(tokenizer) is vocabulary(tokenizer)
    Grammar.regex(tokenizer, "a")
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None
