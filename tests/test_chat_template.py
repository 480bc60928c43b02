"""One renderer: masks by construction, append-only, closed to markers in text, and equal to its exported template."""
from __future__ import annotations

import json
from functools import partial

import jinja2
import pytest
from hypothesis import given, settings, strategies as st

from mindseed.base.errors import UserError
from mindseed.tokenizers.base import SPECIALS
from mindseed.tokenizers.bpe_train import train
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.chat import (JINJA, encode_chat, encode_chats, encode_spans, normalise, parse_answer, render)
from mindseed.tokenizers.hf_json import save_tokenizer

bounded = settings(max_examples=50, deadline=None)
WEATHER = {"type": "function", "function": {"name": "weather", "description": "天气 <now> & 'here'",
                                            "parameters": {"type": "object", "properties": {"city": {}}}}}
CALL = {"name": "weather", "arguments": {"city": "北京"}}

# Any text in which no special token is spelt: there, and only there, transformers differs from us.
unicode = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=20)
content = st.one_of(unicode, st.text(" \n\t\r\x0b\x1c\x85\xa0\u2003\u3000ab1.", max_size=8), st.just("好的。"))
value = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | unicode,
                     lambda inner: st.lists(inner, max_size=2) | st.dictionaries(unicode, inner, max_size=2),
                     max_leaves=4)
arguments = st.dictionaries(unicode, value, max_size=2)
written = arguments.map(partial(json.dumps, ensure_ascii=False))
call = st.one_of(st.fixed_dictionaries({"name": unicode, "arguments": arguments}),
                 st.fixed_dictionaries({"type": st.just("function"), "function": st.fixed_dictionaries(
                     {"name": unicode, "arguments": arguments | written | st.just("")})}))
answer = st.fixed_dictionaries({"role": st.just("assistant"), "content": content},
                               optional={"reasoning_content": content | st.none(),
                                         "tool_calls": st.lists(call, max_size=3)})
inline = st.builds(lambda gap, thought, text: {"role": "assistant", "content": f"{gap}<think>{thought}</think>{text}"},
                   st.sampled_from(["", "\n "]), content, content)
turn = st.one_of(answer, inline, *(st.fixed_dictionaries({"role": st.just(role), "content": content})
                                   for role in ("system", "user", "tool")))
messages = st.lists(turn, min_size=1, max_size=6)
tools = st.none() | st.just([]) | st.lists(st.just(WEATHER) | st.dictionaries(unicode, value, max_size=2), max_size=2)
switch = st.sampled_from([None, True, False])


@pytest.fixture(scope="module")
def tokenizer():
    return train(["the seed grows\n\nuser assistant", "种子发芽。好的。\n", " ab 1."] * 9, vocab_size=340)


def joined(spans) -> str:
    return "".join(span.text for span in spans)


def show(tokenizer, ids, trainable) -> str:
    """What is learnt stands in [brackets]."""
    text, inside = "", False
    for id, learnt in zip([*ids, None], [*trainable, False]):
        text += ("[" if learnt else "]") * (learnt != inside)
        inside = learnt
        text += "" if id is None else tokenizer.decode([id])
    return text


# ----------------------------------------------------------------------------------------------------------- golden

GOLDEN = """\
<|im_start|>system
Be brief.

You can call functions when they help to answer. Each line between <tools> and </tools> describes one of them as JSON, \
its parameters as a JSON schema:
<tools>
{"name": "add"}
</tools>

For each call write one JSON object with the function's name and its arguments, between these tags:
<tool_call>
{"name": "the function's name", "arguments": {"parameter": "value"}}
</tool_call><|im_end|>
<|im_start|>user
1 + 2, and 3 + 4?<|im_end|>
<|im_start|>assistant
[<think>
two sums
</think>

Let me see.
<tool_call>
{"name": "add", "arguments": {"x": [1, 2]}}
</tool_call>
<tool_call>
{"name": "add", "arguments": {"x": [3, 4]}}
</tool_call><|im_end|>]
<|im_start|>tool
<tool_response>
3
</tool_response><|im_end|>
<|im_start|>tool
<tool_response>
7
</tool_response><|im_end|>
<|im_start|>assistant
[<think>

</think>

3 and 7<|im_end|>]
<|im_start|>user
thanks<|im_end|>
<|im_start|>assistant
[welcome<|im_end|>]
"""
CONVERSATION = [
    {"role": "system", "content": "Be brief.", "tools": '[{"name": "add"}]'},
    {"role": "user", "content": "1 + 2, and 3 + 4?"},
    {"role": "assistant", "content": "Let me see.", "reasoning_content": "two sums",
     "tool_calls": '[{"name": "add", "arguments": {"x": [1, 2]}}, '
                   '{"function": {"name": "add", "arguments": "{\\"x\\": [3, 4]}"}}]'},
    {"role": "tool", "content": "3"},
    {"role": "tool", "content": "7"},
    {"role": "assistant", "content": "3 and 7", "reasoning_content": ""},
    {"role": "user", "content": "thanks"},
    {"role": "assistant", "content": "welcome"},
]


def test_the_mask_of_a_conversation_with_everything_in_it():
    """If this changes, every model trained before speaks another format, and template_hash() changes."""
    messages, tools = normalise({"conversations": CONVERSATION})
    assert show(Byte(), *encode_chat(Byte(), messages, tools=tools)) == GOLDEN


def test_generation_prompts_train_nothing_and_open_or_close_the_think_block():
    ask = [{"role": "user", "content": "hi"}]
    for thinking, end in ((None, ""), (True, "<think>\n"), (False, "<think>\n\n</think>\n\n")):
        ids, trainable = encode_chat(Byte(), ask, generation_prompt=True, thinking=thinking)
        assert Byte().decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n" + end
        assert not any(trainable)


# ------------------------------------------------------------------------------------------------------- properties

@bounded
@given(messages=messages, tools=tools)
def test_no_turn_changes_an_earlier_one(tokenizer, messages, tools):
    whole = encode_chat(tokenizer, messages, tools=tools)
    for k in range(1, len(messages)):
        ids, trainable = encode_chat(tokenizer, messages[:k], tools=tools)
        assert (whole[0][:len(ids)], whole[1][:len(ids)]) == (ids, trainable)
    for k, message in enumerate(messages):        # the prompt for a turn is a prefix of the conversation with it
        if message["role"] == "assistant" and (k or not tools):
            empty = render([message])[2].text == "<think>" and render([message])[3].text == "\n\n"
            full = render([message])[2].text == "<think>" and not empty
            for thinking in (None, True if full else None, False if empty else None):
                prompt, _ = encode_chat(tokenizer, messages[:k], tools=tools, generation_prompt=True, thinking=thinking)
                assert whole[0][:len(prompt)] == prompt


@bounded
@given(role=st.sampled_from(["system", "user", "assistant", "tool"]),
       text=st.lists(st.sampled_from(SPECIALS) | content, max_size=5).map("".join))
def test_markers_in_any_text_stay_text(tokenizer, role, text):
    def count(content):
        ids, _ = encode_chat(tokenizer, [{"role": role, "content": content}, {"role": "user", "content": content}])
        return [id for id in ids if id < len(SPECIALS)]
    if role != "assistant" or not text.lstrip().startswith("<think>"):    # this is how older data spells reasoning
        assert count(text) == count("x")


@bounded
@given(rows=st.lists(st.tuples(messages, tools), max_size=4))
def test_bulk_encoding_equals_one_by_one(tokenizer, rows):
    assert encode_chats(tokenizer, rows) == [encode_chat(tokenizer, m, tools=t) for m, t in rows]
    for (ids, trainable), (m, t) in zip(encode_chats(tokenizer, rows), rows):
        assert len(ids) == len(trainable)
        assert tokenizer.decode(ids) == joined(render(m, tools=t))


@bounded
@given(message=answer)
def test_parsing_an_answer_inverts_rendering_it(message):
    spans = [span for span in render([message]) if span.trainable]
    parsed = parse_answer(joined(spans))
    again = {"role": "assistant", **parsed}
    assert joined(render([again])) == joined(render([message]))
    thought = message.get("reasoning_content")
    assert parsed["reasoning_content"] == (None if thought is None else thought.strip())
    assert parsed["content"] == message["content"].lstrip()
    assert len(parsed["tool_calls"]) == len(message.get("tool_calls") or [])


# ------------------------------------------------------------------------------------------- the exported template

def jinja(**settings) -> jinja2.Template:
    environment = jinja2.Environment(**settings)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)     # as transformers does
    return environment.from_string(JINJA)


TEMPLATES = [jinja(), jinja(trim_blocks=True, lstrip_blocks=True)]


@bounded
@given(messages=messages, tools=tools, prompt=st.booleans(), thinking=switch)
def test_the_template_renders_what_we_render(messages, tools, prompt, thinking):
    ours = joined(render(messages, tools=tools, generation_prompt=prompt, thinking=thinking))
    for template in TEMPLATES:
        for name in ("enable_thinking", "open_thinking"):
            assert template.render(messages=messages, tools=tools, add_generation_prompt=prompt,
                                   **{name: thinking}) == ours
        if thinking is None:
            assert template.render(messages=messages, tools=tools, add_generation_prompt=prompt) == ours


@pytest.fixture(scope="module")
def auto(tokenizer, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("chat")
    save_tokenizer(tokenizer, folder, chat_template=JINJA, max_len=512)
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parity
@settings(max_examples=200, deadline=None)
@given(messages=messages, tools=tools, prompt=st.booleans(), thinking=switch)
def test_transformers_gives_the_same_tokens(tokenizer, auto, messages, tools, prompt, thinking):
    ids, _ = encode_chat(tokenizer, messages, tools=tools, generation_prompt=prompt, thinking=thinking)
    theirs = auto.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, enable_thinking=thinking,
                                      tokenize=True, return_dict=False)
    assert theirs == ids


# ------------------------------------------------------------------------------------------------- rows and answers

def test_rows_of_every_kind_become_the_same_messages():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for row in ({"conversations": turns}, {"messages": turns}, {"instruction": "q", "input": "", "output": "a"},
                {"instruction": "q", "output": "a"}, {"question": "q", "answer": "a"},
                {"messages": turns, "tools": "[]"},
                {"messages": [t | {"tools": None, "tool_calls": "", "reasoning_content": None} for t in turns]}):
        assert normalise(row) == (turns, None)
    assert normalise({"instruction": "q", "input": "in", "output": "a"})[0][0]["content"] == "q\nin"
    assert normalise({"messages": turns, "tools": [WEATHER]})[1] == [WEATHER]


def test_reasoning_inside_the_content_is_reasoning():
    old = [{"role": "assistant", "content": "<think>\nwhy\n</think>\n\nbecause"}]
    new = [{"role": "assistant", "content": "because", "reasoning_content": "why"}]
    assert render(old) == render(new)


@pytest.mark.parametrize("row, message", [
    ({"text": "a"}, "no conversation: the keys are text"),
    ({"messages": "hi"}, "list of messages, not str"),
    ({"messages": []}, "empty"),
    ({"messages": ["hi"]}, "message 0 is str"),
    ({"messages": [{"role": "human", "content": "a"}]}, "role 'human'; the roles are system"),
    ({"messages": [{"role": "user", "content": 3}]}, "message 0 \\(user\\): content is int"),
    ({"messages": [{"role": "user", "content": "a\ud800"}]}, "surrogate"),
    ({"messages": [{"role": "user"}]}, "has no content"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}, "only the assistant"),
    ({"messages": [{"role": "assistant", "content": "  "}]}, "message 0 \\(assistant\\) is empty"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": "[{"}]}, "tool_calls is not valid JSON"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"arguments": {}}]}]}, "a tool call must be"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [CALL | {"arguments": [1]}]}]}, "be an object"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [CALL | {"arguments": "{"}]}]}, "not valid JSON"),
    ({"messages": [{"role": "user", "content": "a", "tools": "nope"}]}, "tools is not valid JSON"),
    ({"messages": [{"role": "user", "content": "a"}], "tools": "{}x"}, "tools is not valid JSON"),
    ({"messages": [{"role": "user", "content": "a"}], "tools": '"weather"'}, "list of objects"),
    ({"messages": [{"role": "user", "content": "a", "tools": [CALL]}], "tools": [WEATHER]}, "other tools"),
])
def test_rows_that_cannot_be_rendered_are_user_errors(row, message):
    with pytest.raises(UserError, match=message):
        normalise(row)


def test_sharegpt_is_recognised():
    with pytest.raises(UserError, match='rename "from" to "role"'):
        normalise({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]})


@bounded
@given(row=st.fixed_dictionaries({"messages": st.lists(st.dictionaries(
    st.sampled_from(["role", "content", "reasoning_content", "tool_calls", "tools"]),
    st.sampled_from(["user", "assistant", "", "[{}]", "[1]", None, 1, [], {}, [CALL], "x\ud800", '{"a": 1}'])),
    max_size=2)}))
def test_whatever_a_row_holds_it_is_rendered_or_refused(tokenizer, row):
    try:
        messages, tools = normalise(row)
    except UserError:
        return
    ids, trainable = encode_chat(tokenizer, messages, tools=tools)
    assert len(ids) == len(trainable) and all(0 <= id < tokenizer.vocab_size for id in ids)


def test_training_needs_an_answer_and_a_chat_needs_its_special_tokens():
    ask = [{"role": "user", "content": "hi"}]
    for encode in (lambda: encode_chat(Byte(), ask, training=True),
                   lambda: encode_chats(Byte(), [(ask, None)], training=True)):
        with pytest.raises(UserError, match="no assistant turn"):
            encode()
    with pytest.raises(UserError, match="no special token <\\|im_start\\|>"):
        encode_spans(Byte(("<|x|>",)), [render(ask)])


@pytest.mark.parametrize("text, expected", [
    ("plain", (None, "plain", [])),
    ("why\n</think>\n\nyes<|im_end|>\nrest", ("why", "yes", [])),          # the prompt had opened the block
    ("<think>\nunfinished", ("unfinished", "", [])),
    ('a\n<tool_call>\n{"name": "f"}\n</tool_call>', (None, "a", [{"name": "f", "arguments": {}}])),
    ("<tool_call>\n{broken\n</tool_call>", (None, "<tool_call>\n{broken\n</tool_call>", [])),
    ("<tool_call>[1]</tool_call>", (None, "<tool_call>[1]</tool_call>", [])),
    ('<tool_call>\n{"name": "f", "arguments": {"x": "</tool_call>"}}\n</tool_call>.',
     (None, ".", [{"name": "f", "arguments": {"x": "</tool_call>"}}])),
    ('<tool_call>{"name": "f"} and </tool_call>', (None, '<tool_call>{"name": "f"} and </tool_call>', [])),
    ('<tool_call>{"name": 5}</tool_call>', (None, '<tool_call>{"name": 5}</tool_call>', [])),
    ('<tool_call>{"name": "\\ud800"}</tool_call>', (None, '<tool_call>{"name": "\\ud800"}</tool_call>', [])),
    ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
     (None, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', [])),
    ("", (None, "", [])),
])
def test_answers_of_fallible_models_are_taken_apart(text, expected):
    parsed = parse_answer(text)
    assert (parsed["reasoning_content"], parsed["content"], parsed["tool_calls"]) == expected
