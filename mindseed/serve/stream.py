"""Answers on their way out: as server-sent events while they are written, or whole; and what happens if nobody listens.

Whoever goes away stops the work for them at once: a stream's generator is closed with its response, and while a client
waits for a whole answer, or for the first token, its leaving is listened for. A slow reader holds up nobody: sending
waits for the socket, and what waits to be sent is no more than the tokens of one answer.
"""
from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from mindseed.infer.engine import Token
from mindseed.serve.ask import Ask
from mindseed.serve.errors import GONE, ApiError, api_error
from mindseed.serve.metrics import Clock
from mindseed.serve.served import Served

T = TypeVar("T")
logger = logging.getLogger("mindseed.serve")
DONE = b"data: [DONE]\n\n"
LAST_WORD_S = 1.0                                 # to tell a stream why it ends


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def tokens(served: Served, asks: list[Ask], clock: Clock) -> AsyncGenerator[tuple[int, Token], None]:
    """(which prompt, token) of all answers, as they come. Closing it cancels what is still to be written."""
    streams = [served.service.stream(ask.request) for ask in asks]
    async with contextlib.aclosing(merged(streams)) as all_of_them:
        async for index, token in all_of_them:
            clock(index, token)
            yield index, token
    clock.stop()


async def merged(streams: list[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """The items of several streams in the order in which they come, with the stream's number."""
    if len(streams) == 1:                         # no tasks and no queue for what most requests are
        async with contextlib.aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue(maxsize=len(streams))
    ended = object()

    async def pump(index: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for item in stream:
                    await queue.put((index, item))
            await queue.put((index, ended))
        except Exception as error:
            await queue.put((index, error))

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            left -= item is ended
            if item is not ended:
                yield index, item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives. If the client leaves before that, the work is cancelled."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(GONE, "the client has left")
        return task.result()
    finally:
        for one in (task, leaving):
            one.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Events(StreamingResponse):
    """Server-sent events, until they end or a deadline passes. `source` is closed with the response, whatever becomes
    of it, even if nothing was ever sent."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], source: AsyncGenerator[Any, None],
                 deadline: float | None) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.source, self.deadline = source, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()
            await self.source.aclose()

    async def stream_response(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        last = b""
        try:
            async with asyncio.timeout_at(self.deadline):
                async for chunk in self.body_iterator:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Exception as error:
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                raise                             # the client has left
            known = api_error(error)
            if known.status_code >= 500:
                logger.exception("an answer broke off")
            last = event(known.body)
        with contextlib.suppress(TimeoutError):   # a reader who has stopped reading does not hear why
            async with asyncio.timeout(LAST_WORD_S if last else None):
                await send({"type": "http.response.body", "body": last, "more_body": False})
