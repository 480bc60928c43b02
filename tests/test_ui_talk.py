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
from mindseed.ui.studio import AGAIN, ENDED, VARIABLE, Studio, converses

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
        self.paths: list[str] = []
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
        self.paths.append(path)
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
        event = writing.take(60)
        text += event.text if event else ""
    return text, writing


@pytest.mark.parametrize("names", [HTML, "[]", "{}", "[1, 2]", '{"data": 3}', '{"data": [{}]}', '"a"', "{broken"])
def test_a_server_that_is_none(serve, names):
    server = serve("", names)
    with pytest.raises(talk.Garbled, match=f"what came from {server.address} is not the answer of a model server"):
        talk.models(talk.connect(server.address))
    assert talk.models(talk.connect(serve("").address)) == {"m": None}


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
    assert server.asked.wait(60)
    if answer:
        assert writing.take(60).text == "half"
    began = time.monotonic()
    writing.stop()
    assert server.left.wait(60)
    assert writing.take(60) is None and writing.over and writing.failed is None and time.monotonic() - began < 50


def test_a_fault_of_ours_is_not_taken_for_an_end():
    def write(client, settings, asked):
        yield talk.Event(kind="content", text="a")
        raise ZeroDivisionError

    writing = talk.Writing(talk.connect("http://127.0.0.1:9"), write, talk.Settings(), QUESTION)
    assert writing.take(60).text == "a" and writing.take(60) is None and isinstance(writing.failed, ZeroDivisionError)


# -------------------------------------------------------------------------------------------------------- on the page

@pytest.fixture
def app(monkeypatch, tmp_path):
    def open_page(server: Server, language: str = "en", **more):
        told = {"models": (), "server": server.address, "data": str(tmp_path), "runs": ()} | more
        monkeypatch.setenv(VARIABLE, Studio(**told).spell())
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


def model_folder(folder: Path, kind: str, **info) -> Path:
    """What of a model directory tells whether the model has learnt to converse; its data lies beside it."""
    folder.mkdir(parents=True)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    (folder / "mindseed.json").write_text(json.dumps({"info": {"data": ["gone/data/0-x"]} | info}))
    data = folder.parent / "data" / "0-x"
    data.mkdir(parents=True)
    (data / "manifest.json").write_text(json.dumps({"kind": kind}))
    return folder


ANSWER = piece("so it is", "stop") + "data: [DONE]\n\n"


def page_words(at) -> str:
    return "\n".join([*(e.proto.body for e in at.get("html")), *(c.value for c in at.caption), *(
        b.label for b in at.button), *(i.value for i in at.info), *(c.value for c in at.code)])


def test_a_message_of_spaces_is_none(app, serve, tmp_path):
    at = app(serve(ANSWER))
    at.chat_input[0].set_value("  \n ").run()
    assert Store(tmp_path).conversations() == [] and not at.exception


def test_a_conversation_that_was_deleted_elsewhere(app, serve, tmp_path):
    store = Store(tmp_path)
    at = app(serve(ANSWER))
    at.chat_input[0].set_value("hello").run()
    [old] = store.conversations()
    store.delete(old.id)
    at.button(next(b.key for b in at.button if b.key.startswith("again_"))).click().run()
    assert not at.exception and "has been deleted elsewhere" in page_words(at) and store.conversations() == []
    at.chat_input[0].set_value("and now?").run()
    [new] = store.conversations()
    assert new.title == "and now?" and [e.role for e in store.path(new.id)] == ["user", "assistant"]
    assert "has been deleted elsewhere" in page_words(at)
    at.button("new_chat").click().run()
    assert "deleted elsewhere" not in page_words(at)


def test_a_conversation_that_is_deleted_while_it_is_answered(app, serve, tmp_path, monkeypatch):
    def write(client, settings, asked):
        [store.delete(c.id) for c in store.conversations()]
        yield talk.Event(kind="content", text="a")
        yield talk.Event(kind="message", message={"role": "assistant", "content": "a"})

    store = Store(tmp_path)
    monkeypatch.setattr(talk, "reply", write)
    at = app(serve(ANSWER))
    at.chat_input[0].set_value("hello").run()
    assert not at.exception and not at.error and "deleted elsewhere" in page_words(at)


def test_a_model_that_has_read_texts_only(app, serve, tmp_path):
    places = [model_folder(tmp_path / "a" / "model", "text"), model_folder(tmp_path / "b" / "model", "chat")]
    names = json.dumps({"object": "list", "data": [{"id": id, "object": "model", "max_model_len": 384} for id in "ab"]})
    server = serve(ANSWER, names)
    at = app(server, models=tuple(map(str, places)), log=str(tmp_path / "server.log"))
    assert at.selectbox("model_new").value == "b" and "texts only" not in page_words(at)
    assert at.number_input("max_tokens_new").value == 384 and at.number_input("max_tokens_new").max == 384
    at.number_input("temperature_new").set_value(1.0).run()
    assert Store(tmp_path).get("chat")["model"] == "" and Store(tmp_path).get("chat")["max_tokens"] == 512
    at.selectbox("model_new").set_value("a").run()
    assert "This model has read texts only" in page_words(at) and "Once upon a time" in page_words(at)
    assert Store(tmp_path).get("chat")["model"] == "a"                           # the user's own choice is remembered
    at.button("suggest_0").click().run()
    assert not at.exception and at.markdown[-1].value == "so it is"
    assert server.paths[-1] == "/v1/completions"


def test_which_models_have_learnt_to_converse(tmp_path):
    text, chat = model_folder(tmp_path / "a" / "model", "text"), model_folder(tmp_path / "b" / "model", "chat")
    assert not converses(text) and converses(chat) and converses(model_folder(tmp_path / "c" / "model", "preference"))
    assert converses(model_folder(tmp_path / "d" / "model", "text", parent=str(chat)))
    assert not converses(model_folder(tmp_path / "e" / "model", "text", parent=str(text)))
    (text / "mindseed.json").write_text("broken")                               # nobody says
    assert converses(text)
    (chat / "tokenizer_config.json").write_text("{}")
    assert not converses(chat)


def test_a_server_that_has_ended(app, serve, tmp_path):
    server, log = serve(ANSWER), tmp_path / "server.log"
    server.shutdown()
    server.server_close()
    at = app(server, log=str(log))
    assert "The server is starting" in page_words(at)
    (tmp_path / ENDED).write_text(json.dumps({"code": "1", "words": "no space left"}))
    at.run()
    assert "Its exit code is 1." in page_words(at) and "no space left" in page_words(at) and "ended:" in page_words(at)
    at.button("start_again").click().run()
    assert (tmp_path / AGAIN).exists() and "The server is starting" in page_words(at)
