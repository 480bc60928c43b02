"""The command line in processes of its own, each forked from one that has imported torch already.

A test of a whole run needs a process to kill, not the seconds that a process takes to import its libraries.
"""
from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["mindseed.recipes.train", "mindseed.cli"])


def start(*words: object, out: str = os.devnull, err: str = os.devnull) -> multiprocessing.Process:
    """`mindseed words...` with its output in two files; leader of a session of its own, as a shell's commands are."""
    process = FORKS.Process(target=child, args=(list(map(str, words)), out, err, os.getcwd(), dict(os.environ)))
    process.start()
    return process


def child(words: list[str], out: str, err: str, folder: str, environment: dict[str, str]) -> None:
    from mindseed.cli import main
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(name, os.O_RDWR | os.O_APPEND), number)
    sys.argv = ["mindseed", *words]
    sys.exit(main(words))


def call(*words: object, timeout: float = 240) -> subprocess.CompletedProcess:
    """`mindseed words...`, as subprocess.run does it."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "err")]
        for file in files:
            file.touch()
        process = start(*words, out=str(files[0]), err=str(files[1]))
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, timeout)
        return subprocess.CompletedProcess(words, process.exitcode, *(file.read_text() for file in files))
