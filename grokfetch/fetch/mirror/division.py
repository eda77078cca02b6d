"""The two ways in which a swarm and mirrors divide pieces: in turns, or side by side for a while.

`together` decides how to divide, and divides again when one side is idle; here a division runs, and
says when it is time for the next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING

from grokfetch.events import Arrived, Notice, Traffic
from grokfetch.fetch.mirror.state import Mirror, MirrorSettings
from grokfetch.fetch.source import Order
from grokfetch.torrent.layout import Layout

if TYPE_CHECKING:
    from grokfetch.fetch.mirror.pool import Pool

__all__ = ["Event", "Patience", "Round", "Turn"]

ON_DEMAND_S = 0.02
"""Seconds to wait for mirrors when a demand may come at any moment."""

WAIT_S = 0.2
"""Seconds to wait for mirrors when there is nothing else to wait for."""

LONG_S = 20.0
"""If one side needs more seconds than this for its rest while the other is idle, the rest is
divided again. Ending a swarm costs the blocks of its unfinished pieces and the search for peers."""

QUIET_S = 10.0
"""After so many seconds without a byte a swarm's pieces go to idle mirrors."""

DEMAND_QUIET_S = 2.0
"""After so many seconds without a byte, awaited pieces are not left to a swarm."""

PIECES_TOO_LATE, TOO_LATE_S = 4, 60.0
"""Nor are they if other pieces come but none of them for `DEMAND_QUIET_S` plus the time that so
many pieces take, but at most so many seconds more."""

FAIR_S = 5.0
"""Seconds before the rate of mirrors is known."""

RATE_INTERVAL_S = 0.5

Event = Arrived | Traffic | Notice


class Turn:
    """One side at work for readers on demand, until the other should take over.

    Attributes:
        arrived: pieces that are there.
        received: payload bytes since the order, of both sides.
    """

    def __init__(
        self, order: Order, received: int, can_help: Callable[[Layout, set[int]], bool]
    ) -> None:
        self._order = order
        self._can_help = can_help
        self._before = self.received = received
        self.arrived: set[int] = set()

    @property
    def _waited(self) -> set[int]:
        wanted = self._order.want | self._order.demand.admitted
        return set(wanted.intersection(self._order.demand.waited) - self.arrived)

    def of_swarm(self, swarm: Generator[Event, None, None]) -> Generator[Event, None, None]:
        """Run the swarm until a reader has waited too long for what a mirror may have."""
        patience, rate = Patience(self._order.layout.piece_length), 0.0
        with contextlib.closing(swarm):
            for event in swarm:
                if isinstance(event, Arrived):
                    self.arrived.update(event.pieces)
                if isinstance(event, Traffic):
                    self.received = max(self.received, self._before + event.received)
                    rate = event.rate
                    yield dataclasses.replace(event, received=self.received)
                else:
                    yield event
                waited = self._waited
                late = patience.ends(time.monotonic(), waited, self.received, rate)
                if late and self._can_help(self._order.layout, waited):
                    return

    def of_mirrors(
        self, mirrors: list[Mirror], settings: MirrorSettings, *, alone: bool
    ) -> Generator[Event, None, None]:
        """Run mirrors until none is left, or none may have what a reader waits for.

        Args:
            mirrors: which.
            settings: how to treat them.
            alone: whether there is no swarm that might have it.
        """
        from grokfetch.fetch.mirror.pool import Pool

        order, rate = self._order, _Rate()
        pieces = sorted(order.want)
        pool = Pool(mirrors, order.layout, order.root, pieces, settings, order.demand, order.have)
        version = order.demand.version
        with pool:
            while pool.busy:
                waited = self._waited
                if waited and not alone and not self._can_help(order.layout, waited):
                    return
                # The caller must learn of demands before anything can be done.
                for event in pool.take(0.0 if order.demand.version != version else ON_DEMAND_S):
                    if isinstance(event, Arrived):
                        self.arrived.update(event.pieces)
                    yield event
                version = order.demand.version
                self.received = self._before + pool.received
                yield Traffic(self.received, rate.of(pool.received), 0)


class Patience:
    """How long readers have waited in vain for what a swarm should bring. Pure: no clock.

    Args:
        piece_length: in bytes.
    """

    def __init__(self, piece_length: int) -> None:
        self._piece_length = piece_length
        self._waited: set[int] = set()
        self._received = 0
        self._moved_at = self._served_at = 0.0

    def ends(self, now: float, waited: set[int], received: int, rate: float) -> bool:
        """Whether it has been too long: no byte came, or only other pieces did.

        Args:
            now: monotonic seconds.
            waited: the pieces that are waited for.
            received: payload bytes so far, of any pieces.
            rate: bytes a second.
        """
        if not self._waited or not self._waited <= waited:
            self._moved_at = self._served_at = now
        if received > self._received:
            self._moved_at = now
        self._waited, self._received = waited, received
        pieces_s = PIECES_TOO_LATE * self._piece_length / max(rate, 1.0)
        longest_s = DEMAND_QUIET_S + min(pieces_s, TOO_LATE_S)
        late = now - self._moved_at > DEMAND_QUIET_S or now - self._served_at > longest_s
        return bool(waited) and late


class Round:
    """One division of the pieces under way.

    Attributes:
        arrived: pieces that are there.
        received: payload bytes since the order, of both sides.
        swarm_moved: whether the swarm has brought a byte, or had nothing to bring.
        late: the swarm's pieces that a reader waited for in vain; mirrors may have them.
    """

    def __init__(
        self,
        order: Order,
        theirs: set[int],
        ours: list[int],
        received: int,
        can_help: Callable[[Layout, set[int]], bool],
    ) -> None:
        self._order = order
        self._can_help = can_help
        self._swarm_left = set(theirs)
        self._mirrors_left = set(ours)
        self._shared = bool(ours)
        self._before = received
        self._start = self._moved_at = time.monotonic()
        self._swarm = Traffic(0, 0.0, 0)
        self._swarm_bytes = 0
        self._mirror_bytes = 0
        self._rate = _Rate()
        self._patience = Patience(order.layout.piece_length)
        self.arrived: set[int] = set()
        self.received = received
        self.swarm_moved = not theirs
        self.late: set[int] = set()

    def run(self, pool: Pool, swarm: Generator[Event, None, None]) -> Generator[Event, None, None]:
        """Run until both are done, or until it is better to divide the rest again."""
        with contextlib.closing(swarm):
            for event in swarm:
                yield from self._from_mirrors(pool, 0.0)
                yield from self._from_swarm(event)
                yield self._traffic(pool)
                if self._swarm_keeps_waiting():
                    return
                if not pool.busy and self._swarm_is_slow():
                    break
        give_up_at = math.inf
        while pool.busy and time.monotonic() < give_up_at:
            yield from self._from_mirrors(pool, WAIT_S)
            yield self._traffic(pool)
            if give_up_at == math.inf and self._mirrors_are_slow():
                pool.retire()
                give_up_at = time.monotonic() + LONG_S
        yield from self._from_mirrors(pool, 0.0)
        yield self._traffic(pool)

    def _from_mirrors(self, pool: Pool, timeout_s: float) -> Iterator[Event]:
        for event in pool.take(timeout_s):
            if isinstance(event, Arrived):
                self._mirrors_left.difference_update(event.pieces)
                self._mirror_bytes += self._bytes(event.pieces)
                self.arrived.update(event.pieces)
            yield event

    def _from_swarm(self, event: Event) -> Iterator[Event]:
        if isinstance(event, Traffic):
            if event.received > self._swarm.received:
                self._moved_at = time.monotonic()
                self.swarm_moved = True
            self._swarm = event
            return
        if isinstance(event, Arrived):
            self.swarm_moved = True
            self._swarm_left.difference_update(event.pieces)
            self._swarm_bytes += self._bytes(event.pieces)
            self.arrived.update(event.pieces)
        yield event

    def _traffic(self, pool: Pool) -> Traffic:
        self.received = self._before + self._swarm.received + pool.received
        rate = self._swarm.rate + self._rate.of(pool.received)
        return Traffic(self.received, rate, self._swarm.peers, self._swarm.sent)

    def _swarm_is_slow(self) -> bool:
        """Whether mirrors, idle now, should take pieces over."""
        quiet = time.monotonic() - self._moved_at > QUIET_S
        # Mirrors that got no share because they are slow help only against silence.
        slow = quiet or (self._shared and self._long(self._swarm_left, self._theirs))
        if not slow or not self._can_help(self._order.layout, self._swarm_left):
            return False
        self.swarm_moved &= not quiet
        return True

    def _swarm_keeps_waiting(self) -> bool:
        """Whether a reader waits in vain for one of the swarm's pieces that a mirror may have."""
        now, waited = time.monotonic(), self._swarm_left.intersection(self._order.demand.waited)
        ends = self._patience.ends(now, waited, self._swarm.received, self._swarm.rate)
        if not ends or not self._can_help(self._order.layout, waited):
            return False
        self.late = waited
        self.swarm_moved &= now - self._moved_at <= DEMAND_QUIET_S
        return True

    def _mirrors_are_slow(self) -> bool:
        """Whether the swarm, idle now and known to work, should take pieces over."""
        judged = self._swarm_bytes > 0 and time.monotonic() - self._start > FAIR_S
        return judged and self._long(self._mirrors_left, self._ours)

    def _long(self, pieces: set[int], rate: float) -> bool:
        return bool(pieces) and self._bytes(pieces) > LONG_S * rate

    @property
    def _theirs(self) -> float:
        return self._swarm_bytes / max(time.monotonic() - self._start, 1e-3)

    @property
    def _ours(self) -> float:
        return self._mirror_bytes / max(time.monotonic() - self._start, 1e-3)

    @property
    def next_share(self) -> float:
        """The share of the remaining pieces that the mirrors should get, by the rates seen."""
        both = self._swarm_bytes + self._mirror_bytes
        return self._mirror_bytes / both if both else 0.5

    def _bytes(self, pieces: Iterable[int]) -> int:
        return sum(1 for _ in pieces) * self._order.layout.piece_length


class _Rate:
    """Bytes a second, over intervals long enough to mean something."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._bytes = 0
        self._rate = 0.0

    def of(self, count: int) -> float:
        now = time.monotonic()
        if now - self._since >= RATE_INTERVAL_S:
            self._rate = (count - self._bytes) / (now - self._since)
            self._since, self._bytes = now, count
        return self._rate
