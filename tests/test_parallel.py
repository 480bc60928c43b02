"""Every way to share a run out gives the numbers of one process: losses, gradient norms and weights, in float64."""
from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mindseed.base import dist
from mindseed.base.mesh import ParallelOptions
from mindseed.core import Batch
from mindseed.models.config import LayerConfig, LMConfig
from mindseed.nn.ffn import SwiGLUConfig
from mindseed.nn.gqa import GQAConfig
from mindseed.nn.mla import MLAConfig
from mindseed.nn.moe import MoEConfig
from mindseed.optim.groups import OptimConfig
from mindseed.train.native import NonFinite
from mindseed.train.state import capture, restore
from mindseed.train.step import train_step
from mindseed.train.validate import evaluate
from tests.parallel_runs import Case, prepare, trained
from tests.spawn import on_ranks

GQA, WINDOW = GQAConfig(heads=4, kv_heads=2, head_dim=8), GQAConfig(heads=4, kv_heads=2, head_dim=8, window=5)
MLA = MLAConfig(heads=4, kv_rank=12, q_rank=10, plain_dim=6, rope_dim=4, value_dim=5)
SWIGLU = SwiGLUConfig(ffn_dim=48)
MOE = MoEConfig(experts=4, top_k=2, expert_dim=20, shared_dim=12, balance_weight=0.1, z_weight=0.01, bias=True,
                score="sigmoid")


def lm(*layers: tuple[Any, Any], **more: Any) -> LMConfig:
    return LMConfig(**{"vocab_size": 64, "dim": 32, "seq_len": 32, "layers": tuple(
        LayerConfig(mixer=mixer, ffn=ffn) for mixer, ffn in layers)} | more)


MODELS = {"dense": lm((GQA, SWIGLU), (WINDOW, SWIGLU)),
          "moe": lm((GQA, MOE), (WINDOW, MOE), tied=False),
          "mla": lm((MLA, SWIGLU), (MLA, MOE)),
          "norms": lm((GQA, SWIGLU), (GQA, SWIGLU), placement="sandwich", norm="layer", learned_positions=True),
          "mixed": lm((GQA, SWIGLU), (MLA, MOE), (WINDOW, MOE)),
          "deep": lm((GQA, SWIGLU), (WINDOW, SWIGLU), (GQA, MOE), (MLA, MOE), tied=False),
          "ahead": lm((GQA, SWIGLU), (WINDOW, SWIGLU), (GQA, MOE), (MLA, SWIGLU), mtp=tuple(
              LayerConfig(mixer=mixer, ffn=ffn) for mixer, ffn in ((GQA, MOE), (MLA, SWIGLU))))}
OPTIM = {kind: OptimConfig(kind=kind, lr=1e-2) for kind in ("adamw", "muon")}
EVERY = ("dense", "moe", "mla")
MIXTURES = ("moe", "mla")

# (models, options): more of them where there are two ranks, the combinations on four
ON_TWO = [(EVERY, {}), (EVERY, {"zero": 1}), (EVERY, {"zero": 2}), (EVERY, {"zero": 3}),
          (("mixed",), {"zero": 3, "offload": True}), (("norms",), {"zero": 2, "replicas": 2}),
          (EVERY, {"tensor": 2}), (EVERY, {"tensor": 2, "sequence": False}), (("norms",), {"tensor": 2}),
          (EVERY, {"context": 2}), (MIXTURES, {"expert": 2}), (MIXTURES, {"expert": 2, "zero": 3}),
          (("mixed",), {"expert": 2, "context": 2}),
          *((("mixed",), {"optim": "muon", "zero": zero}) for zero in (1, 2, 3)),
          (("mixed",), {"optim": "muon"}), (("mixed",), {"optim": "muon", "tensor": 2}),
          (("moe",), {"optim": "muon", "expert": 2, "zero": 1}),
          *((("ahead",), options) for options in ({"tensor": 2}, {"context": 2}, {"expert": 2, "zero": 3})),
          *((models, {"pipe": 2, "schedule": schedule, "microbatches": pieces}) for models, schedule, pieces in (
              (("deep", "ahead"), "gpipe", 2), (("ahead",), "1f1b", 2), (("deep", "ahead"), "interleaved", 4),
              (("deep", "ahead"), "zero-bubble", 4), (("ahead",), "dualpipe-v", 4))),
          *((("ahead",), {"pipe": 2, "zero": 3, "schedule": schedule, "microbatches": 4}) for schedule in (
              "1f1b", "zero-bubble", "dualpipe-v")), (("norms",), {"pipe": 2, "microbatches": 2})]
ON_FOUR = [*(("mixed", options) for options in (
    {"zero": 2, "replicas": 2}, {"tensor": 2}, {"tensor": 2, "zero": 1}, {"tensor": 2, "zero": 3},
    {"context": 2, "zero": 3}, {"context": 2, "tensor": 2}, {"expert": 2, "tensor": 2},
    {"expert": 2, "tensor": 2, "zero": 3},
    {"expert": 4, "zero": 2}, {"expert": 2}, {"optim": "muon", "zero": 3, "tensor": 2},
    {"optim": "muon", "zero": 2, "replicas": 2}, {"optim": "muon", "context": 2})),
    *((model, {"pipe": 2, "microbatches": 2} | more) for model, more in (
        ("deep", {}), ("ahead", {"zero": 3}), ("ahead", {"tensor": 2}), ("ahead", {"context": 2}),
        ("ahead", {"expert": 2}), ("deep", {"schedule": "interleaved", "tensor": 2, "sequence": False}),
        ("norms", {"tensor": 2})))]
LABELLED = {2: [(model, options) for models, options in ON_TWO for model in models], 4: ON_FOUR}


def case_of(model: str, options: dict[str, Any], ranks: int) -> Case:
    """Two ranks accumulate, four do not."""
    mesh = {name: value for name, value in options.items() if name != "optim"}
    return Case(config=MODELS[model], options=ParallelOptions(**mesh), optim=OPTIM[options.get("optim", "adamw")],
                accumulate=2 if ranks == 2 else 1)


HALF = [{}, {"zero": 2}, {"zero": 3}, {"tensor": 2}, {"context": 2}, {"expert": 2}]


def half(options: dict[str, Any]) -> Case:
    """In fp16, in which one step overflows."""
    return Case(config=MODELS["mixed"], options=ParallelOptions(**options), dtype=torch.float32, precision="fp16",
                optim=OptimConfig(lr=1e-3))


GATHERED = [{"zero": 3}, *({"pipe": 2, "microbatches": 4} | more for more in (
    {"zero": 1}, {"zero": 3, "offload": True}, {"zero": 1, "schedule": "zero-bubble"},
    {"zero": 3, "schedule": "interleaved"}))]


def in_bf16(options: dict[str, Any]) -> Case:
    """In bf16, with weights that travel in it."""
    return Case(config=MODELS["ahead"], options=ParallelOptions(**options), dtype=torch.float32, precision="bf16",
                optim=OptimConfig(lr=1e-3), bf16=bool(options))


def all_of(rank: int, ranks: int) -> dict[str, list[Any]]:
    """Everything that so many ranks are asked in this file."""
    found: dict[str, list[Any]] = {"same": [trained(case_of(*labelled, ranks)) for labelled in LABELLED[ranks]]}
    if ranks == 2:
        found["bf16"] = [trained(in_bf16(options)) for options in GATHERED]
        found |= {"half": [trained(half(options)) for options in HALF], "judged": [judged({"expert": 2})],
                  "drawn": [drawn_on(options) for options in LAYOUTS], "spoilt": [spoilt()]}
    return found


def judged(options: dict[str, Any]) -> list[dict[str, float]]:
    """Held-out loss of one, two and three batches."""
    run, _ = prepare(Case(config=MODELS["moe"], options=ParallelOptions(**options)))
    batches = [run.source.rows(step) for step in range(3)]
    found = [evaluate(run.backend, batches[:count], raw_bytes=100) for count in (1, 2, 3)]
    dist.share(None)
    return found


LAYOUTS = [{}, {"zero": 2}, {"tensor": 2, "sequence": False}, {"tensor": 2}]


def drawn_on(options: dict[str, Any]) -> tuple[float, float]:
    """What this rank would draw after the step at which DDP saved, and what it draws when a mesh has restored that."""
    case = Case(config=MODELS["dense"], options=ParallelOptions(**options))
    torch.manual_seed(100 + dist.rank())
    run, _ = prepare(replace(case, options=ParallelOptions()))
    train_step(run)
    saved = capture(run, None)
    would = torch.rand(()).item()
    run, _ = prepare(case)
    restore(run, None, saved)
    dist.share(None)
    return would, torch.rand(()).item()


def spoilt() -> str:
    """What is said when a weight spoils one row of the batch, which one rank reads."""
    run, _ = prepare(Case(config=MODELS["moe"], accumulate=1))
    usual = run.source.rows

    def rows(step: int) -> Batch:
        batch = usual(step)
        batch.ids[batch.ids == 63] = 0
        batch.ids[5, 3] = 63
        return batch

    with torch.no_grad():
        run.backend.model.embed.weight[63] = torch.nan
    run.source.rows = rows
    run.source.describe = lambda numbers: [f"row {n}" for n in numbers]
    with pytest.raises(NonFinite) as error:
        train_step(run)
    return str(error.value)


@pytest.fixture(scope="module")
def alone() -> Callable[[str, str], dict[str, Any]]:
    """What one process finds, by model and optimiser."""
    return functools.cache(lambda model, optim="adamw": trained(Case(config=MODELS[model], optim=OPTIM[optim])))


@pytest.fixture(scope="module")
def halved() -> dict[str, Any]:
    return trained(half({}))


@pytest.fixture(scope="module")
def together() -> dict[int, list[dict[str, list[Any]]]]:
    """What every rank found, by the number of ranks: everything in one group of processes."""
    return {ranks: on_ranks(all_of, ranks, timeout=900) for ranks in LABELLED}


def same(found: list[dict[str, Any]], wanted: dict[str, Any], tolerance: float = 1e-9) -> None:
    """Every rank tells the figures of one process, and all ranks have one model: that of one process."""
    for rank in found:
        for name in ("loss", "norm"):
            assert rank[name] == pytest.approx(wanted[name], rel=tolerance), name
        for ours, theirs in zip(rank["figures"], wanted["figures"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9)              # loads of all experts among them
        for name, x in rank["weights"].items():
            assert abs(x - wanted["weights"][name]).max() < tolerance, name
    held = {name for rank in found for name in rank["weights"]}
    assert held == set(wanted["weights"])
    for name in held:                             # to the last bit
        assert len({rank["weights"][name].tobytes() for rank in found if name in rank["weights"]}) == 1, name


def label(model: str, options: dict[str, Any]) -> str:
    return f"{model}: " + (", ".join(f"{name} {value}" for name, value in options.items()) or "data")


@pytest.mark.parametrize(("ranks", "number"), [
    pytest.param(ranks, i, id=f"{ranks} ranks, {label(*labelled)}")
    for ranks, cases in LABELLED.items() for i, labelled in enumerate(cases)])
def test_as_one_process(ranks: int, number: int, alone, together):
    model, options = LABELLED[ranks][number]
    same([rank["same"][number] for rank in together[ranks]], alone(model, options.get("optim", "adamw")))


@pytest.mark.parametrize("number", range(len(HALF)), ids=[label("fp16", options) for options in HALF])
def test_fp16_leaves_out_the_same_steps_on_every_rank(number: int, together, halved):
    """Rounding differs where sums are cut otherwise, so figures are near and not the same"""
    found = [rank["half"][number] for rank in together[2]]
    assert {rank["skipped"] for rank in (*found, halved)} == {1}
    for rank in found:
        assert rank["loss"] == pytest.approx(halved["loss"], rel=1e-3)
        assert not math.isfinite(rank["norm"].pop(1))
        assert rank["norm"] == pytest.approx([n for n in halved["norm"] if math.isfinite(n)], rel=1e-2)
    assert len({rank["hash"] for rank in found}) == 1


@pytest.mark.parametrize("number", range(len(GATHERED)), ids=[label("bf16", options) for options in GATHERED])
def test_weights_that_travel_in_bf16(number: int, together):
    """A stage hands on what the next one takes it for."""
    wanted = trained(in_bf16({}))
    for rank in together[2]:
        found = rank["bf16"][number]
        assert found["loss"] == pytest.approx(wanted["loss"], rel=5e-3)
        assert found["norm"] == pytest.approx(wanted["norm"], rel=5e-2)


def test_ranks_that_share_experts_judge_any_number_of_batches(together):
    """Who has no batch left keeps the others company."""
    alone = judged({})
    for rank in together[2]:
        for found, wanted in zip(rank["judged"][0], alone, strict=True):
            assert found == pytest.approx(wanted, rel=1e-9)


def test_random_states_suit_the_mesh_that_goes_on(together):
    """Ranks with parts of one matrix draw the same, all others apart; on the mesh that saved, what would have come."""
    found = {i: [rank["drawn"][i] for rank in together[2]] for i in range(len(LAYOUTS))}
    for i, options in enumerate(LAYOUTS):
        (would, now), (other_would, other_now) = found[i]
        assert would != other_would
        assert (now == other_now) == (options.get("sequence") is False), options
        if options.get("sequence") is not False:
            assert (now, other_now) == (would, other_would), options


def test_the_row_that_spoils_a_batch_is_named_by_every_rank(together):
    for rank in together[2]:
        assert rank["spoilt"][0].endswith("samples: row 5"), rank["spoilt"]
