"""GGUF files through the command: read back with the library of the format, names, numbers, rounding, what is refused.

What llama.cpp itself makes of them: `make parity-llamacpp`.
"""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mindseed.base.errors import UserError
from mindseed.cli import main
from mindseed.interop import gguf as writer
from mindseed.interop.convert import convert_gguf, save_gguf
from mindseed.interop.directory import Loaded, save_directory
from mindseed.interop.gguf_read import logits, nearest, read_gguf
from mindseed.interop.gguf_vocab import CONTROL, LLAMA3, NORMAL, UNUSED, USER_DEFINED, pre_tokenizer
from mindseed.interop.qwen3 import QWEN3
from mindseed.interop.rules import translate, write_names
from mindseed.models.heads import add_value_head
from mindseed.models.lm import build
from mindseed.models.presets import LatentShape, Shape
from mindseed.nn.moe import MoEConfig
from mindseed.nn.rope import DynamicScaling, LinearScaling, Llama3Scaling, RopeConfig, YarnScaling
from mindseed.tokenizers.bpe import BPE, spell_bytes
from mindseed.tokenizers.bpe_train import train
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.chat import JINJA
from mindseed.tokenizers.hf_json import save_tokenizer
from mindseed.tokenizers.split import GPT2, QWEN, Splitter, by_pattern
from tests.tiny import randomise

gguf = pytest.importorskip("gguf")

SHAPE = Shape(layers=2, dim=64, heads=4, kv_heads=2, head_dim=24, ffn_dim=96)
MOE = MoEConfig(experts=4, top_k=2, expert_dim=32)
SHAPES = {
    "qwen3": SHAPE,
    "llama": replace(SHAPE, qk_norm=False, tied=False, norm_eps=1e-5),
    "qwen3moe": replace(SHAPE, moe=MOE),
    "deepseek2": replace(SHAPE, kv_heads=4, qk_norm=False, dense_layers=1,
                         latent=LatentShape(kv_rank=32, q_rank=32, rope_dim=8),
                         moe=replace(MOE, shared_dim=64, score="sigmoid", bias=True, groups=2, scaling=2.5)),
}
YARN = YarnScaling(factor=4.0, original=16)


@pytest.fixture(scope="module")
def tokenizer():
    return train(["the seed grows and the trees grow; who is Ada? 种子发芽，模型生长。"] * 9, vocab_size=352)


def model_of(shape: Shape, tokenizer, rope: RopeConfig | None = None, **changes):
    config = replace(shape.lm_config(vocab_size=tokenizer.vocab_size + 3, seq_len=64), **changes)
    if rope is not None:
        place = "rope" if shape.latent else "positions"
        config = replace(config, layers=tuple(replace(layer, mixer=replace(layer.mixer, **{place: rope}))
                                              for layer in config.layers))
    model = build(config)
    randomise(model)
    for i, buffer in enumerate(model.buffers()):              # biases of routers
        buffer.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(i))
    return model.eval()


def loaded(model, tokenizer, **changes) -> Loaded:
    return Loaded(**{"model": model, "tokenizer": tokenizer, "chat_template": JINJA} | changes)


def field(reader, key: str):
    return reader.get_field(key).contents()


def held(file) -> dict[str, torch.Tensor]:
    return {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
            for t in gguf.GGUFReader(file).tensors}


# -------------------------------------------------------------------------------------------------------- the command

@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("architecture", SHAPES)
def test_the_command(tmp_path, capsys, tokenizer, architecture, kind):
    model = model_of(SHAPES[architecture], tokenizer)
    source = save_directory(model, tokenizer, tmp_path / "source")
    assert main(["convert", str(source), str(tmp_path / "seed"), "--to", "gguf", "--dtype", kind]) == 0
    out = capsys.readouterr().out
    assert "equal" in out and "blk.{i}.attn_output" in out and ("rounding" in out) == (kind != "f32")
    assert sorted(p.name for p in (tmp_path / "seed").iterdir()) == ["Modelfile", "seed.gguf"]
    reader = gguf.GGUFReader(tmp_path / "seed" / "seed.gguf")
    assert field(reader, "general.architecture") == architecture and field(reader, "general.name") == "seed"
    number = {name: n for n, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    known = {gguf.TENSOR_NAMES[t].format(bid=i) for t in gguf.MODEL_TENSORS[number] for i in range(2)}
    assert {t.name.rpartition(".")[0] for t in reader.tensors} <= known          # the library's own table of names
    kinds = {t.tensor_type.name for t in reader.tensors if len(t.shape) > 1 and "gate_inp" not in t.name}
    assert kinds - {"F16"} == {kind.upper()} - {"F16"} and ("F16" not in kinds or kind in ("f16", "q8_0"))
    assert {t.tensor_type.name for t in reader.tensors if "norm" in t.name or "gate_inp" in t.name} == {"F32"}
    ids = torch.randint(0, 300, (2, 30))
    copy = read_gguf(tmp_path / "seed" / "seed.gguf")
    apart = (logits(copy, ids) - logits(model, ids)).norm() / logits(model, ids).norm()
    assert apart < {"f32": 1e-6, "f16": 3e-3, "bf16": 0.1, "q8_0": 0.15}[kind]
    assert copy.config.layers[0].mixer.rope.interleaved == (architecture in ("llama", "deepseek2"))


def test_a_file_alone_and_the_dtype_of_the_source(tmp_path, tokenizer):
    source = save_directory(model_of(SHAPE, tokenizer), tokenizer, tmp_path / "source", dtype=torch.bfloat16)
    done = convert_gguf(source, tmp_path / "exports" / "tiny.gguf")
    assert done.good and done.kind == "bf16" and done.rounding == 0
    assert sorted(p.name for p in (tmp_path / "exports").iterdir()) == ["Modelfile", "tiny.gguf"]
    assert convert_gguf(source, tmp_path / "exports" / "tiny.gguf", dtype="fp16", overwrite=True).kind == "f16"


def test_a_bare_state_dict(tmp_path, capsys, tokenizer):
    model = model_of(SHAPE, tokenizer)
    state = dict(model.state_dict())
    torch.save(write_names(translate(QWEN3.layout, model.config, {name: x.shape for name, x in state.items()}), state),
               tmp_path / "full_sft_64.pth")
    save_tokenizer(tokenizer, tmp_path)
    assert main(["convert", str(tmp_path / "full_sft_64.pth"), str(tmp_path / "seed"), "--to", "gguf"]) == 0
    assert "qwen3 -> gguf: 24 tensors, f32" in capsys.readouterr().out
    assert field(gguf.GGUFReader(tmp_path / "seed" / "seed.gguf"), "qwen3.rope.freq_base") == 1e6       # MiniMind's


def test_places_that_are_taken(tmp_path, capsys, tokenizer):
    source = save_directory(model_of(SHAPE, tokenizer), tokenizer, tmp_path / "models" / "source")
    convert_gguf(source, tmp_path / "one.gguf")
    convert_gguf(source, tmp_path / "seed")
    (tmp_path / "seed" / "notes.txt").write_text("mine")
    for target, more, words in [
            ("seed", [], "exists already"), ("one.gguf", [], "one.gguf exists already"),
            ("two.gguf", [], "Modelfile exists already"), ("seed", ["--overwrite"], "holds more than a GGUF file"),
            ("models", ["--overwrite"], "not overwritten"), ("models/source", ["--overwrite"], "not overwritten"),
            ("new", ["--dtype", "q4_k"], "choose one of f32, f16, bf16, q8_0"),
            ("new", ["--tokenizer", "x"], "has its own")]:
        assert main(["convert", str(source), str(tmp_path / target), "--to", "gguf", *more]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") <= 2, err
    assert main(["convert", str(source), str(tmp_path / "copy"), "--drop-mtp"]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Modelfile", "models", "one.gguf", "seed"]
    assert (tmp_path / "seed" / "notes.txt").exists() and (source / "model.safetensors").exists()


# ---------------------------------------------------------------------------------------------------------- the proof

def forget(key):
    def change(old):
        return lambda *args: {k: v for k, v in old(*args).items() if not k.endswith(key)}
    return change


def alter(key, value):
    def change(old):
        return lambda *args: old(*args) | {k: value for k in old(*args) if k.endswith(key)}
    return change


FAULTS = {
    "pairs left in halves": ("llama", "turned", lambda old: lambda x, *rest: x),
    "latent keys left in halves": ("deepseek2", "turned", lambda old: lambda x, part, *rest: x),
    "another eps": ("qwen3", "metadata", alter("rms_epsilon", 1e-2)),
    "another base": ("qwen3", "metadata", alter("freq_base", 5e4)),
    "another number of experts": ("qwen3moe", "metadata", alter("used_count", 3)),
    "groups forgotten": ("deepseek2", "metadata", forget("group_count")),
    "weights not scaled": ("deepseek2", "metadata", alter("weights_scale", 1.0)),
    "softmax": ("deepseek2", "metadata", alter("gating_func", 1)),
    "rounded twice": ("qwen3", "kind_for", lambda old: lambda name, x, kind: "f16" if "attn_q." in name else kind),
    "a norm scaled": ("qwen3", "tensors", lambda old: lambda *args: (
        (ours, theirs, x * (1 + 1e-3) if ours == "norm.weight" else x) for ours, theirs, x in old(*args)))}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_computes_something_else_is_not_kept(tmp_path, capsys, monkeypatch, tokenizer, fault):
    architecture, name, change = FAULTS[fault]
    shape = SHAPES[architecture]
    model = model_of(shape, tokenizer, RopeConfig() if shape.latent else None)
    source = save_directory(model, tokenizer, tmp_path / "source")
    monkeypatch.setattr(writer, name, change(getattr(writer, name)))
    for target in ("seed", "seed.gguf"):
        assert main(["convert", str(source), str(tmp_path / target), "--to", "gguf"]) == 1
        assert "DIFFERENT" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_tensor_too_few(tmp_path, monkeypatch, tokenizer):
    whole = writer.tensors
    monkeypatch.setattr(writer, "tensors", lambda *args: (t for t in whole(*args) if "blk.1.ffn_up" not in t[1]))
    with pytest.raises(UserError, match="1 missing: blk.1.ffn_up.weight"):
        save_gguf(loaded(model_of(SHAPE, tokenizer), tokenizer), tmp_path / "seed", kind="f32")
    assert not list(tmp_path.iterdir())


def test_rounding_has_bounds(tmp_path, tokenizer):
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 7)[:, None]
    x[0, :32] = 0
    for kind in ("f16", "bf16", "q8_0"):
        target = getattr(gguf.GGMLQuantizationType, kind.upper())
        theirs = gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), target), target)
        assert np.array_equal(nearest(x, kind).numpy(), theirs)
    largest = x.unflatten(-1, (-1, 32)).abs().amax(-1).repeat_interleave(32, -1)
    assert ((nearest(x, "q8_0") - x).abs() <= largest / 254 * 1.13).all()        # half a step, and the scale's 2^-11
    model = model_of(SHAPE, tokenizer)
    with torch.no_grad():
        model.blocks[0].ffn.up.weight[0, 0] = 1e5
    with pytest.raises(UserError, match="blocks.0.ffn.up.weight has weights up to 1e.05, beyond what f16 can hold"):
        save_gguf(loaded(model, tokenizer), tmp_path / "seed", kind="f16")
    assert not list(tmp_path.iterdir())
    assert save_gguf(loaded(model, tokenizer), tmp_path / "seed", kind="bf16").difference < 1e-9


# -------------------------------------------------------------------------------------------------- layout and numbers

def test_halves_become_pairs_for_llama(tmp_path, tokenizer):
    model = model_of(SHAPES["llama"], tokenizer)
    save_gguf(loaded(model, tokenizer), tmp_path / "m.gguf", kind="f32")
    there, k = held(tmp_path / "m.gguf"), model.blocks[0].mixer.k.weight.detach()          # 2 heads of 24
    assert torch.equal(there["blk.0.attn_k.weight"][24:28], k[[24, 36, 25, 37]])
    assert torch.equal(there["blk.0.attn_v.weight"], model.blocks[0].mixer.v.weight)


def test_latents_are_kept_absorbed(tmp_path, tokenizer):
    model = model_of(replace(SHAPES["deepseek2"], mtp=1), tokenizer)
    with pytest.raises(UserError, match="--drop-mtp, which changes no logits"):
        save_gguf(loaded(model, tokenizer), tmp_path / "m.gguf", kind="f32")
    assert save_gguf(loaded(model, tokenizer), tmp_path / "m.gguf", kind="f32", drop_mtp=True).good
    there, up = held(tmp_path / "m.gguf"), model.blocks[0].mixer.kv_up.weight.detach().view(4, 48, 32)
    assert torch.equal(there["blk.0.attn_k_b.weight"], up[:, :24].mT)
    assert torch.equal(there["blk.0.attn_v_b.weight"], up[:, 24:])
    assert not any(name.startswith("blk.2") for name in there)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert field(reader, "deepseek2.attention.key_length") == 40 and field(reader, "deepseek2.expert_gating_func") == 2
    assert field(reader, "deepseek2.attention.head_count_kv") == 1


@pytest.mark.parametrize("architecture, rope", [
    ("qwen3", RopeConfig(scaling=LinearScaling(factor=3.0))), ("qwen3", RopeConfig(scaling=YARN)),
    ("qwen3moe", RopeConfig(scaling=replace(YARN, attention_factor=1.2))),
    ("llama", RopeConfig(scaling=replace(YARN, mscale=1.0, mscale_all_dim=0.5))),
    ("llama", RopeConfig(scaling=Llama3Scaling(factor=8.0, original=16))),
    ("deepseek2", RopeConfig()), ("deepseek2", RopeConfig(interleaved=True)),
    ("deepseek2", RopeConfig(scaling=replace(YARN, mscale=0.7, mscale_all_dim=0.7))),
    ("deepseek2", RopeConfig(scaling=replace(YARN, attention_factor=1.0), interleaved=True))])
def test_scalings_of_rope(tmp_path, tokenizer, architecture, rope):
    done = save_gguf(loaded(model_of(SHAPES[architecture], tokenizer, rope), tokenizer), tmp_path / "m", kind="f32")
    assert done.good, done.difference
    reader = gguf.GGUFReader(done.path)
    if isinstance(rope.scaling, YarnScaling) and rope.scaling.attention_factor == 1.2:
        assert field(reader, "qwen3moe.rope.scaling.attn_factor") == pytest.approx(1.2 / (0.1 * 1.3862944 + 1))
    if isinstance(rope.scaling, Llama3Scaling):
        divisors = held(done.path)["rope_freqs.weight"]
        assert divisors.shape == (12,) and 1 <= divisors.min() < 2 and divisors.max() == pytest.approx(8)


DEEP = SHAPES["deepseek2"]


@pytest.mark.parametrize("shape, rope, changes, words", [
    (replace(SHAPE, pattern="SL", window=8), None, {}, "qwen3: it has no sliding windows"),
    (replace(SHAPE, pattern="DL"), None, {}, "grouped-query attention, not a gated delta rule"),
    (replace(SHAPE, positions="alibi"), None, {}, "has no other positions"),
    (replace(SHAPE, positions="learned"), None, {}, "no learned positions"),
    (replace(SHAPE, norm="layer"), None, {}, "normalises with RMSNorm before each half"),
    (replace(SHAPE, placement="sandwich"), None, {}, "normalises with RMSNorm before each half"),
    (replace(SHAPE, activation="relu2"), None, {}, "SwiGLU, not an MLP without gate"),
    (SHAPE, RopeConfig(scaling=DynamicScaling(factor=2.0, original=64)), {}, "no dynamic rope scaling"),
    (SHAPE, RopeConfig(scaling=Llama3Scaling(factor=8.0, original=16)), {}, "llama3's rope scaling for Llamas alone"),
    (SHAPE, RopeConfig(scaling=replace(YARN, truncate=False)), {}, "rounds borders to whole pairs"),
    (SHAPE, RopeConfig(scaling=replace(YARN, original=64, beta_slow=4.0)), {}, "always has beta_fast 32 and beta_slow"),
    (replace(SHAPE, mtp=1), None, {}, "leave them out with --drop-mtp"),
    (replace(SHAPE, moe=MOE, dense_layers=1), None, {}, "qwen3moe: all its layers are mixtures"),
    (replace(SHAPE, moe=replace(MOE, renormalise=False)), None, {}, "always renormalises"),
    (replace(DEEP, norm_eps=1e-5), None, {}, "deepseek2: it has one norm_eps, not 1e-05 and 1e-06"),
    (replace(DEEP, layers=27), None, {}, "takes 27 layers for the small DeepSeek-V2"),
    (DEEP, RopeConfig(scaling=YARN), {}, "mscale and mscale_all_dim must be equal"),
    (replace(DEEP, moe=replace(DEEP.moe, score="softmax")), None, {}, "scores by sigmoid")])
def test_models_llama_cpp_cannot_run(tmp_path, capsys, tokenizer, shape, rope, changes, words):
    source = save_directory(model_of(shape, tokenizer, rope), tokenizer, tmp_path / "source")
    assert main(["convert", str(source), str(tmp_path / "seed"), "--to", "gguf"]) == 2
    err = capsys.readouterr().err
    assert "llama.cpp cannot run this model as" in err and words in err, err
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_reward_model_is_no_language_model(tmp_path, capsys, tokenizer):
    source = save_directory(add_value_head(model_of(SHAPE, tokenizer)), tokenizer, tmp_path / "source")
    assert main(["convert", str(source), str(tmp_path / "seed"), "--to", "gguf"]) == 2
    assert "gives rewards, not texts" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


# ------------------------------------------------------------------------------------------- tokenizer and Modelfile

def test_vocabulary(tmp_path, tokenizer):
    done = save_gguf(loaded(model_of(SHAPE, tokenizer), tokenizer), tmp_path / "seed", kind="f32")
    reader = gguf.GGUFReader(done.path)
    tokens, types = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    assert len(tokens) == len(types) == len(set(tokens)) == tokenizer.vocab_size + 3         # rows to spare are named
    assert types[-3:] == [UNUSED] * 3
    for id, token in tokenizer.tokens.items():
        assert tokens[id] == spell_bytes(token) and types[id] == NORMAL
    for text, id in tokenizer.specials.items():
        assert tokens[id] == text and types[id] == (USER_DEFINED if text in tokenizer.visible else CONTROL)
    assert types[tokenizer.specials["<think>"]] == USER_DEFINED and types[tokenizer.eos_id] == CONTROL
    assert field(reader, "tokenizer.ggml.merges") == [f"{tokens[a]} {tokens[b]}" for a, b in tokenizer.merges]
    assert field(reader, "tokenizer.chat_template") == JINJA and field(reader, "tokenizer.ggml.model") == "gpt2"
    named = [field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")]
    assert named == [1, 2, 0, 0]
    assert field(reader, "tokenizer.ggml.add_bos_token") is False and field(reader, "tokenizer.ggml.pre") == "qwen2"


def with_splitter(tokenizer, *patterns: str, whole_words: bool = False, **more) -> BPE:
    return BPE(tokenizer.tokens, tokenizer.merges, whole_words=whole_words, **{"specials": tokenizer.specials} | more,
               splitter=Splitter(tuple(by_pattern(p) for p in patterns)))


def test_ways_of_cutting_text(tmp_path, tokenizer):
    known = {"qwen2": (QWEN, False), "gpt-2": (GPT2, False), "llama-bpe": (LLAMA3, True), "smaug-bpe": (LLAMA3, False)}
    for name, (pattern, whole) in known.items():
        assert pre_tokenizer(with_splitter(tokenizer, pattern, whole_words=whole)) == name
    for odd in (with_splitter(tokenizer, QWEN, whole_words=True), with_splitter(tokenizer, QWEN, GPT2),
                with_splitter(tokenizer, r"\w+|\W+"), Byte()):
        with pytest.raises(UserError, match="how this tokenizer cuts text before merging; it knows qwen2, gpt-2"):
            save_gguf(loaded(model_of(SHAPE, tokenizer), odd), tmp_path / "seed", kind="f32")
    assert not list(tmp_path.iterdir())


def test_foreign_tokenizers(tmp_path, tokenizer):
    foreign = with_splitter(tokenizer, QWEN, specials={"<s>": 0, "</s>": 1, "<eot>": 2}, visible=frozenset())
    with pytest.raises(UserError, match="nothing says which token ends an answer"):
        save_gguf(loaded(model_of(SHAPE, tokenizer), foreign), tmp_path / "seed", kind="f32")
    done = save_gguf(loaded(model_of(SHAPE, tokenizer), foreign, stop_ids=(1, 2), bos_id=0, chat_template="{{ x }}",
                            sampling={"temperature": 0.6, "top_k": 20}), tmp_path / "seed", kind="f32")
    reader = gguf.GGUFReader(done.path)
    assert [field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot")] == [0, 1, 2]
    assert (tmp_path / "seed" / "Modelfile").read_text() == (
        'FROM ./seed.gguf\nPARAMETER num_ctx 64\nPARAMETER temperature 0.6\nPARAMETER top_k 20\nPARAMETER stop "</s>"\n'
        'PARAMETER stop "<eot>"\n')
    twin = with_splitter(tokenizer, QWEN, specials={"a": 0, "</s>": 1})
    with pytest.raises(UserError, match="special token 'a' is spelt like another token"):
        save_gguf(loaded(model_of(SHAPE, tokenizer), twin, stop_ids=(1,)), tmp_path / "twin", kind="f32")


def test_our_modelfile_speaks_our_chat_format(tmp_path, tokenizer):
    source = save_directory(model_of(SHAPE, tokenizer), tokenizer, tmp_path / "source")
    convert_gguf(source, tmp_path / "seed")
    text = (tmp_path / "seed" / "Modelfile").read_text()
    assert text.startswith("FROM ./seed.gguf\nPARAMETER num_ctx 64\nPARAMETER temperature 0.7\n")
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n' in text
    assert text.endswith('TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n'
                         '{{ end }}<|im_start|>assistant\n"""\n')
