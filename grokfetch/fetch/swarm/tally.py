"""Which peer has sent how many payload bytes, over connections that come and go. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from grokfetch.events import Origin

__all__ = ["Tally"]

Endpoint = tuple[str, int]


class Tally:
    """Adds up what each peer has sent, by its address without the port, which changes.

    A connection counts its own bytes from zero, and disappears when it ends.
    """

    def __init__(self) -> None:
        self._open: dict[Endpoint, int] = {}
        self._ended: Counter[str] = Counter()
        self._before = 0

    def begin(self) -> None:
        """A session begins: all connections are new."""
        for endpoint in list(self._open):
            self._end(endpoint)
        self._before = self._ended.total()

    def look(self, connections: Iterable[tuple[Endpoint, int]]) -> None:
        """Record the current connections, each with the bytes received on it so far."""
        for endpoint, received in connections:
            if received < self._open.get(endpoint, 0):
                self._end(endpoint)
            if received:
                self._open[endpoint] = received

    def _end(self, endpoint: Endpoint) -> None:
        self._ended[endpoint[0]] += self._open.pop(endpoint)

    def sent(self, received: int) -> dict[Origin, int]:
        """The bytes of each peer, in all sessions.

        Args:
            received: bytes of this session; bytes of unknown senders, from connections that ended
                between two looks, are listed without a name.
        """
        by_host_so_far = self._ended.copy()
        for endpoint, count in self._open.items():
            by_host_so_far[endpoint[0]] += count
        unknown = received - (by_host_so_far.total() - self._before)
        by_host = {Origin("peer", host): count for host, count in by_host_so_far.items()}
        return by_host | {Origin("peer", ""): unknown} if unknown > 0 else by_host
