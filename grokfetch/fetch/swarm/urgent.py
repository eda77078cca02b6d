"""How libtorrent learns what somebody waits for: by deadlines, and priorities above all others."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from typing import Any

from grokfetch.fetch.demand import Demand
from grokfetch.torrent.layout import Layout

__all__ = ["Urgent", "priority"]

WAITED, AHEAD = 7, 6
"""The priorities of what somebody waits for, and of what somebody will need next. All others are
below them, or else libtorrent would bring some of all."""

INSIST_S = 5.0
"""After so long without a byte of what is waited for, it is asked for anew; then after twice as
long, and so on: peers that were not yet there, or not yet willing, know nothing of a deadline."""

LONGEST_INSIST_S = 60.0

DEADLINE_STEP_MS = 10
"""How much later each piece that is waited for may come than the one before it."""

WINDOW = 64 << 20
"""Bytes of pieces that have a deadline at one time, and never fewer than two pieces: of very many
libtorrent would bring some of each, and none would be whole."""


class Urgent:
    """What is asked of libtorrent before all else, in one session.

    Args:
        handle: libtorrent's, of the torrent.
        layout: the torrent's.
        demand: what somebody waits for.

    Attributes:
        waited: the pieces that have a deadline.
    """

    def __init__(self, handle: Any, layout: Layout, demand: Demand) -> None:
        self._handle = handle
        self._layout = layout
        self._demand = demand
        self._heeded = -1
        self._raised: dict[int, int] = {}
        self._came = (0, 0)
        self._insist_s, self._insist_at = INSIST_S, 0.0
        self.waited: set[int] = set()

    def heed(self, left: set[int]) -> None:
        """Take in what has been demanded since, of the pieces that are left.

        A deadline makes libtorrent take back what it has asked of peers, and ask all of them for
        the blocks of these pieces; a priority only decides what is asked for next, and peers have
        seconds' worth of requests by then.
        """
        demand = self._demand
        if demand.version == self._heeded:
            return
        self._heeded = demand.version
        most = max(2, WINDOW // self._layout.piece_length)
        waited = [piece for piece in demand.waited if piece in left]
        self._raise(left.intersection(demand.ahead), AHEAD)
        # Those beyond the window, too: else peers would be asked for others meanwhile.
        self._raise(waited, WAITED)
        for place, piece in enumerate(waited[:most]):
            if piece not in self.waited:
                self._handle.set_piece_deadline(piece, place * DEADLINE_STEP_MS)
                self._insist_s, self._insist_at = INSIST_S, time.monotonic() + INSIST_S
        self.waited = set(waited[:most])

    def _raise(self, pieces: Iterable[int], priority: int) -> None:
        new = [piece for piece in pieces if self._raised.get(piece, 0) < priority]
        if new:
            self._handle.prioritize_pieces([(piece, priority) for piece in new])
            self._raised.update(dict.fromkeys(new, priority))

    def insist(self, arrived: Collection[int]) -> None:
        """Ask anew for what is waited for if nothing of it comes.

        Args:
            arrived: pieces that have come and have not been said to be there.
        """
        now = time.monotonic()
        waited = self.waited.difference(arrived)
        queue = self._handle.get_download_queue() if waited else ()
        mine = [part for part in queue if part["piece_index"] in waited]
        progress = sum(block["bytes_progress"] for part in mine for block in part["blocks"])
        came = (len(waited), progress)
        if came != self._came or not waited:
            self._came, self._insist_s, self._insist_at = came, INSIST_S, now + INSIST_S
        elif now >= self._insist_at:
            self._insist_s = min(2 * self._insist_s, LONGEST_INSIST_S)
            self._insist_at = now + self._insist_s
            self._handle.clear_piece_deadlines()
            for place, piece in enumerate(self._demand.waited):
                if piece in waited:
                    self._handle.set_piece_deadline(piece, place * DEADLINE_STEP_MS)


def priority(urgency: int) -> int:
    """The priority of a piece that nobody waits for, of an urgency from 7 down to 1."""
    return 1 + (urgency - 1) * (AHEAD - 1) // 7
