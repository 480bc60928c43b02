"""Tokenise once: files of text or conversations into a folder of shards that training maps into memory.

The input is read in chunks, in order; worker processes encode them; the main process takes the results in the same
order and closes a *part* (one shard per split) as soon as it holds enough tokens. Nothing depends on time or on the
number of workers, so the folder is the same to the byte for any of them.

A part is finished when its record in `.parts/` exists, and that record is written last, by one rename. After a kill
the finished parts are kept, the chunks they took are passed over, and the rest is redone: the result is the folder
that an undisturbed run would have made. `manifest.json` is written at the very end; while it is absent, the folder
is unfinished.
"""
from __future__ import annotations

import collections
import concurrent.futures
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

import numpy as np

from mindseed.base.errors import UserError
from mindseed.base.files import read_json, sha256, write_json
from mindseed.data import fim
from mindseed.data.encode import SPLITS, Chunk, Encoded, Encoder, Pieces, chunks, require_marks
from mindseed.data.formats import check
from mindseed.data.readers import expand
from mindseed.data.shards import SCHEMA, SHARD, Prepared, write_arrays
from mindseed.tokenizers.chat import template_hash
from mindseed.tokenizers.hf_json import save_tokenizer
from mindseed.tokenizers.template import Template

SHARD_TOKENS = 1 << 25
APART = ("preference", "unpaired")  # kinds of rows that share a folder with no other
FEWEST_SKIPPED = 10                # a fraction as budget never means fewer lines than this
INLINE_BYTES = 1 << 20             # less input is not worth starting worker processes for

PART = {"chunks": int, "rows": {str: int}, "kinds": {str: int}, "splits": {str: SHARD}, "skipped": [[Any]]}

Progress = Callable[[int, int, int], None]        # rows done, parts done, lines skipped


def prepare(paths: Iterable[str | Path] | str | Path, out: str | Path, tokenizer: Any, *, heldout: float = 0.01,
            seed: int = 0, workers: int | None = None, shard_tokens: int = SHARD_TOKENS, max_skipped: float = 0.01,
            fim_rate: float = 0.0, overwrite: bool = False, template: Template | None = None,
            progress: Progress | None = None) -> Prepared:
    """Tokenise the rows of `paths` into the folder `out`; continue where a killed run stopped; return it opened.

    `heldout` is the share of rows set apart, by a hash of each row's content and `seed`. `max_skipped` is how many
    bad lines are put up with before the job stops with their list: below 1 a share of the rows (but always 10 lines),
    else a number; 0 allows none. `workers` is the number of processes (default: one per core). `fim_rate` is the share
    of training texts whose middle is told last. `template` is how conversations are told [our own format].

    A second call with the same inputs does nothing. With other inputs it raises a UserError that says what differs.
    With `overwrite` what other inputs left is removed, and so is what does not have the sums that were written.
    """
    if not 0 <= heldout < 1:
        raise UserError(f"heldout = {heldout} must be at least 0 and below 1: the share of rows set apart")
    if max_skipped < 0 or shard_tokens < 1 or (workers is not None and workers < 1):
        raise UserError(f"max_skipped = {max_skipped} must not be negative, shard_tokens = {shard_tokens} and "
                        f"workers = {workers} must be at least 1")
    if not -1 << 63 <= seed < 1 << 63:
        raise UserError(f"seed = {seed} must lie between -2^63 and 2^63 - 1")
    if not 0 <= fim_rate <= 1:
        raise UserError(f"fim_rate = {fim_rate} must lie between 0 and 1: the share of texts whose middle is told last")
    require_marks(tokenizer)
    if fim_rate:
        fim.markers(tokenizer)
    out, files = Path(out), expand(paths)
    for file in files:
        check(file)
    inputs = {
        "schema": SCHEMA, "tokenizer_hash": tokenizer.hash(), "vocab_size": tokenizer.vocab_size,
        "template_hash": template.hash() if template else template_hash(), "heldout": heldout, "seed": seed,
        "shard_tokens": shard_tokens, "fim_rate": fim_rate,
        "sources": [{"path": str(file), "bytes": file.stat().st_size, "sha256": sha256(file)} for file in files],
    }
    if _already(out, inputs, overwrite):
        return Prepared(out, tokenizer=tokenizer)
    encoder = Encoder(tokenizer, heldout, seed, fim_rate, template)
    size = sum(source["bytes"] for source in inputs["sources"])
    workers = 1 if size < INLINE_BYTES else workers or os.cpu_count() or 1
    job = _Job(out, [str(file) for file in files], max_skipped, shard_tokens)
    job.resume()
    todo = itertools.islice(chunks(files), job.chunks, None)
    for encoded in in_order(encoder, todo, workers):
        job.add(encoded)
        if progress:
            progress(sum(job.rows.values()), len(job.parts), len(job.skipped))
    if template:
        save_tokenizer(tokenizer, out / "tokenizer", chat_template=template.source, marks=dict(template.marks))
    else:
        save_tokenizer(tokenizer, out / "tokenizer")
    job.finish(inputs)
    return Prepared(out, tokenizer=tokenizer)


def write_prepared(out: Path, tokenizer: Any, splits: dict[str, list[tuple[list[int], list[int] | None]]],
                   name: str) -> Prepared:
    """A prepared folder of documents that a program made: (ids, how much each token counts) by split; `name` stands for
    the file they come from. Does nothing if the folder is finished."""
    if not (out / "manifest.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        encoder, job = Encoder(tokenizer, 0.0, 0), _Job(out, [name], 0.0, SHARD_TOKENS)
        documents = [(i, split, ids, weights,
                      len(ids) - 1 if weights is None else sum(w > 0 for w in weights[1:]))
                     for split, some in splits.items() for i, (ids, weights) in enumerate(some)]
        job.resume()
        job.add(Encoded(0, len(documents), {"text": len(documents)},
                        {split: sum(d[4] for d in documents if d[1] == split) for split in SPLITS},
                        {split: encoder.pieces(some, 0) for split in splits
                         if (some := [d for d in documents if d[1] == split])}))
        save_tokenizer(tokenizer, out / "tokenizer")
        digest = hashlib.sha256(json.dumps([d[2:4] for d in documents]).encode()).hexdigest()
        job.finish({"schema": SCHEMA, "tokenizer_hash": tokenizer.hash(), "vocab_size": tokenizer.vocab_size,
                    "template_hash": None, "heldout": 0.0, "sources": [{"path": name, "bytes": 0, "sha256": digest}]})
    return Prepared(out, tokenizer=tokenizer)


def _damaged(out: Path) -> bool:
    try:
        Prepared(out, verify=True)
    except (UserError, FileNotFoundError):
        return True
    return False


def _already(out: Path, inputs: dict, overwrite: bool) -> bool:
    """True if `out` is finished with these inputs; makes it ready for a new or continued run otherwise."""
    manifest, begun = out / "manifest.json", out / ".parts" / "inputs.json"
    if not manifest.exists() and begun.exists() and not (out / ".parts" / "00000.json").exists():
        shutil.rmtree(out)                                              # begun, but nothing finished
    if manifest.exists() and not {"schema", "tokenizer_hash"} <= set(read_json(manifest, {str: Any})):
        raise UserError(f"{out} is no prepared folder: its manifest.json is another program's; choose another one")
    if manifest.exists() or begun.exists():
        there = read_json(manifest if manifest.exists() else begun, {"sources": [{"path": str, "sha256": str}]},
                          remedy=f"remove {out} and prepare again")
        differences = list(_differences(there, inputs))
        if differences and not overwrite:
            raise UserError(f"{out} was prepared from other inputs: {'; '.join(differences)}. "
                            "Choose another folder, or remove this one (`mindseed prepare` does it with --overwrite)")
        if not differences and not (overwrite and manifest.exists() and _damaged(out)):
            if manifest.exists():
                shutil.rmtree(out / ".parts", ignore_errors=True)   # a kill may have come just before this
            return manifest.exists()
        shutil.rmtree(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is no prepared folder; choose another one")
    write_json(begun, inputs)
    return False


def _differences(there: dict, inputs: dict) -> Iterator[str]:
    for key, new in inputs.items():
        old = there.get(key)
        if key != "sources":
            if old != new and not (key == "template_hash" and old is None):      # None: there are no conversations
                yield f"{key} was {_short(old)}, is {_short(new)}"
            continue
        old_files, new_files = ({source["sha256"]: source["path"] for source in entry} for entry in (old or [], new))
        gone = [path for digest, path in old_files.items() if digest not in new_files]
        come = [path for digest, path in new_files.items() if digest not in old_files]
        changed = [path for path in gone if path in come]
        gone, come = ([path for path in some if path not in changed] for some in (gone, come))
        if changed:
            yield f"changed since: {', '.join(changed[:3])}{' ...' if len(changed) > 3 else ''}"
        if gone or come:
            yield "; ".join(f"{what}: {', '.join(some[:3])}{' ...' if len(some) > 3 else ''}" for what, some in
                            (("files no longer there", gone), ("new files", come)) if some)
        elif not changed and [s["sha256"] for s in old] != [s["sha256"] for s in new]:
            yield "the same files in another order"


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


# ------------------------------------------------------------------------------------------------------ the work

_ENCODER: Encoder | None = None                   # of a worker process; set once, when it starts


def _start_worker(encoder: Encoder) -> None:
    global _ENCODER
    _ENCODER = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"                    # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)                      # Ctrl-C is the main process's affair
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()    # do not outlive it


def _work(chunk: Chunk) -> Encoded:
    return _ENCODER(chunk)


def in_order(encoder: Encoder, todo: Iterable[Chunk], workers: int) -> Iterator[Encoded]:
    """Encode chunks in `workers` processes; results come in the order of the chunks, with few of them in memory.

    Processes are started afresh, so a script that calls this must do so under `if __name__ == "__main__":`.
    """
    if workers == 1:
        yield from map(encoder, todo)
        return
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (encoder,)) as pool:
        waiting: collections.deque = collections.deque()
        try:
            for chunk in todo:
                waiting.append(pool.submit(_work, chunk))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError("a worker process died, for want of memory perhaps; run the same command again to "
                            "continue, with fewer --workers (a script of your own must call this under "
                            '`if __name__ == "__main__":`)') from None
        finally:
            for future in waiting:
                future.cancel()


@dataclass
class _Job:
    """What has been made so far: the records of finished parts, and the part that is being filled."""

    out: Path
    sources: list[str]
    max_skipped: float
    shard_tokens: int
    parts: list[dict] = field(default_factory=list)
    chunks: int = 0
    tokens: int = 0                                                   # in the open part
    open: dict[str, list[Pieces]] = field(default_factory=dict)
    supervised: dict[str, int] = field(default_factory=dict)          # in the open part
    rows: dict[str, int] = field(default_factory=dict)                # per source, over all parts
    kinds: dict[str, int] = field(default_factory=dict)               # rows per kind, over all parts
    skipped: list[list] = field(default_factory=list)                 # [file, line, reason], over all parts
    logged: int = 0                                                   # of them, how many a record holds

    def resume(self) -> None:
        """Read the records of the parts that an earlier run finished; remove what it was writing when it was killed."""
        for leftover in self.out.rglob(".*.tmp-*"):
            leftover.unlink()
        while (path := self._record(len(self.parts))).exists():
            part = read_json(path, PART, remedy=f"remove {self.out} and prepare again")
            self.parts.append(part)
            self.chunks, self.rows, self.kinds = part["chunks"], part["rows"], part["kinds"]
            self.skipped += part["skipped"]
        self.logged = len(self.skipped)
        self._new_part()

    def _record(self, number: int) -> Path:
        return self.out / ".parts" / f"{number:05}.json"

    def _new_part(self) -> None:
        self.tokens, self.open, self.supervised = 0, {s: [] for s in SPLITS}, dict.fromkeys(SPLITS, 0)

    def add(self, encoded: Encoded) -> None:
        file = self.sources[encoded.source]
        self.chunks += 1
        self.rows[file] = self.rows.get(file, 0) + encoded.rows
        for kind, count in encoded.kinds.items():
            self.kinds[kind] = self.kinds.get(kind, 0) + count
        self.skipped += [[file, line, reason] for line, reason in encoded.skipped]
        self._check_budget()
        kinds = [kind for kind, count in self.kinds.items() if count]
        if len(kinds) > 1 and (alone := [kind for kind in APART if kind in kinds]):
            others = ", ".join(sorted({*kinds} - {alone[0]}))
            raise UserError(f"up to {file} there are {alone[0]} rows and others ({others}), which no run learns from "
                            "together; put rows of one kind into files of their own")
        for split, pieces in encoded.splits.items():
            self.open[split].append(pieces)
            self.supervised[split] += encoded.supervised[split]
            self.tokens += len(pieces.ids)
        if self.tokens >= self.shard_tokens:
            self._close_part()

    def _check_budget(self) -> None:
        check_budget(self.skipped, sum(self.rows.values()), self.max_skipped)

    def _close_part(self) -> None:
        """Write the shards of the open part, then its record."""
        number, splits = len(self.parts), {}
        for split, pieces in self.open.items():
            if pieces:
                name = f"{split}/{number:05}.safetensors"
                splits[split] = {"file": name, **self._write_shard(self.out / name, pieces),
                                 "supervised": self.supervised[split]}
        self.parts.append({"chunks": self.chunks, "rows": dict(self.rows), "kinds": dict(self.kinds),
                           "splits": splits, "skipped": self.skipped[self.logged:]})
        write_json(self._record(number), self.parts[-1])
        self.logged = len(self.skipped)
        self._new_part()

    def _write_shard(self, path: Path, pieces: list[Pieces]) -> dict[str, Any]:
        lengths = np.concatenate([p.columns["lengths"] for p in pieces])
        arrays = {"offsets": [np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)]}
        for name in ("bytes", "line", "source", "label"):
            if name not in pieces[0].columns:
                continue
            arrays[name] = [p.columns[name] for p in pieces]
        arrays["ids"] = [p.ids for p in pieces]
        arrays["chat"] = [p.columns["chat"] for p in pieces]
        if any(p.trainable is not None for p in pieces):
            arrays["trainable"] = [np.ones(len(p.ids), np.uint8) if p.trainable is None else p.trainable
                                   for p in pieces]
        write_arrays(path, arrays)
        return {"documents": len(lengths), "tokens": int(lengths.sum()),
                "bytes": int(sum(p.columns["bytes"].sum() for p in pieces)),
                "size": path.stat().st_size, "sha256": sha256(path)}

    def finish(self, inputs: dict) -> None:
        if any(self.open.values()) or self.logged < len(self.skipped):
            self._close_part()
        splits = {}
        for split in SPLITS:
            shards = [part["splits"][split] for part in self.parts if split in part["splits"]]
            totals = {key: sum(shard[key] for shard in shards)
                      for key in ("documents", "tokens", "supervised", "bytes")}
            splits[split] = {**totals, "shards": shards}
        if not splits["train"]["documents"]:
            raise UserError(f"nothing to train on: of {sum(self.rows.values())} rows {len(self.skipped)} were skipped "
                            f"and {splits['heldout']['documents']} held out\n{listed(self.skipped)}")
        kinds = {kind: n for kind, n in self.kinds.items() if n}
        chat = set(kinds) - {"text"}
        write_json(self.out / "manifest.json", {
            **inputs, "kind": next((kind for kind in APART if kind in kinds), "chat" if chat else "text"),
            "template_hash": inputs["template_hash"] if chat else None,
            "sources": [{**s, "rows": self.rows.get(s["path"], 0)} for s in inputs["sources"]],
            "rows": {"total": sum(self.rows.values()), "skipped": len(self.skipped), **kinds},
            "splits": splits, "skipped": [f"{file}:{line}: {reason}" for file, line, reason in self.skipped]})
        shutil.rmtree(self.out / ".parts")


def check_budget(skipped: list[list], rows: int, max_skipped: float) -> None:
    """UserError with the list of bad lines, [file, line, reason] each, if they are more than is put up with."""
    allowed = max_skipped if max_skipped >= 1 or not max_skipped else max(FEWEST_SKIPPED, max_skipped * rows)
    if len(skipped) > allowed:
        raise UserError(f"{len(skipped)} of the first {rows} rows cannot be used, {int(allowed)} are allowed "
                        f"(mend them or raise max_skipped, in a run data.max_skipped):\n{listed(skipped)}")


def listed(skipped: list[list], most: int = 12) -> str:
    """Bad lines for a message: each reason once, with the places it was met at; the first few of both."""
    places: dict[str, list[str]] = {}
    for file, line, reason in skipped:
        places.setdefault(reason, []).append(f"{file}:{line}")
    lines = [f"  {', '.join(some[:3])}{f' and {len(some) - 3} more' if len(some) > 3 else ''}: {reason}"
             for reason, some in list(places.items())[:most]]
    return "\n".join(lines + [f"  ... and {len(places) - most} other reasons"] * (len(places) > most))
