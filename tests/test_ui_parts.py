"""What the studio is made of, without a page: tools, conversations, runs, words, names."""
from __future__ import annotations

import ast
import contextlib
import json
import re
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from mindseed.base.config import parse
from mindseed.base.errors import UserError
from mindseed.base.log import JsonlSink
from mindseed.data import toy_chat, toy_words
from mindseed.recipes import ui
from mindseed.tokenizers.chat import encode_chat, normalise
from mindseed.tokenizers.byte import Byte
from mindseed.ui import talk
from mindseed.ui.look import shown
from mindseed.ui.runs import Log, differences, find_runs, smooth, thin
from mindseed.ui.store import Store, as_markdown, as_row
from mindseed.ui.studio import Ended, Studio, find_models, short_names
from mindseed.tasks.tools import TOOLS, calculate, execute
from mindseed.ui.words import ZH
from tests.studio import save_run

UI = Path(talk.__file__).parent


# --------------------------------------------------------------------------------------------------------------- tools

@pytest.mark.parametrize(("text", "value"), [
    ("7+8=", 15), ("2^10", 1024), ("（3＋4）×2", 14), ("1/4", 0.25), ("7//2", 3), ("-3**2", -9), ("sqrt(16)+pi*0", 4),
    ("max(1, 2, 3)", 3), ("942-925=?", 17)])
def test_sums(text, value):
    assert calculate(text) == value


@pytest.mark.parametrize("text", [
    "__import__('os')", "().__class__", "[1][0]", "'a'*9", "9**9**9", "2**99999", "10**400*10**400", "1/0", "x",
    "1 if 1", "lambda: 1",
    "sqrt(-1)", "(-8)**0.5", "1e308*10", "round(1.5, -10**9)", "sum([1])", "True+1", "1" * 400,
    "(" * 200,
    "max()", ""])
def test_what_is_no_sum_is_refused_and_never_run(text):
    assert set(json.loads(execute("calculate", {"sum": text}))) == {"error"}


def test_tools_are_those_that_the_toy_world_teaches():
    for words in toy_words.TOOLS:
        assert TOOLS[words.name].openai() == toy_chat.schema(words)
        result = json.loads(execute(words.name, {words.argument: "1+1" if words.name == "calculate" else "Riva"}))
        assert list(result) == [words.result] and isinstance(result[words.result], str)


def test_tools_answer_whatever_they_are_sent():
    assert json.loads(execute("convert_units", {"value": 100, "source": "C", "target": "F"})) == {
        "value": "212", "unit": "F"}
    assert json.loads(execute("convert_units", {"value": 1, "source": "mile", "target": "km"}))["value"] == "1.609344"
    rolled = json.loads(execute("roll_dice", {"count": 3, "sides": 6}))
    assert len(rolled["rolls"]) == 3 and sum(rolled["rolls"]) == rolled["sum"]
    assert json.loads(execute("get_weather", {"city": "里瓦"}))["weather"] in {zh for _, zh in toy_words.WEATHER}
    assert set(json.loads(execute("get_date", {}))) == {"date", "weekday", "time", "zone"}
    for name, arguments in [("nothing", {}), ("calculate", "1+1"), ("calculate", {}), ("calculate", {"sum": None}),
                            ("calculate", {"sum": "1", "x": 1}), ("get_time", {"city": "Atlantis"}),
                            ("convert_units", {"value": 1, "source": "kg", "target": "m"}),
                            ("roll_dice", {"count": 10**9, "sides": 6})]:
        assert set(json.loads(execute(name, arguments))) == {"error"}


# ------------------------------------------------------------------------------------------------------- conversations

def told(store: Store, conversation: int) -> list[str]:
    return [entry.message["content"] for entry in store.path(conversation)]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def test_conversations_outlive_the_studio_and_keep_every_version(tmp_path):
    store = Store(tmp_path)
    id = store.create("one", {"temperature": 0.5})
    a = store.add(id, user("a"), parent=None)
    b = store.add(id, assistant("b"), parent=a, about={"tokens": 3})
    store.add(id, user("c"), parent=b)
    again = store.add(id, assistant("B"), parent=a)                               # another answer to a
    assert told(store, id) == ["a", "B"]
    edited = store.add(id, user("A"), parent=None)                                # another first question
    assert told(store, id) == ["A"]
    store = Store(tmp_path)                                                       # as after a restart
    assert store.path(id)[0].versions == (a, edited)
    store.choose(id, a)
    assert told(store, id) == ["a", "B"] and store.path(id)[1].versions == (b, again)
    store.choose(id, b)
    assert told(store, id) == ["a", "b", "c"] and store.path(id)[1].about == {"tokens": 3}
    store.end_at(id, a)
    assert told(store, id) == ["a"] and store.count_after(a) == 2
    other = store.create("two", {})
    store.rename(id, "named")
    store.configure(other, {"model": "m"})
    assert [(c.title, c.settings) for c in store.conversations()] == [
        ("two", {"model": "m"}), ("named", {"temperature": 0.5})]
    store.delete(id)
    assert store.conversation(id) is None and store.path(id) == []
    assert sqlite3.connect(store.database).execute("select count(*) from message").fetchone() == (0,)
    store.put("language", "zh")
    assert Store(tmp_path).get("language") == "zh" and store.get("nothing", 7) == 7


def test_a_database_that_is_taken_away_or_broken(tmp_path):
    store = Store(tmp_path)
    store.create("one", {})
    store.database.unlink()
    assert store.conversations() == []                                            # a new one
    store.database.write_bytes(b"no database at all" * 100)
    with pytest.raises(UserError, match="studio.sqlite3 cannot be used .* --data"):
        store.conversations()
    store.database.unlink()
    with sqlite3.connect(store.database) as file:
        file.execute("pragma user_version = 99")
    with pytest.raises(UserError, match="newer mindseed"):
        Store(tmp_path)


def test_exports_are_what_training_reads(tmp_path):
    store = Store(tmp_path)
    id = store.create("sums", {})
    call = {"name": "calculate", "arguments": {"sum": "1+1"}}
    at = None
    for message in (user("1+1?"), assistant("", tool_calls=[call]), {"role": "tool", "content": '{"value": "2"}'},
                    assistant("It is 2.", reasoning_content="Add."), user("and now?")):
        at = store.add(id, message, parent=at)
    tools = [TOOLS["calculate"].openai()]
    row = json.loads(json.dumps(as_row(store.path(id), system="Be brief.", tools=tools)))
    messages, offered = normalise(row)
    assert offered == tools and [m["role"] for m in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2]["tool_calls"] == [call] and messages[4]["reasoning_content"] == "Add."
    ids, trainable = encode_chat(Byte(), messages, tools=offered, training=True)
    assert "It is 2." in Byte().decode([i for i, t in zip(ids, trainable) if t])
    assert as_row(store.path(id)[:1]) is None
    page = as_markdown("sums", store.path(id), system="Be brief.")
    assert page.startswith("# sums\n\n> Be brief.\n\n## User\n\n1+1?\n\n## Assistant\n\nCall: `calculate(")
    assert page.count("## Assistant") == 1 and "> Add.\n\nIt is 2." in page and 'Result: `{"value": "2"}`' in page


def test_half_answers_are_no_examples(tmp_path):
    store = Store(tmp_path)
    id, at = store.create("halves", {}), None
    call = {"name": "calculate", "arguments": {"sum": "1+1"}}
    for message, finish in ((user("a"), None), (assistant("A."), "stop"), (user("b"), None),
                            (assistant("B"), "stopped"), (user("c"), None),
                            (assistant("", tool_calls=[call]), "tool_calls"),
                            ({"role": "tool", "content": "2"}, None), (assistant("C"), "broken"), (user("d"), None),
                            (assistant("D."), "stop"), (user("e"), None), (assistant("E"), "length")):
        at = store.add(id, message, parent=at, about={"finish": finish} if finish else {})
    path = store.path(id)
    assert [m["content"] for m in as_row(path)["messages"]] == ["a", "A.", "d", "D."]
    assert as_row(path[2:4]) is None and as_row(path[4:8], system="s") is None
    assert "\n\nB\n" in as_markdown("halves", path)                              # for reading everything is there


def test_ids_are_never_given_twice(tmp_path):
    store = Store(tmp_path)
    ids = [store.create(str(i), {}) for i in range(3)]
    message = store.add(ids[2], user("x"), parent=None)
    store.delete(ids[2])
    again = store.create("again", {})
    assert again > ids[2] and store.add(again, user("y"), parent=None) > message


OLD = """
create table if not exists conversation (
    id integer primary key, title text not null, updated real not null, leaf integer, settings text not null);
create table if not exists message (
    id integer primary key, conversation integer not null references conversation on delete cascade,
    parent integer references message on delete cascade, message text not null, about text not null);
create index if not exists message_place on message (conversation, parent);
create table if not exists setting (name text primary key, value text not null);
insert into conversation values (4, 'one', 1.5, 9, '{"model": "m"}'), (7, 'two', 2.5, null, '{}');
insert into message values (8, 4, null, '{"role": "user", "content": "a"}', '{}');
insert into message values (9, 4, 8, '{"role": "assistant", "content": "b"}', '{"tokens": 3}');
insert into setting values ('language', '"zh"');
pragma user_version = 1;
"""


def test_a_database_of_the_first_version_is_taken_over(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "studio.sqlite3")) as file:
        file.executescript(OLD)
    store = Store(tmp_path)
    assert [(c.id, c.title, c.updated, c.settings) for c in store.conversations()] == [
        (7, "two", 2.5, {}), (4, "one", 1.5, {"model": "m"})]
    assert told(store, 4) == ["a", "b"] and store.path(4)[1].about == {"tokens": 3} and store.get("language") == "zh"
    store.delete(7)
    assert store.create("new", {}) == 8 and store.add(8, user("c"), parent=None) == 10
    store.delete(4)                                                               # takes its messages along, as ever
    with contextlib.closing(sqlite3.connect(store.database)) as file:
        assert file.execute("select id from message").fetchall() == [(10,)]
        assert file.execute("pragma foreign_key_check").fetchall() == []
        assert {name for name, in file.execute("select name from sqlite_master where name not like 'sqlite%'")} == {
            "conversation", "message", "message_place", "setting"}


# --------------------------------------------------------------------------------------------------- a model's words

PICTURE = "![x](http://evil/t.png)"


def drawn(text: str) -> str:
    return MarkdownIt("commonmark", {"html": False}).enable("table").render(shown(text))


@pytest.mark.parametrize("text", [
    *("\\" * n + PICTURE for n in range(5)), f"see{PICTURE}", f"!{PICTURE}", "![a [b] `c` ![d](e)](f)",
    "![x][ref]\n\n[ref]: http://evil/t.png", "![ref]\n\n[ref]: http://evil/t.png",
    "![ref][]\n\n[ref]: <http://evil>",
    f"- {PICTURE}\n  1. {PICTURE}", f"> {PICTURE}", f"# {PICTURE}", f"{PICTURE}\n===", f"|a|b|\n|-|-|\n|{PICTURE}|c|",
    f"[{PICTURE}](http://evil)", f"**{PICTURE}**", "<img src='http://evil/t.png'>", f"<b>{PICTURE}</b>",
    f"`a\n\nb` {PICTURE} `c`", f"\\`{PICTURE}\\`", f"``a` {PICTURE}", f"`![a](b)` {PICTURE}", f"    {PICTURE}",
    f"  \t{PICTURE}\n\t{PICTURE}", f"```\n![a](b)\n```\n{PICTURE}", "\ufdd0\ufdd1![x](y)", "!\ufdd0[x](y)"])
def test_a_model_can_show_no_picture(text):
    assert "<img" not in drawn(text) and "\ufdd0" not in shown(text)


@pytest.mark.parametrize("text", [
    f"$ ` $ {PICTURE} ` $",
    f'<a title="`"> {PICTURE} `', f"[^1]\n\n[^1]: a\n\n    {PICTURE}",
    f':a[b]{{c="`"}} {PICTURE} `', f"http://a.b/` {PICTURE} `", f"www.a.b/` {PICTURE} `",
    f"$$ a\nb $$\n```\n$$\n{PICTURE}\n```",
    f"`a\n$$\n$$\n{PICTURE}`",
    f"|a|b|\n|-|-|\n| ` | {PICTURE} ` |"])
def test_nor_where_the_browser_sees_no_code(text):
    """What it would take for formula, footnote, directive, bare address or table begins nowhere outside of code."""
    out = re.sub("```.*?```|(`+)[^`].*?\\1|(?m:^    .*$)", "", shown(text), flags=re.DOTALL)
    if "![" in shown(text):
        assert not re.search(r"[$<|\[]|:|www\.", out)


@pytest.mark.parametrize("code", ["$1", "![a](b)", "a $1 ![a](b) \\![c](d) $2 https://x.y/$z", r"\$1 \\![a](b)",
                                  "vec![1, 2]"])
@pytest.mark.parametrize("form", ["`{}`", "``{}``", "- `{}` and **b**", "```sh\n{}\n```",
                                  "~~~\n{}\n\n{}\n~~~",
                                  "1. a\n   ```\n   {}\n   ```\n2. b", "> ```\n> {}\n> ```", "a\n\n    {}\n\nb",
                                  "# `{}`"])
def test_code_is_left_as_it_is(code, form):
    assert shown(form.replace("{}", code)) == form.replace("{}", code)
    beside = f"Not {PICTURE} but\n\n{form.replace('{}', code)}\n\nfor $5"
    assert form.replace("{}", code) in shown(beside) and "<img" not in drawn(beside)


def test_dollars_and_formulas():
    for text in ("$x^2$", "$$\nx\n$$", "so $x$ and $y$, \\\\", "**a** [b](c)", "https://a.b/?$filter=1"):
        assert shown(text) == text or "$" in text and drawn(text) == MarkdownIt().render(text)
    assert shown("$x^2$ and $$y$$") == "$x^2$ and $$y$$"
    assert shown("from $5 to $10, \\$3 \\\\$4, in US$") == "from &#36;5 to &#36;10, &#36;3 \\\\&#36;4, in US&#36;"
    assert ">x</a>" in drawn(PICTURE) and drawn("costs $5") == "<p>costs $5</p>\n"


def test_what_is_sent_to_the_server():
    call = {"name": "f", "arguments": {"x": 1}}
    messages = [user("1"), assistant("", tool_calls=[call, call]), {"role": "tool", "content": "r"},
                {"role": "tool", "content": "s"}, assistant("2"), user("3")]
    spelt = talk.sent(messages)
    ids = [c["id"] for c in spelt[1]["tool_calls"]]
    assert len(set(ids)) == 2 and [m["tool_call_id"] for m in spelt[2:4]] == ids
    assert spelt[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"x": 1}'}
    assert messages[1] == assistant("", tool_calls=[call, call])                  # untouched
    assert talk.recent(messages, 1) == messages[-1:]
    assert talk.recent(messages, 0) == messages == talk.recent(messages, 5)
    plain = talk.asked(talk.Settings(model="m", thinking="on", top_k=5, temperature=0.0, max_tokens=9))
    assert plain == {"model": "m", "max_tokens": 9, "temperature": 0.0, "extra_body": {
        "top_k": 5, "chat_template_kwargs": {"enable_thinking": True}}}
    stored = talk.Settings(tools=("calculate",), seed=3).stored() | {"unknown": 1, "tools": ["calculate", "gone"]}
    assert talk.Settings.of(stored) == talk.Settings(tools=("calculate",), seed=3)
    assert talk.again(talk.Settings(seed=3), 2).seed == 5 and talk.again(talk.Settings(), 2).seed is None


# ---------------------------------------------------------------------------------------------------------------- runs

def test_a_log_is_followed_while_it_grows(tmp_path):
    sink = JsonlSink(tmp_path / "log.jsonl")
    sink.write(1, {"loss": 3.0, "elapsed_s": 60.0, "supervised": 10})
    log = Log(tmp_path).update()
    sink.write(2, {"loss": float("nan"), "elapsed_s": 120.0, "supervised": 10, "sample 1": "a >>> b"})
    sink.file.write(b'{"step": 3, "loss": 1.')
    sink.file.flush()
    assert [row["step"] for row in log.update().rows] == [1, 2]
    sink.file.write(b'5, "supervised": 10, "elapsed_s": 30}\nno json\n')         # taken up again: the clock began anew
    sink.file.flush()
    assert len(log.update().rows) == 3 and log.damaged == 1
    assert [xs.tolist() for xs in log.series("loss")] == [[1, 3], [3.0, 1.5]]
    assert log.series("loss", "minutes")[0].tolist() == [1, 2.5]
    assert log.series("loss", "tokens")[0].tolist() == [10, 30]
    assert log.samples() == [(2, ["a >>> b"])] and log.last("loss") == 1.5
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 9.0}\n')            # cut back to a checkpoint
    assert [xs.tolist() for xs in log.update().series("loss")] == [[1], [9.0]]
    (tmp_path / "log.jsonl").unlink()
    assert len(log.update().rows) == 1                                            # what was known stays


def test_runs_and_their_state(tmp_path):
    save_run(tmp_path / "a", 20)
    save_run(tmp_path / "deep" / "er" / "b", 5, lr=0.02, of=50)
    assert {p.name for p in find_runs([str(tmp_path), str(tmp_path / "a"), str(tmp_path / "none")])} == {"a", "b"}
    a, b = Log(tmp_path / "a").update(), Log(tmp_path / "deep" / "er" / "b").update()
    assert (a.status().word, a.status().step) == ("done", 20)
    now = (b.path).stat().st_mtime
    assert b.status(now).word == "running" and b.status(now).left_s == pytest.approx(90)
    assert b.status(now + 1000).word == "stopped"
    assert differences({"a": a.config(), "b": b.config()}) == [("loop.steps", [20, 50]), ("optim.lr", [0.01, 0.02])]
    steps, shares = a.loads()[0]
    assert shares.shape == (20, 4) and np.allclose(shares.sum(1), 1)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "log.jsonl").write_bytes(b"\xff\xfe garbage\nmore\n")
    bad = Log(tmp_path / "bad").update()
    assert bad.status().word == "damaged" and bad.damaged == 2                   # however lately it was written
    (tmp_path / "a" / "config.toml").write_text("broken = [")
    assert a.config() == {} and a.status(now + 1000).word == "stopped"


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(10, 50))
def test_thinning_keeps_the_extremes_and_smoothing_the_mean(values, limit):
    x, y = np.arange(len(values), dtype=float), np.array(values)
    kept_x, kept_y = thin(x, y, limit)
    assert len(kept_x) <= limit + 4 and kept_y.min() == y.min() and kept_y.max() == y.max()
    assert kept_x[0] == x[0] and kept_x[-1] == x[-1] and (np.diff(kept_x) > 0).all()
    assert np.allclose(smooth(y, 0.0), y) and np.allclose(smooth(np.full(9, 3.0), 0.9), 3.0)
    assert y.min() - 1e-6 <= smooth(y, 0.9).min() and smooth(y, 0.9).max() <= y.max() + 1e-6


# --------------------------------------------------------------------------------------------------- words and options

def sentences() -> set[str]:
    """Every text that the pages hand to gettext, and those that talk.py leaves to them."""
    found = {talk.FORGOTTEN, talk.STOPPED, talk.FORM, talk.NO_JSON, talk.NOTHING, talk.NO_END}
    for path in UI.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_":
                if isinstance(node.args[0], ast.Constant):
                    found.add(node.args[0].value)
                else:
                    assert ast.unparse(node.args[0]) in ("event.text", "error.what")
    return found


def test_every_sentence_is_there_in_chinese_and_no_other():
    assert sentences() == ZH.keys()
    for english, chinese in ZH.items():
        assert sorted(re.findall(r"\{\w+\}", english)) == sorted(re.findall(r"\{\w+\}", chinese)), english
        assert english.count("`") == chinese.count("`"), english
        assert re.search(r"[\u4e00-\u9fff]", chinese), english


def test_the_studio_reaches_its_pages_through_the_environment(monkeypatch, tmp_path):
    here = Studio(models=("a", "b"), server="http://x", data=str(tmp_path), runs=("r",))
    monkeypatch.setenv("MINDSEED_STUDIO", here.spell())
    assert Studio.here() == here
    monkeypatch.delenv("MINDSEED_STUDIO")
    assert Studio.here().data.endswith("mindseed")


def test_names_are_as_short_as_they_may_be(tmp_path):
    assert short_names(["runs/demo/fine-tune/model"]) == {"runs/demo/fine-tune/model": "fine-tune"}
    assert list(short_names(["runs/a/base/model", "runs/b/base/model", "x"]).values()) == ["a/base", "b/base", "x"]
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "one" / "model").mkdir(parents=True, exist_ok=True)
        (tmp_path / "one" / "model" / name).write_text("{}")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "config.json").write_text("{}")
    assert find_models(tmp_path) == [tmp_path / "one" / "model"]
    assert ui.found_below((str(tmp_path), str(tmp_path / "one"))) == [str(tmp_path / "one" / "model")]


def test_a_server_is_watched_and_started_again(tmp_path, monkeypatch, capsys):
    here = Studio(server="http://127.0.0.1:9", log=str(tmp_path / "server.log"))
    server = ui.Server(here, ["-c", "import sys; print('a table'); sys.exit('the last words')"])
    monkeypatch.setattr(ui, "answers", lambda address: True)
    server.start()
    server.look()                                 # it is up
    server.process and server.process.wait()
    server.look()
    assert here.ended() == Ended(code="1", words="the last words") and "the last words" in capsys.readouterr().err
    server.look()
    assert server.process is None                 # nobody has asked
    server.words = ["-c", "import time; time.sleep(60)"]
    here.start_again()
    assert here.ended() is None
    server.look()
    assert server.process.poll() is None and not (tmp_path / "again").exists()
    server.process.kill()
    server.process.wait()
    server.look()
    assert here.ended() == Ended(code="-9, SIGKILL", words="")
    server = ui.Server(here, ["-c", "import sys; sys.exit('error: no model')"])
    monkeypatch.setattr(ui, "answers", lambda address: False)
    server.start()
    server.process.wait()
    with pytest.raises(UserError, match="could not be started: no model"):
        server.look()


@pytest.mark.parametrize(("words", "message"), [
    (["nowhere"], "nowhere is not a model directory"), (["--server", "127.0.0.1:80"], "must be an address such as"),
    (["--port", "70000"], "between 0 and 65535"), (["--port", "1", "--host", "203.0.113.1"], "cannot listen on")])
def test_mistakes_are_named_before_anything_is_started(words, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        ui.main(parse(ui.Options, words))
