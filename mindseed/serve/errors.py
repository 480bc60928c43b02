"""One shape for all that goes wrong: {"error": {"message", "type", "param", "code"}}, as OpenAI's clients expect it.

Whatever a client can cause is a status from 400 to 429 and says which field and what to do; 500 and 503 are faults of
ours.
"""
from __future__ import annotations

import json
import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from mindseed.base.errors import UserError
from mindseed.infer.engine import QueueFull
from mindseed.infer.rows import TooLong
from mindseed.infer.service import EngineDead, PassFailed

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
GONE = 499                                        # the client left before the answer; never sent, only counted


class ApiError(HTTPException):
    """A refusal that the client can read. An HTTPException, so that it passes through FastAPI's reading of bodies."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None,
                 retry_after_s: float | None = None) -> None:
        wait = None if retry_after_s is None else {"Retry-After": str(max(1, round(retry_after_s)))}
        super().__init__(status, message, headers=wait)
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, headers=self.headers)


def api_error(error: Exception) -> ApiError:
    """Any exception in the one shape. A UserError that begins `name=value` is about the field of that name."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", retry_after_s=1)
    if isinstance(error, TooLong):
        return ApiError(400, str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, UserError):
        named = re.match(r"(\w+)=", str(error))
        return ApiError(400, str(error), param=named and named[1])
    if isinstance(error, TimeoutError):
        return ApiError(408, "the answer took longer than this server allows (its option --timeout_s); ask for fewer "
                             "tokens", code="timeout")
    if isinstance(error, PassFailed):
        return ApiError(500, "an error inside the model's engine ended this request and all that ran beside it; the "
                             "server's log says more", code="engine_error")
    if isinstance(error, EngineDead):
        return ApiError(503, "the model's engine has stopped; the server must be started again", code="engine_stopped")
    return ApiError(500, f"an error inside the server: {type(error).__name__}; its log says more")


def install(app: FastAPI) -> None:
    """Give every failure of an app its one shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return refusal(error).response()

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error, ApiError):
            return error.response()
        words = {404: f"there is nothing at {request.method} {request.url.path}; see /docs for what there is",
                 405: f"{request.url.path} does not take {request.method}; see /docs"}
        response = ApiError(error.status_code, words.get(error.status_code, str(error.detail))).response()
        response.headers.update(error.headers or {})              # Allow, of a 405
        return response

    async def failed(_: Request, error: Exception) -> JSONResponse:
        return api_error(error).response()

    app.add_exception_handler(UserError, failed)
    app.add_exception_handler(TimeoutError, failed)
    app.add_exception_handler(Exception, failed)                  # its traceback still reaches the log


def refusal(error: RequestValidationError) -> ApiError:
    """What is wrong with a body, in one line: the first field that does not fit and what it may be instead.

    A union fails once for each of its members, under locations that name the member; what they agree on is the path
    that leads into the body, and the deepest such path is where the client went wrong.
    """
    problems: dict[str, list[str]] = {}
    for problem in error.errors():
        path = in_body(error.body, problem["loc"][1:], absent=problem["type"] in ("missing", "extra_forbidden"))
        said = re.sub(r"a valid dictionary( or instance of \w+)?", "an object", problem["msg"])
        problems.setdefault(path, []).append(said)
    path = max(problems, key=lambda path: (len(re.findall(r"[.\[]", path)), -list(problems).index(path)))
    first, *others = dict.fromkeys(problems[path])
    message = " or ".join([first, *(other.removeprefix("Input should be ") for other in others)])
    if path == "" and isinstance(error.body, (bytes, type(None))):
        return ApiError(400, "the body must be a JSON object, sent with the header Content-Type: application/json")
    return ApiError(400, f"{path}: {message}" if path else message, param=path or None)


def in_body(body: Any, location: tuple[str | int, ...], *, absent: bool) -> str:
    """The part of a location that exists in the body, as messages[0].content; `absent`: its last word is missing."""
    path = ""
    for i, word in enumerate(location):
        here = isinstance(body, dict) and word in body or isinstance(body, list) and isinstance(word, int) and \
            word < len(body)
        if not here and not (absent and i == len(location) - 1 and isinstance(body, dict)):
            continue
        path += f"[{word}]" if isinstance(word, int) else f".{word}" if path else word
        if here:
            body = body[word]
    return path


# ----------------------------------------------------------------------------------------------------- reading JSON

DIGITS = 400                                      # of a number; a float64 has no more


def whole_number(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ApiError(400, f"the body holds a number of {len(digits)} digits")
    return int(digits)


def strict_json(data: bytes, *, depth: int = 100) -> Any:
    """The value of a JSON text. ApiError for what is not JSON, or is but would do harm further on: bytes that are not
    UTF-8, lone surrogates, NaN and infinities, and nests deeper than `depth`."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=not_a_number, parse_int=whole_number)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not valid UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise ApiError(400, "the body's lists or objects are nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    rest = [(value, 1)]
    while rest:
        item, level = rest.pop()
        if level > depth:
            raise ApiError(400, f"the body's lists or objects are nested more than {depth} deep")
        if isinstance(item, dict):
            rest += [(part, level + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list):
            rest += [(part, level + 1) for part in item]
        elif isinstance(item, str) and not item.isascii() and re.search("[\ud800-\udfff]", item):
            raise ApiError(400, "the body holds a lone surrogate, half of a pair like \\uD83D\\uDE00")
        elif isinstance(item, float) and item - item != 0:        # 1e999 reads as infinity
            raise ApiError(400, "the body holds a number too large for a double")
    return value


def not_a_number(word: str) -> None:
    raise ValueError(f"{word} is not a number of JSON")
