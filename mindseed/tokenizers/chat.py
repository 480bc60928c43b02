"""The one renderer of conversations, for training, serving, evaluation and reinforcement learning alike.

A conversation becomes a list of spans: text, is it to be learnt, is it a control token. The mask of what is trained on
is therefore known by construction; nobody searches token ids for role markers afterwards. One turn looks like this
(`[...]` is optional, and what the assistant must produce, its <|im_end|> included, is what is learnt):

    <|im_start|>{system or user}\\n{content}<|im_end|>\\n
    <|im_start|>assistant\\n[<think>\\n{reasoning}\\n</think>\\n\\n]{content}[\\n{call}]...<|im_end|>\\n
    <|im_start|>tool\\n<tool_response>\\n{content}\\n</tool_response><|im_end|>\\n

A call is <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call>; without content before it no line end is.

Three properties, each with a test. *Append-only*: no turn changes an earlier one (reasoning stays in the history, two
tool results are two turns), so render(m[:k]) is a token prefix of render(m) and a cache of the past stays valid.
*Closed*: only control spans become special tokens; a user who writes "<|im_end|>" has written plain text. *One truth*:
JINJA, which is saved with every model, gives the same tokens through transformers, except where a text spells a
special token, for there transformers does make it one.

White space at the start of the assistant's content, and around its reasoning, is dropped: it would melt into the line
end before it ("\\n" + "\\n" is one token), across the border between what is given and what is learnt.
"""
from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from mindseed.base.errors import UserError
from mindseed.base.files import parse_json
from mindseed.tokenizers.base import BOS, EOS, ByteLevel, require_unicode

ROLES = ("system", "user", "assistant", "tool")
TOOLS_BEFORE = ("You can call functions when they help to answer. Each line between <tools> and </tools> describes one "
                "of them as JSON, its parameters as a JSON schema:\n<tools>")
TOOLS_AFTER = ("\n</tools>\n\nFor each call write one JSON object with the function's name and its arguments, between "
               "these tags:\n")
CALL_SHAPE = '\n{"name": "the function\'s name", "arguments": {"parameter": "value"}}\n'

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None
Encoded = tuple[list[int], list[bool]]            # ids, and for each: is it to be learnt?


@dataclass(frozen=True, slots=True)
class Span:
    text: str
    trainable: bool = False                       # the assistant must produce it
    control: bool = False                         # one special token, spelt `text`


# ------------------------------------------------------------------------------------------------------- rendering

def render(messages: list[Message], *, tools: Tools = None, generation_prompt: bool = False,
           thinking: bool | None = None) -> list[Span]:
    """A conversation as spans. Raises UserError that names the message if it is malformed.

    Messages have `role` and `content`; the assistant's also `reasoning_content` (absent: no think block; empty: an
    empty one) and `tool_calls` ([{"name", "arguments"}], or OpenAI's {"function": {...}} around each). A content that
    itself begins with <think>...</think> counts as reasoning and content. `generation_prompt` opens the assistant's
    turn; `thinking` then opens a think block (True), closes an empty one (False) or leaves it to the model (None).
    """
    check(messages)
    spans: list[Span] = []
    if tools:
        system = messages[0] if messages and messages[0]["role"] == "system" else None
        spans += render_tools(text_of(system) if system else "", tools)
        messages = messages[1:] if system else messages
    for message in messages:
        spans += render_turn(message)
    if generation_prompt:
        spans += [Span(BOS, control=True), Span("assistant\n")]
        if thinking is not None:
            spans += [Span("<think>", control=True), Span("\n")] if thinking else render_reasoning("", trainable=False)
    return spans


def render_tools(system: str, tools: list[dict[str, Any]]) -> list[Span]:
    """The system turn of a conversation with tools: the system message, then what may be called and how."""
    listing = "".join("\n" + to_json(tool) for tool in tools)
    text = f"system\n{system}\n\n" if system else "system\n"
    return [Span(BOS, control=True), Span(text + TOOLS_BEFORE + listing + TOOLS_AFTER),
            Span("<tool_call>", control=True), Span(CALL_SHAPE), Span("</tool_call>", control=True),
            Span(EOS, control=True), Span("\n")]


def render_turn(message: Message) -> list[Span]:
    role, content = message["role"], text_of(message)
    if role == "assistant":
        inside = [Span("assistant\n"), *render_answer(message), Span(EOS, trainable=True, control=True)]
    elif role == "tool":
        inside = [Span("tool\n"), Span("<tool_response>", control=True), Span(f"\n{content}\n"),
                  Span("</tool_response>", control=True), Span(EOS, control=True)]
    else:
        inside = [Span(f"{role}\n{content}"), Span(EOS, control=True)]
    return [Span(BOS, control=True), *inside, Span("\n")]


def render_answer(message: Message) -> list[Span]:
    """What the assistant produces, up to but without its end marker."""
    reasoning, text = split_reasoning(message)
    spans = [] if reasoning is None else render_reasoning(reasoning, trainable=True)
    for i, call in enumerate(message.get("tool_calls") or []):
        if text or i:
            spans.append(Span(text + "\n", trainable=True))
        spans += [Span("<tool_call>", trainable=True, control=True), Span(f"\n{call_json(call)}\n", trainable=True),
                  Span("</tool_call>", trainable=True, control=True)]
        text = ""
    return [*spans, Span(text, trainable=True)] if text else spans


def render_reasoning(reasoning: str, *, trainable: bool) -> list[Span]:
    """A think block. Its first line end stands alone, as in the prompt that opens a block."""
    inside = ["\n", reasoning + "\n"] if reasoning else ["\n\n"]
    return [Span("<think>", trainable, True), *(Span(text, trainable) for text in inside),
            Span("</think>", trainable, True), Span("\n\n", trainable)]


def split_reasoning(message: Message) -> tuple[str | None, str]:
    """(reasoning, content) of an assistant's message; None: it has no think block."""
    reasoning, content = message.get("reasoning_content"), text_of(message).lstrip()
    if reasoning is None and content.startswith("<think>") and "</think>" in content:
        reasoning, content = content.removeprefix("<think>").split("</think>", 1)
    return None if reasoning is None else reasoning.strip(), content.lstrip()


def text_of(message: Message) -> str:
    return message.get("content") or ""


def call_json(call: dict[str, Any]) -> str:
    """One call as the JSON line a model writes. Arguments that are a string are taken to be JSON already."""
    call = call.get("function") or call
    arguments = call.get("arguments") or {}
    written = arguments if isinstance(arguments, str) else to_json(arguments)
    return f'{{"name": {to_json(call["name"])}, "arguments": {written}}}'


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# -------------------------------------------------------------------------------------------------------- encoding

def encode_chat(tokenizer: ByteLevel, messages: list[Message], *, tools: Tools = None, generation_prompt: bool = False,
                thinking: bool | None = None, training: bool = False, template: Any = None) -> Encoded:
    """(ids, trainable) of a conversation. `training` refuses one without an assistant's turn. In another project's
    `template` (template.Template) nothing is trainable; what it teaches is `Template.lessons`."""
    if training:
        require_answer(messages)
    asked = {"tools": tools, "generation_prompt": generation_prompt, "thinking": thinking}
    spans = template.spans(tokenizer, messages, **asked) if template else render(messages, **asked)
    return encode_spans(tokenizer, [spans])[0]


def encode_chats(tokenizer: ByteLevel, rows: list[tuple[list[Message], Tools]], *,
                 training: bool = False) -> list[Encoded]:
    """As `encode_chat` of each (messages, tools), in bulk; `normalise` makes such pairs of data rows."""
    if training:
        for messages, _ in rows:
            require_answer(messages)
    return encode_spans(tokenizer, [render(messages, tools=tools) for messages, tools in rows])


def encode_spans(tokenizer: ByteLevel, conversations: list[list[Span]]) -> list[Encoded]:
    """Each span is tokenised on its own; all texts of all conversations, each distinct one once, in one bulk call."""
    texts = list({span.text: None for spans in conversations for span in spans if not span.control})
    ids_of = dict(zip(texts, tokenizer.encode_batch(texts)))
    encoded = []
    for spans in conversations:
        ids: list[int] = []
        trainable: list[bool] = []
        for span in spans:
            if span.control and span.text not in tokenizer.specials:
                raise UserError(f"the tokenizer has no special token {span.text}, which this conversation needs, and "
                                "no chat template beside it tells another way; train one with `mindseed tokenizer`")
            new = [tokenizer.specials[span.text]] if span.control else ids_of[span.text]
            ids += new
            trainable += [span.trainable] * len(new)
        encoded.append((ids, trainable))
    return encoded


def require_answer(messages: list[Message]) -> None:
    if not any(message.get("role") == "assistant" for message in messages):
        raise UserError("the conversation has no assistant turn, so there is nothing to learn from it")


# ------------------------------------------------------------------------------------- from rows, and from answers

def check(messages: list[Message]) -> None:
    """Raise UserError for anything `render` could not render, naming the message (counted from 0)."""
    if not isinstance(messages, list):
        raise UserError(f"a conversation is a list of messages, not {type(messages).__name__}")
    for i, message in enumerate(messages):
        where = f"message {i}"
        if not isinstance(message, dict):
            raise UserError(f"{where} is {type(message).__name__}, not an object with role and content")
        role = message.get("role")
        if role is None and "from" in message and "value" in message:
            raise UserError(f'{where} is in ShareGPT\'s form: rename "from" to "role" (human is user, gpt assistant) '
                            'and "value" to "content"')
        if role not in ROLES:
            raise UserError(f"{where} has the role {role!r}; the roles are {', '.join(ROLES)}")
        for key in ("content", "reasoning_content"):
            value = message.get(key)
            if value is not None and not isinstance(value, str):
                raise UserError(f"{where} ({role}): {key} is {type(value).__name__}, not text")
            require_unicode(value or "")
        calls = message.get("tool_calls") or []
        if message.get("content") is None and not calls:
            raise UserError(f"{where} ({role}) has no content")
        if role != "assistant" and (calls or message.get("reasoning_content")):
            raise UserError(f"{where} ({role}): only the assistant has reasoning_content and tool_calls")
        if not isinstance(calls, list):
            raise UserError(f"{where}: tool_calls is {type(calls).__name__}, not a list")
        for call in calls:
            inner = (call.get("function") or call) if isinstance(call, dict) else None
            if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
                raise UserError(f'{where}: a tool call must be {{"name": ..., "arguments": {{...}}}}, not {call!r}')
            if not isinstance(from_json(inner.get("arguments"), f"{where}: arguments") or {}, dict):
                raise UserError(f"{where}: the arguments of {inner['name']} must be an object, not "
                                f"{inner['arguments']!r}")
            require_unicode(call_json(call))


def normalise(row: dict[str, Any]) -> tuple[list[Message], Tools]:
    """(messages, tools) of a data row: MiniMind's `conversations`, `messages`, Alpaca's instruction and output, or a
    question and its answer.

    `tools` may stand in the row or in a message (there once called `functions`); it, `tool_calls` and their
    `arguments` may be JSON in a string. Raises UserError for all that cannot be rendered, and for an assistant's turn
    that says nothing.
    """
    row = {key: value for key, value in row.items() if value is not None}
    if "conversations" in row or "messages" in row:
        given = row["conversations"] if "conversations" in row else row["messages"]
    elif "instruction" in row and "output" in row:
        question = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
        given = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
        if row.get("system"):
            given.insert(0, {"role": "system", "content": row["system"]})
    elif "question" in row and "answer" in row:
        answer = str(row["answer"]) if type(row["answer"]) in (int, float) else row["answer"]
        given = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": answer}]
        if row.get("system"):
            given.insert(0, {"role": "system", "content": row["system"]})
    else:
        raise UserError(f"no conversation: the keys are {', '.join(row) or 'none'}; expected conversations, messages, "
                        "instruction and output, or question and answer")
    check([message | {"tool_calls": from_json(message.get("tool_calls"), f"message {i}: tool_calls")}
           if isinstance(message, dict) else message for i, message in enumerate(given)]
          if isinstance(given, list) else given)
    if not given:
        raise UserError("the conversation is empty")
    tools = from_json(row.get("tools"), "tools")
    messages = []
    for i, message in enumerate(given):
        clean = {"role": message["role"], "content": text_of(message)}
        if clean["role"] == "assistant" and message.get("reasoning_content") is not None:
            clean["reasoning_content"] = message["reasoning_content"]
        if calls := from_json(message.get("tool_calls"), f"message {i}: tool_calls"):
            clean["tool_calls"] = [normal_call(call, i) for call in calls]
        if clean["role"] == "assistant" and not render_answer(clean):
            raise UserError(f"message {i} (assistant) is empty")
        if mine := from_json(message.get("tools") or message.get("functions"), f"message {i}: tools"):
            if tools and tools != mine:
                raise UserError(f"message {i} brings other tools than an earlier place; a conversation has one list")
            tools = mine
        messages.append(clean)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError("tools must be a list of objects, one JSON schema each")
    require_unicode(to_json(tools))
    return messages, tools or None


def normal_call(call: dict[str, Any], i: int) -> dict[str, Any]:
    call = call.get("function") or call
    return {"name": call["name"], "arguments": from_json(call.get("arguments"), f"message {i}: arguments") or {}}


def from_json(value: Any, what: str) -> Any:
    """A value that may have been written as a JSON string; the empty string is None."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value) if value.strip() else None
    except ValueError as error:
        raise UserError(f"{what} is not valid JSON ({error})") from None


CALL_START, CALL_END = re.compile(r"\n?<tool_call>\s*"), re.compile(r"\s*</tool_call>")


def parse_answer(text: str) -> dict[str, Any]:
    """What an assistant wrote, taken apart: {"reasoning_content": str | None, "content": str, "tool_calls": list}.

    The inverse of rendering its turn. Forgiving, as models are fallible: reading stops at <|im_end|>; a think block
    may have been opened by the prompt, or never be closed; a call that is no JSON object with a name stays in content.
    """
    text = text.split(EOS, 1)[0].lstrip()
    if "</think>" in text and not text.startswith("<think>"):
        text = "<think>" + text
    elif text.startswith("<think>") and "</think>" not in text:
        text += "</think>"
    reasoning, content = split_reasoning({"role": "assistant", "content": text})
    content, calls = take_calls(content)
    return {"reasoning_content": reasoning, "content": content, "tool_calls": calls}


def take_calls(content: str) -> tuple[str, list[dict[str, Any]]]:
    """(content without its tool calls, the calls)."""
    kept, calls, at = "", [], 0
    for start in CALL_START.finditer(content):
        if start.start() >= at and (found := read_call(content, start.end())):      # before `at`: inside an argument
            kept += content[at:start.start()]
            calls.append(found[0])
            at = found[1]
    return kept + content[at:], calls


def read_call(text: str, at: int, stop_tag: re.Pattern[str] = CALL_END) -> tuple[dict[str, Any], int] | None:
    """The call whose JSON begins at `at`, and where its </tool_call> ends; None if there is none. The JSON is read
    first: an argument may hold </tool_call>."""
    try:
        call, stop = json.JSONDecoder().raw_decode(text, at)
        call = {"name": call["name"], "arguments": call.get("arguments", {})}
        good = isinstance(call["name"], str) and isinstance(call["arguments"], dict) and sayable(to_json(call))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    end = stop_tag.match(text, stop)
    return (call, end.end()) if end and good else None


def sayable(text: str) -> bool:
    """Valid Unicode, so that it has bytes and can stand in a conversation."""
    try:
        require_unicode(text)
    except UserError:
        return False
    return True


# -------------------------------------------------------------------------------------------- the exported template

_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages and messages[0].role == 'system' and messages[0].content %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- TOOLS_BEFORE }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- TOOLS_AFTER + '<tool_call>' + CALL_SHAPE + '</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content or '' %}
    {%- if message.role == 'system' and tools and loop.first %}
    {%- elif message.role == 'system' or message.role == 'user' %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>tool\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = content.lstrip() %}
        {%- set reasoning = message.reasoning_content if message.reasoning_content is defined else none %}
        {%- if reasoning is none and content.startswith('<think>') and '</think>' in content %}
            {%- set parts = content.split('</think>') %}
            {%- set reasoning = parts[0][7:] %}
            {%- set content = (parts[1:] | join('</think>')).lstrip() %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if reasoning is not none %}
            {%- set reasoning = reasoning.strip() %}
            {{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for item in message.tool_calls or [] %}
            {%- set call = item.function or item %}
            {%- if content or not loop.first %}
                {{- '\\n' }}
            {%- endif %}
            {{- '<tool_call>\\n{"name": ' + (call.name | tojson) + ', "arguments": ' }}
            {%- set arguments = call.arguments or {} %}
            {{- arguments if arguments is string else (arguments | tojson) }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- set thinking = enable_thinking if enable_thinking is defined else open_thinking %}
    {%- if thinking is defined and thinking is not none %}
        {{- '<think>\\n' if thinking else '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
JINJA = (_TEMPLATE.replace("TOOLS_BEFORE", to_json(TOOLS_BEFORE))          # the same sentences, written once
         .replace("TOOLS_AFTER", to_json(TOOLS_AFTER)).replace("CALL_SHAPE", to_json(CALL_SHAPE)))


def template_hash() -> str:
    """sha256 of the template, stored with weights and prepared data: what was made with another is told from it."""
    return hashlib.sha256(JINJA.encode()).hexdigest()
