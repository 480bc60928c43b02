"""MiniMind's bare state dicts: read without flags, converted with proof, and refused where they are something else."""
from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from mindseed import cli
from mindseed.base.errors import UserError
from mindseed.interop.directory import load_directory
from mindseed.interop.minimind import load_state_dict
from mindseed.interop.qwen3 import QWEN3
from mindseed.interop.qwen3_moe import QWEN3_MOE
from mindseed.interop.rules import translate, write_names
from mindseed.models.config import LMConfig
from mindseed.models.lm import LM, build
from mindseed.models.presets import Shape
from mindseed.nn.moe import MoEConfig
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.hf_json import save_tokenizer
from tests.tiny import randomise

SHAPE = Shape(layers=3, dim=32, heads=4, kv_heads=2, head_dim=6, ffn_dim=40, theta=1e6)
SHAPES = {"dense": SHAPE, "untied": replace(SHAPE, tied=False),
          "mixture": replace(SHAPE, moe=MoEConfig(experts=4, top_k=1, expert_dim=24)),
          "one expert": replace(SHAPE, moe=MoEConfig(experts=1, top_k=1, expert_dim=24))}


def original(shape: Shape) -> tuple[LM, dict[str, torch.Tensor]]:
    """A random model, and the state dict that their scripts would have saved of it."""
    config: LMConfig = shape.lm_config(vocab_size=Byte().vocab_size, seq_len=32768)
    model = build(config)
    randomise(model)
    family = QWEN3_MOE if shape.moe else QWEN3
    tensors = model.state_dict()
    names = translate(family.layout, config, {name: x.shape for name, x in tensors.items()})
    state = write_names(names, tensors)
    return model.eval(), state | ({"lm_head.weight": state["model.embed_tokens.weight"]} if shape.tied else {})


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def saved(request, tmp_path):
    model, state = original(request.param)
    (tmp_path / "out").mkdir()
    (tmp_path / "model").mkdir()
    save_tokenizer(Byte(), tmp_path / "model", chat_template="{# theirs #}")
    torch.save(state, tmp_path / "out" / "full_sft_32.pth")
    return model, tmp_path


def test_everything_is_inferred_from_the_shapes(saved):
    model, folder = saved
    read, family, dtype = load_state_dict(folder / "out" / "full_sft_32.pth")
    assert read.config == model.config and dtype == torch.float32
    ids = torch.randint(0, 200, (2, 11))
    positions = torch.arange(11).expand(2, -1)
    assert torch.equal(read(ids, positions).logits(), model(ids, positions).logits())


def test_convert_needs_no_flags(saved, capsys):
    model, folder = saved
    assert cli.main(["convert", str(folder / "out" / "full_sft_32.pth"), str(folder / "copy")]) == 0
    assert "logits of the copy: equal" in capsys.readouterr().out
    copy = load_directory(folder / "copy")
    assert copy.chat_template == "{# theirs #}" and copy.template is not None
    assert all(torch.equal(x, copy.model.state_dict()[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("name", ["dense", "mixture"])
@pytest.mark.parametrize("half", [False, True])
def test_their_transformers_directories(tmp_path, name, half):
    model, state = original(SHAPES[name])
    c = model.config
    save_tokenizer(Byte(), tmp_path)
    torch.save({key: x.half() if half else x for key, x in state.items()}, tmp_path / "pytorch_model.bin")
    moe = {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 24, "norm_topk_prob": True}
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "minimind", "architectures": ["MiniMindForCausalLM"], "hidden_size": 32, "num_hidden_layers": 3,
        "use_moe": name == "mixture", "vocab_size": c.vocab_size, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 6, "hidden_act": "silu", "intermediate_size": 40, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": None, "tie_word_embeddings": True} | moe))
    loaded = load_directory(tmp_path)
    assert loaded.model.config == c and loaded.dtype == (torch.float16 if half else torch.float32)
    for key, x in model.state_dict().items():
        close = 1e-3 if half else 0
        torch.testing.assert_close(loaded.model.state_dict()[key], x, rtol=close, atol=close)


class Spy:
    def __reduce__(self):
        return print, ("code of a stranger has run",)


@pytest.mark.parametrize("contents, words", [
    ({"model.embed_tokens.weight": Spy()}, "a stranger's code"),
    ({"weights": torch.ones(1)}, "has no model.embed_tokens.weight"),
    ({"weights": torch.ones(2, 2).to_sparse()}, "weights is not a plain tensor"),
    ({"weights": torch.ones(2, 2, device="meta")}, "weights is not a plain tensor"),
    ([torch.ones(1)], "no bare state dict"),
    ({"model": {"embed": torch.ones(1)}}, "no bare state dict")])
def test_other_pickles_are_refused(tmp_path, capsys, contents, words):
    torch.save(contents, tmp_path / "x.pth")
    with pytest.raises(UserError, match=words):
        load_state_dict(tmp_path / "x.pth")
    assert capsys.readouterr().out == ""


def test_older_layouts_truncated_files_and_missing_tokenizers(tmp_path, capsys):
    _, state = original(SHAPE)
    torch.save({k: x for k, x in state.items() if "q_norm" not in k}, tmp_path / "old.pth")
    with pytest.raises(UserError, match="number of heads cannot be inferred"):
        load_state_dict(tmp_path / "old.pth")
    torch.save({k: x for k, x in state.items() if k != "model.layers.1.self_attn.k_proj.weight"}, tmp_path / "gap.pth")
    with pytest.raises(UserError, match="1 missing: model.layers.1.self_attn.k_proj.weight"):
        load_state_dict(tmp_path / "gap.pth")
    torch.save(state | {"model.layers.99999999999999999999.foo": torch.ones(1)}, tmp_path / "deep.pth")
    with pytest.raises(UserError, match="names a layer 99999999999999999999"):
        load_state_dict(tmp_path / "deep.pth")
    torch.save(state, tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[:len(data) // 2])
    with pytest.raises(UserError, match="truncated"):
        load_state_dict(tmp_path / "cut.pth")
    assert cli.main(["convert", str(tmp_path / "whole.pth"), str(tmp_path / "copy")]) == 2
    assert "--tokenizer DIR" in capsys.readouterr().err and not (tmp_path / "copy").exists()
