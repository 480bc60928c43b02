"""From what a client asked to what the engine is asked: the prompt's ids, how to draw, and what an answer must fit.

A conversation becomes a prompt by the one renderer (tokenizers/chat.py), or in the chat template that lies beside the
model. With tools on offer a grammar sees to it that every call is one of them with arguments that fit its schema; with
a response format, that the answer is such JSON. Either begins after the thoughts, where the model thinks first.
"""
from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Any

from mindseed.base.errors import UserError
from mindseed.infer.constrain import Grammar
from mindseed.infer.engine import Request
from mindseed.infer.sample import Sampling
from mindseed.serve.errors import ApiError
from mindseed.serve.schema import (ChatRequest, CompletionRequest, Generating, Message, NamedTool, ResponseFormat, Tool,
                                   TokenizeRequest)
from mindseed.serve.served import Served
from mindseed.tokenizers.chat import encode_chat

OPEN, CLOSE = "<think>", "</think>"
EFFORT = {"none": False, "minimal": False, "low": True, "medium": True, "high": True, "xhigh": True}
SWITCH = {"enabled": True, "disabled": False, "auto": None}
ANSWERS = 512                                     # to one request, at most
SEEDS = 1 << 62                                   # so that seed + i stays within what a sampler takes
DRAWING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One prompt on its way to the engine, and how its answer is to be read."""

    request: Request
    thinking: bool = False                        # the prompt has opened a think block
    tools: bool = False                           # the answer may hold calls
    certain: bool = False                         # and a grammar sees to it that they are valid
    begin: int = 0                                # ids at the prompt's beginning that are not the client's
    empty: bool = False                           # no new token was asked for: the one that is made is dropped
    report: bool = False                          # log-probabilities
    echo: bool = False


# ------------------------------------------------------------------------------------------------------------ prompts

def chat_ask(served: Served, body: ChatRequest) -> Ask:
    if body.functions:
        raise ApiError(400, "functions is the older form of tools; send each as tools=[{type: function, function: "
                            "...}]", param="functions")
    tools, choice = offered(body)
    prompt = chat_prompt(served, body.messages, tools, thinking_of(served, body))
    thinking = opened(served, prompt)
    held = constraint(served, body, body.response_format)
    if held is not None and tools:
        raise ApiError(400, "tools and a fixed form of the answer exclude each other here; leave one out",
                       param="response_format")
    certain = False
    if tools:
        grammar = tool_grammar(served, body.tools or [], choice, body.parallel_tool_calls is not False)
        held, certain = grammar, grammar is not None
    if held is not None and thinking and not (tools and choice == "auto"):
        held = held.after(CLOSE)                  # with "auto" it waits for a call by itself
    room = max(1, served.context - len(prompt))
    request = engine_request(served, body, prompt, body.max_completion_tokens or body.max_tokens or room,
                             top=body.top_logprobs or 0 if body.logprobs else 0, grammar=held)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    return Ask(request=request, thinking=thinking, tools=bool(tools), certain=certain, report=bool(body.logprobs))


def text_asks(served: Served, body: CompletionRequest) -> list[Ask]:
    """One for each prompt."""
    if body.suffix:
        raise ApiError(400, "suffix is not supported; leave it out", param="suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, "best_of must be equal to n: every answer is returned", param="best_of")
    held = constraint(served, body, body.response_format)
    pairs = prompts(served, body.prompt, begin=body.add_special_tokens is not False)
    if len(pairs) * (body.n or 1) > ANSWERS:
        raise ApiError(400, f"{len(pairs)} prompts with {body.n or 1} answers to each are more than {ANSWERS} answers; "
                            "send fewer at a time", param="prompt")
    given = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    max_new = 16 if given is None else given
    asks = []
    for begin, ids in pairs:
        request = engine_request(served, body, begin + ids, max(1, max_new), top=body.logprobs or 0, grammar=held)
        scored = bool(body.echo and body.logprobs is not None)
        asks.append(Ask(request=replace(request, prompt_logps=scored), begin=len(begin), empty=max_new == 0,
                        report=body.logprobs is not None, echo=bool(body.echo)))
    return asks


def prompts(served: Served, given: Any, *, begin: bool, param: str = "prompt", answer: bool = True
            ) -> list[tuple[list[int], list[int]]]:
    """(ids before it, ids of it) of every prompt in one of the four forms, with room for an `answer`."""
    if isinstance(given, str):
        given = [given]
    if isinstance(given[0], int):
        given = [given]
    marks = served.begin() if begin else []
    if isinstance(given[0], str):
        pairs = [(marks, ids) for ids in served.tokenizer.encode_batch(given)]
    else:
        pairs = [([], ids) for ids in given]
    rows, gaps = served.service.engine.vocab, served.service.engine.gaps
    for before, ids in pairs:
        if not before and not ids:
            raise ApiError(400, f"{param} is empty", param=param)
        if wrong := next((id for id in ids if id >= rows or id in gaps), None):
            raise ApiError(400, f"{param} has the id {wrong}, which is no token; the model's ids end at {rows - 1}",
                           param=param)
        require_room(served, len(before) + len(ids), param, answer=answer)
    return pairs


def chat_prompt(served: Served, messages: list[Message], tools: list[dict[str, Any]] | None, thinking: bool | None, *,
                generation_prompt: bool = True, limited: bool = True) -> list[int]:
    try:
        ids, _ = encode_chat(served.tokenizer, [plain(message, i) for i, message in enumerate(messages)], tools=tools,
                             generation_prompt=generation_prompt, thinking=thinking, template=served.loaded.template)
    except UserError as error:
        raise ApiError(400, str(error), param="messages") from None
    if limited:
        require_room(served, len(ids), "messages")
    return ids


def require_room(served: Served, count: int, param: str, *, answer: bool = True) -> None:
    if count + answer > served.context:
        raise ApiError(400, f"the text has {count} tokens and the context of {served.name} is {served.context}"
                            f"{', which leaves no room for an answer' if answer else ''}; shorten it", param=param,
                       code="context_length_exceeded")


def plain(message: Message, i: int) -> dict[str, Any]:
    """A message as the renderer takes it."""
    where = f"messages[{i}]"
    content = message.content
    if isinstance(content, list):
        for k, part in enumerate(content):
            if part.type not in ("text", "input_text") or part.text is None:
                raise ApiError(400, f"{where}.content[{k}] is of the type {part.type!r}; this model reads text only",
                               param=f"{where}.content[{k}].type")
        content = "\n".join(part.text or "" for part in content)
    out: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content}
    if message.role != "assistant":
        if content is None:
            raise ApiError(400, f"{where} ({message.role}) has no content", param=f"{where}.content")
        if message.role == "tool" and message.name is not None:
            out["name"] = message.name
        return out
    thoughts = (message.reasoning_content, message.reasoning, message.reasoning_text)
    if (reasoning := next(filter(None, thoughts), None)) is not None:
        out["reasoning_content"] = reasoning
    out["content"] = content or ""
    if message.tool_calls:
        out["tool_calls"] = [{"function": {"name": call.function.name, "arguments": call.function.arguments or {}}}
                             for call in message.tool_calls]
    return out


def thinking_of(served: Served, body: ChatRequest | TokenizeRequest) -> bool | None:
    """Think first, don't, or as the model likes: by the first of the many names under which it was said."""
    options = body.chat_template_kwargs
    said = [body.enable_thinking, body.open_thinking]
    said += [options.enable_thinking, options.open_thinking] if options else []
    if isinstance(body, ChatRequest):
        said += [SWITCH[body.thinking.type]] if body.thinking else []
        said += [EFFORT[body.reasoning_effort]] if body.reasoning_effort else []
    return next((value for value in said if value is not None), served.thinking)


def opened(served: Served, prompt: list[int]) -> bool:
    """Whether a prompt ends inside a think block. No text can spell the special token, so its ids tell."""
    specials = served.tokenizer.specials
    last = next((id for id in reversed(prompt[-8:]) if id in (specials.get(OPEN), specials.get(CLOSE))), None)
    return last is not None and last == specials.get(OPEN)


# ---------------------------------------------------------------------------------------------------- what it must fit

def offered(body: ChatRequest) -> tuple[list[dict[str, Any]] | None, str]:
    """(the tools as the model is told of them, what of them to choose: auto, required, or a name). A tool that must
    not be called is not told of."""
    choice = body.tool_choice
    names = [tool.function.name for tool in body.tools or ()]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ApiError(400, f"two tools are called {twice}; every tool needs a name of its own", param="tools")
    if choice == "none" or not names:
        if choice == "required" or isinstance(choice, NamedTool):
            raise ApiError(400, "tool_choice demands a call and there are no tools; send them as tools",
                           param="tool_choice")
        return None, "auto"
    if isinstance(choice, NamedTool):
        choice = choice.function.name
        if choice not in names:
            raise ApiError(400, f"tool_choice names {choice}, which is none of the tools ({', '.join(names)})",
                           param="tool_choice")
    return [told(tool) for tool in body.tools or ()], choice or "auto"


def told(tool: Tool) -> dict[str, Any]:
    """A tool as the model hears of it; whether it is strict is the grammar's business."""
    return {"type": "function", "function": tool.function.model_dump(exclude_none=True, exclude={"strict"})}


def tool_grammar(served: Served, tools: list[Tool], choice: str, parallel: bool) -> Grammar | None:
    """None: the model's tokenizer has no calls of our form, so whatever it writes is read as it comes."""
    if not {"<tool_call>", "</tool_call>"} <= served.tokenizer.specials.keys():
        if choice == "auto":
            return None
        raise ApiError(400, f"{served.name} cannot be made to call a tool: its tokenizer has no <tool_call>",
                       param="tool_choice")
    functions = [tool.function.model_dump(exclude_none=True) for tool in tools]
    return compiled("tools", served, Grammar.tool_calls, functions, choice=choice, parallel=parallel)


def constraint(served: Served, body: Generating, form: ResponseFormat | None) -> Grammar | None:
    """What the whole answer must fit, by the one of several ways in which it may be said."""
    newer = body.structured_outputs
    asked: list[tuple[str, Any, tuple[Any, ...]]] = []
    if form is not None and form.type == "json_object":
        asked.append(("response_format", Grammar.json_object, ()))
    if form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise ApiError(400, "response_format of the type json_schema needs json_schema: {name, schema}",
                           param="response_format.json_schema")
        asked.append(("response_format", Grammar.json_schema, (form.json_schema.schema_,)))
    for param, make, value in (("guided_json", Grammar.json_schema, body.guided_json),
                               ("guided_regex", Grammar.regex, body.guided_regex),
                               ("guided_choice", Grammar.choice, body.guided_choice),
                               ("structured_outputs", Grammar.json_schema, newer and newer.json_),
                               ("structured_outputs", Grammar.regex, newer and newer.regex),
                               ("structured_outputs", Grammar.choice, newer and newer.choice)):
        if value is not None:
            asked.append((param, make, (value,)))
    if len(asked) > 1:
        raise ApiError(400, f"{asked[0][0]} and {asked[1][0]} both say what the answer must fit; use one",
                       param=asked[1][0])
    return compiled(asked[0][0], served, asked[0][1], *asked[0][2]) if asked else None


def compiled(param: str, served: Served, make: Any, *values: Any, **more: Any) -> Grammar:
    try:
        return served.grammar(make, *values, **more)
    except UserError as error:
        raise ApiError(400, str(error), param=param) from None


# ------------------------------------------------------------------------------------------------------------ drawing

def engine_request(served: Served, body: Generating, prompt: list[int], max_new: int, *, top: int,
                   grammar: Grammar | None) -> Request:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return Request(prompt=prompt, sampling=sampling_of(served, body), max_new=min(max_new, served.context),
                   n=body.n or 1, stop=tuple(dict.fromkeys(filter(None, stop))), priority=body.priority or 0,
                   top_logps=top, grammar=grammar, adapter=served.adapter)


def sampling_of(served: Served, body: Generating) -> Sampling:
    """What the request says, over the model's defaults."""
    given = {name: value for name in DRAWING if (value := getattr(body, name)) is not None}
    given["seed"] = secrets.randbelow(SEEDS) if body.seed is None else body.seed % SEEDS
    if given.get("top_k") == -1:
        given["top_k"] = 0
    if given.get("top_p") == 0:                   # nothing but the likeliest
        given |= {"top_p": 1.0, "temperature": 0.0}
    if body.logit_bias:
        given["logit_bias"] = tuple((bias_id(served, key), value) for key, value in body.logit_bias.items())
    return replace(served.sampling, **given)


def bias_id(served: Served, key: str) -> int:
    rows, gaps = served.service.engine.vocab, served.service.engine.gaps
    if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < rows and int(key) not in gaps):
        raise ApiError(400, f"logit_bias has the key {key[:40]!r}; its keys are token ids from 0 to {rows - 1}",
                       param="logit_bias")
    return int(key)
