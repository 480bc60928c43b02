"""What the page at /docs shows beside the fields of schema.py: an introduction and an example of every answer."""
from __future__ import annotations

from typing import Any

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
