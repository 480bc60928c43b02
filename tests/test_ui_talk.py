"""The studio before servers that are none, that break off, and that have not answered yet."""
from __future__ import annotations

import json
import socketserver
import threading
import time
from pathlib import Path

import pytest

import mindseed.ui
from mindseed.ui import talk
from mindseed.ui.store import Store
from mindseed.ui.studio import VARIABLE, Studio

testing = pytest.importorskip("streamlit.testing.v1")
APP = Path(mindseed.ui.__file__).with_name("app.py")
NAMES = json.dumps({"object": "list", "data": [{"id": "m", "object": "model"}]})
QUESTION = [{"role": "user", "content": "?"}]
HTML = "<!doctype html><html><body>Welcome to nginx</body></html>"


def piece(text: str, finish: str | None = None) -> str:
    choices = [{"index": 0, "text": text, "delta": {"content": text}, "finish_reason": finish}]
    return "data: " + json.dumps({"id": "1", "object": "chat.completion.chunk", "choices": choices}) + "\n\n"


class Server(socketserver.ThreadingTCPServer):
    """Answers every path with a body of `pages` (None: not at all), and notices who hangs up."""

    daemon_threads = allow_reuse_address = True

    def __init__(self, pages: dict[str, str | None]) -> None:
        super().__init__(("127.0.0.1", 0), None)
        self.pages, self.asked, self.left = pages, threading.Event(), threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def finish_request(self, request, client_address) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            if not (more := request.recv(4096)):
                return
            head += more
        path = head.split()[1].decode()
        body = next(page for end, page in self.pages.items() if path.endswith(end))
        if path.endswith("completions"):
            self.asked.set()
        if body is not None:
            kind = {"d": "text/event-stream", "<": "text/html"}.get(body[:1], "application/json")
            request.sendall(f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n{body}".encode())
            if not body.endswith("…"):
                return
        while request.recv(4096):
            pass
        self.left.set()


@pytest.fixture
def serve():
    servers = []

    def start(answer: str | None, names: str = NAMES) -> Server:
        servers.append(Server({"/models": names, "completions": answer}))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def written(server: Server, write=talk.reply, asked=QUESTION) -> tuple[str, talk.Writing]:
    writing, text = talk.Writing(talk.connect(server.address), write, talk.Settings(model="m"), asked), ""
    while not writing.over:
        event = writing.take(5)
        text += event.text if event else ""
    return text, writing


@pytest.mark.parametrize("names", [HTML, "[]", "{}", "[1, 2]", '{"data": 3}', '{"data": [{}]}', '"a"', "{broken"])
def test_a_server_that_is_none(serve, names):
    server = serve("", names)
    with pytest.raises(talk.Garbled, match=f"what came from {server.address} is not the answer of a model server"):
        talk.models(talk.connect(server.address))
    assert talk.models(talk.connect(serve("").address)) == ["m"]


@pytest.mark.parametrize(("write", "asked"), [(talk.reply, QUESTION), (talk.continue_text, "?")])
@pytest.mark.parametrize(("answer", "text", "what"), [
    (HTML, "", talk.NOTHING), (NAMES, "", talk.NOTHING),
    (piece("half") + "data: {broken\n\n", "half", talk.NO_JSON),
    (piece("half"), "half", talk.NO_END), (piece("half") + 'data: {"choices": [{"index": 0}]}\n\n', "half", talk.FORM),
    (piece("half") + 'data: {"choices": 3}\n\n', "half", talk.FORM),
    (piece("half") + "data: 3\n\n", "half", talk.FORM)])
def test_an_answer_that_is_none_or_breaks_off(serve, write, asked, answer, text, what):
    got, writing = written(serve(answer), write, asked)
    assert got == text and isinstance(writing.failed, talk.Garbled) and writing.failed.what == what
    got, writing = written(serve(piece("all", "stop") + "data: [DONE]\n\n"), write, asked)
    assert got == "all" and writing.failed is None


@pytest.mark.parametrize("answer", [None, piece("half") + "data: …"])
def test_stop_ends_a_request_at_whatever_point_it_is(serve, answer):
    server = serve(answer)
    writing = talk.Writing(talk.connect(server.address), talk.reply, talk.Settings(model="m"), QUESTION)
    assert server.asked.wait(5)
    if answer:
        assert writing.take(5).text == "half"
    began = time.monotonic()
    writing.stop()
    assert server.left.wait(5)
    assert writing.take(5) is None and writing.over and writing.failed is None and time.monotonic() - began < 2


def test_a_fault_of_ours_is_not_taken_for_an_end():
    def write(client, settings, asked):
        yield talk.Event(kind="content", text="a")
        raise ZeroDivisionError

    writing = talk.Writing(talk.connect("http://127.0.0.1:9"), write, talk.Settings(), QUESTION)
    assert writing.take(5).text == "a" and writing.take(5) is None and isinstance(writing.failed, ZeroDivisionError)


# -------------------------------------------------------------------------------------------------------- on the page

@pytest.fixture
def app(monkeypatch, tmp_path):
    def open_page(server: Server, language: str = "en"):
        monkeypatch.setenv(VARIABLE, Studio(models=(), server=server.address, data=str(tmp_path), runs=()).spell())
        Store(tmp_path).put("language", language)
        at = testing.AppTest.from_file(str(APP), default_timeout=60).run()
        assert not at.exception
        return at

    return open_page


def test_the_page_says_what_is_wrong(app, serve):
    server = serve("", HTML)
    assert "is not the answer of a model server (its form is not that of the API)" in app(server).error[0].value
    assert "返回的内容不是模型服务器的回答（格式不符合 API）" in app(server, "zh").error[0].value


def test_half_an_answer_is_kept_and_marked(app, serve, tmp_path):
    at = app(serve(piece("half an answer") + "data: {broken\n\n"))
    at.chat_input[0].set_value("hello").run()
    assert not at.exception and "it is no JSON\\: '{broken'" in at.error[0].value
    assert at.markdown[-1].value == "half an answer" and any("broken off" in c.value for c in at.caption)
    [kept] = Store(tmp_path).conversations()
    assert Store(tmp_path).path(kept.id)[-1].about["finish"] == "broken"


def test_a_connection_that_fails_says_so_and_keeps_the_question(app, serve, tmp_path):
    server = serve(piece("x", "stop") + "data: [DONE]\n\n")
    at = app(server)
    server.shutdown()
    server.server_close()
    at.chat_input[0].set_value("hello").run()
    assert not at.exception and "Nothing answers at" in "\n".join(e.proto.body for e in at.get("html"))
    [kept] = Store(tmp_path).conversations()
    assert [e.role for e in Store(tmp_path).path(kept.id)] == ["user"]


def test_a_title_changes_only_where_it_is_typed(app, serve, tmp_path):
    store = Store(tmp_path)
    id = store.create("first", {})
    store.add(id, {"role": "user", "content": "a"}, parent=None)
    at, other = app(server := serve("")), app(server)
    for tab in (at, other):
        tab.button(f"conversation_{id}").click().run()
    at.text_input(f"title_{id}").set_value("second").run()
    assert store.conversation(id).title == "second"
    other.run()                                             # the other tab had "first" in its field
    assert store.conversation(id).title == "second" and other.text_input(f"title_{id}").value == "second"
    other.text_input(f"title_{id}").set_value("  ").run()
    assert store.conversation(id).title == "second" and other.text_input(f"title_{id}").value == "second"
