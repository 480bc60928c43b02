"""What clients may send, field by field: OpenAI's requests, the extras of vLLM and MiniMind, and what they mean here.

Fields that no class names are ignored, for every client sends some of its own (chat_id, metadata, features ...). A
field with the value null counts as not given. Types are strict: "5" is no number.
"""
from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

MAX_ID = 2**31 - 1
SOON = Field(fail_fast=True)                      # of a megabyte of wrong elements, one error is enough
Short = Annotated[str, Field(max_length=1000)]
Id = Annotated[int, Field(ge=0, le=MAX_ID)]
Texts = Annotated[list[str], SOON, Field(min_length=1, max_length=2048)]
Ids = Annotated[list[Id], SOON, Field(min_length=1)]
ManyIds = Annotated[list[Ids], SOON, Field(min_length=1, max_length=2048)]


def kind_of_prompt(value: Any) -> str:
    """Which of the four forms a prompt has, by its first element, so that errors speak of that form only."""
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(value, list):
        return "ids" if isinstance(first, (int, float)) else "many" if isinstance(first, list) else "texts"
    return "text"


Prompt = Annotated[Annotated[str, Tag("text")] | Annotated[Texts, Tag("texts")] | Annotated[Ids, Tag("ids")]
                   | Annotated[ManyIds, Tag("many")], Discriminator(kind_of_prompt)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


# -------------------------------------------------------------------------------------------------------- messages

class Part(Strict):
    type: str = Field(description="only `text` can be read here")
    text: str | None = None


class FunctionCall(Strict):
    name: str = Field(min_length=1)
    arguments: str | dict[str, Any] | None = Field(None, description="JSON text, as an answer brought it")


class ToolCall(Strict):
    id: str | None = None
    function: FunctionCall


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], SOON, Field(max_length=4096)] | None = Field(
        None, description="text, or a list of text parts")
    reasoning_content: str | None = Field(None, description="an assistant's thoughts; absent: it had none")
    reasoning: str | None = Field(None, description="the same under another name")
    reasoning_text: str | None = Field(None, description="the same under FastGPT's name")
    tool_calls: Annotated[list[ToolCall], SOON, Field(max_length=1000)] | None = None
    tool_call_id: str | None = Field(None, description="of a tool's message: the call that it answers")
    name: str | None = None


class Function(Strict):
    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of the arguments")
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"] = "function"
    function: Function


class Name(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"] = "function"
    function: Name


class JsonSchema(Strict):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema", description="what the answer must fit")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Strict):
    include_usage: bool | None = Field(None, description="end with a chunk that counts the tokens")


class TemplateOptions(Strict):
    enable_thinking: bool | None = None
    open_thinking: bool | None = None


class ThinkingSwitch(Strict):
    type: Literal["enabled", "disabled", "auto"]


class Structured(Strict):
    json_: dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None


# -------------------------------------------------------------------------------------------------------- requests

class Generating(Strict):
    """What chat and plain completions share."""

    model: str | None = Field(None, description="a name from /v1/models; may be left out where there is one model")
    stream: bool | None = Field(None, description="send the answer as it is written, as server-sent events")
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=64, description="how many answers [1]")
    seed: int | None = Field(None, ge=-2**63, lt=2**63, description="the same seed gives the same answer; answer i of "
                                                                     "n draws with seed + i [random]")
    stop: Short | Annotated[list[Short], Field(max_length=64)] | None = Field(
        None, description="end the answer before any of these texts")
    temperature: float | None = Field(None, ge=0, le=2, description="0: always the likeliest token [the model's]")
    top_p: float | None = Field(None, ge=0, le=1, description="the likeliest tokens with this much probability; 0: "
                                                              "only the likeliest [the model's]")
    top_k: int | None = Field(None, ge=-1, le=MAX_ID, description="the k likeliest tokens; 0 or -1: all [the model's]")
    min_p: float | None = Field(None, ge=0, lt=1, description="tokens at least this likely relative to the likeliest")
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, description="above 1: avoid tokens that occurred")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="times how often a token was written")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="once for a token that was written")
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=4096, description="token id to what is added to its logit")
    priority: int | None = Field(None, ge=-MAX_ID, le=MAX_ID, description="lower is served first [0]")
    user: Any = Field(None, description="accepted and not used")
    guided_json: dict[str, Any] | None = Field(None, description="a JSON schema that the answer must fit")
    guided_regex: str | None = Field(None, max_length=10_000, description="an expression the answer must match")
    guided_choice: list[str] | None = Field(None, min_length=1, max_length=1000, description="the possible answers")
    structured_outputs: Structured | None = Field(None, description="the three above in vLLM's newer form")


class ChatRequest(Generating):
    model_config = ConfigDict(json_schema_extra={"examples": [
        {"model": "mini", "messages": [{"role": "user", "content": "What is 2 + 2?"}], "temperature": 0},
        {"model": "mini", "stream": True, "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Is it raining in Paris?"}]}],
         "tools": [{"type": "function", "function": {"name": "weather", "parameters": {
             "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]}]})

    messages: Annotated[list[Message], SOON, Field(min_length=1, max_length=10_000)]
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_ID, description="longest answer, thoughts included "
                                                                                 "[what the context leaves]")
    max_tokens: int | None = Field(None, ge=1, le=MAX_ID, description="the same under its older name")
    logprobs: bool | None = Field(None, description="report the log-probability of every token, the model's own, "
                                                    "before temperature and filters")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="and of this many likeliest ones at each place")
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], SOON, Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="whether the model may, must or must not call a tool, or which it must call [auto]")
    parallel_tool_calls: bool | None = Field(None, description="whether one answer may hold several calls [true]")
    chat_template_kwargs: TemplateOptions | None = None
    enable_thinking: bool | None = Field(None, description="think first, don't, or as the model likes [the server's]")
    open_thinking: bool | None = Field(None, description="the same under MiniMind's name")
    thinking: ThinkingSwitch | None = Field(None, description="the same in DeepSeek's and Zhipu's form")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description="none and minimal: don't think; the others: think first")
    functions: list[Any] | None = Field(None, description="the older form of `tools`, refused")


class CompletionRequest(Generating):
    model_config = ConfigDict(json_schema_extra={"examples": [
        {"model": "mini", "prompt": "The capital of France is", "max_tokens": 16},
        {"model": "mini", "prompt": ["one", "two"], "logprobs": 2, "echo": True, "max_tokens": 0}]})

    prompt: Prompt = Field(description="text, texts, ids, or lists of ids. Text is only text: what it spells of "
                                       "special tokens is not one, but ids may be any")
    max_tokens: int | None = Field(None, ge=0, le=MAX_ID, description="longest answer [16]")
    max_completion_tokens: int | None = Field(None, ge=0, le=MAX_ID, description="the same under its newer name")
    logprobs: int | None = Field(None, ge=0, le=20, description="report log-probabilities, and those of this many "
                                                                "likeliest tokens at each place")
    echo: bool | None = Field(None, description="begin the text with the prompt, log-probabilities included")
    best_of: int | None = Field(None, ge=1, le=64, description="may only be equal to n")
    suffix: str | None = Field(None, description="refused")
    add_special_tokens: bool | None = Field(None, description="begin a text with the tokenizer's begin token [true]")
    response_format: ResponseFormat | None = None


class EmbeddingRequest(Strict):
    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "mini", "input": ["red", "green"]}]})

    model: str | None = Field(None, description="a name from /v1/models; may be left out where there is one model")
    input: Prompt = Field(description="text, texts, ids, or lists of ids")
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: little-endian float32")
    dimensions: int | None = Field(None, ge=1, le=MAX_ID, description="may only be the model's width")
    user: Any = Field(None, description="accepted and not used")


class TokenizeRequest(Strict):
    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "Hello, 世界"}]})

    model: str | None = None
    prompt: str | None = Field(None, description="a text, or instead of it:")
    messages: Annotated[list[Message], SOON, Field(min_length=1, max_length=10_000)] | None = Field(
        None, description="a conversation, as /v1/chat/completions would put it to the model")
    tools: Annotated[list[Tool], SOON, Field(max_length=128)] | None = None
    add_generation_prompt: bool | None = Field(None, description="open the assistant's turn [true]")
    add_special_tokens: bool | None = Field(None, description="begin a text with the tokenizer's begin token [false]")
    chat_template_kwargs: TemplateOptions | None = None
    enable_thinking: bool | None = None
    open_thinking: bool | None = None
    return_token_strs: bool | None = Field(None, description="also the text of every token")


class DetokenizeRequest(Strict):
    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [72, 105]}]})

    model: str | None = None
    tokens: Annotated[list[Id], SOON]
