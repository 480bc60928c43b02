"""Other projects' chat templates: what transformers renders, cut into lessons whose answers are known."""
from __future__ import annotations

import json

import pytest
from hypothesis import given, settings, strategies as st

from mindseed import cli
from mindseed.base.errors import UserError
from mindseed.data.prepare import prepare
from mindseed.data.shards import Prepared
from mindseed.tokenizers.base import SPECIALS
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.chat import JINJA, encode_spans, render
from mindseed.tokenizers.hf_json import load_tokenizer, save_tokenizer
from mindseed.tokenizers.template import Template, foreign, read_template
from tests.test_chat_template import WEATHER, bounded, content, joined, messages, show, tokenizer, tools

__all__ = ["tokenizer"]                           # a fixture that is shared

MARKS = (("bos_token", "<|endoftext|>"), ("eos_token", "<|im_end|>"))
APPENDING = """\
{{- bos_token }}
{%- for m in messages %}
    {{- '<|im_start|>(' + m.role + ')\\n' + m.content | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>(assistant)\\n' }}{%- endif %}
"""
FORGETTING = """\
{%- set last = namespace(user=-1) %}
{%- for m in messages if m.role == 'user' %}{%- set last.user = messages.index(m) %}{%- endfor %}
{%- if tools %}{{- '<|im_start|>tools ' + tools | tojson + '<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and messages.index(m) > last.user %}
        {{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- m.content }}
    {%- for call in m.tool_calls or [] %}
        {{- '<tool_call>' + call.function.name + (call.function.arguments | tojson) + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
OPENING = """\
{%- for m in messages %}
    {{- '<|im_start|>' if m.role == 'user' else '<|vision_start|>' }}
    {{- m.content.split('</think>')[-1] }}{{- '<|im_end|>' if m.role == 'assistant' else '' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|vision_start|><think>\\n' }}{%- endif %}
"""
MARKED = """\
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|im_start|>bot\\n' }}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>bot\\n' }}{%- endif %}
"""
CLOSING = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{%- endif %}
    {{- m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
    {%- if open_thinking is not defined or not open_thinking %}{{- '\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
ALL = {"closing": CLOSING, "appending": APPENDING, "forgetting": FORGETTING, "opening": OPENING, "marked": MARKED}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def says(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


TALK = [user("one?"), says("1.", reasoning_content="easy"), user("two?"), says("2."), user("3?"), says("3.")]
CALLING = [user("rain?"), says("", tool_calls=[{"name": "weather", "arguments": {"city": "Rome"}}]),
           {"role": "tool", "content": "no"}, says("No.")]


def lessons(source: str, talk: list[dict], **more) -> list[str]:
    byte = Byte()
    some = Template(source, MARKS).lessons(byte, talk, **more)
    return [show(byte, *encoded) for encoded in encode_spans(byte, some)]


def test_a_template_that_appends_gives_one_lesson():
    assert lessons(APPENDING, TALK) == [
        "<|endoftext|><|im_start|>(user)\none?<|im_end|><|im_start|>(assistant)\n[1.<|im_end|>]"
        "<|im_start|>(user)\ntwo?<|im_end|><|im_start|>(assistant)\n[2.<|im_end|>]"
        "<|im_start|>(user)\n3?<|im_end|><|im_start|>(assistant)\n[3.<|im_end|>]"]


def test_a_template_that_rewrites_the_past_gives_one_lesson_for_each_thing_the_model_sees():
    assert lessons(FORGETTING, TALK[:4]) == [
        "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n[<think>\neasy\n</think>\n\n1.<|im_end|>]\n",
        "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n1.<|im_end|>\n<|im_start|>user\ntwo?<|im_end|>\n"
        "<|im_start|>assistant\n[<think>\n\n</think>\n\n2.<|im_end|>]\n"]
    some = [{"name": "weather"}]
    listing = json.dumps(some)
    assert lessons(FORGETTING, CALLING, tools=some) == [     # no question came between: nothing is rewritten
        f"<|im_start|>tools {listing}<|im_end|>\n<|im_start|>user\nrain?<|im_end|>\n<|im_start|>assistant\n"
        '[<think>\n\n</think>\n\n<tool_call>weather{"city": "Rome"}</tool_call><|im_end|>]\n'
        "<|im_start|>tool\nno<|im_end|>\n<|im_start|>assistant\n[<think>\n\n</think>\n\nNo.<|im_end|>]\n"]


def test_a_prompt_that_opens_what_the_history_leaves_out():
    assert lessons(OPENING, [user("a"), says("<think>hm</think><tool_call>")]) == [
        "<|im_start|>a<|vision_start|>[<tool_call><|im_end|>]"]      # "<t" is common to both and no token of its own


NULL = """\
{%- for m in messages %}
    {%- if m.role == 'assistant' and m.content is none %}
        {{- '<|im_start|>' + m.tool_calls[0].function.name + ': ' + m.tool_calls[0].function.arguments + '<|im_end|>' }}
    {%- else %}{{- m.role + ': ' + m.content + '<|im_end|>' }}{%- endif %}
{%- endfor %}
"""


def test_calls_are_told_as_a_template_wants_them_or_refused():
    """As in DeepSeek's: a call only where the content is null, its arguments as JSON. None may be lost in silence."""
    told, = lessons(NULL, CALLING)
    assert told.startswith('user: rain?<|im_end|>[<|im_start|>weather: {"city": "Rome"}<|im_end|>]')
    with pytest.raises(UserError, match="leaves out a tool or a call"):
        lessons(APPENDING, CALLING)
    asking = [user("use the weather"), *CALLING[1:]]                  # its name alone is not the call
    assert lessons(NULL, asking)[0].endswith(told.split("rain?")[1])


ONLY_THE_LAST = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.reasoning_content and loop.last %}{{- '<think>' + m.reasoning_content + '</think>' }}{%- endif %}
    {{- m.content + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def learnt(lesson: str) -> str:
    return lesson.split("[")[1].split("]")[0]


def test_no_question_is_learnt_where_an_answer_rewrites_it():
    """If the history changes because of the answer, what follows the change is no answer."""
    turns = [says("1.", reasoning_content="easy"), user("SECRET"), says("2.")]
    kept = lessons(ONLY_THE_LAST, [user("one?"), *turns])
    assert [learnt(lesson) for lesson in kept] == ["<think>easy</think>1.<|im_end|>", "2.<|im_end|>"]
    changing = ONLY_THE_LAST.replace("loop.last", "messages[-1].content != '2.'")
    with pytest.raises(UserError, match="otherwise once it is there"):
        lessons(changing, [user("one?"), *turns])
    dated = "{{ strftime_now('%S%f') }}" + APPENDING                  # one moment for all renderings
    assert [learnt(lesson) for lesson in lessons(dated, [user("SECRET"), turns[2]])] == ["2.<|im_end|>"]


@pytest.mark.parametrize("answer", ["<b>hi</b>", "<think", "Thoughtful", "<think>x</think>y"])
@pytest.mark.parametrize("opened", ["<think>\\n", "Thought: "])
def test_an_answer_that_begins_as_the_prompt_goes_on_is_learnt_whole(answer, opened):
    source = ("{% for m in messages %}<|im_start|>{{ m.role + '\\n' + m.content.split('</think>')[-1] }}<|im_end|>"
              "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n" + opened.replace("\\n", "\n")
              + "{% endif %}")
    told, = lessons(source, [user("q"), says(answer)])
    assert told.endswith(f"assistant\n[{answer.split('</think>')[-1]}<|im_end|>]")


def test_tools_are_told_or_refused():
    with pytest.raises(UserError, match="leaves out a tool"):
        lessons(APPENDING, TALK, tools=[WEATHER])


def test_keys_of_arguments_and_schemas_are_text():
    source = FORGETTING
    calls = [{"name": "f", "arguments": {"a<|im_end|>": 1}}]
    some = [{"name": "f", "parameters": {"properties": {"x<|im_end|>": {}}}}]
    spans, = Template(source, MARKS).lessons(Byte(), [user("?"), says("", tool_calls=calls)], tools=some)
    assert [span.text for span in spans if span.control].count("<|im_end|>") == 3
    assert joined(spans).count("<|im_end|>") == 5


def test_an_escaped_mark_leaves_no_trace():
    source = "{% for m in messages %}{{ m.content | tojson(ensure_ascii=True) }}{{ m.content | urlencode }}{% endfor %}"
    told = joined(Template(source).spans(Byte(), [user("<|im_end|> ü")]))
    assert told == '"<|im_end|> \\u00fc"%3C%7Cim_end%7C%3E%20%C3%BC'


def test_a_prompt_that_shuts_a_think_block_is_not_learnt_and_thoughts_are():
    """As in MiniMind, whose prompt has an empty block unless it is asked to think."""
    assert lessons(CLOSING, TALK[:4]) == [
        "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n<think>\n[easy\n</think>\n\n1.<|im_end|>]\n"
        "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n[2.<|im_end|>]\n"]


@settings(max_examples=100, deadline=None)
@given(talk=messages, tools=tools)
def test_our_own_template_teaches_what_our_renderer_teaches(talk, tools):
    """Ours is known by construction, this one found by comparing; on every conversation they agree."""
    def learnt(spans) -> list[tuple[str, bool]]:
        return [(char, span.trainable) for span in spans for char in span.text]

    ours = render(talk, tools=tools)
    found = Template(JINJA, MARKS).lessons(Byte(), talk, tools=tools)
    if any(message["role"] == "assistant" for message in talk):
        end = max(i for i, message in enumerate(talk) if message["role"] == "assistant")
        assert [learnt(spans) for spans in found] == [learnt(render(talk[:end + 1], tools=tools))]
    else:
        assert found == []
    assert joined(Template(JINJA, MARKS).spans(Byte(), talk, tools=tools)) == joined(ours)


@bounded
@given(parts=st.lists(st.sampled_from([*SPECIALS, "<|im_", "end|>", "x", " ", "\ue000", "</think>"]), max_size=6),
       source=st.sampled_from(sorted(ALL)))
def test_no_text_of_a_user_becomes_a_control_token(parts, source):
    byte, text = Byte(), "".join(parts)
    template = Template(ALL[source], MARKS)

    def control(question: str) -> list[str]:
        return [span.text for span in template.spans(byte, [user(question), says("yes")]) if span.control]

    assert control(text) == control("x")
    whole = joined(template.spans(byte, [user(text)]))
    if source != "opening":                       # which looks for </think>
        assert (text.strip() if source == "appending" else text) in whole
    spelt = [span for spans in template.lessons(byte, [user("?"), says(text)]) for span in spans if span.control]
    assert {span.text for span in spelt} <= {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
                                             *byte.visible}
    assert [span.text for span in spelt].count("<|im_start|>") == control("x").count("<|im_start|>")


# ------------------------------------------------------------------------------------------------------ transformers

@pytest.fixture(scope="module")
def auto(tokenizer, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("template")
    save_tokenizer(tokenizer, folder, marks=dict(MARKS))
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    return transformers.AutoTokenizer.from_pretrained(folder)


dialogues = st.lists(st.tuples(content, content), min_size=1, max_size=3).map(
    lambda pairs: [message for a, b in pairs for message in (user(a), says(b))])


@pytest.mark.parity
@settings(max_examples=60, deadline=None)
@given(case=st.one_of(st.tuples(dialogues | st.just(TALK), st.sampled_from(sorted(ALL))),
                      st.just((CALLING, "forgetting"))),
       prompt=st.booleans(), thinking=st.sampled_from([None, True, False]), tool=st.booleans())
def test_transformers_renders_the_same(tokenizer, auto, case, prompt, thinking, tool):
    talk, source = case
    listed = [WEATHER] if tool and source == "forgetting" else None
    ours = Template(ALL[source], MARKS).spans(tokenizer, talk, tools=listed, generation_prompt=prompt,
                                              thinking=thinking)
    theirs = [message | ({"tool_calls": [{"type": "function", "function": call} for call in message["tool_calls"]]}
                         if "tool_calls" in message else {}) for message in talk]
    asked = {"tools": listed, "add_generation_prompt": prompt, "chat_template": ALL[source]}
    asked |= {} if thinking is None else {"enable_thinking": thinking, "open_thinking": thinking}
    assert joined(ours) == auto.apply_chat_template(theirs, tokenize=False, **asked)
    assert encode_spans(tokenizer, [ours])[0][0] == auto.apply_chat_template(theirs, return_dict=False, **asked)


@pytest.mark.parity
@settings(max_examples=60, deadline=None)
@given(talk=st.lists(st.tuples(st.text("ab ?。", max_size=6), st.text("ab.。", min_size=1, max_size=6)), min_size=1,
                     max_size=3))
def test_answers_are_those_that_transformers_finds_marked(tokenizer, auto, talk):
    """With {% generation %} transformers too knows what is the assistant's; nothing else of ours reads the mark."""
    turns = [message for a, b in talk for message in (user(a), says(b))]
    theirs = auto.apply_chat_template(turns, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True)
    (ids, mask), = encode_spans(tokenizer, Template(MARKED).lessons(tokenizer, turns))
    assert ids == theirs["input_ids"] and [int(x) for x in mask] == theirs["assistant_masks"]


# ------------------------------------------------------------------------------------------- in data and in files

def test_the_end_of_an_answer():
    byte = Byte()
    assert Template(APPENDING, MARKS).end(byte) == Template(FORGETTING).end(byte) == byte.specials["<|im_end|>"]
    assert Template("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}").end(byte) is None
    assert Template("{{ raise_exception('no') }}").end(byte) is None and Template("").end(byte) is None


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_prepared_conversations_are_lessons(tmp_path):
    byte, template = Byte(), Template(FORGETTING, MARKS)
    rows = write(tmp_path / "rows.jsonl", [{"messages": TALK}] * 30 + [{"messages": CALLING, "tools": [WEATHER]}])
    kept = prepare(rows, tmp_path / "out", byte, heldout=0.0, template=template)
    train = kept.split("train")
    assert len(train) == 3 * 30 + 1 and kept.manifest["template_hash"] == template.hash()
    told = [show(byte, ids.tolist(), mask.tolist()) for ids, mask in (train.get(i) for i in (0, 1, 2, 90))]
    assert told == lessons(FORGETTING, TALK) + lessons(FORGETTING, CALLING, tools=[WEATHER])
    assert foreign(*read_template(tmp_path / "out" / "tokenizer")) == template
    assert kept.manifest["rows"] == {"total": 31, "skipped": 0, "chat": 31}
    with pytest.raises(UserError, match="prepared"):
        Prepared(tmp_path / "out", template_hash=Template(APPENDING).hash())
    with pytest.raises(UserError, match="template_hash was"):
        prepare(rows, tmp_path / "out", byte, heldout=0.0)


def test_pairs_stay_pairs_and_what_a_template_refuses_is_skipped(tmp_path):
    byte = Byte()
    refusing = FORGETTING + "{% if messages[0].content == 'no' %}{{ raise_exception('not this') }}{% endif %}"
    pair = {"chosen": TALK[:4], "rejected": [*TALK[:3], says("Two.")]}
    kept = prepare(write(tmp_path / "pairs.jsonl", [pair] * 3), tmp_path / "pairs", byte, heldout=0.0,
                   template=Template(FORGETTING))
    assert kept.kind == "preference" and len(kept.split("train")) == 6
    assert byte.decode(kept.split("train").get(1)[0].tolist()).endswith("\n\nTwo.<|im_end|>\n")
    rows = write(tmp_path / "rows.jsonl", [{"messages": TALK[:2]}, {"messages": [user("no"), says("x")]}])
    some = prepare(rows, tmp_path / "some", byte, heldout=0.0, template=Template(refusing))
    assert some.manifest["rows"] == {"total": 2, "skipped": 1, "chat": 1} and "not this" in some.manifest["skipped"][0]


@pytest.mark.parametrize(("config", "file", "expected"), [
    ({"chat_template": "a"}, None, "a"), ({"chat_template": "a"}, "b", "b"), ({}, None, None), ({}, "b", "b"),
    ({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}, None, "d"),
    ({"chat_template": [{"name": "tool_use", "template": "t"}]}, None, None), ({"chat_template": 3}, None, None)])
def test_where_templates_stand(tmp_path, config, file, expected):
    marks = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | marks))
    if file:
        (tmp_path / "chat_template.jinja").write_text(file)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"unk_token": "?", "eos_token": "other"}))
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        assert read_template(place) == (expected, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "?"})
    assert foreign(JINJA, {}) is None and foreign(None, {}) is None


@pytest.mark.parametrize(("source", "words"), [
    ("{{ ''.__class__.__mro__ }}", "unsafe"), ("{{ messages.append(1) }}", "unsafe|not safely callable"),
    ("{% for %}", "chat template"), ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
    ("{{ messages[9].content + 'x' }}", "chat template")])
def test_a_template_can_do_no_harm(source, words):
    with pytest.raises(UserError, match=words):
        Template(source).spans(Byte(), [user("x")])


# ------------------------------------------------------------------------------------------------- in whole commands

def test_a_model_goes_on_in_its_own_words(tmp_path, capsys):
    """Template, marks and stop ids are the start's; the end of an answer, once learnt, also ends one."""
    from mindseed.interop.directory import load_directory, save_directory
    from tests.test_gguf import SHAPE, model_of
    byte = Byte()
    start, out = tmp_path / "start", tmp_path / "run"
    save_directory(model_of(SHAPE, byte), byte, start, chat_template=FORGETTING, marks=dict(MARKS), stop_ids=(0,),
                   sampling={"do_sample": True, "temperature": 0.25})
    rows = write(tmp_path / "rows.jsonl", [{"messages": TALK}] * 8)
    common = ["--data.heldout", "0", "--data.seq_len", "48", "--loop.steps", "2", "--loop.batch", "2"]
    assert cli.main(["train", "--init", str(start), "--data.train", str(rows), "--out", str(out), *common]) == 0
    told, before = load_directory(out / "model"), load_directory(start)
    assert (told.chat_template, told.marks) == (before.chat_template, before.marks) == (FORGETTING, dict(MARKS))
    assert told.stop_ids == (0, byte.specials["<|im_end|>"]) and told.sampling == before.sampling
    assert told.template_hash == Template(FORGETTING).hash()
    ids, mask = Prepared(out / "data" / "0-rows").split("train").get(1)
    assert show(byte, ids.tolist(), mask.tolist()) == lessons(FORGETTING, TALK)[1]
    assert cli.main(["convert", str(out / "model"), str(tmp_path / "copy")]) == 0
    copy = load_directory(tmp_path / "copy")
    assert (copy.chat_template, copy.marks, copy.stop_ids) == (told.chat_template, told.marks, told.stop_ids)
    capsys.readouterr()
    save_tokenizer(byte, tmp_path / "ours", chat_template=JINJA)      # prepared in our format: not what it speaks
    assert cli.main(["prepare", str(rows), "--out", str(tmp_path / "p"), "--tokenizer", str(tmp_path / "ours")]) == 0
    assert cli.main(["train", "--init", str(start), "--data.train", str(tmp_path / "p"), "--out", str(tmp_path / "r"),
                     *common]) == 2
    assert "prepared with another chat template" in capsys.readouterr().err


def test_from_nothing_with_the_tokenizer_of_others(tmp_path):
    save_tokenizer(Byte(), tmp_path / "theirs", chat_template=APPENDING, marks=dict(MARKS))
    rows = write(tmp_path / "rows.jsonl", [{"messages": TALK}] * 8)
    assert cli.main(["train", "--data.train", str(rows), "--data.tokenizer", str(tmp_path / "theirs"), "--out",
                     str(tmp_path / "run"), "--depth", "2", "--data.heldout", "0", "--data.seq_len", "48",
                     "--loop.steps", "2", "--loop.batch", "2"]) == 0
    assert read_template(tmp_path / "run" / "model") == (APPENDING, dict(MARKS))
    assert load_tokenizer(tmp_path / "run" / "model").hash() == Byte().hash()
