"""What a training checkpoint holds, and how a run is carried on as if nothing had happened.

A checkpoint is a folder `step-00000120` with `trainer.pt` (float32 weights, optimisers, scaler, stream position, the
random state of every rank) and `checkpoint.json` (sizes and sha256 of the files, and the fingerprints of the model,
the data and the tokenizer). It is written beside its place and renamed when it is whole, so a kill at any moment
leaves the last good one. Files are read with `weights_only`, so a checkpoint cannot run code.

Where weights are spread over ranks, each writes its own part into `shards` (parallel/checkpoint.py), in the background
unless told otherwise, and `trainer.pt` holds what is small. Either kind is read by either kind of run, on any mesh.
"""
from __future__ import annotations

import math
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mindseed.base import dist
from mindseed.base.errors import UserError
from mindseed.base.files import atomic, read_json, recover, sha256, write_json
from mindseed.optim.ema import EMA
from mindseed.parallel import checkpoint as spread
from mindseed.train.step import Run

FORMAT = 1
ABOUT = {"format": int, "files": {str: {"bytes": int, "sha256": str}}, "fingerprints": {str: Any}}
BEST = {"checkpoint": str, "score": float}


def capture(run: Run, ema: EMA | None) -> dict[str, Any]:
    """Everything that the next step depends on, as tensors and plain values; without the tensors, where they are spread
    over ranks. A collective call: all ranks take part."""
    backend = run.backend
    small = {"source": run.source.state_dict(), "step": run.step, "tokens": run.tokens,
             "random": dist.gather(random_state()), "draws": dist.gather(draws(run))}
    if backend.mesh is not None:
        about = {"scaler": backend.scaler.state_dict(), "skipped": backend.skipped}
        return small | {"backend": about, "ema": {"updates": ema.updates} if ema else None}
    return small | {"model": backend.weights(), "backend": backend.state_dict(),
                    "ema": ema.state_dict() if ema else None,
                    "balance": run.balance.state_dict() if run.balance else None}


def restore(run: Run, ema: EMA | None, saved: dict[str, Any]) -> None:
    """Put `run` where `capture` found it. Where ranks share the work otherwise than those that saved, random states
    start afresh from the first one's."""
    backend, average = run.backend, ema.average if ema and saved["ema"] else None
    if "shards" in saved:
        backend.load_spread(saved["shards"], saved["backend"], average)
    elif backend.mesh is not None:
        spread.take_apart(saved, backend.model, backend.optimizers, average)
        backend.load_small(saved["backend"])
    else:
        backend.load_weights(saved["model"])
        backend.load_state_dict(saved["backend"])
        if ema and saved["ema"]:
            ema.load_state_dict(saved["ema"])
        if run.balance and saved["balance"]:
            run.balance.load_state_dict(saved["balance"])
    run.source.load_state_dict(saved["source"])
    if ema and saved["ema"]:
        ema.updates = saved["ema"]["updates"]
    elif ema:                                     # asked for only now: it was made of the weights before these
        ema.restart()
    run.step, run.tokens = saved["step"], saved["tokens"]
    mine, then, states = draws(run), saved.get("draws") or list(range(len(saved["random"]))), saved["random"]
    now = dist.gather(mine)
    if now == then:
        set_random_state(states[dist.rank()])
    elif {*now} == {*then}:                       # laid out otherwise, but as many that draw apart
        set_random_state(states[then.index(mine)])
    else:
        set_random_state(states[0])
        torch.manual_seed(int(torch.randint(1 << 60, ())) + 1_000_003 * mine)


def draws(run: Run) -> int:
    """Ranks with the same number draw the same: those that hold parts of one matrix must drop the same activations."""
    return run.backend.mesh.seed if run.backend.mesh is not None else dist.rank()


def random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


class Checkpoints:
    """The checkpoints of one run folder: the newest `keep`, and the best by validation."""

    def __init__(self, folder: Path, *, keep: int, fingerprints: dict[str, Any], background: bool = True) -> None:
        self.folder, self.keep, self.fingerprints = Path(folder), keep, fingerprints
        self.background = background              # of weights that are spread over ranks
        self.best: float | None = None
        self.pending: Future | None = None
        self.thread = ThreadPoolExecutor(1)

    def save(self, run: Run, ema: EMA | None, *, score: float | None = None) -> Path:
        """Write the checkpoint of this moment; `score` (lower is better) decides which one is the best. One that is
        written in the background is there after `wait`."""
        self.wait()
        saved, backend = capture(run, ema), run.backend
        path = self.folder / f"step-{run.step:08d}"
        if backend.mesh is None:
            if dist.is_main():
                self.publish(path, saved, score, None, None)
            dist.barrier()
            return path
        shards = self.folder / f".{path.name}.shards"
        if dist.is_main():
            shutil.rmtree(shards, ignore_errors=True)
            shards.mkdir(parents=True)
        dist.barrier()
        tensors = spread.everything(backend.model, backend.optimizers, ema.average if ema else None)
        work = spread.save(shards, tensors, background=self.background, group=backend.mesh.saving)
        if dist.is_main():
            self.pending = self.thread.submit(self.publish, path, saved, score, shards, work)
        else:
            self.pending = work
        if not self.background:
            self.wait()
            dist.barrier()
        return path

    def publish(self, path: Path, saved: dict[str, Any], score: float | None, shards: Path | None,
                work: Future | None) -> None:
        """What rank 0 does: wait for all parts, then write what makes a checkpoint of them, and rename it."""
        if work is not None:
            work.result()
        with atomic(path) as temp:
            temp.mkdir()
            if shards is not None:
                shards.rename(temp / "shards")
            write_tensors(temp / "trainer.pt", saved)
            files = sorted(file for file in temp.rglob("*") if file.is_file())
            write_json(temp / "checkpoint.json", {
                "format": FORMAT, "step": saved["step"], "tokens": saved["tokens"], "score": score,
                "world_size": dist.world_size(), "fingerprints": self.fingerprints,
                "files": {str(file.relative_to(temp)): {"bytes": file.stat().st_size, "sha256": sha256(file)}
                          for file in files}})
        if score is not None and math.isfinite(score) and (self.best is None or score < self.best):
            self.best = score
            write_json(self.folder / "best.json", {"checkpoint": path.name, "score": score})
        self.prune(path)

    def wait(self) -> None:
        """Until the checkpoint that is being written in the background is whole."""
        pending, self.pending = self.pending, None
        if pending is not None:
            with spread.told_as_one(self.folder):
                pending.result()

    def prune(self, just: Path) -> None:
        """Remove what is neither new enough nor the best, never the one `just` saved: damaged ones may look newer. With
        them goes what kills have left half-written."""
        for left in [*self.folder.glob(".step-*"), *self.folder.glob(".best.json.*")]:
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        best = self.best_of_run() or {}
        for path in self.found()[:-self.keep]:
            if path.name != best.get("checkpoint") and path != just:
                shutil.rmtree(path, ignore_errors=True)

    def found(self) -> list[Path]:
        """All finished checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit())

    def holds(self, step: int) -> bool:
        """Whether there is a checkpoint of this step."""
        return any(path.name == f"step-{step:08d}" for path in self.found())

    def best_of_run(self) -> dict[str, Any] | None:
        """Which checkpoint is the best one, and its score."""
        path = self.folder / "best.json"
        return read_json(path, BEST, remedy="delete it, and the best one is chosen anew") if path.exists() else None

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is whole, with what it holds; a broken one is passed over with a warning."""
        problems = []
        for old in self.folder.glob(".step-*.old") if dist.is_main() else []:     # a kill while one was written over
            recover(old.with_name(old.name.removeprefix(".").removesuffix(".old")))
        dist.barrier()
        for path in reversed(self.found()):
            try:
                saved = self.read(path)
            except Mismatch:
                raise
            except UserError as error:
                problems.append(str(error))
                continue
            best = self.best_of_run()
            self.best = best["score"] if best and math.isfinite(best["score"]) else None
            for problem in problems:
                print(f"warning: {problem}; going back to {path.name}")
            return path, saved
        if problems:
            raise UserError("no whole checkpoint is left: " + "; ".join(problems))
        return None

    def read(self, path: Path) -> dict[str, Any]:
        """Check a checkpoint against its list of files and read it."""
        about = read_json(path / "checkpoint.json", ABOUT)
        if about["format"] != FORMAT:
            raise UserError(f"{path} has checkpoint format {about['format']}, this version reads {FORMAT}")
        if "trainer.pt" not in about["files"]:
            raise UserError(f"{path / 'checkpoint.json'} lists no trainer.pt")
        for name, want in about["files"].items():
            file = path / name
            if not file.exists():
                raise UserError(f"{file} is missing")
            if file.stat().st_size != want["bytes"]:
                raise UserError(f"{file} is truncated: {file.stat().st_size} of {want['bytes']} bytes")
            if sha256(file) != want["sha256"]:
                raise UserError(f"{file} is damaged: its sha256 is not the one that was written")
        differences = compare(about["fingerprints"], self.fingerprints)
        if differences:
            raise Mismatch(f"{path} was written by another run:\n" + "\n".join(f"  {d}" for d in differences)
                           + "\nGive the options of that run, or start a new one with another --out")
        saved = torch.load(path / "trainer.pt", map_location="cpu", weights_only=True)
        return saved | ({"shards": path / "shards"} if (path / "shards").exists() else {})


class Mismatch(UserError):
    """A whole checkpoint, but of another model, other data or another tokenizer."""


def write_tensors(path: Path, value: Any) -> None:
    """torch.save; its zip writer tells of a full disk by one of several RuntimeErrors: made the OSError that it is."""
    try:
        torch.save(value, path)
    except RuntimeError as error:
        if any(word in str(error) for word in ("PytorchStreamWriter", "inline_container", "write")):
            raise OSError(28, f"no space left on device, or the file cannot be written ({path.name})") from error
        raise


def compare(then: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """`name: then, now` for every leaf that differs; of lists of tables only the first pair that does."""
    lines = []
    for key in sorted({*then, *now}):
        a, b, name = then.get(key), now.get(key), f"{prefix}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            lines += compare(a, b, f"{name}.")
        elif tables(a) and tables(b):
            lines += [f"{name}: {len(a)} then, {len(b)} now"] if len(a) != len(b) else []
            first = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
            lines += compare(a[first], b[first], f"{name}[{first}].") if first is not None else []
        elif a != b:
            lines.append(f"{name}: {short(a)} then, {short(b)} now")
    return lines


def tables(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, dict) for item in value)


def short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
