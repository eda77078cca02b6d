"""How hosts that fetch from one seed divide it, so that it sends each piece about once.

By itself libtorrent has every host ask the seed for whatever it lacks, at any time: the seed then
sends most pieces more than once, and all wait for it. Here each host asks it for a share of its
own, and for other pieces only when another host has them; a host whose share has come helps others
with theirs. Hosts agree on the shares without a word, by the order of the ids under which they know
each other, and nobody waits for one that does not do its part.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from grokfetch.fetch.source import Order
from grokfetch.fetch.swarm.session import CLIENT, Session, libtorrent
from grokfetch.fetch.swarm.urgent import priority

__all__ = ["FanOut", "Peer", "Share", "priorities", "share_of"]

TURN_S = 0.1
"""How often the pieces that may be asked for are determined; less often where that takes long."""

BUSY = 0.02
"""The part of the time that determining them may take."""


@dataclasses.dataclass(frozen=True, slots=True)
class Peer:
    """A connected peer.

    Attributes:
        id: by which others know it.
        seeds: whether it has everything.
        divides: whether it fetches, and by this program.
    """

    id: bytes
    seeds: bool
    divides: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """What one host of several asks the seed for: each piece is one host's own."""

    rank: int
    hosts: int

    def turn(self, piece: int) -> int:
        """Before how many others' turn it is this host's to ask for a piece; 0 is its own.

        Over the hosts the turns of a piece are all different, so that those who help do not all
        help with the same.
        """
        owner = piece % self.hosts
        if owner == self.rank:
            return 0
        distance = (self.rank - owner - 1) % self.hosts
        return 1 + (distance + piece // self.hosts) % (self.hosts - 1)


def share_of(own: bytes, peers: Collection[Peer]) -> Share | None:
    """What this host asks the only seed for, None where there is nothing to divide.

    Where there are several seeds, or none that says so, the rate of one is not what all wait for.

    Args:
        own: this host's id.
        peers: that it is connected to.
    """
    hosts = sorted({own, *(peer.id for peer in peers if peer.divides and not peer.seeds)})
    if sum(peer.seeds for peer in peers) != 1 or len(hosts) == 1:
        return None
    return Share(hosts.index(own), len(hosts))


def priorities(
    pieces: Iterable[int], usual: Sequence[int], copies: Sequence[int], share: Share
) -> dict[int, int]:
    """The priority of each piece that is still to come, 0 where it is not to be asked for yet.

    What only the seed has comes first, as far as it is this host's turn: its own share, and when
    nothing of that is left, what it helps with. What is usually earlier stays so; among equals
    owners begin at one end and helpers at the other. What others have comes behind.

    Args:
        pieces: that are still to come.
        usual: the priority by piece, from 1 to 6, where nothing is divided.
        copies: how many peers have a piece, by piece.
        share: of this host.
    """
    left = sorted(pieces)
    turns = {piece: share.turn(piece) for piece in left if copies[piece] < 2}
    now = min(turns.values(), default=0)
    mine = [piece for piece, turn in turns.items() if turn == now]
    middle = len(mine) // 2
    later = mine[:middle] if now else mine[middle:]
    levels = {piece: 0 if piece in turns else (usual[piece] + 1) // 2 for piece in left}
    levels |= {piece: 4 + (usual[piece] + 1) // 2 for piece in mine}
    return levels | {piece: levels[piece] - 1 for piece in later}


class FanOut:
    """Divides the only seed with the other hosts, in one session; does nothing where it is not so.

    Args:
        session: of libtorrent.
        handle: libtorrent's, of the torrent.
        order: what is to be brought.
    """

    def __init__(self, session: Session, handle: Any, order: Order) -> None:
        self._session = session
        self._handle = handle
        # Demands decide themselves what may be asked for.
        self._idle = order.demand.readers or order.demand.stays
        self._usual = [priority(order.urgency.get(i, 4)) for i in range(order.layout.piece_count)]
        self._share: Share | None = None
        self._set: dict[int, int] = {}
        self._turn_at = 0.0

    def heed(self, left: Collection[int]) -> None:
        """Take in who is there and what they have; called at each turn.

        Args:
            left: the pieces that are still to come.
        """
        start = time.monotonic()
        if self._idle or start < self._turn_at:
            return
        share = share_of(self._session.peer_id, self._peers())
        if (share is None) != (self._share is None):
            self._session.divide(yes=share is not None)
        if share is None and self._share is not None:
            self._prioritize({piece: self._usual[piece] for piece in left})
        self._share = share
        # It is empty once libtorrent has everything.
        if share is not None and (copies := self._handle.piece_availability()):
            self._prioritize(priorities(left, self._usual, copies, share))
        now = time.monotonic()
        self._turn_at = now + max(TURN_S, (now - start) / BUSY)

    def _peers(self) -> list[Peer]:
        lt = libtorrent().peer_info
        absent = lt.connecting | lt.handshake
        return [
            Peer(
                peer.pid.to_bytes(),
                seeds=bool(peer.flags & lt.seed),
                divides=peer.client == CLIENT.encode() and not peer.flags & lt.upload_only,
            )
            for peer in self._handle.get_peer_info()
            if not peer.flags & absent
        ]

    def _prioritize(self, levels: dict[int, int]) -> None:
        new = {i: level for i, level in levels.items() if self._set.get(i, self._usual[i]) != level}
        if new:
            self._set |= new
            self._handle.prioritize_pieces(list(new.items()))
