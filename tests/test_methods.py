"""`mindseed train --method ...` from the command line: every method learns, goes on to the bit, says what
is wrong."""
from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mindseed.adapt.peft import load_adapter
from mindseed.base.errors import UserError
from mindseed.data.toy import World
from mindseed.interop.directory import load_directory, save_directory
from mindseed.models.lm import build
from mindseed.models.presets import Shape
from mindseed.recipes.options import DataOptions, LoopOptions, TrainOptions, without_effect
from mindseed.recipes.post_options import DistillOptions, DPOOptions
from mindseed.tokenizers import bpe_train
from tests.test_runs import finish, kill_after, mindseed

SMALL = {"loop.batch": 4, "loop.micro_batch": 2, "data.seq_len": 256, "loop.validate_every": 4, "loop.sample_every": 0,
         "loop.save_every": 1, "optim.lr": 3e-3, "optim.kind": "adamw", "data.heldout": 0.2}
METHODS = {
    "sft": {"data.train": "chats.jsonl"}, "dpo": {"data.train": "pairs.jsonl"},
    "simpo": {"method": "dpo", "dpo.kind": "simpo", "data.train": "pairs.jsonl"},
    "dpo, live": {"method": "dpo", "dpo.reference_logps": "live", "data.train": "pairs.jsonl"},
    "kto": {"data.train": "judged.jsonl", "loop.micro_batch": 4}, "kto of pairs": {
        "method": "kto", "data.train": "pairs.jsonl", "loop.micro_batch": 4},
    "reward": {"data.train": "pairs.jsonl"}, "process-reward": {"data.train": "steps.jsonl"},
    "distill": {"data.train": "chats.jsonl", "distill.teacher": "teacher"},
    "distill within": {"method": "distill", "data.train": "chats.jsonl", "distill.teacher": "teacher",
                       "distill.states": 0.1, "distill.relations": 0.1},
    "distill on-policy": {"method": "distill", "data.train": "chats.jsonl", "distill.teacher": "teacher",
                          "distill.on_policy": 0.5, "distill.max_new": 8, "distill.distance": "jsd"},
    "dpo of an adapter": {"method": "dpo", "data.train": "pairs.jsonl", "lora.rank": 2},
    "adapter": {"method": "sft", "data.train": "chats.jsonl", "lora.rank": 4},
    "adapter in 4 bits": {"method": "sft", "data.train": "chats.jsonl", "lora.rank": 4, "lora.nf4": "true"}}


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A model, a teacher twice as wide, one of another vocabulary, and a file of every kind."""
    folder = tmp_path_factory.mktemp("methods")
    world = World(7)
    rows = {"chats": list(world.conversations(60)), "pairs": list(world.preferences(60))}
    rows["judged"] = [{"prompt": row["chosen"][:-1], "completion": row[side][-1:], "label": side == "chosen"}
                      for row in rows["pairs"] for side in ("chosen", "rejected") if len(row["chosen"]) == 2]
    rows["steps"] = [{"prompt": f"What is {i}+2+3?", "steps": [f"{i}+2={i + 2}", f"{i + 2}+3={i + 5 + i % 2}"],
                      "labels": [True, i % 2 == 0]} for i in range(40)]
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some))
    texts = [json.dumps(row, ensure_ascii=False) for some in rows.values() for row in some]
    for name, size, dim in (("model", 400, 32), ("teacher", 400, 64), ("stranger", 420, 32)):
        tokenizer = bpe_train.train(iter(texts), vocab_size=size)
        shape = Shape(layers=2, dim=dim, heads=dim // 16, kv_heads=1, head_dim=16, ffn_dim=48)
        model = build(shape.lm_config(vocab_size=tokenizer.vocab_size, seq_len=512), seed=dim)
        save_directory(model, tokenizer, folder / name)
    return folder


def command(place: Path, run: Path, name: str, *flags: str, steps: int = 8, ranks: int = 1,
            **more: object) -> list[str]:
    given = METHODS[name] | {key.replace("__", "."): value for key, value in more.items()}
    options = {"method": name.split(",")[0], "model.start": place / "model", "out": run, "loop.steps": steps, **SMALL,
               **given}
    for key in ("data.train", "distill.teacher"):
        if key in options and "/" not in str(options[key]):
            options[key] = place / options[key]
    words = [word for key, value in options.items()
             for word in ((f"--{key}", value) if value != "true" else (f"--{key}",))]
    return mindseed("train", *words, *flags, ranks=ranks)


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def curve(run: Path, *names: str) -> list[tuple]:
    return [tuple(row.get(name) for name in ("step", "loss", "grad_norm", "heldout/loss", *names)) for row in log(run)]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_and_leaves_a_model(place, tmp_path, name):
    said = finish(command(place, tmp_path / "run", name, steps=24))
    score = "bits_per_byte" if METHODS[name].get("method", name) == "sft" else "heldout/loss"
    scores = [row[score] for row in log(tmp_path / "run") if score in row]
    assert min(scores[1:]) < scores[0], said
    loaded = load_directory(tmp_path / "run" / "model")
    assert (loaded.model.value_head is not None) == (METHODS[name].get("method", name) in ("reward", "process-reward"))
    x = torch.tensor([[1, 2, 3]])
    assert torch.isfinite(loaded.model(x, torch.arange(3)[None]).logits()).all()
    if "reward" in name:
        assert max(row["heldout/accuracy"] for row in log(tmp_path / "run") if "heldout/accuracy" in row) > 0.5


@pytest.mark.parametrize("name", ["dpo", "kto", "reward", "distill within", "distill on-policy",
                                  "adapter in 4 bits", "dpo of an adapter"])
def test_killed_and_resumed_equals_uninterrupted(place, tmp_path, name):
    finish(command(place, tmp_path / "whole", name))
    assert kill_after(command(place, tmp_path / "parts", name), tmp_path / "parts", 4) != 0
    assert "going on from" in finish(command(place, tmp_path / "parts", name, "--resume"))
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert (tmp_path / "parts/model/model.safetensors").read_bytes() == (
        tmp_path / "whole/model/model.safetensors").read_bytes()


def test_a_run_does_not_go_on_with_states_of_another_kind(place, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    finish(command(place, tmp_path / "run", "sft", steps=1, optim__states="8bit"))
    said = finish(command(place, tmp_path / "run", "sft", "--resume", steps=2, optim__states="fp32"), code=2)
    assert "optim.states: 8bit then" in said


@pytest.mark.parametrize("name, zero", [("dpo", 0), ("kto", 0), ("kto", 3), ("adapter", 2)])
def test_two_ranks_do_what_one_does(place, tmp_path, name, zero):
    for ranks in (1, 2):
        more = {"loop__micro_batch": 4 // ranks, "parallel__zero": zero if ranks == 2 else 0}
        finish(command(place, tmp_path / str(ranks), name, ranks=ranks, steps=3, **more))
    for one, two in zip(curve(tmp_path / "1"), curve(tmp_path / "2"), strict=True):
        assert [x or 0 for x in one] == pytest.approx([x or 0 for x in two], rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_what_a_loss_does_not_read_does_not_learn(place, tmp_path, name):
    """Modules for further tokens, and a head where only values are told: DDP would wait for their gradients, and states
    of theirs would be missing where a run goes on."""
    loaded = load_directory(place / "model")
    layers = loaded.model.config.layers
    start = build(replace(loaded.model.config, tied=False, mtp=layers[-1:]), seed=3)
    save_directory(start, loaded.tokenizer, tmp_path / "start")
    more = {"model__start": tmp_path / "start", "loop__micro_batch": 2, "schedule__kind": "constant",
            "schedule__warmup_steps": 0}
    finish(command(place, tmp_path / "one", name, steps=4, **more))
    finish(command(place, tmp_path / "two", name, ranks=2, steps=2, **more))
    finish(command(place, tmp_path / "two", name, "--resume", ranks=2, steps=3, parallel__zero=2, **more))
    finish(command(place, tmp_path / "two", name, "--resume", steps=4, **more))
    told = [[(row["step"], row["loss"]) for row in log(tmp_path / run) if "loss" in row] for run in ("one", "two")]
    assert len(told[0]) == 4 and told[1] == [(step, pytest.approx(loss, rel=2e-3)) for step, loss in told[0]]
    learnt = load_directory(tmp_path / "two" / "model").model.state_dict()
    moved = {key.split(".")[0] for key, x in start.state_dict().items() if not torch.equal(x, learnt[key])}
    assert moved == {"embed", "blocks", "norm"} | ({"head"} if name == "dpo" else set())


def test_the_adapter_alone_and_the_merged_model_are_the_same(place, tmp_path):
    said = finish(command(place, tmp_path / "run", "adapter"))
    assert "adapter alone is in" in said
    base, merged = load_directory(place / "model").model, load_directory(tmp_path / "run" / "model").model
    load_adapter(base, tmp_path / "run" / "adapter")
    x = torch.randint(0, 400, (2, 9))
    at = torch.arange(9).expand(2, 9)
    assert torch.allclose(base.eval()(x, at).logits(), merged(x, at).logits(), atol=1e-4)
    asked = ("--prompt", "What is 2+3?", "--max_new", 12, "--temperature", 0, "--logps")
    told = [finish(mindseed("generate", *where, *asked)) for where in (
        (tmp_path / "run/model",), (place / "model", "--adapter", tmp_path / "run/adapter"), (place / "model",))]
    merged, apart, plain = (json.loads(said.splitlines()[-1]) for said in told)
    assert merged["ids"] == apart["ids"] and apart["logps"] == pytest.approx(merged["logps"], abs=1e-4)
    assert plain["logps"] != pytest.approx(merged["logps"], abs=1e-3)


def test_what_was_forgotten_is_measured_and_nothing_of_it_is_learnt(place, tmp_path):
    more = {"lora__rank": 4, "optim__lr": 0.05, "steps": 4, "loop__validate_every": 2}
    finish(command(place, tmp_path / "plain", "sft", **more))
    said = finish(command(place, tmp_path / "run", "sft", **more, data__remember=place / "pairs.jsonl"), code=2)
    assert "preference" in said and "--method dpo" in said
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "the {i}th of them"}}\n' for i in range(30)))
    said = finish(command(place, tmp_path / "run", "sft", **more, data__remember=tmp_path / "texts.jsonl"))
    assert "remembered, bits per byte" in said and "forgotten" in said
    bits = [row["remembered/texts"] for row in log(tmp_path / "run") if "remembered/texts" in row]
    assert len(bits) == 3 and len({round(b, 4) for b in bits}) == 3              # before, after 2 steps, after 4
    assert [row.get("loss") for row in log(tmp_path / "run")] == [row.get("loss") for row in log(tmp_path / "plain")]


def test_an_adapter_of_a_packed_base_is_refused_on_another(place, tmp_path):
    finish(command(place, tmp_path / "run", "adapter in 4 bits", steps=2))
    assert load_adapter(load_directory(place / "model").model, tmp_path / "run/adapter")
    other = load_directory(place / "model").model
    with torch.no_grad():
        for name, p in other.named_parameters():
            if name.startswith("blocks.") and p.ndim == 2:
                p.normal_(0, 0.02)
    with pytest.raises(UserError, match="has other weights"):
        load_adapter(other, tmp_path / "run/adapter")


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_live_reference_computes_as_the_policy_does(place, tmp_path, name):
    """In bf16, before anything is learnt, they are the same to the bit, asked once or live."""
    more = {"loop__precision": "bf16", "steps": 1, "loop__validate_every": 0}
    for when in ("once", "live"):
        finish(command(place, tmp_path / when, name, **{f"{name}__reference_logps": when}, **more))
    once, live = (log(tmp_path / when)[-1]["loss"] for when in ("once", "live"))
    assert once == pytest.approx(live, abs=1e-6) == pytest.approx(0.6931472 if name == "dpo" else 0.5, abs=1e-5)


def test_the_reference_is_asked_once_or_live_for_the_same_losses(place, tmp_path):
    for name in ("dpo", "dpo, live"):
        finish(command(place, tmp_path / name, name))
    for once, live in zip(curve(tmp_path / "dpo"), curve(tmp_path / "dpo, live"), strict=True):
        assert [x or 0 for x in once] == pytest.approx([x or 0 for x in live], rel=1e-3, abs=1e-5)
    assert list((tmp_path / "dpo" / "data").glob("reference-*.npy"))


@pytest.mark.parametrize("name, more, says", [
    ("sft", {"data__train": "pairs.jsonl"}, "--method dpo or reward or kto does"),
    ("dpo", {"data__train": "chats.jsonl"}, "which --method dpo does not train on"),
    ("distill", {"distill__teacher": "stranger"}, "another vocabulary"),
    ("distill", {"distill__teacher": "nowhere"}, "nowhere"),
    ("adapter", {"lora__targets": "q_proj"}, "q_proj"),
    ("adapter", {"lora__rank": 4096}, "4 to 64 are usual"),
    ("kto", {"loop__micro_batch": 2}, "cannot be cut into micro-batches"),
    ("dpo", {"dpo__beta": 0}, "beta=0"),
    ("sft", {"lora__nf4": "true"}, "give lora.rank as well")])
def test_what_users_do_wrong(place, tmp_path, name, more, says):
    assert says in finish(command(place, tmp_path / "run", name, **more), code=2)


def test_pairs_that_teach_nothing_are_named(place, tmp_path):
    good = (place / "pairs.jsonl").read_text().splitlines()
    ask, say = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    bad = [{"chosen": [ask, say], "rejected": [ask, say]},
           {"chosen": [ask, say], "rejected": [ask | {"content": "c"}, say | {"content": "d"}]},
           {"chosen": [ask, say], "rejected": [ask, say | {"content": ""}]}]
    file = tmp_path / "some.jsonl"
    file.write_text("\n".join([*good, *map(json.dumps, bad)]))
    said = finish(command(place, tmp_path / "run", "dpo", data__train=file, data__max_skipped=0), code=2)
    assert all(f"some.jsonl:{len(good) + i}" in said for i in (1, 2, 3))
    assert all(word in said for word in ("are the same", "no prompt in common", "is empty")), said


def test_uneven_kinds_of_judged_answers_are_told(place, tmp_path):
    said = finish(command(place, tmp_path / "even", "kto", steps=1))
    assert re.search(r"judged +\d+ good answers, \d+ bad ones", said)
    said = finish(command(place, tmp_path / "uneven", "kto", steps=1, kto__desirable=4.0))
    assert "as much as bad ones together" in said and re.search(r"--kto.undesirable [34]", said)


def test_options_of_another_method_are_told_to_be_idle(place, tmp_path):
    said = finish(command(place, tmp_path / "run", "sft", steps=1, dpo__beta=0.2))
    assert "dpo.beta has no effect: --method is sft" in said


def without_start(command: list[str]) -> list[str]:
    at = command.index("--model.start")
    return command[:at] + command[at + 2:]


def test_a_student_takes_its_teachers_tokenizer(place, tmp_path):
    finish(without_start(command(place, tmp_path / "run", "distill", steps=1, model__layers=1, model__dim=32)))
    assert load_directory(tmp_path / "run/model").tokenizer.hash() == load_directory(place / "teacher").tokenizer.hash()


def test_an_adapter_needs_a_base_and_preferences_are_missed_by_random_weights(place, tmp_path):
    said = finish(without_start(command(place, tmp_path / "run", "adapter", steps=1)), code=2)
    assert "give --model.start DIR" in said
    said = finish(without_start(command(place, tmp_path / "other", "reward", steps=1, model__layers=1, model__dim=32)))
    assert "without --model.start" in said and "--model.reward" in said


@pytest.mark.parametrize("more, name", [
    ({"method": "dpo", "dpo": DPOOptions(kind="simpo", reference="x")}, "dpo.reference"),
    ({"method": "distill", "distill": DistillOptions(beta=0.3)}, "distill.beta"),
    ({"method": "distill", "distill": DistillOptions(layers=(1,))}, "distill.layers"),
    ({"method": "distill", "distill": DistillOptions(related=1)}, "distill.related"),
    ({"method": "distill", "distill": DistillOptions(max_new=9)}, "distill.max_new"),
    ({"data": DataOptions(remember=("x",)), "loop": LoopOptions(validate_every=0)}, "data.remember")])
def test_options_of_a_method_that_are_idle_are_named(more, name):
    assert [line.split()[0] for line in without_effect(TrainOptions(**more))] == [name]


def test_margins_have_the_usual_settings_of_their_papers():
    usual = [DPOOptions(kind=kind).objective() for kind in ("dpo", "ipo", "simpo")]
    assert [(o.beta, o.target_margin) for o in usual] == [(0.1, 0.0), (1.0, 0.0), (2.0, 1.0)]
    assert DPOOptions(kind="simpo", beta=0.5, target_margin=0.0).objective().target_margin == 0
