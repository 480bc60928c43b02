"""GGUF files, read back with the library of the format: names, numbers, rounding, and what is refused."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mindseed.base.errors import UserError
from mindseed.interop.gguf import save_gguf
from mindseed.models.lm import build
from mindseed.models.presets import LatentShape, Shape
from mindseed.nn.moe import MoEConfig
from mindseed.nn.rope import DynamicScaling, Llama3Scaling, RopeConfig, YarnScaling
from mindseed.tokenizers.bpe_train import train
from mindseed.tokenizers.byte import Byte
from tests.tiny import randomise

gguf = pytest.importorskip("gguf")

SHAPE = Shape(layers=2, dim=64, heads=4, kv_heads=2, head_dim=16, ffn_dim=96)
MOE = MoEConfig(experts=4, top_k=2, expert_dim=32)
SHAPES = {
    "qwen3": SHAPE,
    "llama": replace(SHAPE, qk_norm=False, tied=False),
    "qwen3moe": replace(SHAPE, moe=MOE),
    "deepseek2": replace(SHAPE, kv_heads=4, qk_norm=False, dense_layers=1, mtp=1,
                         latent=LatentShape(kv_rank=32, q_rank=32, rope_dim=8),
                         moe=replace(MOE, shared_dim=64, score="sigmoid", bias=True, groups=2, scaling=2.5)),
}


@pytest.fixture(scope="module")
def tokenizer():
    return train(["the seed grows and the trees grow; who is Ada? 种子发芽，模型生长。"] * 9, vocab_size=352)


def model_of(shape: Shape, tokenizer, rope: RopeConfig | None = None):
    config = shape.lm_config(vocab_size=tokenizer.vocab_size, seq_len=64)
    if rope is not None:
        config = replace(config, layers=tuple(replace(layer, mixer=replace(layer.mixer, positions=rope))
                                              for layer in config.layers))
    model = build(config)
    randomise(model)
    return model


def field(reader, key: str):
    return reader.get_field(key).contents()


@pytest.mark.parametrize("kind, error", [("f32", 0), ("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 1e-2)])
@pytest.mark.parametrize("architecture", SHAPES)
def test_what_is_written_is_read_back(tmp_path, tokenizer, architecture, kind, error):
    model = model_of(SHAPES[architecture], tokenizer)
    written = save_gguf(model, tokenizer, tmp_path / "m.gguf", kind=kind, chat_template="{{ messages }}")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert field(reader, "general.architecture") == architecture
    assert field(reader, "tokenizer.chat_template") == "{{ messages }}"
    assert field(reader, "tokenizer.ggml.pre") == "qwen2" and field(reader, "tokenizer.ggml.eos_token_id") == 2
    held = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    assert len(held) == len(written) and all(tuple(held[w.theirs].shape) == w.shape for w in written)
    embed = model.embed.weight.detach()
    torch.testing.assert_close(held["token_embd.weight"], embed, rtol=error, atol=error)
    state = model.state_dict()
    for w in written:                                                    # permutations and cuts keep every number
        if w.ours in state and "kv_up" not in w.ours:
            torch.testing.assert_close(held[w.theirs].flatten().sort()[0], state[w.ours].float().flatten().sort()[0],
                                       rtol=error, atol=error)
    assert (tmp_path / "Modelfile").read_text().startswith("FROM ./m.gguf\n")


def test_halves_become_pairs_for_llama(tmp_path, tokenizer):
    model = model_of(SHAPES["llama"], tokenizer)
    save_gguf(model, tokenizer, tmp_path / "m.gguf", kind="f32")
    held = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    k = model.blocks[0].mixer.k.weight.detach()                          # 2 heads of 16
    assert torch.equal(held["blk.0.attn_k.weight"][16:20], k[[16, 24, 17, 25]])
    assert torch.equal(held["blk.0.attn_v.weight"], model.blocks[0].mixer.v.weight)


def test_latents_are_kept_absorbed(tmp_path, tokenizer):
    model = model_of(SHAPES["deepseek2"], tokenizer)
    save_gguf(model, tokenizer, tmp_path / "m.gguf", kind="f32")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    held = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    up = model.blocks[0].mixer.kv_up.weight.detach().view(4, 32, 32)
    assert torch.equal(held["blk.0.attn_k_b.weight"], up[:, :16].mT)
    assert torch.equal(held["blk.0.attn_v_b.weight"], up[:, 16:])
    assert not any(name.startswith("blk.2") for name in held)            # prediction modules stay behind
    assert field(reader, "deepseek2.attention.key_length") == 40 and field(reader, "deepseek2.expert_gating_func") == 2


def test_scalings_of_rope(tmp_path, tokenizer):
    yarn = RopeConfig(scaling=YarnScaling(factor=4.0, original=16, attention_factor=1.2))
    save_gguf(model_of(SHAPE, tokenizer, yarn), tokenizer, tmp_path / "y.gguf")
    reader = gguf.GGUFReader(tmp_path / "y.gguf")
    assert field(reader, "qwen3.rope.scaling.type") == "yarn"
    assert field(reader, "qwen3.rope.scaling.attn_factor") == pytest.approx(1.2 / (0.1 * 1.3862944 + 1))
    llama3 = RopeConfig(scaling=Llama3Scaling(factor=8.0, original=16))
    save_gguf(model_of(SHAPE, tokenizer, llama3), tokenizer, tmp_path / "l.gguf")
    divisors = next(t for t in gguf.GGUFReader(tmp_path / "l.gguf").tensors if t.name == "rope_freqs.weight").data
    assert divisors.shape == (8,) and 1 <= divisors.min() < 2 and divisors.max() == pytest.approx(8)


@pytest.mark.parametrize("shape, rope, words", [
    (replace(SHAPE, pattern="SL", window=8), None, "no sliding windows"),
    (replace(SHAPE, pattern="DL"), None, "grouped-query attention, not DeltaConfig"),
    (SHAPE, RopeConfig(scaling=DynamicScaling(factor=2.0, original=64)), "no dynamic rope scaling")])
def test_models_llama_cpp_cannot_run(tmp_path, tokenizer, shape, rope, words):
    with pytest.raises(UserError, match=words):
        save_gguf(model_of(shape, tokenizer, rope), tokenizer, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_other_kinds_and_tokenizers_are_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match="'q4_k' is not a kind.*llama-quantize"):
        save_gguf(model_of(SHAPE, tokenizer), tokenizer, tmp_path / "m.gguf", kind="q4_k")
    with pytest.raises(UserError, match="how this tokenizer cuts"):
        save_gguf(model_of(SHAPE, Byte()), Byte(), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())
