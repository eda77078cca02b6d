"""A swarm and mirrors as one `PieceSource`, working at the same time on disjoint pieces.

The pieces are divided before anything runs: the swarm knows only of the first ones, mirrors bring
the last ones. So no piece can be written by both, however late: a late block from a slow peer
cannot spoil what a mirror brought, because libtorrent never asked for it. (Taking a piece away from
libtorrent while it runs would be less safe: the block of a timed-out request may still come, and is
written before its hash is known.) Nobody knows beforehand how to divide, so it is done in rounds.
The first gives half to each side; when one has finished and the other would need long for the rest,
that rest is divided again, by the rates seen. Pieces that a reader waits for in vain also go from
the swarm to mirrors in this way. A swarm that brought nothing gets nothing in the next round, and
when mirrors are dropped, everything goes to the swarm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import PurePosixPath

from grokfetch.errors import OutOfReach, Stalled
from grokfetch.events import Notice, Origin, Traffic
from grokfetch.fetch.mirror.addresses import label, unusable
from grokfetch.fetch.mirror.division import Event, Round, Turn
from grokfetch.fetch.mirror.state import Mirror, MirrorSettings
from grokfetch.fetch.source import Order, PieceSource
from grokfetch.torrent.layout import Layout
from grokfetch.torrent.metainfo import TorrentFile

__all__ = ["Together"]


class Together:
    """Pieces from a swarm and from mirrors; metadata from the swarm.

    Args:
        swarm: where metadata comes from, and what mirrors do not have.
        addresses: of mirrors, named by the user or the manifest.
        strange: of mirrors, from a magnet link; those of the torrent are added.
        settings: how to treat mirrors.
    """

    def __init__(
        self,
        swarm: PieceSource,
        addresses: Iterable[str] = (),
        strange: Iterable[str] = (),
        settings: MirrorSettings | None = None,
    ) -> None:
        self._swarm = swarm
        self._addresses = tuple(addresses)
        self._strange = tuple(strange)
        self._settings = settings or MirrorSettings()
        self._mirrors: dict[str, Mirror | None] = {}
        self._swarm_works = True
        self._from_peers: Mapping[Origin, int] = {}

    @property
    def info_hash(self) -> str:
        """Of the torrent, 40 or 64 hexadecimal digits."""
        return self._swarm.info_hash

    @property
    def magnet(self) -> str | None:
        """The magnet link of the swarm, None if it was made from a torrent."""
        return self._swarm.magnet

    def metadata(self) -> Generator[Traffic | Notice | TorrentFile, None, None]:
        """The metadata from the swarm; mirrors have none."""
        yield from self._swarm.metadata()

    def download(self, order: Order) -> Generator[Event, None, None]:
        """Bring the wanted pieces.

        Raises:
            OutOfReach: the swarm cannot be joined, and mirrors do not have everything.
            Stalled: there is no way to find a peer, and mirrors do not have everything.
            StorageFailed: the disk does not take them.
            TorrentInvalid: the swarm reads the torrent differently than we do.
        """
        # httpx takes a tenth of a second to import; only fetches from mirrors pay for it.
        from grokfetch.fetch.mirror.pool import Pool

        yield from self.meet(order.torrent)
        if order.demand.stays:
            yield from self._in_turn(order)
            return
        left = set(order.want)
        received = 0
        share, quiet, late = 0.5, False, set[int]()
        while left:
            ours = self._share(order.layout, left, 1.0 if quiet else share, late)
            theirs = left.difference(ours)
            if not ours and not self._can_help(order.layout, left):
                yield from self._swarm_alone(_want(order, theirs), received)
                return
            a_round = Round(order, theirs, ours, received, self._can_help)
            with (
                Pool(
                    self.alive, order.layout, order.root, ours, self._settings, order.demand
                ) as pool,
                contextlib.closing(a_round.run(pool, self._join(_want(order, theirs)))) as events,
            ):
                yield from map(self._with_senders, events)
            left -= a_round.arrived
            received = a_round.received
            share, quiet = a_round.next_share, not a_round.swarm_moved or not self._swarm_works
            late = a_round.late

    def _in_turn(self, order: Order) -> Iterator[Event]:
        """Bring what is asked for while it runs: from the swarm, and from mirrors what it lacks."""
        received, by_swarm = 0, True
        while True:
            turn = Turn(order, received, self._can_help)
            with contextlib.closing(
                turn.of_swarm(self._join(order, stays=True))
                if by_swarm and self._swarm_works
                else turn.of_mirrors(self.alive, self._settings, alone=not self._swarm_works)
            ) as events:
                yield from map(self._with_senders, events)
            received, have = turn.received, order.have | turn.arrived
            left = (order.want | order.demand.admitted) - have
            order = dataclasses.replace(order, have=have, want=left)
            by_swarm = not by_swarm
            if not self._swarm_works and not self.alive:
                raise Stalled("there is no way to find a peer, and no mirror is left")

    def _swarm_alone(self, order: Order, received: int) -> Iterator[Event]:
        try:
            with contextlib.closing(self._swarm.download(order)) as swarm:
                yield from map(self._with_senders, _shifted(swarm, received))
        except (OutOfReach, Stalled) as error:
            faults = [
                f"{it.name}: {fault}"
                for it in self._mirrors.values()
                if it is not None
                for fault in list(it.faults)[-1:]
            ]
            failures = "; ".join((error.what, *faults))
            raise type(error)(failures, path=error.path, hint=error.hint) from None

    def _with_senders(self, event: Event) -> Event:
        """Traffic including the mirrors, and how much each has sent, also in earlier rounds."""
        if not isinstance(event, Traffic):
            return event
        self._from_peers = event.sent or self._from_peers
        sent = Counter(self._from_peers)
        for mirror in self._mirrors.values():
            if mirror is not None and mirror.received:
                sent[Origin("mirror", mirror.name)] += mirror.received
        return dataclasses.replace(event, sent=sent, mirrors=len(self.alive))

    def meet(self, torrent: TorrentFile) -> Iterator[Notice]:
        """Add each address once, and report what in the environment cannot be used."""
        if not self._mirrors and (self._addresses or self._strange or torrent.web_seeds):
            yield from map(Notice, self._settings.environment.notices)
        addresses = [(address, False) for address in self._addresses]
        addresses += [(address, True) for address in (*self._strange, *torrent.web_seeds)]
        for address, stranger in addresses:
            if address not in self._mirrors:
                why = unusable(address, stranger=stranger)
                if why is None:
                    self._mirrors[address] = self._mirror(address, stranger=stranger)
                else:
                    self._mirrors[address] = None
                    yield Notice(f"mirror {address:.200} is not used: {why}")

    def _mirror(self, address: str, *, stranger: bool) -> Mirror:
        # A stranger's address is never moved to another endpoint.
        here = address if stranger else self._settings.environment.at_hub(address)
        return Mirror(here, label(here), self._settings.connections)

    @property
    def alive(self) -> list[Mirror]:
        """The mirrors that may still be of use."""
        return [it for it in self._mirrors.values() if it is not None and not it.dropped]

    def _share(self, layout: Layout, left: set[int], share: float, late: set[int]) -> list[int]:
        """The pieces for the mirrors, of those that one may have: the late ones, then the last."""
        mirrors = self.alive
        able = [
            piece
            for piece in sorted(left, key=lambda piece: (piece in late, piece))
            if any(mirror.serves(_files(layout, piece)) for mirror in mirrors)
        ]
        if not self._swarm_works:
            return able
        count = max(math.floor(share * len(able) + 0.5), len(late.intersection(able)))
        return sorted(able[len(able) - count :])

    def _can_help(self, layout: Layout, pieces: set[int]) -> bool:
        mirrors = self.alive
        return any(it.serves(_files(layout, piece)) for piece in pieces for it in mirrors)

    def _join(self, order: Order, *, stays: bool = False) -> Generator[Event, None, None]:
        """The swarm; if it cannot be joined, say so and go on with mirrors alone."""
        if not order.want and not stays:
            return
        try:
            yield from self._swarm.download(order)
        except (OutOfReach, Stalled) as error:
            self._swarm_works = False
            names = ", ".join(mirror.name for mirror in self.alive)
            yield Notice(f"{error.what}; going on with {names} alone")


def _want(order: Order, pieces: set[int]) -> Order:
    return dataclasses.replace(order, want=frozenset(pieces))


def _files(layout: Layout, piece: int) -> list[PurePosixPath]:
    return [part.file.path for part in layout.segments(piece) if not part.file.pad]


def _shifted(events: Iterator[Event], received: int) -> Iterator[Event]:
    """The same events, with the bytes received before added."""
    for event in events:
        if isinstance(event, Traffic):
            yield dataclasses.replace(event, received=event.received + received)
        else:
            yield event
