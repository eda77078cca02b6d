"""How to treat mirrors, and what is known of each. No I/O here except the clock."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterable
from pathlib import PurePosixPath

from grokfetch.fetch.mirror.environment import Environment

__all__ = ["LONG_REST_S", "Mirror", "MirrorSettings", "Pace"]

LONGEST_PAUSE_S = 60.0
"""The longest rest of a mirror that does not say how long it should be, in seconds."""

LONG_REST_S = 10.0
"""A rest that a server asks for is reported if it is longer than this, in seconds."""


@dataclasses.dataclass(frozen=True, slots=True)
class MirrorSettings:
    """How to treat mirrors.

    Each mirror gets `connections`. A request fails after `patience_s` of silence. After a failure a
    mirror rests for `rest_s`, twice as long after each further one; after `attempts` failures
    without a piece in between it is dropped. If a mirror limits us and says for how long, we wait
    instead; a mirror of whole files is given up if that would make `limited_s` with nothing else.
    `proxy` is scheme, host, port, user and password of a proxy; `down` is the most bytes a second
    from all mirrors together, None for no limit. `environment` applies to HTTP without that proxy.
    """

    connections: int = 6
    patience_s: float = 30.0
    rest_s: float = 1.0
    attempts: int = 6
    limited_s: float = 1800.0
    proxy: tuple[str, str, int, str, str] | None = dataclasses.field(default=None, repr=False)
    down: int | None = None
    environment: Environment = dataclasses.field(default_factory=Environment)


class Pace:
    """Limits all who share it to `down` bytes a second; None for no limit."""

    def __init__(self, down: int | None) -> None:
        self._down = down
        self._free_at = 0.0

    async def wait(self, count: int) -> None:
        """Wait until so many more bytes are allowed."""
        if self._down is not None:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + count / self._down
            await asyncio.sleep(self._free_at - now)


@dataclasses.dataclass(slots=True)
class Mirror:
    """What is known of a mirror; lives as long as the fetch.

    `address` is where it is asked, `name` is what users see. `lacks` are files that it does not
    have, `form` is the form of address that answered last, `received` the payload bytes that came
    from it, `faults` what was wrong with it, the latest last. `active` requests are under way, and
    at most `allowed` may be. Since `limited_since` it has done nothing but limit us.
    """

    address: str
    name: str
    allowed: float
    active: int = 0
    received: int = 0
    dropped: bool = False
    lacks: set[PurePosixPath] = dataclasses.field(default_factory=set)
    faults: dict[str, None] = dataclasses.field(default_factory=dict)
    form: int = 0
    delivered: bool = False
    strikes: int = 0
    limits: int = 0
    limited_since: float | None = None
    struck_at: float = 0.0
    rests_until: float = 0.0

    def serves(self, files: Iterable[PurePosixPath]) -> bool:
        """Whether it may have all these files."""
        return not self.dropped and self.lacks.isdisjoint(files)

    def note(self, fault: str) -> bool:
        """Keep what is wrong; return whether it is new."""
        news = fault not in self.faults
        self.faults.pop(fault, None)
        self.faults[fault] = None
        return news

    def deliver(self) -> None:
        """Count a piece that was right."""
        self.delivered, self.strikes, self.limits = True, 0, 0
        self.limited_since = None

    def grow(self, connections: int) -> None:
        """Allow more requests again after a good one: one more after every two."""
        self.allowed = min(connections, self.allowed + 0.5)

    def strike(self, began: float, settings: MirrorSettings, *, fewer: bool = False) -> bool:
        """Count a failure of a request begun at `began`; simultaneous failures count once.

        Args:
            began: when, in monotonic seconds.
            settings: how long to rest.
            fewer: whether it wants fewer requests.

        Returns:
            Whether that was one failure too many.
        """
        if began >= self.struck_at:
            self.strikes += 1
            self._fail(self.strikes, settings, fewer=fewer)
        return self.strikes >= settings.attempts

    def limit(self, began: float, rest_s: float, settings: MirrorSettings) -> bool:
        """Note that it wants fewer requests, and none for `rest_s` seconds; this is no failure.

        Returns:
            Whether that would make more than `limited_s` without anything delivered.
        """
        if self.limited_since is None:
            self.limited_since = time.monotonic()
        if began >= self.struck_at:
            self.limits += 1
            self._fail(self.limits, settings, fewer=True)
        self.rests_until = max(self.rests_until, time.monotonic() + rest_s)
        return self.rests_until - self.limited_since >= settings.limited_s

    def _fail(self, times: int, settings: MirrorSettings, *, fewer: bool) -> None:
        self.struck_at = time.monotonic()
        pause = min(LONGEST_PAUSE_S, settings.rest_s * 2 ** min(times - 1, 16))
        self.rests_until = max(self.rests_until, self.struck_at + pause)
        if fewer:
            self.allowed = max(1.0, min(self.allowed, self.active) / 2)
