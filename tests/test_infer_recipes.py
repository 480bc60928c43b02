"""The commands that use a model: chat, generate and convert, as a user meets them."""
from __future__ import annotations

import io
import json
import shutil

import pytest
import torch

from mindseed.base.errors import UserError
from mindseed.cli import main
from mindseed.infer.engine import Engine
from mindseed.infer.generate import generate
from mindseed.infer.sample import Sampling
from mindseed.interop import convert as conversion
from mindseed.interop.directory import load_directory, save_directory
from mindseed.models.lm import build
from mindseed.models.presets import Shape
from mindseed.recipes import chat
from mindseed.recipes import convert as conversion_recipe
from mindseed.tokenizers.bpe_train import train as train_bpe
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.chat import encode_chat, template_hash
from tests.test_house import examples
from tests.tiny import randomise


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    shape = Shape(layers=2, dim=32, heads=4, kv_heads=2, head_dim=8, ffn_dim=48)
    model = build(shape.lm_config(vocab_size=Byte().vocab_size, seq_len=160))
    randomise(model)
    return str(save_directory(model, Byte(), tmp_path_factory.mktemp("chat") / "model", info={"seed": 1}))


def run(capsys, monkeypatch, *argv, stdin=""):
    """(exit code, stdout, stderr) of a command whose stdin is a pipe."""
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    code = main([*map(str, argv)])
    out = capsys.readouterr()
    return code, out.out, out.err


def answer_to(folder, question, **options):
    loaded = load_directory(folder)
    ids, _ = encode_chat(loaded.tokenizer, [{"role": "user", "content": question}], generation_prompt=True)
    [done] = generate(loaded.model, loaded.tokenizer, [ids], **options)
    return done


def test_chat_answers_lines_from_a_pipe(folder, capsys, monkeypatch):
    greedy = ["chat", folder, "--temperature", "0", "--max-new", "9"]
    code, out, _ = run(capsys, monkeypatch, *greedy, stdin="hi\n\n2+2?\n")
    done = [answer_to(folder, q, sampling=Sampling(temperature=0), max_new=9) for q in ("hi", "2+2?")]
    want = [chat.printable(c.text) + "\n" for c in done]
    assert code == 0 and out == "".join(want)
    assert run(capsys, monkeypatch, *greedy, "--prompt", "hi")[1] == want[0]
    apart, whole = (run(capsys, monkeypatch, "chat", folder, "--temperature", "1", "--max-new", "9", *more,
                        stdin="hi\n2+2?")[1] for more in ([], ["--history"]))
    first = chat.printable(answer_to(folder, "hi", sampling=Sampling(top_p=0.9, top_k=50), max_new=9).text)
    assert apart.startswith(first) and whole.startswith(first) and apart != whole    # here the second saw the first


def conversation(folder, **options):
    return chat.Conversation(load_directory(folder), Sampling(seed=3), **{"max_new": 12} | options)


def test_conversation_commands(folder, tmp_path, capsys):
    talk = conversation(folder, system="Be kind.")
    first = "".join(t.text for t in talk.ask("hi"))
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant"]
    file = tmp_path / "talk.jsonl"
    for _ in range(2):
        chat.command(talk, f"/save {file}")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [{"messages": talk.messages}] * 2
    assert chat.command(talk, "/retry") == "hi" and len(talk.messages) == 1
    assert "".join(t.text for t in talk.ask("hi")) != first            # another seed
    chat.command(talk, "/reset")
    assert talk.messages == [{"role": "system", "content": "Be kind."}]
    chat.command(talk, "/system")
    assert talk.messages == []
    chat.command(talk, "/set top_p 0.5")
    assert talk.sampling.top_p == 0.5
    chat.command(talk, "/think off")
    list(talk.ask("hi"))
    assert talk.messages[-1]["reasoning_content"] == ""                # the empty think block of the prompt
    chat.command(talk, "/help")
    said = capsys.readouterr().out
    assert all(name in said for name in chat.COMMANDS)
    assert chat.command(talk, "/exit") is chat.Leave


@pytest.mark.parametrize("line, words", [("/sett x 1", "/sett is not a command"), ("/think maybe", "on, off or auto"),
                                         ("/set top_p 0", "top_p=0.0"), ("/set top_p much", "must be a number"),
                                         ("/set speed 3", "takes one of"), ("/save", "jsonl"),
                                         ("/retry", "no question")])
def test_wrong_commands(folder, line, words):
    with pytest.raises(UserError, match=words):
        chat.command(conversation(folder), line)


def test_an_answer_cannot_steer_the_terminal():
    assert chat.printable("a\x1b[2J\r\x07\tb\n🙂\x9b1m") == "a\ufffd[2J\ufffd\ufffd\tb\n🙂\ufffd1m"


def test_a_full_context_forgets_the_oldest_and_says_so(folder, capsys):
    talk = conversation(folder, system="S", max_new=20)
    for i in range(4):
        talk.messages += [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "x" * 20}]
    list(talk.ask("now"))
    contents = [m["content"] for m in talk.messages]
    assert contents[0] == "S" and "now" in contents and "question 0" not in contents
    assert "forgotten" in capsys.readouterr().err
    before = list(talk.messages)
    with pytest.raises(UserError, match="context is 160"):
        list(talk.ask("y" * 300))
    assert talk.messages[0] == before[0] and "y" * 300 not in [m["content"] for m in talk.messages]


def test_an_interrupted_answer_belongs_to_the_conversation(folder):
    talk = conversation(folder)
    tokens = talk.ask("hi")
    text = next(tokens).text + next(tokens).text
    tokens.close()
    assert talk.messages[-1]["role"] == "assistant" and talk.messages[-1]["content"] == text.lstrip()


def test_generate_lines_do_not_depend_on_the_batch(folder, capsys, monkeypatch):
    lines = "".join(f"question {'very ' * i}long\n" for i in range(7))
    common = ["generate", folder, "--temperature", "0.9", "--max-new", "8", "--seed", "5", "--samples", "2", "--logps"]
    outs = [run(capsys, monkeypatch, *common, "--batch-size", n, stdin=lines)[1] for n in (1, 3, 99)]
    rows = [[json.loads(line) for line in out.splitlines()] for out in outs]
    assert [r["index"] for r in rows[0]] == [i for i in range(7) for _ in range(2)]
    for other in rows[1:]:
        assert [r["ids"] for r in other] == [r["ids"] for r in rows[0]]
        assert [r["text"] for r in other] == [r["text"] for r in rows[0]]
    assert rows[0][0]["ids"] != rows[0][1]["ids"] and len(rows[0][0]["logps"]) == rows[0][0]["tokens"]


def test_generate_reads_jsonl_and_writes_a_file(folder, capsys, monkeypatch, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"prompt": "hi", "id": 7}) + "\n"
                      + json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    code, out, _ = run(capsys, monkeypatch, "generate", folder, "--file", source, "--input", "jsonl", "--out", target,
                       "--temperature", "0", "--max-new", "6")
    a, b = map(json.loads, target.read_text().splitlines())
    assert code == 0 and out == "" and a["id"] == 7 and a["text"] == b["text"]
    assert a["text"] == answer_to(folder, "hi", sampling=Sampling(temperature=0), max_new=6).text


def test_generate_continues_text(folder, capsys, monkeypatch):
    out = run(capsys, monkeypatch, "generate", folder, "--prompt", "one", "two", "--mode", "text", "--temperature", "0",
              "--max-new", "5")[1]
    loaded = load_directory(folder)
    want = generate(loaded.model, loaded.tokenizer, [[1, *loaded.tokenizer.encode(t)] for t in ("one", "two")],
                    sampling=Sampling(temperature=0), max_new=5)
    assert [json.loads(line)["text"] for line in out.splitlines()] == [c.text for c in want]


@pytest.mark.parametrize("recipe", ["chat", "generate"])
@pytest.mark.parametrize("options, words", [
    ([], ["which model?"]), (["{folder}x"], ["no such folder", "model"]), (["{folder}", "--temperature", "-1"],
                                                                           ["temperature=-1.0"]),
    (["{folder}", "--top-p", "0"], ["top_p=0.0"]), (["{folder}", "--dtype", "int3"], ["dtype='int3'", "bf16"]),
    (["{folder}", "--max-new", "0"], ["max_new=0"]), (["{folder}", "--top-q", "1"], ["did you mean --top"])])
def test_mistakes_are_one_line_and_exit_code_2(folder, capsys, monkeypatch, recipe, options, words):
    code, out, err = run(capsys, monkeypatch, recipe, *[o.format(folder=folder) for o in options], stdin="hi\n")
    assert code == 2 and out == "" and err.startswith("error: ") and len(err.splitlines()) <= 2
    assert all(word in err for word in words)


@pytest.mark.parametrize("stdin, words", [
    ("x" * 400, ["stdin:1", "context is 160"]), ('{"a": 1}', ["stdin:1", '"prompt" or "messages"']),
    ('{"prompt": "a"}\n{"prompt": ', ["stdin:2", "not valid JSON"]), ('{"prompt": 3}', ["stdin:1", "must be text"])])
def test_generate_names_the_line(folder, capsys, monkeypatch, stdin, words):
    mode = ["--input", "jsonl"] if "{" in stdin else []
    code, _, err = run(capsys, monkeypatch, "generate", folder, *mode, stdin=stdin)
    assert code == 2 and all(word in err for word in words)


def test_one_bad_line_does_not_cost_the_others_their_answers(folder, capsys, monkeypatch):
    stdin = "hi\n" + "x" * 400 + "\nyou\n"
    code, out, err = run(capsys, monkeypatch, "generate", folder, "--max-new", "3", stdin=stdin)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 2 and "1 of 3 prompts" in err and [row["index"] for row in rows] == [0, 1, 2]
    assert "text" in rows[0] and "text" in rows[2] and "context is 160" in rows[1]["error"]


def test_a_model_is_asked_in_its_own_chat_template(folder, capsys, monkeypatch, tmp_path):
    loaded, place = load_directory(folder), tmp_path / "m"
    other = "{{ messages[-1].content }}<|im_end|>{% if enable_thinking %}<think>{% endif %}"
    save_directory(loaded.model, loaded.tokenizer, place, chat_template=other)
    assert load_directory(place).chat_template == other
    asked, real = [], Engine.stream
    monkeypatch.setattr(Engine, "stream", lambda self, requests: asked.append(
        self.tokenizer.decode(requests[0].prompt)) or real(self, requests))
    code, _, err = run(capsys, monkeypatch, "chat", place, "--prompt", "hi", "--max-new", "3", "--think", "on")
    assert (code, err, asked) == (0, "", ["hi<|im_end|><think>"])
    code, out, err = run(capsys, monkeypatch, "generate", place, "--prompt", "hi", "--max-new", "3", "--mode", "chat")
    assert (code, err) == (0, "") and json.loads(out)["tokens"] > 0
    file = place / "tokenizer_config.json"
    file.write_text(file.read_text().replace("messages[-1]", "messages[0]"))
    code, _, err = run(capsys, monkeypatch, "chat", place, "--prompt", "hi", "--max-new", "3")
    assert code == 0 and "not trained with the chat template that it has now" in err
    file.write_text("{}")
    code, _, err = run(capsys, monkeypatch, "chat", place, "--prompt", "hi", "--max-new", "3")
    assert code == 0 and "has no chat template" in err
    file.write_text(json.dumps({"chat_template": "{{ raise_exception('only poems here') }}"}))
    code, _, err = run(capsys, monkeypatch, "chat", place, "--prompt", "hi", "--max-new", "3")
    assert code == 2 and "chat template cannot tell this conversation: only poems here" in err


# ------------------------------------------------------------------------------------------------------------ convert

@pytest.mark.parametrize("dtype", ["bf16", "fp16", None])
def test_convert(folder, capsys, monkeypatch, tmp_path, dtype):
    target = tmp_path / "copy"
    code, out, _ = run(capsys, monkeypatch, "convert", folder, target, *(["--dtype", dtype] if dtype else []))
    assert code == 0 and "equal" in out and "k_norm" in out and ("rounding" in out) == (dtype is not None)
    copy = load_directory(target)
    assert copy.dtype == (conversion.DTYPES[dtype] if dtype else torch.float32)
    assert copy.info == {"parent": folder, "seed": 1} and copy.template_hash == template_hash()
    code, _, err = run(capsys, monkeypatch, "convert", folder, target)
    assert code == 2 and "exists already" in err
    assert run(capsys, monkeypatch, "convert", folder, folder, "--overwrite")[0] == 2


def test_the_examples_of_help_work_on_a_model_of_the_demo(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tokenizer = train_bpe(["种子 seed"] * 9, vocab_size=300)
    shape = Shape(layers=1, dim=32, heads=4, kv_heads=2, head_dim=8, ffn_dim=32)
    save_directory(build(shape.lm_config(vocab_size=300, seq_len=32)), tokenizer, "runs/demo/fine-tune/model")
    lines = [line for line in examples(conversion_recipe.__doc__) if "runs/demo/" in line]
    assert len(lines) >= 2
    for line in lines:
        code, out, err = run(capsys, monkeypatch, *line.split()[1:])
        assert code == 0 and ": equal" in out, err


def test_a_copy_that_differs_is_the_exit_code(folder, capsys, monkeypatch, tmp_path):
    def spoil(model, tokenizer, target, **options):
        with torch.no_grad():
            model.blocks[1].mixer.k_norm.weight[0] += 0.01
        save_directory(model, tokenizer, target, **options)
        with torch.no_grad():
            model.blocks[1].mixer.k_norm.weight[0] -= 0.01

    monkeypatch.setattr(conversion, "save_directory", spoil)
    code, out, _ = run(capsys, monkeypatch, "convert", folder, tmp_path / "copy")
    assert code == 1 and "DIFFERENT" in out


def test_convert_overwrites_nothing_but_a_model(folder, capsys, monkeypatch, tmp_path):
    shutil.copytree(folder, tmp_path / "models" / "src")
    for source, target, words in [("models/src", "models", "no model directory"),
                                  ("models/src", "models/src/copy", "lies in the other")]:
        (tmp_path / target).mkdir(exist_ok=True)
        if target.endswith("copy"):
            (tmp_path / target / "config.json").write_text("{}")
        code, _, err = run(capsys, monkeypatch, "convert", tmp_path / source, tmp_path / target, "--overwrite")
        assert code == 2 and words in err
    assert (tmp_path / "models" / "src" / "model.safetensors").exists()
