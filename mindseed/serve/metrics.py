"""What the server counts, for Prometheus to collect from /metrics: requests, tokens, delays, and how full engines are.

Delays are measured where they are felt: from a request's arrival to the first token that leaves the engine for it, and
from each token to the next. What the engine knows of itself is read at the moment of the collection.
"""
from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mindseed.infer.engine import Token
from mindseed.serve.errors import GONE
from mindseed.serve.served import Served

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
NEXT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
GAUGES = {"running": "answers being written", "waiting": "answers in the queue", "blocks": "blocks of the cache",
          "blocks_free": "blocks of the cache that a new answer may take"}
COUNTERS = {"preemptions": "answers that had to give back their blocks", "drafted": "tokens guessed by speculation",
            "accepted": "guesses that held", "steps": "forward passes"}


class Metrics:
    """The counters of one server."""

    def __init__(self, models: Iterable[Served]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(Engines(list(models)))

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"mindseed_{name}", help, labels, registry=self.registry)

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"mindseed_{name}", help, ("model",), buckets=buckets, registry=self.registry)

        self.requests = counter("requests", "answered requests; status 499: the client left first", "endpoint",
                                "status")
        self.prompt = counter("prompt_tokens", "tokens of prompts", "model")
        self.cached = counter("cached_prompt_tokens", "tokens of prompts that were found in the cache", "model")
        self.generated = counter("generated_tokens", "tokens of answers", "model")
        self.first = histogram("time_to_first_token_seconds", "from arrival to the first token", FIRST)
        self.next = histogram("time_per_token_seconds", "from one token to the next", NEXT)
        self.whole = histogram("request_seconds", "from arrival to the last token", WHOLE)

    def clock(self, served: Served, prompt_tokens: int) -> Clock:
        return Clock(self, served.name, prompt_tokens)


class Clock:
    """Times one request: call it with every token of its answers, and `stop` at the end."""

    def __init__(self, metrics: Metrics, name: str, prompt_tokens: int) -> None:
        self.started = time.perf_counter()
        self.last: dict[tuple[int, int], float] = {}
        self.first, self.next = metrics.first.labels(name), metrics.next.labels(name)
        self.generated, self.cached = metrics.generated.labels(name), metrics.cached.labels(name)
        self.whole = metrics.whole.labels(name)
        metrics.prompt.labels(name).inc(prompt_tokens)

    def __call__(self, prompt: int, token: Token) -> None:
        now = time.perf_counter()
        before = self.last.get((prompt, token.row))
        if before is not None:
            self.next.observe(now - before)
        else:
            self.first.observe(now - self.started)
            if all(place != prompt for place, _ in self.last):
                self.cached.inc(token.cached)     # once for all answers to a prompt
        self.last[prompt, token.row] = now
        self.generated.inc()

    def stop(self) -> None:
        self.whole.observe(time.perf_counter() - self.started)


class Engines:
    """What the engines tell of themselves, read when it is asked for."""

    def __init__(self, models: list[Served]) -> None:
        self.models = models

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats = {served.name: served.service.stats() for served in self.models if served.parent is None}
        for kind, names in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for name, help in names.items():
                family = kind(f"mindseed_engine_{name}", help, labels=["model"])
                for model, values in stats.items():
                    family.add_metric([model], getattr(values, name))
                yield family
        rate = GaugeMetricFamily("mindseed_engine_acceptance", "share of the guesses that held", labels=["model"])
        for model, values in stats.items():
            rate.add_metric([model], values.accepted / values.drafted if values.drafted else 0.0)
        yield rate


class Counted:
    """Counts every request by its route and status, those that never reach a route as well."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = GONE

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            route = scope.get("route")
            self.metrics.requests.labels(getattr(route, "path", "other"), str(status)).inc()
