"""What the server counts and times, as Prometheus reads it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import (  # pyright: ignore[reportMissingImports]
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
)
from prometheus_client.core import (  # pyright: ignore[reportMissingImports]
    CounterMetricFamily,
    GaugeMetricFamily,
)

from nla.serve.engine import Engine

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Measured:
    """An application whose requests are counted by route and status, and timed to their last byte."""

    def __init__(self, app: Any, engine: Engine) -> None:
        self.app, self.engine, self.registry = app, engine, CollectorRegistry()
        names = ["route", "status"]
        self.requests = Counter("nla_requests", "Requests, by route and status.", names, registry=self.registry)
        self.seconds = Histogram(
            "nla_request_seconds", "Until the last byte.", ["route"], buckets=SECONDS, registry=self.registry
        )
        self.registry.register(self)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See the specification of ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        finally:
            # Routes are few: what matches none does not add a name.
            route = getattr(scope.get("route"), "path", "none")
            self.requests.labels(route, status or "none").inc()
            self.seconds.labels(route).observe(time.monotonic() - began)

    def collect(self) -> Iterator[Any]:
        """What the engine counts."""
        engine = self.engine
        yield GaugeMetricFamily("nla_requests_waiting", "Requests that are worked on or wait.", engine.n_admitted)
        turns = CounterMetricFamily("nla_turns", "Turns of the worker, by what was done.", labels=["kind"])
        works = CounterMetricFamily("nla_works", "Works done in these turns.", labels=["kind"])
        for family, counts in ((turns, engine.turns), (works, engine.works)):
            for kind, n in sorted(counts.items()):
                family.add_metric([kind], n)
            yield family
        uses = CounterMetricFamily("nla_cache", "What was looked up in a cache.", labels=["cache", "outcome"])
        size = GaugeMetricFamily("nla_cache_bytes", "What a cache holds.", labels=["cache"])
        for name in ("prepared", "activations", "explanations"):
            cache = getattr(engine, name)
            uses.add_metric([name, "hit"], cache.hits)
            uses.add_metric([name, "miss"], cache.misses)
            size.add_metric([name], cache.n_bytes)
        yield uses
        yield size

    def text(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self.registry)
