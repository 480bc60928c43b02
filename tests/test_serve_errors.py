"""What a server says to requests that are wrong, too many, too large or not allowed: always in OpenAI's one shape."""
from __future__ import annotations

import json
import shutil
import socket
import threading

import httpx
import openai
import pytest

from mindseed.base.files import read_json, write_json
from mindseed.cli import main
from mindseed.infer.constrain import Grammar
from mindseed.infer.engine import EngineConfig
from mindseed.recipes import serve as recipe
from mindseed.serve.errors import ApiError
from mindseed.serve.guard import BUCKETS, Guard
from mindseed.serve.openai import ServeConfig
from tests.serving import CLOCK, random_folder, running, served, taught_folder

CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
HI = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def server():
    with running(served(random_folder())) as one:
        yield one


def refused(response, status, param=None, code=None, words=""):
    """The error, which must have exactly OpenAI's four fields."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}, body
    error = body["error"]
    assert error["param"] == param, error
    assert code is None or error["code"] == code, error
    assert words in error["message"] and "Traceback" not in error["message"], error
    return error


# -------------------------------------------------------------------------------------------------------- wrong fields

IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
NO_TYPE = {"type": "no such type"}
WRONG = [
    ({"temperature": -1}, "temperature"), ({"temperature": 2.5}, "temperature"),
    ({"temperature": "hot"}, "temperature"), ({"temperature": 1e-9}, "temperature"), ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"), ({"min_p": 1}, "min_p"), ({"n": 0}, "n"), ({"n": True}, "n"), ({"n": 10**30}, "n"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -1}, "max_tokens"), ({"max_tokens": 10**12}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"), ({"seed": 2**64}, "seed"), ({"stop": [1]}, "stop[0]"), ({"stop": {}}, "stop"),
    ({"stop": ["x"] * 65}, "stop"), ({"stop": "x" * 1001}, "stop"), ({"stop": ["", "x" * 1001]}, "stop[1]"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"), ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias"), ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": [1]}, "logit_bias"), ({"stream": "yes"}, "stream"), ({"model": 5}, "model"),
    ({"messages": []}, "messages"), ({"messages": [HI] * 10_001}, "messages"), ({"messages": "hi"}, "messages"),
    ({"messages": [5]}, "messages[0]"),
    ({"messages": [{}]}, "messages[0].role"), ({"messages": [HI | {"role": "god"}]}, "messages[0].role"),
    ({"messages": [HI | {"content": 5}]}, "messages[0].content"),
    ({"messages": [HI, {"role": "user"}]}, "messages[1].content"),
    ({"messages": [HI | {"content": [IMAGE]}]}, "messages[0].content[0].type"),
    ({"messages": [HI | {"content": [{"text": "x"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "messages"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
     "messages[0].tool_calls[0].function.name"),
    ({"tools": [{"type": "retrieval"}]}, "tools[0].type"), ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [CLOCK, CLOCK]}, "tools"), ({"tools": [CLOCK], "tool_choice": "perhaps"}, "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"), ({"functions": [{"name": "f"}]}, "functions"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": NO_TYPE}}]}, "tools"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": NO_TYPE}}}, "response_format"),
    ({"response_format": {"type": "json_object"}, "tools": [CLOCK]}, "response_format"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"guided_regex": "("}, "guided_regex"), ({"guided_choice": []}, "guided_choice"),
    ({"top_logprobs": 2}, "top_logprobs"), ({"logprobs": 5}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"stream_options": []}, "stream_options"),
    ({"reasoning_effort": "extreme"}, "reasoning_effort"),
    ({"chat_template_kwargs": {"enable_thinking": "on"}}, "chat_template_kwargs.enable_thinking"),
]


@pytest.mark.parametrize("body, param", WRONG, ids=[json.dumps(body)[:50] for body, _ in WRONG])
def test_wrong_fields_are_named(server, body, param):
    for stream in (False, True):
        refused(server.chat(**{"stream": stream} | body), 400, param)


@pytest.mark.parametrize("path, body, param", [
    (TEXT, {}, "prompt"), (TEXT, {"prompt": []}, "prompt"), (TEXT, {"prompt": [[]]}, "prompt[0]"),
    (TEXT, {"prompt": ["a", 1]}, "prompt[1]"), (TEXT, {"prompt": [1, -1]}, "prompt[1]"),
    (TEXT, {"prompt": {}}, "prompt"), (TEXT, {"prompt": [10**6]}, "prompt"), (TEXT, {"prompt": [10**12]}, "prompt[0]"),
    (TEXT, {"prompt": [1.5]}, "prompt[0]"), (TEXT, {"prompt": "a", "suffix": "b"}, "suffix"),
    (TEXT, {"prompt": "a", "best_of": 3}, "best_of"), (TEXT, {"prompt": "a", "logprobs": 50}, "logprobs"),
    (TEXT, {"prompt": ["a"] * 2049}, "prompt"), (TEXT, {"prompt": ["a"] * 9, "n": 64}, "prompt"), (EMBED, {}, "input"),
    (EMBED, {"input": ""}, "input"),
    (EMBED, {"input": "a", "encoding_format": "int8"}, "encoding_format"),
    (EMBED, {"input": "a", "dimensions": 7}, "dimensions"), ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": [HI]}, "prompt"), ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ("/detokenize", {"tokens": [10**6]}, None), ("/detokenize", {}, "tokens")], ids=lambda value: str(value)[:40])
def test_wrong_fields_of_the_other_routes(server, path, body, param):
    refused(server.post(path, body), 400, param)


def test_what_is_not_there(server):
    refused(server.chat(model="gpt-4o"), 404, "model", "model_not_found", "mini is served")
    refused(server.http.get("/v1/models/gpt-4o"), 404, "model", "model_not_found")
    refused(server.http.get("/v1/nothing"), 404, words="/v1/nothing")
    response = server.http.get(CHAT)
    refused(response, 405, words="GET")
    assert response.headers["allow"] == "POST"
    with pytest.raises(openai.NotFoundError) as error:
        server.client.chat.completions.create(model="gpt-4o", messages=[HI])
    assert error.value.code == "model_not_found"


# -------------------------------------------------------------------------------------------------------- wrong bodies

@pytest.mark.parametrize("body, words", [
    (b"", "JSON object"), (b"{", "not valid JSON"), (b"[]", "an object"), (b"null", "JSON object"),
    (b"\xff\xfe", "UTF-8"), (b'{"messages": "\xff"}', "UTF-8"), (b'{"user": {"\\udfff": 1}}', "surrogate"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"), (b'{"temperature": NaN}', "NaN"),
    (b'{"temperature": -Infinity}', "-Infinity"), (b'{"temperature": 1e999}', "too large"),
    (b'{"x": ' + b"[" * 150 + b"]" * 150 + b"}", "100 deep"),
    (b'{"x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "too deep"),
    (b'{"n": 1' + b"0" * 5000 + b"}", "5001 digits")], ids=lambda value: str(value)[:30])
def test_bodies_that_are_no_proper_json(server, body, words):
    refused(server.post(CHAT, content=body, headers={"Content-Type": "application/json"}), 400, words=words)


def test_the_header_that_says_json_is_asked_for(server):
    good = json.dumps({"messages": [HI], "max_tokens": 1}).encode()
    refused(server.post(CHAT, content=good, headers={"Content-Type": "text/plain"}), 400, words="Content-Type")
    assert server.post(CHAT, content=good, headers={"Content-Type": "application/json; charset=utf-8"}).is_success


def test_a_prompt_that_fills_the_context(server):
    text = "x" * 1100
    refused(server.chat(messages=[HI | {"content": text}]), 400, "messages", "context_length_exceeded", "1024")
    refused(server.chat(messages=[HI | {"content": text}], stream=True), 400, "messages", "context_length_exceeded")
    refused(server.post(TEXT, {"prompt": text}), 400, "prompt", "context_length_exceeded")
    refused(server.post(EMBED, {"input": ["a", text]}), 400, "input", "context_length_exceeded")


def test_bodies_that_are_too_large():
    with running(served(random_folder()), config=ServeConfig(body_bytes=20_000)) as server:
        body = json.dumps({"messages": [HI | {"content": "x" * 200_000}]}).encode()
        kind = {"Content-Type": "application/json"}
        refused(server.post(CHAT, content=body, headers=kind), 413, code="request_too_large", words="20000 bytes")
        pieces = (body[i:i + 1000] for i in range(0, len(body), 1000))            # sent in chunks, of no known length
        refused(server.post(CHAT, content=pieces, headers=kind), 413, code="request_too_large")
        with pytest.raises(openai.APIStatusError) as error:
            server.client.chat.completions.create(model="mini", messages=[HI | {"content": "x" * 200_000}])
        assert error.value.status_code == 413 and server.chat().is_success


# ------------------------------------------------------------------------------------------------------------- limits

def test_keys():
    with running(served(random_folder()), config=ServeConfig(keys=("one", "two")), key="two") as server:
        assert server.chat().is_success and server.http.get("/metrics").is_success
        for headers in ({"Authorization": "Bearer three"}, {"Authorization": "Bearer"}, {"Authorization": "Basic one"},
                        {"Authorization": "Bearer 键".encode()}):
            refused(server.http.get("/v1/models", headers=headers), 401, code="invalid_api_key")
        with httpx.Client(base_url=server.url) as nobody:
            assert nobody.get("/health").json() == {"status": "ok"}
            for path in ("/v1/models", "/metrics", "/v1/nothing"):
                refused(nobody.get(path), 401, code="invalid_api_key")
            refused(nobody.post(CHAT, json={"messages": [HI]}), 401, code="invalid_api_key")
            assert nobody.get("/v1/models", headers={"x-api-key": "one"}).is_success
        with pytest.raises(openai.AuthenticationError), openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as bad:
            bad.models.list()


def test_a_rate_for_each_key():
    config = ServeConfig(keys=("one", "two"), per_minute=3)
    with running(served(random_folder()), config=config, key="one") as server:
        assert [server.http.get("/v1/models").status_code for _ in range(4)] == [200, 200, 200, 429]
        response = server.chat()
        refused(response, 429, code="rate_limit_exceeded", words="3 requests a minute")
        assert 1 <= int(response.headers["retry-after"]) <= 21
        other = {"Authorization": "Bearer two"}
        assert server.http.get("/v1/models", headers=other).is_success
        assert server.http.get("/health").is_success


def test_a_full_queue():
    config = EngineConfig(max_seqs=1, max_queue=1)
    with running(served(random_folder(), config=config)) as server:
        def ask(statuses, stream):
            response = server.chat(max_tokens=150, temperature=0, logit_bias={"2": -100, "0": -100}, stream=stream)
            statuses.append((response.status_code, response.headers.get("retry-after")))
            if response.status_code == 429:
                refused(response, 429, code="queue_full")

        statuses: list = []
        threads = [threading.Thread(target=ask, args=(statuses, i % 2 == 0)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted({status for status, _ in statuses}) == [200, 429]
        assert all(wait == "1" for status, wait in statuses if status == 429)


def test_answers_that_take_too_long():
    with running(served(random_folder()), config=ServeConfig(timeout_s=0.15)) as server:
        endless = {"max_tokens": 1000, "logit_bias": {"2": -100, "0": -100}}
        refused(server.chat(**endless), 408, code="timeout")
        last = server.chat(**endless, stream=True).text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        with pytest.raises(openai.APIError, match="longer than this server allows"):
            list(server.client.chat.completions.create(model="mini", messages=[HI], stream=True, max_tokens=1000,
                                                       logit_bias={"2": -100, "0": -100}))
        server.wait(lambda figures: server.idle())


def test_pages_of_other_sites():
    with running(served(random_folder()), config=ServeConfig(origins=("https://a.example",), keys=("k",))) as server:
        ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
        for origin, allowed in (("https://a.example", True), ("https://b.example", False)):
            response = httpx.options(server.url + CHAT, headers={"Origin": origin, **ask})
            assert (response.headers.get("access-control-allow-origin") == origin) is allowed


def test_an_engine_that_has_died_is_told_as_such():
    one = served(random_folder())
    with running(one) as server:
        assert server.http.get("/health").status_code == 200
        one.service.engine.step = lambda: 1 / 0
        for _ in range(2):                        # it may have been that request alone
            assert refused(server.chat(), 500, code="engine_error")["type"] == "server_error"
            assert server.http.get("/health").status_code == 200
        assert refused(server.chat(), 503, code="engine_stopped")["type"] == "server_error"
        assert server.http.get("/health").status_code == 503
        refused(server.chat(stream=True), 503)


# ------------------------------------------------------------------------------------------------- the command line

def failed(capsys, *argv):
    """The message of a command that must fail as a user's mistake."""
    code = main(["serve", *map(str, argv)])
    out = capsys.readouterr()
    assert code == 2 and "Traceback" not in out.err and len(out.err.strip().splitlines()) <= 3, out.err
    return out.err


def test_mistakes_on_the_command_line(capsys, tmp_path):
    folder = random_folder()
    assert "which model?" in failed(capsys)
    assert "no such folder" in failed(capsys, tmp_path / "nothing")
    assert "port=70000" in failed(capsys, folder, "--port", 70000)
    assert "both be called mini" in failed(capsys, folder, folder)
    assert "--draft_model" in failed(capsys, folder, "--engine.draft", "model")
    assert "rate=0" in failed(capsys, folder, "--rate", 0)
    assert "does not exist" in failed(capsys, folder, "--api_key_file", tmp_path / "keys")
    assert "block_size=0" in failed(capsys, folder, "--engine.block_size", 0)
    assert "here it is called serve" in capsys.readouterr().err or main(["serve_openai_api"]) == 2
    assert "here it is called serve" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}: another program" in failed(capsys, folder, "--port", port)
    assert "cannot listen on" in failed(capsys, folder, "--host", "no.such.host.invalid")


def test_a_model_that_was_taught_in_another_template_is_not_served(capsys, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(taught_folder(), folder)
    config = read_json(folder / "mindseed.json")
    write_json(folder / "mindseed.json", config | {"template_hash": "0" * 64})
    assert "--allow_other_template" in failed(capsys, folder)


def test_names(tmp_path):
    for name in ("a/model", "b", "c=d"):
        (tmp_path / name).mkdir(parents=True)
    words = [f"{tmp_path}/a/model", f"{tmp_path}/b", f"big={tmp_path}/b", f"{tmp_path}/c=d"]
    assert recipe.named(words) == {"a": words[0], "b": words[1], "big": f"{tmp_path}/b", "c=d": words[3]}


def test_keys_come_from_three_places(tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("a\n\n b \n")
    monkeypatch.setenv("MINDSEED_API_KEY", "c,d")
    options = recipe.Options(api_key=("e", "a"), api_key_file=str(tmp_path / "keys"))
    assert recipe.find_keys(options) == ("e", "a", "b", "c", "d")


def test_a_grammar_that_would_take_years(server, monkeypatch):
    """Its request is told so in time, nobody waits for it, and the next is answered while it is still at work."""
    slow, at_work, go_on = "(xy)*", threading.Event(), threading.Event()

    def compile(tokenizer, pattern):
        if pattern == slow:
            at_work.set()
            go_on.wait()
        return regex(tokenizer, pattern)

    regex = Grammar.regex
    monkeypatch.setattr(Grammar, "regex", compile)
    monkeypatch.setattr("mindseed.serve.served.COMPILE_S", 0.05)
    try:
        refused(server.chat(guided_regex=slow), 400, "guided_regex", words="make it simpler")
        assert at_work.wait(timeout=60)
        monkeypatch.setattr("mindseed.serve.served.COMPILE_S", 60.0)        # a busy machine takes its time for any
        assert server.chat(guided_choice=["a", "b"]).json()["choices"][0]["message"]["content"] in "ab"
        refused(server.chat(guided_regex=slow), 400, "guided_regex", words="make it simpler")       # not tried again
    finally:
        go_on.set()


def test_patterns_whose_automaton_doubles_with_each(server):
    """Ten are given up by the library, more are not even tried."""
    for count, words in ((10, "can't be used"), (11, "allOf of more than 10")):
        schema = {"allOf": [{"type": "string", "pattern": f".*{i}.*"} for i in range(count)]}
        refused(server.chat(guided_json=schema), 400, "guided_json", words=words)


@pytest.mark.parametrize("per_minute", [1, 600_000])
def test_the_rate_does_not_remember_everybody(per_minute):
    door = Guard(None, per_minute=per_minute)
    for i in range(BUCKETS + 500):
        door.check_rate(f"10.0.{i >> 8}.{i & 255}")
    assert len(door.buckets) < BUCKETS * 0.6 and f"10.0.{i >> 8}.{i & 255}" in door.buckets
    if per_minute == 1:
        with pytest.raises(ApiError, match="1 requests a minute"):
            door.check_rate(f"10.0.{i >> 8}.{i & 255}")
