"""How long jax has been compiling, so that it is not counted as computing."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax.monitoring

__all__ = ["CompileClock"]

PREFIX = "/jax/core/compile/"
"""Prefix of the events of tracing, lowering, compiling or loading a compiled program."""


class CompileClock:
    """Adds up the seconds of compilation from its start to its stop.

    Args:
        clock: seconds; jax reports a duration when it is over.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        # Disjoint and in order: a span within a longer one is merged with it.
        self._spans: list[tuple[float, float]] = []

    def start(self) -> None:
        """Listen from now on."""
        jax.monitoring.register_event_duration_secs_listener(self.took)

    def stop(self) -> None:
        """Stop listening."""
        jax.monitoring.unregister_event_duration_listener(self.took)

    @property
    def seconds(self) -> float:
        """Seconds of compiling so far; simultaneous work counts once."""
        return sum(stop - start for start, stop in self._spans)

    def took(self, event: str, duration_secs: float, **_details: str | int) -> None:
        """Record an event that has just ended; called by jax, perhaps from several threads."""
        if not event.startswith(PREFIX):
            return
        stop = self._clock()
        start = stop - duration_secs
        while self._spans and self._spans[-1][1] >= start:
            start = min(start, self._spans.pop()[0])
        self._spans.append((start, stop))
