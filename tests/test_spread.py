"""Checkpoints of weights on several ranks: read on any mesh, whole after any kill."""
from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mindseed.base import dist
from mindseed.base.mesh import ParallelOptions
from mindseed.models.config import LayerConfig
from mindseed.optim.ema import EMA
from mindseed.train.state import Checkpoints, restore
from mindseed.train.step import train_step
from tests import spawn
from tests.parallel_runs import Case, prepare
from tests.spawn import on_ranks
from tests.test_parallel import GQA, MLA, MOE, SWIGLU, WINDOW, lm

CONFIG = lm((GQA, SWIGLU), (MLA, MOE), (WINDOW, MOE), mtp=(LayerConfig(mixer=GQA, ffn=MOE),))
BEFORE, AFTER = 2, 2                              # steps until the checkpoint, and after it
WRITERS = {"zero 3": (4, {"zero": 3}), "tensor x data": (4, {"tensor": 2}), "one process": (1, {}),
           "pipe x zero": (4, {"pipe": 2, "zero": 2, "microbatches": 2})}
READERS = {1: [(name, {}) for name in WRITERS],             # by the number of ranks: whose checkpoint, on which mesh
           2: [("zero 3", {}), ("zero 3", {"tensor": 2}), ("tensor x data", {"zero": 3}), ("tensor x data", {}),
               ("one process", {"pipe": 2, "microbatches": 2}), ("pipe x zero", {"tensor": 2})],
           4: [("zero 3", {"tensor": 2, "zero": 1}), ("tensor x data", {"zero": 2}), ("one process", {"tensor": 2}),
               ("pipe x zero", {"expert": 4})]}
FOLDER = os.environ.get("MINDSEED_TEST_SPREAD", "")         # of the checkpoints, for the ranks


def case_of(options: dict[str, Any]) -> Case:
    return Case(config=CONFIG, options=ParallelOptions(**options), accumulate=2 if options.get("pipe", 1) == 1 else 1)


def checkpoints(folder: Path, background: bool = True) -> Checkpoints:
    return Checkpoints(folder, keep=2, fingerprints={"model": "tiny"}, background=background)


def started(options: dict[str, Any]):
    run, _ = prepare(case_of(options))
    ema = EMA(run.backend.model, 0.9)
    run.after_step.append(ema.update)
    return run, ema


def write(rank: int, ranks: int) -> dict[str, list[float]]:
    """Train, save while training goes on; the losses after that."""
    found = {}
    for name, (size, options) in WRITERS.items():
        if size == ranks:
            run, ema = started(options)
            for _ in range(BEFORE):
                train_step(run)
            kept = checkpoints(Path(FOLDER) / name)
            kept.save(run, ema)
            found[name] = [train_step(run)["loss"] for _ in range(AFTER)]
            kept.wait()
            dist.share(None)
    return found


def read(rank: int, ranks: int) -> dict[tuple[str, int], Any]:
    """Go on from checkpoints on meshes of so many ranks."""
    found = {}
    for i, (name, options) in enumerate(READERS[ranks]):
        run, ema = started(options)
        kept = checkpoints(Path(FOLDER) / name)
        dist.barrier()
        restore(run, ema, kept.newest()[1])
        average = sum(whole(x).double().abs().sum().item() for x in ema.average.values())
        found[name, i] = run.step, run.source.state_dict(), [train_step(run)["loss"] for _ in range(AFTER)], average
        dist.share(None)
    return found


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, list[float]]:
    folder = str(tmp_path_factory.mktemp("spread"))
    os.environ["MINDSEED_TEST_SPREAD"] = globals()["FOLDER"] = folder
    return write(0, 1) | told(on_ranks(with_folder(write), 4, timeout=600))


class with_folder:                                # picklable, unlike a closure
    """The function, with the folder of the checkpoints known to the process that runs it."""

    def __init__(self, function) -> None:
        self.function, self.folder = function, FOLDER

    def __call__(self, rank: int, ranks: int) -> Any:
        globals()["FOLDER"] = self.folder
        import tests.test_spread as here
        here.FOLDER = self.folder
        return self.function(rank, ranks)


def told(found: list[Any]) -> Any:
    """What all ranks say, which is the same."""
    losses = [{key: value[2] if isinstance(value, tuple) else value for key, value in one.items()} for one in found]
    assert all(one == losses[0] for one in losses)
    return found[0]


@pytest.mark.parametrize("ranks", READERS)
def test_a_checkpoint_goes_on_on_any_mesh(ranks, written):
    found = read(0, 1) if ranks == 1 else told(on_ranks(with_folder(read), ranks, timeout=600))
    assert len(found) == len(READERS[ranks])
    averages = set()
    for (name, i), (step, source, losses, average) in found.items():
        assert step == BEFORE and source == {"drawn": BEFORE}, (name, i)
        assert losses == pytest.approx(written[name], rel=1e-9), (name, READERS[ranks][i])
        if "pipe" not in READERS[ranks][i][1]:    # where a rank has its own blocks alone
            averages.add(round(average, 6))
    assert len(averages) == 1                     # the moving averages, too, of whoever wrote them, on whatever mesh


def test_a_checkpoint_holds_no_pickle_but_small_things(written):
    shards = next((Path(FOLDER) / "zero 3").glob("step-*/shards"))
    assert {file.suffix for file in shards.iterdir()} == {".safetensors"}
    about = json.loads((shards.parent / "checkpoint.json").read_text())
    assert len(about["files"]) == 1 + len(list(shards.iterdir())) and about["step"] == BEFORE


STEPS = 30


def saving(rank: int, ranks: int, folder: str) -> None:
    """Go on from the newest checkpoint to the last step, saving after every one; losses go to a file."""
    run, ema = started({"zero": 2})
    kept = checkpoints(Path(folder) / "checkpoints")
    if (newest := kept.newest()) is not None:
        restore(run, ema, newest[1])
    while run.step < STEPS:
        loss = train_step(run)["loss"]
        kept.save(run, ema)
        if rank == 0:
            with open(Path(folder) / "losses", "a") as file:
                file.write(json.dumps([run.step, loss]) + "\n")
    kept.wait()


RESULTS = spawn.FORKS.SimpleQueue()               # nobody reads them; the ranks find it by its name, so it must live


def group(folder: Path) -> list[Any]:
    port = spawn.free_port()
    ranks = [spawn.FORKS.Process(target=spawn.member, args=(Saving(folder), rank, 2, port, RESULTS))
             for rank in range(2)]
    for process in ranks:
        process.start()
    return ranks


class Saving:
    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __call__(self, rank: int, ranks: int) -> None:
        saving(rank, ranks, self.folder)


def newest_step(folder: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*")), default=0)


def test_kills_while_saving_lose_nothing(tmp_path):
    """The sum of all lives is one undisturbed run, and what was once a checkpoint is never lost."""
    dice, kills = random.Random(int(os.environ.get("MINDSEED_TEST_SEED", 0))), int(
        os.environ.get("MINDSEED_TEST_KILLS", 3))
    run, _ = prepare(replace(case_of({})))
    wanted = [train_step(run)["loss"] for _ in range(STEPS)]
    for _ in range(kills):
        before = newest_step(tmp_path)
        ranks, end = group(tmp_path), time.monotonic() + 120
        while newest_step(tmp_path) <= before and before < STEPS and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(dice.random() * 0.15)          # anywhere in a step, or in the writing of one
        for process in ranks:
            os.kill(process.pid, signal.SIGKILL)
        for process in ranks:
            process.join()
        assert newest_step(tmp_path) > before or before >= STEPS - 1
    for process in (last := group(tmp_path)):
        process.join(180)
    assert all(process.exitcode == 0 for process in last)
    losses = dict(json.loads(line) for line in (tmp_path / "losses").read_text().splitlines())
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert [losses[step] for step in sorted(losses)] == pytest.approx(wanted, rel=1e-9)
    assert not list((tmp_path / "checkpoints").glob(".step-*"))
