"""Going on from models of other projects: `train --init` on directories that transformers wrote, and MiniMind's."""
from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from mindseed import cli
from mindseed.base.config import parse
from mindseed.base.errors import UserError
from mindseed.interop.directory import load_directory, save_directory
from mindseed.models.lm import build
from mindseed.models.presets import Shape
from mindseed.recipes.options import TrainOptions
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.chat import JINJA, template_hash
from mindseed.tokenizers.hf_json import load_tokenizer, save_tokenizer
from tests.test_minimind import SHAPES, original

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

COMMON = dict(vocab_size=Byte().vocab_size, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
              pad_token_id=0)
MODELS = {
    "llama": ("Llama", COMMON),
    "qwen3": ("Qwen3", COMMON | {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", COMMON | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
                                        "moe_intermediate_size": 12, "norm_topk_prob": True}),
    "deepseek_v3": ("DeepseekV3", COMMON | {
        "num_key_value_heads": 4, "moe_intermediate_size": 8, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 6,
        "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 6}),
}
TEXTS = [{"text": f"the number {i} and 数字 {i}"} for i in range(20)]
OTHER = ("{% for m in messages %}{{ '<|im_start|>[' + m.role + '] ' + m.content + '<|im_end|>' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>[assistant] ' }}{% endif %}")
CHATS = [{"conversations": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]}
         for i in range(20)]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def go_on(start: Path, data: Path, out: Path, *more: str, flag: str = "--init") -> int:
    return cli.main(["train", flag, str(start), "--data.train", str(data), "--out", str(out), "--data.seq_len", "48",
                     "--data.heldout", "0", "--loop.steps", "2", "--loop.batch", "2", *more])


def logits(folder: Path) -> torch.Tensor:
    ids = torch.arange(40, 60)[None]
    return load_directory(folder).model(ids, torch.arange(20)[None]).logits()


@pytest.mark.parametrize(("rows", "template"), [(TEXTS, OTHER), (CHATS, OTHER), (CHATS, None)],
                         ids=["texts", "chats", "chats and no template"])
@pytest.mark.parametrize("family", MODELS)
def test_a_directory_of_transformers(tmp_path, family, rows, template):
    torch.manual_seed(0)
    kind, settings = MODELS[family]
    theirs = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings)).float()
    theirs.save_pretrained(tmp_path / "start")
    save_tokenizer(Byte(), tmp_path / "start", chat_template=template)
    data = write(tmp_path / "rows.jsonl", rows)
    assert go_on(tmp_path / "start", data, tmp_path / "still", "--optim.lr", "1e-9") == 0
    torch.testing.assert_close(logits(tmp_path / "still" / "model"), logits(tmp_path / "start"), rtol=1e-4, atol=1e-4)
    assert go_on(tmp_path / "start", data, tmp_path / "run", "--optim.lr", "0.01") == 0
    model = tmp_path / "run" / "model"
    assert json.loads((model / "config.json").read_text())["model_type"] == family
    assert load_tokenizer(model).hash() == Byte().hash()
    assert (logits(model) - logits(tmp_path / "start")).abs().max() > 1e-3
    told = load_directory(model)
    assert told.stop_ids == ((2,) if template else (2, 0)) and told.info["parent"] == str(tmp_path / "start")
    if template:                                  # kept, and what the conversations were told in
        assert told.chat_template == template and told.template.hash() == told.template_hash
    elif template is None:                        # trained in our format, so that is the one to talk in
        assert told.chat_template == JINJA and told.template_hash == template_hash()
    again = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(model).float().eval()
    torch.testing.assert_close(again(torch.arange(40, 60)[None]).logits, logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flag", ["--init", "--model.start"])
def test_minimind(tmp_path, capsys, flag):
    """A state dict has no configuration, so it becomes a directory first; their transformers directories do as well."""
    model, state = original(SHAPES["dense"])
    save_tokenizer(Byte(), tmp_path / "model")
    (tmp_path / "out").mkdir()
    torch.save({name: x.half() for name, x in state.items()}, tmp_path / "out" / "pretrain_32.pth")
    data = write(tmp_path / "rows.jsonl", CHATS)
    assert go_on(tmp_path / "out" / "pretrain_32.pth", data, tmp_path / "run", flag=flag) == 2
    said = capsys.readouterr().err
    assert f"mindseed convert {tmp_path}/out/pretrain_32.pth DIRECTORY" in said and not (tmp_path / "run").exists()
    assert cli.main(["convert", str(tmp_path / "out" / "pretrain_32.pth"), str(tmp_path / "start")]) == 0
    assert go_on(tmp_path / "start", data, tmp_path / "run", flag=flag) == 0
    save_tokenizer(Byte(), tmp_path / "hf")
    torch.save(state, tmp_path / "hf" / "pytorch_model.bin")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({
        "model_type": "minimind", "hidden_size": 32, "num_hidden_layers": 3, "vocab_size": model.config.vocab_size,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 40,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True}))
    assert go_on(tmp_path / "hf", data, tmp_path / "run2", flag=flag) == 0


def llama3(folder: Path) -> Path:
    """A Llama whose tokenizer has Llama 3's special tokens, and none of a chat in our format."""
    byte = Byte()
    byte.specials = {"<|begin_of_text|>": 256 + 40, "<|end_of_text|>": 256 + 41, "<|eot_id|>": 256 + 42}
    byte.visible = frozenset()
    kind = transformers.LlamaConfig(**COMMON | {"vocab_size": 299, "bos_token_id": 296, "eos_token_id": [297, 298],
                                                "pad_token_id": None})
    transformers.LlamaForCausalLM(kind).float().save_pretrained(folder)
    save_tokenizer(byte, folder)
    return folder


def test_tokenizers_of_other_families(tmp_path, capsys):
    start = llama3(tmp_path / "start")
    assert go_on(start, write(tmp_path / "texts.jsonl", TEXTS), tmp_path / "run") == 0
    model = tmp_path / "run" / "model"
    told = load_directory(model)
    assert told.tokenizer.hash() == load_tokenizer(start).hash()
    assert told.chat_template is None and told.template_hash is None    # ours cannot be spelt in it
    config, tokens = (json.loads((model / f"{name}.json").read_text()) for name in ("config", "tokenizer_config"))
    assert (config["bos_token_id"], config["eos_token_id"]) == (296, 297) and told.stop_ids == (297, 298)
    assert (tokens["bos_token"], tokens["eos_token"]) == ("<|begin_of_text|>", "<|end_of_text|>")
    assert cli.main(["convert", str(start), str(tmp_path / "copy")]) == 0
    assert load_directory(tmp_path / "copy").stop_ids == (297, 298)     # as the source had them
    capsys.readouterr()
    assert go_on(start, write(tmp_path / "chats.jsonl", CHATS), tmp_path / "chat") == 2
    assert "no special token <|im_start|>" in capsys.readouterr().err
    bare = Byte()
    bare.specials = {}
    save_tokenizer(bare, tmp_path / "bare")
    assert cli.main(["prepare", str(tmp_path / "texts.jsonl"), "--out", str(tmp_path / "p"), "--tokenizer",
                     str(tmp_path / "bare")]) == 2
    assert "no special tokens for the beginning and the end" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_init_is_one_more_name_for_model_start():
    for words in (["--init", "a"], ["--init=a"], ["--model.start", "a"], ["--model.start=a"]):
        assert parse(TrainOptions, words).model.start == "a"
    assert parse(TrainOptions, ["--init", "none"]).model.start is None
    with pytest.raises(UserError, match="--model.init is not an option"):
        parse(TrainOptions, ["--model.init", "a"])
    with pytest.raises(UserError, match="--int is not an option"):
        parse(TrainOptions, ["--int", "a"])


def test_a_plan_is_of_the_model_that_training_would_make(tmp_path, capsys):
    """A mixture made of a dense model, and longer rows, count; what cannot be read is refused before tokenising."""
    start, data = tmp_path / "start", write(tmp_path / "texts.jsonl", TEXTS)
    model = build(Shape(layers=2, dim=16, heads=2, kv_heads=1, head_dim=8, ffn_dim=24).lm_config(
        vocab_size=Byte().vocab_size, seq_len=32), seed=0)
    save_directory(model, Byte(), start)
    asked = ["--init", str(start), "--model.moe.experts", "4", "--data.seq_len", "48", "--loop.steps", "1"]
    assert cli.main(["plan", *asked]) == 0
    planned = re.search(r"total\D+([\d,]+)", capsys.readouterr().out)[1]
    train = ["train", *asked, "--data.train", str(data), "--loop.batch", "2", "--out"]
    assert cli.main([*train, str(tmp_path / "run")]) == 0
    made = load_directory(tmp_path / "run" / "model").model
    assert planned == f"{sum(p.numel() for p in made.parameters()):,}" and made.config.seq_len == 48
    file = start / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    capsys.readouterr()
    assert cli.main([*train, str(tmp_path / "later")]) == 2
    assert "model.safetensors" in capsys.readouterr().err and not (tmp_path / "later" / "data").exists()


def test_a_shape_that_only_we_can_read_is_named_before_it_is_trained(tmp_path, capsys):
    data = write(tmp_path / "texts.jsonl", TEXTS)
    for preset, warned in (("hybrid-linear-toy", True), ("qwen3-toy", False)):
        save_tokenizer(Byte(), tmp_path / "byte")
        assert cli.main(["train", "--model.preset", preset, "--data.tokenizer", str(tmp_path / "byte"), "--data.train",
                         str(data), "--out", str(tmp_path / preset), "--data.seq_len", "48", "--loop.steps", "1",
                         "--loop.batch", "2"]) == 0
        assert ("only mindseed will read the model" in capsys.readouterr().err) == warned


def test_the_width_of_copies_is_not_a_choice(tmp_path, capsys):
    start, data = tmp_path / "start", write(tmp_path / "texts.jsonl", TEXTS)
    model = build(Shape(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, ffn_dim=24).lm_config(
        vocab_size=Byte().vocab_size, seq_len=32), seed=0)
    save_directory(model, Byte(), start)
    assert go_on(start, data, tmp_path / "run", "--model.moe.experts", "4", "--model.moe.expert_dim", "8") == 2
    assert "expert_dim=8 has no effect" in capsys.readouterr().err and not (tmp_path / "run" / "data").exists()
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert cli.main(["chat", str(tmp_path / "x.gguf"), "--prompt", "hi"]) == 2
    assert "is a GGUF file" in capsys.readouterr().err
