"""Ranks that start, fail and end together: bad meshes, ranks that mean different runs, a rank that dies."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from mindseed.base import dist
from mindseed.base.errors import UserError
from mindseed.base.mesh import ParallelOptions, Sizes
from mindseed.models.config import LayerConfig, LMConfig
from mindseed.models.presets import Shape
from mindseed.models.splitting import splitting_problems
from mindseed.nn.alibi import AlibiConfig
from mindseed.nn.gqa import GQAConfig
from mindseed.nn.linear_attention import DeltaConfig
from mindseed.nn.moe import MoEConfig
from mindseed.recipes import launch
from mindseed.recipes.launch import check_mesh, run_problems
from mindseed.recipes.options import TrainOptions
from tests import spawn
from tests.spawn import on_ranks


@pytest.mark.parametrize(("options", "world", "sizes"), [
    ({}, 4, Sizes(replica=4)),
    ({"zero": 3}, 4, Sizes(shard=4)),
    ({"zero": 2, "replicas": 2, "tensor": 2}, 16, Sizes(replica=2, shard=4, tensor=2)),
    ({"pipe": 2, "context": 2, "tensor": 2, "expert": 4}, 16, Sizes(pipe=2, replica=2, context=2, tensor=2, expert=4))])
def test_the_axes_multiply_to_the_world(options, world, sizes):
    got = ParallelOptions(**options).sizes(world)
    assert got == sizes and got.world == world


@pytest.mark.parametrize(("options", "world", "says"), [
    ({"tensor": 3}, 4, "tensor 3 = 3 does not divide the 4 ranks"),
    ({"zero": 1, "replicas": 3}, 4, "replicas=3 does not divide the 4 data-parallel ranks"),
    ({"replicas": 2}, 4, "has a meaning with parallel.zero"),
    ({"expert": 3}, 4, "expert=3 does not divide the 4 ranks"),
    ({"zero": 2, "expert": 2}, 4, "parallel.expert must be 4"),
    ({"offload": True}, 2, "parallel.offload needs parallel.zero"),
    ({"backend": "deepspeed", "tensor": 2}, 2, "knows data parallelism alone")])
def test_a_mesh_that_cannot_be(options, world, says):
    assert any(says in line for line in ParallelOptions(**options).problems(world))
    with pytest.raises(ValueError, match=says.replace(".", r"\.")):
        ParallelOptions(**options).sizes(world)


def small(**changes) -> LMConfig:
    shape = {"layers": 3, "dim": 32, "heads": 6, "kv_heads": 2, "head_dim": 8, "ffn_dim": 50} | changes
    return Shape(**shape).lm_config(vocab_size=66, seq_len=30)


def test_everything_that_a_model_cannot_is_told_at_once():
    options = ParallelOptions(tensor=4, context=2, pipe=2, schedule="interleaved", expert=2)
    found = splitting_problems(small(), options, micro_batch=3)
    for says in ("no experts", "vocabulary of 66", "rows of 30 tokens are no multiple of parallel.tensor=4",
                 "multiple of 4", "heads=6 is no multiple", "kv_heads=2 is no multiple", "ffn_dim=50 is no multiple",
                 "3 layers are fewer than the 4 stages", "loop.micro_batch=3 cannot be cut"):
        assert any(says in line for line in found), (says, found)
    assert splitting_problems(small(), ParallelOptions(tensor=2, zero=3)) == []


@pytest.mark.parametrize(("schedule", "pieces", "says"), [
    ("1f1b", 2, "at least 3 pieces"), ("dualpipe-v", 5, "at least 6 pieces"), ("interleaved", 4, "a multiple of")])
def test_a_schedule_asks_for_pieces(schedule, pieces, says):
    options = ParallelOptions(pipe=3, schedule=schedule, microbatches=pieces)
    assert any(says in line for line in splitting_problems(small(layers=6), options))
    assert splitting_problems(small(layers=6), replace(options, microbatches=6)) == []
    assert splitting_problems(small(layers=6), replace(options, microbatches=None)) == []


DELTA = DeltaConfig(heads=2, key_heads=2, key_dim=6, value_dim=5)


@pytest.mark.parametrize(("mixer", "ffn", "options", "says"), [
    (DELTA, None, {"tensor": 2}, "linear attention cannot be split"),
    (DELTA, None, {"context": 2}, "linear attention cannot be split"),
    (GQAConfig(heads=4, kv_heads=2, head_dim=8, positions=AlibiConfig()), None, {"context": 2}, "ALiBi's slopes"),
    (None, MoEConfig(experts=6, top_k=2, expert_dim=8), {"expert": 4}, "experts=6 is no multiple"),
    (None, MoEConfig(experts=4, top_k=2, expert_dim=8, sequence_weight=0.1), {"context": 2}, "needs whole rows")])
def test_what_a_layer_cannot(mixer, ffn, options, says):
    config = small(heads=4)
    layer = LayerConfig(mixer=mixer or config.layers[0].mixer, ffn=ffn or config.layers[0].ffn)
    found = splitting_problems(replace(config, layers=(layer,)), ParallelOptions(**options))
    assert any(says in line for line in found), found


@pytest.mark.parametrize(("changes", "says"), [
    ({"method": "dpo", "parallel": ParallelOptions(tensor=2)}, "for --method sft alone"),
    ({"parallel": ParallelOptions(tensor=2), "objective": {"label_smoothing": 0.1}}, "needs the whole vocabulary"),
    ({"parallel": ParallelOptions(context=2), "lora": {"rank": 4}}, "adapters .* run data-parallel"),
    ({"parallel": ParallelOptions(tensor=2), "loop": {"sample_every": 5}}, "samples cannot be drawn"),
    ({"parallel": ParallelOptions(expert=2), "lora": {"rank": 4}}, "adapters .* not with parallel.expert"),
    ({"parallel": ParallelOptions(expert=2), "loop": {"sample_every": 5}}, "samples cannot be drawn"),
    ({"method": "distill", "parallel": ParallelOptions(expert=2), "distill": {"on_policy": 0.5}}, "draws answers"),
    *(({"parallel": ParallelOptions(pipe=2, schedule=schedule), "loop": {"recompute": how}}, f"the {schedule} schedule")
      for schedule in ("zero-bubble", "dualpipe-v") for how in (True, "selective")),
    ({"parallel": ParallelOptions(zero=1), "optim": {"states": "8bit", "kind": "adamw"}}, "optim.states=8bit")])
def test_what_a_run_cannot(changes, says):
    import re
    options = TrainOptions()
    given = {name: replace(getattr(options, name), **value) if isinstance(value, dict) else value
             for name, value in changes.items()}
    assert any(re.search(says, line) for line in run_problems(replace(options, **given)))


def test_what_is_offloaded_needs_room(monkeypatch):
    monkeypatch.setattr(launch, "total_memory", lambda device: 30e9)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    shape = replace(TrainOptions().model, layers=24, dim=2048, heads=16, kv_heads=16, head_dim=128, ffn_dim=5632)
    options = replace(TrainOptions(), model=shape, parallel=ParallelOptions(zero=3, offload=True))
    with pytest.raises(UserError, match=r"this machine's 4 rank\(s\) have 30.0 GB together") as error:
        launch.check_mesh(replace(options, model=replace(shape, layers=100)))
    assert "spread them over more machines" in str(error.value)
    launch.check_mesh(options)                    # a quarter of that fits


def test_nobody_waits_for_a_mesh_that_cannot_work(monkeypatch):
    """One rank of four, started alone: it would wait for the others if it got as far as that."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    options = replace(TrainOptions(depth=2), parallel=ParallelOptions(tensor=3, pipe=2, zero=1, replicas=5))
    with pytest.raises(UserError) as caught:
        check_mesh(options)
    text = str(caught.value)
    assert "does not divide the 4 ranks" in text and "no multiple of parallel.tensor=3" in text and "replicas=5" in text


def disagree(rank: int, ranks: int) -> str:
    try:
        dist.agree(code=f"version {rank // 2}", torch="same", data="a" if rank else "b")
    except UserError as error:
        return str(error)
    return "all agree"


def test_ranks_that_mean_different_runs_are_told_apart():
    for text in on_ranks(disagree, 4):
        assert "code: ranks 0, 1: version 0; ranks 2, 3: version 1" in text
        assert "data: rank 0: b; ranks 1, 2, 3: a" in text and "torch" not in text


def leaves_first(rank: int, ranks: int) -> int:
    from mindseed.base import watch
    watch.BEAT_S = 0.2
    time.sleep(3.0 * bool(rank))                  # rank 0 is done, and with it would go what the others' watches read
    return rank


def test_who_is_done_first_waits_for_the_others():
    assert on_ranks(leaves_first, 3) == [0, 1, 2]


STOPS = """import sys, torch
from mindseed.base import dist
from mindseed.base.errors import UserError
from mindseed.train.loop import Fit, fit
from mindseed.train.state import Checkpoints
from tests.parallel_runs import Case, prepare
from tests.test_parallel import MODELS

class Spoilt:
    def __init__(self, source): self.source, self.steps = source, 0
    def __getattr__(self, name): return getattr(self.source, name)
    def __next__(self):
        self.steps += 1
        if self.steps == 4 and dist.rank() == 1:
            raise UserError("the rows of rank 1 are spoilt")
        return next(self.source)

try:
    with dist.process_group(torch.device("cpu")):
        run, _ = prepare(Case(config=MODELS["dense"], accumulate=1))
        run.source = Spoilt(run.source)
        fit(Fit(run=run, steps=6, save_every=2, checkpoints=Checkpoints(sys.argv[1], keep=2, fingerprints={})))
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
"""


def test_an_error_of_one_rank_ends_all_and_is_told(tmp_path):
    """Saving what was learnt since would need the others, who wait for this one's gradient."""
    port = spawn.free_port()
    script = tmp_path / "stops.py"
    script.write_text(STOPS)
    ranks = [subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "saved")], stderr=subprocess.PIPE, text=True, env={
            **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}) for rank in range(2)]
    try:
        said = [process.communicate(timeout=90)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert ranks[1].returncode == 2 and ranks[0].returncode not in (0, None)
    for text in said:
        assert "the rows of rank 1 are spoilt" in text and "Traceback" not in text, text
    assert "goes on from" in said[1] and "step-00000002" in said[1]


def started_with(rank: int, ranks: int) -> str:
    options = TrainOptions()
    options = replace(options, loop=replace(options.loop, steps=6 + 2 * rank))
    try:
        launch.check_ranks(options)
    except UserError as error:
        return str(error)
    return "all agree"


def test_options_that_differ_are_named():
    for text in on_ranks(started_with):
        assert "loop.steps: rank 0: 6; rank 1: 8" in text and "Give every rank the same command" in text
        assert text.count("rank 0:") == 1


LONG = """import sys, time, torch
from mindseed.base import dist
from mindseed.base.errors import UserError
try:
    with dist.process_group(torch.device("cpu")):
        for i in range(10000):
            dist.sum_over_ranks(torch.ones(3))
            print(i, flush=True)
            if sys.argv[1] == "fail" and dist.rank() == 1 and i == 3:
                raise UserError("the disk of rank 1 is full")
            if sys.argv[1] == "wait" and i == 3:
                time.sleep(0.1 if dist.rank() else 300)
            time.sleep(0.02)
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
"""


@pytest.mark.parametrize("how", ["fail", "kill"])
def test_a_rank_that_dies_ends_the_others_and_says_why(how, tmp_path):
    port, began = spawn.free_port(), time.monotonic()
    script = tmp_path / "long.py"
    script.write_text(LONG)
    ranks = []
    for rank in range(2):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        ranks.append(subprocess.Popen([sys.executable, str(script), how], env=environment, stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE, text=True))
    try:
        if how == "kill":
            while "4" not in ranks[1].stdout.readline():
                assert time.monotonic() - began < 100
            os.kill(ranks[1].pid, signal.SIGKILL)
        _, said = ranks[0].communicate(timeout=60)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert ranks[0].returncode not in (0, None)
    assert "Traceback" not in said
    assert ("rank 1 failed: the disk of rank 1 is full" if how == "fail" else "gone") in said, said


def test_sums_go_over_ranks_with_other_tokens_alone():
    dist.share(dist.Share(row_rank=2, row_ranks=3, parts=6, group=None))
    try:
        assert (dist.row_rank(), dist.row_ranks(), dist.parts()) == (2, 3, 6)
        assert torch.equal(dist.sum_over_ranks(torch.ones(2)), torch.ones(2))
    finally:
        dist.share(None)
    assert (dist.row_rank(), dist.row_ranks(), dist.parts()) == (0, 1, 1)
