"""A base in four bits against the same base made dense: equal answers, equal gradients, nothing dense kept; and
adapters on it that learn (QLoRA)."""
from __future__ import annotations

import copy
import io

import pytest
import torch

from mindseed.adapt.lora import LoRAConfig, add_adapter, merge, without_adapters
from mindseed.base.errors import UserError
from mindseed.infer.engine import Engine, EngineConfig, Request
from mindseed.infer.fused import fits
from mindseed.infer.generate import generate_uncached
from mindseed.infer.step import flat as flattens
from mindseed.interop.directory import load_directory, save_directory
from mindseed.nn.linear import Linear, is_plain
from mindseed.nn.linear_attention import DeltaNet
from mindseed.nn.moe import ExpertLinear, MoE
from mindseed.objectives.sft import SFT
from mindseed.optim.ema import EMA
from mindseed.optim.groups import OptimConfig, build_optimizers, parameter_groups
from mindseed.plan.memory import nf4_bytes
from mindseed.quant.linear import NF4Linear, quantisable, quantize_model, unquantize
from mindseed.quant.nf4 import dequantize, quantize
from mindseed.tokenizers.byte import Byte
from mindseed.train.native import NativeBackend
from mindseed.train.state import capture, restore
from mindseed.train.step import Run, train_step
from tests.oracle import GREEDY, sharp_model
from tests.tiny import KITS, VOCAB, Fixed, kit, kit_model, random_batch, tiny_model

IDS = torch.randint(0, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.arange(12).expand(3, 12)


def both(config, seed: int = 0) -> tuple:
    """A quantised model, and the same with those weights dense."""
    packed = kit_model(config, seed)
    quantize_model(packed)
    dense = copy.deepcopy(packed)
    assert unquantize(dense) == len([m for m in packed.modules() if isinstance(m, NF4Linear)]) > 0
    return packed, dense


def gradients(model, *, narrow: bool = False) -> dict[str, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        output = model(IDS, POSITIONS)
        logps = output.logps(IDS)
    (logps.sum() + sum(x.square().sum() for x in output.further)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", KITS)
def test_answers_and_gradients_are_those_of_the_dense_weights(name, recompute):
    packed, dense = (model.train() for model in both(KITS[name]))
    packed.recompute = recompute
    torch.testing.assert_close(packed(IDS, POSITIONS).hidden, dense(IDS, POSITIONS).hidden, rtol=1e-12, atol=1e-12)
    ours, theirs = gradients(packed), gradients(dense)
    assert not {name for name in ours if isinstance(packed.get_submodule(name.rpartition(".")[0]), NF4Linear)}
    assert theirs.keys() - ours.keys() == {f"{name}.weight" for name, m in packed.named_modules()
                                           if isinstance(m, NF4Linear)}
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["gqa", "mla", "delta", "moe"])
def test_under_autocast_too(name):
    packed, dense = (model.float().train() for model in both(KITS[name]))
    ours, theirs = gradients(packed, narrow=True), gradients(dense, narrow=True)
    for name, grad in ours.items():
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, theirs[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "bf16"])
def test_nothing_dense_is_kept_for_the_backward_pass(narrow):
    model = tiny_model().train()
    quantize_model(model)
    add_adapter(model, LoRAConfig(rank=3))
    shapes = {tuple(m.matrix().shape) for m in model.modules() if isinstance(m, NF4Linear)}
    shapes |= {shape[::-1] for shape in shapes}
    kept = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", enabled=narrow):
        model(IDS, POSITIONS).logps(IDS)
    codes = sum(x.dtype == torch.uint8 for x in kept)        # and scales; but for q, k, v on the frozen embedding
    assert codes == 2 * (len([m for m in model.modules() if isinstance(m, NF4Linear)]) - 3)
    assert not [x.shape for x in kept if tuple(x.shape) in shapes]


# ------------------------------------------------------------------------------------------------------------ decoding

@pytest.mark.parametrize("name", ["gqa", "window", "mla", "delta", "alibi", "mixed", "moe"])
def test_the_engine_answers_as_the_oracle(name):
    packed = sharp_model(KITS[name])
    quantize_model(packed)
    dense = copy.deepcopy(packed)
    unquantize(dense)
    assert not fits(packed) and not flattens(packed)
    prompts = [[5, 6, 7], [1], [9] * 11]
    requests = [Request(prompt=p, sampling=GREEDY, max_new=10, stop_ids=()) for p in prompts]
    got = Engine(packed, None, EngineConfig(block_size=4, max_seqs=4)).generate(requests)
    for model in (packed, dense):
        want = generate_uncached(model, None, prompts, sampling=GREEDY, max_new=10, stop_ids=())
        assert [done.ids for [done] in got] == [done.ids for done in want]


def test_latents_are_absorbed_through_packed_matrices(monkeypatch):
    from mindseed.nn.mla import MLA
    packed, dense = both(KITS["mla"])
    called = []
    absorbed = MLA.absorbed
    monkeypatch.setattr(MLA, "absorbed", lambda self, *a: called.append(type(self.kv_up)) or absorbed(self, *a))
    ids = [Engine(model, None, EngineConfig(block_size=4)).generate(
        [Request(prompt=[1, 2, 3], sampling=GREEDY, max_new=6, stop_ids=())])[0][0].ids for model in (packed, dense)]
    assert ids[0] == ids[1] and NF4Linear in called and Linear in called


# ------------------------------------------------------------------------------------------------------- a whole model

def test_what_is_quantised_is_told():
    model = kit_model(kit("gqa", "delta", ffn="moe"), 0).float()
    linears = {name: m for name, m in model.named_modules() if type(m) is Linear}
    experts = sum(p.nbytes for m in model.modules() if isinstance(m, ExpertLinear) for p in m.parameters())
    before = sum(p.nbytes for p in model.parameters())
    done = quantize_model(model)
    left = [name for name, m in model.named_modules() if type(m) is Linear]
    assert sorted(left) == ["blocks.0.ffn.router", "blocks.1.ffn.router", "blocks.1.mixer.a", "blocks.1.mixer.b"]
    assert done.matrices == len(linears) - len(left) == len([m for m in model.modules() if isinstance(m, NF4Linear)])
    assert done.before == before and done.after == sum(p.nbytes for p in model.parameters())
    saved = sum(4 * m.weight.numel() - nf4_bytes(m.weight.numel()) for n, m in linears.items() if n not in left)
    assert before - done.after == saved and str(done.matrices) in str(done)
    assert sum(p.nbytes for m in model.modules() if isinstance(m, ExpertLinear) for p in m.parameters()) == experts
    assert len(done.rows[0]) == len(done.HEADER) and ["blocks.*.mixer.q", "2 of 2"] == done.rows[0][:2]
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.dtype == torch.uint8]
    assert not quantisable(model) and quantize_model(model).matrices == 0          # a second time finds nothing


def test_targets_are_last_names_or_patterns():
    model = tiny_model()
    done = quantize_model(model, ("q", "blocks.1.ffn.*"))
    found = [name for name, m in model.named_modules() if isinstance(m, NF4Linear)]
    assert found == ["blocks.0.mixer.q", "blocks.1.mixer.q", *(f"blocks.1.ffn.{x}" for x in ("gate", "up", "down"))]
    assert {row[0]: row[1] for row in done.rows}["blocks.*.ffn.up"] == "1 of 2"
    with pytest.raises(UserError, match=r"'quarry' matches no matrix.*blocks\.\*\.mixer\.k"):
        quantize_model(model, ("quarry",))
    for name in ("router", "a"):                             # read by their owners: never
        with pytest.raises(UserError, match="matches no matrix"):
            quantize_model(kit_model(kit("delta", ffn="moe")), (name,))


def test_the_tiny_ones_are_found_by_what_reads_them():
    """Whoever reads a Linear's weight by itself must be in READ: the list is compared with the classes' own text."""
    import inspect
    import re
    from mindseed.quant.linear import READ
    for owner in (MoE, DeltaNet):
        read = set(re.findall(r"self\.(\w+)\.weight", inspect.getsource(owner)))
        assert read == set(READ[owner]), owner


def test_adapters_come_after_and_spoilt_weights_are_named():
    model = tiny_model()
    add_adapter(model, LoRAConfig(rank=2))
    with pytest.raises(UserError, match=r"blocks\.0\.mixer\.q has an adapter already; quantise the base first"):
        quantize_model(model)
    model = tiny_model()
    with torch.no_grad():
        model.blocks[1].mixer.o.weight[3, 4] = torch.nan
    with pytest.raises(UserError, match=r"blocks\.1\.mixer\.o: weights that are not finite"):
        quantize_model(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("double", [True, False])
def test_casts_of_the_model_leave_the_base_alone(dtype, double):
    model = tiny_model()
    quantize_model(model, double=double)
    linear = model.blocks[0].ffn.down
    before = [x.clone() for x in linear.packed if x is not None]
    model.to(dtype)
    assert model.embed.weight.dtype == dtype
    after = [x for x in linear.packed if x is not None]
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(after, before, strict=True))
    x = torch.randn(5, 48).to(dtype)
    assert linear(x).dtype == dtype
    torch.testing.assert_close(linear(x), x @ linear.matrix().to(dtype).T)
    assert linear.matrix().dtype == torch.float32 and linear.matrix().shape == (32, 48)


@pytest.mark.parametrize("double", [True, False])
def test_a_state_dict_holds_codes_and_fits_another_of_its_kind(double):
    model, other = tiny_model(1), tiny_model(2)
    for m in (model, other):
        quantize_model(m, double=double)
    state = model.state_dict()
    own = {name.rpartition(".")[2] for name in state if name.startswith("blocks.0.mixer.q.")}
    assert own == {"weight", "scales"} | ({"spread", "mean"} if double else set())
    assert state["blocks.0.mixer.q.weight"].dtype == torch.uint8
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(IDS, POSITIONS).hidden, model(IDS, POSITIONS).hidden)


def test_dense_again_it_is_an_ordinary_model(tmp_path):
    tokenizer = Byte()
    model = kit_model(kit("gqa", vocab_size=tokenizer.vocab_size)).float()
    want = {name: dequantize(quantize(m.weight), m.weight.shape) for name, m in quantisable(model).items()}
    quantize_model(model)
    with pytest.raises(UserError, match=r"blocks\.0\.mixer\.q\.weight is quantised"):
        save_directory(model, tokenizer, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    hidden = model(IDS, POSITIONS).hidden
    assert unquantize(model) == len(want) and unquantize(model) == 0
    assert all(is_plain(m) and torch.equal(m.weight, want[name]) and m.weight.requires_grad and not m.training
               for name, m in quantisable(model).items())
    save_directory(model, tokenizer, tmp_path / "dense")
    torch.testing.assert_close(load_directory(tmp_path / "dense").model(IDS, POSITIONS).hidden, hidden)


# --------------------------------------------------------------------------------------------------------------- QLoRA

def shake(model) -> None:
    """Adapters as if they had learnt something."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype), alpha=0.1)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ["gqa", "mla", "delta", "moe"])
def test_adapters_on_a_packed_base_are_adapters_on_the_dense_one(name, dora):
    packed, dense = (model.float().train() for model in both(KITS[name]))
    base = packed(IDS, POSITIONS).hidden
    for model in (packed, dense):
        add_adapter(model, LoRAConfig(rank=3, dora=dora))
        torch.testing.assert_close(model(IDS, POSITIONS).hidden, base, rtol=1e-6, atol=1e-6)
        shake(model)
    ours, theirs = gradients(packed), gradients(dense)
    assert ours.keys() == theirs.keys() and all(".adapter." in name for name in ours)
    for place, grad in ours.items():
        torch.testing.assert_close(grad, theirs[place], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(packed(IDS, POSITIONS).hidden, dense(IDS, POSITIONS).hidden, rtol=1e-6, atol=1e-7)
    with without_adapters(packed):
        assert torch.equal(packed(IDS, POSITIONS).hidden, base)


def test_merging_needs_dense_weights():
    model = tiny_model()
    quantize_model(model)
    add_adapter(model, LoRAConfig(rank=3))
    shake(model)
    want = model(IDS, POSITIONS).hidden
    with pytest.raises(UserError, match="is quantised"):
        merge(model)
    torch.testing.assert_close(model(IDS, POSITIONS).hidden, want)
    unquantize(model)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".adapter." not in name)
    torch.testing.assert_close(model(IDS, POSITIONS).hidden, want)
    merge(model, keep=False)
    torch.testing.assert_close(model(IDS, POSITIONS).hidden, want, rtol=1e-4, atol=1e-5)
    assert all(is_plain(m) for m in quantisable(model).values())


def qlora_run(seed: int = 0, states: str = "fp32", rank: int = 4) -> tuple[Run, EMA]:
    model = tiny_model(seed).train()
    quantize_model(model)
    add_adapter(model, LoRAConfig(rank=rank), seed=seed)
    config = OptimConfig(kind="adamw", lr=1e-2, states=states)
    backend = NativeBackend(model, SFT(), build_optimizers(parameter_groups(model, config), config))
    run, ema = Run(Fixed([random_batch(4, 24, seed=1)]), SFT(), backend, schedule=lambda step: 1e-2), EMA(model, 0.9)
    run.after_step.append(ema.update)
    return run, ema


def test_it_learns_and_the_base_does_not_move():
    run, ema = qlora_run()
    model = run.backend.model
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == ema.average.keys()
    losses = [train_step(run)["loss"] for _ in range(60)]
    assert losses[-1] < 0.6 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    with ema.applied():
        assert torch.isfinite(model(IDS, POSITIONS).hidden).all()


@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_a_run_goes_on_to_the_bit(states):
    """Of rank 128, so that some of the adapters' states are large enough to be packed."""
    if states == "8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    run, _ = qlora_run(states=states, rank=128)
    want = [train_step(run)["loss"] for _ in range(6)]
    half, ema = qlora_run(states=states, rank=128)
    got = [train_step(half)["loss"] for _ in range(3)]
    file = io.BytesIO()
    torch.save(capture(half, ema), file)
    file.seek(0)
    other, other_ema = qlora_run(7, states, 128)
    restore(other, other_ema, torch.load(file, weights_only=True))
    got += [train_step(other)["loss"] for _ in range(3)]
    assert got == want
    mine, theirs = (r.backend.model.state_dict() for r in (other, run))
    assert all(torch.equal(x, theirs[name]) for name, x in mine.items())
