"""Plans against reality: every count is compared with real tensors, real caches and torch's own counters."""
from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mindseed import cli
from mindseed.adapt.lora import LoRAConfig, add_adapter
from mindseed.base.hardware import PEAKS
from mindseed.infer.engine import Engine, EngineConfig, Request
from mindseed.models.config import LayerConfig, LMConfig
from mindseed.models.lm import LM, build
from mindseed.models.presets import PRESETS, LatentShape, Shape, preset, shape_of_depth
from mindseed.nn.ffn import SwiGLUConfig
from mindseed.nn.gqa import GQAConfig
from mindseed.nn.linear import Linear
from mindseed.nn.linear_attention import DeltaConfig
from mindseed.nn.moe import ExpertLinear, MoEConfig
from mindseed.optim.groups import OptimConfig, build_optimizers, parameter_groups
from mindseed.plan.flops import flops_per_token, layer_flops
from mindseed.plan.activations import activation_bytes_per_token
from mindseed.plan.memory import cache_bytes, cache_bytes_per_token, optimizer_bytes, plan_memory, token_ratio
from mindseed.plan.params import adapter_matrices, count_params, every_matrix
from mindseed.quant.linear import quantize_model
from mindseed.recipes.options import DataOptions, LoopOptions, ModelOptions, TrainOptions, derive

# Every size different, so that no two terms of a formula can be swapped unseen.
SHAPE = Shape(layers=3, dim=48, heads=6, kv_heads=2, head_dim=10, ffn_dim=112)
CONFIGS = {
    "tied": SHAPE.lm_config(vocab_size=352, seq_len=32),
    "untied": replace(SHAPE, tied=False).lm_config(vocab_size=352, seq_len=32),
    "no qk-norm": replace(SHAPE, qk_norm=False).lm_config(vocab_size=352, seq_len=32),
    "mixed layers": LMConfig(vocab_size=352, dim=48, seq_len=32, layers=(
        LayerConfig(mixer=GQAConfig(heads=4, kv_heads=4, head_dim=8), ffn=SwiGLUConfig(ffn_dim=64)),
        LayerConfig(mixer=GQAConfig(heads=6, kv_heads=1, head_dim=12, qk_norm=False), ffn=SwiGLUConfig(ffn_dim=96)))),
    "latent": replace(SHAPE, latent=LatentShape(kv_rank=20, q_rank=24, rope_dim=6)).lm_config(
        vocab_size=352, seq_len=32),
    "latent, plain queries": replace(SHAPE, latent=LatentShape(kv_rank=20, rope_dim=6)).lm_config(
        vocab_size=352, seq_len=32),
    "mixture": replace(SHAPE, dense_layers=1, moe=MoEConfig(
        experts=5, top_k=2, expert_dim=28, shared_dim=36)).lm_config(vocab_size=352, seq_len=32),
    "further tokens": replace(SHAPE, mtp=2).lm_config(vocab_size=352, seq_len=32),
    "another build": replace(SHAPE, norm="layer", placement="sandwich", activation="gelu",
                             positions="learned").lm_config(vocab_size=352, seq_len=32),
    "alibi, relu2": replace(SHAPE, positions="alibi", activation="relu2", placement="post").lm_config(
        vocab_size=352, seq_len=32),
}
LINEAR = replace(SHAPE, pattern="D").lm_config(vocab_size=352, seq_len=32)
WINDOWS = replace(SHAPE, pattern="SSL", window=5).lm_config(vocab_size=352, seq_len=32)
B, T = 2, 32


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request) -> LMConfig:
    return request.param


@pytest.mark.parametrize("config", [*CONFIGS.values(), LINEAR], ids=[*CONFIGS, "linear"])
def test_parameters_by_part_equal_the_built_model(config):
    model = build(config)
    sizes = dict.fromkeys(("embedding", "attention", "ffn", "vectors", "head", "mtp", "matrices"), 0)
    for name, p in model.named_parameters():
        matrix = p.ndim == 2 or "ffn" in name and p.ndim == 3                     # experts are stacks of matrices
        part = ("mtp" if name.startswith("mtp.") else "head" if name == "head.weight" else "embedding"
                if name.startswith(("embed", "place")) else "vectors" if not matrix
                else "attention" if ".mixer." in name else "ffn")
        sizes[part] += p.numel()
        sizes["matrices"] += p.numel() if matrix and name.startswith(("blocks", "mtp")) else 0
    counted = count_params(config)
    assert {part: getattr(counted, part) for part in sizes} == sizes
    assert counted.total == sum(p.numel() for p in model.parameters())
    idle = sum(m.weight.numel() // m.weight.shape[0] * (m.weight.shape[0] - 2) for name, m in model.named_modules()
               if isinstance(m, ExpertLinear))                                    # two of them are visited
    assert counted.active == counted.total - sizes["mtp"] - idle


@pytest.mark.parametrize("config", [*CONFIGS.values(), LINEAR], ids=[*CONFIGS, "linear"])
def test_matrices_are_split_as_the_roles_of_the_real_ones_say(config):
    split = {"column": "rows", "row": "columns", "replicated": ""}
    real = [(*m.weight.shape[-2:], m.weight.shape[0] if isinstance(m, ExpertLinear) else 1, split[m.role])
            for m in build(config).modules() if isinstance(m, (Linear, ExpertLinear)) and m.weight.shape[-2] != 352]
    planned = [(m.rows, m.columns, m.count, m.split) for m in every_matrix(config, ahead=True)]
    assert sorted(real) == sorted(planned)


@pytest.mark.parametrize("shape", [*PRESETS.values(), shape_of_depth(2), shape_of_depth(5)])
def test_total_equals_the_real_model_for_every_preset(shape):
    config = shape.lm_config(vocab_size=6400, seq_len=512)
    with torch.device("meta"):
        model = LM(config)
    assert count_params(config).total == sum(p.numel() for p in model.parameters())


def score(model: LM, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What training makes of the output: the head on everything that predicts."""
    output = model(ids, positions)
    return sum(replace(output, hidden=h, aux={}, further=()).logps(ids.clone()).sum()
               for h in (output.hidden, *output.further))


@pytest.mark.parametrize("recompute", [False, True])
def test_flops_equal_torchs_counter(config, recompute):
    model = build(config).train()
    model.recompute = recompute
    ids, positions = torch.randint(0, config.vocab_size, (B, T)), torch.arange(T).expand(B, T)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        score(model, ids, positions).backward()
    planned = flops_per_token(config, T, causal=False, recompute=recompute).hardware * B * T
    assert counter.get_total_flops() == pytest.approx(planned, rel=0.01)


@pytest.mark.parametrize("name", ["tied", "mixed layers", "latent", "another build", "alibi, relu2"])
def test_flops_of_selective_recomputation_equal_torchs_counter(name):
    """On a CPU attention runs again as well: its blocks are no single operation that could be kept."""
    config = CONFIGS[name]
    model = build(config).train()
    model.recompute = "selective"
    ids, positions = torch.randint(0, config.vocab_size, (B, T)), torch.arange(T).expand(B, T)
    with FlopCounterMode(display=False) as counter:
        score(model, ids, positions).backward()
    planned = flops_per_token(config, T, causal=False, recompute="selective")
    attention = sum(layer_flops(config, layer, T, False)[1] for layer in config.layers)
    assert planned.recompute < flops_per_token(config, T, causal=False, recompute=True).recompute
    assert counter.get_total_flops() == pytest.approx((planned.hardware + attention) * B * T, rel=0.02)


def test_causal_attention_costs_half_of_full_attention_and_nothing_else_changes(config):
    full, causal = (flops_per_token(config, T, causal=c) for c in (False, True))
    attention = sum(2 * T * layer.mixer.heads * (2 * layer.mixer.head_dim if isinstance(layer.mixer, GQAConfig) else
                                                 layer.mixer.key_dim + layer.mixer.value_dim)
                    for layer in (*config.layers, *config.mtp))
    assert full.forward - causal.forward == pytest.approx(attention * (T - 1) / (2 * T))
    assert causal.model == 3 * causal.forward < causal.hardware


@pytest.mark.parametrize("length", [1, 4, 5, 9, 20])
def test_a_window_saves_arithmetic_and_memory(length):
    full = replace(SHAPE).lm_config(vocab_size=352, seq_len=32)
    seen = sum(min(t, 5) for t in range(1, length + 1)) / length
    saved = flops_per_token(full, length).forward - flops_per_token(WINDOWS, length).forward
    assert saved == pytest.approx(2 * 4 * 6 * 10 * ((length + 1) / 2 - seen))
    kept = 2 * 2 * 10 * 2 * 4                                                     # k and v, 2 heads of 10, two layers
    assert cache_bytes(full, length, 4) - cache_bytes(WINDOWS, length, 4) == kept * (length - min(length, 5))


def bytes_held(config, length: int) -> int:
    """What the engine's cache holds of B sequences just before their tokens number `length` are computed."""
    engine = Engine(build(config), None, EngineConfig(block_size=1, max_seqs=B, prefix_caching=False, fused=False))
    for _ in range(B):
        engine.submit(Request(prompt=[0] * (length - 1), max_new=9))
    engine.step()
    engine.scheduler.plan()
    held = {blocks.window: sum(map(bool, blocks.holders)) for blocks in engine.kinds}
    layers = zip(engine.cache.specs, engine.cache.pools)
    tokens = sum(pool.blocks[0].nbytes * held[spec.window] for spec, pools in layers for pool in pools.values())
    return tokens + sum(x[1:].nbytes for layer in engine.cache.sequences for x in layer.values())


@pytest.mark.parametrize("name, config", [("linear", LINEAR), ("windows", WINDOWS)])
def test_cache_bytes_of_layers_that_forget(name, config):
    assert cache_bytes(config, 9, itemsize=4) * B == bytes_held(config, 9)
    assert cache_bytes_per_token(config, 4) == (0 if name == "linear" else 2 * 2 * 10 * 4)


def test_arithmetic_of_linear_attention_is_about_torchs_count():
    """torch does not count the triangular systems, which are a tenth of a small head's work."""
    model = build(LINEAR).train()
    ids, positions = torch.randint(0, 352, (B, 64)), torch.arange(64).expand(B, 64)
    with FlopCounterMode(display=False) as counter:
        score(model, ids, positions).backward()
    planned = flops_per_token(LINEAR, 64).hardware * B * 64
    assert counter.get_total_flops() == pytest.approx(planned, rel=0.15)


def test_cache_bytes_equal_a_real_cache(config):
    per_sequence = sum(spec.bytes_per_seq(4) for spec in build(config).state_specs())
    assert (cache_bytes_per_token(config, itemsize=4) * 7 + per_sequence) * B == bytes_held(config, 7)


@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "bf16"])
def test_activations_are_what_autograd_saves(config, narrow):
    compare_activations(config, narrow, T)


@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("change", [{}, {"head_dim": 20}, {"heads": 12}, {"kv_heads": 6}, {"dim": 96}])
def test_activations_of_linear_attention_are_about_what_autograd_saves(change, narrow):
    compare_activations(replace(SHAPE, pattern="D", **change).lm_config(vocab_size=352, seq_len=128), narrow, 128)


def compare_activations(config, narrow: bool, T: int, change=lambda model: None, lora_rank: int = 0,
                        copies: int = 0) -> None:
    """Within 3% (5% where norms stand elsewhere, and for linear attention): the bytes of all distinct storages kept for
    the backward pass, weights and their casts left out."""
    model = build(config).train()
    shapes = {s for p in model.parameters() if p.ndim == 2 for s in (tuple(p.shape), tuple(p.shape[::-1]))}
    change(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes |= {s for p in model.parameters() if p.ndim == 2 for s in (tuple(p.shape), tuple(p.shape[::-1]))}
    saved: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    rows = 5 * T                                             # 160 rows: no activation has the shape of a weight
    ids, positions = torch.randint(0, config.vocab_size, (5, T)), torch.arange(T).expand(5, T)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", enabled=narrow):
        score(model, ids, positions)
    kept = [x for at, x in saved.items() if at not in weights and not (narrow and tuple(x.shape) in shapes)]
    measured = sum(x.untyped_storage().nbytes() for x in kept)
    planned = rows * activation_bytes_per_token(config, itemsize=2 if narrow else 4, lora_rank=lora_rank) + copies
    assert measured == pytest.approx(planned, rel=0.05 if config.placement != "pre" or isinstance(
        config.layers[0].mixer, DeltaConfig) else 0.03)


def test_recompute_keeps_only_the_inputs_of_blocks(config):
    less, all_ = (activation_bytes_per_token(config, recompute=r) for r in (True, False))
    blocks = len(config.layers)
    assert less < all_ and activation_bytes_per_token(
        replace(config, layers=config.layers * 2), recompute=True) - less == blocks * config.dim * 4


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizer_bytes_equal_the_real_states(config, kind):
    model = build(config)
    optim = OptimConfig(kind=kind, lr=1e-3)
    optimizers = build_optimizers(parameter_groups(model, optim), optim)
    score(model.train(), torch.zeros(B, T, dtype=torch.long), torch.arange(T).expand(B, T)).backward()
    for p in model.parameters():                             # an untied head took no part: every state must exist
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    for optimizer in optimizers:
        optimizer.step()
    held = sum(x.nbytes for o in optimizers for state in o.state.values()
               for x in state.values() if isinstance(x, torch.Tensor) and x.ndim)
    assert held == optimizer_bytes(config, kind)


def test_memory_adds_up_and_grows_with_what_it_should():
    config = CONFIGS["tied"]
    small = plan_memory(config, batch_size=1, seq_len=T)
    large = plan_memory(config, batch_size=4, seq_len=T, ema=True)
    assert large.activations == pytest.approx(4 * small.activations, rel=1e-3)
    assert large.weights == small.weights == 4 * count_params(config).total == large.ema and small.ema == 0
    assert plan_memory(config, batch_size=1, seq_len=T, itemsize=4).casts == 0 < small.casts
    assert token_ratio(count_params(config), 20 * count_params(config).total) == 20


@pytest.mark.parametrize("nf4", [False, True], ids=["lora", "qlora"])
def test_weights_and_states_of_adapters_are_the_real_ones(config, nf4):
    model = build(config)
    if nf4:
        quantize_model(model)
    add_adapter(model, LoRAConfig(rank=3))
    plan = plan_memory(config, batch_size=1, seq_len=T, lora_rank=3, nf4=nf4, ema=True)
    learning = [p for p in model.parameters() if p.requires_grad]
    assert plan.weights == sum(p.nbytes for p in model.parameters())
    assert plan.gradients == plan.ema == sum(p.nbytes for p in learning) == plan.optimizer // 2
    assert sum(m.entries for m in adapter_matrices(config, 3)) == sum(p.numel() for p in learning)


def test_adapters_and_packed_weights_of_linear_attention_too():
    """Its two gates have adapters and stay dense."""
    test_weights_and_states_of_adapters_are_the_real_ones(LINEAR, True)


@pytest.mark.parametrize("nf4", [False, True], ids=["lora", "qlora"])
@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["tied", "mixed layers", "latent", "another build", "alibi, relu2"])
def test_activations_beside_adapters_are_what_autograd_saves(name, narrow, nf4):
    def changed(model: LM) -> None:
        if nf4:
            quantize_model(model)
        add_adapter(model, LoRAConfig(rank=3))

    compare_activations(CONFIGS[name], narrow, T, changed, 3)


def test_experts_are_copied_where_they_have_adapters():
    config = CONFIGS["mixture"]
    copies = plan_memory(config, batch_size=1, seq_len=T, itemsize=4, lora_rank=3).casts
    assert copies == 2 * 3 * 5 * 28 * 48 * 4                 # layers, matrices, experts
    compare_activations(config, False, T, lambda model: add_adapter(model, LoRAConfig(rank=3)), 3, copies)


def test_packed_states_are_planned_as_they_are():
    """By the tensors of bitsandbytes, whose table of codes all parameters share."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = replace(SHAPE, dim=80).lm_config(vocab_size=352, seq_len=32)         # on both sides of 4096 entries
    model, optim = build(config), OptimConfig(kind="adamw", lr=1e-3, states="8bit")
    optimizers = build_optimizers(parameter_groups(model, optim), optim)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    held = sum(x.nbytes for o in optimizers for state in o.state.values() for name, x in state.items()
               if isinstance(x, torch.Tensor) and x.ndim and not name.startswith("qmap"))
    assert held == optimizer_bytes(config, "adamw", states="8bit") < 0.7 * optimizer_bytes(config, "adamw")


def test_pages_and_four_bits_take_what_they_take():
    config = PRESETS["mini"].lm_config(vocab_size=6400, seq_len=512)
    plans = {name: plan_memory(config, batch_size=1, seq_len=64, itemsize=4, **options) for name, options in {
        "full": {}, "lora": {"lora_rank": 8}, "qlora": {"lora_rank": 8, "nf4": True},
        "paged": {"states": "paged", "paged": True}, "idle": {"states": "paged"}, "8bit": {"states": "8bit"}}.items()}
    assert plans["full"].total > plans["8bit"].total > plans["lora"].total > plans["qlora"].total
    assert plans["paged"].optimizer == min(256 << 20, plans["full"].optimizer) <= plans["idle"].optimizer
    assert plans["idle"] == plans["full"]
    large = preset("small").lm_config(vocab_size=32_000, seq_len=512)
    assert plan_memory(large, batch_size=1, seq_len=64, states="paged", paged=True).optimizer == 256 << 20


# --------------------------------------------------------------------------------------------------- the command `plan`

def test_the_plan_of_a_training_command(tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text("depth = 2\n[data]\nseq_len = 128\n[loop]\nbatch = 16\nsteps = 100\n")
    line = ["plan", str(path), "--device", "cpu", "--loop.precision", "fp32", "--data.vocab_size", "500"]
    assert cli.main(line) == 0
    shown = capsys.readouterr().out
    params = count_params(shape_of_depth(2).lm_config(vocab_size=500, seq_len=128))
    assert f"{params.total:,}" in shown and f"{params.ffn:,}" in shown
    assert f"{100 * 16 * 128 / 1000:.0f}k" in shown and "FLOP/s in fp32 (measured)" in shown
    assert "512 B of cache per token" in shown                # 2 layers x (k, v) x 1 head x 64 x 2 bytes


def test_a_plan_for_gpus_that_are_not_here(capsys):
    """The preset for one GPU, on eight: figures of the data sheet, whatever this machine has."""
    assert cli.main(["plan", str(Path(__file__).parents[1] / "configs" / "small-gpu.toml"), "--gpu", "h100", "--world",
                     "8", "--mfu", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert "8 x H100, 989 TFLOP/s in bf16 (data sheet)" in shown and "10:00" in shown
    steps = int(re.search(r"steps\D+([\d,]+)", shown)[1].replace(",", ""))
    per_token = flops_per_token(preset("small").lm_config(vocab_size=6400, seq_len=1024), 1024).model
    assert steps == pytest.approx(8 * 989e12 * 0.5 * 600 / per_token / (256 * 1024), rel=0.01)


@pytest.mark.parametrize("name", [name for name, _ in PEAKS])
def test_every_gpu_of_the_table_can_be_planned_for(name, capsys):
    assert cli.main(["plan", "--depth", "2", "--loop.steps", "1", "--gpu", name.lower()]) == 0
    assert f"1 x {name}, " in " ".join(capsys.readouterr().out.split())


def test_the_plan_of_a_base_in_four_bits(capsys):
    line = ["plan", "--depth", "4", "--loop.steps", "9", "--device", "cpu", "--loop.precision", "fp32"]
    totals = []
    for more in ([], ["--lora.rank", "8"], ["--lora.rank", "8", "--lora.nf4"]):
        assert cli.main([*line, *more]) == 0
        shown = capsys.readouterr().out
        assert ("adapters of rank 8" in shown) == bool(more)
        number, unit = re.search(r"weights\D+([\d.]+) (kB|MB)", shown).groups()
        totals.append(float(number) * {"kB": 1e3, "MB": 1e6}[unit])
    config = shape_of_depth(4).lm_config(vocab_size=6400, seq_len=512)
    for shown, options in zip(totals, ({}, {"lora_rank": 8}, {"lora_rank": 8, "nf4": True})):
        assert shown == pytest.approx(plan_memory(config, batch_size=8, seq_len=512, **options).weights, rel=0.01)


def test_a_plan_that_does_not_fit_warns(capsys):
    assert cli.main(["plan", "--model.dim", "1048576", "--loop.steps", "1", "--device", "cpu"]) == 0
    assert "lower loop.micro_batch" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("words, message", [
    (["--mfu", "3"], "mfu=3.0 must lie in (0, 1]"),
    (["--dept", "3"], "--dept is not an option; did you mean --depth?"),
    (["--loop.epochs", "1"], "loop.epochs needs data.train"),
    (["--lora.rank", "-1"], "rank=-1 must be at least 1"),
    (["--lora.nf4"], "nf4 keeps a base that does not learn: give lora.rank as well"),
    (["--optim.states", "8bit"], "set kind to adamw"),
    (["--loop.epochs", "1", "--data.train", "raw.jsonl"], "cannot be planned before it is tokenised"),
    (["--gpu", "H9000"], "hardware=H9000 is not in the table of data sheets; did you mean "),
    (["--hardware", "zzz"], "hardware=zzz is not in the table of data sheets\nThe table has GB200, B200"),
    (["llama3-8b"], "'llama3-8b' is neither a preset nor a published model nor a model directory; did you mean "),
    (["--gpus", "0"], "gpus=0 must be at least 1"),
    (["--price", "-1"], "price=-1.0 must not be negative"),
    (["--search"], "--search compares times: give --hardware, or `mindseed plan --measure` this machine first"),
    (["--machine", "nowhere.json"], "nowhere.json does not exist; write it with `mindseed plan --measure"),
    (["--gpus", "8", "--parallel.tensor", "3"], "pipe 1 x context 1 x tensor 3 = 3 does not divide the 8 ranks"),
    (["--gpu", "v100", "--loop.precision", "bf16"], "says nothing of bf16; give --loop.precision fp16 or fp32"),
    (["--model.kv_heads", "4"], "must be a multiple of kv_heads=4")])
def test_what_a_plan_refuses(words, message, capsys):
    assert cli.main(["plan", *words]) == 2
    assert message in capsys.readouterr().err


def test_batch_and_rate_follow_from_the_arithmetic_of_the_run():
    def derived(params: int, world: int = 1, tokens: float | None = None, **loop):
        options = TrainOptions(model=ModelOptions(start=loop.pop("start", None)), loop=LoopOptions(**loop),
                               data=DataOptions(seq_len=512))
        some = derive(options, params=params, rows_per_epoch=1000, world=world, tokens=tokens)
        return some.loop.steps, some.loop.batch, some.optim.lr

    steps, batch, lr = derived(64_000_000)                           # 20 tokens a parameter
    compute = 6 * 64e6 * steps * batch * 512
    assert batch * 512 == pytest.approx(0.292 * compute ** 0.3271, rel=0.02)             # 2401.02954, equation 1
    assert lr == pytest.approx(0.3118 * compute ** -0.125, rel=0.02)
    assert steps * batch * 512 == pytest.approx(20 * 64e6, rel=0.01)
    assert derived(64_000_000, steps=steps)[1:] == (pytest.approx(batch, rel=0.05), lr)       # the same run, in steps
    assert derived(64_000_000, epochs=steps * batch / 1000)[1:] == (batch, lr)
    assert derived(64_000_000, minutes=5, tokens=20 * 64e6) == (steps, batch, lr)
    assert derived(64_000_000, minutes=5) == (None, None, None)      # not before the clock has been asked
    assert derived(2_000_000, steps=100)[1] == 8 and derived(2_000_000, steps=100)[2] > 2 * lr
    assert derived(2_000_000, steps=100, world=4)[1] == 32           # a micro-batch for every rank at least
    assert derived(2_000_000, steps=100, start="x")[2] == pytest.approx(derived(2_000_000, steps=100)[2] / 5, rel=0.03)
    assert derived(2_000_000, steps=100, batch=6)[1] == 6
