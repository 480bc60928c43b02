"""Many clients at once, clients that go away or dawdle, a server that is told to stop, and random requests."""
from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import httpx
import psutil
import pytest

from benchmarks.serving import load, prompts
from mindseed.infer.engine import Engine, EngineConfig, Request
from mindseed.infer.sample import Sampling
from mindseed.interop.directory import load_directory
from mindseed.serve import server as serving
from mindseed.serve.openai import create_app
from mindseed.serve.stream import Events, merged
from mindseed.tokenizers.byte import Byte
from tests.serving import Running, first_words, random_folder, running, served

ENDLESS = {"logit_bias": {"0": -100, "2": -100}, "temperature": 0}
BODY = {"messages": [{"role": "user", "content": "hi"}], "model": "mini", "max_tokens": 900, **ENDLESS}


@pytest.fixture(scope="module")
def server():
    with running(served(random_folder())) as one:
        yield one


def lone_answers(ids: list[list[int]], max_new: int) -> list[str]:
    loaded, sampling = load_directory(random_folder()), Sampling(temperature=0, logit_bias=((0, -100.0), (2, -100.0)))
    return [Engine.of(loaded).generate([Request(prompt=prompt, max_new=max_new, sampling=sampling)])[0][0].text
            for prompt in ids]


def place(server: Running) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def connect(server: Running, body: dict, *, receive: int | None = None) -> socket.socket:
    """A connection on which a chat has been asked for."""
    sock = socket.socket()
    if receive:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    sock.connect(place(server))
    data = json.dumps(body).encode()
    sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                 b"Content-Length: %d\r\n\r\n" % len(data) + data)
    return sock


@pytest.mark.parametrize("draft", ["off", "ngram"])
def test_each_of_many_gets_its_own_answer(draft):
    """Forty clients whose prompts begin alike, more than the engine writes at once, with a cache that is too small for
    all of them: nobody's answer is lost or differs from what it is alone."""
    ids = prompts(40, Byte().vocab_size, shared=96, own=12)
    want = lone_answers(ids, 16)
    config = EngineConfig(max_seqs=16, chunk=128, cache_tokens=1600, draft=draft)
    with running(served(random_folder(), config=config)) as server:
        bodies = [{"prompt": prompt, "max_tokens": 16, **ENDLESS} for prompt in ids]
        answers = asyncio.run(load(*place(server), bodies, clients=40))
        assert [a.error for a in answers] == [None] * 40 and [a.tokens for a in answers] == [16] * 40
        assert [a.text for a in answers] == want
        figures = server.figures()
        assert figures['mindseed_requests_total{endpoint="/v1/completions",status="200"}'] == 40
        assert figures['mindseed_generated_tokens_total{model="mini"}'] == 640
        assert figures['mindseed_prompt_tokens_total{model="mini"}'] == 40 * 108
        assert figures['mindseed_cached_prompt_tokens_total{model="mini"}'] >= 20 * 96
        assert figures['mindseed_time_to_first_token_seconds_count{model="mini"}'] == 40
        assert figures['mindseed_time_per_token_seconds_count{model="mini"}'] == 600
        assert (figures['mindseed_engine_drafted_total{model="mini"}'] > 0) is (draft == "ngram")
        assert server.idle()


def test_clients_that_go_away_stop_the_work_for_them(server):
    before = server.figures()
    socks = []
    for i in range(8):
        sock = connect(server, BODY | {"stream": i % 2 == 0, "n": 1 + i // 4})
        if i % 2 == 0:
            assert b"200 OK" in sock.recv(400)
        socks.append(sock)
    server.wait(lambda f: f['mindseed_engine_running{model="mini"}'] >= 8)
    for i, sock in enumerate(socks):
        if i % 4 < 2:                             # a reset instead of a farewell
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    server.wait(lambda f: server.idle())
    after = server.figures()
    name = 'mindseed_generated_tokens_total{model="mini"}'
    assert after[name] - before.get(name, 0) < 8 * 900 * 0.8
    gone = 'mindseed_requests_total{endpoint="/v1/chat/completions",status="499"}'
    server.wait(lambda f: f.get(gone, 0) - before.get(gone, 0) == 4)              # those who had not heard anything
    service = server.models["mini"].service
    assert not service.lines and not service.engine.jobs


def test_a_client_that_leaves_before_its_turn():
    with running(served(random_folder(), config=EngineConfig(max_seqs=1))) as server:
        first = connect(server, BODY | {"stream": True})
        first.recv(100)
        waiting = [connect(server, BODY | {"stream": stream}) for stream in (True, False)]
        server.wait(lambda f: f['mindseed_engine_waiting{model="mini"}'] == 2)
        for sock in waiting:
            sock.close()
        server.wait(lambda f: f['mindseed_engine_waiting{model="mini"}'] == 0)
        assert server.figures()['mindseed_engine_running{model="mini"}'] == 1     # the first goes on
        first.close()
        server.wait(lambda f: server.idle())


def test_slow_readers_hold_up_nobody_and_miss_nothing(server):
    want = server.post("/v1/chat/completions", BODY | {"max_tokens": 300}).json()["choices"][0]["message"]["content"]
    slow = [connect(server, BODY | {"max_tokens": 300, "stream": True}, receive=2048) for _ in range(6)]
    server.wait(lambda f: server.idle())          # all is written although nobody has read a byte
    assert server.chat().is_success
    for sock in slow:
        with sock, sock.makefile("rb") as file:
            text = b""
            while not text.endswith(b"0\r\n\r\n"):
                assert (piece := file.read1(512)), "the answer broke off"
                text += piece
        said = re.findall(rb'"content":"((?:[^"\\]|\\.)*)"', text)
        assert "".join(json.loads(b'"' + part + b'"') for part in said) == want


def test_a_reader_who_stops_is_let_go_at_the_deadline():
    """Without a deadline sending waits, and the next event is not even made."""
    async def run(deadline_s: float | None) -> tuple[int, bool]:
        made, closed = 0, False

        async def source():
            nonlocal made, closed
            try:
                while True:
                    made += 1
                    yield b"x"
            finally:
                closed = True

        async def send(message):
            if message.get("body"):
                await asyncio.sleep(3600)         # the socket takes no more

        async def receive():
            await asyncio.sleep(3600)

        loop, events = asyncio.get_running_loop(), source()
        response = Events(events, events, None if deadline_s is None else loop.time() + deadline_s)
        task = asyncio.create_task(response({"type": "http"}, receive, send))
        done, _ = await asyncio.wait({task}, timeout=30 if deadline_s else 3)
        ended = bool(done)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert closed
        return made, ended

    assert asyncio.run(run(0.1)) == (1, True)
    assert asyncio.run(run(None)) == (1, False)


def test_merged_streams_end_with_the_first_failure_and_close_the_others():
    closed = []

    async def count(name, n, fail=False):
        try:
            for i in range(n):
                await asyncio.sleep(0)
                yield name, i
            if fail:
                raise ValueError("broken")
        finally:
            closed.append(name)

    async def collect(*streams):
        return [item async for item in merged(list(streams))]

    assert sorted(asyncio.run(collect(count("a", 2), count("b", 3)))) == [
        (0, ("a", 0)), (0, ("a", 1)), (1, ("b", 0)), (1, ("b", 1)), (1, ("b", 2))]
    closed.clear()
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(collect(count("a", 1, fail=True), count("b", 10**9)))
    assert sorted(closed) == ["a", "b"]


def test_memory_returns_to_its_level(server):
    def round_of_requests() -> int:
        bodies = [{"prompt": f"{i} " * 20, "max_tokens": 8, "n": 1 + i % 2} for i in range(60)]
        answers = asyncio.run(load(*place(server), bodies, clients=20))
        assert not any(a.error for a in answers)
        for body in ({}, {"temperature": 9}, {"response_format": {"type": "json_object"}}, {"guided_choice": ["a"]}):
            server.chat(**body)
        server.wait(lambda f: server.idle())
        gc.collect()
        return psutil.Process().memory_info().rss

    round_of_requests()
    before = round_of_requests()
    for _ in range(3):
        after = round_of_requests()
    assert after - before < 12e6, f"{(after - before) / 1e6:.1f} MB more after 190 requests"
    assert not server.models["mini"].service.engine.jobs


# ------------------------------------------------------------------------------------------------------------ the end

def test_a_server_that_is_told_to_stop_lets_answers_finish():
    """The program itself: what it prints, SIGTERM while an answer streams, and its exit code."""
    folder = random_folder()
    process = subprocess.Popen([sys.executable, "-m", "mindseed", "serve", str(folder), "--port", "0"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = first_words(process)
        url = re.search(r"http://127\.0\.0\.1:\d+", said)[0]
        assert "mini" in said and "1024" in said and "tokens" in said and f"{url}/v1/chat/completions" in said
        with httpx.Client(base_url=url, timeout=120) as http:
            assert http.get("/health").json() == {"status": "ok"}
            with http.stream("POST", "/v1/chat/completions", json=BODY | {"max_tokens": 250, "stream": True}) as answer:
                pieces = answer.iter_text()
                next(pieces)
                process.send_signal(signal.SIGTERM)
                end = time.monotonic() + 60
                with pytest.raises((httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError)):
                    while time.monotonic() < end:                          # a busy machine is slow to hear a signal
                        httpx.get(f"{url}/health", timeout=60)
                        time.sleep(0.05)
                text = "".join(pieces)
        assert text.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in text
        assert process.wait(60) == 0
        assert "stopped" in process.stdout.read() and "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()


def test_the_patience_of_a_server_that_is_told_to_stop_has_an_end():
    one, began = served(random_folder()), []
    sock = serving.bind("127.0.0.1", 0)
    thread = threading.Thread(target=serving.run, args=(create_app([one]), sock),
                              kwargs={"began": began.append, "drain_s": 1})
    thread.start()
    with httpx.Client(base_url=serving.address_of(sock), timeout=30) as http:
        while not (began and began[0].started):
            time.sleep(0.01)
        one.service.engine.runner.run = slowly(one.service.engine.runner.run)
        with http.stream("POST", "/v1/chat/completions", json=BODY | {"stream": True}) as answer:
            next(answer.iter_text())
            began[0].should_exit = True
            thread.join(15)
            assert not thread.is_alive()
    while one.service.engine.jobs:                # the answer was cancelled, not only its connection
        time.sleep(0.01)
    one.service.close()
    sock.close()


def slowly(step):
    def slower(*arguments):
        time.sleep(0.05)
        return step(*arguments)

    return slower


# ------------------------------------------------------------------------------------------------ requests at random

@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_nothing_that_the_page_allows_or_forbids_breaks_the_server(mode):
    """schemathesis makes requests of every kind from the server's own description of itself."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.generation.modes import GenerationMode

    with running(served(random_folder(seq_len=96))) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        statuses: set[int] = set()
        for operation in (result.ok() for result in schema.get_all_operations()):
            if operation.method == "get" and "{" not in operation.path:
                continue

            @settings(max_examples=10, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                      suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=GenerationMode(mode)))
            def check(case):
                response = case.call(base_url=server.url, timeout=60)
                assert response.status_code < 500, response.text
                if response.status_code >= 400:
                    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
                statuses.add(response.status_code)

            check()
        assert {200, 400} <= statuses
        server.wait(lambda f: server.idle())
