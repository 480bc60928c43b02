"""DeepSpeed against the native backend: on two ranks the same losses and gradient norms as on one process with all
rows, and checkpoints that either reads.

All cases run in one process group, as DeepSpeed takes seconds to import. Nothing is compiled.
"""
from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mindseed.adapt.lora import LoRAConfig, add_adapter, learn
from mindseed.base import dist
from mindseed.base.errors import UserError
from mindseed.base.mesh import ParallelOptions
from mindseed.core import Batch
from mindseed.models.lm import LM, build
from mindseed.objectives.sft import SFT
from mindseed.optim.groups import OptimConfig, build_optimizers, parameter_groups
from mindseed.parallel import checkpoint as spread
from mindseed.parallel.mesh import make_mesh
from mindseed.parallel.parallelize import parallelize
from mindseed.train.balance import Balance
from mindseed.train.deepspeed import DeepSpeedBackend, deepspeed_backend
from mindseed.train.deepspeed_json import KNOWN, deepspeed_config
from mindseed.train.native import NativeBackend, NonFinite
from mindseed.train.step import Run, train_step
from tests import spawn
from tests.tiny import Fixed, kit, random_batch, randomise, split, tiny_model

STEPS = 5
LR = 1e-2
OPTIM = OptimConfig(kind="adamw", lr=LR)
CLIP = 1.0                                        # norms of these runs begin at 3
MISSING = None if importlib.util.find_spec("deepspeed") else "deepspeed is not installed: pip install '.[deepspeed]'"
needs_deepspeed = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def batch() -> Batch:
    """Rows with uneven counts of supervised tokens; cut in four, the third part has none."""
    return random_batch(8, 24, empty=(4, 5))


def model_of(kind: str) -> LM:
    if kind == "dense":
        return tiny_model().train()
    model = build(kit("gqa", "mla", ffn="moe" if kind == "moe" else "swiglu"))
    randomise(model)
    if kind == "lora":
        add_adapter(model, LoRAConfig(rank=4))
        learn(model, "default")
        for p in model.parameters():
            p.requires_grad and torch.nn.init.normal_(p, 0, 0.1, torch.Generator().manual_seed(p.numel()))
    return model.train()


def run_of(backend: Any, source: Fixed, accumulate: int, objective: SFT) -> Run:
    return Run(source, objective, backend, schedule=lambda step: LR / (1 + step), accumulate=accumulate,
               balance=Balance(backend.model))


def native(kind: str, precision: str = "fp32") -> Run:
    """One process, all rows at once."""
    model, objective = model_of(kind), SFT()
    optimizers = build_optimizers(parameter_groups(model, OPTIM), OPTIM)
    backend = NativeBackend(model, objective, optimizers, precision=precision, max_norm=CLIP)
    return run_of(backend, Fixed([batch()]), 1, objective)


def shared(folder: Path, kind: str, zero: int, **how: Any) -> Run:
    """This rank's half of the rows, in two micro-batches. Under ZeRO-3 all weights are taken apart, however small."""
    if zero == 3:
        how["json"] = folder / "apart.json"
    model, objective = model_of(kind), SFT()
    optimizers = build_optimizers(parameter_groups(model, OPTIM), OPTIM)
    backend = deepspeed_backend(model, objective, optimizers, zero=zero, max_norm=CLIP, micro_batch=2, accumulate=2,
                                **how)
    return run_of(backend, Fixed(split(batch(), 4)[dist.rank()::dist.world_size()]), 2, objective)


def steps(run: Run, count: int) -> list[tuple[float, float]]:
    return [(m["loss"], m["grad_norm"]) for m in (train_step(run) for _ in range(count))]


def digest(weights: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(x.detach().contiguous().numpy().tobytes() for x in weights.values())).hexdigest()


def saved(run: Run) -> dict[str, Any]:
    backend = run.backend
    model = backend.weights() if isinstance(backend, DeepSpeedBackend) else backend.model.state_dict()
    return {"model": model, "backend": backend.state_dict(), "step": run.step, "balance": run.balance.state_dict()}


def load(run: Run, state: dict[str, Any]) -> None:
    load_weights = getattr(run.backend, "load_weights", run.backend.model.load_state_dict)
    load_weights(state["model"])
    run.backend.load_state_dict(state["backend"])
    run.balance.load_state_dict(state["balance"])
    run.step = state["step"]


# --------------------------------------------------------------------------------------------- what two ranks have done

EQUAL = {f"{kind}, ZeRO-{zero}": (kind, {"zero": zero}) for kind, stages in (("dense", (0, 1, 2, 3)), ("moe", (1, 3)))
         for zero in stages}
EQUAL |= {"dense, ZeRO-2, offload": ("dense", {"zero": 2, "offload": True}),
          "dense, ZeRO-3, offload": ("dense", {"zero": 3, "offload": True}),
          "lora, ZeRO-3": ("lora", {"zero": 3})}
ROUGH = {"bf16, ZeRO-1": ("dense", {"zero": 1, "precision": "bf16"}),
         "bf16, ZeRO-3, gathered in bf16": ("dense", {"zero": 3, "precision": "bf16", "gather": "bf16"}),
         "fp16, ZeRO-0": ("dense", {"zero": 0, "precision": "fp16"}),
         "fp16, ZeRO-2": ("dense", {"zero": 2, "precision": "fp16"})}


def on_rank(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Every case, one after the other; what each gave, as this rank saw it."""
    found: dict[str, Any] = {}
    for name, (kind, how) in (EQUAL | ROUGH).items():
        run = shared(folder, kind, **how)
        found[name] = steps(run, STEPS)
        with run.backend.whole():
            found[f"hash: {name}"] = digest(dict(run.backend.model.named_parameters()))
    found["written"] = written(folder)
    found["read"] = {zero: continued(folder, zero) for zero in (0, 1, 3)}
    found["spread"] = from_a_mesh(folder)
    found["nan"] = {zero: spoilt(folder, zero, rank) for zero in (0, 2, 3)}
    found["whole"] = apart(folder, rank)
    found["overflow"] = overflowing(folder)
    found["bf16 weights"] = with_json(folder, rank)
    return found


def written(folder: Path) -> list[tuple[float, float]]:
    """A run under ZeRO-3 that is saved on the way: how it went on."""
    run = shared(folder, "moe", 3)
    steps(run, 3)
    state = saved(run)
    if dist.is_main():
        torch.save(state, folder / "deepspeed.pt")
    else:
        assert not state["model"] and not state["backend"]["optimizers"][0]["state"]       # kept by who writes it
    return steps(run, 3)


def continued(folder: Path, zero: int) -> list[tuple[float, float]]:
    """From what one process has saved with the native backend. Only rank 0 has it."""
    run = shared(folder, "moe", zero)
    steps(run, 1)                                                                 # moments that must not stay
    state = torch.load(folder / "native.pt", weights_only=True)
    load(run, state if dist.is_main() else {**state, "model": {}, "backend": {**state["backend"], "optimizers": [
        {"state": {}}]}})
    return steps(run, 3)


def from_a_mesh(folder: Path) -> list[tuple[float, float]]:
    """From what two ranks of the native backend have saved in parts, under our own ZeRO-3."""
    mesh = make_mesh(ParallelOptions(zero=3), torch.device("cpu"))
    model, objective = parallelize(model_of("moe"), mesh), SFT()
    optimizers = build_optimizers(parameter_groups(model, OPTIM), OPTIM)
    backend = NativeBackend(model, objective, optimizers, max_norm=CLIP, mesh=mesh)
    source = Fixed(split(batch(), 4)[dist.rank()::dist.world_size()])
    steps(run_of(backend, source, 2, objective), 3)
    spread.save(folder / "spread", spread.everything(model, optimizers, None), background=False)
    small = {k: v for k, v in backend.state_dict().items() if k != "optimizers"}
    dist.share(None)
    run = shared(folder, "moe", 2)
    run.backend.load_spread(folder / "spread", small, None)
    run.step = 3
    return steps(run, 3)


def spoilt(folder: Path, zero: int, rank: int) -> dict[str, Any]:
    """A gradient that is not a number on one rank alone."""
    run = shared(folder, "dense", zero)
    steps(run, 2)
    before = saved(run)
    scale = torch.tensor(float("nan") if rank == 1 else 1.0)
    run.backend.forward_backward(split(batch(), 4)[rank], scale=scale, last=True)
    with pytest.raises(NonFinite, match="gradient norm is") as caught:
        run.backend.step(LR)
    after = saved(run)
    moments = [{i: s["exp_avg"] for i, s in x["backend"]["optimizers"][0]["state"].items()} for x in (before, after)]
    same = all(torch.equal(a[k], b[k]) for a, b in ((before["model"], after["model"]), moments) for k in a)
    return {"same": same, "message": str(caught.value), "after": steps(run, 1)}


def apart(folder: Path, rank: int) -> dict[str, Any]:
    """Ranks that do different work in the middle of a run under ZeRO-3."""
    run, all_rows = shared(folder, "dense", 3), batch()
    before = steps(run, 2)
    with run.backend.whole():
        losses = {run.backend.score(all_rows).item() for _ in range(1 + rank)}
        nats, tokens = run.backend.nll(all_rows)
        with run.backend.to_save() as model:
            assert (model is not None) == dist.is_main()
    together = run.backend.score(all_rows).item()
    left = run.backend.model.blocks[0].ffn.gate.weight.numel()                    # of what the forward pass gathered
    return {"steps": before + steps(run, 2), "losses": [*losses, nats.item(), together], "tokens": int(tokens),
            "left": left}


def overflowing(folder: Path) -> dict[str, Any]:
    """A loss scale that is too large at first."""
    found = {}
    for zero in (0, 2):
        run = shared(folder, "dense", zero, precision="fp16")
        run.backend.scaler.scale = 2.0 ** 22
        norms = [norm for _, norm in steps(run, 10)]
        found[zero] = {"norms": norms, "skipped": run.backend.skipped, "scaler": run.backend.state_dict()["scaler"]}
    return found


def with_json(folder: Path, rank: int) -> dict[str, Any]:
    """Settings as Hugging Face's Trainer takes them, which keep weights in bf16."""
    file = folder / f"settings-{rank}.json"
    file.write_text(json.dumps({"bf16": {"enabled": True}, "fp16": {"enabled": "auto", "loss_scale": 0},
                                "train_batch_size": "auto", "gradient_clipping": "auto",
                                "zero_optimization": {"stage": 2, "reduce_bucket_size": 4096, "overlap_comm": "auto"}}))
    run = shared(folder, "dense", 2, precision="bf16", json=file)
    taken = steps(run, STEPS)
    kept = {str(x.dtype) for x in run.backend.weights().values()}
    return {"steps": taken, "weights": str(run.backend.params[0].dtype), "kept": sorted(kept)}


@cache
def wanted(kind: str, precision: str = "fp32") -> list[tuple[float, float]]:
    return steps(native(kind, precision), 6)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> tuple[list[dict[str, Any]], Path]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        importlib.import_module("deepspeed")
    except Exception as error:                    # installed, and not for this machine
        pytest.skip(f"deepspeed does not import: {type(error).__name__}: {error}")
    folder = tmp_path_factory.mktemp("deepspeed")
    run = native("moe")
    steps(run, 3)
    torch.save(saved(run), folder / "native.pt")
    (folder / "apart.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    return spawn.on_ranks(partial(on_rank, folder), timeout=600), folder


def near(got: list, want: list, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------- the same steps

@needs_deepspeed
@pytest.mark.parametrize("name", EQUAL)
def test_two_ranks_equal_the_native_backend_on_the_union(ranks, name):
    """Losses and gradient norms to 1e-5, in float32; one of the four micro-batches has no supervised token, and every
    step is clipped."""
    want = wanted(EQUAL[name][0])[:STEPS]
    assert min(norm for _, norm in want) > CLIP
    for found in ranks[0]:
        near(found[name], want)


@needs_deepspeed
@pytest.mark.parametrize("name", ROUGH)
def test_in_half_precision_the_steps_are_near(ranks, name):
    """The first loss is the same; afterwards a last bit of a float32 sum may round a weight's half the other way."""
    kind, how = ROUGH[name]
    want, got = wanted(kind, how["precision"])[:STEPS], ranks[0][0][name]
    near(got[0][:1], want[0][:1], 1e-4)
    near(got, want, 2e-2)


@needs_deepspeed
@pytest.mark.parametrize("name", [*EQUAL, *ROUGH])
def test_ranks_have_the_same_weights(ranks, name):
    first, second = (found[f"hash: {name}"] for found in ranks[0])
    assert first == second


# ---------------------------------------------------------------------------------------------------------- checkpoints

@needs_deepspeed
def test_the_native_backend_goes_on_from_zero_3(ranks):
    found, folder = ranks
    run = native("moe")
    load(run, torch.load(folder / "deepspeed.pt", weights_only=True))
    got = steps(run, 3)
    near(got, found[0]["written"])
    near(got, wanted("moe")[3:])


@needs_deepspeed
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_it_goes_on_from_the_native_backend(ranks, zero):
    near(ranks[0][1]["read"][zero], wanted("moe")[3:])


@needs_deepspeed
def test_it_goes_on_from_weights_that_a_mesh_has_saved_in_parts(ranks):
    near(ranks[0][1]["spread"], wanted("moe")[3:])


@needs_deepspeed
def test_a_checkpoint_has_the_form_of_the_native_backend(ranks):
    ours = torch.load(ranks[1] / "deepspeed.pt", weights_only=True)
    theirs = torch.load(ranks[1] / "native.pt", weights_only=True)
    assert {k: (v.shape, v.dtype) for k, v in ours["model"].items()} == {
        k: (v.shape, v.dtype) for k, v in theirs["model"].items()}
    (a,), (b,) = ours["backend"]["optimizers"], theirs["backend"]["optimizers"]
    assert [set(g) for g in a["param_groups"]] == [set(g) for g in b["param_groups"]]
    assert [g["params"] for g in a["param_groups"]] == [g["params"] for g in b["param_groups"]]
    assert a["state"].keys() == b["state"].keys()
    for i, state in b["state"].items():
        assert a["state"][i].keys() == state.keys() and a["state"][i]["step"] == state["step"] == 3
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(a["state"][i][name], state[name], rtol=1e-4, atol=1e-7)
    model = model_of("moe")
    optimizers = build_optimizers(parameter_groups(model, OPTIM), OPTIM)
    assert ours["backend"]["names"] == [spread.names_of(model, optimizer) for optimizer in optimizers]


# ---------------------------------------------------------------------------------------------------- what may go wrong

@needs_deepspeed
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_gradient_that_is_not_finite_changes_nothing(ranks, zero):
    for found in (rank["nan"][zero] for rank in ranks[0]):
        assert found["same"] and "at lr=0.01" in found["message"]
        near(found["after"], wanted("dense")[2:3])                                # and it is not remembered


@needs_deepspeed
def test_ranks_may_do_different_work_inside_whole(ranks):
    for found in (rank["whole"] for rank in ranks[0]):
        near(found["steps"], wanted("dense")[:4])
        near(found["losses"], [found["losses"][0]] * 3)
        assert found["tokens"] == int((batch().weights > 0).sum()) and found["left"] == 0


@needs_deepspeed
@pytest.mark.parametrize("zero", [0, 2])
def test_fp16_leaves_steps_out_until_its_scale_fits(ranks, zero):
    found = ranks[0][0]["overflow"][zero]
    left_out = [norm for norm in found["norms"] if norm - norm != 0]
    assert 0 < len(left_out) == found["skipped"] < 10 and found["norms"][-1] < 10
    assert found["scaler"]["scale"] == 2.0 ** (22 - len(left_out))
    assert found["scaler"].keys() == torch.amp.GradScaler("cpu").state_dict().keys()


@needs_deepspeed
def test_a_file_of_settings_is_laid_over_ours(ranks):
    found = ranks[0][0]["bf16 weights"]
    assert found["weights"] == "torch.bfloat16" and found["kept"] == ["torch.float32"]
    near(found["steps"], wanted("dense", "bf16")[:STEPS], 5e-2)


def test_only_adamw_is_taken():
    model, config = tiny_model(), OptimConfig(kind="muon", lr=LR)
    with pytest.raises(UserError, match="this run has AdamW and Muon: give --optim.kind adamw"):
        deepspeed_backend(model, SFT(), build_optimizers(parameter_groups(model, config), config), zero=1)


def test_fp8_is_refused():
    model = tiny_model()
    with pytest.raises(UserError, match="loop.precision=fp8"):
        deepspeed_backend(model, SFT(), build_optimizers(parameter_groups(model, OPTIM), OPTIM), zero=1,
                          precision="fp8")


@pytest.mark.skipif(MISSING is None, reason="deepspeed is installed")
def test_without_deepspeed_it_says_how_to_install_it():
    model = tiny_model()
    with pytest.raises(UserError, match="pip install"):
        deepspeed_backend(model, SFT(), build_optimizers(parameter_groups(model, OPTIM), OPTIM), zero=1)


# ------------------------------------------------------------------------------------------------------------- settings

EVERY = [dict(zero=zero, offload=offload, precision=precision, gather=gather)
         for zero in (0, 1, 2, 3) for offload in (False, True) for precision in ("fp32", "bf16", "fp16")
         for gather in ("fp32", "bf16") if zero or not offload]


def test_settings_follow_from_the_options():
    config = deepspeed_config(zero=3, offload=True, precision="bf16", gather="bf16", max_norm=0.5, micro_batch=4,
                              accumulate=8, params=1000, pin=True)
    assert config["zero_optimization"] == {
        "stage": 3, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True}}
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"],
            config["gradient_accumulation_steps"], config["gradient_clipping"]) == (32, 4, 8, 0.5)
    assert config["torch_autocast"]["dtype"] == "bfloat16" and config["torch_autocast"]["lower_precision_safe_modules"]
    assert deepspeed_config(zero=1, params=1001)["zero_optimization"]["allgather_bucket_size"] == 1002
    assert deepspeed_config(zero=0)["gradient_clipping"] == 0 and "torch_autocast" not in deepspeed_config(zero=1)
    assert "offload_param" not in deepspeed_config(zero=2, offload=True)["zero_optimization"]
    assert all(deepspeed_config(**how).keys() <= KNOWN for how in EVERY)


@needs_deepspeed
def test_deepspeed_takes_every_one_of_them(monkeypatch):
    """Its own reader refuses keys it does not know below the top; of those at the top it has a list of constants."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.runtime import constants
    for how in EVERY:
        read = deepspeed.DeepSpeedConfig(deepspeed_config(**how))
        assert read.zero_optimization_stage == how["zero"]
        assert (read.zero_config.offload_optimizer is not None) == how["offload"]
        assert read.torch_autocast_enabled == (how["precision"] == "bf16")
    words = {value for value in vars(constants).values() if isinstance(value, str)}
    assert {key for config in map(lambda how: deepspeed_config(**how), EVERY) for key in config} <= words | {
        "zero_optimization", "gradient_clipping"}


REFUSALS = {
    '{"zero_optimisation": {"stage": 3}}': "does not read zero_optimisation; did you mean zero_optimization",
    '{"optimizer": {"type": "Adam"}}': "leave out optimizer: optim.* say",
    '{"scheduler": {"type": "WarmupLR"}}': "leave out scheduler",
    '{"fp16": {"enabled": true}}': "leave out fp16: loop.precision=fp16",
    '{"bf16": {"enabled": true}}': "bf16 is enabled, but loop.precision is fp32",
    '{"bf16": true}': "bf16 must be an object",
    '{"zero_optimization": {"stage": 1}}': "zero_optimization.stage is 1, but parallel.zero makes it 2",
    '{"train_batch_size": 7}': "train_batch_size is 7, but loop.batch makes it 1",
    '{"gradient_clipping": 2}': "gradient_clipping is 2, but optim.max_norm makes it 1.0",
    "[]": "must be one JSON object", "{": "not valid JSON",
}


@pytest.mark.parametrize("text", REFUSALS)
def test_settings_that_say_something_else_are_refused(tmp_path, text):
    file = tmp_path / "settings.json"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        deepspeed_config(zero=2, json=file)
    assert REFUSALS[text] in str(caught.value) and str(file) in str(caught.value)


def test_settings_of_the_same_content_are_taken(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text('{"zero_optimization": {"stage": 2, "overlap_comm": false}, "gradient_clipping": 1, "wandb": {}}')
    config = deepspeed_config(zero=2, json=file)
    assert config["zero_optimization"]["overlap_comm"] is False and config["wandb"] == {}
    assert config["zero_optimization"]["reduce_bucket_size"] > 0                  # what it does not name stays
    with pytest.raises(UserError, match="does not exist"):
        deepspeed_config(zero=2, json=tmp_path / "none.json")
