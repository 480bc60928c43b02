"""docs/FROM_MINIMIND.md is tried: every command runs, in order, on tiny files laid out as in MiniMind's repository, and
every flag of its right columns is an option."""
from __future__ import annotations

import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from mindseed import cli
from mindseed.base.config import leaves, parse
from mindseed.base.errors import UserError
from mindseed.data.shards import Prepared
from mindseed.models.presets import PRESETS
from mindseed.recipes import chat, train
from mindseed.tokenizers.base import SPECIALS
from mindseed.tokenizers.bpe_train import train as train_bpe
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.hf_json import save_tokenizer
from mindseed.tokenizers.template import read_template
from tests.test_house import code_lines
from tests.test_minimind import SHAPES, original

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "FROM_MINIMIND.md"
SMALL = "--model.layers 1 --model.dim 16 --model.heads 2 --model.kv_heads 1 --model.head_dim 8".split()
DENSE = ["--model.ffn_dim", "16"]
SHORT = "--loop.batch 8 --loop.micro_batch 2 --loop.sample_every 0 --data.heldout 0 --data.workers 1".split()
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"name": "add", "arguments": {"a": 1}}
CHATS = [[{"role": "user", "content": "你好"}, {"role": "assistant", "content": "hi", "reasoning_content": "a greeting"}],
         [{"role": "system", "content": "", "tools": json.dumps([TOOL])}, {"role": "user", "content": "1+2?"},
          {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
          {"role": "tool", "content": "3"}, {"role": "assistant", "content": "3"}]]


def lines() -> list[str]:
    """All commands but those that stay until they are stopped, which tests of their own start."""
    return [line.strip() for line in code_lines(PAGE)
            if re.match(r"(torchrun .*-m )?mindseed (?!serve|ui)\S+ ", line)]


def rows_of(title: str) -> list[list[str]]:
    """The cells of a section's table."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S)[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()
            if line.startswith("|")][2:]


THEIRS = """\
{%- if tools %}{{- '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{%- endif %}
    {{- m.content }}
    {%- for call in m.tool_calls or [] %}
        {{- '<tool_call>' + call.function.name + call.function.arguments | tojson + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}{%- if not open_thinking %}{{- '\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""


@pytest.fixture(scope="module")
def minimind(tmp_path_factory) -> Path:
    """A folder as MiniMind's, with a toy's data and weights."""
    folder = tmp_path_factory.mktemp("minimind")
    for name in ("dataset", "model", "out", "minimind-3"):
        (folder / name).mkdir()
    write = lambda name, rows: (folder / "dataset" / name).write_text(            # noqa: E731
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    write("pretrain_t2t_mini.jsonl", [{"text": f"秦始皇是 number {i}, 第{i}个"} for i in range(24)])
    write("sft_t2t_mini.jsonl", [{"conversations": CHATS[i % 2]} for i in range(16)])
    write("dpo.jsonl", [{"chosen": CHATS[0], "rejected": [CHATS[0][0], {"role": "assistant", "content": f"no {i}"}]}
                        for i in range(8)])
    save_tokenizer(Byte(), folder / "model", chat_template=THEIRS)
    model, state = original(SHAPES["dense"])
    half = {name: x.half() for name, x in state.items()}
    torch.save(half, folder / "out" / "full_sft_768.pth")
    torch.save({name: x.half() for name, x in original(SHAPES["mixture"])[1].items()},
               folder / "out" / "full_sft_768_moe.pth")
    torch.save(half, folder / "minimind-3" / "pytorch_model.bin")
    save_tokenizer(Byte(), folder / "minimind-3", chat_template=THEIRS)
    (folder / "minimind-3" / "config.json").write_text(json.dumps({
        "model_type": "minimind", "hidden_size": 32, "num_hidden_layers": 3, "vocab_size": model.config.vocab_size,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 40, "rope_theta": 1e6,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}))
    shutil.copytree(ROOT / "configs", folder / "configs")
    return folder


def toy(words: list[str]) -> list[str]:
    """The command at the size of a toy: what is given twice counts as given last."""
    if words[0] == "tokenizer":
        return [*words, "--vocab_size", "310", "--workers", "1"]
    if words[0] == "chat":
        return [*words, "--max_new", "3"]
    if words[0] != "train":
        return words
    shape = [] if "--model.start" in words else [*SMALL, *(
        ["--model.moe.expert_dim", "8"] if "minimind-moe" in words else DENSE)]
    if "configs/mini.toml" in words:                                  # has its own length of a run
        shape += ["--loop.steps", "2", "--data.vocab_size", "310"]
    precision = ["--loop.precision", "fp32"] if "bf16" in words else []
    return [*words, *shape, *SHORT, *precision]


def test_every_command_runs(minimind, monkeypatch, capsys):
    monkeypatch.chdir(minimind)
    todo = lines()
    assert len(todo) >= 14 and {line.split("mindseed ")[1].split()[0] for line in todo} >= {
        "tokenizer", "train", "chat", "generate", "convert", "prepare", "show-batch", "plan"}
    for line in todo:
        words = shlex.split(line.split("mindseed ", 1)[1])
        if words[0] == "chat" and words[1] == "runs/sft/model" and (minimind / "chatted").exists():
            continue                                                  # named a second time
        monkeypatch.setattr("sys.stdin", io.StringIO("你好\n"))
        code = cli.main(toy(words))
        said = capsys.readouterr()
        assert code == 0, f"{line}\n{said.err[-2000:]}"
        if words[0] == "chat":
            (minimind / "chatted").touch()
    for name in ("pretrain", "sft", "sft-more", "moe", "two", "as-there"):
        assert (minimind / "runs" / name / "model" / "config.json").exists(), name
        if name != "two":                                             # whose preset trains a tokenizer of its own
            assert read_template(minimind / "runs" / name / "model")[0] == THEIRS, name
    assert json.loads((minimind / "runs" / "minimind" / "config.json").read_text())["model_type"] == "qwen3"
    assert "<think>\n\n</think>\n\n" in Byte().decode(Prepared("runs/data").split("train").get(1)[0].tolist())


def test_what_the_page_says_of_files(minimind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(minimind)
    prepare = ["prepare", "--tokenizer", "model", "--heldout", "0", "--out"]
    assert cli.main([prepare[0], "dataset/dpo.jsonl", *prepare[1:], str(tmp_path / "dpo")]) == 0
    assert Prepared(tmp_path / "dpo").kind == "preference"
    assert cli.main(["train", "--data.train", str(tmp_path / "dpo"), "--out", str(tmp_path / "run")]) == 2
    assert "preference pairs" in capsys.readouterr().err
    older = [CHATS[1][0] | {"functions": CHATS[1][0]["tools"]}, *CHATS[1][1:]]
    older[0] = {key: value for key, value in older[0].items() if key != "tools"}      # as the key was once called
    for name, messages in {"new": CHATS[1], "old": older}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"conversations": messages}) + "\n")
        assert cli.main([prepare[0], str(tmp_path / f"{name}.jsonl"), *prepare[1:], str(tmp_path / name)]) == 0
    new, old = (Prepared(tmp_path / name).split("train").get(0)[0].tolist() for name in ("new", "old"))
    assert new == old and '"name": "add"' in Byte().decode(new) and "<tool_call>" in Byte().decode(new)
    capsys.readouterr()
    assert cli.main(["convert", "out/full_sft_768_moe.pth", str(tmp_path / "moe")]) == 0
    assert cli.main(["train", "--data.train", "dataset/sft_t2t_mini.jsonl", "--model.start", str(tmp_path / "moe"),
                     "--out", str(tmp_path / "moe-run"), "--loop.steps", "1", *SHORT]) == 2
    assert "no gradient reaches the router" in capsys.readouterr().err
    torch.save({"model": {}, "optimizer": {}, "epoch": 0}, tmp_path / "pretrain_768_resume.pth")
    assert cli.main(["convert", str(tmp_path / "pretrain_768_resume.pth"), str(tmp_path / "x")]) == 2


@pytest.mark.parametrize("title, options", [("Flags of training", train.Options),
                                            ("Flags of talking to a model", chat.Options)])
def test_every_flag_is_an_option(title, options):
    tried = 0
    for there, here, remark in rows_of(title):
        assert there.startswith("`--") and (here or remark)
        for span in re.findall(r"`(--[^`]+)`", here + remark):
            parse(options, shlex.split(span))
            tried += 1
    assert tried >= 5


@pytest.mark.parametrize("title, options", [("Flags of training", train.Options),
                                            ("Flags of talking to a model", chat.Options)])
def test_a_flag_of_there_is_translated(title, options):
    """Typed here, a flag of the left column leads to that of the right column; one without counterpart to no other."""
    ours, tried = {leaf.name for leaf in leaves(options)}, 0
    for there, here, _ in rows_of(title):
        for flag in set(re.findall(r"--(\w+)", there)) - ours:
            with pytest.raises(UserError, match=f"^--{flag} is not an option") as caught:
                parse(options, [f"--{flag}", "1"])
            words = here.strip("`").split()
            assert not words and "did you mean" not in str(caught.value) or re.search(
                rf"; here it is (called )?{words[0]}\b", str(caught.value)), caught.value
            tried += bool(words)
    assert tried >= {"Flags of training": 19, "Flags of talking to a model": 3}[title]


@pytest.mark.parametrize("options, line, message", [
    (train.Options, "--use_moe 1", "here it is --model.preset minimind-moe"),
    (train.Options, "--from-resume 1", "here it is --resume auto"),
    (train.Options, "--data_path x --batch_size=32",
     "--data_path is not an option; here it is called --data.train\n"
     "--batch_size is not an option; here it is called --loop.micro_batch"),
    (chat.Options, "--open_thinking 1", "here it is --think on"),
    (chat.Options, "--load_from ./minimind-3", "here it is called --model"),
    (chat.Options, "--hidden_size 768", "here it is --model DIRECTORY, which says its shape")])
def test_translations(options, line, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse(options, line.split())


@pytest.mark.parametrize("name", cli.RECIPES)
def test_a_foreign_name_means_one_option_and_is_none_of_ours(name):
    known = list(leaves(cli.load(name).Options))
    foreign = [other.split()[0] for leaf in known for other in leaf.field.metadata.get("elsewhere", ())]
    assert len(set(foreign)) == len(foreign) and not {leaf.name for leaf in known} & set(foreign)


def test_a_recipe_of_there_is_translated(capsys):
    for there, here in {"sft": "train", "pretrain": "train", "train_full_sft": "train", "eval_llm": "chat"}.items():
        assert cli.main([there]) == 2
        assert f"{there!r} is not a recipe; here it is called {here}\n" in capsys.readouterr().err
    for there in ("dpo", "lora", "eval"):
        assert cli.main([there, "--x"]) == 2
        said = capsys.readouterr().err
        assert "did you mean" not in said and all(name in said for name in cli.RECIPES)
    assert set(cli.ELSEWHERE.values()) <= set(cli.RECIPES) and not set(cli.ELSEWHERE) & set(cli.RECIPES)


def test_the_preset_small_is_its_shape():
    """hidden_size 768, 8 layers, 8 heads of which 4 hold keys, feed-forward ceil(768 pi / 64) * 64, theta 1e6."""
    small = PRESETS["small"]
    assert (small.dim, small.layers, small.heads, small.kv_heads, small.head_dim) == (768, 8, 8, 4, 96)
    assert (small.ffn_dim, small.theta, small.norm_eps, small.tied, small.qk_norm) == (2432, 1e6, 1e-6, True, True)
    moe = PRESETS["minimind-moe"].moe
    assert (moe.experts, moe.top_k, moe.expert_dim, moe.balance_weight) == (4, 1, 2432, 5e-4)


def test_its_special_tokens_are_ours():
    """A tokenizer of ours has its three at the same ids, so that files and weights can meet."""
    assert SPECIALS[:3] == ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert [train_bpe(["种子 seed"] * 9, vocab_size=300).specials[name] for name in SPECIALS[:3]] == [0, 1, 2]


def test_the_chinese_page_says_the_same():
    """Its commands, flags and files are those of the English one, in the same order."""
    def code(page: Path) -> list[str]:
        return re.findall(r"(?s)```.*?```|`[^`]+`", page.read_text(encoding="utf-8"))

    assert code(PAGE.with_suffix(".zh.md")) == code(PAGE)


def test_what_is_missing_is_not_here():
    """When one of these comes, the page must say so."""
    assert all("not yet" in here for _, here in rows_of("Not yet"))
    assert not {"evaluate", "quantize"} & set(cli.RECIPES)
