"""Files that are either wholly there or not at all: write beside the target, flush to disk, rename."""
from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import typing
from pathlib import Path
from typing import Any, Iterator

from mindseed.base.config import describe, spell
from mindseed.base.errors import UserError


def unwritten(path: Path, number: int | None, why: object) -> UserError:
    """What to tell when writing `path` failed with such an errno."""
    full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)                   # of the disk, a quota, a limit
    return UserError(f"could not write {path}: {why}; {'free some space or ' * full}choose another place. What was "
                     "there before is intact.")


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it there when the block ends well, remove it when it does not.

    Works for a file or a folder, but never replaces one by the other. A folder that is replaced is moved aside first,
    so that at every moment either the old or the new one can be found (see `recover`). A full disk, or another place
    that cannot be written, becomes a UserError.
    """
    path = Path(path)
    make_folder(path.parent)
    temp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temp
        if path.exists() and path.is_dir() != temp.is_dir():
            kinds = ("a file", "a folder")
            raise UserError(f"{path} is {kinds[path.is_dir()]} and would be replaced by {kinds[temp.is_dir()]}; choose "
                            "another place")
        if path.is_symlink() or path.exists() and not path.is_dir() and not path.is_file():
            raise UserError(f"{path} is a link or a device, which would be replaced; name a plain file or folder")
        sync(temp)
        if path.is_dir():
            old = path.with_name(f".{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
            os.replace(temp, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temp, path)
        sync(path.parent, deep=False)
    except OSError as error:
        why = None
        if error.errno == errno.ENOENT and error.filename == str(temp):          # its folder is there: see above
            why = f"no file can be made in {path.parent}"
        raise unwritten(path, error.errno, why or error.strerror or error) from error
    finally:
        if temp.is_dir():
            shutil.rmtree(temp, ignore_errors=True)
        else:
            temp.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path | str, *, wait_s: float = -1, busy: str = "") -> Iterator[None]:
    """Hold the lock file `path`, which the system gives back even after a kill. Waits `wait_s` seconds (-1: for ever)
    for another process that holds it, then raises UserError(busy)."""
    from filelock import FileLock, Timeout
    lock = FileLock(make_folder(Path(path).parent) / Path(path).name)
    try:
        lock.acquire(timeout=wait_s)
    except Timeout:
        raise UserError(busy or f"{path} is held by another process") from None
    try:
        yield
    finally:
        lock.release()


def make_folder(path: Path | str) -> Path:
    """The folder, made with all above it if need be. UserError where that is impossible."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}; choose another place") from None
    return path


def recover(path: Path | str) -> Path:
    """Undo a kill that came between the two renames of a folder: put the moved-aside folder back."""
    path = Path(path)
    old = path.parent / f".{path.name}.old"       # with_name would refuse "."
    if old.exists() and not path.exists():
        os.replace(old, path)
    return path


def folders_with(name: str, below: Path) -> list[Path]:
    """The folders at most three levels below a folder that hold a file `name`, the nearest first."""
    return [path.parent for depth in ("*", "*/*", "*/*/*") for path in sorted(below.glob(f"{depth}/{name}"))]


def sync(path: Path, deep: bool = True) -> None:
    """Push a file, or a folder with what it holds, to the disk."""
    inside = list(path.rglob("*")) if deep and path.is_dir() else []
    for p in [*(p for p in inside if p.is_file()), path]:
        if not p.exists():
            continue
        fd = os.open(p, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_text(path: Path | str, text: str) -> None:
    with atomic(path) as temp:
        temp.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_json(path: Path | str, shape: Any = Any, *, remedy: str = "restore the file") -> Any:
    """Parse a JSON file; one that is missing, broken or of another shape is a UserError that names it.

    A shape is a type (`int`, `str | None`), `[shape]` for a list of such, `{str: shape}` for an object of such, or
    `{"key": shape, "key?": shape}` for an object that has at least these keys; those with a `?` may be absent.
    """
    try:
        value = parse_json(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}; {remedy}") from None
    if problem := misfit(value, shape):
        raise UserError(f"{path} is damaged or of another kind: {problem}; {remedy}")
    return value


def read_text(path: Path | str) -> str:
    """The text of a file; UserError for one that is missing, unreadable or not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: {error}") from None


def parse_json(text: str | bytes) -> Any:
    """json.loads, whose only exception is ValueError, for nests that are too deep as well."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None


def misfit(value: Any, shape: Any, name: str = "") -> str | None:
    """What of a JSON value is not of the shape (see `read_json`), by its dotted name; None if it fits."""
    what = name or "the whole"
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{what} must be a list, not {describe(value)}"
        return next(filter(None, (misfit(item, shape[0], f"{name}[{i}]") for i, item in enumerate(value))), None)
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{what} must be an object, not {describe(value)}"
        dot = f"{name}." if name else ""
        if str in shape:
            return next(filter(None, (misfit(item, shape[str], f"{dot}{key}") for key, item in value.items())), None)
        for key, inner in shape.items():
            plain = key.removesuffix("?")
            if plain not in value and plain == key:
                return f"{dot}{key} is missing"
            if plain in value and (problem := misfit(value[plain], inner, dot + plain)):
                return problem
        return None
    kinds = typing.get_args(shape) or (shape,)
    good = Any in kinds or type(value) in kinds or float in kinds and type(value) is int
    return None if good else f"{what} must be {spell(shape)}, not {describe(value)}"


def sha256(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
