"""How libtorrent learns what readers wait for: by deadlines, and priorities above all others."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Collection, Iterator
from collections.abc import Set as AbstractSet
from typing import Any

from grokfetch.fetch.source import Order
from grokfetch.fetch.swarm.session import Session

__all__ = ["AHEAD", "WAITED", "Urgent", "priority"]

WAITED, AHEAD = 7, 6
"""The priorities of pieces that readers wait for, and of those they will need next. All others are
lower; otherwise libtorrent would bring some of each kind."""

INSIST_S = 5.0
"""After so long without a byte of an awaited piece, it is asked for again; then after twice as
long, and so on: peers that joined or became willing later do not know its deadline."""

LONGEST_INSIST_S = 60.0

DEADLINE_STEP_MS = 10
"""How much later each awaited piece may come than the one before it."""

WINDOW = 64 << 20
"""Bytes of pieces that have a deadline at one time, and never fewer than two pieces: with very
many, libtorrent would bring a part of each, and complete none."""

QUEUE_S = 1
"""Seconds' worth of blocks that a peer is asked for at one time if demands may come; libtorrent's
default is three. A demand cannot take back blocks that are already on their way."""

OPEN_S = 0.5
"""Seconds' worth of pieces that may be asked for if demands may come, including awaited ones. It
must exceed the time from asking for a piece to learning that it has come, or the rate cannot grow:
a peer 0.1 s away reached its full rate three seconds later for it, none lost it.
"""

LEAST_OPEN = 1 << 20
"""At least so many bytes of them, and two pieces, even before the rate is known."""

FORGET = 0.98
"""The factor by which each look lowers the highest rate seen."""


class Urgent:
    """What libtorrent is asked for before all else, in one session.

    If demands may come, only a few other pieces may be asked for at a time, whatever their
    priority: what peers have begun to send cannot be taken back, and the next demand would have to
    wait for it.

    Args:
        session: of libtorrent.
        handle: libtorrent's, of the torrent.
        order: what to bring.

    Attributes:
        waited: the pieces that have a deadline.
    """

    def __init__(self, session: Session, handle: Any, order: Order) -> None:
        self._handle = handle
        self._order = order
        self._demand = order.demand
        self._size = order.layout.piece_length
        self._heeded = -1
        self._came = (0, 0)
        self._insist_s, self._insist_at = INSIST_S, 0.0
        self._received, self._rate, self._looked_at = 0, 0.0, time.monotonic()
        self._session = session
        self._levels: dict[int, int] = {}
        self._open: set[int] = set()
        self._later: Iterator[int] = iter(())
        self.waited: set[int] = set()
        if self._demand.readers:
            self.begin(order.want)

    def begin(self, left: Collection[int]) -> None:
        """From now on decide what is asked for.

        Args:
            left: the pieces that are still to come.
        """
        readers = self._demand.readers
        self._heeded = -1
        self._open = set()
        self._levels = {piece: 0 if readers else self._usual(piece) for piece in left}
        if readers:
            self._session.set_queue_time(QUEUE_S)
            # Random: peers that all fetch the same pieces could give each other nothing.
            later = random.sample(sorted(left), len(left))
            self._later = iter(sorted(later, key=self._usual, reverse=True))

    def leave(self) -> None:
        """Leave the decision to another, who must set all priorities.

        libtorrent lowers those of pieces whose deadlines are removed.
        """
        self._handle.clear_piece_deadlines()
        self.waited = set()

    def heed(self, left: AbstractSet[int], arrived: AbstractSet[int]) -> None:
        """Note what has been demanded since; called at each turn.

        A deadline makes libtorrent take back what it has asked of peers, and ask all of them for
        the blocks of these pieces; a priority only decides what is asked for next, and peers have
        a second's worth of requests by then.

        Args:
            left: the pieces that are still to come.
            arrived: those of them that have come but have not been reported yet.
        """
        waited = None
        if self._demand.version != self._heeded:
            self._heeded = self._demand.version
            waited = [piece for piece in self._demand.waited if piece in left]
            # Those without a deadline, too: otherwise peers would be asked for others meanwhile.
            self._levels |= dict.fromkeys((p for p in waited if p not in self.waited), WAITED)
        if self._demand.readers:
            self._open_more(left, arrived)
        # All at once: a peer that connects while nothing is wanted learns, for good, that this host
        # only uploads.
        if self._levels:
            self._handle.prioritize_pieces(list(self._levels.items()))
            self._levels = {}
        if waited is not None:
            self._set_deadlines(waited)

    def _set_deadlines(self, waited: list[int]) -> None:
        soonest = waited[: max(2, WINDOW // self._size)]
        for place, piece in enumerate(soonest):
            if piece not in self.waited:
                self._handle.set_piece_deadline(piece, place * DEADLINE_STEP_MS)
        if not self.waited.issuperset(waited):
            self._insist_s, self._insist_at = INSIST_S, time.monotonic() + INSIST_S
        self.waited = set(soonest)

    def _open_more(self, left: AbstractSet[int], arrived: AbstractSet[int]) -> None:
        """Let some pieces that no reader waits for be asked for."""
        self._open = (self._open & left) - arrived
        most = max(2, int(max(LEAST_OPEN, self._rate * OPEN_S) / self._size)) - len(
            self.waited - arrived
        )
        later = itertools.chain(self._demand.ahead, self._later)
        while len(self._open) < most and (piece := next(later, None)) is not None:
            if piece in left and piece not in self._open and piece not in arrived:
                self._open.add(piece)
                self._levels[piece] = self._usual(piece)

    def _usual(self, piece: int) -> int:
        """The priority of a piece that no reader waits for."""
        return priority(self._order.urgency.get(piece, 4))

    def look(self, received: int, arrived: AbstractSet[int]) -> None:
        """Check the rate, and whether awaited pieces come.

        Args:
            received: payload bytes in this session.
            arrived: pieces that have come but have not been reported yet.
        """
        now = time.monotonic()
        rate = (received - self._received) / max(now - self._looked_at, 1e-3)
        self._received, self._looked_at = received, now
        self._rate = max(rate, FORGET * self._rate)
        waited = self.waited - arrived
        queue = self._handle.get_download_queue() if waited else ()
        mine = [part for part in queue if part["piece_index"] in waited]
        progress = sum(block["bytes_progress"] for part in mine for block in part["blocks"])
        came = (len(waited), progress)
        if not waited or came != self._came:
            self._insist_s, self._insist_at = INSIST_S, now + INSIST_S
        elif now >= self._insist_at:
            self._insist(now, waited)
        self._came = came

    def _insist(self, now: float, waited: AbstractSet[int]) -> None:
        """Ask again for awaited pieces of which nothing comes."""
        self._insist_s = min(2 * self._insist_s, LONGEST_INSIST_S)
        self._insist_at = now + self._insist_s
        self._handle.clear_piece_deadlines()
        for place, piece in enumerate(self._demand.waited):
            if piece in waited:
                self._handle.set_piece_deadline(piece, place * DEADLINE_STEP_MS)


def priority(urgency: int) -> int:
    """The priority of a piece that no reader waits for, from its urgency, 7 down to 1."""
    return 1 + (urgency - 1) * (AHEAD - 1) // 7
