"""Model directories: what is written comes back, and what does not fit together says so."""
from __future__ import annotations

import json
import re
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from mindseed.base.errors import UserError
from mindseed.interop.directory import load_directory, save_directory
from mindseed.interop.families import FAMILIES, family_of
from mindseed.interop.qwen3 import QWEN3
from mindseed.interop.rules import Layout, Rule, read_names, translate
from mindseed.models.lm import LM, build
from mindseed.models.presets import PRESETS, Shape, preset
from mindseed.tokenizers.bpe_train import train
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.chat import template_hash
from tests.tiny import KITS, kit_model, randomise

SHAPE = Shape(layers=2, dim=32, heads=4, kv_heads=2, head_dim=10, ffn_dim=48, theta=5e5, norm_eps=1e-5, dropout=0.1)


def model_for(tokenizer, extra_rows: int = 0, **changes) -> LM:
    config = replace(SHAPE, **changes).lm_config(vocab_size=tokenizer.vocab_size + extra_rows, seq_len=64)
    model = build(config)
    randomise(model)
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    """A directory to break."""
    model = model_for(Byte())
    return model, save_directory(model, Byte(), tmp_path / "model", info={"seed": 3, "data": ["a.jsonl"]})


def edit_json(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refuses(folder, *words):
    with pytest.raises(UserError) as caught:
        load_directory(folder)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("extra_rows", [0, 7])
def test_what_was_saved_comes_back_exactly(tmp_path, tied, extra_rows):
    tokenizer = train(["the seed grows and the trees grow 种子"] * 5, vocab_size=330)
    model = model_for(tokenizer, extra_rows, tied=tied)
    info = {"parent": None, "data": ["a", "b"], "seed": 1, "metrics": {"bpb": 1.5}}
    loaded = load_directory(save_directory(model, tokenizer, tmp_path / "m", info=info))
    assert loaded.model.config == model.config and loaded.info == info
    assert loaded.tokenizer.hash() == tokenizer.hash() and loaded.template_hash == template_hash()
    assert loaded.stop_ids == (2, 0) and not loaded.model.training
    ours, theirs = model.state_dict(), loaded.model.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert (loaded.model.head is None) == tied
    assert all(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(tmp_path, stored):
    model = model_for(Byte())
    folder = save_directory(model, Byte(), tmp_path / "m", dtype=stored)
    assert {x.dtype for x in load_file(folder / "model.safetensors").values()} == {stored}
    loaded = load_directory(folder, dtype=torch.float32)
    assert loaded.dtype == stored and loaded.model.embed.weight.dtype == torch.float32
    assert torch.equal(loaded.model.embed.weight, model.embed.weight.to(stored).to(torch.float32))
    assert load_directory(folder, dtype=torch.bfloat16).model.norm.weight.dtype == torch.bfloat16


def test_saving_replaces_wholly(saved):
    _, folder = saved
    (folder / "stray.txt").write_text("of an earlier model")
    save_directory(model_for(Byte(), layers=1), Byte(), folder)
    assert not (folder / "stray.txt").exists() and len(load_directory(folder).model.blocks) == 1
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_directory_is_its_own_even_without_our_file(saved):
    model, folder = saved
    (folder / "mindseed.json").unlink()
    loaded = load_directory(folder)
    assert loaded.model.config == replace(model.config, dropout=0.0)
    assert loaded.template_hash is None and loaded.info == {}
    assert torch.equal(loaded.model.norm.weight, model.norm.weight)


def test_shards(saved):
    model, folder = saved
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, inside in shards.items():
        save_file({n: tensors[n] for n in inside}, folder / file)
    index = {"weight_map": {n: file for file, inside in shards.items() for n in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load_directory(folder).model.blocks[1].ffn.down.weight, model.blocks[1].ffn.down.weight)
    (folder / "model-2.safetensors").unlink()
    refuses(folder, "model-2.safetensors", "not there")


# ------------------------------------------------------------------------------------------------------------- errors

def test_missing_places(tmp_path, saved):
    _, folder = saved
    refuses(tmp_path / "modle", "modle", "no such folder", str(folder))
    refuses(tmp_path, "no config.json", f"did you mean {folder}")
    (folder / "model.safetensors").rename(folder / "full_sft_768.pth")
    refuses(folder, "no model.safetensors", "full_sft_768.pth is a bare state dict", "mindseed convert")


def test_truncated_weights(saved):
    _, folder = saved
    whole = (folder / "model.safetensors").read_bytes()
    for size in (0, 5, struct.unpack("<Q", whole[:8])[0] // 2, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:size])
        refuses(folder, "model.safetensors", "truncated")


def test_missing_extra_and_wrongly_shaped_tensors_are_named_together(saved):
    _, folder = saved

    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 4)

    edit_tensors(folder, change)
    refuses(folder, "1 missing: model.norm.weight", "1 unexpected: model.layers.2.mlp.up_proj.weight",
            "1 wrongly shaped: model.layers.0.mlp.up_proj.weight is [3, 4] instead of [48, 32]")


def test_a_tied_head_may_be_stored_twice_but_not_differ(saved):
    model, folder = saved
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(load_directory(folder).model.embed.weight, model.embed.weight)
    edit_tensors(folder, lambda t: t["lm_head.weight"].add_(1))
    refuses(folder, "tie_word_embeddings", "lm_head.weight")


def test_integer_weights(saved):
    _, folder = saved
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    refuses(folder, "model.norm.weight", "int8")


@pytest.mark.parametrize("change, words", [
    ({"model_type": "gpt_neox"}, ["'gpt_neox'", "reads qwen3"]),
    ({"model_type": None}, ["None", "reads qwen3"]),
    ({"attention_bias": True}, ["biases in attention"]),
    ({"hidden_act": "gelu"}, ["gelu"]),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4}}, ["scaled by 'longrope'"]),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, ["llama3 lacks 'original_max_position_embeddings'"]),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["says 'default' and rope_scaling 'linear'"]),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
      "rope_scaling": {"rope_type": "linear", "factor": 3.0}}, ["rope_scaling differ in factor"]),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": "1.0"}},
     ["attention_factor of the rotary positions must be a number, not '1.0'"]),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": "false"}}, ["truncate", "true or false"]),
    ({"rope_parameters": {"rope_type": "linear", "factor": float("nan")}}, ["factor of the rotary positions"]),
    ({"rms_norm_eps": float("inf")}, ["rms_norm_eps=inf"]),
    ({"num_hidden_layers": 300_000}, ["num_hidden_layers=300000 is more than"]),
    ({"layer_types": ["full_attention", "sliding_attention"]}, ["sliding_window does not say"]),
    ({"layer_types": ["full_attention"]}, ["1 layers of 2"]),
    ({"quantization_config": {"bits": 4}}, ["quantised"]),
    ({"num_key_value_heads": 3}, ["heads=4", "kv_heads=3"]),
    ({"head_dim": 7}, ["head_dim=7", "even"]),
    ({"hidden_size": "big"}, ["does not describe a model"]),
    ({"hidden_size": 64}, ["different models"]),
])
def test_configs_we_cannot_read(saved, change, words):
    _, folder = saved
    edit_json(folder / "config.json", lambda data: data.update(change))
    refuses(folder, "config.json", *words)


def test_config_without_a_field_or_broken(saved):
    _, folder = saved
    edit_json(folder / "config.json", lambda data: data.pop("intermediate_size"))
    refuses(folder, "config.json lacks 'intermediate_size'")
    (folder / "config.json").write_text('{"model_type": ')
    refuses(folder, "config.json", "not valid JSON")


def test_tokenizer_and_model_must_belong_together(saved, tmp_path):
    model, folder = saved
    bigger = train(["the seed grows and the trees grow 种子"] * 5, vocab_size=330)
    with pytest.raises(UserError, match=r"tokens but the model only 292"):
        save_directory(model, bigger, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    other = save_directory(model_for(bigger), bigger, tmp_path / "third")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((other / name).read_bytes())
    refuses(folder, "tokens but the model only 292")
    save_directory(model_for(Byte(), 100), Byte(), folder)
    (folder / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes())
    refuses(folder, "tokenizer.json", "hash is not that")
    (folder / "tokenizer.json").unlink()
    refuses(folder, "tokenizer.json does not exist")


@pytest.mark.parametrize("make, reason", [
    (lambda c: replace(c, layers=(replace(c.layers[0], mixer=replace(c.layers[0].mixer, qk_norm=False)),) * 2),
     "qk_norm"),
    (lambda c: replace(c, norm_eps=1e-3), "one norm_eps"),
    (lambda c: replace(c, layers=(c.layers[0], replace(c.layers[1], ffn=replace(c.layers[1].ffn, ffn_dim=8)))),
     "feed-forward of layer 1 differs"),
])
def test_models_a_qwen3_cannot_be(tmp_path, make, reason):
    config = make(SHAPE.lm_config(vocab_size=Byte().vocab_size, seq_len=64))
    with pytest.raises(UserError, match=reason):
        save_directory(build(config), Byte(), tmp_path / "m", family=QWEN3)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------------- rules

@settings(max_examples=50, deadline=None)
@given(layers=st.integers(1, 120), heads=st.integers(1, 8), group=st.integers(1, 4), half=st.integers(1, 80),
       tied=st.booleans(), theta=st.floats(1.5, 1e7), eps=st.floats(1e-9, 1e-2), seq_len=st.integers(1, 10**6))
def test_config_json_is_bijective(layers, heads, group, half, tied, theta, eps, seq_len):
    shape = Shape(layers=layers, dim=48, heads=heads * group, kv_heads=heads, head_dim=2 * half, ffn_dim=96, tied=tied,
                  theta=theta, norm_eps=eps)
    config = shape.lm_config(vocab_size=100, seq_len=seq_len)
    data = json.loads(json.dumps(QWEN3.to_json(config, dtype="float32", specials={})))
    assert QWEN3.from_json(data, "config.json") == config
    del data["rope_parameters"]                                       # where readers before transformers 5 look
    assert QWEN3.from_json(data, "config.json") == config


@pytest.mark.parametrize("name", [name for name in PRESETS if "toy" in name or name == "minimind-moe"])
def test_names_are_bijective_and_cover_the_model(name):
    config = replace(preset(name), tied=False).lm_config(vocab_size=9, seq_len=9)
    with torch.device("meta"):
        shapes = {key: x.shape for key, x in LM(config).state_dict().items() if not key.startswith("mtp.")}
    family = family_of(config)
    if name.startswith("hybrid"):
        assert family is None
        return
    there = translate(family.layout, config, shapes)
    flat = [x for theirs in there.values() for x in theirs]
    assert there.keys() == shapes.keys() and len(set(flat)) == len(flat)
    assert there["blocks.1.mixer_norm.weight"] == ["model.layers.1.input_layernorm.weight"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_refuses_what_it_cannot_hold(name):
    family = FAMILIES[name]
    for config in KITS.values():
        if family.reasons(config):
            with pytest.raises(UserError, match=f"a {name} directory cannot hold this model"):
                family.to_json(config, dtype="float32", specials={})


def test_rules_are_strict():
    layout = Layout(top=[Rule("c", "d")], block=[Rule("a", "w"), Rule("stack", "x.{e}.y")], mixers={}, ffns={},
                    layer="b.{i}.")
    config, one = KITS["gqa"], torch.Size([1])
    expected = {"c": one, "blocks.0.a": one, "blocks.1.stack": torch.Size([2, 3])}
    names = translate(layout, config, expected)
    assert names == {"c": ["d"], "blocks.0.a": ["b.0.w"], "blocks.1.stack": ["b.1.x.0.y", "b.1.x.1.y"]}
    good = {"d": one, "b.0.w": one, "b.1.x.0.y": torch.Size([3]), "b.1.x.1.y": torch.Size([3])}
    read_names(names, expected, good, "f")
    for change, message in [({"d": None}, "missing: d"), ({"b.1.w": one}, "unexpected: b.1.w"),
                            ({"b.1.x.1.y": one}, r"wrongly shaped: b.1.x.1.y is \[1\] instead of \[3\]"),
                            ({"b.00.w": one, "b.0.w": None}, "missing: b.0.w.*unexpected: b.00.w")]:
        there = {name: shape for name, shape in (good | change).items() if shape is not None}
        with pytest.raises(UserError, match=message):
            read_names(names, expected, there, "f")
    with pytest.raises(UserError, match="no place for e"):
        translate(layout, config, {"e": one})


# ------------------------------------------------------------------------------------- layouts of our own, and shards

@pytest.mark.parametrize("config", KITS.values(), ids=KITS.keys())
def test_every_model_comes_back_from_its_directory(tmp_path, config):
    config = replace(config, vocab_size=Byte().vocab_size)
    model = kit_model(config).float()
    for module in model.modules():
        for buffer in module.buffers(recurse=False):
            buffer.uniform_(-1, 1)
    folder = save_directory(model, Byte(), tmp_path / "m", max_shard=20_000)
    assert (folder / "model.safetensors.index.json").exists()
    back = load_directory(folder)
    assert back.model.config == config
    want = model.state_dict()
    assert back.model.state_dict().keys() == want.keys()
    assert all(torch.equal(x, want[name]) for name, x in back.model.state_dict().items())


def test_the_bias_of_a_router_is_never_rounded(tmp_path):
    """It moves by thousandths, which bfloat16 cannot tell apart near 1."""
    model = kit_model(replace(KITS["moe, groups"], vocab_size=Byte().vocab_size)).float()
    model.blocks[0].ffn.bias.fill_(1.001)
    back = load_directory(save_directory(model, Byte(), tmp_path / "m", dtype=torch.bfloat16), dtype=torch.bfloat16)
    assert torch.equal(back.model.blocks[0].ffn.bias, model.blocks[0].ffn.bias)
    assert back.model.blocks[0].ffn.router.weight.dtype == torch.bfloat16
    back.model(torch.zeros(1, 4, dtype=torch.long), torch.arange(4)[None])


def test_prediction_modules_travel_beside_families_without_a_place_for_them(tmp_path):
    config = replace(SHAPE, mtp=2).lm_config(vocab_size=Byte().vocab_size, seq_len=64)
    model = build(config)
    folder = save_directory(model, Byte(), tmp_path / "m")
    assert load_directory(folder).family is QWEN3
    assert torch.equal(load_directory(folder).model.mtp[1].join.weight, model.mtp[1].join.weight)
    (folder / "mtp.safetensors").unlink()
    refuses(folder, "mtp.safetensors is missing")
    (folder / "mindseed.json").unlink()
    assert not load_directory(folder).model.mtp


def test_generation_config_ends_answers(saved):
    _, folder = saved
    data = json.loads((folder / "generation_config.json").read_text())
    assert data["eos_token_id"] == [2, 0] and data["do_sample"] and re.fullmatch(r"0\.\d+", str(data["temperature"]))


@pytest.mark.parametrize("name", ["eos_token_id", "bos_token_id"])
@pytest.mark.parametrize("id", [-1, 1 << 40, 99_999])
def test_ids_that_are_no_tokens(saved, name, id):
    _, folder = saved
    edit_json(folder / "generation_config.json", lambda data: data.update({name: id}))
    refuses(folder, f"{name}={id} is no token")


def test_tables_of_rotary_positions_among_the_weights_are_passed_over(saved):
    model, folder = saved
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    state = load_directory(folder).model.state_dict()
    assert all(torch.equal(state[name], x) for name, x in model.state_dict().items())
