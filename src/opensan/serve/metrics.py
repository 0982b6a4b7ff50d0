"""Metrics for Prometheus at /metrics."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The service's metrics. Gauges are read on request: see `Gauge.set_function`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "opensan"}
        self.requests = Counter("requests", "Requests answered.", ["method", "route", "code"], **own)
        self.seconds = Histogram(
            "request_seconds",
            "From the headers of a request to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            **own,
        )
        self.batch = Histogram(
            "batch_images", "Images encoded together.", buckets=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32), **own
        )
        self.encode = Histogram("encode_seconds", "Of one batch, in the network.", buckets=_SECONDS, **own)
        self.waiting = Gauge("waiting_images", "Images accepted and not yet encoded.", **own)
        self.questions = Gauge("waiting_questions", "Word questions accepted and not yet answered.", **own)
        self.cache_entries = Gauge("cache_entries", "Encodings kept.", **own)
        self.cache_bytes = Gauge("cache_bytes", "Of the encodings kept.", **own)
        ProcessCollector(registry=self.registry)

    def page(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class _Merged(Collector):
    """The metrics of several pages, each sample with a label of its page."""

    def __init__(self, pages: Mapping[str, bytes]) -> None:
        self._pages = pages

    def collect(self) -> Iterator[Metric]:
        """Yield each metric once, with the samples of all pages."""
        merged: dict[str, Metric] = {}
        for name, page in self._pages.items():
            for own in text_string_to_metric_families(page.decode()):
                metric = merged.setdefault(own.name, Metric(own.name, own.documentation, own.type))
                for sample in own.samples:
                    metric.add_sample(sample.name, {**sample.labels, "replica": name}, sample.value)
        yield from merged.values()


def merged_pages(pages: Mapping[str, bytes]) -> bytes:
    """Return one page of metrics from those of several processes, by name; the label `replica` tells them apart."""
    return generate_latest(_Merged(pages))


class Observer:
    """Counts and times every request; the outermost layer."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        code = "none"  # the client left before the answer began

        async def noting_send(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, noting_send)
        finally:
            # Only the templates of known routes, so that clients can't add series.
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "HEAD") else "other"
            self._metrics.requests.labels(method, route, code).inc()
            self._metrics.seconds.labels(route).observe(time.monotonic() - started)
