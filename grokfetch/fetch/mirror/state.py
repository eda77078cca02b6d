"""How mirrors are to be treated, and what is known of one. Pure: no I/O here but the clock."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from pathlib import PurePosixPath

__all__ = ["Mirror", "MirrorSettings"]


@dataclasses.dataclass(frozen=True, slots=True)
class MirrorSettings:
    """How to treat mirrors.

    `connections` go to each of them. After `patience_s` of silence a request has failed; after a
    failure a mirror rests for `rest_s`, twice as long after each further one, and after `attempts`
    failures without a piece between them it is dropped. `proxy` is host, port, user and password of
    a SOCKS5 proxy, `down` the most bytes a second from all mirrors together, None for no bound.
    """

    connections: int = 6
    patience_s: float = 30.0
    rest_s: float = 1.0
    attempts: int = 6
    proxy: tuple[str, int, str, str] | None = dataclasses.field(default=None, repr=False)
    down: int | None = None


@dataclasses.dataclass(slots=True)
class Mirror:
    """What is known of a mirror; lives as long as the fetch.

    `lacks` are files that it does not have, `form` the form of its addresses that answered last,
    `received` the payload bytes that came from it.
    """

    address: str
    received: int = 0
    dropped: bool = False
    lacks: set[PurePosixPath] = dataclasses.field(default_factory=set)
    form: int = 0
    delivered: bool = False
    strikes: int = 0
    struck_at: float = 0.0
    rests_until: float = 0.0

    def serves(self, files: Iterable[PurePosixPath]) -> bool:
        """Whether there is hope that it has all these files."""
        return not self.dropped and self.lacks.isdisjoint(files)

    def strike(self, began: float, rest_s: float, settings: MirrorSettings) -> bool:
        """Count a failure of a request begun at `began`; several at one time count once.

        Returns:
            Whether it was one too many.
        """
        now = time.monotonic()
        if began >= self.struck_at:
            self.struck_at = now
            self.strikes += 1
            pause = settings.rest_s * 2 ** (self.strikes - 1)
            self.rests_until = now + max(pause, rest_s)
        return self.strikes >= settings.attempts
