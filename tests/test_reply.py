"""Answers taken apart as they come: any cutting says what parse_answer says, and nothing is held too long."""
from __future__ import annotations

import json

import pytest
from hypothesis import assume, example, given, settings, strategies as st

from mindseed.tokenizers.base import EOS, SIGNS
from mindseed.tokenizers.chat import call_json, parse_answer
from mindseed.tokenizers.reply import Piece, Reply, Scan, partial

bounded = settings(max_examples=150, deadline=None)
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", EOS]
GOOD = ['{"name": "f", "arguments": {"x": 1}}', '{"name":"天","arguments":{}}', '{"name": "g"}',
        '{"arguments": {}, "name": "h"}',
        '{"name": "f", "arguments": {"x": "</tool_call>"}}', '{"name": "f", "arguments": {"x": "<tool_call>"}}',
        '{"name": "a\\"b", "arguments": {"\\u00e9": [[], {}, [1, -0.5e+3, null, true, false, NaN, -Infinity]]}}']
BAD = ['{"name": 5}', '{"name": "f", "arguments": [1]}', "[1]", "{broken", '{"name": "f"',
       '{"name": "f", "arguments": {"x',
       '{"name": "\\ud800"}', '{"name": "f", "arguments": {"x": "\\udc00"}}', '{"x": 01}', '{"x": 1.}', '{"x": 5d}',
       "{}", '{"name": "f", "name": 5}', '{"name": "f", "arguments": {}, "arguments": 5}', '{"arguments": {}}',
       '{"a": [}']
JSON = [*'{}[]",:\\', "0", "12", "-", ".5", "e", "d", "true", "nul", "null", "NaN", "Infinity", '"name"', '"arguments"',
        '": ', "\\u", "00e9", "\\n", '{"', '"f"', '{"name": "f", "arguments": ']
SPACE = ["\n", "\n\n", " ", "\t", "\r", "\xa0", "\u3000", "\x1c", "\x0b"]
fragment = (st.sampled_from(TAGS) | st.sampled_from(GOOD) | st.sampled_from(BAD) | st.sampled_from(JSON)
            | st.sampled_from(SPACE) | st.sampled_from(["a", "b c", "好", "😀", "<", "<|im_", "</", "<tool", "think>"])
            | st.sampled_from(GOOD + BAD).map(lambda text: f"\n<tool_call>\n{text}\n</tool_call>")
            | st.sampled_from(TAGS).flatmap(lambda tag: st.integers(1, len(tag)).map(lambda n: tag[:n])))
wild = st.lists(fragment, max_size=10).map("".join)
cuts = st.lists(st.integers(0, 300), max_size=12) | st.just(list(range(1000)))        # here, or at every character

NOBODYS = "".join(SIGNS.values())                  # no answer holds them: decoding makes U+FFFD of them
name = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=NOBODYS), min_size=1, max_size=6)
plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<" + NOBODYS), max_size=12)
number = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
value = st.recursive(st.none() | st.booleans() | number | name,
                     lambda inner: st.lists(inner, max_size=2) | st.dictionaries(name, inner, max_size=2), max_leaves=5)
call = st.builds(lambda name, arguments: {"name": name, "arguments": arguments},
                 name, st.dictionaries(name, value, max_size=3))


def pieces(text: str, where: list[int], **settings) -> list[Piece]:
    borders = sorted({0, len(text), *(cut for cut in where if cut < len(text))})
    reply = Reply(**settings)
    out = [piece for a, b in zip(borders, borders[1:]) for piece in reply.push(text[a:b])]
    return out + reply.close()


def joined(pieces: list[Piece]) -> tuple[str, str, list[tuple[str, str]]]:
    reasoning = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
    content = "".join(piece.text for piece in pieces if piece.kind == "content")
    names = [(piece.index, piece.text) for piece in pieces if piece.kind == "call"]
    assert [index for index, _ in names] == list(range(len(names)))
    arguments = ["".join(piece.text for piece in pieces if (piece.kind, piece.index) == ("arguments", i))
                 for i in range(len(names))]
    assert all(piece.text for piece in pieces if piece.kind != "call")
    return reasoning, content, [(name, text) for (_, name), text in zip(names, arguments)]


def expected(text: str) -> tuple[str, str, list[tuple[str, str]]]:
    parsed = parse_answer(text)
    return (parsed["reasoning_content"] or "", parsed["content"],
            [(call["name"], json.dumps(call["arguments"], ensure_ascii=False)) for call in parsed["tool_calls"]])


def late_thought(text: str) -> bool:
    """What no stream can know: a </think> that was never opened makes a thought of all before it."""
    text = text.split(EOS, 1)[0].lstrip()
    return "</think>" in text and not text.startswith("<think>")


# ----------------------------------------------------------------------------------------------- the same as the whole

@bounded
@given(text=wild, where=cuts)
@example('<tool_call>\n<tool_call>{"name": "f"}</tool_call>', list(range(99)))
@example('<think> a \n</thin</think>\n\n<tool_call> {"name": "f"} \n</tool_call>\n\nb\n<|im_end|>c', list(range(99)))
def test_any_cutting_says_what_the_whole_says(text, where):
    assume(not late_thought(text))
    assert joined(pieces(text, where)) == expected(text)


@bounded
@given(text=wild, where=cuts)
def test_also_when_the_prompt_opened_the_thought(text, where):
    assert joined(pieces(text, where, thinking=True)) == expected("<think>\n" + text)


@bounded
@given(text=wild, where=cuts, thinking=st.booleans())
def test_without_tools_a_call_is_text(text, where, thinking):
    assume(thinking or not late_thought(text))
    reasoning, content, calls = expected("<think>\n" * thinking + text.replace("<tool_call>", "<tool-call>"))
    mine = joined(pieces(text, where, thinking=thinking, tools=False))
    assert mine == (reasoning.replace("<tool-call>", "<tool_call>"), content.replace("<tool-call>", "<tool_call>"), [])


def test_a_thought_that_was_never_opened_is_content():
    assert joined(pieces("why</think>yes", [3])) == ("", "why</think>yes", [])
    assert joined(pieces("why</think>yes", [3], thinking=True)) == ("why", "yes", [])


# ------------------------------------------------------------------------------------------- with a grammar's word

@bounded
@given(thought=st.none() | plain, content=plain, calls=st.lists(call, max_size=3),
       tail=st.sampled_from(["", "\n", " ok", EOS]), where=cuts, escaped=st.booleans())
def test_certain_calls_are_told_as_they_are_written(thought, content, calls, tail, where, escaped):
    written = [json.dumps(one) if escaped else call_json(one) for one in calls]
    text = "" if thought is None else f"<think>\n{thought}\n</think>\n\n"
    text += content + "".join(f"\n<tool_call>\n{one}\n</tool_call>" for one in written) + tail
    assume(not late_thought(text))
    reasoning, content, told = joined(pieces(text, where, certain=True))
    assert (reasoning, content) == expected(text)[:2]
    assert [(name, json.loads(arguments)) for name, arguments in told] == [(c["name"], c["arguments"]) for c in calls]
    assert all(f'"arguments": {arguments}}}' in one for (_, arguments), one in zip(told, written))


@bounded
@given(text=wild, where=cuts, thinking=st.booleans())
def test_a_broken_word_neither_fails_nor_depends_on_the_cutting(text, where, thinking):
    assert joined(pieces(text, where, thinking=thinking, certain=True)) == joined(
        pieces(text, [], thinking=thinking, certain=True))


def test_how_soon_a_certain_call_is_told():
    text, reply, seen = '\n<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>', Reply(certain=True), {}
    for i, c in enumerate(text):
        for piece in reply.push(c):
            seen[i] = piece
    assert seen.pop(text.index('",')) == Piece("call", "add")
    start = text.index('{"x"')
    assert [(i, piece.text) for i, piece in seen.items()] == list(enumerate('{"x": 1}', start))
    assert reply.close() == []


@pytest.mark.parametrize("body, told", [
    ('{"name": "f"}', "{}"), ('{"name": "f", "arguments" : {"a": 1} }', '{"a": 1}'),
    ('{ "name":"f","arguments":{}}', "{}"), ('{"arguments": {"a":1}, "name": "f"}', '{"a": 1}')])
def test_other_ways_of_writing_a_certain_call(body, told):
    text = f"<tool_call>{body}</tool_call>after"
    for where in ([], list(range(99))):
        assert joined(pieces(text, where, certain=True)) == ("", "after", [("f", told)])


def test_a_certain_call_that_is_cut_off_keeps_what_was_told():
    text = 'a\n<tool_call>\n{"name": "f", "arguments": {"x": "lo'
    assert joined(pieces(text, [40], certain=True)) == ("", "a", [("f", '{"x": "lo')])
    assert joined(pieces(text, [40])) == ("", text, [])
    text = 'a\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool'
    assert joined(pieces(text, [40], certain=True)) == ("", "a", [("f", "{}")])


# --------------------------------------------------------------------------------------------------------- no longer

def shown(text: str, **settings) -> str:
    return "".join(piece.text for piece in Reply(**settings).push(text))


@pytest.mark.parametrize("text, told", [
    ("a", "a"), (" \n a", "a"), ("<", ""), ("<t", ""), ("<x", "<x"), ("<thin", ""), ("<thinly", "<thinly"), ("a<", "a"),
    ("a\n", "a"), ("a\n\n", "a\n"), ("a\n<tool_ca", "a"), ("a\n<tool_cab", "a\n<tool_cab"), ("a<|im_e", "a"),
    ("a<|im_x", "a<|im_x"),
    ("a b ", "a b "), ("<think> x y ", "x y"), ("<think>x</", "x"), ("<think>x </p", "x </p"),
    ("<think>x</think>\n\ny", "xy"),
    ("a\n<tool_call>", "a"), ("a<tool_call>\n ", "a"), ("a\n<tool_call>\nb", "a\n<tool_call>\nb"),
    ('<tool_call>{"name": "f"', ""), ('<tool_call>{"name": "f",}', '<tool_call>{"name": "f",}'),
    ('<tool_call>{"name": "f"}\n</tool', ""), ('<tool_call>{"name": "f"}\n</to>', '<tool_call>{"name": "f"}\n</to>'),
    ('<tool_call>{"name": 5}</tool_call', ""),
    ('<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>'),
    ('<tool_call>{"name": "f"}</tool_call>', "f{}"), ("a" + EOS + "b", "a"), ("a " + EOS, "a "),
])
def test_what_is_told_at_once(text, told):
    assert shown(text) == told


def test_nothing_is_read_after_the_end():
    reply = Reply()
    assert reply.push("a" + EOS) == [Piece("content", "a")] and reply.push("b") == [] and reply.close() == []


@given(text=st.text("ab<>", max_size=8), tag=st.sampled_from(["<ab>", "\n<a", "aab", "aa"]))
def test_partial_is_the_longest_beginning_of_a_tag(text, tag):
    assert partial(text, tag) == max(n for n in range(len(tag)) if text.endswith(tag[:n]))


# --------------------------------------------------------------------------------------------- when JSON is beyond help

def completion(scan: Scan) -> str:
    """Some text that closes the object."""
    end = ""
    if scan.token == "string":
        end = {"": "", "\\": "n"}.get(scan.left, "0" * len(scan.left)) + '"'
    elif scan.token == "word":
        end = scan.left
    elif scan.token:
        end = "" if scan.token in "09fx" else "0"
    want = scan.want
    if want.startswith("key"):
        end += ":0" if scan.token else '"k":0' if want == "key" else ""
    elif want == ":":
        end += ":0"
    elif want == "value" and not scan.token:
        end += "0"
    return end + "".join("}" if kind == "{" else "]" for kind in reversed(scan.stack))


@settings(max_examples=300, deadline=None)
@given(start=st.sampled_from(["", '"k": ', '"k": [', '"k": "', '"k": 1', *(text[1:] for text in GOOD + BAD)]),
       text=st.lists(st.sampled_from(JSON + SPACE) | st.sampled_from(GOOD + BAD), max_size=8).map("".join),
       more=st.text('{}[]":,\\01ae. \n', max_size=6))
@example('"k": "\\u00', "g", "")
@example('"k": "\\', "x", "")
@example('"k": -', "e1}", "")
@example('"k": 1.5E', "+}", "0}")
@example('"k": [1', ",]", "")
@example('"k": {}', ",}", "")
def test_scan_is_open_as_long_as_an_object_can_still_be_closed(start, text, more):
    text, scan, decoder = "{" + start + text, Scan(), json.JSONDecoder()
    for i, c in enumerate(text):
        if not scan.push(c):
            for rest in (more, text[i + 1:] + more):
                with pytest.raises(json.JSONDecodeError):
                    decoder.raw_decode(text[:i + 1] + rest)
            return
        if not scan.open:
            assert decoder.raw_decode(text)[1] == i + 1
            return
        json.loads(text[:i + 1] + completion(scan))


# -------------------------------------------------------------------------------------- special tokens and their text

def test_text_that_spells_a_special_token_is_text():
    """With all tags special, a quoted call, thought or end is content, however certain calls are."""
    text = 'You wrote <tool_call>\n{"name": "delete", "arguments": {}}\n</tool_call> <think>x</think> <|im_end|> ok'
    reply = Reply(certain=True, signs=SIGNS)
    pieces = [piece for c in text for piece in reply.push(c)] + reply.close()
    assert {piece.kind for piece in pieces} == {"content"} and "".join(piece.text for piece in pieces) == text


@pytest.mark.parametrize("certain", [False, True])
def test_signs_are_what_special_tokens_spell(certain):
    """An answer of signs is read as one of spelt tags by a reader that knows none, and no sign comes out."""
    text = ('<think>a <b> c</think>I look.\n<tool_call>\n{"name": "add", "arguments": {"x": "</think>"}}\n</tool_call>'
            '\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call> done <tool_call> not')
    signed = text
    for tag, sign in SIGNS.items():
        signed = signed.replace(tag, sign)
    for cut in range(1, 9):
        told = []
        for source, signs in ((text, ()), (signed, SIGNS)):
            reply = Reply(certain=certain, signs=signs)
            pieces = [p for i in range(0, len(source), cut) for p in reply.push(source[i:i + cut])] + reply.close()
            joined: dict[tuple, str] = {}
            for piece in pieces:
                joined[piece.kind, piece.index] = joined.get((piece.kind, piece.index), "") + piece.text
            told.append(joined)
        assert told[0] == told[1] and not any(sign in str(told) for sign in SIGNS.values())
