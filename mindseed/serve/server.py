"""Running the application: a socket that is bound before anything is loaded, and an end that loses nobody's answer.

On SIGTERM (or Ctrl-C) nobody new is let in and the answers in progress may be finished, up to a limit; a second Ctrl-C
ends them at once. Either way the process leaves with exit code 0.
"""
from __future__ import annotations

import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from mindseed.base.errors import UserError


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound but does not listen yet; port 0 takes any free one. UserError where it cannot be had."""
    sock = None
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        return sock
    except (OSError, OverflowError) as error:
        if sock is not None:
            sock.close()
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise UserError(f"cannot listen on {host}:{port}: another program does already; choose another with --port "
                            "(0: any that is free)") from None
        raise UserError(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}; choose another "
                        "--host or --port") from None


def address_of(sock: socket.socket) -> str:
    """http://host:port of a socket, as one on this machine would reach it."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(app: FastAPI, sock: socket.socket, *, drain_s: float = 30.0, access_log: bool = False,
        began: Callable[[uvicorn.Server], None] | None = None) -> None:
    """Serve until a signal comes, or `began`'s server is told to exit; then let answers finish for `drain_s`."""
    config = uvicorn.Config(app, log_level="info" if access_log else "warning", access_log=access_log,
                            timeout_graceful_shutdown=max(1, round(drain_s)), timeout_keep_alive=30, lifespan="off",
                            server_header=False)
    server = uvicorn.Server(config)
    if began is not None:
        began(server)
    with surviving_signals():
        server.run(sockets=[sock])


@contextlib.contextmanager
def surviving_signals() -> Iterator[None]:
    """uvicorn raises the signal that ended it once more, which would end the process by it; here it is done with."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {sig: signal.signal(sig, lambda *_: None) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
