"""Adapters against PEFT: the same arithmetic with the same tensors, and files that either side reads from the other."""
from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindseed.adapt.lora import LoRAConfig, add_adapter, adapters_of, merge, parts_of, set_active, unmerge
from mindseed.adapt.peft import load_adapter, save_adapter
from mindseed.base.errors import UserError
from mindseed.interop.directory import load_directory, save_directory
from mindseed.models.config import LMConfig
from mindseed.models.heads import add_value_head
from mindseed.models.lm import LM, build
from mindseed.models.presets import Shape
from mindseed.quant.linear import quantize_model
from mindseed.tokenizers.byte import Byte
from tests.test_lora import shake
from tests.tiny import FFN_KIT, kit, randomise

TOKENIZER = Byte()
V = TOKENIZER.vocab_size
SHAPE = dict(layers=2, dim=32, heads=4, kv_heads=2, head_dim=8, ffn_dim=48)
IDS = torch.randint(0, 200, (2, 11), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.arange(11).expand(2, 11)
CONFIGS = {"lora": LoRAConfig(rank=3, alpha=7.0), "rslora": LoRAConfig(rank=4, alpha=3.0, rs=True),
           "dora": LoRAConfig(rank=3, dora=True), "both": LoRAConfig(rank=2, dora=True, rs=True),
           "part": LoRAConfig(rank=2, targets=("blocks.1.mixer.q", "down"))}
CLOSE = dict(rtol=1e-4, atol=1e-4)


def model_of(qk_norm: bool = True, seed: int = 0, **changes) -> LM:
    """A tiny Qwen3, or without QK-norm a Llama."""
    model = build(Shape(**SHAPE | {"qk_norm": qk_norm} | changes).lm_config(vocab_size=V, seq_len=32))
    randomise(model, seed)
    return model.eval()


def moe_model() -> LM:
    moe = dict(FFN_KIT)["moe"]
    config = kit("gqa", "gqa", vocab_size=V)
    layers = tuple(type(layer)(mixer=layer.mixer, ffn=type(moe)(experts=4, top_k=2, expert_dim=20))
                   for layer in config.layers)
    model = build(LMConfig(**vars(config) | {"layers": layers}))
    randomise(model)
    return model.eval()


def logits(model: LM) -> torch.Tensor:
    return model(IDS, POSITIONS).logits()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, object]:
    """Model directories that both sides read."""
    where = tmp_path_factory.mktemp("bases")
    return {name: save_directory(model, TOKENIZER, where / name)
            for name, model in (("qwen3", model_of()), ("llama", model_of(False)), ("moe", moe_model()))}


# --------------------------------------------------------------------------------------------------- PEFT's arithmetic

@pytest.mark.parity
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "both"])
def test_forward_gradients_and_merged_weights_are_pefts(kind):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config, g = CONFIGS[kind], torch.Generator().manual_seed(2)

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = torch.nn.Linear(20, 14, bias=False, dtype=torch.float64)

        def forward(self, x):
            return self.q(x)

    holder = Holder()
    W = holder.q.weight.detach().clone()
    theirs = peft.get_peft_model(holder, peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, use_rslora=config.rs, use_dora=config.dora, target_modules=["q"],
        init_lora_weights="gaussian"))
    layer = theirs.base_model.model.q
    model = build(Shape(**SHAPE | {"layers": 1, "dim": 20, "head_dim": 14, "heads": 1, "kv_heads": 1}).lm_config(
        vocab_size=V, seq_len=8)).double()
    linear = model.blocks[0].mixer.q
    with torch.no_grad():
        linear.weight.copy_(W)
    add_adapter(model, LoRAConfig(**vars(config) | {"targets": ("q",)}))
    part = linear.adapter.parts["default"]
    pairs = [(part.A, layer.lora_A["default"].weight), (part.B, layer.lora_B["default"].weight)]
    if config.dora:
        torch.testing.assert_close(part.magnitude, layer.lora_magnitude_vector["default"].weight.double())   # at first
        pairs.append((part.magnitude, layer.lora_magnitude_vector["default"].weight))
    layer.to(torch.float64)
    with torch.no_grad():
        for ours, other in pairs:
            ours.add_(torch.randn(ours.shape, generator=g, dtype=torch.float64), alpha=0.3)
            other.data = ours.detach().clone()
    x = torch.randn(3, 5, 20, generator=g, dtype=torch.float64)
    pull = torch.randn(3, 5, 14, generator=g, dtype=torch.float64)
    one, two = (x.clone().requires_grad_() for _ in range(2))
    y, z = linear(one), theirs(two)
    torch.testing.assert_close(y, z, rtol=1e-11, atol=1e-11)
    (y * pull).sum().backward()
    (z * pull).sum().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-10, atol=1e-10)
    for ours, other in pairs:
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-10, atol=1e-10)
    merged = merge(model)
    layer.merge()
    torch.testing.assert_close(linear.weight, layer.base_layer.weight, rtol=1e-11, atol=1e-11)
    unmerge(merged)
    assert torch.equal(linear.weight, W)


@pytest.mark.parity
def test_several_adapters_are_pefts_sum():
    """There DoRA stretches all that was added before it, so that order counts; here it stretches the base alone, which
    is what DoRA at the first place does there."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers")
    there, model = their_model(transformers), model_of()
    theirs = peft.get_peft_model(there, peft.LoraConfig(r=3, target_modules=["q_proj"], lora_alpha=6))
    theirs.add_adapter("b", peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], use_dora=True))
    for name, config in (("default", LoRAConfig(rank=3, alpha=6.0, targets=("q",))),
                         ("b", LoRAConfig(rank=2, alpha=8.0, dora=True, targets=("q", "up")))):
        add_adapter(model, config, name)
        shake(model, name)
        for i, layer in enumerate(there.model.layers):
            for linear, other in ((model.blocks[i].mixer.q, layer.self_attn.q_proj), (model.blocks[i].ffn.up,
                                                                                     layer.mlp.up_proj)):
                if linear.adapter is not None and name in linear.adapter.parts:
                    part = linear.adapter.parts[name]
                    other.lora_A[name].weight.data.copy_(part.A)
                    other.lora_B[name].weight.data.copy_(part.B)
                    if part.magnitude is not None:
                        other.lora_magnitude_vector[name].weight.data.copy_(part.magnitude)
    set_active(model, {"default": 1.0, "b": 1.0})
    theirs.base_model.set_adapter(["b", "default"])
    with torch.no_grad():
        torch.testing.assert_close(logits(model), theirs(IDS).logits, **CLOSE)


def their_model(transformers):
    """Transformers' model with the weights of `model_of()`."""
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        save_directory(model_of(), TOKENIZER, f"{folder}/model")
        return transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model").eval()


# ------------------------------------------------------------------------------------------------------- files, to PEFT

@pytest.mark.parity
@pytest.mark.parametrize("base, kind", [(base, kind) for base in ("qwen3", "llama") for kind in CONFIGS]
                         + [("moe", "lora"), ("moe", "attention")])
def test_peft_reads_our_adapters_and_computes_the_same(tmp_path, folders, base, kind):
    """Routed experts, too, which it stacks while reading."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers")
    model = load_directory(folders[base]).model
    before = logits(model)
    add_adapter(model, CONFIGS.get(kind) or LoRAConfig(rank=2, targets=("q", "v")))
    shake(model, "default")
    with torch.no_grad():
        ours = logits(model)
    assert (ours - before).abs().max() > 0.5
    save_adapter(model, tmp_path / "a", base=str(folders[base]), info={"steps": 7})
    there = transformers.AutoModelForCausalLM.from_pretrained(folders[base]).eval()
    theirs = peft.PeftModel.from_pretrained(there, tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, ours, **CLOSE)
    told = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    whole_names = any("." in name for name in told["target_modules"])
    assert whole_names == (kind == "part") and told["base_model_name_or_path"] == str(folders[base])
    assert json.loads((tmp_path / "a" / "mindseed.json").read_text())["info"] == {"steps": 7}


@pytest.mark.parity
@pytest.mark.parametrize("base", ["qwen3", "llama"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "patterns"])
def test_we_read_pefts_adapters_and_give_them_back(tmp_path, folders, base, kind):
    """With a rank and an alpha of their own for some modules; and what we write of it PEFT reads again."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers")
    there = transformers.AutoModelForCausalLM.from_pretrained(folders[base]).eval()
    patterns = dict(rank_pattern={"model.layers.0.self_attn.q_proj": 2, "v_proj": 1}, alpha_pattern={"down_proj": 30},
                    use_rslora=True) if kind == "patterns" else {}
    theirs = peft.get_peft_model(there, peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.25, task_type="CAUSAL_LM",
        **{"use_rslora": kind == "rslora", "use_dora": kind == "dora"} | patterns)).eval()
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn(p.shape, generator=g), alpha=0.1)
        want = theirs(IDS).logits
    theirs.save_pretrained(tmp_path / "a")
    model = load_directory(folders[base]).model
    found = load_adapter(model, tmp_path / "a", "one")
    with torch.no_grad():
        torch.testing.assert_close(logits(model), want, **CLOSE)
    assert found.matrices == 6 and adapters_of(model) == ["one"]
    assert not any(p.requires_grad for p in model.parameters())
    part = parts_of(model, "one")["blocks.0.mixer.q"]
    assert (part.rank, part.dropout) == (2 if kind == "patterns" else 4, 0.25)
    save_adapter(model, tmp_path / "b", "one")
    again = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folders[base]).eval(),
                                           tmp_path / "b")
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, want, **CLOSE)
    first, second = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
    assert first.keys() == second.keys() and all(torch.equal(x, second[key]) for key, x in first.items())
    learning = load_directory(folders[base]).model
    load_adapter(learning, tmp_path / "a", learning=True)
    assert sum(p.requires_grad for p in learning.parameters()) == (18 if kind == "dora" else 12)


@pytest.mark.parity
@pytest.mark.parametrize("asked, why", [
    (dict(bias="all"), "biases were trained"), (dict(modules_to_save=["lm_head"]), "modules_to_save"),
    (dict(target_modules=["q_proj", "embed_tokens"]), "lora_embedding_A"),
    (dict(lora_bias=True), "updates have biases"),
    (dict(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    (dict(target_modules=[], target_parameters=["q_proj.weight"]), "target_parameters")])
def test_what_we_do_not_compute_is_refused(tmp_path, folders, asked, why):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers")
    there = transformers.AutoModelForCausalLM.from_pretrained(folders["qwen3"])
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | asked)
    peft.get_peft_model(there, config).save_pretrained(tmp_path)
    model = load_directory(folders["qwen3"]).model
    with pytest.raises(UserError, match=why):
        load_adapter(model, tmp_path)
    assert adapters_of(model) == []


# ------------------------------------------------------------------------------------------------ files of ours, alone

@pytest.mark.parametrize("config", [
    kit("mla", "delta", vocab_size=V), kit("gqa", "gqa", vocab_size=V, ffn="moe"),
    kit("mla", "mla", vocab_size=V, ffn="moe, groups", mtp=(kit("mla", ffn="moe").layers[0],)),
    kit("gqa", vocab_size=V, mtp=(kit("gqa").layers[0],))],
    ids=["our own layout", "shared experts", "deepseek", "ahead"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_every_architecture_keeps_its_adapters(tmp_path, config, kind):
    """In the names of its family, or in ours where there is none; every matrix covered, or only some."""
    model = build(config)
    randomise(model)
    model.eval()
    before = logits(model)
    targets = ("blocks.*", "mtp.*") if config.mtp else ()
    add_adapter(model, LoRAConfig(**vars(CONFIGS[kind]) | {"targets": targets}))
    shake(model, "default")
    save_adapter(model, tmp_path / "a")
    other = build(config)
    other.load_state_dict({key: x for key, x in model.state_dict().items() if ".adapter." not in key})
    load_adapter(other.eval(), tmp_path / "a")
    assert torch.equal(logits(other), logits(model)) and (logits(model) - before).abs().max() > 0.1
    state = other.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())


def test_an_adapter_stays_with_its_base(tmp_path, folders):
    """Which may have another dtype or be given in another context, but neither other weights nor another shape."""
    model = load_directory(folders["qwen3"]).model
    add_adapter(model, LoRAConfig(rank=2))
    shake(model, "default")
    save_adapter(model, tmp_path / "a", base="runs/base/model")
    load_adapter(load_directory(folders["qwen3"], dtype=torch.bfloat16).model, tmp_path / "a")
    longer = build(LMConfig(**vars(model.config) | {"seq_len": 64, "dropout": 0.1}))
    longer.load_state_dict(load_directory(folders["qwen3"]).model.state_dict())
    load_adapter(longer, tmp_path / "a")
    for other, why in ((model_of(seed=1), "other weights"), (model_of(False), "another shape"),
                       (model_of(layers=3), "another shape"),
                       (with_one_changed("blocks.1.ffn.up.weight"), "other weights"),
                       (with_one_changed("norm.weight"), "other weights")):
        with pytest.raises(UserError, match=f"was trained on runs/base/model, and this model has {why}"):
            load_adapter(other, tmp_path / "a")
        assert adapters_of(other) == [] and all(p.requires_grad for p in other.parameters())
    merged = load_directory(folders["qwen3"]).model
    load_adapter(merged, tmp_path / "a")
    merge(merged, keep=False)
    with pytest.raises(UserError, match="other weights"):             # what an adapter was merged into is another model
        load_adapter(merged, tmp_path / "a")
    (tmp_path / "a" / "mindseed.json").unlink()
    load_adapter(model_of(seed=1), tmp_path / "a")                    # nobody says what it belongs to


def with_one_changed(name: str) -> LM:
    model = model_of()
    with torch.no_grad():
        model.state_dict()[name].mul_(1.1)
    return model


def test_a_quantised_base_is_known_by_what_is_not_quantised(tmp_path):
    model = model_of()
    add_adapter(model)
    save_adapter(model, tmp_path / "a", base="runs/base/model")
    other = model_of()
    quantize_model(other, targets=("blocks.*.mixer.q",))
    load_adapter(other, tmp_path / "a")
    with pytest.raises(UserError, match="blocks.0.mixer.q is quantised"):
        merge(other)
    assert adapters_of(other) == ["default"]
    wrong = model_of()
    quantize_model(wrong, targets=("blocks.0.mixer.q",))
    with torch.no_grad():
        wrong.embed.weight.mul_(1.1)
    with pytest.raises(UserError, match="other weights"):
        load_adapter(wrong, tmp_path / "a")


def test_an_adapter_beside_a_value_head_is_not_saved_alone(tmp_path):
    model = add_value_head(model_of())
    add_adapter(model)
    with pytest.raises(UserError, match="value head"):
        save_adapter(model, tmp_path / "a")


@pytest.mark.parametrize("prefix", ["", "model."])
def test_minimind_bare_files_are_read_at_scale_one(tmp_path, prefix):
    g, state, expected = torch.Generator().manual_seed(0), {}, {}
    model = model_of(dim=32)
    for i in range(2):
        for ours, theirs in (("q", "q_proj"), ("o", "o_proj")):
            A, B = (torch.randn(*shape, generator=g).half() for shape in ((5, 32), (32, 5)))
            start = f"{prefix}layers.{i}.self_attn.{theirs}.lora."
            state |= {f"{start}A.weight": A, f"{start}B.weight": B}
            expected[f"blocks.{i}.mixer.{ours}"] = model.blocks[i].mixer._modules[ours].weight + B.float() @ A.float()
    torch.save(state, tmp_path / "lora_identity_512.pth")
    found = load_adapter(model, tmp_path / "lora_identity_512.pth", "identity")
    assert found.matrices == 4
    merge(model)
    for place, weight in expected.items():
        torch.testing.assert_close(model.state_dict()[f"{place}.weight"], weight)
    del state[f"{prefix}layers.1.self_attn.o_proj.lora.B.weight"]
    torch.save(state, tmp_path / "half.pth")
    with pytest.raises(UserError, match="half.pth has A for layers.1.self_attn.o_proj, not A, B"):
        load_adapter(model_of(), tmp_path / "half.pth")
    torch.save({"layers.0.self_attn.q_proj.lora.A.weight": torch.nn.Linear(1, 1)}, tmp_path / "code.pth")
    with pytest.raises(UserError, match="could run a stranger's code"):
        load_adapter(model_of(), tmp_path / "code.pth")
    with pytest.raises(UserError, match="another base"):
        load_adapter(model_of(dim=40), tmp_path / "lora_identity_512.pth")


# -------------------------------------------------------------------------------------------------------- spoilt files

@pytest.fixture
def saved(tmp_path):
    model = model_of()
    add_adapter(model, LoRAConfig(rank=2, dora=True))
    shake(model, "default")
    return save_adapter(model, tmp_path / "a")


@pytest.mark.parametrize("change, why", [
    ({"peft_type": "IA3"}, "IA3"), ({"fan_in_fan_out": True}, "fan_in_fan_out"), ({"bias": "lora_only"}, "biases"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"), ({"use_moonbeams": 3}, "use_moonbeams=3"),
    ({"init_lora_weights": "olora"}, "olora"), ({"alpha_pattern": {"(": 2}}, "no pattern"),
    ({"alpha_pattern": {"q_proj": "4"}}, "alpha_pattern"), ({"r": "8"}, r"\br\b"), ({"lora_alpha": None}, "lora_alpha"),
    ({"use_dora": False}, "A, B, magnitude for .*, not A, B"), ({"peft_type": None}, "peft_type")])
def test_descriptions_that_cannot_be_meant(saved, change, why):
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=why) as error:
        load_adapter(model_of(), saved)
    assert str(saved) in str(error.value) and "\n" not in str(error.value)


KEY = "base_model.model.model.layers.1.self_attn.k_proj."


@pytest.mark.parametrize("spoil, why", [
    (lambda t: t.pop(KEY + "lora_A.weight"), "has B, magnitude for .*layers.1.self_attn.k_proj, not A, B, magnitude"),
    (lambda t: t.update({KEY + "lora_C.weight": torch.ones(1)}), "cannot be adapted here: .*lora_C"),
    (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 32)}), "cannot be adapted.*lm_head"),
    (lambda t: t.update({"model.layers.0.x.lora_A.weight": torch.ones(1)}), "cannot be adapted"),
    (lambda t: t.update({KEY + "lora_A.weight": torch.ones(2, 31)}), "another base"),
    (lambda t: t.update({KEY + "lora_B.weight": torch.ones(16, 3)}), "another base"),
    (lambda t: t.update({KEY + "lora_A.weight": torch.ones(0, 32), KEY + "lora_B.weight": torch.ones(16, 0)}),
     "another base"),
    (lambda t: t.update({KEY + "lora_A.weight": torch.ones(2, 32, dtype=torch.int8)}), "stored as torch.int8"),
    (lambda t: [t.clear(), t.update({"x": torch.ones(1)})], "cannot be adapted")])
def test_tensors_that_do_not_fit(saved, spoil, why):
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    spoil(tensors)
    save_file(tensors, file)
    with pytest.raises(UserError, match=why):
        load_adapter(model_of(), saved)


def test_places_that_hold_no_adapter(saved, folders, tmp_path):
    (tmp_path / "empty").mkdir()
    for where, why in ((tmp_path / "nowhere", "does not exist"), (tmp_path / "empty", "is no adapter"),
                       (folders["qwen3"], "is no adapter"), (saved / "adapter_config.json", "is no adapter")):
        with pytest.raises(UserError, match=why):
            load_adapter(model_of(), where)
    (saved / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="truncated"):
        load_adapter(model_of(), saved)
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="adapter_model"):
        load_adapter(model_of(), saved)
    (saved / "mindseed.json").write_text('{"base": 3}')
    with pytest.raises(UserError, match="mindseed.json"):
        load_adapter(model_of(), saved)


def test_a_pickled_adapter_is_read_as_well(saved):
    tensors = load_file(saved / "adapter_model.safetensors")
    one, two = model_of(), model_of()
    load_adapter(one, saved)
    torch.save(tensors, saved / "adapter_model.bin")
    (saved / "adapter_model.safetensors").unlink()
    load_adapter(two, saved)
    assert torch.equal(logits(one), logits(two))
    shutil.rmtree(saved)


def test_experts_do_not_learn_on_with_dropout(tmp_path):
    model = moe_model()
    add_adapter(model, LoRAConfig(rank=2))
    save_adapter(model, tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_dropout": 0.1}))
    load_adapter(moe_model(), tmp_path / "a")
    other = moe_model()
    with pytest.raises(UserError, match="no place in routed experts"):
        load_adapter(other, tmp_path / "a", learning=True)
    assert adapters_of(other) == []
