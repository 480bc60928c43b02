"""Adapters against their formulas written out, and what must hold of any: nothing at the start, merged = unmerged,
gradients in the adapter alone, the base untouched to the last bit."""
from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mindseed.adapt.lora import (LoRAConfig, adaptable, adapters_of, add_adapter, base_of, base_parameters, coverage,
                                 learn, merge, parts_of, remove_adapter, set_active, unmerge, without_adapters)
from mindseed.base.errors import UserError
from mindseed.models.heads import add_value_head
from mindseed.nn.linear import Linear, is_plain
from mindseed.nn.moe import ExpertLinear
from mindseed.objectives.dpo import DPO
from mindseed.objectives.sft import SFT
from mindseed.optim.groups import OptimConfig, build_optimizers, parameter_groups
from mindseed.train.native import NativeBackend
from tests.test_dpo import SHAPES, pairs
from tests.tiny import KITS, VOCAB, flat, kit_model, pages, random_batch, tiny_model

CONFIGS = {"lora": LoRAConfig(rank=3, alpha=5.0), "rslora": LoRAConfig(rank=4, alpha=5.0, rs=True),
           "dora": LoRAConfig(rank=3, alpha=5.0, dora=True)}
IDS = torch.randint(0, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.arange(12).expand(3, 12)


def shake(model, *names: str, seed: int = 0, size: float = 0.1) -> None:
    """Adapters as if they had learnt something."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in names:
            for part in parts_of(model, name).values():
                for p in part.parameters():
                    p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype), alpha=size)


def hidden(model) -> torch.Tensor:
    return model(IDS, POSITIONS).hidden


def decoded(model) -> torch.Tensor:
    """The same, the first tokens read and the others written one by one into a cache."""
    state = pages(model, 3)
    parts = [model(IDS[:, :9], POSITIONS[:, :9], state).hidden]
    parts += [model(IDS[:, t:t + 1], POSITIONS[:, t:t + 1], state).hidden for t in range(9, 12)]
    return torch.cat(parts, dim=1)


# ------------------------------------------------------------------------------------------------------ the arithmetic

@pytest.mark.parametrize("kind", CONFIGS)
def test_one_matrix_is_the_formula_and_so_are_its_gradients(kind):
    config, g = CONFIGS[kind], torch.Generator().manual_seed(0)
    model = tiny_model().double()
    add_adapter(model, config, "a")
    add_adapter(model, replace(config, rank=2), "b")
    learn(model, "a", "b")
    shake(model, "a", "b")
    set_active(model, {"a": 1.0, "b": -0.5})
    linear = model.blocks[0].mixer.k
    x = torch.randn(2, 7, 32, generator=g, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(2, 7, 16, generator=g, dtype=torch.float64)
    y, W = linear(x), linear.weight
    params = [p for name in "ab" for p in linear.adapter.parts[name].parameters()]
    ours = torch.autograd.grad((y * pull).sum(), [x, *params])

    sum_of_changes = 0
    for name, weight, rank in (("a", 1.0, config.rank), ("b", -0.5, 2)):
        part = linear.adapter.parts[name]
        scale = config.alpha / (math.sqrt(rank) if config.rs else rank)
        whole = W + scale * part.B @ part.A
        if config.dora:
            whole = part.magnitude[:, None] * whole / whole.detach().square().sum(1, keepdim=True).sqrt()
        sum_of_changes = sum_of_changes + weight * (whole - W)
    expected = x @ (W + sum_of_changes).T
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(linear.dense(), W + sum_of_changes, rtol=1e-12, atol=1e-12)
    for a, b in zip(ours, torch.autograd.grad((expected * pull).sum(), [x, *params])):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert len(params) == (6 if config.dora else 4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_experts_are_the_formula_each_by_itself(kind):
    """And gradients reach A and B through the grouped products."""
    config, model = CONFIGS[kind], kit_model(KITS["moe"]).train()
    add_adapter(model, replace(config, targets=("blocks.*.ffn.gate", "blocks.*.ffn.up", "blocks.*.ffn.down")))
    shake(model, "default")
    moe = model.blocks[0].ffn
    x = torch.randn(1, 30, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    params = [p for linear in (moe.gate, moe.up, moe.down) for p in linear.adapter.parts["default"].parameters()]
    y, _ = moe(x)
    ours = torch.autograd.grad(y.square().sum(), params)

    def whole(linear: ExpertLinear, e: int) -> torch.Tensor:
        part = linear.adapter.parts["default"]
        found = linear.weight[e] + part.scale * part.B[e] @ part.A[e]
        return found if not config.dora else part.magnitude[e][:, None] * F.normalize(found.detach(), dim=1) + (
            part.magnitude[e] / found.detach().norm(dim=1))[:, None] * (found - found.detach())

    weights, who, _ = moe.route(moe.logits(x[0]))
    rows = []
    for n, token in enumerate(x[0]):
        each = [w * whole(moe.down, e) @ (F.silu(whole(moe.gate, e) @ token) * (whole(moe.up, e) @ token))
                for w, e in zip(weights[n], who[n].tolist())]
        rows.append(sum(each) + moe.shared(token))
    expected = torch.stack(rows)[None]
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(ours, torch.autograd.grad(expected.square().sum(), params)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_a_row_of_zeros_is_no_trap():
    """DoRA divides by the lengths of rows."""
    model = tiny_model().double()
    with torch.no_grad():
        model.blocks[0].mixer.q.weight[3] = 0
    before = hidden(model)
    add_adapter(model, CONFIGS["dora"])
    assert torch.equal(hidden(model), before)
    hidden(model).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    shake(model, "default")
    assert torch.isfinite(hidden(model)).all()


class Sealed(Linear):
    """As if its matrix had to be unpacked."""

    def matrix(self):
        raise AssertionError("the matrix was asked for")


def test_only_dora_asks_for_the_matrix():
    for config in CONFIGS.values():
        model = tiny_model()
        add_adapter(model, config)
        model.blocks[0].mixer.q.__class__ = Sealed
        if config.dora:
            with pytest.raises(AssertionError, match="asked for"):
                hidden(model)
        else:
            hidden(model).sum().backward()


def test_a_seed_gives_one_adapter_with_a_gaussian_a_and_no_b():
    model = tiny_model(dim=64, ffn_dim=256)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        add_adapter(model, LoRAConfig(rank=16), name, seed=seed)
    a, b, c = (parts_of(model, name) for name in "abc")
    assert all(torch.equal(a[place].A, b[place].A) and not torch.equal(a[place].A, c[place].A) for place in a)
    values = torch.cat([part.A.flatten() for part in a.values()])
    assert values.std().item() == pytest.approx(1 / 16, rel=0.02) and abs(values.mean()) < 1e-3
    assert not any(part.B.any() for part in a.values())


# ---------------------------------------------------------------------------------------- nothing at first, all merged

@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", KITS)
def test_new_adapters_change_nothing_and_merged_ones_compute_the_same(name, kind):
    model = kit_model(KITS[name])
    before, cached, plain = hidden(model), decoded(model), copy.deepcopy(model.state_dict())
    add_adapter(model, CONFIGS[kind], "a")
    assert torch.equal(hidden(model), before) and torch.equal(decoded(model), cached)
    add_adapter(model, LoRAConfig(rank=1, targets=("o",)), "b", seed=1)
    shake(model, "a", "b")
    set_active(model, {"a": 1.0, "b": 0.7})
    adapted = hidden(model)
    assert (adapted - before).abs().max() > 0.1
    torch.testing.assert_close(decoded(model), adapted, rtol=1e-9, atol=1e-9)
    names, state = set(model.state_dict()), copy.deepcopy(model.state_dict())
    merged = merge(model)
    assert all(is_plain(m) for m in model.modules() if isinstance(m, Linear))
    assert model.state_dict().keys() == plain.keys()
    torch.testing.assert_close(hidden(model), adapted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(decoded(model), adapted, rtol=1e-9, atol=1e-9)
    unmerge(merged)
    assert set(model.state_dict()) == names and torch.equal(hidden(model), adapted)
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())
    for left in ("b", "a"):
        remove_adapter(model, left)
    assert torch.equal(hidden(model), before) and model.state_dict().keys() == plain.keys()
    assert all(torch.equal(x, plain[key]) for key, x in model.state_dict().items())


def test_a_merge_for_good_leaves_a_plain_model_that_learns():
    model = tiny_model()
    model.norm.requires_grad_(False)                                  # somebody's choice, to be kept
    add_adapter(model, CONFIGS["dora"])
    shake(model, "default")
    adapted = hidden(model)
    assert merge(model, keep=False) is None and adapters_of(model) == []
    torch.testing.assert_close(hidden(model), adapted, rtol=1e-4, atol=1e-4)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["norm.weight"]
    with pytest.raises(UserError, match="nothing to merge"):
        merge(model)


def test_unmerging_is_exact_in_half_precision():
    """Where taking an update off again would not be."""
    model = tiny_model().bfloat16()
    add_adapter(model, LoRAConfig(rank=2))
    shake(model, "default", size=1.0)
    assert next(iter(parts_of(model, "default").values())).A.dtype == torch.float32
    before = flat(model).clone()
    merged = merge(model)
    unmerge(merged)
    assert torch.equal(flat(model), before)
    with pytest.raises(UserError, match="other adapters"):
        merged = merge(model)
        add_adapter(model, LoRAConfig(), "late")
        unmerge(merged)


# --------------------------------------------------------------------------------------------------------- what learns

@pytest.mark.parametrize("name", ["gqa", "mla", "delta", "moe", "moe, groups", "layer norm, post"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_reach_the_adapter_and_nothing_else(name, kind):
    model = kit_model(KITS[name]).train()
    add_adapter(model, CONFIGS[kind], "idle")
    add_adapter(model, CONFIGS[kind])
    shake(model, "idle", "default")
    batch = random_batch(2, 16)
    SFT().loss(model(batch.ids, batch.positions), batch)[0].backward()
    adapted = {id(p) for part in parts_of(model, "default").values() for p in part.parameters()}
    for key, p in model.named_parameters():
        assert p.requires_grad == (id(p) in adapted), key
        assert (p.grad is not None and p.grad.abs().sum() > 0) == (id(p) in adapted), key
    recomputed = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.recompute = True
    SFT().loss(model(batch.ids, batch.positions), batch)[0].backward()
    for key, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, recomputed[key])


def test_frozen_experts_pass_gradients_on():
    """To what lies below them, whether they would learn themselves or not."""
    found, batch = [], random_batch(2, 16)
    for learning in (False, True):
        model = kit_model(KITS["moe"]).train()
        add_adapter(model, LoRAConfig(rank=2, targets=("blocks.0.mixer.*",)))
        shake(model, "default")
        for linear in (model.blocks[0].ffn.gate, model.blocks[1].ffn.down):
            linear.weight.requires_grad_(learning)
        SFT().loss(model(batch.ids, batch.positions), batch)[0].backward()
        assert (model.blocks[0].ffn.gate.weight.grad is not None) == learning
        found.append([p.grad for part in parts_of(model, "default").values() for p in part.parameters()])
    for frozen, learnt in zip(*found, strict=True):
        torch.testing.assert_close(frozen, learnt)


@pytest.mark.parametrize("kind", CONFIGS)
def test_training_overfits_and_leaves_the_base_alone_to_the_bit(kind):
    model, batch = tiny_model(), random_batch(2, 16)
    add_adapter(model, replace(CONFIGS[kind], rank=8))
    before = {key: x.clone() for key, x in model.state_dict().items() if ".adapter." not in key}
    losses = train(model, batch, 60, lr=0.02)
    assert losses[-1] < 0.4 * losses[0]
    assert all(torch.equal(model.state_dict()[key], x) for key, x in before.items())


def train(model, batch, steps: int, *, lr: float = 0.01, backend: NativeBackend | None = None) -> list[float]:
    backend = backend or backend_of(model, lr)
    losses = []
    for _ in range(steps):
        scale = 1 / batch.weights.sum()
        losses.append((backend.forward_backward(batch, scale=scale, last=True)["loss"] * scale).item())
        backend.step(lr)
    return losses


def backend_of(model, lr: float) -> NativeBackend:
    config = OptimConfig(lr=lr)
    return NativeBackend(model, SFT(), build_optimizers(parameter_groups(model, config), config))


def test_a_run_resumed_from_its_state_is_the_same_run():
    batch, config = random_batch(2, 16), CONFIGS["dora"]
    straight, first, second = (tiny_model() for _ in range(3))
    for i, model in enumerate((straight, first, second)):
        add_adapter(model, config, seed=i // 2)
        model.train()
    whole = train(straight, batch, 6)
    backend = backend_of(first, 0.01)
    begun = train(first, batch, 3, backend=backend)
    saved = copy.deepcopy((first.state_dict(), backend.state_dict()))
    later = backend_of(second, 0.01)
    second.load_state_dict(saved[0])
    later.load_state_dict(saved[1])
    assert begun + train(second, batch, 3, backend=later) == whole
    assert torch.equal(flat(second), flat(straight))


def test_autocast_computes_in_bfloat16_and_learns_in_float32():
    model, batch = tiny_model(), random_batch(2, 16)
    add_adapter(model, CONFIGS["dora"])
    shake(model, "default")
    exact = SFT().loss(model(batch.ids, batch.positions), batch)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert model.blocks[0].mixer.q(torch.randn(1, 4, 32)).dtype == torch.bfloat16
        loss = SFT().loss(model(batch.ids, batch.positions), batch)[0]
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=0.02) and loss.item() != exact.item()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_of_half_the_width_takes_adapters_in_float32(dtype):
    model, wide = (tiny_model() for _ in range(2))
    model.to(dtype)
    for one in (model, wide):
        add_adapter(one, CONFIGS["dora"])
        shake(one, "default")
    out = hidden(model)
    assert out.dtype == dtype and (out.float() - hidden(wide)).abs().mean() < 0.05


def test_dropout_is_for_training_alone():
    model = tiny_model()
    add_adapter(model, LoRAConfig(dropout=0.5))
    shake(model, "default")
    model.eval()
    assert torch.equal(hidden(model), hidden(model))
    model.train()
    assert not torch.equal(hidden(model), hidden(model))
    linear, x = model.blocks[0].mixer.q, torch.randn(1, 4, 32, dtype=torch.float32)
    many = torch.stack([linear(x) for _ in range(4000)]).mean(0)      # thinned out, but right on average
    model.eval()
    torch.testing.assert_close(many, linear(x), rtol=0.1, atol=0.15)
    with pytest.raises(UserError, match="no place in routed experts"):
        add_adapter(kit_model(KITS["moe"]), LoRAConfig(dropout=0.1))
    add_adapter(kit_model(KITS["moe"]), LoRAConfig(dropout=0.1, targets=("q", "blocks.*.shared.*")))


def test_a_value_head_learns_beside_an_adapter():
    model = add_value_head(tiny_model())
    found = add_adapter(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".adapter." not in n} == {
        "value_head.weight", "value_head.bias"}
    assert found.base == sum(p.numel() for p in base_parameters(model)) == len(flat(tiny_model()))


# ------------------------------------------------------------------------------------------------------------- targets

def test_targets_are_last_names_or_patterns_and_must_exist():
    model = kit_model(KITS["mixed"])
    for targets, want in ((("q",), 4), (("blocks.0.*",), 7), (("gate", "blocks.*.mixer.kv_*"), 7),
                          ((), len(adaptable(model)))):
        covered = parts_of_new(model, targets)
        assert len(covered) == want, (targets, covered)
    assert parts_of_new(model, ("z",)) == ["blocks.2.mixer.z"]
    for wrong in ("q_proj", "blocks.9.mixer.q", "mixer.q", "head", "embed"):
        there = r"matches no matrix; there are q, k, v, o, .*blocks\.\*\.mixer\.kv_up"
        with pytest.raises(UserError, match=there) as error:
            add_adapter(model, LoRAConfig(targets=("q", wrong)))
        assert repr(wrong) in str(error.value)
    assert adapters_of(model) == [] and all(p.requires_grad for p in model.parameters())


def parts_of_new(model, targets) -> list[str]:
    add_adapter(model, LoRAConfig(targets=targets))
    found = list(parts_of(model, "default"))
    remove_adapter(model, "default")
    return found


def test_routers_and_heads_have_no_adapters():
    """The model would not ask them."""
    model = kit_model(replace(KITS["moe"], tied=False))
    assert {name.rpartition(".")[2] for name in adaptable(model)} == {"q", "k", "v", "o", "gate", "up", "down"}
    with pytest.raises(UserError, match="router"):
        add_adapter(model, LoRAConfig(targets=("router",)))


@pytest.mark.parametrize("name", ["gqa", "mixed", "moe", "moe, groups"])
def test_coverage_counts_what_is_there(name):
    model = kit_model(KITS[name])
    params = sum(p.numel() for p in model.parameters())
    found = add_adapter(model, LoRAConfig(rank=2, targets=("q_down", "down", "o") if name == "mixed" else ()))
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.parameters == learning == sum(int(row[-1].replace(",", "")) for row in found.rows)
    assert found.base == params == sum(int(row[-2].replace(",", "")) for row in found.rows)
    assert found.matrices == len(parts_of(model, "default")) <= found.all_matrices == len(adaptable(model))
    assert f"{learning:,} parameters" in str(found) and all(len(row) == len(found.HEADER) for row in found.rows)
    assert coverage(model, "default") == found
    part = [row for row in found.rows if row[1].startswith("0 of")]
    assert bool(part) == (name in ("mixed", "moe, groups"))           # what is left out is told


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0.0}, {"alpha": math.nan}, {"dropout": 1.0},
                                   {"dropout": -0.1}, {"targets": ("",)}])
def test_settings_without_a_meaning_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoRAConfig(**wrong)


# -------------------------------------------------------------------------------------------------------- several, none

def test_several_at_once_are_added_and_each_can_go():
    model = kit_model(KITS["gqa"])
    base = hidden(model)
    for name in "ab":
        add_adapter(model, LoRAConfig(rank=2), name, seed=ord(name))
    shake(model, "a", "b", size=0.01)
    set_active(model, {"b": 1.0})
    only_b = hidden(model)
    linear, x = model.blocks[0].ffn.gate, torch.randn(1, 5, 32, dtype=torch.float64)
    set_active(model, {"a": 2.0, "b": -1.0})
    each = [linear.adapter.parts[name](x) for name in "ab"]
    torch.testing.assert_close(linear(x), linear.product(x) + 2 * each[0] - each[1])
    set_active(model, {})
    assert torch.equal(hidden(model), base)
    set_active(model, {"a": 2.0, "b": 1.0})
    with without_adapters(model):
        assert torch.equal(hidden(model), base)
        with without_adapters(model):
            assert torch.equal(hidden(model), base)
    remove_adapter(model, "a")
    assert torch.equal(hidden(model), only_b) and adapters_of(model) == ["b"]
    with pytest.raises(UserError, match="no adapter 'a'; it has b"):
        set_active(model, {"a": 1.0})
    with pytest.raises(UserError, match="no adapter 'x'; none"):
        remove_adapter(tiny_model(), "x")
    with without_adapters(tiny_model()) as nothing:
        assert nothing is None


@pytest.mark.parametrize("name", ["", "a.b", "two words", "keys", "items"])
def test_names_that_cannot_be_are_refused(name):
    with pytest.raises(UserError, match="cannot be an adapter's name"):
        add_adapter(tiny_model(), LoRAConfig(), name)


def test_a_name_is_given_once():
    model = tiny_model()
    add_adapter(model)
    with pytest.raises(UserError, match="already"):
        add_adapter(model)


def test_the_base_is_dpos_reference():
    """Also while the model trains with dropout."""
    model = tiny_model()
    model.config = replace(model.config, dropout=0.3)
    add_adapter(model, LoRAConfig(dropout=0.5))
    shake(model, "default")
    model.train()
    found = [DPO(reference=reference).prepare(pairs(SHAPES)).extra["reference"]
             for reference in (tiny_model().eval(), base_of(model), model)]
    torch.testing.assert_close(found[1], found[0].detach())
    assert not found[1].requires_grad and not torch.allclose(found[2], found[0], atol=0.1)
    assert model.training and model.blocks[0].mixer.q.adapter.training and hidden(model).requires_grad


def test_compiled_blocks_hear_of_the_switch():
    model = tiny_model(layers=1)
    base = hidden(model)
    add_adapter(model, CONFIGS["dora"])
    shake(model, "default")
    adapted = hidden(model)
    model.blocked = torch.compiler.disable(model.blocked)
    for block in model.blocks:
        block.compile(backend="eager")
    torch.testing.assert_close(hidden(model), adapted)
    with without_adapters(model):
        torch.testing.assert_close(hidden(model), base)
    torch.testing.assert_close(hidden(model), adapted)


def test_a_copy_has_its_own_switch():
    model = tiny_model()
    add_adapter(model)
    shake(model, "default")
    other = copy.deepcopy(model)
    set_active(other, {})
    assert not torch.equal(hidden(model), hidden(other))
    with without_adapters(model):
        assert torch.equal(hidden(model), hidden(other))
