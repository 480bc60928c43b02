"""Answers of a teacher as lessons: what is asked, what is kept, how a killed run goes on, and what servers may do."""
from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mindseed import cli
from mindseed.agents.chat_client import ChatClient, Refused
from mindseed.base.errors import UserError
from mindseed.base.journal import beside
from mindseed.data.clean import fault
from mindseed.data.readers import kind_of, read_rows
from mindseed.infer.engine import Engine, EngineConfig
from mindseed.infer.generate import generate_uncached
from mindseed.infer.sample import Sampling
from mindseed.interop.directory import load_directory
from mindseed.rl.endpoint import ask_endpoint, turn_of, wire
from mindseed.rl.prompts import Prompt
from mindseed.rl.rejection import NEXT_TURN, SEEDS, seed_of, sample_answers, turns_of
from mindseed.serve.openai import ServeConfig
from mindseed.tokenizers.chat import encode_chat, parse_answer, render, to_json
from tests.serving import LESSONS, WEATHER, random_folder, running, served, taught_folder
from tests.spawn import start

USER = {"role": "user", "content": "2+2?"}
OLD = {"role": "assistant", "content": "an older answer"}
SEED = {"role": "assistant", "content": "Seed."}
GREETING = {"role": "assistant", "content": "你好！今天怎么样？"}
BRIEF = {"role": "system", "content": "Be brief."}
WHO = {"role": "user", "content": "Who are you?"}
FOUR = {"role": "assistant", "content": "4", "reasoning_content": "two and two"}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def synthesize(*words: object) -> int:
    return cli.main(["synthesize", *map(str, words), "--device", "cpu"])


def complaint(capsys, *words: object) -> str:
    capsys.readouterr()
    assert synthesize(*words) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and len(said.splitlines()) <= 3
    return said


def hidden_files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith(".") and not p.name.endswith(".lock"))


# ----------------------------------------------------------------------------------------------------- asked of a model

def test_prompts_of_all_kinds_are_answered_and_wrong_answers_dropped(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("2+2?\n\n  你好  \n", encoding="utf-8")
    write(tmp_path / "b.jsonl", [
        {"conversations": [BRIEF, WHO, OLD]}, {"prompt": "2+2?"}, {"nothing": 1},
        {"question": "2+2?", "messages": [BRIEF, USER], "answer": "5"},
        {"messages": [*LESSONS[0][0][:-1], OLD], "tools": LESSONS[0][1]}])
    out = tmp_path / "out.jsonl"
    words = [tmp_path / "a.txt", tmp_path / "b.jsonl", "--teacher", taught_folder(), "--out", out, "--temperature", 0,
             "--max_new", 40]
    assert synthesize(*words) == 0
    said, found = capsys.readouterr(), rows(out)
    by_source = {row["source"]: row for row in found}
    assert by_source["a.txt:1"]["conversations"] == [USER, FOUR]
    assert by_source["a.txt:3"]["conversations"] == [{"role": "user", "content": "你好"}, GREETING]
    assert by_source["b.jsonl:1"]["conversations"] == [BRIEF, WHO, SEED]
    last = by_source["b.jsonl:5"]                                          # tools have answered: the last turn is new
    assert last["conversations"] == [
        *LESSONS[0][0][:-1], {"role": "assistant", "content": "Sun in Rome, snow in Oslo."}]
    assert last["tools"] == LESSONS[0][1]
    assert "1 rows are no prompts and are left out, the first: " in said.err and "b.jsonl:3" in said.err
    summary = json.loads((tmp_path / "out.summary.json").read_text())
    assert summary["kept"] == len(found) and summary["prompts"] == 5 == len(found) + sum(summary["dropped"].values())
    assert summary["left_out"] == {"no prompt": 1, "repeated prompt": 1} and summary["tokens"] > 20
    assert {kind_of(row.row) for row in read_rows([out])} == {"chat"} and hidden_files(tmp_path) == []
    before = out.read_bytes()
    assert synthesize(*words) == 0 and "is finished: nothing is left to do" in capsys.readouterr().out
    assert "made otherwise (max_new was 40, is 41)" in complaint(capsys, *words[:-1], 41)
    assert out.read_bytes() == before
    assert synthesize(*words, "--graded", "--overwrite") == 0
    assert "4 of 5 prompts hold nothing to check answers against" in capsys.readouterr().err
    assert "b.jsonl:4" not in {row["source"] for row in rows(out)}
    assert json.loads((tmp_path / "out.summary.json").read_text())["dropped"]["wrong"] == 1


def test_turns():
    hello = {"role": "assistant", "content": "Hello!"}
    assert turns_of([BRIEF, WHO, OLD, USER], True) == [[BRIEF, WHO], [USER]]
    assert turns_of([BRIEF, WHO, OLD, USER, OLD], False) == [[BRIEF, WHO, OLD, USER]]
    assert turns_of([hello, WHO, OLD, OLD, USER], True) == [[hello, WHO], [USER]]
    tool = [USER, {"role": "assistant", "content": "", "tool_calls": []}, {"role": "tool", "content": "x"}]
    assert turns_of(tool, True) == [tool]


def test_answers_are_those_of_the_plain_loop_with_the_seeds_that_are_promised():
    """Whatever is asked beside them; the second turn of a conversation reads the first answer."""
    loaded = load_directory(taught_folder())
    prompts = [Prompt(messages=[{"role": "user", "content": text}], name=str(i))
               for i, text in enumerate(["2+2?", "Who are you?", "你好", "so?"])]
    prompts.append(Prompt(messages=[WHO, OLD, USER]))
    engine = Engine.of(loaded, EngineConfig(max_seqs=3))
    sampling = Sampling(temperature=1.2, seed=11)
    found = list(sample_answers(engine, prompts, n=3, sampling=sampling, max_new=24, every_turn=True, first=7))
    assert [one.prompt for one in found] == prompts and not engine.busy
    kept = 0
    for number, one in enumerate(found, start=7):
        answers, tokens = [], 0
        for i in range(3):
            said, seed, why = [], seed_of(sampling.seed, number, i), ""
            for piece in turns_of(one.prompt.messages, True):
                said += piece
                ids = encode_chat(loaded.tokenizer, said, generation_prompt=True)[0]
                done, = generate_uncached(loaded.model, loaded.tokenizer, [ids], sampling=sampling, max_new=24,
                                          seeds=[seed], stop_ids=loaded.stop_ids)
                turn, tokens = parse_answer(done.text), tokens + len(done.ids)
                seed = (seed + NEXT_TURN) % SEEDS
                said.append({"role": "assistant", "content": turn["content"]} | {
                    k: turn[k] for k in ("reasoning_content", "tool_calls") if turn[k]})
                if why := fault(said[-1], done.finish):
                    break
            if not why and said not in answers:
                answers.append(said)
        assert [a.messages for a in one.answers] == answers and one.tokens == tokens
        assert len(answers) + one.dropped.total() == 3
        kept += len(answers)
    assert kept > 3 and sum((one.dropped for one in found), start=found[0].dropped.__class__()).total() > 1


def test_keep_decides_and_graders_read_the_whole_turn():
    engine, heard = Engine.of(load_directory(taught_folder())), []
    found, = sample_answers(engine, [Prompt(messages=[USER], row={"a": 1})], sampling=Sampling(temperature=0),
                            keep=lambda prompt, answer: heard.append((prompt.row, answer.text)))
    assert found.answers == [] and found.dropped == {"refused": 1}
    assert heard == [({"a": 1}, "<think>\ntwo and two\n</think>\n\n4")]
    with pytest.raises(UserError, match="n=2000 answers"):
        next(sample_answers(engine, [], n=2000))


def test_a_prompt_that_fills_the_context_is_dropped_and_who_stops_listening_leaves_the_engine_free():
    engine = Engine.of(load_directory(random_folder(64)), EngineConfig(max_seqs=2))
    prompts = [Prompt(messages=[{"role": "user", "content": text}]) for text in ("x" * 99, "a", "b", "c")]
    results = sample_answers(engine, prompts, n=2, max_new=30)
    assert next(results).dropped == {"prompt too long": 2}
    assert next(results).prompt is prompts[1] and engine.busy
    results.close()
    assert not engine.busy and engine.stats().blocks == engine.stats().blocks_free


# ------------------------------------------------------------------------------------------------- killed, and going on

def test_a_killed_run_goes_on_and_writes_what_an_undisturbed_one_writes(tmp_path):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"{'Who are you' if i % 3 else '2+2'}? {'!' * i}"}
                                           for i in range(40)])
    words = ["--teacher", taught_folder(), "--n", 2, "--temperature", 0.7, "--max_new", 24, "--batch_size", 2]
    straight, killed = tmp_path / "straight.jsonl", tmp_path / "killed.jsonl"
    assert synthesize(prompts, *words, "--out", straight) == 0
    process = start("synthesize", prompts, *words, "--out", killed, "--device", "cpu")
    end = time.monotonic() + 120
    while not (beside(killed).exists() and beside(killed).read_bytes().count(b"\n") > 6):
        assert time.monotonic() < end and process.is_alive(), process.exitcode
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    done = beside(killed).read_bytes().count(b"\n") - 1
    assert 5 < done < 40
    with open(killed, "ab") as file:                                       # what a kill may leave: rows without a note,
        file.write(b'{"conversations": [{"role": "user", "con')
    with open(beside(killed), "ab") as file:                               # ... and half a note
        file.write(b'{"done": 99, "by')
    assert synthesize(prompts, *words, "--out", killed) == 0
    assert killed.read_bytes() == straight.read_bytes() and straight.stat().st_size > 0
    one, two = (json.loads(p.with_suffix(".summary.json").read_text()) for p in (straight, killed))
    assert one | {"answers": ""} == two | {"answers": ""} and hidden_files(tmp_path) == []


def test_files_of_others_are_left_alone(tmp_path, capsys):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "hi"}])
    out = write(tmp_path / "a.jsonl", [{"text": "mine"}])
    assert "exists; choose another --out" in complaint(capsys, prompts, "--teacher", random_folder(), "--out", out)
    assert rows(out) == [{"text": "mine"}]


@pytest.mark.parametrize("words, why", [
    ("--teacher x --out a.jsonl", "which prompts?"), ("P --out a.jsonl", "who answers?"),
    ("P --teacher x --endpoint http://h/v1 --out a.jsonl", "one of them"), ("P --teacher x", "--out must name the f"),
    ("P --teacher x --out a.txt", "a .jsonl, not a.txt"), ("P --teacher x --model y --out a.jsonl", "--endpoint"),
    ("P --teacher x --n 0 --out a.jsonl", "n=0 must be at least"), ("P --teacher x --out a.jsonl --near 2", "a share"),
    ("P --teacher x --n 4 --temperature 0 --out a.jsonl", "would all be the same"),
    ("P --teacher x --out a.jsonl --graded", "nothing to check answers against"), ("Q --teacher x --out a.jsonl", "Q"),
    ("E --teacher x --out a.jsonl", "no prompt was found; the first row that is none"),
    ("P --teacher x --out a.jsonl", "x is not a model directory"), ("P --endpoint nowhere --out a.jsonl", "no address"),
    ("P --endpoint http://me:pw@h/v1 --out a.jsonl", "must not hold a name, a password"),
    ("P --endpoint http://h/v1 --api_key s --out a.jsonl", "here it is --key_env environment variable")])
def test_what_cannot_be_meant_is_told(words, why, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "P.jsonl", [{"prompt": "hi"}])
    write(tmp_path / "E.jsonl", [{"promt": "hi"}])
    said = complaint(capsys, *(f"{word}.jsonl" if word in "PEQ" else word for word in words.split()))
    assert why in said and "pw" not in said
    assert not (tmp_path / "a.jsonl").exists() and not beside(tmp_path / "a.jsonl").exists()


# ---------------------------------------------------------------------------------------------------- asked of a server

def test_a_server_of_ours_answers_as_the_model_directory_does(tmp_path, capsys):
    prompts = write(tmp_path / "p.jsonl", [
        {"prompt": "2+2?"}, {"messages": [BRIEF, WHO, OLD, USER, OLD]}, {"prompt": "你好", "answer": "no"},
        {"messages": [*LESSONS[0][0][:-1], OLD], "tools": LESSONS[0][1]}, {"prompt": "x" * 600}])
    words = ["--n", 2, "--temperature", 0.7, "--top_k", 0, "--top_p", 1, "--max_new", 40, "--graded"]
    assert synthesize(prompts, "--teacher", taught_folder(), "--out", tmp_path / "here.jsonl", *words) == 0
    with running(served(taught_folder(), "mini")) as server:
        where = ["--endpoint", f"{server.url}/v1", "--concurrency", 3]
        assert synthesize(prompts, *where, "--out", tmp_path / "there.jsonl", *words) == 0
        assert "does not list a model other; it lists mini" in " ".join(complaint(
            capsys, prompts, *where, "--out", tmp_path / "c.jsonl", "--model", "other", *words).split())
    here, there = (json.loads((tmp_path / f"{name}.summary.json").read_text()) for name in ("here", "there"))
    assert (tmp_path / "there.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()
    assert here["kept"] == there["kept"] > 2 and here["tokens"] == there["tokens"]
    assert here["dropped"].pop("prompt too long") == there["dropped"].pop("refused by the server") == 2
    assert here["dropped"] == there["dropped"] and here["dropped"]["wrong"] >= 1


def test_a_key_comes_from_the_environment_and_goes_nowhere_else(tmp_path, monkeypatch, capsys):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "2+2?"}])
    with running(served(taught_folder(), "mini"), config=ServeConfig(keys=("sk-right-7",)), key="sk-right-7") as server:
        words = [prompts, "--endpoint", f"{server.url}/v1", "--out", tmp_path / "a.jsonl", "--key_env", "TEACHER_KEY"]
        monkeypatch.delenv("TEACHER_KEY", raising=False)
        assert "wants a key, in the environment variable TEACHER_KEY: 401" in complaint(capsys, *words)
        monkeypatch.setenv("TEACHER_KEY", "sk-wrong-3")
        said = complaint(capsys, *words)
        assert "wants another key than that in TEACHER_KEY: 401" in said and "sk-wrong-3" not in said
        monkeypatch.setenv("TEACHER_KEY", "sk-right-7\n")
        assert synthesize(*words, "--temperature", 0) == 0
    assert rows(tmp_path / "a.jsonl")[0]["conversations"] == [USER, FOUR]
    texts = "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file()) + "".join(capsys.readouterr())
    assert "sk-right-7" not in texts and "TEACHER_KEY" not in (tmp_path / "a.jsonl").read_text()
    monkeypatch.setenv("TEACHER_KEY", "schlüssel\n1")
    assert "holds characters that no key has" in complaint(capsys, *words, "--overwrite")


Reply = tuple[int, dict[str, str], bytes] | None                           # status, headers, body; None: hang up


@contextlib.contextmanager
def scripted(answer: Callable[[int, dict], Reply]) -> Iterator[str]:
    """A server whose k-th answer to a chat is told by a function; its models are one."""
    count, lock = [0], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send((200, {}, json.dumps({"data": [{"id": "only"}]}).encode()))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                count[0] += 1
                number = count[0]
            self.send(answer(number, body | {"authorization": self.headers.get("Authorization")}))

        def send(self, reply: Reply) -> None:
            if reply is None:
                self.close_connection = True
                return
            status, headers, body = reply
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.handle_error = True, lambda *_: None     # a client that has gone away
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def said(text: str, finish: str = "stop", **more: object) -> Reply:
    message = {"role": "assistant", "content": text, **more}
    return 200, {}, json.dumps({"choices": [{"message": message, "finish_reason": finish}],
                                "usage": {"completion_tokens": 3}}).encode()


def failed(status: int, text: str = "", **headers: str) -> Reply:
    return status, headers, json.dumps({"error": {"message": text}}).encode()


def test_a_server_that_is_busy_gone_or_slow_for_a_while_is_asked_again():
    """Each kind of failure once; as long as a busy one asks for is waited."""
    replies, times = [failed(429, "later", **{"Retry-After": "0.5"}), failed(503), None, said("at last")], []
    with scripted(lambda k, body: times.append(time.monotonic()) or replies[k - 1]) as url:
        client = ChatClient(endpoint=url, retries=3, wait_s=0.01)
        assert client.models() == ["only"]
        assert client.chat(model="only", messages=[])["message"]["content"] == "at last"
    assert len(times) == 4 and times[1] - times[0] >= 0.5
    slow = iter([time.sleep, lambda _: None])
    with scripted(lambda k, body: next(slow)(1.0) or said("late")) as url:
        quick = ChatClient(endpoint=url, retries=1, wait_s=0.01, timeout_s=0.3)
        assert quick.chat(model="only", messages=[])["message"]["content"] == "late"


@pytest.mark.parametrize("reply, why", [
    (failed(500, "broken  in\ntwo"), "answers 500, broken in two (2 attempts)"), (None, "cannot be reached"),
    (failed(404, "no model only"), "no such address, or no such model: 404, no model only"),
    ((200, {}, b"<html>welcome</html>"), "something else than JSON"), ((200, {}, b"[1]"), "something else than JSON"),
    ((200, {}, b'{"choices": []}'), "another form than OpenAI's API"),
    ((200, {}, b'{"choices": [{"text": "x"}]}'), "another form than OpenAI's API")])
def test_a_server_that_cannot_be_used_ends_the_work(reply, why, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ChatClient, "wait_s", 0.01)
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "a"}])
    with scripted(lambda k, body: reply) as url:
        assert why in complaint(capsys, prompts, "--endpoint", url, "--out", tmp_path / "a.jsonl", "--retries", 1)
    assert not (tmp_path / "a.jsonl").exists() and hidden_files(tmp_path) == []


def test_no_server_at_all_is_told_at_once(tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    prompts, began = write(tmp_path / "p.jsonl", [{"prompt": "a"}]), time.monotonic()
    told = complaint(capsys, prompts, "--endpoint", f"http://127.0.0.1:{port}/v1", "--model", "m", "--out",
                     tmp_path / "a.jsonl")
    assert f"127.0.0.1:{port}/v1 cannot be reached" in told and time.monotonic() - began < 25


def test_what_a_server_refuses_is_dropped_but_not_everything(tmp_path, monkeypatch, capsys):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"{i}?"} for i in range(12)])

    def reply(k: int, body: dict) -> Reply:
        odd = int(body["messages"][-1]["content"][:-1]) % 2
        return failed(400, "too long") if odd else said(f"no. {body['messages'][-1]['content']}")

    with scripted(reply) as url:
        assert synthesize(prompts, "--endpoint", url, "--out", tmp_path / "a.jsonl", "--concurrency", 4) == 0
    assert [row["source"] for row in rows(tmp_path / "a.jsonl")] == [f"p.jsonl:{i}" for i in range(1, 12, 2)]
    assert json.loads((tmp_path / "a.summary.json").read_text())["dropped"] == {"refused by the server": 6}
    with scripted(lambda k, body: failed(422, "unknown field seed")) as url:
        told = complaint(capsys, prompts, "--endpoint", url, "--out", tmp_path / "b.jsonl")
    assert re.search(r"422, unknown field seed; \d+ requests in a row were refused", told)


def test_a_server_that_dies_in_the_middle_costs_nothing_that_was_answered(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ChatClient, "wait_s", 0.01)
    prompts, asked = write(tmp_path / "p.jsonl", [{"prompt": f"{i}?"} for i in range(20)]), []

    def reply(k: int, body: dict) -> Reply:
        asked.append(body["messages"][-1]["content"])
        return failed(500) if k > 9 else said(f"Answer to {body['messages'][-1]['content']}")

    words = ["--out", tmp_path / "a.jsonl", "--retries", 0, "--concurrency", 1]
    with scripted(reply) as url:
        port = int(url.split(":")[2].split("/")[0])
        assert "answers 500" in complaint(capsys, prompts, "--endpoint", url, *words)
    assert len(rows(tmp_path / "a.jsonl")) == 9
    first, asked[:] = list(asked), []
    journal = beside(tmp_path / "a.jsonl")
    text = journal.read_text()
    k_th = lambda k, body: asked.append(body["messages"][-1]["content"]) or said(f"Answer to {asked[-1]}")
    with scripted(k_th) as url:
        journal.write_text(text.replace(f"127.0.0.1:{port}/", url.removeprefix("http://").removesuffix("v1")))
        assert synthesize(prompts, "--endpoint", url, *words) == 0
    assert [row["conversations"][1]["content"] for row in rows(tmp_path / "a.jsonl")] == [
        f"Answer to {i}?" for i in range(20)]
    assert first[:9] == [f"{i}?" for i in range(9)] and asked == [f"{i}?" for i in range(9, 20)]


def test_every_turn_of_a_conversation_is_said_anew_in_the_light_of_those_before(tmp_path):
    prompts = write(tmp_path / "p.jsonl", [{"messages": [BRIEF, WHO, OLD, USER, OLD]}])
    with scripted(lambda k, body: said(" | ".join(m["content"] for m in body["messages"]))) as url:
        for turns in ("every", "last"):
            assert synthesize(prompts, "--endpoint", url, "--out", tmp_path / f"{turns}.jsonl", "--turns", turns) == 0
    every, last = ([m["content"] for m in rows(tmp_path / f"{turns}.jsonl")[0]["conversations"]]
                   for turns in ("every", "last"))
    first = "Be brief. | Who are you?"
    assert every == ["Be brief.", "Who are you?", first, "2+2?", f"{first} | {first} | 2+2?"]
    assert last == ["Be brief.", "Who are you?", "an older answer", "2+2?", f"{first} | an older answer | 2+2?"]


def test_fields_that_are_sent_and_thoughts_that_come_back():
    bodies = []
    with scripted(lambda k, body: bodies.append(body) or said("4", reasoning="two and two")) as url:
        client = ChatClient(endpoint=url)
        found, = ask_endpoint(client, [Prompt(messages=[USER], tools=[WEATHER])], model="only", n=2, seed=5, first=3,
                              settings={"max_tokens": 9, "temperature": 0.5})
    assert found.answers[0].messages == [USER, FOUR] and found.dropped == {"repeated": 1} and found.tokens == 6
    assert {body["seed"] for body in bodies} == {seed_of(5, 3, 0), seed_of(5, 3, 1)}
    assert bodies[0]["tools"] == [WEATHER] and bodies[0]["max_tokens"] == 9 and bodies[0]["authorization"] is None
    assert bodies[0]["messages"] == [{"role": "user", "content": "2+2?"}]
    assert turn_of({"content": "<think>hm</think>yes"}) == {
        "content": "yes", "reasoning_content": "hm", "tool_calls": []}
    call = {"id": "x", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    assert turn_of({"content": None, "tool_calls": [call]})["tool_calls"] == [
        {"name": "weather", "arguments": {"city": "Rome"}}]
    call["function"]["arguments"] = '{"city": '
    assert fault(turn_of({"content": None, "tool_calls": [call]}), "stop", tools=True) == "stray tag"


def test_conversations_go_out_in_the_servers_form():
    """Calls get ids that their results name; what our own renderer makes of both is the same."""
    messages = LESSONS[0][0]
    sent = wire(messages)
    assert [m.get("tool_call_id") for m in sent if m["role"] == "tool"] == ["call_1", "call_2"]
    calls = next(m["tool_calls"] for m in sent if m.get("tool_calls"))
    assert [c["id"] for c in calls] == ["call_1", "call_2"] and json.loads(calls[0]["function"]["arguments"]) == {
        "city": "Rome"}
    assert render(sent, tools=LESSONS[0][1]) == render(messages, tools=LESSONS[0][1])
    assert to_json(messages) == to_json(LESSONS[0][0])


def test_a_request_that_is_refused_is_told_from_a_server_that_is_gone():
    with scripted(lambda k, body: failed(400, "key sk-123 is bad")) as url:
        os.environ["SYNTHESIZE_TEST_KEY"] = "sk-123"
        try:
            client = ChatClient(endpoint=url, key_env="SYNTHESIZE_TEST_KEY")
        finally:
            del os.environ["SYNTHESIZE_TEST_KEY"]
        with pytest.raises(Refused, match=r"400, key \*\*\* is bad"):
            client.chat(model="only", messages=[])
        assert "sk-123" not in repr(client)
