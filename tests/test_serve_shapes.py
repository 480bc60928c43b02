"""What other programs send, word for word, and the page that describes the API.

The requests are as Open-WebUI, FastGPT, MiniMind's web page, lm-eval and LangChain make them: with fields of their own
at every level, nulls for what is not set, and habits like an empty stop text.
"""
from __future__ import annotations

import json
import re

import pytest

from tests.serving import events, random_folder, running, served, taught_folder


@pytest.fixture(scope="module")
def server():
    with running(served(random_folder()), served(taught_folder(), "taught")) as one:
        yield one


OPEN_WEBUI = {                                    # a chat, with the fields that its front end adds
    "stream": True, "model": "taught", "messages": [{"role": "user", "content": "Weather in Rome and Oslo?"}],
    "params": {}, "files": [], "tool_servers": [], 
    "variables": {"{{USER_NAME}}": "ada", "{{CURRENT_DATE}}": "2026-01-02"},
    "features": {"voice": False, "image_generation": False, "code_interpreter": False, "web_search": False},
    "model_item": {"id": "taught", "object": "model", "owned_by": "openai", "urlIdx": 0, "tags": []},
    "session_id": "Ow1-AAAB", "chat_id": "b8f0a5c2-0000", "id": "5f2c", "background_tasks": {
        "title_generation": True, "tags_generation": True, "follow_up_generation": True},
    "stream_options": {"include_usage": True}, "user": {"name": "Ada", "id": "1", "email": "ada@example.org",
                                                       "role": "admin"},
    "metadata": {"user_id": "1", "chat_id": "b8f0a5c2-0000", "message_id": "5f2c", "tool_ids": None, "files": None},
    "temperature": 0, "max_tokens": None, "top_p": None, "stop": None, "seed": None, "frequency_penalty": None,
    "logit_bias": None, "response_format": None, "reasoning_effort": None, "keep_alive": "5m", "num_ctx": 4096,
    "tools": [{"type": "function", "function": {
        "name": "weather", "description": "Tells the weather.", "parameters": {
            "type": "object", "properties": {"city": {"description": "a city", "type": "string"}},
            "required": ["city"]}}}],
}
OPEN_WEBUI_TITLE = {                              # its task model naming a chat
    "model": "taught", "messages": [{"role": "user", "content": "### Task:\nGenerate a concise title for the chat."}],
    "stream": False, "max_completion_tokens": 20, "temperature": 0.1, "metadata": {
        "task": "title_generation", "task_body": {"model": "taught"}, "chat_id": "b8f0a5c2-0000"}}
FASTGPT = {                                       # a node of a workflow with tools, the second round
    "model": "taught", "temperature": 0, "max_tokens": 2000, "stream": True, "stop": [""], "response_format": None,
    "stream_options": {"include_usage": True}, "top_p": 1, "parallel_tool_calls": True, "tool_choice": "auto",
    "messages": [
        {"role": "system", "content": "你是一个助手", "dataId": "a1", "hideInUI": False},
        {"role": "user", "content": [{"type": "text", "text": "Weather in Rome"}], "dataId": "a2"},
        {"role": "assistant", "content": "", "reasoning_text": "look it up", "dataId": "a3"},
        {"role": "assistant", "tool_calls": [{
            "index": 0, "id": "call_1", "type": "function", "toolName": "天气", "toolAvatar": "/a.svg",
            "function": {"name": "weather", "arguments": "{\"city\": \"Rome\"}"}}]},
        {"tool_call_id": "call_1", "role": "tool", "name": "weather", "content": "sunny"}],
    "tools": [{"type": "function", "function": {"name": "weather", "description": "天气", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "description": "城市", "enum": ["Rome", "Oslo"]}},
        "required": ["city"]}}}],
    "chatId": "c1", "responseChatItemId": "r1", "detail": True, "variables": {"uid": "1"},
}
MINIMIND = {                                      # its scripts/chat_openai_api.py and web page
    "model": "taught", "messages": [{"role": "user", "content": "2+2?"}], "stream": True, "temperature": 0,
    "max_tokens": 64, "top_p": 0.9, "open_thinking": True, "extra_body": {}, "chat_template_kwargs": {
        "open_thinking": True, "enable_thinking": True, "add_vision_id": False}}
LANGCHAIN = {
    "messages": [{"content": "Be brief.", "role": "system"},
                 {"content": "Who are you?", "role": "user", "name": "ada"}],
    "model": "taught", "stream": False, "n": 1, "temperature": 0.0, "max_completion_tokens": 12, "store": False,
    "service_tier": "auto", "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0, "seed": 7}


def streamed(server, body):
    """The deltas of a stream, and its usage."""
    response = server.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    chunks = events(response.text)
    usage = chunks[-1]["usage"] if not chunks[-1]["choices"] else None
    return [c["choices"][0] for c in chunks if c["choices"]], usage


def test_open_webui(server):
    assert [m["id"] for m in server.http.get("/v1/models").json()["data"]] == ["mini", "taught"]
    choices, usage = streamed(server, OPEN_WEBUI)
    assert choices[0]["delta"] == {"role": "assistant", "content": ""} and usage["total_tokens"] > 0
    assert choices[-1]["finish_reason"] in ("stop", "tool_calls", "length")
    title = server.post("/v1/chat/completions", OPEN_WEBUI_TITLE)
    assert title.status_code == 200 and title.json()["choices"][0]["message"]["role"] == "assistant"


def test_fastgpt(server):
    choices, usage = streamed(server, FASTGPT)
    assert choices[-1]["finish_reason"] and usage["prompt_tokens"] > 0
    first = [c["delta"]["tool_calls"][0] for c in choices if "tool_calls" in c["delta"]]
    assert all("index" in call for call in first)
    vectors = server.post("/v1/embeddings", {"model": "taught", "input": ["甲", "乙"], "encoding_format": "float"})
    assert len(vectors.json()["data"]) == 2


def test_minimind(server):
    choices, _ = streamed(server, MINIMIND)
    assert "".join(c["delta"].get("reasoning_content") or "" for c in choices) == "two and two"
    assert "".join(c["delta"].get("content") or "" for c in choices) == "4"


def test_langchain(server):
    assert server.post("/v1/chat/completions", LANGCHAIN).json()["choices"][0]["message"]["content"] == "Seed."


def test_lm_eval(server):
    """Its local-completions model: token ids in, echoed with the log-probabilities of each and of the likeliest."""
    ids = server.post("/tokenize", {"model": "mini", "prompt": "a choice"}).json()["tokens"]
    body = {"prompt": [ids, ids[:4]], "model": "mini", "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True,
            "temperature": 0}
    choices = server.post("/v1/completions", body).json()["choices"]
    assert [len(c["logprobs"]["token_logprobs"]) for c in choices] == [9, 5]
    for choice in choices:
        scored = choice["logprobs"]
        assert scored["token_logprobs"][0] is None and max(scored["token_logprobs"][1:]) <= 0
        assert all(isinstance(top, dict) for top in scored["top_logprobs"][1:])


def test_the_page_that_describes_it_all(server):
    page = server.http.get("/openapi.json").json()
    assert "OpenAI" in page["info"]["description"]
    assert set(page["paths"]) == {
        "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize", "/v1/models",
        "/v1/models/{name}", "/health", "/metrics"}
    for path, methods in page["paths"].items():
        for operation in methods.values():
            assert operation["summary"] and operation["tags"], path
            assert "422" not in operation["responses"], path
            content = operation["responses"]["200"]["content"]
            assert all("example" in kind for kind in content.values()), path
    for name in ("ChatRequest", "CompletionRequest", "EmbeddingRequest"):
        schema = page["components"]["schemas"][name]
        assert schema["examples"], name
        bare = [key for key, field in schema["properties"].items() if "description" not in field]
        assert set(bare) <= {"messages", "response_format", "tools", "chat_template_kwargs", "stream_options"}, bare
    for body in page["components"]["schemas"]["ChatRequest"]["examples"]:
        assert server.post("/v1/chat/completions", body | {"model": "mini", "max_tokens": 2}).status_code == 200
    assert json.dumps(page)


def test_the_page_for_people(server):
    """It is there without the internet, too: nothing in it is fetched from elsewhere."""
    shown = server.http.get("/", follow_redirects=True)
    assert shown.url.path == "/docs" and not re.search(r"(src|href)=.?(https?:)?//|url\(|@import", shown.text)
    for path, methods in server.http.get("/openapi.json").json()["paths"].items():
        assert all(f"<b>{method.upper()}</b> <code>{path}</code>" in shown.text for method in methods)
    for words in ("list of string", "0 to 2", "chat.completion.chunk",
                  str(server.http.base_url).rstrip("/")):
        assert words in shown.text, words
    assert server.http.get("/v1").json()["models"] == ["mini", "taught"]
