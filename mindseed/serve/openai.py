"""The routes: OpenAI's API over one or several models, with /tokenize, /detokenize, /health and /metrics beside it.

A request passes the door (guard.py), its body becomes a checked object (schema.py) and that what the engine is asked
(ask.py), in a thread of its own, for long texts take long to cut into tokens. The engine's tokens become an answer
(answer.py) that goes out piece by piece or whole (stream.py).
"""
from __future__ import annotations

import asyncio
import base64
import contextlib
import struct
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from mindseed import __version__
from mindseed.infer.engine import Token
from mindseed.serve import ask, errors
from mindseed.serve.answer import ChatChoice, TextChoice, Usage
from mindseed.serve.ask import Ask
from mindseed.serve.errors import ApiError, strict_json
from mindseed.serve.guard import Guard
from mindseed.serve.metrics import Counted, Metrics
from mindseed.serve.pages import ABOUT, RESPONSES, TAGS, docs_page
from mindseed.serve.schema import (ChatRequest, CompletionRequest, DetokenizeRequest, EmbeddingRequest, Generating,
                                   TokenizeRequest)
from mindseed.serve.served import Served
from mindseed.serve.stream import DONE, Events, event, tokens, unless_gone


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    keys: tuple[str, ...] = ()                    # API keys; none: everybody may ask
    origins: tuple[str, ...] = ()                 # web pages that may ask (CORS); *: all
    body_bytes: int = 4 << 20
    per_minute: int | None = None                 # requests of one key or address; None: any number
    timeout_s: float | None = None                # for a whole answer; None: as long as it takes


LARGE = 1 << 16                                   # bytes of JSON over which others may go on streaming meanwhile


class StrictRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            data = await self.body()
            self._json = strict_json(data) if len(data) < LARGE else await asyncio.to_thread(strict_json, data)
        return self._json


class StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strict


router = APIRouter(route_class=StrictRoute)


def create_app(models: list[Served], config: ServeConfig = ServeConfig()) -> FastAPI:
    """The application. It does not own the models: whoever made their services closes them."""
    app = FastAPI(title="mindseed", version=__version__, description=ABOUT, openapi_tags=TAGS, docs_url=None,
                  redoc_url=None, redirect_slashes=False)
    app.state.models = {served.name: served for served in models}
    app.state.config, app.state.metrics = config, Metrics(models)
    bearer = HTTPBearer(auto_error=False, description="a key, if the server was given any")      # told, for /docs only
    app.include_router(router, dependencies=[Depends(bearer)])
    errors.install(app)
    app.add_middleware(Guard, keys=config.keys, per_minute=config.per_minute, body_bytes=config.body_bytes)
    if config.origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(config.origins), allow_methods=["*"],
                           allow_headers=["*"], expose_headers=["Retry-After"])
    app.add_middleware(Counted, metrics=app.state.metrics)
    return app


def pick(request: Request, name: str | None) -> Served:
    models = request.app.state.models
    if name is None and len(models) == 1:
        return next(iter(models.values()))
    if name not in models:
        what = "which model?" if name is None else f"there is no model {name[:100]!r} here;"
        raise ApiError(404 if name else 400, f"{what} {', '.join(models)} {'are' if len(models) > 1 else 'is'} served",
                       param="model", code="model_not_found")
    return models[name]


# ------------------------------------------------------------------------------------------------------- generating

@router.post("/v1/chat/completions", tags=["answers"], summary="Answer a conversation",
             responses=RESPONSES["chat"])
async def chat(request: Request, body: ChatRequest) -> Response:
    """Sends the whole answer, or with `stream` its pieces as server-sent events that end with `data: [DONE]`."""
    served = pick(request, body.model)
    asked = await asyncio.to_thread(ask.chat_ask, served, body)
    return await answer(request, served, [asked], body, ChatChoice, "chatcmpl", "chat.completion")


@router.post("/v1/completions", tags=["answers"], summary="Continue texts", responses=RESPONSES["text"])
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Goes on with one or several texts. With `echo`, `logprobs` and `max_tokens: 0` it only measures them."""
    served = pick(request, body.model)
    asks = await asyncio.to_thread(ask.text_asks, served, body)
    return await answer(request, served, asks, body, TextChoice, "cmpl", "text_completion")


async def answer(request: Request, served: Served, asks: list[Ask], body: Generating,
                 shape: type[ChatChoice | TextChoice], prefix: str, kind: str) -> Response:
    """Have the engine write all answers to all prompts, and send them."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    timeout = request.app.state.config.timeout_s
    deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
    usage, n = Usage(asks), body.n or 1
    choices = [shape(served, asked, index * n + row, usage) for index, asked in enumerate(asks) for row in range(n)]
    come = tokens(served, asks, request.app.state.metrics.clock(served, usage.prompt))
    base = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": served.name,
            "system_fingerprint": None}
    if body.stream:
        with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        if kind == "chat.completion":
            base["object"] = "chat.completion.chunk"
        async with asyncio.timeout_at(deadline):          # a refusal by the engine is still a status of its own
            first = await unless_gone(request, anext(come))
        return Events(written(first, come, choices, n, base, usage if with_usage else None), come, deadline)

    async def whole() -> None:
        async with contextlib.aclosing(come):
            async for index, token in come:
                choices[index * n + token.row].push(token)

    async with asyncio.timeout_at(deadline):
        await unless_gone(request, whole())
    return JSONResponse(base | {"choices": [choice.whole() for choice in choices], "usage": usage.body()})


async def written(first: tuple[int, Token], rest: AsyncGenerator[tuple[int, Token], None],
                  choices: list[ChatChoice] | list[TextChoice], n: int, base: dict[str, Any],
                  usage: Usage | None) -> AsyncGenerator[bytes, None]:
    """The events of a stream; what one token adds goes out in one piece."""
    fields = base if usage is None else base | {"usage": None}
    begun: set[int] = set()

    def told(index: int, token: Token) -> bytes:
        choice = choices[index * n + token.row]
        chunks = choice.push(token)
        if choice.index not in begun:
            begun.add(choice.index)
            chunks = [*filter(None, [choice.first()]), *chunks]
        return b"".join(event(fields | {"choices": [chunk]}) for chunk in chunks)

    yield told(*first)
    async for index, token in rest:
        if data := told(index, token):
            yield data
    if usage is not None:
        yield event(fields | {"choices": [], "usage": usage.body()})
    yield DONE


# -------------------------------------------------------------------------------------------------------- embeddings

@router.post("/v1/embeddings", tags=["other uses"], summary="Vectors of texts", responses=RESPONSES["embeddings"])
async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
    """The mean of the last layer's states, of length 1, for each text."""
    served = pick(request, body.model)
    if body.dimensions not in (None, served.width):
        raise ApiError(400, f"dimensions={body.dimensions}: {served.name} gives vectors of {served.width} and no "
                            "others; leave it out", param="dimensions")
    pairs = await asyncio.to_thread(ask.prompts, served, body.input, begin=False, param="input",
                                    answer=False)
    vectors = await unless_gone(request, served.service.embed([ids for _, ids in pairs], served.adapter))
    count = sum(len(ids) for _, ids in pairs)
    request.app.state.metrics.prompt.labels(served.name).inc(count)

    def coded(vector: list[float]) -> Any:
        if body.encoding_format == "base64":
            return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        return list(vector)

    data = [{"object": "embedding", "index": i, "embedding": coded(vector)} for i, vector in enumerate(vectors)]
    return JSONResponse({"object": "list", "data": data, "model": served.name,
                         "usage": {"prompt_tokens": count, "total_tokens": count}})


# ------------------------------------------------------------------------------------------------------------ tokens

@router.post("/tokenize", tags=["other uses"], summary="Text or conversation to token ids",
             responses=RESPONSES["tokenize"])
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """The ids of a text, or of a conversation as the model would see it."""
    served = pick(request, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "send either prompt or messages", param="prompt")

    def ids_of() -> list[int]:
        if body.messages is None:
            return [*(served.begin() if body.add_special_tokens else []), *served.tokenizer.encode(body.prompt)]
        tools = [ask.told(tool) for tool in body.tools or ()] or None
        return ask.chat_prompt(served, body.messages, tools, ask.thinking_of(served, body), limited=False,
                               generation_prompt=body.add_generation_prompt is not False)

    ids = await asyncio.to_thread(ids_of)
    spelt = {"token_strs": [served.spell(id) for id in ids]} if body.return_token_strs else {}
    return JSONResponse({"count": len(ids), "max_model_len": served.context, "tokens": ids, **spelt})


@router.post("/detokenize", tags=["other uses"], summary="Token ids to text", responses=RESPONSES["detokenize"])
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """The text of ids, special tokens spelt out; bytes that make no character become U+FFFD."""
    served = pick(request, body.model)
    return JSONResponse({"prompt": await asyncio.to_thread(served.tokenizer.decode, body.tokens)})


# ---------------------------------------------------------------------------------------------------- about the server

@router.get("/", include_in_schema=False)
async def home() -> Response:
    return RedirectResponse("docs")


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    app, base = request.app, str(request.base_url).rstrip("/")
    shown = [] if app.state.config.keys else [*app.state.models]      # names are for those with a key
    return HTMLResponse(docs_page(app.openapi(), base, shown))


@router.get("/v1", include_in_schema=False)
async def about(request: Request) -> Response:
    """For people who open the address that clients are given."""
    return JSONResponse({"object": "api", "models": [*request.app.state.models], "docs": f"{request.base_url}docs"})


@router.get("/v1/models", tags=["the server"], summary="The models", responses=RESPONSES["models"])
async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [served.card for served in request.app.state.models.values()]})


@router.get("/v1/models/{name:path}", tags=["the server"], summary="One model", responses=RESPONSES["model"])
async def model(request: Request, name: str) -> Response:
    return JSONResponse(pick(request, name).card)


@router.get("/health", tags=["the server"], summary="Whether all models can answer", responses=RESPONSES["health"])
async def health(request: Request) -> Response:
    """200 and `ok`; 503 once an engine has died, which only a restart mends. Needs no key."""
    dead = [name for name, served in request.app.state.models.items() if served.service.error is not None]
    return JSONResponse({"status": f"dead: {', '.join(dead)}" if dead else "ok"}, 503 if dead else 200)


@router.get("/metrics", tags=["the server"], summary="Figures for Prometheus", responses=RESPONSES["metrics"],
            response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    return Response(generate_latest(request.app.state.metrics.registry), media_type=CONTENT_TYPE_LATEST)
