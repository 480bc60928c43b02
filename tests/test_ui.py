"""The studio with a real server behind it: every page by Streamlit's AppTest, and the whole in a real browser."""
from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

import mindseed.ui
from mindseed.tokenizers.chat import normalise
from mindseed.ui.store import Store
from mindseed.ui.studio import VARIABLE, Studio
from mindseed.ui.talk import Settings
from tests.studio import BECAUSE, GREETING, HELLO, SUM, THOUGHT, WHY, row, save_models, save_run

testing = pytest.importorskip("streamlit.testing.v1")
APP = Path(mindseed.ui.__file__).with_name("app.py")
PAGES = ("chat", "compare", "runs", "tokens", "inside")
ARGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage",
        "--no-first-run"]


def hears_ctrl_c() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Running:
    """`mindseed ui` as a user starts it: the address of its page and of its server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = save_models(folder)
        self.run = save_run(folder / "runs" / "live", 40, of=400)
        save_run(folder / "runs" / "older", 30)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mindseed", "ui", *map(str, self.models), "--port", "0", "--no-open", "--runs",
             str(folder / "runs"), "--data", str(folder / "data")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, preexec_fn=hears_ctrl_c)
        said = ""
        while "Ctrl-C" not in said:
            line = self.process.stdout.readline()
            assert line, f"it ended: {said}"
            said += line
        self.page = re.search(r"studio +(\S+)", said)[1]
        self.server = re.search(r"server +(\S+)", said)[1]
        self.wait_for_server()

    def wait_for_server(self, limit_s: float = 60) -> None:
        for _ in range(int(limit_s / 0.1)):
            try:
                if httpx.get(f"{self.server}/health", trust_env=False).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.1)
        raise AssertionError("the server did not come up")


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    studio = Running(tmp_path_factory.mktemp("studio"))
    yield studio
    studio.process.send_signal(signal.SIGINT)
    try:
        assert studio.process.wait(timeout=60) == 0
    finally:
        studio.process.terminate()
    assert studio.process.stdout.read().splitlines()[-1] == "stopped"
    with pytest.raises(httpx.HTTPError):                    # and its server is gone with it
        httpx.get(f"{studio.server}/health", trust_env=False)


@pytest.fixture
def app(running, monkeypatch, tmp_path):
    """Open a page of a studio with a fresh data folder; changes go over what the running studio was started with."""
    def open_page(page: str = "chat", **changes):
        told = {"models": tuple(map(str, running.models)), "server": running.server, "data": str(tmp_path / "data"),
                "runs": (str(running.folder / "runs"),)} | changes
        monkeypatch.setenv(VARIABLE, Studio(**told).spell())
        at = testing.AppTest.from_file(str(APP), default_timeout=60).run()
        if page != "chat":
            at.switch_page(f"views/{page}.py").run()
        assert not at.exception
        return at

    return open_page


def words(at) -> str:
    """Everything that is written on the page."""
    blocks = [*at.markdown, *at.text, *at.caption, *at.error, *at.info, *at.code, *at.get("html")]
    texts = [getattr(e, "value", None) or getattr(e.proto, "body", "") for e in blocks]
    return "\n".join(map(str, [*texts, *(e.label for e in at.expander), *(m.label + m.value for m in at.metric)]))


def ask(at, text: str):
    at.chat_input[0].set_value(text).run()
    assert not at.exception
    return at


# ---------------------------------------------------------------------------------------------------------------- chat

def test_a_conversation(app, tmp_path):
    at = ask(app(), HELLO)
    assert [m.value for m in at.markdown if m.value] == [GREETING] and at.text[0].value == HELLO
    assert "taught · " in words(at)
    ask(at, WHY)
    assert BECAUSE in words(at) and THOUGHT in words(at) and "Thoughts" in [e.label for e in at.expander]
    again = next(b for b in at.button if b.key.startswith("again_"))              # the first answer, once more
    again.click().run()
    assert [m.value for m in at.markdown if m.value] == [GREETING] and "2/2" in words(at)
    next(b for b in at.button if b.key.startswith("version_") and b.key.endswith("-1")).click().run()
    assert "1/2" in words(at) and BECAUSE in words(at)                            # and back, with all that followed
    next(b for b in at.button if b.key.startswith("edit_")).click().run()
    at.text_area(next(t.key for t in at.text_area if t.key.startswith("text_"))).set_value(WHY).run()
    next(b for b in at.button if b.key == "edit_done").click().run()
    assert [t.value for t in at.text] == [WHY] and BECAUSE in words(at)

    at = app()                                                                    # as after a restart
    store = Store(tmp_path / "data")
    [kept] = store.conversations()
    assert kept.title == HELLO and kept.settings["model"] == "taught"
    next(b for b in at.button if b.key == f"conversation_{kept.id}").click().run()
    assert [t.value for t in at.text] == [WHY]
    at.text_input(f"title_{kept.id}").set_value("Greetings").run()
    assert store.conversations()[0].title == "Greetings"
    at.checkbox(f"sure_{kept.id}").check().run()
    at.button("delete").click().run()
    assert store.conversations() == [] and not at.text


def test_a_tool_is_called_and_its_result_goes_back(app, tmp_path):
    at = app()
    at.checkbox("tool_calculate_new").check().run()
    at.number_input("temperature_new").set_value(0.0).run()
    ask(at, SUM)
    assert [e.label for e in at.expander] == ["**calculate** `12+30` → `42`"]
    assert [c.value for c in at.code] == ['{"name": "calculate", "arguments": {"sum": "12+30"}}', '{"value": "42"}']
    assert at.markdown[-1].value == "12+30=42"
    store = Store(tmp_path / "data")
    [kept] = store.conversations()
    assert [e.role for e in store.path(kept.id)] == ["user", "assistant", "tool", "assistant"]
    assert kept.settings["tools"] == ["calculate"] and kept.settings["temperature"] == 0.0
    from mindseed.ui.views.chat import all_rows, lines
    messages, tools = normalise(json.loads(lines(all_rows(store))))
    assert messages[1]["tool_calls"][0]["name"] == "calculate" and tools[0]["function"]["name"] == "calculate"


def test_a_forced_call_and_the_settings(app, tmp_path):
    at = app()
    at.checkbox("tool_roll_dice_new").check().run()
    at.toggle("must_new").set_value(True).run()
    at.number_input("temperature_new").set_value(0.0).run()
    at.number_input("max_tokens_new").set_value(60).run()
    ask(at, HELLO)
    assert at.expander[0].label.startswith("**roll\\_dice** `")
    given, result = (json.loads(c.value) for c in list(at.code)[:2])
    assert len(result["rolls"]) == given["arguments"]["count"]
    assert all(1 <= roll <= given["arguments"]["sides"] for roll in result["rolls"])
    assert Store(tmp_path / "data").get("chat")["must_call"] is True


def test_a_question_that_is_too_long_is_told_in_plain_words(app, tmp_path):
    at = ask(app(), "why? " * 3000)
    assert re.search(r"has 90\d\d tokens; the model's context is 1024", at.error[0].value)
    assert at.button("unanswered").label == "Answer"
    ask(at, HELLO)                                                                # the long one is left out
    assert at.markdown[-1].value == GREETING


def test_without_a_server_there_is_advice(app):
    at = app(server="http://127.0.0.1:9")
    assert "Nothing answers at" in words(at) and "mindseed serve DIR" in words(at)
    at = app("compare", server="")
    assert "No model is being served" in words(at) and "mindseed demo" in words(at)
    at = app(server="", models=())
    assert "--server http://127.0.0.1:8998" in words(at)


def test_the_language_is_remembered(app):
    at = app("tokens")
    assert "what a model reads" in words(at)
    at.segmented_control("language_switch").set_value("zh").run()
    assert "模型读到的不是字母" in words(at) and at.metric[0].label == "词元"
    for page in PAGES:
        at = app(page)
        assert at.session_state.language == "zh" and not at.exception


def test_a_data_folder_that_cannot_be_used(app, tmp_path):
    (tmp_path / "taken").write_text("a file")
    assert "choose another place" in app(data=str(tmp_path / "taken")).error[0].value


# ---------------------------------------------------------------------------------------------------- the other pages

def test_two_models_side_by_side(app):
    at = ask(app("compare"), HELLO)
    assert GREETING in words(at) and "mixture · " in words(at) and "first token after" in words(at)
    assert [t.value for t in at.text] == [HELLO, HELLO]
    at.segmented_control("compare_how").set_value("text").run()
    at.number_input("max_tokens_compare").set_value(5).run()
    ask(at, "Good morning")
    assert "mixture · 5 tokens" in words(at) and re.search(r"taught · [1-5] tokens", words(at))


def test_runs(app):
    at = app("runs")
    assert "live" in words(at) and "40 / 400" in words(at) and "30 / 30" in words(at) and "loss" in words(at)
    specs = [json.loads(chart.proto.spec) for chart in at.get("vega_lite_chart")]
    assert len(specs) >= 8 and "a time 40" in words(at) and "mindseed train --depth 2" in words(at)
    at.multiselect("runs").set_value([]).run()
    assert "No run is chosen" in words(at)
    at = app("runs")
    for key, value in (("log_y", True), ("log_x", True), ("live", False)):
        at.toggle(key).set_value(value).run()
    assert not at.exception
    assert "No runs yet" in words(app("runs", runs=("nowhere",), models=()))


def test_tokens(app, running):
    at = app("tokens")
    at.text_area("tokens_text").set_value("dear reader, 你 <|im_end|>\n").run()
    drawn = "".join(e.proto.body for e in at.get("html"))
    assert {m.label: m.value for m in at.metric}["bytes"] == "28" and "E4" in drawn and "<i>↵</i>" in drawn
    assert 'class="seed-token special' not in drawn
    at.toggle("tokens_special").set_value(True).run()
    drawn = "".join(e.proto.body for e in at.get("html"))
    assert "&lt;|im_end|&gt;</span>" in drawn and 'class="seed-token special' in drawn
    at.text_area("tokens_text").set_value("dear").run()
    assert "merge" in words(at)
    at.text_area("tokens_text").set_value("").run()
    assert "Type something" in words(at)
    assert "No tokenizer yet" in words(app("tokens", models=()))
    assert "has no tokenizer.json" in app("tokens", models=(str(running.folder),)).error[0].value


@pytest.mark.parametrize("which", [0, 1])
def test_inside(app, running, which):
    at = app("inside", models=(str(running.models[which]),))
    text = words(at)
    assert ("linear attention keeps a fading memory" in text) == (which == 1)
    assert ("No mixture of experts" in text) == (which == 0) and ("2 of 4 experts per token" in text) == (which == 1)
    assert [picture.caption for e in at.get("image") for picture in e.proto.imgs][:2] == ["head 0", "head 1"]
    at.text_input("inside_text").set_value("x " * 400).run()
    assert "the last 160 are looked at" in words(at) and not at.exception
    at.segmented_control("inside_how").set_value("text").run()
    at.text_input("inside_text").set_value("").run()
    assert "Type something" in words(at) and not at.exception


def test_a_directory_that_is_no_model(app, tmp_path):
    assert "is not a model directory" in app("inside", models=(str(tmp_path),)).error[0].value


# ------------------------------------------------------------------------------------------------------------- browser

@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no chromium was found; `make browser` installs Debian's")
    with playwright.sync_playwright() as p:
        opened = p.chromium.launch(executable_path=program, args=ARGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser, running):
    """The studio in a browser; requests to anywhere else would fail the test."""
    tab = browser.new_page(viewport={"width": 1280, "height": 800}, locale="en-US")
    tab.set_default_timeout(60_000)
    ours, strangers = (running.page, "data:", "blob:"), []
    tab.on("request", lambda request: request.url.startswith(ours) or strangers.append(request.url))
    tab.goto(running.page)
    yield tab
    assert not strangers, strangers
    tab.close()


def settle(page) -> None:
    """Wait until the script has run to its end."""
    page.wait_for_timeout(300)
    page.wait_for_selector('.stApp[data-test-script-state="notRunning"]')


def test_in_a_browser(page, running):
    # a chat: the answer streams in, growing before it is complete
    field = page.get_by_test_id("stChatInputTextArea")
    field.wait_for()
    settle(page)
    page.evaluate("""() => {
        window.seen = [];
        new MutationObserver(() => {
            for (const e of document.querySelectorAll('[aria-label="Chat message from assistant"] ' +
                                                      '.stMarkdown [data-testid="stMarkdownContainer"]'))
                if (window.seen.at(-1) !== e.innerText) window.seen.push(e.innerText);
        }).observe(document.body, {childList: true, subtree: true, characterData: true}); }""")
    field.fill(HELLO)
    field.press("Enter")
    page.get_by_text("taught ·").wait_for()                 # the line under a finished answer
    settle(page)
    seen = [text for text in page.evaluate("window.seen") if text]
    assert seen[-1] == GREETING and all(GREETING.startswith(text) for text in seen)
    assert page.get_by_role("button", name=HELLO).is_visible()          # listed at the side

    # a tool: chosen, called, executed, shown
    page.locator(".st-key-tools button").first.click()
    page.get_by_text("sums and formulas").click()
    settle(page)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Tools · 1").wait_for()
    page.get_by_role("button", name="New chat").click()
    settle(page)
    field.fill(SUM)
    field.press("Enter")
    page.get_by_text("12+30=42").wait_for()
    page.get_by_text("taught ·").wait_for()
    settle(page)                                            # drawn as it will stay
    call = page.get_by_text(re.compile("calculate.*12\\+30.*→.*42")).first
    call.click()
    page.get_by_text('{"value": "42"}').wait_for()

    # an answer without end, stopped; what was written of it stays
    store = Store(running.folder / "data")
    store.put("chat", Settings(model="mixture", max_tokens=8000).stored())
    page.get_by_role("button", name="New chat").click()
    page.get_by_text("What shall we talk about?").wait_for()
    page.wait_for_function("!document.querySelector('[aria-label=\"Chat message from assistant\"]')")
    settle(page)
    field.fill(WHY)
    field.press("Enter")
    page.wait_for_function("""() => document.querySelector('[aria-label="Chat message from assistant"] .stMarkdown')
                                    ?.innerText.length > 20""")
    page.locator(".st-key-stop button").click()
    page.get_by_text("mixture · stopped").wait_for()
    kept = store.path(store.conversations()[0].id)[-1]
    assert kept.about["finish"] == "stopped" and kept.message["content"]

    # tokens, coloured
    page.get_by_role("link", name="Tokens").click()
    page.locator("#tokens .seed-token").first.wait_for()
    settle(page)
    page.get_by_label("Text").fill(GREETING)
    page.get_by_label("Text").press("Control+Enter")
    page.wait_for_function("t => document.querySelector('#tokens')?.innerText.replaceAll('·', ' ') === t", arg=GREETING)
    token = page.locator("#tokens .seed-token").first
    assert "id " in token.get_attribute("title") and "rgba(0, 0, 0, 0)" != token.evaluate(
        "e => getComputedStyle(e).backgroundColor")
    assert page.locator("#merges .seed-step").count() > 1

    # a run's curve, which goes on by itself
    page.get_by_role("link", name="Runs").click()
    chart = page.locator(".stVegaLiteChart canvas, .stVegaLiteChart svg").first
    chart.wait_for()
    page.get_by_text("40 / 400").wait_for()
    assert chart.bounding_box()["width"] > 300
    with open(running.run / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row(41)) + "\n")
    page.get_by_text("41 / 400").wait_for()
    assert page.get_by_text("Traceback").count() == 0 and page.get_by_text("Deploy").count() == 0


# ------------------------------------------------------------------------------------------------- the server's end

@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_server_that_dies_is_told_of_and_started_again(app, running):
    pid = running.process.pid
    children = {Path(f"/proc/{child}/cmdline").read_text().split("\0")[3]: int(child)
                for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    told = dict(entry.split("=", 1) for entry in Path(
        f"/proc/{children['run']}/environ").read_text().split("\0") if "=" in entry)[VARIABLE]
    here = Studio(**json.loads(told))
    os.kill(children["serve"], signal.SIGKILL)
    while not here.ended():
        time.sleep(0.05)
    at = app(log=here.log)
    assert "The server has ended" in words(at) and "-9, SIGKILL" in words(at) and "ended:" in words(at)
    at.button("start_again").click().run()
    assert "The server is starting" in words(at) and here.ended() is None
    running.wait_for_server()
    assert GREETING in words(ask(app(log=here.log), HELLO))
