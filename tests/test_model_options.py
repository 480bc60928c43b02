"""Every option of a model's architecture reaches the configuration, and what contradicts itself says so."""
from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Literal, get_args, get_origin

import pytest

from mindseed import cli
from mindseed.base.config import leaves, parse
from mindseed.base.errors import UserError
from mindseed.models.config import LMConfig
from mindseed.models.presets import PRESETS
from mindseed.nn.alibi import AlibiConfig
from mindseed.nn.linear_attention import DeltaConfig
from mindseed.recipes.model_options import ModelOptions
from mindseed.recipes.options import TrainOptions

MOE, MLA = "--model.moe.experts 4", "--model.mla.kv_rank 8"
# option -> (its value, options it needs, where in the configuration it is found, what stands there)
CASES = {
    "preset": ("mini", "", "dim", 512),
    "layers": (3, "", "layers", 3),
    "dim": (72, "", "dim", 72),
    "heads": (8, "", "layers.0.mixer.heads", 8),
    "kv_heads": (3, "", "layers.0.mixer.kv_heads", 3),
    "head_dim": (20, "", "layers.0.mixer.head_dim", 20),
    "ffn_dim": (40, "", "layers.0.ffn.ffn_dim", 40),
    "theta": (5e4, "", "layers.0.mixer.positions.theta", 5e4),
    "tied": ("false", "", "tied", False),
    "qk_norm": ("false", "", "layers.0.mixer.qk_norm", False),
    "pattern": ("LD", "", "layers.1.mixer.__class__", DeltaConfig),
    "window": (7, "--model.pattern SL", "layers.2.mixer.window", 7),
    "positions": ("alibi", "", "layers.0.mixer.positions.__class__", AlibiConfig),
    "norm": ("layer", "", "norm", "layer"),
    "placement": ("sandwich", "", "placement", "sandwich"),
    "activation": ("relu2", "", "layers.0.ffn.activation", "relu2"),
    "mtp": (2, "", "mtp", 2),
    "mtp_weight": (0.7, "--model.mtp 1", "mtp_weight", 0.7),
    "dropout": (0.25, "", "dropout", 0.25),
    "moe.experts": (6, "", "layers.3.ffn.experts", 6),
    "moe.top_k": (3, MOE, "layers.0.ffn.top_k", 3),
    "moe.expert_dim": (24, MOE, "layers.0.ffn.expert_dim", 24),
    "moe.shared_dim": (12, MOE, "layers.0.ffn.shared_dim", 12),
    "moe.score": ("sigmoid", MOE, "layers.0.ffn.score", "sigmoid"),
    "moe.renormalise": ("false", MOE, "layers.0.ffn.renormalise", False),
    "moe.scaling": (2.5, MOE, "layers.0.ffn.scaling", 2.5),
    "moe.groups": (2, MOE, "layers.0.ffn.groups", 2),
    "moe.top_groups": (2, f"{MOE} --model.moe.groups 2", "layers.0.ffn.top_groups", 2),
    "moe.bias": ("true", MOE, "layers.0.ffn.bias", True),
    "moe.bias_rate": (0.5, f"{MOE} --model.moe.bias", "layers.0.ffn.bias_rate", 0.5),
    "moe.balance_weight": (0.3, MOE, "layers.0.ffn.balance_weight", 0.3),
    "moe.sequence_weight": (0.3, MOE, "layers.0.ffn.sequence_weight", 0.3),
    "moe.z_weight": (0.3, MOE, "layers.0.ffn.z_weight", 0.3),
    "mla.kv_rank": (8, "", "layers.0.mixer.kv_rank", 8),
    "mla.q_rank": (6, MLA, "layers.0.mixer.q_rank", 6),
    "mla.rope_dim": (4, MLA, "layers.0.mixer.rope_dim", 4),
}


def config(words: str) -> LMConfig:
    options = parse(TrainOptions, words.split())
    return options.model.shape(options.depth).lm_config(vocab_size=100, seq_len=32)


def found(config: LMConfig, path: str):
    def step(value, name):
        return value[int(name)] if name.isdigit() else getattr(value, name)
    value = reduce(step, path.split("."), config)
    return len(value) if isinstance(value, tuple) else value


def test_every_option_has_its_case():
    assert set(CASES) == {leaf.name for leaf in leaves(ModelOptions)} - {"start", "extend"}    # those bring a shape


@pytest.mark.parametrize("options", [TrainOptions, *(cli.load(name).Options for name in cli.RECIPES)])
def test_no_choice_is_called_none(options):
    """The word means None in options, so that choice could not be chosen (as positions once could not be none)."""
    for leaf in leaves(options):
        choices = [word for kind in (leaf.type, *get_args(leaf.type)) if get_origin(kind) is Literal
                   for word in get_args(kind)]
        assert "none" not in choices, leaf.name


def test_positions_and_switches_as_they_are_typed():
    assert config("--model.positions nope").layers[0].mixer.positions is None
    assert config("--model.positions learned").learned_positions
    assert config("--model.positions none") == config("")
    for words, bias in (("--model.moe.bias", True), ("--model.moe.no_bias", False), ("--model.moe.bias=yes", True),
                        ("--model.moe.bias --model.moe.top_k 2", True), ("--model.moe.bias none", False)):
        assert config(f"{MOE} {words}").layers[0].ffn.bias is bias


@pytest.mark.parametrize("name", CASES)
def test_every_option_reaches_the_configuration(name):
    value, needs, path, want = CASES[name]
    after = config(f"{needs} --model.{name} {value}")
    assert found(after, path) == want
    if name not in ("pattern", "window"):                             # which are nothing without each other
        before = config(needs)
        assert before != after
    if name == "preset":
        assert after == PRESETS["mini"].lm_config(vocab_size=100, seq_len=32)


@pytest.mark.parametrize("name", [name for name in CASES if name != "preset"])
def test_an_option_given_over_a_preset_that_has_it_changes_nothing_else(name):
    """Over the largest preset of the kind, so that a mixture and a latent are overridden, not made anew."""
    preset = "deepseek-v3-mini" if name.startswith(("moe.", "mla.")) else "mini"
    value, needs, path, want = CASES[name]
    words = "" if preset.startswith("deepseek") else needs
    words += " --model.moe.top_groups 2" if name == "moe.groups" else ""
    if name == "moe.experts":
        value, want = 8, 8
    if name == "kv_heads":
        value, want = 4, 4
    path = path.replace("layers.0", "layers.2") if name != "window" else path
    after = config(f"--model.preset {preset} {words} --model.{name} {value}")
    assert found(after, path) == want
    base = PRESETS[preset].lm_config(vocab_size=100, seq_len=32)
    if preset.startswith("deepseek"):
        part = name.split(".")[0]
        theirs, ours = ((layer.ffn if part == "moe" else layer.mixer) for layer in (base.layers[2], after.layers[2]))
        assert replace(ours, **{path.split(".")[-1]: getattr(theirs, path.split(".")[-1])}) == theirs


@pytest.mark.parametrize("words, message", [
    ("--model.moe.experts 4 --model.moe.top_k 5", "top_k=5 must lie between 1 and experts=4"),
    ("--model.moe.experts 4 --model.moe.top_k 0", "top_k=0 must be at least 1"),
    ("--model.moe.experts 0", "experts=0"),
    ("--model.extend", "model.extend has no effect without model.start"),
    ("--model.moe.top_k 2", "model.moe.top_k has no effect without model.moe.experts"),
    ("--model.moe.experts 4 --model.moe.groups 3", "groups=3 must divide experts=4"),
    ("--model.moe.experts 4 --model.moe.groups 4 --model.moe.top_groups 2", "one expert a group"),
    ("--model.moe.experts 4 --model.moe.bias_rate 0.1", "model.moe.bias_rate has no effect.*model.moe.bias"),
    ("--model.moe.experts 4 --model.moe.bias_rate 0.1 --model.moe.bias false", "model.moe.bias_rate has no effect"),
    ("--model.moe.experts 4 --model.activation gelu", "model.activation has no effect.*mixture"),
    ("--model.moe.experts 4 --model.moe.expert_dim 8 --model.ffn_dim 9", "model.ffn_dim has no effect.*expert_dim"),
    ("--model.preset qwen3-moe --model.ffn_dim 100", "model.ffn_dim has no effect.*expert_dim"),
    ("--model.preset deepseek-v3 --model.moe.experts 10", "groups=4 must divide experts=10"),
    ("--model.mla.q_rank 3", "model.mla.q_rank has no effect without model.mla.kv_rank"),
    ("--model.mla.rope_dim 4", "model.mla.rope_dim has no effect without model.mla.kv_rank"),
    (f"{MLA} --model.mla.rope_dim 3", "rope_dim=3 must be even"),
    (f"{MLA} --model.pattern S --model.window 3", "latent attention looks at the whole past"),
    (f"{MLA} --model.positions alibi", "latent attention looks at the whole past and rotates"),
    (f"{MLA} --model.qk_norm true", "model.qk_norm has no effect: latent attention"),
    (f"{MLA} --model.kv_heads 3", "model.kv_heads has no effect: latent attention"),
    ("--model.window 3", "model.window=3 has no effect: no layer of model.pattern=L is an S"),
    ("--model.pattern SL", "say how many tokens with model.window"),
    ("--model.pattern SL --model.window 0", "window=0 must be at least 1"),
    ("--model.pattern SXL", "model.pattern='SXL' is made of L .* S .* and D"),
    ("--model.pattern D --model.theta 5", "model.theta has no effect"),
    ("--model.pattern D --model.positions alibi", "model.positions has no effect"),
    ("--model.pattern D --model.qk_norm false", "model.qk_norm has no effect: linear"),
    ("--model.positions nope --model.theta 5", "model.theta has no effect"),
    ("--model.mtp -1", "model.mtp=-1 must not be negative"),
    ("--model.mtp_weight 0.5", "model.mtp_weight has no effect.*model.mtp"),
    ("--model.mtp 1 --model.mtp_weight -1", "mtp_weight=-1.0 must not be negative"),
    ("--model.heads 5 --model.kv_heads 2", "heads=5 must be a multiple of kv_heads=2"),
    ("--model.head_dim 7", "head_dim=7 must be even"),
    ("--model.layers 0", "number of layers .0."),
    ("--model.theta 0", "theta=0.0 must be above 1"),
    ("--model.dropout 1.5", r"dropout=1.5 must lie in \[0, 1\)"),
    ("--model.preset toyy", "model.preset='toyy' is not known"),
    ("--model.preset toy --depth 2", "--depth 2 and --model.preset toy both choose a shape"),
])
def test_contradictions_say_which_option(words, message):
    with pytest.raises(UserError, match=message) as caught:
        config(words)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("words", [
    "--model.pattern DL --model.theta 5 --model.qk_norm false --model.positions rope",
    "--model.pattern D --model.positions learned", "--model.pattern D --model.mtp 1 --model.theta 99",
    f"{MLA} --model.pattern DL --model.kv_heads 3", f"{MOE} --model.ffn_dim 100",
    "--model.preset deepseek-v3 --model.ffn_dim 100 --model.activation gelu --model.mtp_weight 0.1"])
def test_an_option_that_one_layer_heeds_is_no_mistake(words):
    config(words)


def test_a_contradiction_leaves_with_exit_code_2(capsys):
    assert cli.main(["plan", "--model.moe.experts", "4", "--model.moe.top_k", "5"]) == 2
    assert capsys.readouterr().err == "error: this model cannot be built: top_k=5 must lie between 1 and experts=4\n"
