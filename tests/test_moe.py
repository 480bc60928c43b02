"""Mixtures of experts: what reaches the router, who is visited, how the load is spread, and what must not matter."""
from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mindseed.base.errors import UserError
from mindseed.core import Batch
from mindseed.data.toy import write_world
from mindseed.models.config import LayerConfig, untrainable
from mindseed.models.lm import build
from mindseed.models.presets import PRESETS, Shape
from mindseed.models.upcycle import upcycle
from mindseed.nn.ffn import SwiGLUConfig
from mindseed.nn.grouped import Combine, Dispatch, GroupedSwiGLU, grouped_swiglu, room
from mindseed.nn.moe import MoE, MoEConfig
from mindseed.objectives.sft import SFT
from mindseed.optim.groups import OptimConfig, build_optimizers, parameter_groups
from mindseed.tokenizers.byte import Byte
from mindseed.train.balance import Balance
from mindseed.train.native import NativeBackend
from mindseed.train.step import Run, train_step
from tests.tiny import VOCAB, Fixed, flat, random_batch, randomise, split

EXACT = {"rtol": 1e-9, "atol": 1e-9}
BASE = MoEConfig(experts=6, top_k=2, expert_dim=20)
SETTINGS = {
    "softmax": BASE,
    "softmax, raw weights": replace(BASE, renormalise=False),
    "top-1, raw weights": replace(BASE, top_k=1, renormalise=False),
    "all experts": replace(BASE, top_k=6),
    "sigmoid, bias, scaled": replace(BASE, score="sigmoid", bias=True, scaling=2.5),
    "sigmoid, top-1, raw": replace(BASE, score="sigmoid", top_k=1, renormalise=False),
    "groups": replace(BASE, groups=3, top_groups=2),
    "shared": replace(BASE, shared_dim=16),
    "losses": replace(BASE, balance_weight=0.05, sequence_weight=0.02, z_weight=0.01),
}


def model_with(moe: MoEConfig, *, layers: int = 2, seed: int = 0):
    shape = Shape(layers=layers, dim=32, heads=4, kv_heads=2, head_dim=8, ffn_dim=48, moe=moe)
    model = build(shape.lm_config(vocab_size=VOCAB, seq_len=32), seed=seed)
    randomise(model, seed)
    return model.double()


def oracle(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    """One token after the other, one expert after the other."""
    out = []
    weights, chosen, _ = moe.route(F.linear(x, moe.router.weight))
    for t in range(len(x)):
        y = torch.zeros_like(x[t])
        for w, e in zip(weights[t], chosen[t]):
            h = F.silu(moe.gate.weight[e] @ x[t]) * (moe.up.weight[e] @ x[t])
            y = y + w * (moe.down.weight[e] @ h)
        out.append(y + (moe.shared(x[t]) if moe.shared is not None else 0))
    return torch.stack(out)


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS.keys())
def config(request) -> MoEConfig:
    return request.param


def test_sorted_experts_equal_a_loop_over_tokens(config):
    moe = model_with(config).blocks[0].ffn.eval()
    x = torch.randn(2, 7, 32, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(2, 7, 32, dtype=torch.float64)
    got, want = moe(x)[0], oracle(moe, x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(got, want, **EXACT)
    params = [x, *moe.parameters()]
    for a, b in zip(*(torch.autograd.grad((y * pull).sum(), params) for y in (got, want))):
        torch.testing.assert_close(a, b, **EXACT)


def test_hand_written_gradients():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=g, dtype=torch.float64, requires_grad=True)
    gate, up, down = (torch.randn(4, *shape, generator=g, dtype=torch.float64, requires_grad=True)
                      for shape in ((2, 3), (2, 3), (3, 2)))
    assert torch.autograd.gradcheck(lambda *given: GroupedSwiGLU.apply(
        *given, [2, 0, 3, 0], torch.float64, torch.float64, True), (x, gate, up, down))
    order = torch.tensor([3, 0, 4, 1, 5, 2])
    place = order.argsort()
    tokens = torch.randn(3, 4, generator=g, dtype=torch.float64, requires_grad=True)
    h = torch.randn(6, 4, generator=g, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 2, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Dispatch.apply(x, order // 2, place), tokens)
    assert torch.autograd.gradcheck(lambda h, w: Combine.apply(h, w, order // 2, order, place), (h, weights))


@pytest.mark.parametrize("keep,dtype", [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_narrow_experts_are_close_to_wide_ones(keep, dtype):
    """Rows kept in bfloat16, products in it or in float32: within its rounding of float64, forward and gradients."""
    weights = [torch.randn(4, *shape) * 0.2 for shape in ((24, 16), (24, 16), (16, 24))]
    x, pull, counts = torch.randn(30, 16), torch.randn(30, 16), [11, 0, 12, 7]
    results = []
    for kinds in ((keep, dtype), (torch.float64, torch.float64)):
        kind = torch.float64 if kinds[0] == torch.float64 else torch.float32
        leaves = [t.to(kind).requires_grad_() for t in (x, *weights)]
        y = GroupedSwiGLU.apply(*leaves, counts, *kinds, True)
        results.append([y, *torch.autograd.grad((y.to(kind) * pull.to(kind)).sum(), leaves)])
    for got, want in zip(*results):
        assert (got.double() - want).norm() < 0.012 * want.norm()


def test_experts_that_only_infer_keep_nothing():
    weights = [torch.randn(4, *shape, requires_grad=True) for shape in ((6, 5), (6, 5), (5, 6))]
    x, counts = torch.randn(9, 5), torch.tensor([4, 0, 5, 0])
    learned = grouped_swiglu(x, *weights, counts)
    with torch.no_grad():
        assert torch.equal(grouped_swiglu(x, *weights, counts), learned)


def test_the_language_model_loss_reaches_the_router_of_every_setting_that_may_be_trained(config):
    assert untrainable(model_with(config).config) is None
    model, batch = model_with(config).train(), random_batch(3, 16)
    model(batch.ids, batch.positions).logps(batch.targets).sum().backward()        # no auxiliary loss
    for block in model.blocks:
        assert (block.ffn.router.weight.grad.abs().amax(1) > 1e-9).all()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_one_expert_of_weight_one_runs_but_is_not_trained(score):
    config = replace(BASE, top_k=1, renormalise=True, score=score)
    model, batch = model_with(config), random_batch(2, 8)
    model(batch.ids, batch.positions).logps(batch.targets).sum().backward()
    assert model.blocks[0].ffn.router.weight.grad.abs().max() < 1e-12
    assert "no gradient reaches the router" in untrainable(model.config)
    with pytest.raises(UserError, match="must not be trained.*no gradient reaches the router"):
        backend(model, SFT())


def backend(model, objective, lr: float = 1e-2) -> NativeBackend:
    optim = OptimConfig(kind="adamw", lr=lr)
    return NativeBackend(model, objective, build_optimizers(parameter_groups(model, optim), optim))


def make_run(model, source, **changes) -> Run:
    return Run(source, SFT(), backend(model, SFT()), schedule=lambda step: 1e-2, balance=Balance(model), **changes)


def test_permuting_experts_changes_nothing(config):
    if config.groups > 1:
        order = torch.tensor([4, 5, 1, 0, 2, 3])                         # whole groups, and within them
    else:
        order = torch.tensor([3, 1, 5, 0, 4, 2])
    model, batch = model_with(config).eval(), random_batch(2, 12)
    before = model(batch.ids, batch.positions).logits()
    with torch.no_grad():
        for block in model.blocks:
            moe = block.ffn
            for x in (moe.router.weight, moe.gate.weight, moe.up.weight, moe.down.weight, *moe.buffers()):
                x.copy_(x[order])
    torch.testing.assert_close(model(batch.ids, batch.positions).logits(), before, **EXACT)


def test_no_token_is_dropped_and_every_visit_is_counted(config):
    model = model_with(config).train()
    values = train_step(make_run(model, Fixed([random_batch(3, 16)])))
    shares = [value for name, value in values.items() if name.startswith("load/")]
    assert values["dropped"] == 0 and len(shares) == 2 * config.experts
    assert sum(shares) == pytest.approx(2) and 1 <= values["load_max"] <= config.experts
    assert 0 <= values["router_entropy"] <= 1


def test_losses_do_not_depend_on_how_a_batch_is_cut():
    """From the second step on, when the load of the whole batch before is known."""
    config = replace(BASE, balance_weight=0.5, sequence_weight=0.2, z_weight=0.1, bias=True)
    batches = [random_batch(4, 16, seed=s, empty=(1,)) for s in range(3)]
    results = []
    for pieces in (1, 2, 4):
        model = model_with(replace(config, balance_weight=0.5)).train()
        run = make_run(model, Fixed([p for b in batches for p in split(b, pieces)]), accumulate=pieces)
        for layer in run.balance.layers:                                 # as if a step had been before
            layer.load.last = torch.tensor([0.3, 0.3, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
        losses = [train_step(run)["loss"] for _ in batches]
        results.append((torch.tensor(losses), flat(model), model.blocks[0].ffn.bias.clone()))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_auxiliary_losses_count_only_where_tokens_count():
    model, batch = model_with(SETTINGS["losses"]).train(), random_batch(3, 16)
    output = model(batch.ids, batch.positions)
    assert set(output.aux) == {"balance", "sequence", "router_z"}
    assert all(value.shape == batch.ids.shape for value in output.aux.values())
    total, metrics = SFT().loss(output, batch)
    want = metrics["nll"] + sum((value * batch.weights).sum() for value in output.aux.values())
    torch.testing.assert_close(total, want.to(total.dtype))
    assert model.eval()(batch.ids, batch.positions).aux == {}


def world_batches(folder, rows: int, length: int, count: int):
    """Batches of the embedded world, bytes as tokens."""
    files, need = write_world(folder, scale=0.05), rows * length * count
    text = "\n".join(json.loads(line)["text"] for line in files["pretrain"].read_text().splitlines())
    ids = torch.tensor(Byte().encode(text))[:need + 1]
    assert len(ids) == need + 1
    x, y = ids[:-1].view(count, rows, length), ids[1:].view(count, rows, length)
    return [Batch(ids=a, targets=b, weights=torch.ones(rows, length), positions=torch.arange(length).expand(rows, -1))
            for a, b in zip(x, y)]


@pytest.mark.parametrize("balanced", [True, False])
def test_biases_spread_a_skewed_load_without_an_auxiliary_loss(balanced, tmp_path):
    moe = MoEConfig(experts=8, top_k=2, expert_dim=16, score="sigmoid", bias=True, bias_rate=0.03 if balanced else 0.0)
    shape = Shape(layers=2, dim=32, heads=2, kv_heads=1, head_dim=16, ffn_dim=32, moe=moe)
    model = build(shape.lm_config(vocab_size=Byte().vocab_size, seq_len=64)).train()
    skew(model)
    run = make_run(model, Fixed(world_batches(tmp_path, 8, 64, 60)))
    first = train_step(run)["load_max"]
    for _ in range(119):
        values = train_step(run)
    assert first > 3.5                                                   # of at most 4: two experts get nearly all
    assert (values["load_max"] < 2) == balanced


def skew(model) -> None:
    """Two experts are preferred by every token: their rows of the router point where all hidden vectors point."""
    with torch.no_grad():
        for block in model.blocks:
            block.ffn_norm.weight[:4] = 3.0
            block.ffn.router.weight.mul_(0.1)
            block.ffn.bias[:2] = 0.5


def test_upcycling_keeps_what_the_model_says():
    shape = Shape(layers=2, dim=32, heads=4, kv_heads=2, head_dim=8, ffn_dim=48)
    dense = build(shape.lm_config(vocab_size=VOCAB, seq_len=32))
    randomise(dense)
    dense.double()
    batch = random_batch(2, 12)
    mixture = upcycle(dense, replace(BASE, experts=4)).double()
    assert mixture.config.layers[0].ffn.expert_dim == 48
    torch.testing.assert_close(mixture(batch.ids, batch.positions).logits(), dense(batch.ids, batch.positions).logits(),
                               **EXACT)
    for bad in (replace(BASE, renormalise=False), replace(BASE, shared_dim=8), replace(BASE, scaling=2.0)):
        with pytest.raises(UserError):
            upcycle(dense, bad)
    with pytest.raises(UserError, match="others already"):
        upcycle(mixture, BASE)


def test_presets_may_be_trained():
    for name, shape in PRESETS.items():
        assert untrainable(shape.lm_config(vocab_size=100, seq_len=8)) is None, name


@pytest.mark.parametrize("bad, words", [
    ({"top_k": 7}, "top_k=7"), ({"top_k": 0}, "top_k=0"), ({"groups": 4}, "groups=4"),
    ({"groups": 6, "top_groups": 2}, "one expert a group"),
    ({"groups": 3, "top_groups": 4}, "top_groups"), ({"groups": 3, "top_k": 3}, "fewer than top_k=3"),
    ({"score": "tanh"}, "tanh"), ({"expert_dim": 0}, "expert_dim=0"), ({"z_weight": -1.0}, "negative")])
def test_settings_that_cannot_be(bad, words):
    with pytest.raises(ValueError, match=words):
        MoEConfig(**{"experts": 6, "top_k": 2, "expert_dim": 8} | bad)


def test_layers_may_differ():
    shape = Shape(layers=3, dim=32, heads=4, kv_heads=2, head_dim=8, ffn_dim=48, moe=BASE, dense_layers=1)
    layers = shape.lm_config(vocab_size=9, seq_len=9).layers
    assert [type(layer.ffn) for layer in layers] == [SwiGLUConfig, MoEConfig, MoEConfig]
    assert isinstance(layers[0], LayerConfig)


@pytest.mark.parametrize("fast", [False, True])
def test_experts_multiply_in_the_dtype_in_which_dense_layers_do(monkeypatch, fast):
    """Under bf16 autocast on a CPU: float32 where bf16 products are slow, although the rows come in bf16."""
    seen = []
    monkeypatch.setattr("mindseed.nn.linear.fast_bfloat16", lambda: fast)
    monkeypatch.setattr(GroupedSwiGLU, "apply", lambda x, *rest: seen.append((x.dtype, *rest[-3:])) or x)
    weights = [torch.randn(2, *shape) for shape in ((6, 5), (6, 5), (5, 6))]
    with torch.autocast("cpu", torch.bfloat16):
        grouped_swiglu(torch.randn(4, 5).bfloat16(), *weights, torch.tensor([3, 1]))
    assert seen == [(torch.bfloat16, torch.bfloat16, torch.bfloat16 if fast else torch.float32, True)]


def test_compiled_experts_give_the_same_and_take_other_shapes():
    model = model_with(BASE).train()
    plain, compiled = model.blocks[0].ffn, torch.compile(model.blocks[0].ffn, backend="eager")
    for rows in (2, 3, 5):
        x = torch.randn(rows, 7, 32, dtype=torch.float64)
        torch.testing.assert_close(compiled(x)[0], plain(x)[0])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def test_buffers_are_the_cpus_alone():
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        assert room("x", (2, 3), torch.empty(0, device="mps")).device.type == "mps"
