"""How hosts that fetch from one seed divide it, so that it sends each piece about once.

By default libtorrent lets every host ask the seed for whatever it lacks, at any time: the seed then
sends most pieces more than once, and all wait for it. Here each host asks the seed for its own
share, and for other pieces only when another host has them; a host whose share is complete helps
others with theirs. What readers wait for comes first in every share, because readers of several
hosts mostly wait for the same. Hosts agree on the shares without messages, by the order of their
peer ids, and nobody waits for a host that does not do its part.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from grokfetch.fetch.source import Order
from grokfetch.fetch.swarm.session import CLIENT, Session, libtorrent
from grokfetch.fetch.swarm.urgent import AHEAD, WAITED, Urgent, priority

__all__ = ["Demanded", "FanOut", "Peer", "Share", "priorities", "share_of"]

TURN_S = 0.1
"""How often to compute which pieces may be asked for; less often if that takes long."""

BUSY = 0.02
"""The share of one core that computing them may take. Waiting for libtorrent does not count: if it
is busy, that takes longer than computing, and hosts would learn too late what others have."""

UNDER_WAY = 1
"""The seed is probably already sending an owner so many of its own pieces, the next to come."""

FEW = 3
"""A host with fewer of its own pieces left than this helps others."""

SOON = 2
"""So many of the pieces that a host may ask for come before the next so many, and these before the
rest."""

PATIENCE_S = 2.0
"""If nothing comes from the seed for so long, or for longer than ever before, others ask for what a
host has begun."""


@dataclasses.dataclass(frozen=True, slots=True)
class Peer:
    """A connected peer.

    Attributes:
        id: its peer id.
        seeds: whether it has everything.
        divides: whether it fetches with this program.
    """

    id: bytes
    seeds: bool
    divides: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Demanded:
    """What readers of this host need.

    Attributes:
        waited: pieces that they wait for, in this order; these come before all others.
        ahead: pieces that they will need next; these come second.
        late: pieces that this host asks for itself, whoever owns them.
    """

    waited: Sequence[int] = ()
    ahead: Sequence[int] = ()
    late: AbstractSet[int] = frozenset()


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """What one of several hosts asks the seed for: each piece has one host as owner."""

    rank: int
    hosts: int

    def owner(self, piece: int) -> int:
        """The rank of the host that owns a piece."""
        return piece % self.hosts

    def turn(self, piece: int, rank: int) -> int:
        """How many other hosts come before a host for a piece; 0 for the owner.

        The turns of a piece differ between hosts, so that helpers do not all help with the same
        piece.
        """
        owner = self.owner(piece)
        if owner == rank:
            return 0
        distance = (rank - owner - 1) % self.hosts
        return 1 + (distance + piece // self.hosts) % (self.hosts - 1)


def share_of(own: bytes, peers: Collection[Peer]) -> Share | None:
    """What this host asks the only seed for, None if there is nothing to divide.

    With several seeds, or none that announces itself, not everyone waits for one seed's rate.

    Args:
        own: this host's id.
        peers: those it is connected to.
    """
    hosts = sorted({own, *(peer.id for peer in peers if peer.divides and not peer.seeds)})
    if sum(peer.seeds for peer in peers) != 1 or len(hosts) == 1:
        return None
    return Share(hosts.index(own), len(hosts))


def priorities(  # noqa: PLR0913  # all that a host sees, each by name
    pieces: Iterable[int],
    usual: Sequence[int],
    copies: Sequence[int],
    share: Share,
    begun: Collection[int] = (),
    *,
    patient: bool = True,
    demanded: Demanded = Demanded(),
) -> dict[int, int]:
    """The priority of each piece that is still to come, 0 if it must not be asked for yet.

    Pieces that only the seed has come first, if this host may ask for them: its own share in a
    fixed order and, when little of that is left, pieces of other hosts that it helps. It helps with
    the pieces that an owner would ask for last, not with those that the owner is probably being
    sent already: near the end only these are left, and each piece sent twice then keeps everybody
    waiting. The usual order is kept within this. Pieces that other hosts have come last.

    Args:
        pieces: those still to come.
        usual: the priority by piece, from 1 to 6, if nothing is divided.
        copies: how many peers have a piece, by piece.
        share: of this host.
        begun: the pieces of which this host has asked for a part.
        patient: whether to leave to others what they are probably being sent; False if they have
            received nothing for a while.
        demanded: what readers need.
    """
    places = {piece: place for place, piece in enumerate((*demanded.waited, *demanded.ahead))}
    left = sorted(pieces, key=lambda piece: (places.get(piece, len(places)), -usual[piece], piece))
    lone = [piece for piece in left if copies[piece] < 2]
    shares: list[list[int]] = [[] for _ in range(share.hosts)]
    for piece in lone:
        shares[share.owner(piece)].append(piece)
    mine = shares[share.rank]
    if len(mine) < FEW:
        mine = [*mine, *_help(shares, share, begun, patient=patient)]
    overdue = [piece for piece in lone if piece in demanded.late]
    early = places.keys() if places else {piece for piece in left if usual[piece] > 3}
    levels = {piece: 1 + (piece in early) for piece in left} | dict.fromkeys(lone, 0)
    highest = AHEAD - 1 if places else WAITED
    for place, piece in enumerate(dict.fromkeys((*overdue, *mine))):
        tier = max(0, 2 - place // SOON)
        levels[piece] = min(highest, 3 + (usual[piece] - 1) // 2 + tier)
        if piece in places:
            levels[piece] = WAITED if places[piece] < len(demanded.waited) else AHEAD
    return levels


def _help(
    shares: Sequence[Sequence[int]], share: Share, begun: Collection[int], *, patient: bool
) -> list[int]:
    """What a host asks for from the shares of others, first what it has begun."""
    helpers = [rank for rank, own in enumerate(shares) if len(own) < FEW]
    chosen = []
    for owner, own in enumerate(shares):
        if owner == share.rank:
            continue
        for place, piece in enumerate(own):
            turns = {share.turn(piece, rank): rank for rank in helpers if rank != owner}
            free = place >= UNDER_WAY and turns[min(turns)] == share.rank
            if free or not patient or piece in begun:
                chosen.append((piece not in begun, not free, -place, piece))
    return [piece for *_, piece in sorted(chosen)]


class Patience:
    """Whether to keep leaving to others what the seed is probably sending them.

    Args:
        now: the time, in seconds.
    """

    def __init__(self, now: float) -> None:
        self._lone = 0
        self._since = now
        self._longest_s = PATIENCE_S

    def lasts(self, lone: int, now: float) -> bool:
        """Whether the last new piece from the seed came recently enough.

        Args:
            lone: how many pieces only the seed has.
            now: the time.
        """
        waited = now - self._since
        patient = waited <= self._longest_s
        if lone != self._lone:
            # At most twice as long, because one host that stood still is no measure.
            self._longest_s = max(self._longest_s, min(waited, 2 * self._longest_s))
            self._lone, self._since = lone, now
        return patient


class FanOut:
    """Divides the only seed with the other hosts, in one session; otherwise leaves all to `alone`.

    Args:
        session: of libtorrent.
        handle: libtorrent's, of the torrent.
        order: what to bring.
        alone: decides what is asked for while nothing is divided.
    """

    def __init__(self, session: Session, handle: Any, order: Order, alone: Urgent) -> None:
        self._session = session
        self._handle = handle
        self._demand = order.demand
        self._alone = alone
        self._usual = [priority(order.urgency.get(i, 4)) for i in range(order.layout.piece_count)]
        self._share: Share | None = None
        self._set: dict[int, int] = {}
        self._turn_at = 0.0
        self._patience = self._waiting = Patience(0.0)
        self._waited: set[int] = set()
        self._late: set[int] = set()

    def heed(self, left: AbstractSet[int], arrived: AbstractSet[int]) -> None:
        """Note which peers are there, what they have and what is demanded; called at each turn.

        Args:
            left: the pieces that are still to come.
            arrived: those of them that have come but have not been reported yet.
        """
        start = time.monotonic()
        demanded = self._share is not None and not self._waited.issuperset(self._demand.waited)
        # A host that stays wants only what is read there.
        if not self._demand.stays and (demanded or start >= self._turn_at):
            spent = time.thread_time()
            self._meet(left, start)
            if self._share is not None:
                self._divide(self._share, left, start)
            spent = time.thread_time() - spent
            self._turn_at = time.monotonic() + max(TURN_S, spent / BUSY)
        if self._share is None:
            self._alone.heed(left, arrived)

    def look(self, received: int, arrived: AbstractSet[int]) -> None:
        """Check the rate, and whether awaited pieces come.

        Args:
            received: payload bytes in this session.
            arrived: pieces that have come but have not been reported yet.
        """
        if self._share is None:
            self._alone.look(received, arrived)

    def _meet(self, left: AbstractSet[int], now: float) -> None:
        """Learn which hosts there are, and begin or end to divide."""
        share = share_of(self._session.peer_id, _peers(self._handle.get_peer_info()))
        if share is not None and self._share is None:
            self._alone.leave()
            self._session.divide(yes=True)
            self._patience, self._waiting, self._late = Patience(now), Patience(now), set()
            self._set = {}
        elif share is None and self._share is not None:
            self._session.divide(yes=False)
            self._alone.begin(left)
        self._share = share

    def _divide(self, share: Share, left: AbstractSet[int], now: float) -> None:
        asked = self._demand.waited
        self._waited = set(asked)
        copies = self._handle.piece_availability()
        if not copies:  # libtorrent has everything.
            return
        waited = [piece for piece in asked if piece in left]
        lone = [piece for piece in waited if copies[piece] < 2]
        if not lone:
            self._waiting = Patience(now)
        elif not self._waiting.lasts(len(lone), now):
            self._late.update(lone)
        levels = priorities(
            left,
            self._usual,
            copies,
            share,
            {part["piece_index"] for part in self._handle.get_download_queue()},
            patient=self._patience.lasts(sum(copies[piece] < 2 for piece in left), now),
            demanded=Demanded(waited, self._demand.ahead, self._late),
        )
        new = {piece: level for piece, level in levels.items() if self._set.get(piece) != level}
        if new:
            self._set |= new
            self._handle.prioritize_pieces(list(new.items()))


def _peers(infos: Iterable[Any]) -> list[Peer]:
    """The peers of libtorrent that have completed the handshake."""
    lt = libtorrent().peer_info
    absent = lt.connecting | lt.handshake
    return [
        Peer(
            peer.pid.to_bytes(),
            seeds=bool(peer.flags & lt.seed),
            divides=peer.client == CLIENT.encode() and not peer.flags & lt.upload_only,
        )
        for peer in infos
        if not peer.flags & absent
    ]
