"""A longer context: positions are stretched from where they began, and how far a model sees is measured by hand."""
from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mindseed import cli
from mindseed.base.errors import UserError
from mindseed.data.toy import World
from mindseed.interop.directory import load_directory, save_directory
from mindseed.models.extend import extended
from mindseed.models.lm import build
from mindseed.models.presets import PRESETS, Shape
from mindseed.nn.rope import LinearScaling, RopeConfig, YarnScaling
from mindseed.tasks.context import NEEDLES, WEIGHT, hide, loss_by_position, quiz, recall, streams
from mindseed.tokenizers.byte import Byte
from mindseed.train.loop import Interrupted

SHAPE = Shape(layers=2, dim=32, heads=2, kv_heads=1, head_dim=16, ffn_dim=48)


def config(shape: Shape = SHAPE, seq_len: int = 32):
    return shape.lm_config(vocab_size=Byte().vocab_size, seq_len=seq_len)


@pytest.mark.parametrize("preset", ["qwen3-toy", "deepseek-v3-toy", "hybrid-linear-toy"])
def test_phases_count_from_the_first_length(preset):
    once = extended(config(PRESETS[preset]), 256)
    twice = extended(extended(config(PRESETS[preset]), 128), 256)
    assert once == twice and once.seq_len == 256
    ropes = [layer.mixer.rope for layer in (*once.layers, *once.mtp) if hasattr(layer.mixer, "rope")]
    assert ropes and {(r.scaling.factor, r.scaling.original) for r in ropes} == {(8.0, 32)}
    build(once).load_state_dict(build(config(PRESETS[preset])).state_dict())          # the weights are the same


def test_what_cannot_be_stretched_is_refused():
    with pytest.raises(UserError, match="reads 32 tokens already"):
        extended(config(), 32)
    with pytest.raises(UserError, match="learned vector"):
        extended(config(replace(SHAPE, positions="learned")), 64)
    alibi = config(replace(SHAPE, positions="alibi"))
    assert extended(alibi, 64) == replace(alibi, seq_len=64)
    linear = replace(config().layers[0].mixer, positions=RopeConfig(scaling=LinearScaling(factor=2.0)))
    some = replace(config(), layers=(replace(config().layers[0], mixer=linear),))
    with pytest.raises(UserError, match="scaled by LinearScaling already"):
        extended(some, 64)


def test_loss_by_position_is_the_mean_of_what_each_token_cost():
    model = build(config(), seed=3).eval()
    texts = [torch.randint(0, 256, (41,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(3)]
    with torch.no_grad():
        costs = [F.cross_entropy(logits(model, t), torch.tensor(t[1:]), reduction="none") for t in texts]
    want = torch.stack(costs).mean(0) / math.log(2)
    got = loss_by_position(model, texts, [0, 8, 30, 40])
    assert got == pytest.approx([want[:8].mean().item(), want[8:30].mean().item(), want[30:].mean().item()], rel=1e-5)


def logits(model, text):
    output = model(torch.tensor([text[:-1]]), torch.arange(len(text) - 1)[None])
    return (output.hidden[0] @ output.head.T).float()


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_a_needle_stands_where_it_should_and_is_asked_for_at_the_end(depth, seed):
    tokenizer = Byte()
    hay = tokenizer.encode("草" * 200)
    needle = hide(tokenizer, hay, length=300, depth=depth, seed=seed)
    assert len(needle.ids) == 300
    text = tokenizer.decode(needle.ids)
    question = text.rsplit("\n", 1)[1]
    assert text.count(question) == 2 and any(question.startswith(a.split("{}")[0]) for a, _ in NEEDLES)
    assert text.split(question)[1][0] == str(needle.answer) == tokenizer.decode([needle.digits[needle.answer]])
    before = len(text.split(question)[0].encode()) - 1
    assert abs(before - depth * (300 - 2 * len(question.encode()) - 6)) < 6


@pytest.mark.parametrize("length", [96, 128, 300, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_a_quiz_weighs_the_digits_that_can_be_known_and_no_other_token(length, seed):
    tokenizer = Byte()
    ids, weights = quiz(tokenizer, tokenizer.encode("hay with 7 in it " * 99), length=length, seed=seed)
    assert len(ids) == len(weights) == length and weights[-1] == WEIGHT and set(weights) == {0, WEIGHT}
    text = tokenizer.decode(ids)
    said = re.findall(r"digit of (\w{4}) is (\d)|(\w{4})的密码是(\d)", text, re.ASCII)
    names = [(a or c, b or d) for a, b, c, d in said]
    assert len(dict(names)) == len(set(names)) <= 4                        # a name has one digit
    assert sum(w > 0 for w in weights) == len(names) - len(set(names)) >= 1   # all but the first time
    for at in (i for i, w in enumerate(weights) if w):
        before = tokenizer.decode(ids[:at])
        question = before.rsplit("\n", 1)[1]
        assert before.count(question + tokenizer.decode([ids[at]])) == before.count(question) - 1 > 0
    assert quiz(tokenizer, tokenizer.encode("hay with 7 in it " * 99), length=length, seed=seed) == (ids, weights)


def test_a_quiz_without_room_is_refused():
    with pytest.raises(UserError, match="a quiz of 20 tokens"):
        quiz(Byte(), [1] * 99, length=20, seed=0)


def test_recall_counts_the_likeliest_digit():
    model, tokenizer = build(config(seq_len=400), seed=1).eval(), Byte()
    needles = [hide(tokenizer, tokenizer.encode("hay " * 99), length=200, depth=0.5, seed=i) for i in range(12)]
    right = sum(int(logits(model, [*n.ids, 0])[-1, n.digits].argmax()) == n.answer for n in needles)
    assert recall(model, needles) == right / 12


def test_streams_cover_the_documents():
    assert streams([[1, 2], [3, 4, 5]], 3, 2) == [[1, 2, 3], [3, 4, 5]]
    with pytest.raises(UserError, match="5 tokens together"):
        streams([[1, 2], [3, 4, 5]], 6, 2)


@pytest.mark.slow
def test_the_recipe_extends_measures_and_goes_on(tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise Interrupted("stopped")

    model = build(config(seq_len=128), seed=0)
    save_directory(model, Byte(), tmp_path / "base")
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in World(1).pretrain(300)))
    command = ["extend", str(tmp_path / "base"), "--data", str(file), "--lengths", "128", "256", "512", "--steps", "2",
               "--batch_tokens", "1024", "--needles", "5", "--out", str(tmp_path / "long"), "--device", "cpu"]
    assert cli.main(command) == 0
    figures = json.loads((tmp_path / "long" / "context.json").read_text())
    assert figures["first"] == 128 and figures["lengths"] == [128, 256, 512]
    assert list(figures["measured"]) == ["before", "128", "256", "512"]
    for measured in figures["measured"].values():
        assert set(measured["recall"]) == {"128", "256", "512"}
        assert all(0 < bits < 12 for bits in measured["bits_per_token"])
    own = load_directory(tmp_path / "long" / "128" / "model").model.config
    assert own == config(seq_len=128)                                      # its own length: nothing is stretched
    end = load_directory(tmp_path / "long" / "512" / "model").model.config
    assert end.seq_len == 512
    assert end.layers[0].mixer.rope.scaling == YarnScaling(factor=4.0, original=128)
    assert "<svg" in (tmp_path / "long" / "context.html").read_text()
    figures["measured"]["before"]["recall"].pop("512")                     # as of a run that had ended earlier
    (tmp_path / "long" / "context.json").write_text(json.dumps(figures))
    weights = (tmp_path / "long" / "512" / "model" / "model.safetensors").read_bytes()
    assert cli.main(command) == 0                                         # nothing is trained again
    again = json.loads((tmp_path / "long" / "context.json").read_text())["measured"]["before"]
    assert set(again["recall"]) == {"128", "256", "512"}
    told = [json.loads(line) for line in (tmp_path / "long" / "256" / "log.jsonl").read_text().splitlines()]
    bits = [row["bits_per_byte/needles-256"] for row in told if "bits_per_byte/needles-256" in row]
    assert bits and all(0 < b < 12 for b in bits)                         # a digit's, whatever it weighs in training
    assert cli.main([*command, "--needles", "7"]) == 0                    # other questions are other figures
    fresh = json.loads((tmp_path / "long" / "context.json").read_text())
    assert list(fresh["measured"]) == ["before", "128", "256", "512"]
    assert all(one["needles"] == 7 for one in fresh["measured"].values())
    assert all(round(7 * share) == pytest.approx(7 * share) for one in fresh["measured"].values()
               for share in one["recall"].values())
    assert (tmp_path / "long" / "512" / "model" / "model.safetensors").read_bytes() == weights
    assert load_directory(tmp_path / "long" / "model").model.config == end
    save_directory(build(config(seq_len=128), seed=1), Byte(), tmp_path / "other")
    fewer = [word for word in command if word != "128"]               # so that 256 would start from the base
    for other in ([*command, "--lr", "0.1"], ["8" if word == "2" else word for word in command], fewer):
        capsys.readouterr()
        assert cli.main(other) == 2
        assert "was trained with" in capsys.readouterr().err          # what is there is something else
    assert cli.main(["extend", str(tmp_path / "other"), *command[2:]]) == 2
    assert "was trained with start=" in capsys.readouterr().err
    assert (tmp_path / "long" / "512" / "model" / "model.safetensors").read_bytes() == weights
    assert json.loads((tmp_path / "long" / "context.json").read_text()) == fresh
    monkeypatch.setattr("mindseed.recipes.extend.train.train", stop)
    assert cli.main([*command[:-4], "--out", str(tmp_path / "new"), "--device", "cpu"]) == 130
    assert "stopped. Give the same command again" in capsys.readouterr().out
    assert cli.main(["extend", str(tmp_path / "base"), "--data", str(file), "--lengths", "64"]) == 2
    assert "reads 128 tokens already" in capsys.readouterr().err
    assert cli.main(["extend", str(tmp_path / "base"), "--data", str(file), "--lengths", "512", "256"]) == 2
    assert "must rise" in capsys.readouterr().err


def test_yarn_is_never_stretched_less_than_before():
    """A window that is shorter than what the factor allows stays; a temperature that was given goes with its factor."""
    def scaling(given: YarnScaling, to: int) -> YarnScaling:
        c = config(seq_len=512)
        layers = tuple(replace(x, mixer=replace(x.mixer, positions=replace(x.mixer.rope, scaling=given)))
                       for x in c.layers)
        return extended(replace(c, layers=layers), to).layers[0].mixer.rope.scaling

    assert scaling(YarnScaling(factor=4.0, original=512), 1024).factor == 4.0
    further = scaling(YarnScaling(factor=4.0, original=512, attention_factor=1.14), 8192)
    assert (further.factor, further.attention_factor) == (16.0, None)
    assert scaling(YarnScaling(factor=4.0, original=512, attention_factor=1.14), 1024).attention_factor == 1.14
