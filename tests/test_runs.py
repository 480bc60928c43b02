"""Whole runs from the command line: killed, resumed, on two ranks, with bad input. Slow for tests, so few of them."""
from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mindseed.base.files import locked
from mindseed.data.prepare import prepare
from mindseed.data.toy import World
from mindseed.objectives.sft import SFT
from mindseed.optim.groups import OptimConfig, build_optimizers, parameter_groups
from mindseed.tokenizers import bpe_train
from mindseed.tokenizers.hf_json import save_tokenizer
from mindseed.train.native import NativeBackend
from mindseed.train.state import Checkpoints, restore
from mindseed.train.step import Run, train_step
from tests import spawn
from tests.tiny import Fixed, random_batch, tiny_model

STEPS = 40
TINY = """--model.layers 1 --model.dim 32 --model.heads 2 --model.kv_heads 1 --model.head_dim 16 --model.ffn_dim 48
--model.dropout 0.1 --data.seq_len 128 --loop.batch 8 --loop.micro_batch 2 --loop.validate_every 10
--loop.sample_every 0 --loop.save_every 5""".split()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A tokenizer and two prepared folders, texts and conversations."""
    folder = tmp_path_factory.mktemp("corpus")
    world = World(3)
    rows = {"texts": list(world.pretrain(400)), "chats": list(world.conversations(300))}
    texts = (json.dumps(row, ensure_ascii=False) for some in rows.values() for row in some)
    tokenizer = bpe_train.train(texts, vocab_size=400)
    save_tokenizer(tokenizer, folder / "tokenizer")
    for name, some in rows.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in some), encoding="utf-8")
        prepare([file], folder / name, tokenizer, heldout=0.05)
    return folder


def mindseed(*words: object, ranks: int = 1, torchrun: bool = False) -> list[str]:
    """The command; on several ranks as torchrun starts it, or by torchrun itself, which takes seconds to start."""
    if not torchrun:
        return [FORKED, str(ranks), *map(str, words)]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(spawn.free_port())]
    return [sys.executable, *launcher, "-m", "mindseed", *map(str, words)]


def train(corpus: Path, run: Path, *more: object, ranks: int = 1, torchrun: bool = False,
          weights: tuple = (0.7, 0.3)) -> list[str]:
    return mindseed("train", "--out", run, "--data.train", corpus / "texts", corpus / "chats",
                    "--data.weights", *weights, "--data.tokenizer", corpus / "tokenizer", "--loop.steps", STEPS,
                    *TINY, *more, ranks=ranks, torchrun=torchrun)


FORKED = "mindseed, forked"


def finish(command: list[str], code: int = 0) -> str:
    if command[0] == FORKED:
        done = spawn.call(*command[2:], ranks=int(command[1]))
    else:
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, f"{done.returncode}: {done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def kill_after(command: list[str], run: Path, step: int, sig: int = signal.SIGKILL) -> int:
    """Start a run and send it (and its workers) a signal once `step` is in its log; the exit code."""
    if command[0] == FORKED:
        processes = spawn.start_ranks(*command[2:], ranks=int(command[1]))
        ended, wait = lambda: processes[0].exitcode, processes[0].join
    else:
        processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                      start_new_session=True)]
        ended, wait = processes[0].poll, processes[0].wait
    pids = [process.pid for process in processes]
    try:
        wait_for(lambda: ended() is not None or last_step(run) >= step)
        assert ended() is None, "the run ended before it could be killed"
        for pid in [p for pid in pids for p in family(pid)] if sig == signal.SIGKILL else pids:
            os.kill(pid, sig)
        wait(60)
        return ended()
    finally:
        if ended() is None:
            for pid in [p for pid in pids for p in family(pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def family(pid: int) -> list[int]:
    """A process and all it has started: torchrun gives each worker a session of its own, which outlives it."""
    children = [int(p) for task in Path(f"/proc/{pid}/task").glob("*/children") for p in task.read_text().split()]
    return [pid, *(p for child in children for p in family(child))]


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def last_step(run: Path) -> int:
    log = run / "log.jsonl"
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    return json.loads(lines[-1])["step"] if lines else -1


def losses(run: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(r["step"], r.get("loss"), r.get("grad_norm"), r.get("bits_per_byte")) for r in rows]


def test_a_rank_that_is_killed_comes_back_under_torchrun(corpus, tmp_path):
    """Nobody gives the command again: the launcher starts all ranks anew, and they go on from the newest checkpoint."""
    finish(train(corpus, tmp_path / "whole", ranks=2))
    run, told = tmp_path / "parts", tmp_path / "told"
    command = train(corpus, run, "--resume", "auto", ranks=2, torchrun=True)
    command[3:3] = ["--max-restarts", "3", "--monitor-interval", "0.2"]
    with told.open("w") as out:
        launcher = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_for(lambda: launcher.poll() is not None or last_step(run) >= 20)
        workers = [pid for pid in family(launcher.pid) if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(workers[0], signal.SIGKILL)
        assert launcher.wait(120) == 0, told.read_text()[-3000:]
    finally:
        if launcher.poll() is None:
            for pid in family(launcher.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    assert "going on from" in told.read_text()
    assert losses(run) == losses(tmp_path / "whole")


@pytest.mark.parametrize("kind,ranks", [("adamw", 1), ("muon", 2)])
def test_killed_and_resumed_equals_uninterrupted(corpus, tmp_path, kind, ranks):
    more = ["--optim.kind", kind, "--loop.ema", 0.9]
    finish(train(corpus, tmp_path / "whole", *more, ranks=ranks))
    parts = train(corpus, tmp_path / "parts", *more, ranks=ranks, torchrun=ranks > 1)
    assert kill_after(parts, tmp_path / "parts", 20) != 0
    assert not (tmp_path / "parts" / "model").exists()
    said = finish(train(corpus, tmp_path / "parts", *more, "--resume", ranks=ranks))
    assert "going on from" in said
    assert [s for s, *_ in losses(tmp_path / "parts")] == list(range(STEPS + 1))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "parts" / "model" / name).read_bytes() == (tmp_path / "whole" / "model" / name).read_bytes()


def test_sigterm_saves_and_says_how_to_go_on(corpus, tmp_path):
    run = tmp_path / "run"
    command = train(corpus, run, "--loop.save_every", 0)
    assert kill_after(command, run, 7, signal.SIGTERM) == 130
    saved = sorted((run / "checkpoints").glob("step-*"))
    assert len(saved) == 1 and int(saved[0].name.split("-")[1]) == last_step(run) >= 7
    finish([*command, "--resume", "auto"])
    assert last_step(run) == STEPS


def test_a_finished_run_is_left_as_it_is(corpus, tmp_path):
    finish(train(corpus, tmp_path / "run", "--loop.steps", 2))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    said = finish(train(corpus, tmp_path / "run", "--loop.steps", 2, "--optim.lr", 0.9, "--resume"))
    assert "nothing is left to do" in said
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_epochs_say_how_long_to_train(corpus, tmp_path):
    finish(mindseed("train", "--out", tmp_path / "run", "--data.train", corpus / "texts", "--loop.epochs", 0.2, *TINY))
    assert last_step(tmp_path / "run") >= 1


def test_a_prepared_folder_brings_its_tokenizer(corpus, tmp_path):
    command = mindseed("train", "--out", tmp_path / "run", "--data.train", corpus / "texts", "--loop.steps", 2, *TINY)
    finish(command)
    assert (tmp_path / "run" / "model" / "tokenizer.json").read_bytes() \
        == (corpus / "texts" / "tokenizer" / "tokenizer.json").read_bytes()


def test_a_run_whose_checkpoints_are_gone_is_not_started_over(corpus, tmp_path):
    finish(train(corpus, tmp_path / "run", "--loop.steps", 12))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    log = (tmp_path / "run" / "log.jsonl").read_bytes()
    said = finish(train(corpus, tmp_path / "run", "--loop.steps", 12, "--resume"), code=2)
    assert "12 steps and no checkpoint any more" in said and (tmp_path / "run" / "log.jsonl").read_bytes() == log


def test_another_optimiser_cannot_go_on(corpus, tmp_path):
    finish(train(corpus, tmp_path / "run", "--loop.steps", 6, "--optim.kind", "muon"))
    said = finish(train(corpus, tmp_path / "run", "--loop.steps", 9, "--optim.kind", "adamw", "--resume"), code=2)
    assert "optim.kind: muon then, adamw now" in said


def test_going_on_needs_no_option_again_and_says_what_changed(corpus, tmp_path):
    run = tmp_path / "run"
    finish(train(corpus, run, "--loop.steps", 6, "--optim.weight_decay", 0.3))
    resume = ["train", "--out", run, "--resume", "--loop.steps", 9, "--loop.sample_every", 0]
    with locked(run / ".lock"):
        assert "is being written by another process" in finish(mindseed(*resume), 2)
    said = finish(mindseed(*resume, "--optim.lr", 0.002, "--optim.beta1", 0.8))
    changed = {line.split()[1].rstrip(":"): line.split(":")[1].strip() for line in said.splitlines()
               if line.startswith("changed")}
    assert changed == {"loop.steps": "6 then, 9 now", "optim.beta1": "0.9 then, 0.8 now",
                       "the": "0.02 then, 0.002 now", "optim.lr": changed["optim.lr"]}
    assert changed["optim.lr"].endswith("0.002 now")
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 9 and rows[-3]["lr"] <= 0.002 < rows[4]["lr"]
    kept = torch.load(run / "checkpoints" / "step-00000009" / "trainer.pt", weights_only=True)
    groups = [g for o in kept["backend"]["optimizers"] for g in o["param_groups"]]
    assert {g["betas"][0] for g in groups if "betas" in g} == {0.8}
    assert {g["weight_decay"] for g in groups} == {0.0, 0.3}


def test_a_long_held_out_question_is_no_sample(corpus, tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"{i} " + "why? " * (400 if i < 30 else 1)},
                          {"role": "assistant", "content": "so"}]} for i in range(60)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    finish(mindseed("train", "--out", tmp_path / "run", "--data.train", tmp_path / "long.jsonl",
                    "--data.tokenizer", corpus / "tokenizer", "--data.heldout", 0.3, "--loop.steps", 2, *TINY,
                    "--loop.sample_every", 1, "--loop.validate_every", 0))


def test_mistakes_of_a_run_are_two_lines(corpus, tmp_path):
    run = tmp_path / "run"
    finish(train(corpus, run, "--loop.steps", 4))
    assert "already holds a run" in finish(train(corpus, run), 2)
    for change, weights, said in ((["--model.dim", 64], (0.7, 0.3), "model.dim: 32 then, 64 now"),
                                  ([], (0.5, 0.5), "data.mixture")):
        out = finish(train(corpus, run, "--resume", *change, weights=weights), 2)
        assert said in out and "Give the options of that run" in out
    assert "holds no run" in finish(train(corpus, tmp_path / "none", "--resume"), 2)
    assert "heads=3" in finish(train(corpus, tmp_path / "bad", "--model.heads", 3, "--model.kv_heads", 2), 2)
    assert "must be even" in finish(train(corpus, tmp_path / "bad", "--model.head_dim", 7), 2)
    foreign = ["--data.train", corpus / "texts", "--data.tokenizer", other_tokenizer(tmp_path)]
    assert "another tokenizer" in finish(mindseed("train", "--out", tmp_path / "bad", *foreign), 2)


def other_tokenizer(folder: Path) -> Path:
    save_tokenizer(bpe_train.train(["other words entirely"], vocab_size=300), folder / "other")
    return folder / "other"


def saving(folder: Path, out: str, forever: bool = True) -> None:
    """A process that does little but save: writes "at STEP" to the file `out` at first, "saved STEP" after each one."""
    config, model = OptimConfig(kind="muon", lr=1e-2), tiny_model(dim=64, ffn_dim=512)
    backend = NativeBackend(model, SFT(), build_optimizers(parameter_groups(model, config), config))
    run = Run(Fixed([random_batch(2, 8)]), SFT(), backend, schedule=lambda step: 1e-2)
    checkpoints = Checkpoints(folder, keep=2, fingerprints={"model": 1})
    if newest := checkpoints.newest():
        restore(run, None, newest[1])
    with open(out, "a", buffering=1) as said:
        said.write(f"at {run.step}\n")
        while forever:
            train_step(run)
            checkpoints.save(run, None, score=1 / run.step)
            said.write(f"saved {run.step}\n")


def test_ten_kills_while_saving_lose_nothing(tmp_path):
    """It is killed at random moments; what it said was saved is always there."""
    rng, promised = random.Random(0), 0
    folder = tmp_path / "checkpoints"

    def lines(out: Path) -> list[list[str]]:
        return [line.split() for line in out.read_text().split("\n")[:-1]] if out.exists() else []

    for i in range(10):
        out = tmp_path / f"said-{i}"
        process = spawn.FORKS.Process(target=saving, args=(folder, str(out)))
        process.start()
        try:                                      # one save, then the kill comes at any moment
            wait_for(lambda: len(lines(out)) > 1 or process.exitcode is not None)
            time.sleep(rng.uniform(0.0, 0.2))
        finally:
            process.kill()
            process.join()
        (first, step), *saved = lines(out)
        assert first == "at" and int(step) >= promised and saved
        promised = int(saved[-1][1])
    look = spawn.FORKS.Process(target=saving, args=(folder, str(tmp_path / "look"), False))
    look.start()
    look.join(60)
    assert int(lines(tmp_path / "look")[0][1]) >= promised >= 10
    assert len([p for p in folder.iterdir() if p.name.startswith("step-")]) <= 4


@pytest.mark.parametrize("damage,said", [
    (lambda p: p.write_bytes(p.read_bytes()[:-100]), "is truncated"),
    (lambda p: p.write_bytes(p.read_bytes()[:-9] + b"123456789"), "is damaged"),
    (lambda p: p.unlink(), "is missing")])
def test_a_broken_checkpoint_is_passed_over(corpus, tmp_path, damage, said):
    run = tmp_path / "run"
    shutil.copytree(finished_run(corpus, tmp_path.parent / "kept"), run)
    newest, older = sorted((run / "checkpoints").glob("step-*"))[::-1][:2]
    damage(newest / "trainer.pt")
    out = finish(train(corpus, run, "--loop.steps", 12, "--resume"))
    assert said in out and f"going back to {older.name}" in out


def finished_run(corpus: Path, run: Path) -> Path:
    if not run.exists():
        finish(train(corpus, run, "--loop.steps", 12))
    return run


@pytest.mark.parametrize("mesh", [[], ["--parallel.zero", 1]], ids=["whole", "in parts, in the background"])
def test_a_full_disk_loses_nothing(mesh, corpus, tmp_path):
    """A limit on file size stands in for a full disk: the write fails half-way, as it would there."""
    run = tmp_path / "run"
    shutil.copytree(finished_run(corpus, tmp_path.parent / "kept"), run)
    before = {p.name: (p / "trainer.pt").read_bytes() for p in (run / "checkpoints").glob("step-*")}
    command = train(corpus, run, "--loop.steps", 16, "--resume", *mesh)
    shell = [sys.executable, "-m", "mindseed", *command[2:]]
    out = finish(["bash", "-c", 'ulimit -f 100; exec "$@"', "-", *shell], 2)             # KiB: less than a checkpoint
    assert "could not write" in out and "What was there before is intact" in out
    assert {p.name: (p / "trainer.pt").read_bytes() for p in (run / "checkpoints").glob("step-*")} == before
    assert not list((run / "checkpoints").glob(".*tmp*"))
    finish(command)
    assert last_step(run) == 16
