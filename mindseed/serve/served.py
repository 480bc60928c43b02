"""A model under a name: what the routes need to know of it, and what is made once and shared by all its requests."""
from __future__ import annotations

import functools
import json
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from mindseed.base.errors import UserError
from mindseed.infer.constrain import Grammar
from mindseed.infer.sample import Sampling
from mindseed.infer.service import Service
from mindseed.interop.directory import Loaded
from mindseed.serve.errors import ApiError
from mindseed.tokenizers.base import document_marks

GRAMMARS = 64                                     # compiled ones that are kept
REFUSED_S = 60.0                                  # how long one that could not be compiled is not tried again
COMPILE_S = 10.0                                  # for a grammar; there are short ones that would take years
compiling = threading.BoundedSemaphore(2)         # of which no more than so many may keep a core busy


def within(seconds: float, make: Callable[[], Grammar]) -> Grammar:
    """What `make` returns, if it does so in time; UserError if not. Its thread can't be stopped, but is not waited for
    when the program ends."""
    if not compiling.acquire(timeout=seconds):
        raise ApiError(429, "other requests' grammars are being compiled and take long; try again later",
                       code="grammars_busy", retry_after_s=seconds)
    future: Future[Grammar] = Future()

    def work() -> None:
        try:
            future.set_result(make())
        except BaseException as error:
            future.set_exception(error)
        finally:
            compiling.release()

    threading.Thread(target=work, daemon=True, name="grammar").start()
    try:
        return future.result(timeout=seconds)
    except TimeoutError:
        raise UserError(f"this grammar takes more than {seconds:.0f} s to compile; make it simpler") from None


@dataclass(kw_only=True)
class Served:
    name: str
    loaded: Loaded
    service: Service
    sampling: Sampling = Sampling()               # what a request does not say
    thinking: bool | None = None                  # the same of thinking first
    parent: str | None = None                     # the model whose adapter of this name it is, in the same engine
    created: int = field(default_factory=lambda: int(time.time()))
    grammars: OrderedDict[str, tuple[Grammar | UserError, float]] = field(default_factory=OrderedDict)      # until when
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    @property
    def context(self) -> int:
        """The model's, or what of it the engine's cache can hold."""
        return self.service.engine.limit

    @property
    def width(self) -> int:
        return self.loaded.model.config.dim

    @functools.cached_property
    def stop_ids(self) -> frozenset[int]:
        return frozenset(self.service.engine.stop_ids)

    def with_adapter(self, name: str) -> Served:
        """One of its adapters as a model beside it."""
        return replace(self, name=name, parent=self.name)

    @property
    def adapter(self) -> str | None:
        return None if self.parent is None else self.name

    @property
    def card(self) -> dict[str, Any]:
        """How /v1/models tells of it."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "mindseed",
                "max_model_len": self.context} | ({"parent": self.parent} if self.parent else {})

    def begin(self) -> list[int]:
        """The id that a document begins with, if the tokenizer has one."""
        marks = document_marks(self.tokenizer.specials)
        return [self.tokenizer.specials[marks[0]]] if marks else []

    def grammar(self, make: Callable[..., Grammar], *values: Any, **more: Any) -> Grammar:
        """`make(tokenizer, *values, **more)`, compiled at the first request that asks for it."""
        key = json.dumps([make.__name__, values, more])
        with self.lock:
            known, until = self.grammars.get(key, (None, 0.0))
            if known is not None and time.monotonic() < until:
                self.grammars.move_to_end(key)
            else:
                known = None
        if known is None:
            try:
                known, until = within(COMPILE_S, functools.partial(make, self.tokenizer, *values, **more)), math.inf
            except UserError as error:            # not tried again for a while: it may have cost as long to find out
                known, until = error, time.monotonic() + REFUSED_S
            with self.lock:
                self.grammars[key] = known, until
                while len(self.grammars) > GRAMMARS:
                    self.grammars.popitem(last=False)
        if isinstance(known, UserError):
            raise UserError(str(known))
        return known

    def spell(self, id: int) -> str:
        """The text of one token; a piece of a character as its bytes, bytes:\\xe4\\xbd, so that names stay apart."""
        data = self.bytes_of(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in data)

    def bytes_of(self, id: int) -> bytes:
        try:
            return self.tokenizer.token_bytes(id)
        except UserError:                         # a row of the head that is no token, among the likeliest
            return f"<{id}>".encode()
