"""Adapters at work: which optimiser they get, how fast layers learn, the engine's answers, model directories."""
from __future__ import annotations

from dataclasses import replace

import pytest

from mindseed.adapt.lora import add_adapter, merge
from mindseed.base.errors import UserError
from mindseed.infer.engine import Engine, EngineConfig, Request
from mindseed.infer.fused import fits
from mindseed.infer.step import flat as flattens
from mindseed.interop.directory import save_directory
from mindseed.models.config import LayerConfig
from mindseed.optim.groups import OptimConfig, parameter_groups
from mindseed.tokenizers.byte import Byte
from tests.oracle import GREEDY, sharp_model
from tests.test_lora import CONFIGS, IDS, shake
from tests.tiny import FFN_KIT, KITS, MIXER_KIT, kit_model, tiny_model

# ----------------------------------------------------------------------------------------------------------- optimisers

def test_adapters_go_to_adamw_whatever_the_matrices_have():
    model = tiny_model()
    add_adapter(model, CONFIGS["dora"])
    groups = parameter_groups(model, OptimConfig(kind="muon", lora_b_lr=16.0))
    assert [(g.name, g.optimizer, g.weight_decay, g.lr_scale) for g in groups] == [
        ("adapters", "adamw", 0.0, 1.0), ("adapters, B", "adamw", 0.0, 16.0)]
    assert all(n.endswith(".B") for n in groups[1].names) and not any(n.endswith(".B") for n in groups[0].names)
    assert len(groups[0].params) == 2 * len(groups[1].params) == 28
    assert sum(g.count for g in groups) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapted", [True, False])
def test_lower_layers_learn_more_slowly(adapted, tied):
    model = tiny_model(layers=3, tied=tied)
    plain = {n: g.lr_scale for g in parameter_groups(model, OptimConfig()) for n in g.names}
    assert set(plain.values()) == {1.0}
    if adapted:
        add_adapter(model)
    groups = parameter_groups(model, OptimConfig(layer_decay=0.5, embedding_lr=3.0))
    rates = {n: g.lr_scale for g in groups for n in g.names}
    assert rates.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, rate in rates.items():
        top = {"blocks.0": 0.25, "blocks.1": 0.5, "blocks.2": 1.0, "embed.weight": 0.125 * 3, "head.weight": 3.0,
               "norm.weight": 1.0}
        assert rate == next(value for start, value in top.items() if name.startswith(start)), name
    assert len({g.name for g in groups}) == len(groups)               # the table tells them apart
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match="layer_decay"):
            OptimConfig(layer_decay=wrong)


# ------------------------------------------------------------------------------------------------------ with the engine

@pytest.mark.parametrize("name", ["gqa", "window", "mla", "mixed", "moe"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_engine_answers_as_with_the_merged_model(name, kind):
    """Whose kernels of its own refuse a model with adapters."""
    model = sharp_model(KITS[name])
    asked = [Request(prompt=IDS[i, :n].tolist(), sampling=GREEDY, max_new=10, stop_ids=())
             for i, n in enumerate((3, 9, 12))]
    plain = Engine(model, None, EngineConfig(block_size=4)).generate(asked)
    fast = fits(model), flattens(model)
    add_adapter(model, CONFIGS[kind])
    shake(model, "default", size=0.05)
    engine = Engine(model, None, EngineConfig(block_size=4))
    assert engine.runner.fused is None and not fits(model) and not flattens(model)
    adapted = engine.generate(asked)
    merge(model)
    assert (fits(model), flattens(model)) == fast
    merged = Engine(model, None, EngineConfig(block_size=4)).generate(asked)
    assert [a.ids for [a] in adapted] == [a.ids for [a] in merged] != [a.ids for [a] in plain]


def test_a_model_with_adapters_is_not_saved_as_if_it_had_none(tmp_path):
    tokenizer = Byte()
    for mixer in ("gqa", "mla"):                                      # a family's layout, and our own
        config = replace(KITS["gqa"], vocab_size=tokenizer.vocab_size,
                         layers=(LayerConfig(mixer=MIXER_KIT[mixer], ffn=FFN_KIT["swiglu"]),))
        model = kit_model(config).float()
        add_adapter(model)
        with pytest.raises(UserError, match="adapters .default..*merge"):
            save_directory(model, tokenizer, tmp_path / mixer)
        merge(model)
        save_directory(model, tokenizer, tmp_path / mixer)
