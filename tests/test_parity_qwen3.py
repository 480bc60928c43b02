"""Both directions against transformers: our directory in theirs, theirs in ours, tokenizer and chat included."""
from __future__ import annotations

import json

import pytest
import torch

from mindseed.infer.generate import generate
from mindseed.infer.sample import Sampling
from mindseed.interop.directory import load_directory, save_directory
from mindseed.models.lm import build
from mindseed.models.presets import PRESETS, Shape
from mindseed.tokenizers.bpe_train import train
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.chat import render
from mindseed.tokenizers.hf_json import save_tokenizer
from tests.tiny import randomise

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()                     # so that what it prints are warnings
pytestmark = pytest.mark.parity

CLOSE = {"rtol": 1e-5, "atol": 3e-5}           # some CPUs sum in another order
SHAPES = {
    "tied": Shape(layers=3, dim=48, heads=4, kv_heads=2, head_dim=12, ffn_dim=80),
    "untied": Shape(layers=2, dim=40, heads=4, kv_heads=4, head_dim=10, ffn_dim=64, tied=False),
    "one kv head, wide heads": Shape(layers=2, dim=32, heads=6, kv_heads=1, head_dim=24, ffn_dim=56, theta=1e6),
    "large epsilon, small theta": Shape(layers=2, dim=32, heads=2, kv_heads=1, head_dim=32, ffn_dim=40, theta=100.0,
                                        norm_eps=1e-2),
    "toy preset": PRESETS["toy"],
}
CHATS = [
    [{"role": "user", "content": "Who is Ada?"}],
    [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": "你好 <b>x</b> & 'y'"},
     {"role": "assistant", "content": "您好！", "reasoning_content": "a greeting"}, {"role": "user", "content": "2+2?"}],
    [{"role": "user", "content": "weather?"},
     {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": {"city": "巴黎", "n": 1}}]},
     {"role": "tool", "content": "{\"c\": 7}"}, {"role": "assistant", "content": "7", "reasoning_content": ""}],
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def tokenizer():
    return train(["the seed grows and the trees grow; who is Ada? 种子发芽，模型生长。"] * 9, vocab_size=360)


def ours(shape: Shape, vocab_size: int):
    model = build(shape.lm_config(vocab_size=vocab_size, seq_len=64))
    randomise(model)
    return model.eval()


def load_theirs(folder):
    """As transformers reads it, with proof that it used every tensor and missed none."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                                      output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert type(model).__name__ == "Qwen3ForCausalLM"
    return model.eval()


def some_ids(vocab_size: int, shape=(2, 19)):
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(7))


def our_logits(model, ids):
    return model(ids, torch.arange(ids.shape[1]).expand_as(ids)).logits()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_our_directory_has_the_same_logits_and_gradients_there(tmp_path, tokenizer, shape, capfd, recwarn):
    model = ours(shape, tokenizer.vocab_size)
    there = load_theirs(save_directory(model, tokenizer, tmp_path / "m"))
    assert capfd.readouterr().err == "" and not [w for w in recwarn if "transformers" in str(w.filename)]
    ids = some_ids(tokenizer.vocab_size)
    got, want = there(ids).logits, our_logits(model, ids)
    torch.testing.assert_close(got, want, **CLOSE)
    pull = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
    (got * pull).sum().backward()
    (want * pull).sum().backward()
    layer = there.model.layers[1]
    pairs = {"embed": (there.model.embed_tokens, model.embed), "norm": (there.model.norm, model.norm),
             "in": (layer.input_layernorm, model.blocks[1].mixer_norm),
             "post": (layer.post_attention_layernorm, model.blocks[1].ffn_norm)}
    for name in "qkvo":
        pairs[name] = getattr(layer.self_attn, f"{name}_proj"), getattr(model.blocks[1].mixer, name)
    for name in ("q_norm", "k_norm"):
        pairs[name] = getattr(layer.self_attn, name), getattr(model.blocks[1].mixer, name)
    for name in ("gate", "up", "down"):
        pairs[name] = getattr(layer.mlp, f"{name}_proj"), getattr(model.blocks[1].ffn, name)
    for name, (a, b) in pairs.items():
        scale = a.weight.grad.abs().max()
        torch.testing.assert_close(a.weight.grad / scale, b.weight.grad / scale, **CLOSE, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("old", [False, True], ids=["rope_parameters", "rope_theta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied, head_dim, sharded", [(True, 16, False), (False, 10, True)])
def test_their_directory_has_the_same_logits_here(tmp_path, tied, head_dim, sharded, dtype, old):
    config = transformers.Qwen3Config(
        vocab_size=331, hidden_size=40, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=head_dim, max_position_embeddings=96, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 3e5}, tie_word_embeddings=tied, eos_token_id=[2, 0])
    there = transformers.Qwen3ForCausalLM(config).to(dtype).eval()
    randomise(there)
    there.save_pretrained(tmp_path, max_shard_size="60KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    save_tokenizer(Byte(), tmp_path)
    if old:
        data = json.loads((tmp_path / "config.json").read_text())
        data["rope_theta"] = data.pop("rope_parameters")["rope_theta"]
        (tmp_path / "config.json").write_text(json.dumps(data))
    loaded = load_directory(tmp_path)
    assert loaded.dtype == dtype and loaded.stop_ids == (2, 0) and loaded.model.config.seq_len == 96
    ids = some_ids(331)
    torch.testing.assert_close(our_logits(loaded.model, ids), load_theirs(tmp_path)(ids).logits, **CLOSE)


def test_there_and_back_keeps_every_bit(tmp_path, tokenizer):
    model = ours(SHAPES["untied"], tokenizer.vocab_size)
    there = load_theirs(save_directory(model, tokenizer, tmp_path / "a"))
    there.save_pretrained(tmp_path / "b")
    save_tokenizer(tokenizer, tmp_path / "b")
    back = load_directory(tmp_path / "b").model
    assert back.config == model.config
    assert all(torch.equal(x, back.state_dict()[name]) for name, x in model.state_dict().items())


def test_autotokenizer_reads_the_directory(tmp_path, tokenizer):
    folder = save_directory(ours(SHAPES["tied"], tokenizer.vocab_size), tokenizer, tmp_path / "m")
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    assert auto.model_max_length == 64
    for text in ("the seed grows", "种子 and 🙂\n\n  x", "it's 12345"):
        assert auto(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
        assert auto.decode(tokenizer.encode(text)) == text
    for messages in CHATS:
        for options in ({}, {"tools": TOOLS}):
            want = "".join(span.text for span in render(messages, **options, generation_prompt=True))
            assert auto.apply_chat_template(messages, **options, add_generation_prompt=True, tokenize=False) == want


def test_greedy_generation_is_the_same_and_stops_there(tmp_path, tokenizer):
    model = ours(SHAPES["tied"], tokenizer.vocab_size)
    there = load_theirs(save_directory(model, tokenizer, tmp_path / "m"))
    assert there.generation_config.eos_token_id == [2, 0]
    prompt = [1, *tokenizer.encode("the seed")]
    [free] = generate(model, tokenizer, [prompt], sampling=Sampling(temperature=0), max_new=24, stop_ids=())
    theirs = there.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert theirs[0, len(prompt):].tolist() == free.ids
