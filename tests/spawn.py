"""The command line in processes of its own, each forked from one that has imported torch already.

A test of a whole run needs a process to kill, not the seconds that a process takes to import its libraries.
"""
from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable

import torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.warm", "mindseed.cli"])


def start(*words: object, out: str = os.devnull, err: str = os.devnull,
          environment: dict[str, str] | None = None) -> multiprocessing.Process:
    """`mindseed words...` with its output in two files; leader of a session of its own, as a shell's commands are."""
    process = FORKS.Process(target=child, args=(list(map(str, words)), out, err, os.getcwd(),
                                                {**os.environ, **(environment or {})}))
    process.start()
    return process


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def on_ranks(function: Callable[[int, int], Any], ranks: int = 2, timeout: float = 120) -> list[Any]:
    """What function(rank, ranks) gives on each rank of a process group."""
    results, port = FORKS.SimpleQueue(), free_port()
    processes = [FORKS.Process(target=member, args=(function, rank, ranks, port, results)) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        got, end = {}, time.monotonic() + timeout
        while len(got) < ranks:
            for process in processes:
                process.join(0.02)
                assert process.exitcode in (None, 0), "a rank failed"
            while not results.empty():
                rank, value = results.get()
                got[rank] = value
            assert time.monotonic() < end, "waited too long for the ranks"
        return [got[rank] for rank in range(ranks)]
    finally:
        for process in processes:
            process.join(10)
            process.kill()


def member(function: Callable[[int, int], Any], rank: int, ranks: int, port: int, results: Any) -> None:
    from mindseed.base import dist
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    with dist.process_group(torch.device("cpu")):
        results.put((rank, function(rank, ranks)))


def start_ranks(*words: object, ranks: int, out: str = os.devnull,
                err: str = os.devnull) -> list[multiprocessing.Process]:
    """The same command on so many ranks, as torchrun starts them."""
    if ranks == 1:
        return [start(*words, out=out, err=err)]
    port = free_port()
    return [start(*words, out=out, err=err, environment={
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}) for rank in range(ranks)]


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


def call(*words: object, timeout: float = 240, ranks: int = 1) -> subprocess.CompletedProcess:
    """`mindseed words...`, as subprocess.run does it."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "err")]
        for file in files:
            file.touch()
        processes = start_ranks(*words, out=str(files[0]), err=str(files[1]), ranks=ranks)
        for process in processes:
            process.join(timeout)
        if any(process.exitcode is None for process in processes):
            for process in processes:
                process.kill()
            raise subprocess.TimeoutExpired(words, timeout)
        code = max((process.exitcode for process in processes), key=abs)
        return subprocess.CompletedProcess(words, code, *(file.read_text() for file in files))
