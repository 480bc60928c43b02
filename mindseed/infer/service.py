"""An engine in a thread of its own, for programs that wait with asyncio.

The engine computes, everything else waits. Requests, cancellations and questions go to the thread as letters in an
inbox, which it reads between two passes; the tokens of a pass come back in one call to the event loop and are sorted
into a queue per request. Whoever stops listening to its queue (a client that went away) cancels its request: the blocks
are free before the next pass.
"""
from __future__ import annotations

import asyncio
import queue
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

from mindseed.base.errors import UserError
from mindseed.infer.engine import Engine, Request, Stats
from mindseed.infer.rows import Token

FAULTS = 3                                        # failed passes in a row after which the engine is taken for broken
Line = tuple[asyncio.AbstractEventLoop, asyncio.Queue]     # where the tokens of a request go


class EngineDead(RuntimeError):
    """The engine's thread was closed, or ended by a fault of ours; the server must be started again."""


class PassFailed(RuntimeError):
    """A pass ended by a fault of ours: the requests that were running are lost, others may be asked."""


class Service:
    """Starts the thread at once. Everything public may be called from any thread and any event loop."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: BaseException | None = None
        self.inbox: queue.SimpleQueue[tuple[Callable[..., Any], Future, bool]] = queue.SimpleQueue()
        self.lines: dict[int, Line] = {}
        self.draining = self.closing = self.ended = False
        self.faults = 0                           # passes that failed one after the other
        self.seen = engine.stats()
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    # ------------------------------------------------------------------------------------------------- any thread's

    async def stream(self, request: Request) -> AsyncIterator[Token]:
        """The tokens of all answers to a request. Raises UserError (QueueFull, TooLong) before the first; to close it
        early, or to cancel the task that listens, cancels the request."""
        self.engine.check(request)                                    # at once, and not between two passes
        line: Line = (asyncio.get_running_loop(), asyncio.Queue())
        future = self.call(self.begin, request, line)
        try:
            number = await asyncio.wrap_future(future)
        except asyncio.CancelledError:                                # it may have been taken in by now
            future.add_done_callback(lambda f: f.cancelled() or f.exception() or self.call(self.end, f.result()))
            raise
        left = request.n
        try:
            while left:
                item = await line[1].get()
                if isinstance(item, BaseException):
                    raise item
                left -= item.finish is not None
                yield item
        finally:
            if left:
                self.call(self.end, number)

    async def embed(self, prompts: list[list[int]], adapter: str | None = None) -> list[list[float]]:
        """One text after the other, so that answers go on between two, and nothing is computed for who has left."""
        vectors: list[list[float]] = []
        for prompt in prompts:
            vectors += await asyncio.wrap_future(self.call(
                lambda: self.engine.embed([prompt], adapter).tolist(), long=True))
        return vectors

    def stats(self) -> Stats:
        """As of the last pass."""
        return self.seen

    def call(self, function: Callable[..., Any], *arguments: Any, long: bool = False) -> Future:
        """Have the engine's thread call a function between two passes; one that takes long is the last before one."""
        future: Future = Future()
        self.inbox.put((lambda: function(*arguments), future, long))
        if self.ended:                            # else the thread will look once more before it leaves
            self.read_inbox(wait=False, refuse=True)
        return future

    def close(self, *, drain_s: float = 0.0) -> None:
        """Take no more requests, wait at most so long for those that are running, cancel the rest, end the thread."""
        self.draining, deadline = True, time.monotonic() + drain_s
        while self.engine.busy and self.error is None and time.monotonic() < deadline:
            time.sleep(0.02)
        self.closing = True
        self.call(lambda: None)                                       # wakes it
        self.thread.join()

    # ------------------------------------------------------------------------------------------ the engine's thread

    def run(self) -> None:
        try:
            while not self.closing:
                self.read_inbox(wait=not self.engine.busy)
                if self.engine.busy and not self.closing:
                    self.pass_once()
            self.cancel_all()
        except BaseException as error:            # a fault of ours: nobody may wait for ever
            self.error = error
        finally:
            self.draining = self.closing = self.ended = True
            self.fail_all(self.farewell())
            self.read_inbox(wait=False, refuse=True)

    def farewell(self) -> EngineDead:
        return EngineDead(f"the engine has stopped: {'it was closed' if self.error is None else repr(self.error)}")

    def read_inbox(self, *, wait: bool, refuse: bool = False) -> None:
        """Answer the letters that are there, up to one that takes long; `wait` for one."""
        while True:
            try:
                function, future, long = self.inbox.get(block=wait, timeout=1.0 if wait else None)
            except queue.Empty:
                break
            wait = False
            if not future.set_running_or_notify_cancel():
                continue
            if refuse:
                future.set_exception(self.farewell())
                continue
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)
            if long:
                break
        if not refuse:
            self.seen = self.engine.stats()

    def begin(self, request: Request, line: Line) -> int:
        if self.draining:
            raise EngineDead("the engine is about to stop and takes no more requests")
        number = self.engine.submit(request)
        self.lines[number] = line
        return number

    def end(self, number: int) -> None:
        self.lines.pop(number, None)
        self.engine.cancel(number)

    def pass_once(self) -> None:
        try:
            tokens = self.engine.step()
        except UserError as error:                # these requests fail, the thread lives
            self.give_up(error)
            return
        except Exception as error:                # a fault of ours: so here, if the books are in order afterwards
            self.faults += 1
            if self.faults == FAULTS:
                raise
            traceback.print_exc()
            self.give_up(PassFailed(f"a pass of the engine failed: {error!r}"))
            return
        self.seen, self.faults = self.engine.stats(), 0
        posts: dict[asyncio.AbstractEventLoop, list] = {}
        for number, token in tokens:
            if number in self.lines:
                loop, line = self.lines[number]
                posts.setdefault(loop, []).append((line, token))
        for number, error in self.engine.failed.items():
            if number in self.lines:
                loop, line = self.lines.pop(number)
                posts.setdefault(loop, []).append((line, error))
        self.engine.failed.clear()
        for number in {number for number, token in tokens if token.finish and number not in self.engine.jobs}:
            self.lines.pop(number, None)
        for loop, items in posts.items():
            if not post(loop, items):             # nobody is left to listen
                for number in [number for number, (where, _) in self.lines.items() if where is loop]:
                    self.end(number)

    def give_up(self, error: Exception) -> None:
        """Fail all requests; AssertionError if something of them is left."""
        self.cancel_all()
        scheduler = self.engine.scheduler
        scheduler.check()
        assert not scheduler.running and not scheduler.waiting, "a request is left that nobody has asked"
        self.seen = self.engine.stats()
        self.fail_all(error)

    def cancel_all(self) -> None:
        for number in list(self.engine.jobs):
            self.engine.cancel(number)

    def fail_all(self, error: BaseException) -> None:
        lines, self.lines = self.lines, {}
        for loop, line in lines.values():
            post(loop, [(line, error)])


def post(loop: asyncio.AbstractEventLoop, items: list[tuple[asyncio.Queue, Any]]) -> bool:
    """Put items into queues that belong to a loop; False if that has been closed."""
    def deliver() -> None:
        for line, item in items:
            line.put_nowait(item)

    try:
        loop.call_soon_threadsafe(deliver)
    except RuntimeError:
        return False
    return True
