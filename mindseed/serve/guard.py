"""At the door: who may come in, how often, and with how large a body. All before anything of a request is looked at.

The keys are compared in constant time. How often somebody comes is a bucket of tokens for each key (or address, where
there are no keys): it holds a minute's worth, fills steadily, and a request takes one.
"""
from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mindseed.serve.errors import ApiError

OPEN = ("/", "/health", "/docs", "/openapi.json")    # to everybody, at any rate
BUCKETS = 10_000                                  # of clients that are remembered
BODY_S, WHOLE_S = 60.0, 600.0                     # the longest wait for the next piece of a body, and for all


class Guard:
    def __init__(self, app: ASGIApp, *, keys: Collection[str] = (), per_minute: int | None = None,
                 body_bytes: int = 4 << 20) -> None:
        self.app, self.per_minute, self.body_bytes = app, per_minute, body_bytes
        self.keys = [digest(key) for key in keys]
        self.buckets: dict[bytes | str, tuple[float, float]] = {}         # what is left, and when that was so

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            return await self.app(scope, receive, send)
        try:
            headers = Headers(scope=scope)
            self.check_rate(self.check_key(headers) or (scope.get("client") or ("",))[0])
            await self.check_length(headers, receive)
        except ApiError as error:
            return await error.response()(scope, receive, send)
        await self.app(scope, self.limited(receive), send)

    def check_key(self, headers: Headers) -> bytes | None:
        """The key's digest; None where no keys are asked for."""
        if not self.keys:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = digest(key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", ""))
        if not sum([hmac.compare_digest(given, key) for key in self.keys]):       # all of them, whichever fits
            raise ApiError(401, "this server wants an API key: send the header Authorization: Bearer KEY",
                           code="invalid_api_key")
        return given

    def check_rate(self, who: bytes | str) -> None:
        if self.per_minute is None:
            return
        now, most = time.monotonic(), float(self.per_minute)
        left, then = self.buckets.get(who, (most, now))
        left = min(most, left + (now - then) * most / 60)
        if left < 1:
            raise ApiError(429, f"more than {self.per_minute} requests a minute; wait and try again",
                           code="rate_limit_exceeded", retry_after_s=(1 - left) * 60 / most + 0.5)
        self.buckets.pop(who, None)
        self.buckets[who] = left - 1, now         # the latest stand last
        if len(self.buckets) > BUCKETS:           # those that are full again need not be remembered, nor very many
            spent = [(who, (left, then)) for who, (left, then) in self.buckets.items()
                     if left + (now - then) * most / 60 < most]
            self.buckets = dict(spent[-BUCKETS // 2:])

    async def check_length(self, headers: Headers, receive: Receive) -> None:
        """Refuse what announces to be too large, once the client has had a chance to send it and listen."""
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self.body_bytes:
            if "expect" not in headers:
                await self.swallow(receive)
            raise self.too_large()

    def limited(self, receive: Receive) -> Receive:
        """`receive`, but for bodies that are too large or do not come to an end."""
        seen, whole, began = 0, False, time.monotonic()

        async def inner() -> Message:
            nonlocal seen, whole
            if whole:
                return await receive()            # waits for the client to leave
            try:
                message = await asyncio.wait_for(receive(), min(BODY_S, began + WHOLE_S - time.monotonic()))
            except TimeoutError:
                raise ApiError(408, f"the body did not arrive: nothing came for {BODY_S:.0f} s, or not all of it in "
                                    f"{WHOLE_S:.0f} s") from None
            seen, whole = seen + len(message.get("body", b"")), not message.get("more_body", False)
            if seen > self.body_bytes:
                if not whole:
                    await self.swallow(receive)
                raise self.too_large()
            return message

        return inner

    async def swallow(self, receive: Receive) -> None:
        """Read and drop a body, as far as is reasonable: who is cut off while sending does not get to hear why."""
        dropped, more = 0, True
        while more and dropped < 16 * self.body_bytes:
            try:
                message = await asyncio.wait_for(receive(), 1.0)
            except TimeoutError:
                return
            dropped, more = dropped + len(message.get("body", b"")), message.get("more_body", False)

    def too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than the {self.body_bytes} bytes that this server takes",
                        code="request_too_large")


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
