"""Kernels written as plain Python, compiled by numba when the first of them is needed (`pip install 'mindseed[fast]'`).

A function marked `kernel` is called by other kernels, one marked `entry` by Python. Until `compiled` is called they are
ordinary functions that cannot run; from then on their names in their modules, and those of the instructions of simd.py,
stand for compiled ones. Compiling takes a quarter of a minute, once per machine and kind of numbers: the machine code
is kept on disk, and loading it takes a second.
"""
from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

from mindseed.base.log import notes
from mindseed.infer import simd

FLAGS = {"reassoc", "contract", "nsz", "arcp"}    # what LLVM may do with sums; infinities and NaN stay what they are
HELPER: list[Callable] = []
ENTRY: list[Callable] = []


def kernel(function: Callable) -> Callable:
    HELPER.append(function)
    return function


def entry(function: Callable) -> Callable:
    ENTRY.append(function)
    return function


def available() -> bool:
    """Whether numba is installed (`pip install 'mindseed[fast]'`)."""
    return importlib.util.find_spec("numba") is not None


@cache
def compiled() -> dict[str, Callable]:
    """The entries by name, each compiled when it is first called and kept on disk."""
    import numba

    space, options = simd.primitives(), {"fastmath": FLAGS, "error_model": "numpy"}
    for function in HELPER:
        space[function.__name__] = numba.njit(function, no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)
    folder, before = cache_folder(numba.config.CACHE_DIR), numba.config.CACHE_DIR
    if notes.is_terminal and not (folder and any(folder.iterdir())):
        notes.print("compiling the kernels for this machine: a quarter of a minute, once", style="dim")
    numba.config.CACHE_DIR = str(folder or "")
    try:
        entries = {f.__name__: numba.njit(f, nogil=True, cache=folder is not None, **options) for f in ENTRY}
    finally:
        numba.config.CACHE_DIR = before
    for function in (*HELPER, *ENTRY):            # what they call by name is the compiled function from now on
        function.__globals__.update(space)
    return entries


def cache_folder(chosen: str) -> Path | None:
    """Where machine code is kept: the folder chosen with NUMBA_CACHE_DIR, or beside this file, or the user's; None if
    nothing can be written. Named after the sources: numba itself looks at the file of an entry alone, and would go on
    with what it was compiled from."""
    sources = {Path(simd.__file__), *(Path(f.__code__.co_filename) for f in (*HELPER, *ENTRY))}
    name = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()[:12]
    users = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    for place in (chosen, Path(__file__).parent / "__pycache__", Path(users) / "mindseed"):
        if place:
            with suppress(OSError):
                folder = Path(place) / f"kernels-{name}"
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    return folder
    return None
