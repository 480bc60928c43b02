"""Documents as integers on disk: mapped into memory, read a slice at a time, never resident as a whole.

A prepared folder holds `manifest.json` and, for each split, shards of a few million tokens. A shard is a safetensors
file, so any tool can open it:

    ids        uint16 or uint32 (tokens,)       all documents, one after another
    trainable  uint8 (tokens,)                  how much a token counts: of a chat 1 where it is to be
                                                learned, else 0; absent if every token is
    offsets    int64 (documents + 1,)           document i is ids[offsets[i]:offsets[i+1]]
    bytes      int64 (documents,)               UTF-8 bytes of the text that is learned, for bits per byte
    chat       uint8 (documents,)               1 if `trainable` says which count, 0: all
    source     int32 (documents,)               the file it came from: an index into the manifest's sources
    line       int64 (documents,)               and the line there
    label      uint8 (documents,)               of answers that were judged one by one: 1 desirable, 0 not

The pages that a process has touched of a mapped file count as its memory until they are given back. `Mapped` gives
them back after every 32 MB touched, which is what keeps training on any amount of text within constant memory.
"""
from __future__ import annotations

import bisect
import functools
import hashlib
import json
import mmap
import os
from pathlib import Path
from typing import Any, Protocol, Sequence

import numpy as np

from mindseed.base.errors import UserError
from mindseed.base.files import atomic, folders_with, misfit, parse_json, read_json, recover, sha256
from mindseed.tokenizers.hf_json import load_tokenizer

SCHEMA = 1
SHARD = {"file": str, "documents": int, "tokens": int, "supervised": int, "bytes": int, "size": int, "sha256": str}
SPLIT = {"documents": int, "tokens": int, "supervised": int, "bytes": int, "shards": [SHARD]}
MANIFEST = {"schema": int, "kind": str, "tokenizer_hash": str, "vocab_size": int, "template_hash": str | None,
            "heldout": float, "rows": {"total": int}, "skipped": [str], "sources": [{"path": str, "sha256": str}],
            "splits": {"train": SPLIT, "heldout": SPLIT}}
AGAIN = "run prepare again into another folder"
ARRAY = {"dtype": str, "shape": [int], "data_offsets": [int]}
ARRAYS = {"ids", "offsets", "bytes", "chat", "source", "line"}           # of every shard
TOUCHED_BYTES = 32 << 20           # mapped bytes touched before the pages are given back
FAULT_BYTES = 64 << 10             # a page fault maps the neighbourhood too
_DTYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "I32": np.int32, "I64": np.int64}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


class Documents(Protocol):
    """A split of a data set: what packing and loading need to know of it.

    Document i has `lengths[i]` tokens, ids and, for a conversation, how much each counts: 0 or 1 (None: all count 1).
    """

    lengths: np.ndarray            # (documents,) int64, tokens
    bytes: np.ndarray              # (documents,) int64, UTF-8 bytes of the text that is learned
    chat: np.ndarray               # (documents,) uint8
    labels: np.ndarray | None      # (documents,) uint8: were answers judged desirable? None: they were not judged
    fingerprint: str               # changes whenever any document does
    folder: Path | None            # where plans of packing are kept, None: in memory

    def __len__(self) -> int: ...
    def slice(self, i: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]: ...
    def get(self, i: int) -> tuple[np.ndarray, np.ndarray | None]: ...
    def name(self, i: int) -> str: ...


class MemoryDocuments:
    """Documents given as arrays: for tests, toys and whatever is made while the program runs."""

    def __init__(self, documents: Sequence[tuple[Sequence[int], Sequence[bool] | None]],
                 bytes: Sequence[int] | None = None, name: str = "memory",
                 labels: Sequence[bool] | None = None) -> None:
        self.ids = [np.asarray(ids, np.uint32) for ids, _ in documents]
        self.trainable = [None if t is None else np.asarray(t, np.uint8) for _, t in documents]
        self.lengths = np.array([len(ids) for ids in self.ids], np.int64)
        self.bytes = np.asarray(self.lengths if bytes is None else bytes, np.int64)
        self.chat = np.array([t is not None for t in self.trainable], np.uint8)
        self.labels = None if labels is None else np.asarray(labels, np.uint8)
        self.folder, self._name = None, name
        digest = hashlib.sha256(self.lengths.tobytes() + self.chat.tobytes())
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        for array in self.ids + [t for t in self.trainable if t is not None]:
            digest.update(array.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.ids)

    def slice(self, i: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        trainable = self.trainable[i]
        return self.ids[i][start:stop], None if trainable is None else trainable[start:stop]

    def get(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        return self.ids[i], self.trainable[i]

    def name(self, i: int) -> str:
        return f"{self._name}:{i}"


# ----------------------------------------------------------------------------------------------- arrays in a file

def write_arrays(path: Path, arrays: dict[str, list[np.ndarray]]) -> None:
    """Write named arrays, each given in pieces, as a safetensors file: atomic, and without joining the pieces."""
    header, at = {}, 0
    for name, pieces in arrays.items():
        size = sum(piece.nbytes for piece in pieces)
        header[name] = {"dtype": _NAMES[pieces[0].dtype], "shape": [sum(map(len, pieces)), *pieces[0].shape[1:]],
                        "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as temp, open(temp, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for pieces in arrays.values():
            for piece in pieces:
                file.write(np.ascontiguousarray(piece).data)


class Mapped:
    """The arrays of a safetensors file as read-only views of a memory map. Raises UserError if it is damaged."""

    def __init__(self, path: Path) -> None:
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                header = parse_json(file.read(length)) if 0 < length < size else {}
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else None
        except FileNotFoundError:
            raise UserError(f"{path} is missing; run prepare again to make it anew") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}; remove it and run prepare again") from None
        header = {k: v for k, v in header.items() if k != "__metadata__"} if isinstance(header, dict) else {}
        ends = [] if misfit(header, {str: ARRAY}) else [max(e["data_offsets"], default=0) for e in header.values()]
        if not ends or size != 8 + length + max(ends):
            raise UserError(f"{path} is truncated or damaged ({size} bytes); remove it and run prepare again")
        try:
            self.arrays = {
                name: np.frombuffer(self.map, _DTYPES[entry["dtype"]], int(np.prod(entry["shape"])),
                                    8 + length + entry["data_offsets"][0]).reshape(entry["shape"])
                for name, entry in header.items()}
        except (LookupError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it and run prepare again") from None

    def release(self) -> None:
        """Give the touched pages back to the system; the views stay valid and fault them in again when read."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)


# --------------------------------------------------------------------------------------------- a prepared folder

class ShardedDocuments:
    """The documents of one split of a prepared folder (see `Documents`). Held in memory are 9 bytes for each."""

    def __init__(self, folder: Path, shards: list[dict[str, Any]], sources: list[str]) -> None:
        self.folder, self.sources, self.shards = folder, sources, []
        for entry in shards:
            path = folder / entry["file"]
            shard = Mapped(path)
            if missing := ARRAYS - shard.arrays.keys():
                raise UserError(f"{path} lacks {', '.join(sorted(missing))}; remove the folder and run prepare again")
            if os.path.getsize(path) != entry["size"] or len(shard.arrays["bytes"]) != entry["documents"]:
                raise UserError(f"{path} has {os.path.getsize(path)} bytes, the manifest says {entry['size']}; "
                                "remove the folder and run prepare again")
            self.shards.append(shard)
        self.firsts = np.cumsum([0] + [entry["documents"] for entry in shards]).tolist()
        self.lengths = self._all("offsets", np.diff)
        self.chat = self._all("chat", np.array, np.uint8)
        judged = bool(self.shards) and all("label" in shard.arrays for shard in self.shards)
        self.labels = self._all("label", np.array, np.uint8) if judged else None
        self.fingerprint = hashlib.sha256("".join(entry["sha256"] for entry in shards).encode()).hexdigest()
        self._touched = 0
        self._release()

    def _all(self, name: str, what: Any, dtype: type = np.int64) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(what(shard.arrays[name]) for shard in self.shards)])

    @functools.cached_property
    def bytes(self) -> np.ndarray:
        """Read when asked for, since only evaluation does."""
        return self._all("bytes", np.array)

    def _release(self) -> None:
        self._touched = 0
        for shard in self.shards:
            shard.release()

    def __len__(self) -> int:
        return len(self.lengths)

    def slice(self, i: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens start..stop-1 of document i, views of the map: copy what must outlive the next call."""
        at = bisect.bisect_right(self.firsts, i) - 1
        arrays = self.shards[at].arrays
        first, end = arrays["offsets"][i - self.firsts[at]:i - self.firsts[at] + 2].tolist()
        start, stop = first + start, min(first + stop, end)
        self._touched += 3 * FAULT_BYTES + (stop - start) * (arrays["ids"].itemsize + 1)
        if self._touched > TOUCHED_BYTES:
            self._release()
        return arrays["ids"][start:stop], arrays["trainable"][start:stop] if self.chat[i] else None

    def get(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        return self.slice(i, 0, int(self.lengths[i]))

    def name(self, i: int) -> str:
        """Where document i came from, as file:line."""
        at = bisect.bisect_right(self.firsts, i) - 1
        arrays = self.shards[at].arrays
        source, line = arrays["source"][i - self.firsts[at]], arrays["line"][i - self.firsts[at]]
        return f"{self.sources[source]}:{line}"


class Prepared:
    """A prepared folder, opened and checked: manifest, splits, and the tokenizer it was made with.

    Pass the `tokenizer` (and `template_hash`) that a model is to be trained with to be told at once, by a UserError,
    that the data were made with another one. `verify` reads every shard and compares its sha256.
    """

    def __init__(self, folder: Path | str, *, tokenizer: Any = None, template_hash: str | None = None,
                 verify: bool = False) -> None:
        self.folder = recover(Path(folder))
        path = self.folder / "manifest.json"
        if not path.exists():
            if (self.folder / ".parts").exists():
                raise UserError(f"{folder} is not finished: run the same prepare command again to continue it")
            near = folders_with("manifest.json", self.folder)
            place = "FOLDER" if self.folder.exists() else folder
            hint = f"did you mean {near[0]}?" if near else (
                f"make it with: mindseed prepare FILES --out {place} --tokenizer TOKENIZER")
            raise UserError(f"{folder} holds no prepared data (no manifest.json); {hint}")
        self.manifest = read_json(path, {str: Any}, remedy=AGAIN)
        if self.manifest.get("schema") != SCHEMA:
            raise UserError(f"{path} has schema {self.manifest.get('schema')}, this version reads {SCHEMA}; {AGAIN}")
        read_json(path, MANIFEST, remedy=AGAIN)
        if tokenizer is not None and tokenizer.hash() != self.tokenizer_hash:
            raise UserError(f"{folder} was prepared with another tokenizer ({self.tokenizer_hash[:12]}, not "
                            f"{tokenizer.hash()[:12]}); run prepare with this one into another folder")
        if template_hash is not None and self.manifest["template_hash"] not in (None, template_hash):
            raise UserError(f"{folder} was prepared with another chat template "
                            f"({self.manifest['template_hash'][:12]}, not {template_hash[:12]}); prepare it again, "
                            "--tokenizer naming the directory of the model or tokenizer it is for")
        if verify:
            for entry in (entry for split in self.manifest["splits"].values() for entry in split["shards"]):
                path = self.folder / entry["file"]
                if sha256(path) != entry["sha256"]:
                    raise UserError(f"{path} has changed since it was prepared; run prepare again")

    @property
    def kind(self) -> str:
        """"text", "chat", "preference" (documents 2i and 2i+1 are a chosen and a rejected conversation) or "unpaired"
        (conversations with a label each: desirable or not)."""
        return self.manifest["kind"]

    @property
    def tokenizer_hash(self) -> str:
        return self.manifest["tokenizer_hash"]

    @property
    def vocab_size(self) -> int:
        return self.manifest["vocab_size"]

    def tokenizer(self) -> Any:
        """The tokenizer that the folder was prepared with; a copy of it is kept inside."""
        return load_tokenizer(self.folder / "tokenizer")

    def split(self, name: str) -> ShardedDocuments:
        """The documents of "train" or "heldout" (which is empty if no document fell into it)."""
        splits = self.manifest["splits"]
        if name not in splits:
            raise UserError(f"{self.folder} has no split {name!r}, only {', '.join(splits)}")
        return ShardedDocuments(self.folder, splits[name]["shards"], [s["path"] for s in self.manifest["sources"]])
