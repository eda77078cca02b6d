"""The metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from grokfetch.serving.model import PrefixCache
from grokfetch.serving.worker import Worker

__all__ = ["Metrics"]

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
"""Bounds of the histograms: a small model answers in milliseconds, the large one in minutes."""


class Metrics:
    """Counters and histograms of one server, and the state of its worker when it is asked for."""

    def __init__(self, worker: Worker, slots: int) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "grokfetch_requests", "HTTP requests", ("path", "status"), registry=registry
        )
        self.prompt_tokens = Counter(
            "grokfetch_prompt_tokens", "Tokens of prompts that were taken in", registry=registry
        )
        self.generated_tokens = Counter(
            "grokfetch_generated_tokens", "Tokens that were generated", registry=registry
        )
        self.disconnects = Counter(
            "grokfetch_disconnects", "Clients that left before the end", registry=registry
        )
        self.first_token = Histogram(
            "grokfetch_first_token_seconds",
            "From a request to its first token",
            buckets=SECONDS,
            registry=registry,
        )
        self.duration = Histogram(
            "grokfetch_completion_seconds",
            "From a request to its last token",
            buckets=SECONDS,
            registry=registry,
        )
        self._gauge("slots", "Texts that can be generated at the same time").set(slots)
        self._gauge("slots_in_use", "Texts being generated").set_function(lambda: worker.working)
        self._gauge("queue_length", "Texts waiting for a slot").set_function(lambda: worker.waiting)
        cache = worker.prefix_cache
        registry.register(_Prefixes(cache))
        self._gauge("prefix_cache_bytes", "Memory of the beginnings of prompts").set_function(
            lambda: cache.nbytes
        )
        self._gauge("failures", "Steps that failed").set_function(lambda: worker.failures)

    def _gauge(self, name: str, meaning: str) -> Gauge:
        return Gauge(f"grokfetch_{name}", meaning, registry=self._registry)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _Prefixes(Collector):
    """The counters that a prefix cache keeps itself."""

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The counters as they are now."""
        for name, meaning, value in (
            ("hits", "Prompts whose beginning was known", self._cache.hits),
            ("tokens", "Tokens of prompts that were known, and not read", self._cache.tokens),
        ):
            yield CounterMetricFamily(f"grokfetch_prefix_cache_{name}", meaning, value)
