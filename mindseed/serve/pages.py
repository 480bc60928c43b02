"""The page at /docs: what can be asked, field by field, and an example of every answer. It is made here of the OpenAPI
description and needs nothing from anywhere else, so that it is there without the internet as well."""
from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from jinja2 import Environment

ABOUT = """\
OpenAI's API over models of `mindseed`: point any client at `http://HOST:PORT/v1`.

```python
from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8998/v1", api_key="none")
print(client.chat.completions.create(model="mini", messages=[{"role": "user", "content": "Hello"}]))
```

Every failure has the shape of `error` below; 400 to 429 say which field and what to do. Fields that are not listed are
ignored. If the server was given keys, send `Authorization: Bearer KEY`."""
TAGS = [{"name": "answers", "description": "What models are for."},
        {"name": "other uses", "description": "Vectors and tokens."},
        {"name": "the server", "description": "What is served, and how it is doing."}]
ERROR = {"error": {"message": "temperature: Input should be less than or equal to 2", "type": "invalid_request_error",
                   "param": "temperature", "code": None}}
USAGE = {"prompt_tokens": 14, "completion_tokens": 4, "total_tokens": 18,
         "prompt_tokens_details": {"cached_tokens": 0}, "completion_tokens_details": {"reasoning_tokens": 0}}
HEAD = {"id": "chatcmpl-5b1c", "created": 1790000000, "model": "mini", "system_fingerprint": None}
CHAT = HEAD | {"object": "chat.completion", "choices": [
    {"index": 0, "message": {"role": "assistant", "content": "2 + 2 = 4.", "refusal": None}, "logprobs": None,
     "finish_reason": "stop"}], "usage": USAGE}
EVENTS = """\
data: {"id":"chatcmpl-5b1c","object":"chat.completion.chunk","created":1790000000,"model":"mini","choices":[{"index":0,\
"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}

data: {"id":"chatcmpl-5b1c","object":"chat.completion.chunk","created":1790000000,"model":"mini","choices":[{"index":0,\
"delta":{"content":"2 + 2"},"logprobs":null,"finish_reason":null}]}

data: [DONE]
"""
TEXT = HEAD | {"id": "cmpl-5b1c", "object": "text_completion", "usage": USAGE, "choices": [
    {"index": 0, "text": " Paris.", "logprobs": None, "finish_reason": "length"}]}
CARD = {"id": "mini", "object": "model", "created": 1790000000, "owned_by": "mindseed", "max_model_len": 512}
VECTORS = {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.6, -0.8]}], "model": "mini",
           "usage": {"prompt_tokens": 1, "total_tokens": 1}}


def shown(example: Any, *, stream: bool = False, fails: bool = True) -> dict[int | str, dict[str, Any]]:
    content = {"application/json": {"example": example}}
    if stream:
        content["text/event-stream"] = {"example": EVENTS}
    failure = {"description": "What is wrong with the request, in the one shape of all failures",
               "content": {"application/json": {"example": ERROR}}}
    return {200: {"description": "Done", "content": content}} | ({"4XX": failure} if fails else {})


RESPONSES: dict[str, dict[int | str, dict[str, Any]]] = {
    "chat": shown(CHAT, stream=True), "text": shown(TEXT, stream=True), "embeddings": shown(VECTORS),
    "tokenize": shown({"count": 2, "max_model_len": 512, "tokens": [72, 105]}), "detokenize": shown({"prompt": "Hi"}),
    "models": shown({"object": "list", "data": [CARD]}, fails=False), "model": shown(CARD),
    "health": shown({"status": "ok"}, fails=False),
    "metrics": {200: {"description": "Prometheus' text format", "content": {"text/plain": {
        "example": 'mindseed_generated_tokens_total{model="mini"} 4.0'}}}},
}


def docs_page(api: dict[str, Any], base: str, models: list[str]) -> str:
    """The description `api` as HTML, for a server that is reached at `base`; `models` are named if all may know."""
    page = Environment(autoescape=True).from_string((files("mindseed.serve") / "docs.html.j2").read_text("utf-8"))
    schemas = api.get("components", {}).get("schemas", {})
    routes: dict[str, list[dict[str, Any]]] = {tag["name"]: [] for tag in api["tags"]}
    for path, methods in api["paths"].items():
        for method, route in methods.items():
            body = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            answers = route["responses"].get("200", {}).get("content", {})
            routes[route["tags"][0]].append({
                "path": path, "method": method.upper(), "summary": route["summary"],
                "about": route.get("description", ""), "fields": fields_of(resolved(body, schemas), schemas),
                "examples": [(kind, said(one["example"])) for kind, one in answers.items() if "example" in one]})
    return page.render(title=api["info"]["title"], version=api["info"]["version"], base=base, models=models,
                       model=models[0] if models else "NAME",
                       groups=[(tag["name"], tag["description"], routes[tag["name"]]) for tag in api["tags"]])


def fields_of(schema: dict[str, Any], schemas: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, type, meaning) of the fields of an object, those that are required first."""
    required = schema.get("required", [])
    names = sorted(schema.get("properties", {}), key=lambda name: name not in required)
    return [(name, kind_of(schema["properties"][name], schemas) + (", required" if name in required else ""),
             schema["properties"][name].get("description", "")) for name in names]


def kind_of(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    """A schema in a few words."""
    schema = resolved(schema, schemas)
    if members := schema.get("anyOf") or schema.get("oneOf"):
        kinds = [kind_of(member, schemas) for member in members if member.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if values := schema.get("enum") or ([schema["const"]] if "const" in schema else []):
        return " or ".join(json.dumps(value) for value in values)
    if schema.get("type") == "array":
        return f"list of {kind_of(schema.get('items', {}), schemas)}"
    low, high = schema.get("minimum"), schema.get("maximum")
    bounds = f" {low if low is not None else '..'} to {high:g}" if high is not None and abs(high) < 1e9 else ""
    return schema.get("type", "anything") + bounds.replace(".0 ", " ")


def resolved(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    return schemas.get(schema["$ref"].split("/")[-1], {}) if "$ref" in schema else schema


def said(example: Any) -> str:
    return example if isinstance(example, str) else json.dumps(example, indent=2, ensure_ascii=False)
