"""Asking a chat model over HTTP: any server of OpenAI's API, ours among them.

What may go wrong on the way is told apart, because the remedies differ. A server that is busy, restarts or is slow is
asked again, each time after twice the wait (or after as long as it asks for); one that never answers, or wants another
key, ends the work; a request that it won't have is `Refused`, and the next one may be fine. The key comes from the
environment, goes into one header, and into no file, error or log.
"""
from __future__ import annotations

import contextlib
import os
import random
import threading
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from mindseed.base.errors import UserError
from mindseed.base.extras import install

LATER = {408, 409, 425, 429, 500, 502, 503, 504}  # it may go better the next time
HERE = ("127.0.0.1", "localhost", "::1")          # no proxy stands before these
LONGEST_WAIT_S = 60.0


class Refused(UserError):
    """The server will not have this request."""


@dataclass(kw_only=True)
class ChatClient:
    """`endpoint` ends in /v1 as a rule; the key is in the environment variable `key_env`, if it is set. May be used by
    several threads; `close` ends all waiting."""

    endpoint: str
    key_env: str = ""
    timeout_s: float = 300.0
    retries: int = 5
    wait_s: float = 1.0                           # before the second attempt

    def __post_init__(self) -> None:
        self.endpoint = self.endpoint.rstrip("/")
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"endpoint={self.endpoint!r} is no address of a server, such as http://127.0.0.1:8998/v1")
        if parts.username or parts.password or parts.query:
            raise UserError("the endpoint's address must not hold a name, a password or a key; put the key into an "
                            "environment variable")
        try:
            import httpx
        except ImportError:
            raise UserError(f"asking a server needs httpx: {install('httpx')}") from None
        self.httpx, self.stopped = httpx, threading.Event()
        self.key = os.environ.get(self.key_env, "").strip() if self.key_env else ""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            self.http = httpx.Client(headers=headers, timeout=self.timeout_s, trust_env=parts.hostname not in HERE,
                                     limits=httpx.Limits(max_connections=None))
        except (UnicodeError, ValueError):
            raise UserError(f"the key in {self.key_env} holds characters that no key has; set it anew") from None

    def models(self) -> list[str]:
        """What the server says it serves; [] if it does not tell. Fails at once where no server is."""
        try:
            body = self.request("GET", "/models", None, retries=0)
        except Refused:
            return []
        data = body.get("data")
        return [one["id"] for one in data if isinstance(one, dict) and isinstance(one.get("id"), str)] \
            if isinstance(data, list) else []

    def chat(self, **body: Any) -> dict[str, Any]:
        """The first choice of a chat completion: {"message": {...}, "finish_reason": ..., "usage": {...}}."""
        answer = self.request("POST", "/chat/completions", body, retries=self.retries)
        choices = answer.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
            raise UserError(f"{self.endpoint} answers in another form than OpenAI's API: it is no chat server")
        usage = answer.get("usage")
        return {**choice, "usage": usage if isinstance(usage, dict) else {}}

    def request(self, method: str, path: str, body: dict | None, *, retries: int) -> dict[str, Any]:
        why, asked = "", 0.0
        for attempt in range(retries + 1):
            wait = self.wait_s * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
            if attempt and self.stopped.wait(min(LONGEST_WAIT_S, max(wait, asked))):
                break
            asked = 0.0
            try:
                response = self.http.request(method, self.endpoint + path, json=body)
            except self.httpx.TimeoutException:
                why = f"has not answered within {self.timeout_s:g} s"
                continue
            except self.httpx.TransportError as error:
                why = f"cannot be reached ({self.hidden(str(error)) or type(error).__name__})"
                continue
            if response.status_code in LATER:
                why = f"answers {response.status_code}{self.said(response)}"
                asked = asked_wait(response.headers.get("Retry-After", ""))
                continue
            return self.read(response, path)
        times = f" ({retries + 1} attempts)" if retries else ""
        raise UserError(f"{self.endpoint} {why or 'was not asked again'}{times}; check the address, and that the "
                        "server runs")

    def read(self, response: Any, path: str) -> dict[str, Any]:
        """The JSON object of an answer."""
        code = response.status_code
        if code in (401, 403):
            wanted = "another key than that in" if self.key else "a key, in the environment variable"
            raise UserError(f"{self.endpoint} wants {wanted} {self.key_env}: {code}{self.said(response)}")
        if code == 404 and path != "/models":
            raise UserError(f"{self.endpoint} has no such address, or no such model: {code}{self.said(response)}")
        if not response.is_success:
            raise Refused(f"{self.endpoint} answers {code}{self.said(response)}")
        with contextlib.suppress(ValueError):
            if isinstance(body := response.json(), dict):
                return body
        raise UserError(f"{self.endpoint} answers something else than JSON: it is no server of OpenAI's API")

    def said(self, response: Any) -> str:
        """What the server says is wrong, in one short line."""
        try:
            error = response.json().get("error")
            text = error.get("message") if isinstance(error, dict) else error
        except (ValueError, AttributeError):
            text = ""
        line = " ".join(self.hidden(str(text or "")).split())
        return f", {line[:200]}" if line else ""

    def hidden(self, text: str) -> str:
        """Some servers repeat the key in their errors."""
        return text.replace(self.key, "***") if self.key else text

    def close(self) -> None:
        self.stopped.set()
        self.http.close()


def asked_wait(header: str) -> float:
    """Seconds of a Retry-After; 0 if it tells none."""
    with contextlib.suppress(ValueError):
        return max(0.0, float(header))
    return 0.0
